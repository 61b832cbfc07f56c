"""Each op in float64, with a bound on the error of each element. The bounds are rigorous: no term is neglected.

The arguments of an op are float64 arrays whose elements are float32 numbers: 0, infinities, NaN, or numbers of
magnitude 2^-126 to 2^128. Each function returns an `Evaluation`. Its value is the op's formula in float64 on the
arrays' own device; its error bounds the distance to the exact result. If all numbers within the error round to the same
float32 number, this number is the correctly rounded result.

The bounds rest on these assumptions. The four operations and the square root in float64 are correctly rounded. A matrix
product or a sum adds the products or terms in any order, with or without fused multiply-add. exp and log err by at most
the errors that the adapter states (`Numerics`). A number below 2^-1022 in magnitude may be replaced by 0. No axis is
longer than 2^30.

Notation: u = 2^-53 is the unit round-off. docs/numerics.md, "The same bits", has the proofs. The errors below are sums
of the relative errors of all steps, as if these errors were added. They are multiplied, in fact; the factor 1 + 2^-17
accounts for this, because each sum is at most 2^-20. Each bound also has 2u times a bound of the value, so that the
rounded sums value - error and value + error are below and above the exact result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..numerics import Numerics
from ..ops import check_eps, in_range, is_empty, score_scale, visible_keys
from ..registry import backend_of
from ..signature import check_axis

_UNIT = 2.0**-53 * (1 + 2.0**-17)
"""The unit round-off, with the factor that accounts for products of errors."""

_MOST = 2.0**-21
"""The largest relative error that the factor in `_UNIT` permits for a term that depends on the data."""

_SMALLEST = 2.0**-126
"""The smallest positive float32. A result that is smaller counts as if it were this large, in bounds of its error."""


class Evaluation(NamedTuple):
    """The float64 value of each element of an op's result, and a bound on its error.

    Parameters
    ----------
    value : float64 array
        The shape of the op's result.
    error : float64 array
        Its shape broadcasts to that of the value, and no element is NaN. The distance of the exact result to the value
        is at most the error. If the error is 0, the value is the exact result, which may be NaN. If the error is
        infinite, nothing is known about the exact result.
    """

    value: Any
    error: Any


def column_norms(w: Any) -> Any:
    """Return the Euclidean norms of the columns of a matrix [nx, nf] or [1, nx, nf]: a float64 array [nf].

    The relative error is below 2^-22, which the bounds account for. The norm is infinite if the column has NaN.

    Examples
    --------
    >>> import numpy as np
    >>> column_norms(np.asarray([[3.0, 0.0], [4.0, 1.0]]))
    array([5., 1.])
    """
    backend = backend_of(w)
    return _never_nan(backend.xp, backend.xp.reshape(_norms(backend.xp, w, axis=-2), (backend.shape(w)[-1],)))


def _norms(xp: Any, x: Any, axis: int) -> Any:
    """Return Euclidean norms along an axis, which stays with length 1. No square of a float32 number underflows."""
    return xp.sqrt(xp.sum(x * x, axis=axis, keepdims=True))


def _never_nan(xp: Any, bounds: Any) -> Any:
    """Replace NaN by inf, and make 0 positive, so that no product of two bounds is NaN."""
    return xp.where(bounds == bounds, bounds, math.inf) + _SMALLEST


def _float(xp: Any, n: Any) -> Any:
    """Return a length as a number that floats can be multiplied by; a length unknown while tracing is an array."""
    return n if isinstance(n, int) else xp.astype(n, xp.float64)


def _exp(numerics: Numerics, largest: float) -> float:
    """Return the error of exp(-x), 0 <= x <= largest, where x itself has the error u x: units of u.

    Raises
    ------
    ValueError
        If the stated error is so large that the product of two errors is not negligible.
    """
    c0, c1 = numerics.exp
    if c0 + 1024 * c1 > 2.0**20 or numerics.log > 2.0**20:
        raise ValueError(f"{numerics}: these errors are too large; correct rounding needs exp and log in float64")
    return c0 + (1 + c1) * largest


def conv1d(x: Any, w: Any, b: Any, *, w_norms: Any = None, numerics: Numerics) -> Evaluation:
    """Evaluate x w + b. The error is at most a u (|x| |w| + |b|), and |x| |w| at most the product of two norms.

    Products of float32 numbers are exact in float64, and no sum of them overflows or underflows. Each passes through a
    additions at most: see `_linear`. A result is not finite only if one of its arguments is not. It is exact then, but
    the error is infinite.

    Parameters
    ----------
    x : float64 array [*batch, nx]
        Zero or more leading axes.
    w : float64 array [nx, nf] or [1, nx, nf]
        The weight.
    b : float64 array [nf]
        The bias.
    w_norms : float64 array [nf], optional
        The result of ``column_norms(w)``.
    numerics : Numerics
        The errors that the backend states for float64; not needed here.

    Returns
    -------
    Evaluation
        The shape is [*batch, nf].

    Examples
    --------
    >>> import numpy as np
    >>> value, error = conv1d(np.ones((2, 3)), np.full((3, 1), 0.5), np.ones(1), numerics=Numerics())
    >>> value.tolist(), bool(np.all(error < 1e-14))
    ([[2.5], [2.5]], True)
    """
    backend = backend_of(x)
    xp = backend.xp
    w = xp.reshape(w, backend.shape(w)[-2:])
    return _linear(backend, x, w, column_norms(w) if w_norms is None else w_norms, b)


def unembed(x: Any, w: Any, *, w_norms: Any = None, numerics: Numerics) -> Evaluation:
    """Evaluate x w^T, with the error of `conv1d`.

    Parameters
    ----------
    x : float64 array [*batch, d]
        Zero or more leading axes.
    w : float64 array [vocab, d]
        The embedding matrix.
    w_norms : float64 array [vocab], optional
        The Euclidean norms of the rows of w: the result of ``column_norms`` of its transpose.
    numerics : Numerics
        The errors that the backend states for float64; not needed here.

    Returns
    -------
    Evaluation
        The shape is [*batch, vocab].

    Examples
    --------
    >>> import numpy as np
    >>> unembed(np.ones(2), np.asarray([[1.0, 0.0], [2.0, 3.0]]), numerics=Numerics()).value
    array([1., 5.])
    """
    backend = backend_of(x)
    transposed = backend.xp.matrix_transpose(w)
    return _linear(backend, x, transposed, column_norms(transposed) if w_norms is None else w_norms)


def _linear(backend: Any, x: Any, w: Any, w_norms: Any, b: Any = None) -> Evaluation:
    """Evaluate x w + b as a sum of products of at most `_TERMS` terms each, which have fewer roundings than one.

    A term passes through the additions in its product, those of the products, and that of the bias: at most min(n, 256)
    + ceil(n / 256) - 1 in all. A backend that compiles for each shape computes one product of n terms: XLA copies each
    part of w, and a row times a matrix then takes 4 to 30 times as long.
    """
    xp = backend.xp
    *start, n = backend.shape(x)
    rows = xp.reshape(x, (math.prod(start), n))
    terms = max(n, 1) if backend.compiles_per_shape else _TERMS
    value = 0.0
    for i in range(0, max(n, 1), terms):
        value = xp.matmul(rows[:, i : min(i + terms, n)], w[i : min(i + terms, n), :]) + value
    unit = (min(n, terms) + max(0, n - 1) // terms + 2) * _UNIT
    error = _never_nan(xp, _norms(xp, rows, axis=-1)) * unit * w_norms
    if b is not None:
        value, error = value + b, error + _never_nan(xp, abs(b)) * unit
    shape = (*start, backend.shape(w_norms)[0])
    return Evaluation(xp.reshape(value, shape), xp.reshape(error, shape))


def softmax(x: Any, *, axis: int = -1, numerics: Numerics) -> Evaluation:
    """Evaluate exp(x_j) / sum_k exp(x_k) along an axis of length n.

    Let d_j = max x - x_j, and g_j the result. The relative errors are (c0 + (1 + c1) d_j) u for each exponential, the
    mean of these with the weights g plus (n - 1) u for the sum, and u for the quotient. The mean of d_j is at most
    log(n) < 21. If g_j is at least 2^-127, then d_j is at most 89. The error of a smaller g_j is less than that of
    2^-126.

    Parameters
    ----------
    x : float64 array
        At least one axis.
    axis : int
        The axis that sums to 1.
    numerics : Numerics
        The errors that the backend states for float64.

    Returns
    -------
    Evaluation
        The shape of x. A row that has NaN or +inf, or only -inf, is NaN with the error 0.

    Examples
    --------
    >>> import numpy as np
    >>> value, error = softmax(np.asarray([0.0, 0.0, -np.inf]), numerics=Numerics())
    >>> value.tolist(), bool(np.all(error < 1e-13))
    ([0.5, 0.5, 0.0], True)
    """
    backend = backend_of(x)
    xp = backend.xp
    check_axis("softmax", axis, backend.shape(x))
    if is_empty(x):
        return Evaluation(x, x)
    e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    value = e / xp.sum(e, axis=axis, keepdims=True)
    unit = (_float(xp, backend.shape(x)[axis]) + 2 + _exp(numerics, 89) + _exp(numerics, 21)) * _UNIT
    return Evaluation(value, xp.where(value == value, (value + _SMALLEST) * unit, 0.0))


_TERMS = 256
"""The most terms of a matrix product. With fewer, the products would take longer than the elements that they decide."""

_A = -2 * math.sqrt(2 / math.pi)
_B = _A * 0.044715


def gelu(x: Any, *, numerics: Numerics) -> Evaluation:
    """Evaluate x / (1 + exp(-2 t)), t = sqrt(2/pi) (x + 0.044715 x^3), which equals x/2 (1 + tanh(t)).

    In this form nothing cancels. The argument of exp has a relative error of 4u: the square of x is exact; a rounded
    constant, two products and a sum remain. The result has two more roundings. If |y| is at least 2^-127, then |2 t| is
    at most 93 for negative x; for positive x, exp has less influence. If exp overflows, y is nearly 0.

    Parameters
    ----------
    x : float64 array
        Any shape.
    numerics : Numerics
        The errors that the backend states for float64.

    Returns
    -------
    Evaluation
        The shape of x. The results for inf, -inf and NaN have the error 0.

    Examples
    --------
    >>> import numpy as np
    >>> value, error = gelu(np.asarray([-1.0, 0.0, 1.0]), numerics=Numerics())
    >>> value.round(4), bool(np.all(error < 1e-13))
    (array([-0.1588,  0.    ,  0.8412]), True)
    """
    xp = backend_of(x).xp
    square = x * x
    value = x / (1 + xp.exp(x * (_A + _B * square)))
    error = (abs(value) + _SMALLEST) * ((3 * 93 + 4 + _exp(numerics, 93)) * _UNIT)
    return Evaluation(value, xp.where(square < math.inf, error, 0.0))


def layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5, numerics: Numerics) -> Evaluation:
    """Evaluate g (x - mean) / sqrt(variance + eps) + b over the n elements of a row.

    - The computed mean is m + e with |e| <= (n + 1) u mean |x|, and mean |x| <= |m| + sqrt(variance).
    - The computed deviations are (d_j - e) (1 + u). The mean square of d - e is variance + e^2, because the sum of d is
      0. So the computed r = sqrt(variance + eps) has a relative error of (n/2 + 4) u + (e / r)^2 / 2.
    - So N_j = d_j / r has the error e / r + |N_j| ((n/2 + 8) u + (e / r)^2 / 2). The 8 includes 3 for a quotient that
      is computed as the product with a rounded reciprocal.
    - The product with g and the sum add u (|g_j N_j| + |y_j|) <= u (2 |g_j N_j| + |b_j|).

    Parameters
    ----------
    x : float64 array [*batch, n]
        Zero or more leading axes.
    g, b : float64 array [n]
        Gain and bias.
    eps : float
        The number that is added to the variance.
    numerics : Numerics
        The errors that the backend states for float64; not needed here.

    Returns
    -------
    Evaluation
        The shape of x. A row with a non-finite element is NaN with the error 0. The error of a row is infinite if e / r
        may be larger than 2^-21.

    Examples
    --------
    >>> import numpy as np
    >>> value, error = layer_norm(np.asarray([1.0, 2.0, 3.0]), np.ones(3), np.zeros(3), numerics=Numerics())
    >>> value.round(4), bool(np.all(error < 1e-14))
    (array([-1.2247,  0.    ,  1.2247]), True)
    """
    check_eps(eps)
    if is_empty(x):
        return Evaluation(x, x)
    backend = backend_of(x)
    xp = backend.xp
    n = _float(xp, backend.shape(x)[-1])
    mean = xp.sum(x, axis=-1, keepdims=True) / n
    d = x - mean
    variance = xp.sum(d * d, axis=-1, keepdims=True) / n
    r = xp.sqrt(variance + eps)
    product = d / r * g
    shift = (n + 1) * _UNIT * (abs(mean) + xp.sqrt(variance)) / r
    factor = (n / 2 + 12) * _UNIT + shift * shift
    shift = xp.where(shift <= _MOST, shift * (1 + 2.0**-17), math.inf)
    error = abs(product) * factor + (abs(g) * shift + abs(b) * (3 * _UNIT))
    # Where the error is NaN, nothing is known, unless an element of the row is not finite. The row is NaN then.
    zero = mean - mean
    unknown = xp.where(zero == 0, math.inf, xp.astype(zero == 0, xp.float64))
    return Evaluation(product + b, xp.where(error == error, error, unknown))


def attention_scores(
    q: Any, k: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None, numerics: Numerics
) -> Evaluation:
    """Evaluate scale q k^T. The error is at most (d + 2) u |scale q| |k|, and |scale q| |k| a product of two norms.

    The 2 is for scale q and its products with k, which are not exact.

    Parameters
    ----------
    q : float64 array [*batch, queries, d]
        The queries.
    k : float64 array [*batch, keys, d]
        The keys.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key.
    causal : bool
        Whether a query sees only its own key and the keys before it.
    scale : float, optional
        The factor of the dot products; 1/sqrt(d) unless given.
    numerics : Numerics
        The errors that the backend states for float64; not needed here.

    Returns
    -------
    Evaluation
        The shape is [*batch, queries, keys]. A hidden score is -inf with the error 0.

    Examples
    --------
    >>> import numpy as np
    >>> attention_scores(np.ones((2, 4)), np.ones((2, 4)), causal=True, numerics=Numerics()).value
    array([[  2., -inf],
           [  2.,   2.]])
    """
    xp = backend_of(q).xp
    value, size_q, size_k, visible = _scores(q, k, mask, causal, scale)
    error = size_q * xp.matrix_transpose(size_k)
    # As in `_linear`, the error is NaN only where the result is NaN, because no norm of k is 0.
    error = xp.where(error == error, error, 0.0)
    return Evaluation(value, error if visible is None else xp.where(visible, error, 0.0))


def _scores(q: Any, k: Any, mask: Any, causal: bool, scale: float | None) -> tuple[Any, Any, Any, Any]:
    """Return scores, factors [queries, 1] and [keys, 1] whose product bounds their errors, and which keys are visible.

    The norms are increased by 2^-126, because scale q and its square may underflow. If the scores overflow, the bound
    is infinite.
    """
    backend = backend_of(q)
    xp = backend.xp
    q = q * score_scale(q, k, scale)
    scores = xp.matmul(q, xp.matrix_transpose(k))
    mask = visible_keys(q, k, mask, causal)
    if mask is not None:
        scores = xp.where(mask, scores, -math.inf)
    size_q, size_k = (_norms(xp, each, axis=-1) + _SMALLEST for each in (q, k))
    return scores, size_q * ((_float(xp, backend.shape(q)[-1]) + 4) * _UNIT), size_k, mask


def _shifted(q: Any, k: Any, mask: Any, causal: bool, scale: float | None) -> tuple[Any, Any, Any, Any]:
    """Return exp(score - maximum), its sum over the keys, a bound on the errors of a query's scores, and known NaN.

    The bound is infinite if it is so large that no weight is known. The last array is True for queries that have NaN.
    """
    xp = backend_of(q).xp
    scores, size_q, size_k, _ = _scores(q, k, mask, causal, scale)
    if is_empty(scores):  # an axis of length 0 has no maximum
        zeros = xp.sum(scores, axis=-1, keepdims=True)
        return scores, zeros, zeros, zeros != zeros
    e = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    error = size_q * xp.max(size_k, axis=-2, keepdims=True)
    is_nan = size_q != size_q
    return e, xp.sum(e, axis=-1, keepdims=True), xp.where(error <= _MOST, error, math.inf), is_nan


def _decided(xp: Any, error: Any, is_nan: Any) -> Any:
    """Replace NaN in an array of errors: by 0 in rows that are known to be NaN, and by inf in all others."""
    unknown = xp.where(is_nan, xp.astype(is_nan, xp.float64) - 1, math.inf)
    return xp.where(error == error, error, unknown)


def attention_weights(
    q: Any, k: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None, numerics: Numerics
) -> Evaluation:
    """Evaluate softmax(scale q k^T). The error is that of `softmax`, plus twice the error of a query's scores.

    Parameters
    ----------
    q, k, mask, causal, scale
        As for `attention_scores`.
    numerics : Numerics
        The errors that the backend states for float64.

    Returns
    -------
    Evaluation
        The shape is [*batch, queries, keys]. The value of a hidden key is 0.

    Examples
    --------
    >>> import numpy as np
    >>> attention_weights(np.ones((2, 4)), np.ones((2, 4)), causal=True, numerics=Numerics()).value
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    backend = backend_of(q)
    xp = backend.xp
    e, total, error, is_nan = _shifted(q, k, mask, causal, scale)
    value = e / total
    unit = 2 * error + (_float(xp, backend.shape(k)[-2]) + 2 + _exp(numerics, 89) + _exp(numerics, 21)) * _UNIT
    return Evaluation(value, _decided(xp, (value + _SMALLEST) * unit, is_nan))


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None, numerics: Numerics
) -> Evaluation:
    """Evaluate softmax(scale q k^T) v.

    Let s be the bound on the errors of a query's scores, w_j its weights, d_j the distances of its scores to their
    maximum, and n the number of keys. The errors are relative to the root mean square V of the values with the weights
    w, which a second product computes: sum_j w_j |v_j| <= V, because the weights have the sum 1.

    - The relative error of exp(-d_j) is s + (c0 + (1 + c1) d_j) u. By the inequality of Cauchy and Schwarz, sum_j w_j
      d_j |v_j| <= V sqrt(sum_j w_j d_j^2), and this root is at most log(n) + 1.2 < 22.
    - The sum of the exponentials has the mean of these errors, where the mean of d_j is at most log(n), plus (n - 1) u.
    - The product with v has n roundings, and the quotient one.

    Parameters
    ----------
    q, k, mask, causal, scale
        As for `attention_scores`.
    v : float64 array [*batch, keys, dv]
        The values.
    numerics : Numerics
        The errors that the backend states for float64.

    Returns
    -------
    Evaluation
        The shape is [*batch, queries, dv]. The error of a row is infinite if an element of its query, or of any key, is
        infinite, or if a key has NaN. The error of an element is infinite if any value of its column is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[1.0], [3.0]])
    >>> value, error = attention(np.ones((2, 4)), np.ones((2, 4)), v, causal=True, numerics=Numerics())
    >>> value.tolist(), bool(np.all(error < 1e-12))
    ([[1.0], [2.0]], True)
    """
    backend = backend_of(q)
    xp = backend.xp
    e, total, error, is_nan = _shifted(q, k, mask, causal, scale)
    unit = 2 * error + (2 * _float(xp, backend.shape(k)[-2]) + 2 + 2 * _exp(numerics, 22)) * _UNIT
    size = xp.sqrt(xp.matmul(e, v * v) / total)
    return Evaluation(xp.matmul(e, v) / total, _decided(xp, (size + _SMALLEST) * unit, is_nan))


