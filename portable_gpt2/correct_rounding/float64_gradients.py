"""Each gradient, and each formula of the optimizer, in float64, with a bound on the error of each element.

The functions have the names of those in `portable_gpt2.gradients`, and of the formulas in
`portable_gpt2.training.optimizer`. Each takes float64 arrays that hold float32 numbers, and returns an `Evaluation` for
each result. The assumptions, the notation and the constants are those of `float64`. All arguments are finite here: if
an element of any argument is NaN or infinite, every result is NaN, whatever these functions return. Where a bound is
NaN, nothing is known about the element.
"""

from __future__ import annotations

import math
from typing import Any

from ..numerics import Numerics
from ..ops import in_range, visible_keys
from ..registry import backend_of
from .float64 import _MOST, _UNIT, Evaluation, _exp, _float, _norms, attention_scores

Evaluations = dict[str, Evaluation]

_SMALL = 2.0**-200
"""An error without influence: results that are not 0 have a magnitude of at least 2^-126."""


def _rows(backend: Any, x: Any) -> Any:
    """Return x as a matrix: all leading axes become one."""
    *start, n = backend.shape(x)
    return backend.xp.reshape(x, (math.prod(start), n))


def _sum(x: Any) -> Evaluation:
    """Evaluate the sum along the first axis, of length n. Its error is at most (n - 1) u times the sum of |x|."""
    backend = backend_of(x)
    xp, n = backend.xp, backend.shape(x)[0]
    return Evaluation(xp.sum(x, axis=0), xp.sum(abs(x), axis=0) * ((_float(xp, n) + 2) * _UNIT))


def _sum_of_floats(x: Any) -> Evaluation:
    """Evaluate the sum of float32 numbers along the first axis; see `_known` for sums without an error."""
    backend = backend_of(x)
    xp, size = backend.xp, abs(x)
    unit = (_float(xp, backend.shape(x)[0]) + 2) * _UNIT
    inverse = xp.max(_inverse(xp, size), axis=0, keepdims=True)[0, ...]
    return Evaluation(xp.sum(x, axis=0), _known(xp, xp.sum(size, axis=0), inverse, unit))


def _inverse(xp: Any, size: Any) -> Any:
    """Return 1 / size, and 0 where the size is 0."""
    return xp.where(size == 0, 0.0, 1 / xp.where(size == 0, 1.0, size))


def _known(xp: Any, size: Any, inverse: Any, unit: Any) -> Any:
    """Return the error of sums of float32 numbers, given the sums of their magnitudes, and the largest 1 / |x|.

    The last bit of a float32 number is at least 2^-24 times its magnitude, so all partial sums are multiples of a power
    of two q that is at least 2^-24 / inverse. If the sum of the magnitudes is below 2^53 q, then nothing is rounded,
    and the error is 0. This decides ties, which are frequent in sums with a small number of terms. The factor 2 in 2^28
    accounts for the roundings of this test.
    """
    return xp.where(size * inverse <= 2.0**28, 0.0, size * unit)


def _product(x: Any, y: Any) -> Evaluation:
    """Evaluate the product of the matrices x [m, n] and y [n, k]. Its error is at most n u |x| |y|, as in `float64`."""
    backend = backend_of(x)
    xp = backend.xp
    unit = (_float(xp, backend.shape(x)[-1]) + 2) * _UNIT
    error = (_norms(xp, x, axis=-1) * unit) * _norms(xp, y, axis=-2)
    return Evaluation(xp.matmul(x, y), error)


def _reshaped(found: Evaluation, shape: tuple[Any, ...]) -> Evaluation:
    value, error = (backend_of(x).xp.reshape(x, shape) for x in found)
    return Evaluation(value, error)


def add_backward(dy: Any, *, n_axes: int, numerics: Numerics) -> Evaluations:
    """Evaluate the sum of dy over its first axes."""
    backend = backend_of(dy)
    shape = backend.shape(dy)
    return {"y": _sum_of_floats(backend.xp.reshape(dy, (math.prod(shape[:n_axes]), *shape[n_axes:])))}


def conv1d_backward(x: Any, w: Any, dy: Any, *, numerics: Numerics) -> Evaluations:
    """Evaluate dx = dy w^T, dw = x^T dy, and db, the sum of dy over all rows."""
    backend = backend_of(x)
    t, shape, rows = backend.xp.matrix_transpose, backend.shape(w), _rows(backend, dy)
    dx = _product(rows, t(backend.xp.reshape(w, shape[-2:])))
    dw = _product(t(_rows(backend, x)), rows)
    return {"x": _reshaped(dx, backend.shape(x)), "w": _reshaped(dw, shape), "b": _sum_of_floats(rows)}


