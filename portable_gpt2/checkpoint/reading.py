"""Find a checkpoint, in a directory or on the hub, and check that its configuration, weights and tokenizer fit."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from .. import checks
from ..config import GPT2Config
from ..host import CheckpointError, StoredTensor, TokenizerError
from ..tokenizer import Tokenizer
from . import hub
from .companions import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    TOKENIZER_SETTINGS,
    configuration,
    generating,
    read_companions,
    read_tokenizer_files,
    read_tokenizer_settings,
)
from .contents import check_text, exists, read_json
from .formats import GGUF_FILES, INDEX, WEIGHTS_FILE, Weights, find_weights, formats, open_weights
from .gguf_models import read_gguf_config, read_gguf_tokenizer
from .names import by_path, gguf_layout, gguf_name, is_openai, layout_of

HPARAMS_FILE = "hparams.json"
MODEL_ARGS = "model_args"  # the entry of nanoGPT's ckpt.pt that has the shape of the model
SHIPPED = Path(__file__).parent.parent / "models"

_GELU = (
    "does not say which form of GELU it was trained with. Later versions of nanoGPT use the form by erf; here it is "
    "GPT-2's tanh form: logits may differ from nanoGPT's by about 0.01"
)

# The ends of names of files that are likely to be weights, for the message if no known name is found.
_OTHER_FILES = (".bin", ".safetensors", ".index.json", ".h5", ".msgpack", ".index", ".onnx")


class Checkpoint(NamedTuple):
    """A checkpoint. Its weights have not been read yet."""

    source: str
    """A description of the files in a few words."""
    config: GPT2Config
    tensors: dict[str, StoredTensor]
    """The parameters by path, in the order of `params.shapes` and in the dtypes of the files."""
    tokenizer: Tokenizer | None
    companions: Mapping[str, bytes] = MappingProxyType({})
    """The contents of files that other programs read, by name: ``config.json`` unchanged, ``generation_config.json``,
    the tokenizer's settings, chat templates."""


def read_checkpoint(
    source: str | os.PathLike[str], *, tokenizer: Tokenizer | Literal["auto"] | None = "auto"
) -> Checkpoint:
    """Find a checkpoint and check that it is a complete GPT-2, without reading the weights.

    Parameters
    ----------
    source : path or str
        A directory with Hugging Face's layout (``config.json`` and ``model.safetensors``, or several files and their
        index, or ``pytorch_model.bin``), OpenAI's release (``hparams.json`` and ``model.ckpt``), nanoGPT's
        ``ckpt.pt`` or a GGUF file; or the file of weights in such a directory. A GGUF file is a whole checkpoint: the
        other files in its directory are not read. If no file has this name: the model ``shakespeare``,
        which ships with this package, or a model of the hub, ``gpt2``, ``user/model`` or ``user/model@revision``.
    tokenizer : Tokenizer, "auto" or None
        The tokenizer to use: the checkpoint's own ("auto"), another one, or none (None). The checkpoint's own tokenizer
        is checked only if it is used. With None, its files are among the companions.

    Returns
    -------
    Checkpoint
        The checkpoint. A tensor that was read is a copy: writing to it does not change the file.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint; if a file is missing, truncated or malformed; if the configuration is not that
        of a GPT-2; or if a tensor is missing, unknown, or has a wrong shape or dtype. Reading a tensor raises it if the
        tensor contains NaN or infinity. The message names the file and the tensor.
    TokenizerError
        If only the tokenizer cannot be used. This error is a subclass of CheckpointError.
    BackendNotInstalled
        If a framework is needed to read the weights and is not installed. The message says what to install.
    """
    directory, file, said = _find(source)
    weights = find_weights(directory, file)
    if weights is not None and weights.format.pattern == GGUF_FILES:
        return _read_gguf(weights, said, tokenizer)
    companions = read_companions(directory)
    config_name = next((n for n in (CONFIG_FILE, HPARAMS_FILE) if exists(directory / n)), None)
    config = None if config_name is None else _read_config(directory / config_name, companions)
    if weights is None:
        raise CheckpointError(_no_weights(directory) if config is not None else _no_config(directory))
    opened = open_weights(weights)
    is_nanogpt = MODEL_ARGS in opened.rest
    if is_nanogpt:
        config, config_name = _read_model_args(weights.file, opened.rest[MODEL_ARGS], config, config_name)
        config = generating(directory, config, companions)
    if config is None or config_name is None:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: no such file, and {weights.file.name} does not describe the model's shape, "
            f"as the {MODEL_ARGS} in nanoGPT's ckpt.pt do"
        )
    find_layout = functools.partial(layout_of, is_linear=is_nanogpt)
    tensors = by_path(weights.file, opened.tensors, config, config_name, find_layout)
    if is_nanogpt:
        warnings.warn(f"{weights.file}: {_GELU}", UserWarning, stacklevel=3)

    layout = "OpenAI's release" if is_openai(opened.tensors) else "nanoGPT" if is_nanogpt else "Hugging Face's layout"
    files = weights.file.name if weights.shards is None else f"{weights.file.name} of {len(weights.shards)} files"
    dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    used = _use_tokenizer(tokenizer, functools.partial(_load_tokenizer, directory), directory, config)
    if config_name != CONFIG_FILE and used is not None:  # other layouts do not say which id is the end of text
        config = generating(directory, dataclasses.replace(config, eos_token_id=_end_of_text(used, config)), companions)
    if used is None:
        companions |= read_tokenizer_files(directory)
    elif used is not tokenizer:
        companions |= read_tokenizer_settings(directory)
    return Checkpoint(f"{said}{layout}, {files}, {dtypes}", config, tensors, used, companions)