def cross_entropy(logits: Any, targets: Any, *, numerics: Numerics) -> Evaluation:
    """Evaluate the mean over N rows of l = log(S) + d_t, S = sum_k exp(-d_k), d_k = max x - x_k.

    S has the relative error (c0 + (1 + c1) 21 + n - 1) u, as in `softmax`, and its logarithm this absolute error, plus
    c u log(S). The difference d_t has the error u d_t, and the sum u l. Neither log(S) nor d_t is negative, so these
    are at most (max(c, 1) + 1) u l. The mean over the rows adds (N + 1) u times the mean.

    Parameters
    ----------
    logits : float64 array [*batch, vocab]
        The logits.
    targets : int array [*batch]
        Ids from 0 to vocab - 1.
    numerics : Numerics
        The errors that the backend states for float64.

    Returns
    -------
    Evaluation
        The shape is []. If the result is NaN, the error is 0. If it is infinite, or the vocabulary has more than a
        million entries, for which no error of log is stated, the error is infinite.

    Examples
    --------
    >>> import numpy as np
    >>> value, error = cross_entropy(np.zeros((1, 4)), np.asarray([0]), numerics=Numerics())
    >>> bool(abs(value - np.log(4)) < error < 1e-14)
    True
    """
    backend = backend_of(logits)
    xp = backend.xp
    *start, n = backend.shape(logits)
    index, known = in_range("cross_entropy: targets", targets, n)
    d = xp.max(logits, axis=-1, keepdims=True) - logits
    loss = xp.log(xp.sum(xp.exp(-d), axis=-1)) + xp.take_along_axis(d, index[..., None], axis=-1)[..., 0]
    if known is not None:
        loss = xp.where(known, loss, math.nan)
    n_rows, n = _float(xp, math.prod(start)), _float(xp, n)
    value = xp.sum(loss) / n_rows
    error = ((n_rows + 4 + max(numerics.log, 1)) * value + (n + _exp(numerics, 21))) * _UNIT
    error = xp.where(value == value, error, 0.0)
    return Evaluation(value, error if isinstance(n, int) and n <= 1_000_000 else error + math.inf)
