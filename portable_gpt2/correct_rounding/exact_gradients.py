"""The correctly rounded results of chosen elements of each gradient and of the optimizer's formulas, on the host.

The functions have the names of those in `float64_gradients`. Each takes NumPy arrays of float32 without NaN and
infinities, and the indices of elements of each result by the result's name. It returns these elements in a dict with
the same names. The method is that of `exact`.

Ties between two float32 numbers are recognised as follows. Sums of products and the moments are rational numbers, which
are computed exactly. The gradient of x in layer_norm and the parameters after a step are compared with a midpoint by
the signs and squares of rational numbers. For gelu and cross_entropy, an exact comparison decides, because exponentials
of distinct rational numbers are linearly independent over the rational numbers. For the gradients of softmax, of
attention and of the gain of layer_norm, and for nothing else, a number counts as a midpoint if 2,000 decimal digits do
not separate it from the midpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from .balls import Ball, DoubleDouble
from .exact import _exponentials, _rounded, _rows, _seen, dominant_sign, unembed
from .intervals import Decimals, exact_dot
from .rounding import nearest

Arithmetic = Any  # DoubleDouble or Decimals
Number = Any  # Ball or Interval
At = tuple[np.ndarray, ...]
Elements = dict[str, np.ndarray]

_DIGITS = 2000
_ONES = np.ones(1, np.float32)


def _flushed(a: np.ndarray) -> np.ndarray:
    """Return a float32 array in which subnormal numbers are 0."""
    return np.where(np.abs(a) < 2.0**-126, np.float32(0), a)


def _sign(x: Fraction) -> int:
    return (x > 0) - (x < 0)


def _elementwise(
    evaluate: Callable[[Arithmetic, np.ndarray], Number], n: int, compare: Callable[[int, float], int | None]
) -> np.ndarray:
    """Return n correctly rounded values that have nothing in common."""
    return _rounded(evaluate, np.arange(n), 1, np.zeros(n), compare)


def _to_2000_digits(evaluate: Callable[[Arithmetic, np.ndarray], Number]) -> Callable[[int, float], int]:
    """Return a function that compares an element with a midpoint. It returns 0 if 2,000 digits do not decide."""

    def compare(element: int, midpoint: float) -> int:
        arithmetic = Decimals(_DIGITS)
        return (evaluate(arithmetic, np.asarray([element])) - arithmetic.number([midpoint]))[0].sign() or 0

    return compare


def _flat(x: np.ndarray) -> np.ndarray:
    """Return x as a matrix: all leading axes become one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _columns(x: np.ndarray, at: At) -> np.ndarray:
    """Return sums of the columns of x [rows, n]."""
    return unembed(np.ones((1, len(x)), np.float32), x.T, (np.zeros(len(at[0]), np.int64), at[0]))


def add_backward(dy: np.ndarray, *, n_axes: int, at: dict[str, At]) -> Elements:
    """Return elements of the sum of dy over its first axes."""
    shape = dy.shape[n_axes:]
    columns = np.ravel_multi_index(at["y"], shape) if shape else np.zeros(1, np.int64)
    return {"y": _columns(dy.reshape(math.prod(dy.shape[:n_axes]), -1), (columns,))}


def conv1d_backward(x: np.ndarray, w: np.ndarray, dy: np.ndarray, *, at: dict[str, At]) -> Elements:
    """Return elements of dx = dy w^T, dw = x^T dy, and db, the sum of dy over all rows."""
    return {
        "x": unembed(dy, w.reshape(w.shape[-2:]), at["x"]),
        "w": unembed(_flat(x).T, _flat(dy).T, at["w"][-2:]),
        "b": _columns(_flat(dy), at["b"]),
    }


def unembed_backward(x: np.ndarray, w: np.ndarray, dy: np.ndarray, *, at: dict[str, At]) -> Elements:
    """Return elements of dx = dy w and dw = dy^T x."""
    return {"x": unembed(dy, w.T, at["x"]), "w": unembed(_flat(dy).T, _flat(x).T, at["w"])}