def unembed_backward(x: Any, w: Any, dy: Any, *, numerics: Numerics) -> Evaluations:
    """Evaluate dx = dy w and dw = dy^T x."""
    backend = backend_of(x)
    rows = _rows(backend, dy)
    dw = _product(backend.xp.matrix_transpose(rows), _rows(backend, x))
    return {"x": _reshaped(_product(rows, w), backend.shape(x)), "w": dw}


def embed_backward(ids: Any, dy: Any, *, n_vocab: int, numerics: Numerics) -> Evaluations:
    """Evaluate dw, whose row j is the sum of dy_i over all i with ids_i = j. The n of `_sum` is the number of these i.

    The rows of dy, their magnitudes and a column of ones are added in one operation.
    """
    backend = backend_of(dy)
    xp, d = backend.xp, backend.shape(dy)[-1]
    index, known = in_range("embed: ids", ids, n_vocab)
    rows = _rows(backend, dy)
    inverse = xp.max(_inverse(xp, abs(rows)), axis=0, keepdims=True)
    rows = xp.concat([rows, abs(rows), rows[:, :1] * 0 + 1], axis=-1)
    flat = xp.reshape(index, (math.prod(backend.shape(ids)),))
    if known is not None:
        rows = xp.where(xp.reshape(known, (math.prod(backend.shape(ids)), 1)), rows, 0)
    sums = backend.index_add(backend.zeros((n_vocab, 2 * d + 1), like=dy), flat, rows)
    error = _known(xp, sums[:, d : 2 * d], inverse, (sums[:, 2 * d :] + 2) * _UNIT)
    return {"w": Evaluation(sums[:, :d], error)}


def gelu_backward(x: Any, dy: Any, *, numerics: Numerics) -> Evaluations:
    """Evaluate dy s (1 + z (1 - s)), with s = 1 / (1 + exp(-2 t)), z = 2 x dt/dx, and t as in `float64.gelu`.

    Let E = exp(-2 |t|). The product s (1 - s) is E / (1 + E)^2, and s is 1 / (1 + E), or E / (1 + E) for negative x. So
    nothing cancels but the sum of s and z s (1 - s). The relative error of E is r = c0 + (4 + c1) 2 |t|, in units of u.
    Both quotients depend on E with an exponent of at most 1. With the roundings, the relative error of s is at most r +
    3, that of s (1 - s) r + 6, and that of z 5. The sum and the product with dy add 2. If 2 |t| is more than 200, then
    z E, which is at most 6 |t| E, is below 2^-270, and so is its error.
    """
    xp = backend_of(x).xp
    c = 2 * math.sqrt(2 / math.pi)
    negative = x < 0
    size = abs(x)
    square = size * size
    distance = c * (size * (1 + 0.044715 * square))
    e = xp.exp(-distance)
    q = 1 / (1 + e)
    s = xp.where(negative, e * q, q)
    part = c * (size * (1 + (3 * 0.044715) * square)) * (e * q * q)
    total = xp.where(negative, s - part, s + part)
    c0, c1 = _exp(numerics, 0), numerics.exp[1]
    unit = (c0 + 17 + (4 + c1) * xp.where(distance > 200, 200.0, distance)) * _UNIT
    return {"x": Evaluation(dy * total, abs(dy) * ((s + part) * unit + 2.0**-270))}


