"""The correctly rounded results of chosen elements of each op, on the host.

Each function takes the NumPy arguments of an op, which are float32, and the indices of elements of its result, as
`numpy.nonzero` returns them. It returns these elements: the float32 numbers that are nearest to the exact results, with
ties to even. Subnormal numbers count as 0, as arguments and as results, and every zero is +0.

The exact result is that of the op's formula in real arithmetic. Each formula is written once, and is evaluated with a
higher and higher precision, until all numbers within the proved bound of its error round to the same float32 number:

1. with about 100 bits (`balls`), for many elements at once. This decides all but the rarest elements.
2. with 40, 80, 160 ... decimal digits (`intervals`). Sums of products are exact here.

That alone does not end if the exact result is a midpoint between two float32 numbers, and takes too many digits if it
differs from a midpoint by something like exp(-1e30). Therefore, as soon as only one midpoint m is left, attention,
cross_entropy and layer_norm compare their exact result with m in another way (`compare` in `_rounded`). The other ops
need no such comparison:

- Results of conv1d, unembed and attention_scores are rational numbers, which are exact with enough digits.
- By the theorem of Lindemann and Weierstrass, exponentials of distinct rational numbers are linearly independent over
  the rational numbers. So gelu(x) = x / (1 + exp(-2 y)) is irrational, unless x and the rational number y are 0. And
  exp(x_j) = m sum_k exp(x_k) is possible for a rational number m only if all finite x_k are equal. Then m = 1 / n,
  which is a float32 number or has infinitely many binary digits. So softmax and attention_weights are never midpoints.
- Terms like exp(-1e30) change these results only next to x, 0 and 1 / n, which are far from midpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from .balls import Ball, DoubleDouble
from .intervals import Decimals, Interval, exact_dot
from .rounding import adjacent, chosen, nearest, terms, threshold

__all__ = [
    "attention",
    "attention_scores",
    "attention_weights",
    "conv1d",
    "cross_entropy",
    "gelu",
    "layer_norm",
    "softmax",
    "unembed",
]

Arithmetic = Any  # DoubleDouble or Decimals
Number = Any  # Ball or Interval
At = tuple[np.ndarray, ...]

_BLOCK = 2**16  # the number of terms of sums that are computed at once: their temporary arrays fit into the cache


def _rounded(
    evaluate: Callable[[Arithmetic, np.ndarray], Number],
    rows: np.ndarray,
    length: int,
    special: np.ndarray,
    compare: Callable[[int, float], int | None] | None = None,
) -> np.ndarray:
    """Return the correctly rounded values of a formula.

    Parameters
    ----------
    evaluate : callable
        Takes an arithmetic and the indices of elements. Returns enclosures of these elements, [number of indices].
    rows : int array [elements]
        Elements with the same number share most of the computation, so they are evaluated together.
    length : int
        The number of terms that a row has.
    special : float64 array [elements]
        The results that follow from NaN and infinities among the arguments, and 0 for the other elements. `evaluate`
        writes them when it sees the arguments for the first time.
    compare : callable, optional
        Takes the index of an element and a threshold between two float32 numbers, next to the element's exact value.
        Returns the sign of the value minus the threshold, or None if that is not known.
    """
    found = np.zeros(len(rows), np.float32)
    with np.errstate(all="ignore"):
        left = []
        for elements in _blocks(rows, max(1, _BLOCK // max(length, 1))):
            lower, upper = map(nearest, evaluate(DoubleDouble(), elements).bounds())
            known = np.where(np.isnan(special[elements]), np.nan, special[elements])  # all NaN have the same bits
            found[elements] = np.where(known == 0, lower, known)
            left.extend(elements[(lower != upper) & (known == 0)].tolist())
        for element in left:
            found[element] = _decided(evaluate, element, compare)
    return found


def _decided(
    evaluate: Callable[[Arithmetic, np.ndarray], Number],
    element: int,
    compare: Callable[[int, float], int | None] | None,
) -> np.float32:
    """Return the correctly rounded value of one element, with as many digits as it needs."""
    digits = 40
    while True:
        lower, upper = map(nearest, evaluate(Decimals(digits), np.asarray([element])).bounds())
        if lower[0] == upper[0]:
            return np.float32(lower[0])
        if compare is not None and adjacent(lower, upper)[0]:
            midpoint = threshold(lower[0], upper[0])
            sign = compare(element, midpoint)
            if sign is not None:
                return np.float32(nearest(np.asarray(midpoint)) if sign == 0 else upper[0] if sign > 0 else lower[0])
        digits *= 2


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the indices of the elements, with those of `size` rows at a time."""
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    for first in range(0, len(starts), size):
        yield order[starts[first] : starts[first + size] if first + size < len(starts) else len(order)]