def embed_backward(ids: np.ndarray, dy: np.ndarray, *, n_vocab: int, at: dict[str, At]) -> Elements:
    """Return elements of dw, whose row j is the sum of dy_i over all i with ids_i = j."""
    rows, j = at["w"]
    unique, line = np.unique(rows, return_inverse=True)
    chosen = (np.asarray(ids).reshape(1, -1) == unique[:, None]).astype(np.float32)
    return {"w": unembed(chosen, _flat(dy).T, (line, j))}


def gelu_backward(x: np.ndarray, dy: np.ndarray, *, at: dict[str, At]) -> Elements:
    """Return elements of dy s (1 + z (1 - s)), with s = 1 / (1 + exp(-2 t)), z = 2 x dt/dx, t the argument of tanh."""
    values, factors = (_flushed(a[at["x"]].reshape(-1)).astype(np.float64) for a in (x, dy))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number, x = arithmetic.number, values[elements]
        negative = x < 0
        c, one, square = number(2 * math.sqrt(2 / math.pi)), number(1.0), number(x) * number(x)
        t = c * number(x) * (one + number(0.044715) * square)
        e = (number(np.where(negative, 1.0, -1.0)) * t).exp()  # exp(-2 |t|)
        z = c * number(x) * (one + number(3 * 0.044715) * square)
        part = e.only(negative) + number((~negative).astype(np.float64))
        return number(factors[elements]) * (part + z * e / (one + e)) / (one + e)

    def compare(element: int, midpoint: float) -> int | None:
        # With E = exp(-2 |t|), a midpoint would give a quadratic equation for E with rational coefficients that are not
        # all 0. But E is transcendental, unless x is 0.
        return None if values[element] else _sign(Fraction(factors[element]) / 2 - Fraction(midpoint))

    return {"x": _elementwise(evaluate, len(values), compare)}