def layer_norm_backward(x: Any, g: Any, dy: Any, *, eps: float = 1e-5, numerics: Numerics) -> Evaluations:
    """Evaluate dx = (dz - mean(dz) - N mean(dz N)) / r with dz = dy g, and the sums over all rows of dy N and of dy.

    - As in `float64.layer_norm`, the computed r has a relative error of (n/2 + 4) u + h^2 / 2, and the computed N_j an
      error of a_j = h + |N_j| ((n/2 + 8) u + h^2 / 2), with h = (n + 1) u (|mean| + sqrt(variance)) / r.
    - The products dz are exact. The mean of n numbers adds (n + 1) u times the mean of their magnitudes.
    - The error of mean(dz N) is at most mean(|dz| a) + (n + 2) u mean |dz N|.
    - The error of N_j mean(dz N) is at most a_j |mean(dz N)| + |N_j| times the error of the mean, plus u |N_j mean|.
    - The two differences add 2 u (|dz_j| + mean |dz|) + u |N_j mean|, and the quotient the error of r plus u.
    """
    backend = backend_of(x)
    xp = backend.xp
    n = _float(xp, backend.shape(x)[-1])

    def mean(a: Any) -> Any:
        return xp.sum(a, axis=-1, keepdims=True) / n

    middle = mean(x)
    d = x - middle
    variance = mean(d * d)
    r = xp.sqrt(variance + eps)
    normal = d / r
    h = (n + 1) * _UNIT * (abs(middle) + xp.sqrt(variance)) / r
    h = xp.where(h <= _MOST, h * (1 + 2.0**-17), math.inf)
    size = abs(normal)
    error = h + size * ((n / 2 + 8) * _UNIT + h * h)
    dz = dy * g
    size_z = abs(dz)
    all_z, covariance = mean(size_z), mean(dz * normal)
    of_covariance = mean(size_z * error) + (n + 2) * _UNIT * mean(size_z * size)
    total = dz - mean(dz) - normal * covariance
    of_total = (
        error * abs(covariance)
        + (size + error) * of_covariance
        + _UNIT * (2 * size_z + (n + 3) * all_z + 2 * size * abs(covariance))
        + abs(total) * ((n / 2 + 9) * _UNIT + h * h)
    )
    rows, sizes = _rows(backend, dy * normal), _rows(backend, abs(dy) * error)
    dg = _sum(rows)
    return {
        "x": Evaluation(total / r, of_total * (1 + 2.0**-16) / r + _SMALL),
        "g": Evaluation(dg.value, dg.error + (1 + 2.0**-16) * xp.sum(sizes, axis=0) + _SMALL),
        "b": _sum_of_floats(_rows(backend, dy)),
    }


def _weights(scores: Any, errors: Any, numerics: Numerics, axis: int = -1) -> tuple[Any, Any]:
    """Return the softmax of scores, and the relative error of each weight, given the errors of the scores.

    The number that is subtracted from all scores has no influence, so its error does not count. The relative error of
    each exponential is its score's error plus (c0 + (1 + c1) d) u, where d is the distance to the maximum, and that of
    their sum the mean of these, as in `float64.softmax`. Where d is more than 746, the weight is 0.
    """
    backend = backend_of(scores)
    xp = backend.xp
    d = xp.max(scores, axis=axis, keepdims=True) - scores
    e = xp.exp(-d)
    weights = e / xp.sum(e, axis=axis, keepdims=True)
    errors = xp.where(errors <= _MOST, errors, math.inf)
    own = _exp(numerics, 0) + (1 + numerics.exp[1]) * xp.where(d > 746, 746.0, d)
    of_sum = xp.sum(weights * errors, axis=axis, keepdims=True) * (1 + 2.0**-17)
    return weights, errors + of_sum + (own + _exp(numerics, 21) + _float(xp, backend.shape(scores)[axis]) + 2) * _UNIT


def _centred(weights: Any, relative: Any, a: Any, errors: Any, axis: int = -1) -> Evaluation:
    """Evaluate w_j (a_j - sum_k w_k a_k), given the relative errors of the n weights and the errors of a.

    The error of the sum is at most sum_k w_k (relative_k |a_k| + error_k) + n u sum_k w_k |a_k|.
    """
    backend = backend_of(a)
    xp, size = backend.xp, abs(a)

    def total(x: Any) -> Any:
        return xp.sum(x, axis=axis, keepdims=True)

    mean = total(weights * a)
    unit = (_float(xp, backend.shape(a)[axis]) + 1) * _UNIT
    of_mean = total(weights * ((relative + unit) * size + errors)) * (1 + 2.0**-17)
    difference = a - mean
    of_difference = of_mean + errors + _UNIT * (size + abs(mean))
    error = weights * ((relative + 4 * _UNIT) * abs(difference) + of_difference * (1 + 2.0**-17))
    return Evaluation(weights * difference, error + _SMALL)


def softmax_backward(x: Any, dy: Any, *, axis: int = -1, numerics: Numerics) -> Evaluations:
    """Evaluate y_j (dy_j - sum_k y_k dy_k), with y the softmax of x."""
    return {"x": _centred(*_weights(x, x * 0, numerics, axis), dy, dy * 0, axis)}


