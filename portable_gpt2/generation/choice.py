"""Choose the next tokens on the device, from logits that the host never sees. The result is that of `sampling`.

The host samples in float64, and so does the device. Their elementary functions may differ in the last bits, so the
device also finds out whether such a difference could change its choice. If it could, the token is *undecided*: the
result is -1 - id instead of the id, and the host decides. The text is therefore the one that `sampling` gives.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .. import random
from ..backend import Backend
from ..sampling import Sampling

Gumbel: TypeAlias = Callable[[Any, Any, Any], Any]
"""Maps entries of the vocabulary, places and keys, as `gumbel_of` describes them, to variates."""

_MASK = 0xFFFFFFFF
_CANDIDATES = 1024
"""With top-k, only so many of the largest logits are sorted, which leaves room for logits that tie with the last."""

TOLERANCE = 2.0**-30
"""Sums of logit and Gumbel variate that are closer than this, or weights closer to a threshold, are undecided.

Only sums near the largest matter. The largest sum is at least -3.7, because the largest scaled logit is 0, and a
variate is from -3.7 to 36.8. So both terms of a sum that matters are at most 41 in magnitude. On the device, the
temperature is rounded to 48 bits, a difference and a quotient are rounded to 53 bits, and a logarithm errs by a few
units in the last place. Together this is less than 41 * 2^-46, or 2^-40. The sums of top-p have at most 2^17 weights,
which is an error of less than 2^-35 of the total.
"""


class Rule(NamedTuple):
    """The options that are fixed when the choice is compiled. All other options are data."""

    n_candidates: int
    """How many of the largest logits are candidates: 0 for greedy decoding."""
    is_filtered: bool
    """Whether candidates are sorted and filtered by top-p, by min-p, and by top-k among all logits."""


class Draw(NamedTuple):
    """The options of sampling as data on the device, so that other values need no compilation."""

    options: Any
    """float32 [2, 4]: the sums along the first axis are temperature, top_k, top_p and the logarithm of min_p."""
    keys: Any
    """int32 [batch, 4]: for each text, the two halves of its seed and the two halves of its stream's number."""


def common_rule(samplings: Sequence[Sampling], n_vocab: int) -> Rule | None:
    """Return the rule of texts that differ at most in their seeds; None if only the host can sample for them."""
    sampling = samplings[0]
    if any(replace(other, seed=sampling.seed) != sampling for other in samplings) or sampling.repetition_penalty != 1:
        return None
    if sampling.temperature == 0:
        return Rule(0, False)
    if not 2.0**-20 <= sampling.temperature <= 2.0**20:  # elsewhere float32 might overflow
        return None
    is_filtered = sampling.top_p is not None or sampling.min_p is not None
    if not sampling.top_k or sampling.top_k >= n_vocab:
        return Rule(n_vocab, is_filtered)
    if 2 * sampling.top_k <= _CANDIDATES < n_vocab:
        return Rule(_CANDIDATES, is_filtered)
    return Rule(n_vocab, True)