def layer_norm_backward(
    x: np.ndarray, g: np.ndarray, dy: np.ndarray, *, eps: float = 1e-5, at: dict[str, At]
) -> Elements:
    """Return elements of dx = (dz - mean(dz) - N mean(dz N)) / r with dz = dy g, and the sums of dy N and of dy.

    With the sums S of x, Q of x^2, Z of dz and P of dz (n x - S) over the n elements of a row, A = n x - S, and D = n Q
    - S^2 + n^2 eps, the normalised row is N = A / sqrt(D), and dx = (n dz - Z - A P / D) / sqrt(D).

    If eps is 0, a row of equal elements makes its part of dx NaN, and all sums of dy N.
    """
    n = x.shape[-1]
    values, dy = _flushed(_flat(x)), _flushed(_flat(dy))
    dz = np.multiply(dy, _flushed(g), dtype=np.float64)
    is_undefined = (eps == 0) & (values == values[:, :1]).all(axis=-1)

    def deviations(arithmetic: Arithmetic, rows: np.ndarray) -> tuple[Number, Number, Number]:
        size, total = arithmetic.number(float(n)), arithmetic.dot(values[rows], _ONES)
        squares = arithmetic.dot(values[rows], values[rows])
        return size, total, size * squares - total * total + size * size * arithmetic.number(float(eps))

    *before, j = at["x"]
    i = _rows((*before, j), x.shape[:-1])

    def of_x(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number = arithmetic.number
        rows, line = np.unique(i[elements], return_inverse=True)
        size, total, d = deviations(arithmetic, rows)
        sum_z = number(dz[rows]).sum()
        p = size * (number(dz[rows]) * number(values[rows].astype(np.float64))).sum() - total * sum_z
        own, own_z = (a[i[elements], j[elements]].astype(np.float64) for a in (values, dz))
        a = size * number(own) - total[line]
        return (size * number(own_z) - sum_z[line] - a * (p / d)[line]) / d.sqrt()[line]

    def compare_x(element: int, midpoint: float) -> int:
        row = values[i[element]]
        total, squares = (Fraction(exact_dot(row, factors).item()) for factors in (_ONES, row))
        d = n * squares - total**2 + n**2 * Fraction(eps)
        z = [Fraction(each) for each in dz[i[element]].tolist()]
        p = sum((each * (n * Fraction(float(own)) - total) for each, own in zip(z, row, strict=True)), Fraction(0))
        a = n * Fraction(float(row[j[element]])) - total
        b, m = n * z[j[element]] - sum(z) - a * p / d, Fraction(midpoint)
        return _sign(abs(b) * b - abs(m) * m * d)

    def of_g(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        columns = at["g"][0][elements]
        size, total, d = deviations(arithmetic, np.arange(len(values)))
        a = size * arithmetic.number(values[:, columns].T.astype(np.float64)) - total
        return (arithmetic.number(dy[:, columns].T.astype(np.float64)) * a / d.sqrt()).sum()

    k = len(at["g"][0])
    of_all = np.full(k, np.nan if is_undefined.any() else 0.0)
    return {
        "x": _rounded(of_x, i, n, np.where(is_undefined[i], np.nan, 0.0), compare_x),
        "g": _rounded(of_g, np.zeros(k, np.int64), values.size, of_all, _to_2000_digits(of_g)),
        "b": _columns(dy, at["b"]),
    }


def _softmax(scores: Number, is_used: np.ndarray) -> Number:
    """Return the softmax of scores [rows, n] over the entries that are used."""
    e = _exponentials(scores, is_used)
    return e / e.sum()[:, None]


def softmax_backward(x: np.ndarray, dy: np.ndarray, *, axis: int = -1, at: dict[str, At]) -> Elements:
    """Return elements of y_j (dy_j - sum_k y_k dy_k), with y the softmax of x."""
    x, dy = (_flushed(np.moveaxis(a, axis, -1)) for a in (x, dy))
    indices = list(at["x"])
    j = indices.pop(axis)
    i = _rows((*indices, j), x.shape[:-1])
    scores, factors = (_flat(a).astype(np.float64) for a in (x, dy))

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number = arithmetic.number
        rows, line = np.unique(i[elements], return_inverse=True)
        is_used = np.ones((len(rows), x.shape[-1]), np.bool_)
        y = _softmax(number(scores[rows]), is_used)
        mean = (y * number(factors[rows])).sum()
        return y[line, j[elements]] * (number(factors[i[elements], j[elements]]) - mean[line])

    return {"x": _rounded(evaluate, i, x.shape[-1], np.zeros(len(i)), _to_2000_digits(evaluate))}


def attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dy: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float,
    at: dict[str, At],
) -> Elements:
    """Return elements of dq = scale ds k, dk = scale ds^T q and dv = w^T dy, with ds = w (dw - sum_j w_j dw_j)."""
    *start, queries, _ = q.shape
    keys = k.shape[-2]
    heads = {name: _rows((*at[name][:-2], at[name][-1]), tuple(start)) for name in "qkv"}
    found = {name: np.zeros(len(heads[name]), np.float32) for name in "qkv"}
    for head in np.unique(np.concatenate([*heads.values()])):
        index = np.unravel_index(head, tuple(start)) if start else ()
        own_q, own_k, own_v, own_dy = (_flushed(a[index]) for a in (q, k, v, dy))
        every = tuple(np.full(queries, part) for part in index)
        is_used = _seen((*start, queries, keys), mask, causal, (*every, np.arange(queries)))
        of_head = _Head(own_q, own_k, own_v, own_dy, is_used, scale)
        for name in "qkv":
            chosen = np.flatnonzero(heads[name] == head)
            i, j = (part[chosen] for part in at[name][-2:])
            evaluate = functools.partial(getattr(of_head, name), i, j)
            # A query that sees no key has weights of NaN.
            is_undefined = np.asarray(~is_used.any(axis=-1))
            special = np.where(is_undefined[i] if name == "q" else is_undefined.any(), np.nan, np.zeros(len(i)))
            rows = np.zeros(len(i), np.int64)
            found[name][chosen] = _rounded(evaluate, rows, 1, special, _to_2000_digits(evaluate))
    return found


def _matmul(arithmetic: Arithmetic, a: np.ndarray, b: np.ndarray) -> Number:
    """Return the products of the rows of float32 matrices, a b^T.

    For balls, each row is split into three slices and a rest. A slice has integers of k bits at most, times a power of
    two, and k is such that a sum of products of two slices has at most 53 bits. So the products of slices are exact in
    any order of summation. The rest is 0 if no element is below 2^-45 times the largest of its row.
    """
    if not isinstance(arithmetic, DoubleDouble):
        return arithmetic.dot(a[:, None], b)
    n = a.shape[-1]
    bits = (53 - n.bit_length()) // 2

    def slices(x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        rest, parts = x.astype(np.float64), []
        size = np.abs(rest).max(axis=-1, keepdims=True, initial=0)
        unit = np.ldexp(1.0, np.frexp(size)[1])
        for _ in range(3):
            unit = np.ldexp(unit, -bits)
            parts.append(np.rint(rest / unit) * unit)
            rest = rest - parts[-1]
        return parts, size, np.abs(rest).max(axis=-1, keepdims=True, initial=0)

    (a_parts, a_size, a_rest), (b_parts, b_size, b_rest) = slices(a), slices(b)
    exact = [arithmetic.number(x @ y.T) for x in a_parts for y in b_parts]
    found = functools.reduce(lambda x, y: x + y, exact)
    # |a b - a' b'| <= |a| |b - b'| + |a - a'| |b'|, and |b'| <= |b| + |b - b'|
    error = 1.01 * n * (a_size * b_rest.T + a_rest * (b_size + b_rest).T)
    return Ball(found.high, found.low, found.error + error)


class _Head:
    """The gradients of attention for a single head: q [queries, d], k [keys, d], v [keys, dv], dy [queries, dv]."""

    def __init__(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray, is_used: np.ndarray, scale: float
    ) -> None:
        self._q, self._k, self._v, self._dy, self._is_used, self._scale = q, k, v, dy, is_used, scale
        self._balls: tuple[Number, Number] | None = None

    def _tables_of_all(self, arithmetic: Arithmetic) -> tuple[Number, Number]:
        """Return w and scale ds for all queries, [queries, keys]. Those with balls are computed only once."""
        every = np.arange(len(self._q))
        if not isinstance(arithmetic, DoubleDouble):
            return self._tables(arithmetic, every)
        if self._balls is None:
            self._balls = self._tables(arithmetic, every)
        return self._balls

    def _tables(self, arithmetic: Arithmetic, rows: np.ndarray) -> tuple[Number, Number]:
        """Return w and scale ds for some queries, [rows, keys]."""
        q, dy, is_used = self._q[rows], self._dy[rows], self._is_used[rows]
        weights = _softmax(_matmul(arithmetic, q, self._k) * arithmetic.number(self._scale), is_used)
        dw = _matmul(arithmetic, dy, self._v)
        return weights, weights * (dw - (weights * dw).sum()[:, None]) * arithmetic.number(self._scale)

    def q(self, i: np.ndarray, j: np.ndarray, arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        rows, line = np.unique(i[elements], return_inverse=True)
        _, ds = self._tables(arithmetic, rows)
        return (ds[line] * arithmetic.number(self._k[:, j[elements]].T.astype(np.float64))).sum()

    def k(self, i: np.ndarray, j: np.ndarray, arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        _, ds = self._tables_of_all(arithmetic)
        factors = self._q[:, j[elements]].T.astype(np.float64)
        return (ds[np.arange(len(self._q)), i[elements][:, None]] * arithmetic.number(factors)).sum()

    def v(self, i: np.ndarray, j: np.ndarray, arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        weights, _ = self._tables_of_all(arithmetic)
        factors = self._dy[:, j[elements]].T.astype(np.float64)
        return (weights[np.arange(len(self._dy)), i[elements][:, None]] * arithmetic.number(factors)).sum()


def cross_entropy_backward(logits: np.ndarray, targets: np.ndarray, *, factor: float, at: dict[str, At]) -> Elements:
    """Return elements of factor p at all entries but the target, and of factor (p - 1) there; p = softmax(logits)."""
    *before, j = at["logits"]
    i = _rows((*before, j), logits.shape[:-1])
    rows, ids = _flushed(_flat(logits)).astype(np.float64), np.asarray(targets).reshape(-1)
    is_target = ids[i] == j

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number = arithmetic.number
        unique, line = np.unique(i[elements], return_inverse=True)
        scores = rows[unique]
        e = (number(scores) - number(scores.max(axis=-1, keepdims=True))).exp()
        others = e.only(np.arange(scores.shape[-1]) != ids[unique][:, None]).sum()
        negative = is_target[elements]
        part = e[line, j[elements]].only(~negative) - others[line].only(negative)
        return part / e.sum()[line] * number(float(factor))

    def compare(element: int, midpoint: float) -> int:
        # The sign of the sum of exp(x_k) (factor (1 or 0) - midpoint), where the factor counts for the entry, or, with
        # the opposite sign, for all entries but the target.
        groups: dict[Decimal, Fraction] = {}
        for k, x in enumerate(rows[i[element]].tolist()):
            counts = (k == j[element]) - int(is_target[element])
            groups[Decimal(x)] = groups.get(Decimal(x), Fraction(0)) + counts * Fraction(factor) - Fraction(midpoint)
        return dominant_sign(groups, 1.0)

    special = np.full(len(i), 0.0 if math.isfinite(factor) else np.nan)
    return {"logits": _rounded(evaluate, i, rows.shape[-1], special, compare)}


def moments(g: np.ndarray, m: np.ndarray, v: np.ndarray, constants: np.ndarray, *, at: dict[str, At]) -> Elements:
    """Return elements of b1 m + a1 g and b2 v + a2 g^2 for constants [b1, a1, b2, a2]."""
    b1, a1, b2, a2 = constants.tolist()

    def rounded(a: float, x: np.ndarray, b: float, y: np.ndarray) -> np.ndarray:
        def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
            number = arithmetic.number
            return number(a) * number(x[elements]) + number(b) * number(y[elements])

        def compare(element: int, midpoint: float) -> int:
            exact = Fraction(a) * Fraction(x[element]) + Fraction(b) * Fraction(y[element])
            return _sign(exact - Fraction(midpoint))

        return _elementwise(evaluate, len(x), compare)

    of_m, of_v = (([_flushed(a[index]).astype(np.float64).ravel() for a in (g, m, v)]) for index in (at["m"], at["v"]))
    return {"m": rounded(b1, of_m[1], a1, of_m[0]), "v": rounded(b2, of_v[2], a2, of_v[0] ** 2)}


def adamw(p: np.ndarray, m: np.ndarray, v: np.ndarray, constants: np.ndarray, *, at: dict[str, At]) -> Elements:
    """Return elements of c p - a m / (sqrt(b v) + eps) for constants [c, a, b, eps]; a denominator of 0 becomes 1."""
    c, a, b, eps = constants.tolist()
    p, m, v = (_flushed(x[at["p"]]).astype(np.float64).ravel() for x in (p, m, v))
    is_zero = (v == 0) & (eps == 0)

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        number, zero = arithmetic.number, is_zero[elements]
        root = (number(b) * number(np.where(v[elements] == 0, 1.0, v[elements]))).sqrt().only(v[elements] != 0)
        denominator = root + number(eps) + number(zero.astype(np.float64))
        return number(c) * number(p[elements]) - number(a) * number(m[elements]) / denominator

    def compare(element: int, midpoint: float) -> int:
        # The sign of r (sqrt(b v) + eps) - a m with r = c p - midpoint: that of r sqrt(b v) + s, s = r eps - a m.
        rest, step = Fraction(c) * Fraction(p[element]) - Fraction(midpoint), Fraction(a) * Fraction(m[element])
        if is_zero[element]:
            return _sign(rest - step)
        s = rest * Fraction(eps) - step
        return _sign(abs(rest) * rest * Fraction(b) * Fraction(v[element]) + abs(s) * s)

    return {"p": _elementwise(evaluate, len(p), compare)}


def norm(arrays: list[np.ndarray], n: int) -> float:
    """Return sqrt(sum of squares of all elements) / n, rounded to float32.

    Examples
    --------
    >>> norm([np.asarray([3, 0], np.float32), np.asarray([4], np.float32)], 2)
    2.5
    """
    flat = [_flushed(a).ravel() for a in arrays]

    def evaluate(arithmetic: Arithmetic, elements: np.ndarray) -> Number:
        totals = [arithmetic.dot(a[None], a[None]) for a in flat]
        return functools.reduce(lambda a, b: a + b, totals).sqrt() / arithmetic.number(float(n))

    def compare(element: int, midpoint: float) -> int:
        exact = sum((Fraction(exact_dot(a, a).item()) for a in flat), Fraction(0))
        return _sign(exact - (n * Fraction(midpoint)) ** 2)

    if not any(a.any() for a in flat):
        return 0.0
    return float(nearest(_elementwise(evaluate, 1, compare))[0])
