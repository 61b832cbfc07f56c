"""Random streams of words from NumPy's Philox, and the random variates that are computed from them.

A word depends only on the seed, the number of its stream, and its place in the stream. No state is kept, so a sample
does not depend on the samples before it. NumPy promises that the words of Philox never change. NumPy's random floats
may change, so they are not used. There are three kinds of streams:

- one stream for each parameter of a model, named by the parameter's path. Its normal variates are the initial values;
- one stream for each sample of a text, named by the sample's index. Its Gumbel variates choose the tokens. Each
  position in the text is a place in the stream;
- one stream for the windows of text that training reads. Each batch is a place in the stream.
"""

from __future__ import annotations

import decimal
import hashlib
import math
import secrets
from collections.abc import Callable
from decimal import Decimal

import numpy as np
from numpy.random import Philox  # not in a function, because a Ctrl-C during the import would be lost there

_ERROR = 2.0**-45
"""A bound of the error of a variate, relative to its radius. NumPy's log, cos and sin err by 2^-50 at most."""
_CONTEXT = decimal.Context(prec=50)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
_WINDOWS = int.from_bytes(b"windows", "little")


def new_seed() -> int:
    """Return a random seed for a caller who gave none. It has only 32 bits, so that it is easy to type again."""
    return secrets.randbits(32)


def words(n: int, seed: int, stream: int, place: int = 0) -> np.ndarray:
    """Return n words of 64 random bits, uint64 [n], from a place of a stream. A place holds 2^66 words.

    The seed and the number of the stream are from 0 to 2^64 - 1.
    """
    key = np.asarray([seed, stream], np.uint64)  # NumPy would convert a list with an int of 2^63 or more to float64
    found: np.ndarray = Philox(key=key, counter=[0, place, 0, 0]).random_raw(n)
    return found


def uniform(words: np.ndarray) -> np.ndarray:
    """For each word, return (n + 1/2) / 2^52, float64, with n its upper 52 bits: a number strictly between 0 and 1."""
    return ((words >> np.uint64(12)) + 0.5) * 2.0**-52


def normal(path: str, shape: tuple[int, ...], seed: int, stdev: float = 1.0) -> np.ndarray:
    """Return the normal variates of a parameter, float64, by the transform of Box and Muller (1958).

    Rounded to float32, they have the same bits on every processor, although the last bits of log, cos and sin do not.
    The variates that an error of these functions could round to another float32 number are computed with 50 digits.
    """
    stream = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    n = math.prod(shape)
    u, v = uniform(words(2 * ((n + 1) // 2), seed, stream).reshape(2, -1))
    radius = np.sqrt(-2 * np.log(u))
    found = []
    for function, shift in ((np.cos, 0.0), (np.sin, 0.5)):
        part, error = stdev * (radius * function(2 * np.pi * v)), _ERROR * stdev * radius
        with np.errstate(over="ignore", under="ignore"):
            is_known = (part - error).astype(np.float32) == (part + error).astype(np.float32)
        for i in np.flatnonzero(~is_known).tolist():
            with decimal.localcontext(_CONTEXT):
                part[i] = Decimal(stdev) * (-2 * Decimal(u[i]).ln()).sqrt() * cos_pi(Decimal(2 * v[i] - shift))
        found.append(part)
    return np.concatenate(found)[:n].reshape(shape)


def cos_pi(x: Decimal) -> Decimal:
    """Return cos(pi x) for x from -2 to 2, with an error below 1e-35: the Taylor series with 50 digits.

    The last bits of ``math.cos`` differ between platforms.
    """
    with decimal.localcontext(_CONTEXT):
        square = (_PI * x) ** 2
        term = total = Decimal(1)
        for k in range(1, 61, 2):
            term = -term * square / (k * (k + 1))
            total += term
        return total


def gumbel(
    kept: np.ndarray,
    n_vocab: int,
    position: int,
    seed: int,
    index: int = 0,
    log: Callable[[np.ndarray], np.ndarray] = np.log,
) -> np.ndarray:
    """Return the standard Gumbel variates, -log(-log u), of some entries of the vocabulary, float64 [len(kept)].

    Every entry of the vocabulary has a word, whether it is kept or not: a filter does not change the variates of the
    entries that it keeps.

    Parameters
    ----------
    kept : int array [n]
        The entries.
    n_vocab : int
        Number of entries of the vocabulary.
    position : int
        The position in the text of the token that is sampled.
    seed, index : int
        The seed, and the index of this sample among several samples of one text.
    log : callable
        The natural logarithm of a float64 array.
    """
    return np.asarray(-log(-log(uniform(words(n_vocab, seed, index, position)[kept]))))


def window_starts(n: int, n_places: int, index: int, seed: int) -> np.ndarray:
    """Return where the n windows of a batch start, int64 [n], each from 0 to n_places - 1.

    If n_places does not divide 2^64, the starts are not exactly equally likely. The relative difference of their
    probabilities is below 2^-32 for every text of fewer than 2^32 tokens.
    """
    return (words(n, seed, _WINDOWS, index) % np.uint64(n_places)).astype(np.int64)