def new_draw(samplings: Sequence[Sampling], indices: Sequence[int], rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of a `Draw` on the host."""
    s = samplings[0]
    top_k = min(s.top_k or rule.n_candidates, rule.n_candidates)
    top_p = 2.0 if s.top_p is None or s.top_p == 1 else s.top_p
    # A logit 1000 below the largest is never chosen.
    options = np.asarray([s.temperature, top_k, top_p, -1000.0 if s.min_p is None else math.log(s.min_p)])
    upper = np.asarray(options, np.float32)
    given = [(other.seed or 0, index) for other, index in zip(samplings, indices, strict=True)]
    halves = [[half for word in pair for half in (word >> 32, word & _MASK)] for pair in given]
    keys = np.asarray([[half - 2**32 if half >= 2**31 else half for half in row] for row in halves], np.int32)
    return np.stack([upper, np.asarray(options - upper, np.float32)]), keys


def choose(backend: Backend, logits: Any, places: Any, draw: Draw, rule: Rule, gumbel: Gumbel) -> Any:
    """Return the next token of each text, int32 [batch, 1], or -1 - id where the choice of the id is undecided.

    Parameters
    ----------
    backend : Backend
        The backend of the arrays.
    logits : float array [batch, n_vocab]
        The logits, of at most 32 bits.
    places : int32 array [batch, 1]
        The position of the next token in its text.
    draw : Draw
        The options as data. Greedy decoding does not read them.
    rule : Rule
        The rest of the options.
    gumbel : callable
        The result of `gumbel_on`.
    """
    xp = backend.xp
    if logits.dtype != xp.float32:
        logits = xp.astype(logits, xp.float32)
    largest = xp.max(logits, axis=-1, keepdims=True)
    # The sum is NaN if any logit is. The maximum need not be, because XLA may ignore NaN in it (seen in TensorFlow).
    total = xp.sum(logits, axis=-1, keepdims=True)
    is_finite = (largest > -math.inf) & (largest < math.inf) & (total == total)
    all_ids = xp.astype(backend.arange(backend.shape(logits)[-1], like=logits), xp.int32)[None, :]
    if not rule.n_candidates:
        return _decided(xp, all_ids, logits == largest, is_finite)
    with backend.permit_64_bits():
        ids, scaled, is_kept, is_certain = _filtered(backend, logits, largest, all_ids, draw, rule)
        total = scaled + gumbel(ids, places, draw.keys)
        # `best` is the largest sum of the candidates that are certainly kept. If another candidate that may be kept
        # reaches it, that one might be the largest on the host.
        certain = xp.where(is_certain, total, -math.inf)
        best = xp.max(certain, axis=-1, keepdims=True)
        contends = is_kept & (total >= best - TOLERANCE)
        is_alone = xp.sum(xp.astype(contends, xp.int32), axis=-1, keepdims=True) == 1
        return _decided(xp, ids, contends, is_finite & is_alone)


def _decided(xp: Any, ids: Any, is_chosen: Any, is_decided: Any) -> Any:
    """Return the smallest chosen id [batch, 1], or -1 - id where the choice is undecided."""
    smallest = -xp.max(xp.where(is_chosen, -ids, -(2**31 - 1)), axis=-1, keepdims=True)
    return xp.where(is_decided, smallest, -1 - smallest)


def _filtered(
    backend: Backend, logits: Any, largest: Any, all_ids: Any, draw: Draw, rule: Rule
) -> tuple[Any, Any, Any, Any]:
    """Return the ids of the candidates, their scaled logits in float64, and which may be kept and certainly are."""
    xp, n_vocab = backend.xp, backend.shape(logits)[-1]
    options = xp.sum(xp.astype(draw.options, xp.float64), axis=0)
    temperature, top_k, top_p, log_min_p = (options[i] for i in range(4))
    is_sorted = rule.is_filtered or rule.n_candidates < n_vocab
    values, ids = backend.top_k(logits, rule.n_candidates) if is_sorted else (logits, all_ids)
    scaled = (xp.astype(values, xp.float64) - xp.astype(largest, xp.float64)) / temperature
    if not is_sorted:
        return ids, scaled, scaled <= 0, scaled <= 0
    ids = xp.astype(ids, xp.int32)
    last = xp.take(values, xp.astype(xp.reshape(top_k, (1,)), xp.int32) - 1, axis=1)
    is_kept = is_certain = values >= last
    if rule.is_filtered:
        is_kept, is_certain = _in_nucleus(xp, scaled, is_kept, top_p)
        is_kept = is_kept & (scaled >= log_min_p - TOLERANCE)
        is_certain = is_certain & (scaled >= log_min_p + TOLERANCE)
    if rule.n_candidates < n_vocab:  # if the last candidate is kept, logits that equal it may be missing
        is_kept, is_certain = is_kept | (values[:, -1:] >= last), is_certain & (values[:, -1:] < last)
    return ids, scaled, is_kept, is_certain


def _in_nucleus(xp: Any, scaled: Any, is_kept: Any, top_p: Any) -> tuple[Any, Any]:
    """Return which candidates top-p may keep and which it certainly keeps, from scaled logits in descending order."""
    weights = xp.where(is_kept, xp.exp(scaled), 0.0)
    total = xp.sum(weights, axis=-1, keepdims=True)
    room = top_p * total - (xp.cumulative_sum(weights, axis=-1) - weights)
    # The host sorts equal logits by their ids, and the device in any order. So of equal logits all are certain or none.
    beyond = xp.max(xp.where(room <= TOLERANCE * total, scaled, -math.inf), axis=-1, keepdims=True)
    least = -xp.max(xp.where(room > -TOLERANCE * total, -scaled, -math.inf), axis=-1, keepdims=True)
    return is_kept & (scaled >= least), is_kept & (scaled > beyond)


# Gumbel variates: NumPy's Philox4x64-10 in 64-bit integers, whose products and sums wrap around
# (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def gumbel_of(backend: Backend, entries: Any, places: Any, keys: Any, *, with_kernel: bool = False) -> Any:
    """Return the variates of `random.gumbel` on the device, float64 [batch, n].

    Parameters
    ----------
    backend : Backend
        The backend of the arrays, which permits 64 bits.
    entries : int32 array [batch, n] or [1, n]
        Entries of the vocabulary.
    places : int32 array [batch, 1]
        The positions in the texts of the tokens that are sampled.
    keys : int32 array [batch, 4]
        As in `Draw`.
    with_kernel : bool
        Whether to call `Backend.gumbel`.
    """
    xp = backend.xp
    entries, places = xp.astype(entries, xp.int64), xp.astype(places, xp.int64)
    seeds, streams = (
        xp.astype(keys[:, i : i + 1], xp.int64) * 2**32 + (xp.astype(keys[:, i + 1 : i + 2], xp.int64) & _MASK)
        for i in (0, 2)
    )
    if with_kernel:
        return backend.gumbel(entries, places, seeds, streams)
    zeros = entries ^ entries
    words = _philox(xp, (_shifted(xp, entries, 2) + 1, zeros + places, zeros, zeros), (seeds, streams))
    lane = entries & 3
    word = words[3]
    for i in (2, 1, 0):
        word = xp.where(lane == i, words[i], word)
    n = xp.astype(_shifted(xp, word, 12), xp.float64)
    return -xp.log(-xp.log((n + 0.5) * 2.0**-52))


def _philox(xp: Any, counter: tuple[Any, ...], key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the four words of a block."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        upper0, lower0 = _product(xp, c0, _MULTIPLIERS[0])
        upper1, lower1 = _product(xp, c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = upper1 ^ c1 ^ k0, lower1, upper0 ^ c3 ^ k1, lower0
        k0, k1 = k0 + _signed(_WEYL[0]), k1 + _signed(_WEYL[1])
    return c0, c1, c2, c3


def _product(xp: Any, x: Any, m: int) -> tuple[Any, Any]:
    """Return the upper and the lower 64 bits of the products of unsigned integers x, int64 [...], and m."""
    x0, x1, m0, m1 = x & _MASK, _shifted(xp, x, 32), m & _MASK, m >> 32
    middle = x1 * m0 + _shifted(xp, x0 * m0, 32)
    other = x0 * m1 + (middle & _MASK)
    return x1 * m1 + _shifted(xp, middle, 32) + _shifted(xp, other, 32), x * _signed(m)


def _shifted(xp: Any, x: Any, n: int) -> Any:
    """Return unsigned integers x, int64 [...], shifted right by n bits."""
    return xp.bitwise_right_shift(x, n) & (2 ** (64 - n) - 1)


def _signed(m: int) -> int:
    return m - 2**64 if m >= 2**63 else m


@functools.cache
def gumbel_on(backend: Backend, device: Any) -> Gumbel:
    """Return the function that computes variates on a device: a kernel of the backend if it is right, or else ours.

    The variates of a kernel are compared with the host's once. A kernel that differs would change texts.
    """
    definition, kernel = (functools.partial(gumbel_of, backend, with_kernel=x) for x in (False, True))
    entries, places, seeds, streams = [0, 1, 2, 3, 4, 50256], [0, 2**31 - 1], [2**64 - 1, 1], [3, 2**64 - 2**31]
    keys = [[-1, -1, 0, 3], [0, 1, -1, -(2**31)]]  # the halves of seeds and streams
    draws = zip(places, seeds, streams, strict=True)
    expected = [random.gumbel(np.asarray(entries), 50257, *draw) for draw in draws]
    given = [np.asarray(x, np.int32) for x in ([entries], [[place] for place in places], keys)]
    try:
        with backend.permit_64_bits():
            found = kernel(*[backend.from_numpy(a, device=device) for a in given])
            if found is NotImplemented:
                return definition
            error = float(np.linalg.norm(backend.to_numpy(found) - expected))
    except Exception as problem:  # a compiler that is missing, for instance
        warnings.warn(f"the kernel of Gumbel variates cannot be used: {problem}", RuntimeWarning, stacklevel=2)
        return definition
    if error < 1e-9:
        return kernel
    warnings.warn(f"the kernel of Gumbel variates is wrong by {error}; it is not used", RuntimeWarning, stacklevel=2)
    return definition