def attention_backward(
    q: Any,
    k: Any,
    v: Any,
    dy: Any,
    mask: Any = None,
    *,
    causal: bool = False,
    scale: float,
    numerics: Numerics,
) -> Evaluations:
    """Evaluate dq = scale ds k, dk = scale ds^T q and dv = w^T dy, with ds = w (dw - sum_j w_j dw_j) and dw = dy v^T.

    The errors of ds and of w, in which the roundings of a sum of n terms count n + 4 times, are multiplied by the
    magnitudes of k, q and dy, as ds and w are by k, q and dy. For a query that sees only one key, ds is 0.
    """
    backend = backend_of(q)
    xp, t = backend.xp, backend.xp.matrix_transpose
    queries = backend.shape(q)[-2]
    keys = backend.shape(k)[-2]
    scores, errors = attention_scores(q, k, mask, causal=causal, scale=scale, numerics=numerics)
    weights, relative = _weights(scores, errors, numerics)
    dw = xp.matmul(dy, t(v))
    unit = (_float(xp, backend.shape(v)[-1]) + 2) * _UNIT
    of_dw = (_norms(xp, dy, axis=-1) * unit) * t(_norms(xp, v, axis=-1)) + _SMALL
    ds, of_ds = _centred(weights, relative, dw, of_dw)
    visible = visible_keys(q, k, mask, causal)
    if visible is not None:  # a query that sees only one key has a weight of 1, whatever its score
        is_one = xp.sum(xp.astype(visible, xp.int32), axis=-1, keepdims=True) == 1
        ds, of_ds = (xp.where(is_one, 0.0, x) for x in (ds, of_ds))

    def product(x: Any, errors: Any, n: Any, y: Any, scale: float) -> Evaluation:
        errors = errors + abs(x) * ((_float(xp, n) + 4) * _UNIT)
        error = xp.matmul(errors, abs(y)) * ((1 + 2.0**-17) * abs(scale))
        return Evaluation(scale * xp.matmul(x, y), error + _SMALL)

    return {
        "q": product(ds, of_ds, keys, k, scale),
        "k": product(t(ds), t(of_ds), queries, q, scale),
        "v": product(t(weights), t(weights * relative), queries, dy, 1.0),
    }


def cross_entropy_backward(logits: Any, targets: Any, *, factor: float, numerics: Numerics) -> Evaluations:
    """Evaluate factor p at all entries but the target, and factor (p - 1) there, as minus the sum of the other p.

    With the n exponentials of `float64.softmax`, nothing cancels. Only exponentials of distances of at most 200 have
    influence on a result of at least 2^-126, as long as the factor is below 2^100.
    """
    backend = backend_of(logits)
    xp, n = backend.xp, backend.shape(logits)[-1]
    index, known = in_range("cross_entropy: targets", targets, n)
    is_target = index[..., None] == xp.astype(backend.arange(n, like=targets), index.dtype)
    e = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    others = xp.sum(xp.where(is_target, 0.0, e), axis=-1, keepdims=True)
    value = xp.where(is_target, -others, e) / xp.sum(e, axis=-1, keepdims=True) * factor
    unit = (2 * _float(xp, n) + 5 + _exp(numerics, 200) + _exp(numerics, 21)) * _UNIT
    small = 2.0**-270 if abs(factor) <= 2.0**100 else math.inf
    error = abs(value) * unit + small * abs(factor)
    if known is not None:
        value, error = xp.where(known[..., None], value, math.nan), xp.where(known[..., None], error, 0.0)
    return {"logits": Evaluation(value, error)}


def moments(g: Any, m: Any, v: Any, constants: Any, *, numerics: Numerics) -> Evaluations:
    """Evaluate b1 m + a1 g and b2 v + a2 g^2 for constants [b1, a1, b2, a2]. The square of g is exact.

    A product below 2^-1022 may be replaced by 0. This is less than the error of a result that does not round to 0.
    """
    b1, a1, b2, a2 = (constants[i] for i in range(4))
    old, new, square = b1 * m, a1 * g, b2 * v + a2 * (g * g)
    return {
        "m": Evaluation(old + new, (abs(old) + abs(new)) * (5 * _UNIT)),
        "v": Evaluation(square, square * (5 * _UNIT)),
    }


def adamw(p: Any, m: Any, v: Any, constants: Any, *, numerics: Numerics) -> Evaluations:
    """Evaluate c p - a m / (sqrt(b v) + eps) for constants [c, a, b, eps]; a denominator of 0 is replaced by 1.

    eps is 0 or at least 2^-500. So is the denominator, and a product that underflows has no influence, as in `moments`.
    The quotient has six roundings, two of them under the square root or before it.
    """
    xp = backend_of(p).xp
    c, a, b, eps = (constants[i] for i in range(4))
    denominator = xp.sqrt(b * v) + eps
    step, kept = a * m / xp.where(denominator == 0, 1.0, denominator), c * p
    return {"p": Evaluation(kept - step, (abs(kept) + 2 * abs(step)) * (5 * _UNIT))}