def _rows(at: At, shape: tuple[int, ...]) -> np.ndarray:
    """Return the number of the row of each element, where at indexes the leading axes of rows and the row itself."""
    *before, j = at
    return np.ravel_multi_index(tuple(before), shape) if before else np.zeros(len(j), np.int64)


def _of(indices: Sequence[np.ndarray], elements: np.ndarray) -> At:
    """Return the indices of some of the elements."""
    return tuple(index[elements] for index in indices)


def _fraction(number: np.ndarray) -> Fraction:
    """Return the only element of an array of decimal numbers as a fraction."""
    return Fraction(number.item())


# Linear layers


def conv1d(x: np.ndarray, w: np.ndarray, b: np.ndarray, at: At) -> np.ndarray:
    """Return chosen elements of x w + b, correctly rounded.

    Parameters
    ----------
    x : float32 array [*batch, nx]
        Zero or more leading axes.
    w : float32 array [nx, nf] or [1, nx, nf]
        The weight, of which only the columns of the chosen elements are read.
    b : float32 array [nf]
        The bias.
    at : tuple of int arrays
        The indices of the elements, an array [elements] for each axis of the result.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> x, w, b = np.ones((1, 2), np.float32), np.asarray([[1], [2.0**-24]], np.float32), np.zeros(1, np.float32)
    >>> conv1d(x, w, b, (np.asarray([0]), np.asarray([0])))
    array([1.], dtype=float32)
    """
    return _linear(x, w.reshape(w.shape[-2:]).T, b, at)


def unembed(x: np.ndarray, w: np.ndarray, at: At) -> np.ndarray:
    """Return chosen elements of x w^T, correctly rounded.

    Parameters
    ----------
    x : float32 array [*batch, d]
        Zero or more leading axes.
    w : float32 array [vocab, d]
        The embedding matrix, of which only the rows of the chosen elements are read.
    at : tuple of int arrays
        As for `conv1d`.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> unembed(np.ones(2, np.float32), np.asarray([[1, 0.5], [2, 3]], np.float32), (np.asarray([1, 0]),))
    array([5. , 1.5], dtype=float32)
    """
    return _linear(x, w, np.zeros(len(w), np.float32), at)


def _linear(x: np.ndarray, columns: np.ndarray, b: np.ndarray, at: At) -> np.ndarray:
    """Return elements of x columns^T + b."""
    *i, j = map(np.asarray, at)
    special = np.zeros(len(j))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        column = (j[elements],)
        left, right, bias = chosen(x, _of(i, elements)), chosen(columns, column), chosen(b, column)
        found = arithmetic.dot(left, right, bias)
        if isinstance(found, Ball) and not np.isfinite(found.high).all():  # finite numbers do not overflow
            totals = terms(left, right, bias).sum(axis=-1)
            special[elements] = np.where(np.isfinite(totals), 0, totals)
        return found

    return _rounded(evaluate, np.arange(len(j)), x.shape[-1], special)


# Functions with exponentials


def softmax(x: np.ndarray, at: At, *, axis: int = -1) -> np.ndarray:
    """Return chosen elements of exp(x_j) / sum_k exp(x_k) along an axis, correctly rounded.

    A row that contains NaN or +inf, or only -inf, is NaN; in any other row, -inf becomes 0.

    Parameters
    ----------
    x : float32 array
        At least one axis.
    at : tuple of int arrays
        As for `conv1d`.
    axis : int
        The axis that sums to 1 in the result.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> softmax(np.asarray([0, 0, -np.inf], np.float32), (np.asarray([0, 2]),))
    array([0.5, 0. ], dtype=float32)
    """
    x, indices = np.moveaxis(x, axis, -1), list(map(np.asarray, at))
    j = indices.pop(axis)
    rows = _rows((*indices, j), x.shape[:-1])
    special = np.zeros(len(j))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        _, first, line = np.unique(rows[elements], return_index=True, return_inverse=True)
        values = chosen(x, _of(indices, elements[first]))
        special[elements[_is_undefined(values)[line]]] = np.nan
        is_finite = np.isfinite(values)
        values = np.where(is_finite, values, 0)
        return _weights(arithmetic.number(values), is_finite, line, j[elements])

    return _rounded(evaluate, rows, x.shape[-1], special)


