"""GPT2Config: the shape of a model and its constants, and the four sizes that OpenAI published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .checks import flag, integer, is_int, number, shown
from .options import option


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 and its constants. The defaults are those of the smallest published model.

    Parameters
    ----------
    n_layer, n_head, n_embd : int
        The number of blocks, the number of attention heads in each, and the width of the residual stream. n_embd must
        be a multiple of n_head.
    n_vocab : int
        The number of entries of the vocabulary.
    n_ctx : int
        The number of positions: the longest text that the model can read, in tokens.
    n_inner : int, optional
        The width of the hidden layer of each feed-forward network (default: 4 n_embd).
    layer_norm_epsilon : float
        The number that each layer_norm adds to the variance.
    scale_attn_weights : bool
        Whether attention scores are divided by the square root of the head size.
    scale_attn_by_inverse_layer_idx : bool
        Whether the scores of layer i, counted from 0, are also divided by i + 1.
    eos_token_id : int or tuple of ints, optional
        The ids that end a text, such as that of ``<|endoftext|>``. None means that the vocabulary has no such token.
    tie_word_embeddings : bool
        Whether the embedding matrix wte also computes the logits, as in all published models. Otherwise the parameter
        lm_head does.
    bos_token_id : int, optional
        The id of the token that starts a text without a prompt (default: the first of eos_token_id, as in GPT-2).
    pad_token_id : int, optional
        The id that other programs use for padding. It is stored for them and changes nothing here.

    Raises
    ------
    ValueError
        If a size is not positive, n_embd is not a multiple of n_head, or an id is not in the vocabulary.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_vocab=256, n_ctx=32, eos_token_id=None).head_size
    32
    """

    n_layer: int = option(12, "number of transformer blocks", integer)
    n_head: int = option(12, "number of attention heads in each block; it divides n_embd", integer)
    n_embd: int = option(768, "width of the residual stream", integer)
    n_vocab: int = 50257
    n_ctx: int = option(1024, "number of positions: the longest text that the model can read, in tokens", integer)
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    eos_token_id: int | tuple[int, ...] | None = 50256
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "n_vocab", "n_ctx", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            object.__setattr__(self, name, integer(name, value, 1))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide")
        object.__setattr__(self, "layer_norm_epsilon", number("layer_norm_epsilon", self.layer_norm_epsilon))
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        given = self.eos_token_id
        given = given if isinstance(given, list | tuple) else () if given is None else (given,)
        ends = tuple(dict.fromkeys(self._id("eos_token_id", end) for end in given))
        object.__setattr__(self, "eos_token_id", ends if len(ends) > 1 else next(iter(ends), None))
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._id(name, getattr(self, name)))
        # None stands for the first of eos_token_id, and continues to do so when eos_token_id is replaced.
        if self.bos_token_id in ends[:1]:
            object.__setattr__(self, "bos_token_id", None)

    def _id(self, name: str, value: Any) -> int:
        return integer(name, value, 0, self.n_vocab - 1, note="an id of the vocabulary")

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text: eos_token_id as a tuple."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def start(self) -> int | None:
        """The id that starts a text without a prompt: bos_token_id, or else the first of `ends`."""
        return self.bos_token_id if self.bos_token_id is not None else next(iter(self.ends), None)

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        """The width of the hidden layer of each feed-forward network."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the attention scores of a layer, counted from 0."""
        scale = 1 / math.sqrt(self.head_size) if self.scale_attn_weights else 1.0
        layer = integer("layer", layer)
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def published(cls, name: str) -> GPT2Config:
        """Return the configuration of a published model, by OpenAI's name (``124M``) or Hugging Face's (``gpt2``).

        Raises
        ------
        ValueError
            If no model of that name was published. The message lists the names.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> pg.GPT2Config.published("1558M").n_layer
        48
        """
        for names, sizes in _PUBLISHED.items():
            if name in names:
                return cls(*sizes)
        known = ", ".join(name for names in _PUBLISHED for name in names)
        raise ValueError(f"no GPT-2 named {name!r} was published; choose one of {known}")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration that the entries of a Hugging Face ``config.json`` describe.

        Every entry that affects the logits is used, or refused by an error that names it. Other entries, such as those
        about training or another task, are ignored.

        Raises
        ------
        ValueError
            If an entry describes a model that differs from GPT-2, is malformed, or contradicts another entry.
        """
        if entries.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type is {shown(entries['model_type'])}; expected 'gpt2'")
        for name, (accepted, why) in _FIXED.items():
            if name in entries and entries[name] not in accepted:
                raise ValueError(f"{name} is {shown(entries[name])}; {why}")
        for alias, name in ALIASES.items():
            if entries.get(alias) is not None:
                if entries.get(name, entries[alias]) != entries[alias]:
                    raise ValueError(
                        f"{name} is {shown(entries[name])} and {alias} is {shown(entries[alias])}; they must be equal"
                    )
                entries = {**entries, name: entries[alias]}
        if entries.get("tie_word_embeddings", True) is None:
            entries = {**entries, "tie_word_embeddings": True}
        n_vocab = entries.get("vocab_size", cls.n_vocab)
        return cls(
            n_vocab=n_vocab,
            n_ctx=entries.get("n_positions", cls.n_ctx),
            **_special_ids({"eos_token_id": cls.eos_token_id, **entries}, n_vocab),
            **{name: entries[name] for name in _SAME_NAME if name in entries},
        )

    def with_generation(self, entries: Mapping[str, Any]) -> GPT2Config:
        """Return this configuration with the special ids of a ``generation_config.json``.

        As in transformers, eos_token_id is taken from the file, and is None if the file has none. bos_token_id and
        pad_token_id change only if the file has them.

        Raises
        ------
        ValueError
            If one of these entries is malformed.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> pg.GPT2Config(eos_token_id=50256).with_generation({"eos_token_id": [198, 50256]}).eos_token_id
        (198, 50256)
        """
        ids = _special_ids(entries, self.n_vocab)
        for name, value in (("bos_token_id", self.start), ("pad_token_id", self.pad_token_id)):
            ids[name] = value if ids[name] is None else ids[name]
        return replace(self, **ids)

    @classmethod
    def from_hparams(cls, entries: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration that the entries of OpenAI's ``hparams.json`` describe.

        Raises
        ------
        ValueError
            If an entry is missing, unknown or malformed.
        """
        for names, what in ((_HPARAMS - entries.keys(), "is missing"), (entries.keys() - _HPARAMS, "is not known")):
            if names:
                raise ValueError(f"{', '.join(sorted(names))} {what}; expected {', '.join(sorted(_HPARAMS))}")
        return cls.from_dict({"vocab_size": entries["n_vocab"], **entries})

    @classmethod
    def from_nanogpt(cls, entries: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration that the ``model_args`` of nanoGPT's ``ckpt.pt`` describe.

        Raises
        ------
        ValueError
            If an entry is missing or malformed, or an unknown entry is not zero, false or empty.
        """
        if names := [name for name in _NANOGPT if name not in entries]:
            raise ValueError(f"{', '.join(names)} is missing; expected {', '.join(_NANOGPT)}")
        for name in entries.keys() - _NANOGPT.keys() - {"bias", "dropout"}:
            if entries[name]:
                raise ValueError(f"{name} is {shown(entries[name])}, which is not an entry of nanoGPT's model")
        return cls.from_dict({_NANOGPT[name]: entries[name] for name in _NANOGPT})

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of a Hugging Face ``config.json`` that describe this configuration."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "vocab_size": self.n_vocab,
            "n_positions": self.n_ctx,
            "bos_token_id": self.start,
            "eos_token_id": list(self.ends) if len(self.ends) > 1 else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            **{name: getattr(self, name) for name in _SAME_NAME},
        }


def _special_ids(entries: Mapping[str, Any], n_vocab: Any) -> dict[str, Any]:
    """Return eos_token_id, bos_token_id and pad_token_id from the entries of a file; None for a missing one.

    An id outside the vocabulary is dropped: small models often keep the default ids of GPT-2's large vocabulary.
    """

    def is_beyond(value: Any) -> bool:
        return is_int(value) and is_int(n_vocab) and not 0 <= value < n_vocab

    ids = {name: entries.get(name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    if isinstance(ids["eos_token_id"], list):
        ids["eos_token_id"] = tuple(end for end in ids["eos_token_id"] if not is_beyond(end))
    return {name: None if is_beyond(value) else value for name, value in ids.items()}


_SAME_NAME = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)

# The entries of OpenAI's hparams.json.
_HPARAMS = {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}

# The entries of nanoGPT's model_args, and their names in config.json.
_NANOGPT = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}

# Alternative names of entries, which transformers also accepts, with the usual names.
ALIASES = {
    "n_ctx": "n_positions",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

_PUBLISHED = {
    ("124M", "gpt2"): (12, 12, 768),
    ("355M", "gpt2-medium"): (24, 16, 1024),
    ("774M", "gpt2-large"): (36, 20, 1280),
    ("1558M", "gpt2-xl"): (48, 25, 1600),
}

# The names of the tanh form of GELU. The plain "gelu" is the erf form.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")

# Entries with a fixed meaning here: the accepted values, and the message for any other value.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_function": (_TANH_GELU, f"GPT-2 uses the tanh form of GELU, known as {' or '.join(_TANH_GELU)}"),
    "add_cross_attention": ((False, None), "cross-attention is not part of GPT-2: give a decoder-only checkpoint"),
    "reorder_and_upcast_attn": ((False, True, None), "expected true or false (attention is in float32 in any case)"),
    "pruned_heads": (({}, None), "pruned attention heads are not supported"),
    "quantization_config": ((None,), "quantized weights are not supported: save the model without quantization"),
    "is_encoder_decoder": ((False, None), "GPT-2 is a decoder"),
}
