"""Fingerprints of a model: hashes that are equal on every framework and machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer 1,603 slings and arrows."
"""The text that a model reads if no other text is given."""

N_TOKENS = 32
"""How many token ids a model without a tokenizer reads if none are given: 0, 1, 2 ..., modulo the vocabulary."""


class Fingerprint(NamedTuple):
    """Hashes of a model.

    Parameters
    ----------
    logits : str
        The SHA-256, in hexadecimal digits, of the model's logits for the tokens, in the reproducible mode.
    weights : str
        The SHA-256 of its parameters in float32. It does not depend on the format of the files, nor on the dtype in
        which they store the numbers, as long as float32 holds them exactly.
    tokens : list of int
        The token ids that the model has read.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> found = pg.GPT2.load("shakespeare", backend="numpy", reproducible=True).fingerprint()
    >>> len(found.logits), len(found.weights), len(found.tokens)
    (64, 64, 40)
    """

    logits: str
    weights: str
    tokens: list[int]


def hash_of_logits(tokens: Sequence[int], logits: np.ndarray) -> str:
    """Return the SHA-256 of the token ids, as int64, and of the logits [seq, n_vocab]. The bytes are little-endian.

    All NaN are hashed as the same number, because frameworks give them different bits.
    """
    found = hashlib.sha256(b"portable-gpt2 logits 1\n" + _header(logits) + np.asarray(tokens, "<i8").tobytes())
    found.update(_bytes(np.where(np.isnan(logits), np.float32(np.nan), logits)))
    return found.hexdigest()


def hash_of_weights(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Return the SHA-256 of tensors in float32 and of their names, such as ``h3/attn/c_attn/w``, sorted by name."""
    found = hashlib.sha256(b"portable-gpt2 weights 1\n")
    for path, x in sorted(tensors, key=lambda item: item[0]):
        found.update(path.encode() + b" " + _header(x))
        found.update(_bytes(x))
    return found.hexdigest()


def _header(x: np.ndarray) -> bytes:
    return f"{list(x.shape)}\n".encode()


def _bytes(x: np.ndarray) -> memoryview:
    return np.ascontiguousarray(x, "<f4").data.cast("B")
