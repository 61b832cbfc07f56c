"""A GPT-2 in a GGUF file, as llama.cpp names its parts. Such a file holds the configuration and the tokenizer, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import is_int, is_number, shown
from ..config import GPT2Config
from ..host import CheckpointError, StoredTensor
from ..tokenizer import Tokenizer
from .gguf_files import ARCHITECTURE
from .names import Found, gguf_name
from .tensors import cast, transposed

_SIZES = {
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "embedding_length": "n_embd",
    "context_length": "n_positions",
    "feed_forward_length": "n_inner",
}
_EPSILON = "attention.layer_norm_epsilon"
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_TOKENS = "tokenizer.ggml"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # the types of tokens
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""The numbers of the dtypes in which a file may store its matrices."""


def read_gguf_config(file: Path, values: Mapping[str, Any], found: Mapping[str, Found]) -> GPT2Config:
    """Return the configuration that a file's values and tensors describe.

    The logits are computed with wte, unless the file also holds an output matrix that differs from wte.
    """
    wte, head = (found[name].tensor if name in found else None for name in map(gguf_name, ("wte", "lm_head")))
    if wte is None:
        raise CheckpointError(f"{file}: lacks {gguf_name('wte')}")
    entries: dict[str, Any] = {"vocab_size": wte.shape[0]}
    for name, entry in _SIZES.items():
        if not is_int(size := values.get(f"{ARCHITECTURE}.{name}")):
            raise CheckpointError(f"{file}: {ARCHITECTURE}.{name} is {shown(size)}; expected a whole number")
        entries[entry] = size
    if not is_number(epsilon := values.get(f"{ARCHITECTURE}.{_EPSILON}")):
        raise CheckpointError(f"{file}: {ARCHITECTURE}.{_EPSILON} is {shown(epsilon)}; expected a number")
    kv_heads = values.get(f"{ARCHITECTURE}.attention.head_count_kv", entries["n_head"])
    if kv_heads != entries["n_head"]:
        raise CheckpointError(f"{file}: it has {shown(kv_heads)} heads of keys; GPT-2 has one for each of its heads")
    with np.errstate(over="ignore"):
        entries["layer_norm_epsilon"] = float(str(np.float32(epsilon)))  # the decimal that was meant, such as 1e-05
    entries["n_inner"] = None if entries["n_inner"] == 4 * entries["n_embd"] else entries["n_inner"]
    entries |= {entry: values.get(f"{_TOKENS}.{name}") for name, entry in _IDS.items()}
    entries["tie_word_embeddings"] = head is None or (
        head.shape == wte.shape and np.array_equal(wte.read(), head.read())
    )
    try:
        return GPT2Config.from_dict(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_gguf_tokenizer(file: Path, values: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a file, or None if it has none.

    Raises
    ------
    ValueError
        If the tokenizer does not work as GPT-2's does. The message names the file.
    """
    try:
        return _tokenizer(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _tokenizer(values: Mapping[str, Any]) -> Tokenizer | None:
    model = values.get(f"{_TOKENS}.model", "none")
    if model in ("none", "no_vocab"):
        return None
    for name, given, expected in (("model", model, "gpt2"), ("pre", values.get(f"{_TOKENS}.pre", "gpt-2"), "gpt-2")):
        if given != expected:
            raise ValueError(f"{_TOKENS}.{name} is {shown(given)}; expected {expected!r}, GPT-2's byte-level BPE")
    if values.get(f"{_TOKENS}.add_bos_token") or values.get(f"{_TOKENS}.add_space_prefix"):
        raise ValueError(f"{_TOKENS} says that something is added to each text, so decoding would return another text")
    tokens, merges = _strings(values, "tokens"), _strings(values, "merges")
    types = values.get(f"{_TOKENS}.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{_TOKENS}.token_type does not have one item for each of the {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED:
            continue
        if (other := vocab.setdefault(token, i)) != i:
            raise ValueError(f"{_TOKENS}.tokens has {shown(token)} twice, as {other} and {i}")
        if kind in (_CONTROL, _USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": i, "content": token, **flags, "special": kind == _CONTROL})
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    entries = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": steps,
        "decoder": steps,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return Tokenizer.from_json(json.dumps(entries, ensure_ascii=False).encode())


def _strings(values: Mapping[str, Any], name: str) -> list[str]:
    found = values.get(f"{_TOKENS}.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{_TOKENS}.{name} is {shown(found)}; expected an array of strings")
    return found


def gguf_model(
    config: GPT2Config, tensors: Mapping[str, StoredTensor], tokenizer: Tokenizer | None, dtype: str | None
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the values and the tensors of a model's GGUF file, by name.

    Matrices are stored in the dtype, which is that of each matrix unless given, and float32 for float64. As llama.cpp
    expects, biases, gains and positions are stored in float32.

    Raises
    ------
    ValueError
        If llama.cpp does not compute such a model.
    """
    for name, expected in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(config, name) is not expected:
            raise ValueError(f"{name} is {not expected}: llama.cpp's GPT-2 does not compute this, and would be wrong")
    stored = {}
    for path, tensor in tensors.items():
        own = dtype or (tensor.dtype if tensor.dtype in FILE_TYPES else "float32")
        is_matrix = len(tensor.shape) > 1 and path != "wpe"
        converted = cast(path, tensor, own if is_matrix else "float32")
        stored[gguf_name(path)] = transposed(converted) if path.endswith("/w") else converted
    sizes = config.to_dict() | {"n_inner": config.n_hidden}
    values: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.file_type": FILE_TYPES[stored[gguf_name("wte")].dtype],
        f"{ARCHITECTURE}.vocab_size": config.n_vocab,
        **{f"{ARCHITECTURE}.{name}": sizes[entry] for name, entry in _SIZES.items()},
        f"{ARCHITECTURE}.{_EPSILON}": config.layer_norm_epsilon,
        f"{_TOKENS}.model": "none" if tokenizer is None else "gpt2",
    }
    if tokenizer is not None:
        values |= _tokenizer_values(tokenizer, config.n_vocab)
    ids = {"bos_token_id": config.start, "eos_token_id": next(iter(config.ends), None)}
    ids["padding_token_id"] = config.pad_token_id
    return values | {f"{_TOKENS}.{name}": i for name, i in ids.items() if i is not None}, stored


def _tokenizer_values(tokenizer: Tokenizer, n_vocab: int) -> dict[str, Any]:
    """Return the values that describe a tokenizer. Ids of the model without a token are marked as unused."""
    found = tokenizer.definition
    tokens, types = [f"[PAD{i}]" for i in range(n_vocab)], [_UNUSED] * n_vocab
    ids = {entry: (i, _NORMAL) for entry, i in found.vocab.items()}
    ids |= {entry: (token.id, _CONTROL if token.special else _USER_DEFINED) for entry, token in found.added.items()}
    for entry, (i, kind) in ids.items():
        if i < n_vocab:  # a tokenizer may have added tokens that the model lacks
            tokens[i], types[i] = entry, kind
    return {
        f"{_TOKENS}.pre": "gpt-2",
        f"{_TOKENS}.tokens": tokens,
        f"{_TOKENS}.token_type": types,
        f"{_TOKENS}.merges": [f"{left} {right}" for left, right in found.merges],
    }