def _is_undefined(scores: np.ndarray) -> np.ndarray:
    """Return for which rows softmax is NaN: those that contain NaN or +inf, or only -inf."""
    found: np.ndarray = ~np.isfinite(scores.max(axis=-1, initial=-np.inf))
    return found


def _exponentials(scores: Number, is_used: np.ndarray) -> Number:
    """Return exp(score - largest score) of the scores [rows, n] that are used, and 0 for the others.

    The quotients in which the exponentials occur do not depend on the score that is subtracted. So it does not matter
    if it is not exactly the largest.
    """
    best = np.where(is_used, scores.approximate, -np.inf).argmax(axis=-1)
    differences = scores - scores[np.arange(len(best)), best][:, None]
    if not isinstance(differences, Ball):
        return differences.only(is_used).exp().only(is_used)
    found, e = Ball(*(np.zeros(is_used.shape) for _ in range(3))), differences[is_used].exp()
    found.high[is_used], found.low[is_used], found.error[is_used] = e.high, e.low, e.error
    return found


def _weights(scores: Number, is_used: np.ndarray, row: np.ndarray, j: np.ndarray) -> Number:
    """Return elements [row, j] of the softmax over the scores [rows, n] that are used."""
    e = _exponentials(scores, is_used)
    return e[row, j] / e.sum()[row]


def gelu(x: np.ndarray, at: At) -> np.ndarray:
    """Return chosen elements of 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), correctly rounded.

    This is x / (1 + exp(-2 y)) with the argument y of tanh. The result is inf for inf, and NaN for -inf.

    Parameters
    ----------
    x : float32 array
        Any shape.
    at : tuple of int arrays
        As for `conv1d`.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> gelu(np.asarray([-1, 0, 1], np.float32), (np.asarray([0, 2]),))
    array([-0.15880801,  0.841192  ], dtype=float32)
    """
    values = chosen(x, tuple(map(np.asarray, at))).astype(np.float64)
    special = np.where(np.isfinite(values), 0, np.where(values > 0, values, np.nan))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number, x = arithmetic.number, values[elements]
        negative = x < 0
        y = number(x) + number(0.044715) * number(x) * number(x) * number(x)
        e = (number(np.where(negative, 2.0, -2.0)) * number(math.sqrt(2 / math.pi)) * y).exp()  # exp(-2 |y|)
        return number(x) * (e.only(negative) + number((~negative).astype(np.float64))) / (number(1.0) + e)

    return _rounded(evaluate, np.arange(len(values)), 1, special)