def _read_gguf(weights: Weights, said: str, tokenizer: Tokenizer | Literal["auto"] | None) -> Checkpoint:
    """Return the checkpoint that is in one GGUF file."""
    file = weights.file
    found, values = open_weights(weights)
    config = read_gguf_config(file, values, found)
    if config.tie_word_embeddings:  # the output matrix, if there is one, is equal to wte
        found.pop(gguf_name("lm_head"), None)
    tensors = by_path(file, found, config, "header", gguf_layout)
    used = _use_tokenizer(tokenizer, functools.partial(read_gguf_tokenizer, file, values), file, config)
    dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    return Checkpoint(f"{said}GGUF, {file.name}, {dtypes}", config, tensors, used)


def _find(source: str | os.PathLike[str]) -> tuple[Path, Path | None, str]:
    """Return the directory of a source, the file of weights if the source is one, and a description of its origin."""
    directory = checks.path("source", source)
    if os.path.isdir(directory):
        return directory, None, ""
    if isinstance(source, str) and source in shipped_models():
        return SHIPPED / source, None, f"{source}, which ships with portable_gpt2, "
    if os.path.lexists(directory):
        if any(fnmatch.fnmatch(directory.name, format.pattern) for format in formats()):
            exists(directory)
            return directory.parent, directory, ""
        readable = ", ".join(format.pattern for format in formats())
        raise CheckpointError(f"{directory}: is not a directory, and weights are read from files named {readable}")
    if isinstance(source, str) and hub.is_id(source):
        directory = hub.download(source)
        return directory, None, f"{source} of the hub at {directory.name[:8]}, "
    raise CheckpointError(
        f"{os.fspath(source)}: no such directory; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}, the id of a "
        f"model of the hub, such as gpt2, user/model or user/model@revision, or {', '.join(shipped_models())}"
    )


def shipped_models() -> list[str]:
    """Return the names of the models that ship with this package."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{CONFIG_FILE}"))


def _read_config(file: Path, companions: Mapping[str, bytes]) -> GPT2Config:
    if file.name == CONFIG_FILE:
        return configuration(file.parent, companions)
    entries = read_json(file)
    try:
        config = GPT2Config.from_hparams(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return generating(file.parent, config, companions)


def _read_model_args(
    file: Path, entries: Any, config: GPT2Config | None, config_name: str | None
) -> tuple[GPT2Config, str]:
    """Return the configuration of nanoGPT's ckpt.pt, and the name of its source.

    The source is config.json if that file exists; otherwise it is the entry ``model_args``.
    """
    try:
        if not isinstance(entries, Mapping):
            raise ValueError(f"expected a dict; got {type(entries).__name__}")
        own = GPT2Config.from_nanogpt(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {MODEL_ARGS}: {error}") from error
    for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_ctx"):
        if config is not None and getattr(config, name) != getattr(own, name):
            raise CheckpointError(
                f"{file}: {MODEL_ARGS} make {name} {getattr(own, name)}; {config_name} makes it {getattr(config, name)}"
            )
    return (own, MODEL_ARGS) if config is None or config_name is None else (config, config_name)


def _no_config(directory: Path) -> str:
    return (
        f"{directory / CONFIG_FILE}: no such file; a checkpoint holds {CONFIG_FILE} and {WEIGHTS_FILE}, OpenAI's "
        f"{HPARAMS_FILE} and model.ckpt, nanoGPT's ckpt.pt, or a file {GGUF_FILES}"
    )


def _no_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.iterdir() if p.name.endswith(_OTHER_FILES))
    there = f" (there are {', '.join(others)})" if others else ""
    readable = ", ".join(format.pattern for format in formats())
    return f"{directory / WEIGHTS_FILE}: no such file{there}; weights are read from {readable}, or those of an {INDEX}"


def _load_tokenizer(directory: Path) -> Tokenizer | None:
    for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS):
        if exists(directory / name):
            check_text(directory / name)
    return Tokenizer.load(directory)


def _use_tokenizer(
    given: Tokenizer | Literal["auto"] | None, load: Callable[[], Tokenizer | None], source: Path, config: GPT2Config
) -> Tokenizer | None:
    """Return the tokenizer to use: the one that is given, or the one of the source, which `load` reads.

    It may have added tokens whose ids the model lacks. Encoding a text for the model then refuses these tokens.
    """
    if given is None:
        return None
    found: Tokenizer | str | None = given
    if given == "auto":
        try:
            found = load()
        except (ValueError, OSError) as error:
            raise TokenizerError(f"{error} ({_BY_IDS})") from error
        if found is None:
            return None
    if not isinstance(found, Tokenizer):
        raise TypeError(f"tokenizer is {checks.shown(given)}; expected a Tokenizer (Tokenizer.load reads one), or None")
    if found.n_base > config.n_vocab:
        where = source if given == "auto" else "tokenizer"
        raise TokenizerError(
            f"{where}: the tokenizer has {found.n_base} entries and the model {config.n_vocab} ({_BY_IDS})"
        )
    return found


_BY_IDS = "without a tokenizer, GPT2.load(..., tokenizer=None), the model takes and returns token ids"


def _end_of_text(tokenizer: Tokenizer, config: GPT2Config) -> int | None:
    end = tokenizer.end_of_text
    return end if end is not None and end < config.n_vocab else None