def cross_entropy(logits: np.ndarray, targets: np.ndarray, at: At = ()) -> np.ndarray:
    """Return the mean of -log softmax(logits)[target] in nats, correctly rounded.

    Parameters
    ----------
    logits : float32 array [*batch, vocab]
        The logits.
    targets : int array [*batch]
        Ids from 0 to vocab - 1. The mean is NaN if another id occurs, or if there are no targets.
    at : tuple of int arrays
        As for `conv1d`. The result of the op has no axes, so its element has the indices ().

    Returns
    -------
    float32 array [1]

    Examples
    --------
    >>> cross_entropy(np.zeros((1, 2), np.float32), np.asarray([0]))
    array([0.6931472], dtype=float32)
    """
    vocab, ids = logits.shape[-1], np.asarray(targets).reshape(-1).astype(np.int64)
    rows, every = logits.reshape(-1, vocab), np.arange(len(ids))
    blocks = list(_blocks(every, max(1, _BLOCK // vocab)))
    at_target = chosen(rows, (every, np.clip(ids, 0, vocab - 1))).astype(np.float64)
    if not len(ids) or ((ids < 0) | (ids >= vocab)).any() or any(_is_undefined(rows[i]).any() for i in blocks):
        return np.full(1, np.nan, np.float32)
    if not np.isfinite(at_target).all():
        return np.full(1, np.inf, np.float32)
    largest = np.concatenate([chosen(rows, (i,)).max(axis=-1) for i in blocks]).astype(np.float64)

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number = arithmetic.number
        totals = []
        for i in blocks:
            scores = chosen(rows, (i,))
            is_finite = np.isfinite(scores)
            scores = np.where(is_finite, scores, 0)
            e = _exponentials(number(scores), is_finite)
            losses = e.sum().log() + (number(largest[i]) - number(at_target[i]))
            totals.append(losses[None].sum())
        return functools.reduce(lambda a, b: a + b, totals) / number(np.asarray([float(len(ids))]))

    def compare(element: int, midpoint: float) -> int | None:
        # The result is the mean of the largest logits minus those at the targets, plus the mean of log(c + t), where c
        # is the number of largest logits, and t the sum of the other exponentials. It is a rational number only if all
        # c are 1 and all t are 0 (Lindemann and Weierstrass, for the product of all c + t), and is then 0. Otherwise,
        # the second mean is positive, but may be as small as exp(-1e30), so that no number of digits shows it.
        signs = np.repeat([1.0, -1.0], len(ids))
        difference = _fraction(exact_dot(np.concatenate([largest, at_target]), signs))
        return 1 if difference == Fraction(midpoint) * len(ids) else None

    return _rounded(evaluate, np.zeros(1, np.int64), 1, np.zeros(1), compare)


# Attention


def attention_scores(
    q: np.ndarray,
    k: np.ndarray,
    at: At,
    *,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> np.ndarray:
    """Return chosen elements of scale q k^T, correctly rounded. The score of a key that is not seen is -inf.

    Parameters
    ----------
    q : float32 array [*batch, queries, d]
        The queries.
    k : float32 array [*batch, keys, d]
        The keys.
    at : tuple of int arrays
        As for `conv1d`.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key.
    causal : bool
        Whether a query sees only its own key and the keys before it.
    scale : float, optional
        The factor of the dot products; 1/sqrt(d) unless given.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> q = np.ones((2, 4), np.float32)
    >>> attention_scores(q, q, (np.asarray([0, 1]), np.asarray([1, 1])), causal=True)
    array([-inf,   2.], dtype=float32)
    """
    *before, query, j = map(np.asarray, at)
    queries, keys, scale = chosen(q, (*before, query)), chosen(k, (*before, j)), _scale(q, scale)
    is_seen = _seen((*q.shape[:-1], k.shape[-2]), mask, causal, (*before, query))[np.arange(len(j)), j]
    with np.errstate(invalid="ignore"):
        products = np.multiply(queries, keys, dtype=np.float64).sum(axis=-1)  # finite products do not overflow
        special = np.where(np.isfinite(products), 0, products * np.sign(scale))
    special = np.where(is_seen, special, -np.inf)

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        return arithmetic.dot(queries[elements], keys[elements]) * arithmetic.number(scale)

    return _rounded(evaluate, np.arange(len(j)), q.shape[-1], special)


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    at: At,
    *,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> np.ndarray:
    """Return chosen elements of softmax(scale q k^T) over the keys that a query sees, correctly rounded.

    A row is NaN as a whole if a score that is seen is NaN or +inf, or if no score that is seen is above -inf. In the
    other rows, the weight of a key that is not seen is 0.

    Parameters
    ----------
    q, k, at, mask, causal, scale
        As for `attention_scores`.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> q = np.ones((2, 4), np.float32)
    >>> attention_weights(q, q, (np.asarray([0, 1]), np.asarray([1, 1])), causal=True)
    array([0. , 0.5], dtype=float32)
    """
    rows, j = _Rows(q, k, at, mask, causal, scale), np.asarray(at[-1])

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        scores, is_used, line = rows.scores(arithmetic, elements)
        return _weights(scores, is_used, line, j[elements])

    return _rounded(evaluate, rows.numbers, rows.length, rows.special)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    at: At,
    *,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> np.ndarray:
    """Return chosen elements of softmax(scale q k^T) v over the keys that a query sees, correctly rounded.

    A key that is not seen changes nothing, even if it or its value is NaN. A row is NaN if a score that is seen is NaN
    or +inf, or if no score that is seen is above -inf. An infinite value with the score -inf makes the result NaN.

    Parameters
    ----------
    q, k, at, mask, causal, scale
        As for `attention_scores`.
    v : float32 array [*batch, keys, dv]
        The values.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> q, v = np.ones((2, 4), np.float32), np.asarray([[1], [4]], np.float32)
    >>> attention(q, q, v, (np.asarray([0, 1]), np.asarray([0, 0])), causal=True)
    array([1. , 2.5], dtype=float32)
    """
    *batch, _, column = map(np.asarray, at)
    rows = _Rows(q, k, at, mask, causal, scale)

    def values(elements: np.ndarray) -> np.ndarray:
        return chosen(np.moveaxis(v, -1, -2), _of((*batch, column), elements))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        scores, is_used, line = rows.scores(arithmetic, elements)
        e, own = _exponentials(scores, is_used), values(elements)
        infinite = rows.seen(elements) & ~np.isfinite(own)
        if infinite.any():
            weights = is_used[line].astype(np.float32)
            rows.special[elements] += np.where(infinite, weights * own, 0).sum(axis=-1)
        own = np.where(is_used[line] & ~infinite, own, 0)
        return (e[line] * arithmetic.number(own)).sum() / e.sum()[line]

    def compare(element: int, midpoint: float) -> int:
        # The sign of sum_j exp(s_j) (v_j - midpoint), where the keys are grouped by their exact scores.
        products, is_used = rows.products(element)
        v, scale = values(np.asarray([element]))[0], rows.scale
        sums: dict[Decimal, Fraction] = {}
        for j in np.flatnonzero(is_used):
            key = products[j] if scale else Decimal(0)
            sums[key] = sums.get(key, Fraction(0)) + Fraction(float(v[j])) - Fraction(midpoint)
        return dominant_sign(sums, scale)

    return _rounded(evaluate, rows.numbers, rows.length, rows.special, compare)


def dominant_sign(sums: dict[Decimal, Fraction], scale: float) -> int:
    """Return the sign of the sum of exp(scale key) times the fraction, over the items of a dict.

    Exponentials of distinct rational numbers are linearly independent, so the sum is 0 only if all fractions are 0. The
    largest exponential decides with a small number of digits, even if the others are smaller by exp(-1e30).
    """
    groups = {key: each for key, each in sums.items() if each}
    if not groups:
        return 0
    best = max(groups) if scale >= 0 else min(groups)

    def total(digits: int) -> Interval:
        number = Decimals(digits).number
        exponents = (number(list(groups)) - number([best])) * number([scale])
        numerators, denominators = zip(*(each.as_integer_ratio() for each in groups.values()), strict=True)
        return (number(numerators) / number(denominators) * exponents.exp()).sum()

    digits = 40
    while (sign := total(digits).sign()) is None:
        digits *= 2
    return sign


def _scale(q: np.ndarray, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)


def _seen(shape: tuple[int, ...], mask: np.ndarray | None, causal: bool, at: At) -> np.ndarray:
    """Return which keys the chosen queries see, [elements, keys]. The shape is [*batch, queries, keys]."""
    *_, queries, keys = shape
    found = np.ones((len(at[-1]), keys), np.bool_)
    if mask is not None:
        found &= np.broadcast_to(mask, shape)[at]
    if causal:
        found &= at[-1][:, None] + (keys - queries) >= np.arange(keys)
    return found


class _Rows:
    """The scores of the queries of chosen elements [*batch, query, ...]: see `attention_scores` for the parameters."""

    def __init__(
        self, q: np.ndarray, k: np.ndarray, at: At, mask: np.ndarray | None, causal: bool, scale: float | None
    ) -> None:
        self.q, self.k, self.mask, self.causal, self.scale = q, k, mask, causal, _scale(q, scale)
        self.at = tuple(map(np.asarray, at[:-1]))
        self.shape = (*q.shape[:-1], k.shape[-2])
        self.numbers = _rows(at, self.shape[:-1])
        self.length = k.shape[-2] * max(q.shape[-1] // 4, 1)  # several rows, because the sums over keys are short
        self.special = np.zeros(len(self.numbers))

    def seen(self, elements: np.ndarray) -> np.ndarray:
        """Return which keys the queries of elements see, [elements, keys]."""
        return _seen(self.shape, self.mask, self.causal, _of(self.at, elements))

    def _gathered(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return queries, keys, which keys have a weight, and for which queries the weights are NaN."""
        at, is_used = _of(self.at, elements), self.seen(elements)
        q, k = chosen(self.q, at)[:, None], chosen(self.k, at[:-1])
        is_undefined: Any = ~is_used.any(axis=-1)
        if not (np.isfinite(q.sum()) and np.isfinite(k.sum())):
            scores = np.multiply(q, k, dtype=np.float64).sum(axis=-1)  # finite products do not overflow
            scores = np.where(np.isfinite(scores), 0, scores * np.sign(self.scale))
            is_undefined = (is_used & ~(scores < np.inf)).any(axis=-1)
            is_used &= np.isfinite(scores)
            is_undefined |= ~is_used.any(axis=-1)
            q, k = np.where(np.isfinite(q), q, 0), np.where(np.isfinite(k), k, 0)
        return q, k, is_used, is_undefined

    def scores(self, arithmetic: Arithmetic, elements: np.ndarray) -> tuple[Number, np.ndarray, np.ndarray]:
        """Return the scores of different queries [rows, keys], which have a weight, and the row of each element."""
        _, first, line = np.unique(self.numbers[elements], return_index=True, return_inverse=True)
        q, k, is_used, is_undefined = self._gathered(elements[first])
        self.special[elements[is_undefined[line]]] = np.nan
        return arithmetic.dot(q, k) * arithmetic.number(self.scale), is_used, line

    def products(self, element: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact dot products of one query with all keys, and which of them have a weight."""
        q, k, is_used, _ = self._gathered(np.asarray([element]))
        return exact_dot(q, k)[0], is_used[0]


# Layer normalisation


def layer_norm(x: np.ndarray, g: np.ndarray, b: np.ndarray, at: At, *, eps: float = 1e-5) -> np.ndarray:
    """Return chosen elements of (x - mean) / sqrt(variance + eps) g + b along the last axis, correctly rounded.

    With the sums S of x and Q of x^2 over the n elements of a row, this is A / sqrt(D) + b, where A = (n x - S) g and
    D = n Q - S^2 + n^2 eps. A row that is not finite is NaN, and so is a row of equal elements if eps is 0.

    Parameters
    ----------
    x : float32 array [*batch, n]
        Zero or more leading axes.
    g, b : float32 array [n]
        Gain and bias.
    at : tuple of int arrays
        As for `conv1d`.
    eps : float
        The number that is added to the variance.

    Returns
    -------
    float32 array [elements]

    Examples
    --------
    >>> g, b = np.ones(3, np.float32), np.zeros(3, np.float32)
    >>> layer_norm(np.asarray([1, 2, 3], np.float32), g, b, (np.asarray([0, 1]),))
    array([-1.2247357,  0.       ], dtype=float32)
    """
    *before, j = map(np.asarray, at)
    n, rows, special = x.shape[-1], _rows(at, x.shape[:-1]), np.zeros(len(j))
    gains, biases, ones = chosen(g, (j,)).astype(np.float64), chosen(b, (j,)).astype(np.float64), np.ones(1, np.float32)

    def lines(elements: np.ndarray) -> np.ndarray:
        return chosen(x, _of(before, elements))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number = arithmetic.number
        _, first, line = np.unique(rows[elements], return_index=True, return_inverse=True)
        values = lines(elements[first])
        size, total, squares = number(float(n)), arithmetic.dot(values, ones), arithmetic.dot(values, values)
        d = size * squares - total * total + size * size * number(float(eps))
        own, gain, bias = values[line, j[elements]].astype(np.float64), gains[elements], biases[elements]
        for i in np.flatnonzero(~np.isfinite(gain) | ~np.isfinite(bias)):
            sign = np.sign(float(exactly(values[line[i]], own[i])[0])) if np.isfinite(values[line[i]]).all() else np.nan
            special[elements[i]] = sign * gain[i] + bias[i]
        is_undefined = ~np.isfinite(values).all(axis=-1) | ((eps == 0) & (values == values[:, :1]).all(axis=-1))
        special[elements[is_undefined[line]]] = np.nan
        return (size * number(own) - total[line]) * number(gain) / d.sqrt()[line] + number(bias)

    def exactly(values: np.ndarray, own: float) -> tuple[Fraction, Fraction]:
        """Return n x - S and D."""
        total, squares = (_fraction(exact_dot(values, factors)) for factors in (ones, values))
        return n * Fraction(float(own)) - total, n * squares - total**2 + n**2 * Fraction(eps)

    def compare(element: int, midpoint: float) -> int:
        # The sign of A - (midpoint - b) sqrt(D), by the signs and the squares of both terms.
        values = lines(np.asarray([element]))[0]
        deviation, d = exactly(values, values[j[element]])
        a, c = deviation * Fraction(gains[element]), Fraction(midpoint) - Fraction(biases[element])
        difference = abs(a) * a - abs(c) * c * d
        return (difference > 0) - (difference < 0)

    return _rounded(evaluate, rows, n, special, compare)
