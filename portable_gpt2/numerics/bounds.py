"""The exact result of each op, and a bound on the rounding error of each element. The bounds are derived, not tuned.

Each function takes the NumPy arguments of an op and returns a `Bounded`: the exact value and, for each element, the
largest error that a correct implementation can have. The floating-point arguments of a call have one dtype: float32,
float64, float16, or the bfloat16 of ml_dtypes. The exact value is computed in float64 for arguments of float32,
bfloat16 or float16. For arguments of float64 it is enclosed by balls of 200 bits, which are elements of type
``flint.arb``. Its own error is less than 1e-5 times the bound. The bound is infinite where an intermediate result may
overflow, because no accuracy is promised there.

Only the bounds for float64 need python-flint. Without it, each of them raises an ImportError.

The errors of exp, tanh and log are those that an adapter states (`Numerics`): (c0 + c1 |x|) u is that of exp(x).

Notation: u is the unit round-off. s is the smallest normal number, which bounds the error of flushing a subnormal
number to zero. gamma(k) = ku / (1 - ku) bounds the relative error of k successive roundings (Higham, "Accuracy and
Stability of Numerical Algorithms", 2002, lemma 3.1). "To first order" means that products of two errors are neglected;
they are below 1e-4 times the bound. A result that is stored in 16 bits is computed in float32 and rounded once: see
`stored`.

Every bound holds for any order of summation, and with or without fused multiply-add. docs/numerics.md explains the
bounds and their assumptions, and lists the largest errors that were measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from .errors import Numerics

__all__ = [
    "FORMATS",
    "Bounded",
    "Format",
    "add",
    "attention",
    "attention_scores",
    "attention_weights",
    "computed_in",
    "cross_entropy",
    "distance",
    "exact",
    "exponential",
    "gamma",
    "gamma_at_random",
    "gamma_probable",
    "gelu",
    "host_dtype",
    "hyperbolic_tangent",
    "layer_norm",
    "linear",
    "linear_at_random",
    "logarithm",
    "quotient",
    "softmax",
    "stored",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.cache
def _flint() -> Any:
    try:
        import flint
    except ImportError:
        raise ImportError("the bounds for float64 need python-flint: pip install 'portable-gpt2[testing]'") from None
    return flint


def _in_200_bits(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function of arrays compute with balls of 200 bits if its first argument is an array of float64."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: Any = next(iter((*args, *kwargs.values())))
        if first.dtype != np.float64:
            return function(*args, **kwargs)
        context = _flint().ctx
        before, context.prec = context.prec, 200
        try:
            return function(*args, **kwargs)
        finally:
            context.prec = before

    return call


class Format(NamedTuple):
    """A floating-point format.

    Parameters
    ----------
    unit : float
        The unit round-off u.
    smallest : float
        The smallest normal number.
    largest : float
        The largest number.

    Examples
    --------
    >>> FORMATS["float16"]
    Format(unit=0.00048828125, smallest=6.103515625e-05, largest=65504.0)
    """

    unit: float
    smallest: float
    largest: float


FORMATS = {
    "float64": Format(2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max)),
    "float32": Format(2.0**-24, 2.0**-126, float(np.finfo(np.float32).max)),
    "bfloat16": Format(2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "float16": Format(2.0**-11, 2.0**-14, float(np.finfo(np.float16).max)),
}


class Bounded(NamedTuple):
    """An exact value and, for each element, a bound on the error of computing it.

    Parameters
    ----------
    value : array
        The exact value: float64, or balls (dtype object) for arguments of float64.
    error : float64 array
        The bound, of the same shape. It is infinite where no accuracy is promised.

    Examples
    --------
    >>> bounded = Bounded(np.asarray([1.0, 2.0]), np.asarray([0.5, np.inf]))
    >>> bounded.ratio(np.asarray([1.25, 3.0], np.float32))
    0.5
    """

    value: np.ndarray
    error: np.ndarray

    def ratio(self, computed: np.ndarray) -> float:
        """Return the largest ratio of the error of a computed array to the bound; 0 for an empty array."""
        assert computed.shape == self.error.shape, f"shape {computed.shape}, expected {self.error.shape}"
        return float(np.max(quotient(distance(computed, self.value), self.error), initial=0))


def computed_in(dtype: str) -> str:
    """Return the dtype that an op computes in, which is float32 for the 16-bit dtypes.

    Examples
    --------
    >>> computed_in("bfloat16")
    'float32'
    """
    return "float64" if dtype == "float64" else "float32"


def host_dtype(dtype: str) -> np.dtype:
    """Return the NumPy dtype of a name; bfloat16 is that of ml_dtypes.

    Examples
    --------
    >>> host_dtype("bfloat16").itemsize
    2
    """
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def exact(a: np.ndarray) -> np.ndarray:
    """Return an array in a higher precision: as balls (``flint.arb``) for float64, and as float64 for other dtypes.

    Examples
    --------
    >>> exact(np.asarray([0.5], np.float32)).dtype
    dtype('float64')
    """
    wide: np.ndarray = _each(_flint().arb, a) if a.dtype == np.float64 else a.astype(np.float64)
    return wide


@_in_200_bits
def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |a - b| as float64, where b is a result of `exact`. It is 0 for equal infinities, and inf where a is NaN.

    Examples
    --------
    >>> distance(np.asarray([1, np.nan, -np.inf], np.float32), np.asarray([0.75, 1.0, -np.inf]))
    array([0.25,  inf, 0.  ])
    """
    with np.errstate(invalid="ignore"):
        a = exact(a)
        found: np.ndarray = np.where(a == b, 0.0, np.nan_to_num(_float(abs(a - b)), nan=np.inf))
        return found


def quotient(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Return error / bound. It is 0 where the error is 0 or the bound is infinite.

    Examples
    --------
    >>> quotient(np.asarray([1.0, 0.0, 1.0]), np.asarray([2.0, 0.0, np.inf]))
    array([0.5, 0. , 0. ])
    """
    judged = (error > 0) & (bound < np.inf)
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.divide(error, bound, out=np.zeros(np.shape(error)), where=judged)
        return found


def _each(f: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """Apply a function to each element."""
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.asarray(np.frompyfunc(f, len(arrays), 1)(*arrays), dtype=object)
        return found


def _float(a: Any) -> np.ndarray:
    return np.asarray(a).astype(np.float64, copy=False)


def _exp(x: np.ndarray) -> np.ndarray:
    return _each(lambda each: _flint().arb(each).exp(), x) if x.dtype == object else np.exp(x)


@_in_200_bits
def exponential(a: np.ndarray) -> np.ndarray:
    """Return exp in the precision of `exact`.

    Examples
    --------
    >>> exponential(np.ones(1, np.float32)).dtype
    dtype('float64')
    """
    return _exp(exact(a))


@_in_200_bits
def hyperbolic_tangent(a: np.ndarray) -> np.ndarray:
    """Return tanh in the precision of `exact`.

    Examples
    --------
    >>> hyperbolic_tangent(np.ones(1, np.float32)).dtype
    dtype('float64')
    """
    return _each(_flint().arb.tanh, exact(a)) if a.dtype == np.float64 else np.tanh(exact(a))


@_in_200_bits
def logarithm(a: np.ndarray) -> np.ndarray:
    """Return log in the precision of `exact`.

    Examples
    --------
    >>> logarithm(np.ones(1, np.float32)).dtype
    dtype('float64')
    """
    return _log(exact(a))


def _log(x: np.ndarray) -> np.ndarray:
    return _each(_flint().arb.log, x) if x.dtype == object else np.log(x)


def _sqrt(x: np.ndarray) -> np.ndarray:
    return _each(_flint().arb.sqrt, x) if x.dtype == object else np.sqrt(x)


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a b in the precision of `exact`. The leading axes of b are those of a, or there are none."""
    if a.dtype != object:
        product: np.ndarray = np.matmul(a, b)
        return product
    if b.ndim == 2 and a.ndim != 2:
        rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
        return _matmul(rows, b).reshape((*a.shape[:-1], b.shape[-1]))
    found: np.ndarray = np.empty((*a.shape[:-1], b.shape[-1]), object)
    matrix = _flint().arb_mat
    for i in np.ndindex(a.shape[:-2]):
        left, right = (matrix(*x[i].shape, x[i].ravel().tolist()) for x in (a, b))
        found[i] = np.fromiter((left * right).entries(), object, found[i].size).reshape(found[i].shape)
    return found


def _weighted(weights: Any, x: Any) -> Any:
    """Multiply weights by x, which may be infinite where a weight is 0; the product is then 0."""
    with np.errstate(over="ignore"):
        return weights * np.minimum(x, 1e300)


def gamma(k: int, u: float) -> float:
    """Return k u / (1 - k u), the bound on the relative error of k successive roundings in the worst case.

    Examples
    --------
    >>> gamma(3, 2.0**-24) / 2.0**-24 > 3
    True
    """
    return k * u / (1 - k * u)


def gamma_at_random(k: int, u: float) -> float:
    """Return 4 sqrt(k) u, a bound on the relative error of k successive roundings with random signs.

    The sum of k independent errors of mean 0 and magnitude at most u has a standard deviation of at most sqrt(k) u. A
    normal variable exceeds 4 standard deviations once in 16,000 times. For errors that are uniform between -u and u, 4
    sqrt(k) u is 6.9 standard deviations. This bound is only for fixed inputs of mean 0, because the roundings of
    constant inputs all have the same sign.

    Examples
    --------
    >>> gamma_at_random(100, 2.0**-24) == 40 * 2.0**-24
    True
    """
    return 4.0 * math.sqrt(k) * u


def gamma_probable(k: int, u: float) -> float:
    """Return the smaller of `gamma` and 8 sqrt(k) u, a bound on k successive roundings that holds in practice.

    If the relative errors of the roundings are independent and have mean 0, the product of k factors 1 + delta differs
    from 1 by at most 8 sqrt(k) u, to first order, with a probability of at least 1 - 2 exp(-32) = 1 - 3e-14 (Higham
    and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4).
    Nothing is assumed about the numbers that are added. That roundings are independent is a model. It is wrong for sums
    of many equal numbers.

    Examples
    --------
    >>> gamma_probable(10, 2.0**-24) == gamma(10, 2.0**-24)
    True
    >>> gamma_probable(10000, 2.0**-24) == 800 * 2.0**-24
    True
    """
    return min(gamma(k, u), 8.0 * math.sqrt(k) * u)


_UNDERFLOW = {"bfloat16": FORMATS["bfloat16"].smallest, "float16": 2.0**-25}
"""The largest absolute error of rounding a small float32 number to 16 bits (see `stored`)."""


def stored(value: np.ndarray, error: np.ndarray, dtype: str) -> Bounded:
    """Return the bound after a computed result was rounded to the dtype that it is stored in.

    The computed y^ satisfies |y^ - y| <= B. It is stored as fl(y^), with |fl(y^) - y^| <= u |y^| <= u (|y| + B). The
    total error is therefore at most u |y| + (1 + u) B. bfloat16 has the exponents of float32, so its subnormal numbers
    may be flushed. The subnormal numbers of float16 are normal in float32, and the conversion rounds them to nearest,
    which adds half of the smallest one, 2^-25.

    Parameters
    ----------
    value : array
        The exact value, as in `Bounded`.
    error : float array
        The bound of the error of the computed result, before it is stored.
    dtype : str
        The dtype that the result is stored in.

    Returns
    -------
    Bounded
        The bound is infinite where the result may overflow.

    Examples
    --------
    >>> stored(np.asarray([1.0]), np.asarray([0.0]), "bfloat16").error == 2.0**-8 + FORMATS["bfloat16"].smallest
    array([ True])
    """
    if dtype not in ("float64", "float32"):
        u = FORMATS[dtype].unit
        error = u * abs(value) + (1 + u) * error + _UNDERFLOW[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        overflows = ~(abs(_float(value)) + error <= FORMATS[dtype].largest)
    return Bounded(np.asarray(value), np.where(overflows, np.inf, error))


@_in_200_bits
def softmax(x: np.ndarray, *, axis: int = -1, numerics: Numerics) -> Bounded:
    """Bound each element of softmax, computed by subtracting the maximum and dividing by the sum.

    Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal.
    41(4), 2021. With m = max x and d_j = |x_j - m|, to first order:

    - x_j - m has a relative error of u, so its exp has a relative error of u d_j, plus u (c0 + c1 d_j) for exp itself;
    - the sum has the weighted mean of these relative errors, plus (n - 1) u for its additions;
    - the division adds u. The total is

          u g_j ((1 + c1) (d_j + sum_k g_k d_k) + n + 2 c0) + 4s,

    where 4s is for subnormal inputs, exponentials and results. There is no bound for a row that contains NaN or +inf,
    or only -inf.

    Parameters
    ----------
    x : float array
        At least one axis.
    axis : int
        The axis that sums to 1.
    numerics : Numerics
        The errors of exp, tanh and log that the backend states (`portable_gpt2.numerics.stated`).

    Returns
    -------
    Bounded
        The shape of x.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> x = np.asarray([1.0, 2.0, 3.0], np.float32)
    >>> softmax(x, numerics=Numerics()).ratio(pg.softmax(x)) < 1
    True
    >>> softmax(x, numerics=Numerics()).error / 2.0**-24 < 11  # in units of u
    array([ True,  True,  True])
    """
    dtype = x.dtype.name
    u, s, _ = FORMATS[computed_in(dtype)]
    c0, c1 = numerics.exp
    if not x.size:
        return stored(exact(x), np.zeros(x.shape), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        a = exact(x)
        m = a.max(axis=axis, keepdims=True)
        defined = np.isfinite(_float(m))
        d = np.where(defined, m - a, 0)
        e = _exp(-d)
        g = e / e.sum(axis=axis, keepdims=True)
        weights, d = _float(g), _float(d)
        mean = _weighted(weights, d).sum(axis=axis, keepdims=True)
        terms = (1 + c1) * (d + mean) + x.shape[axis] + 2 * c0
        error = np.where(defined, u * _weighted(weights, terms) + 4 * s, np.inf)
    return stored(g, error, dtype)


@_in_200_bits
def linear(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    *,
    gamma: Callable[[int, float], float] = gamma,
) -> Bounded:
    """Bound y = x w + b, where each element is a sum of K products.

    Each product x_k w_k passes through at most K + 1 roundings: its own, those of K - 1 additions, and that of adding
    the bias (Higham, 2002, section 3.1). Without a bias, there are K. So with A = |x| |w| + |b|, the error is at most
    gamma(K + 1) A. Flushing x_k adds an error of s |w_k|, and flushing w_k adds s |x_k|. Flushing a term, a partial sum
    or the result adds s, at most K + 2 times.

    For the 16-bit dtypes, the product is computed in float32 and may be rounded to 16 bits before the bias is added in
    float32. The result is rounded to 16 bits.

    Parameters
    ----------
    x : float array [*batch, K]
        Zero or more leading axes.
    w : float array [K, columns] or [1, K, columns]
        The weight.
    b : float array [columns], optional
        The bias.
    gamma : function
        The bound on k successive roundings, as a function of k and u: `gamma`, or `gamma_probable`.

    Returns
    -------
    Bounded
        The shape is [*batch, columns].

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> x, w, b = np.ones((2, 3), np.float32), np.full((3, 4), 0.1, np.float32), np.zeros(4, np.float32)
    >>> linear(x, w, b).ratio(pg.conv1d(x, w, b)) < 1
    True
    """
    dtype = x.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    w = w.reshape(w.shape[-2:])
    K = x.shape[-1]
    wide_x, wide_w = exact(x), exact(w)
    value = product = _matmul(wide_x, wide_w)
    absolute_x, absolute_w = _float(abs(wide_x)), _float(abs(wide_w))
    with np.errstate(over="ignore", invalid="ignore"):
        A = absolute_x @ absolute_w
        if b is not None:
            value = value + exact(b)
            A = A + _float(abs(exact(b)))
        g = gamma(K if b is None else K + 1, u)
        flushed = s * (absolute_x.sum(axis=-1)[..., None] + absolute_w.sum(axis=0) + K + 2)
        error = np.where((1 + g) * A <= largest, g * A + flushed, np.inf)
    if b is not None and dtype not in ("float64", "float32"):
        error = (1 + u) * stored(product, error, dtype).error
    return stored(value, error, dtype)


def linear_at_random(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> Bounded:
    """Bound y = x w + b for fixed random inputs of mean 0: 4 sqrt(K + 1) u Q.

    Let the K products and b be independent, with mean 0, and let Q^2 be the sum of their squares. A partial sum has a
    mean square of at most Q^2, so its rounding error has a variance of at most u^2 Q^2. The K partial sums and the
    products, which together add u^2 Q^2, have a variance of at most (K + 1) u^2 Q^2. `gamma_at_random` explains the
    factor 4. Q is a 2-norm, and is smaller than the 1-norm A of `linear` by a factor of about sqrt(K). So this bound is
    stricter than 4 sqrt(K + 1) u A.

    Parameters
    ----------
    x, w, b
        As for `linear`; random numbers of mean 0.

    Returns
    -------
    Bounded
        The shape is [*batch, columns].

    Examples
    --------
    >>> x, w, b = (np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) for shape in ((8, 768), (768, 2), 2))
    >>> bool(np.median(linear(x, w, b).error / linear_at_random(x, w, b).error) > 100)  # the worst case is far away
    True
    """
    unit = FORMATS[computed_in(x.dtype.name)].unit
    squares = [a.astype(np.float64) ** 2 for a in (x, w, b)]
    Q = np.sqrt(squares[0] @ squares[1] + squares[2])
    return stored(linear(x, w, b).value, gamma_at_random(x.shape[-1] + 1, unit) * Q, x.dtype.name)


@_in_200_bits
def add(a: np.ndarray, b: np.ndarray) -> Bounded:
    """Bound y = a + b, which has one rounding: u |y|, plus 3s for flushing a, b or y.

    Parameters
    ----------
    a, b : float array
        Arrays of the same shape.

    Returns
    -------
    Bounded
        The shape of a.

    Examples
    --------
    >>> a, b = np.asarray([1.0, 2.0], np.float32), np.asarray([0.1, 0.2], np.float32)
    >>> add(a, b).ratio(a + b) <= 1
    True
    """
    dtype = a.dtype.name
    u, s, _ = FORMATS[computed_in(dtype)]
    y = exact(a) + exact(b)
    with np.errstate(invalid="ignore"):
        return stored(y, u * _float(abs(y)) + 3 * s, dtype)


@_in_200_bits
def gelu(x: np.ndarray, *, numerics: Numerics) -> Bounded:
    """Bound y = x/2 (1 + tanh(z)), z = z1 + z3, z1 = sqrt(2/pi) x, z3 = sqrt(2/pi) 0.044715 x^3.

    To first order, the error of each step is multiplied by the derivative of y with respect to the result of that step:

    - z1 and z3 have the same sign, so nothing cancels. z1 is affected by three roundings (of the sum, the constant and
      its product), and z3 by these and four more (of its constant and three products): e_z = u (3 |z1| + 7 |z3|).
    - tanh multiplies e_z by its derivative, 1 - tanh(z)^2, and adds its own error, c u |tanh(z)|.
    - the sum 1 + tanh(z) and the product with x/2 have one rounding each, relative to the result. The total is

          |x|/2 (e_z (1 - tanh(z)^2) + c u |tanh(z)| + 2 u (1 + tanh(z))) + 4s.

    For negative x, the second term may be larger than y, because 1 + tanh(z) cancels. This cancellation is inherent in
    this form of GELU. Where x^3 overflows, tanh is exactly 1 or -1, and the bound still holds. The 4s is for flushing x
    (the derivative is less than 1.13), z, tanh(z) where x is small, and y.

    Parameters
    ----------
    x : float array
        Any shape.
    numerics : Numerics
        The errors of exp, tanh and log that the backend states (`portable_gpt2.numerics.stated`).

    Returns
    -------
    Bounded
        The shape of x.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> x = np.linspace(-3, 3, 7, dtype=np.float32)
    >>> gelu(x, numerics=Numerics()).ratio(pg.gelu(x)) < 1
    True
    """
    dtype = x.dtype.name
    u, s, _ = FORMATS[computed_in(dtype)]
    a = exact(x.reshape(-1))
    root = (2 / _flint().arb.pi()).sqrt() if a.dtype == object else np.sqrt(2 / np.pi)
    z1, z3 = root * a, root * a * a * a * 44715 / 10**6
    q = _exp(-2 * abs(z1 + z3))  # (1 - q) / (1 + q) is |tanh(z)|
    half = np.where(a < 0, a * q, a) / (1 + q)  # x/2 (1 + tanh(z)) without cancellation
    derivative, tanh = _float(4 * q / (1 + q) ** 2), _float((1 - q) / (1 + q))
    with np.errstate(over="ignore"):
        size = _float(abs(a)) / 2
        e_z = 3 * _float(abs(z1)) + 7 * _float(abs(z3))
        error = u * size * (_weighted(derivative, e_z) + numerics.tanh * tanh) + 2 * u * _float(abs(half)) + 4 * s
    return stored(half.reshape(x.shape), error.reshape(x.shape), dtype)


@_in_200_bits
def layer_norm(
    x: np.ndarray,
    g: np.ndarray,
    b: np.ndarray,
    *,
    eps: float | np.ndarray = 1e-5,
    gamma: Callable[[int, float], float] = gamma,
) -> Bounded:
    """Bound y = g N + b, N = d / r, d = x - mean(x), r = sqrt(mean(d^2) + eps), computed in two passes.

    Let n be the length, M = mean |x| and V = mean(d^2).

    - The mean has n - 1 additions and a division (or one more rounding, if it is a product with a rounded 1/n). Its
      error is at most e = gamma(n + 1) M. The error of a deviation is at most D_j = e + u (|d_j| + e) + 4s: the error
      of the mean, its own rounding, and 4s for flushing x, the mean or d. The root mean square of the D_j is at most D
      = (1 + u) e + u sqrt(V) + 4s.
    - r is the Euclidean norm of the vector (d_1, ..., d_n, sqrt(n eps)) / sqrt(n). By the triangle inequality, r
      changes by at most D when the d_j change by D_j. The radicand has n + 4 roundings: squares (1), additions (n - 1),
      the division (2), the sum with eps (1), and eps itself (1). All its terms are positive, so its relative error is
      at most gamma(n + 4). The root halves this error and adds u: p = gamma(n + 4) / 2 + u. A flushed square adds s /
      r. So the error of r is at most R = D + p (r + D) + s / r.
    - d'/r' - d/r = (d' - d)/r' - (d/r) (r' - r)/r', so the error of N_j is at most (D_j + |N_j| R) / (r - R), plus a
      relative error of 2u for the quotient (or for a product with a rounded 1/r').
    - The product and the sum of g N + b add one rounding each. With E_j the error of N_j, the total is, to first order,

          |g_j| E_j + u (|g_j N_j| + |y_j|) + s (|g_j| + |N_j| + 3).

    The bound is infinite where R >= r: there the deviations are smaller than the error of the mean, and no digit of y
    is correct.

    Parameters
    ----------
    x : float array [*batch, n]
        Zero or more leading axes.
    g, b : float array [n]
        Gain and bias.
    eps : float or array
        The number that is added to the variance, or an array [*batch, 1] with a number for each row.
    gamma : function
        The bound on k successive roundings, as a function of k and u: `gamma`, `gamma_probable`, or `gamma_at_random`
        for fixed random inputs.

    Returns
    -------
    Bounded
        The shape of x.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> x, g, b = np.asarray([1, 2, 4], np.float32), np.ones(3, np.float32), np.zeros(3, np.float32)
    >>> layer_norm(x, g, b).ratio(pg.layer_norm(x, g, b)) < 1
    True
    """
    dtype = x.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    n = x.shape[-1]
    if not x.size:
        return stored(exact(x), np.zeros(x.shape), dtype)
    a = exact(x)
    d = a - a.sum(axis=-1, keepdims=True) / n
    variance = (d * d).sum(axis=-1, keepdims=True) / n
    r = _sqrt(variance + eps)
    N = d / r
    y = exact(g) * N + exact(b)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        size, sums = _float(abs(d)), _float(abs(a)).sum(axis=-1, keepdims=True)
        V, r, N, g, b = _float(variance), _float(r), _float(abs(N)), _float(abs(exact(g))), _float(abs(exact(b)))
        e = gamma(n + 1, u) * sums / n
        D_j = e + u * (size + e) + 4 * s
        D = (1 + u) * e + u * np.sqrt(V) + 4 * s
        p = gamma(n + 4, u) / 2 + u
        R = D + p * (r + D) + s / r
        E = (D_j + N * R) / (r - R)
        E += 2 * u * (N + E)
        error = g * E + u * (g * N + _float(abs(y))) + s * (g + N + 3)
        in_range = ((size + D_j) ** 2).sum(axis=-1, keepdims=True) * (1 + 2 * n * u) <= largest
        in_range = in_range & (sums * (1 + 2 * n * u) <= largest) & (r > R)
        in_range = in_range & (g * (N + E) + b <= largest / 2)
        error = np.where(in_range, error, np.inf)
    return stored(y, error, dtype)


@_in_200_bits
def attention_scores(
    q: np.ndarray,
    k: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Bounded:
    """Bound S = scale q k^T. A hidden score is -inf exactly.

    A score is a sum of d products, as in `linear` without a bias, times a rounded scale. The scale adds two roundings,
    or four if q and k are each multiplied by a rounded square root of it. So with A = |scale| |q| |k|^T, the error of a
    score is at most gamma(d + 4) A + s (|scale| (sum |q| + sum |k| + d) + 3). There is a bound only if max(1, |scale|)
    |q| |k|^T is below a quarter of the largest number.

    Parameters
    ----------
    q, k, mask, causal, scale
        As for `attention`.

    Returns
    -------
    Bounded
        The shape is [*batch, queries, keys].

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> q, k = (np.random.default_rng(i).normal(0, 1, (2, 4)).astype(np.float32) for i in range(2))
    >>> attention_scores(q, k, causal=True).ratio(pg.attention_scores(q, k, causal=True)) < 1
    True
    """
    dtype = q.dtype.name
    largest = FORMATS[computed_in(dtype)].largest
    scores, seen, products, f, scale = _scores(q, k, mask, causal, scale)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.where(max(1, abs(scale)) * products <= largest / 4, f, np.inf)
    found = stored(scores, error, dtype)
    return Bounded(np.where(seen, found.value, -np.inf), np.where(seen, found.error, 0))


def _scores(
    q: np.ndarray, k: np.ndarray, mask: np.ndarray | None, causal: bool, scale: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Return the exact scores, which of them are seen, |q| |k|^T, the error of a score, and the scale."""
    u, s, _ = FORMATS[computed_in(q.dtype.name)]
    d, n = q.shape[-1], k.shape[-2]
    scale = max(d, 1) ** -0.5 if scale is None else scale
    a, b = exact(q), exact(k)
    scores = _matmul(a, np.swapaxes(b, -1, -2)) * scale
    seen = np.broadcast_to(True if mask is None else mask, scores.shape)
    if causal:
        seen = seen & np.tri(q.shape[-2], n, n - q.shape[-2], dtype=np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        size_q, size_k = _float(abs(a)), _float(abs(b))
        products = size_q @ np.swapaxes(size_k, -1, -2)
        sums = size_q.sum(axis=-1)[..., :, None] + size_k.sum(axis=-1)[..., None, :]
        f = gamma(d + 4, u) * abs(scale) * products + s * (abs(scale) * (sums + d) + 3)
    return scores, seen, products, f, scale


@_in_200_bits
def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    numerics: Numerics,
    rounds_weights: bool = True,
) -> Bounded:
    """Bound y = w v, w = softmax(S) over the n keys, S = scale q k^T.

    - The error of a score is at most f, the bound of `attention_scores`.
    - If the scores change by at most f_j, then the weight w_j = exp(S_j) / sum_k exp(S_k) changes by a factor of at
      most exp(f_j + L), with L = log(sum_k w_k exp(f_k)).
    - The softmax of the changed scores has the relative error t of `softmax`. The distance of S_j to the maximum is at
      most d_j + f_j + max f. The sum of w_k d_k is the entropy of w plus log(max w), which is at most log(n). So t = u
      ((1 + c1) (d_j + f_j + max f + log(n)) + n + 2 c0). A fused kernel divides after the product with v, and has the
      same number of roundings.
    - So the error of a weight is at most W_j = w_j (exp(f_j + L + t) - 1) + 4s. It is also at most max(w_j, 1 - w_j) +
      (n + 2) u + 4s, because computed weights are between 0 and 1, up to rounding. A masked weight is exactly 0,
      because exp underflows.
    - The product with v has n roundings, and one more if the division comes last. The total is

          sum_j W_j |v_j| + gamma(n + 1) sum_j (w_j + W_j) |v_j| + s (n + 3).

    There is a bound only if all scores, including masked ones, are below a quarter of the largest number, and sum |v|
    is below half of the largest number.

    Parameters
    ----------
    q : float array [*batch, queries, d]
        The queries.
    k : float array [*batch, keys, d]
        The keys.
    v : float array [*batch, keys, dv]
        The values.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key; its leading axes broadcast. Every query must see at least one key.
    causal : bool
        Whether a query sees only its own key and the keys before it, as for `portable_gpt2.attention`.
    scale : float, optional
        The factor of the dot products; 1/sqrt(d) unless given.
    numerics : Numerics
        The errors of exp, tanh and log that the backend states (`portable_gpt2.numerics.stated`).
    rounds_weights : bool
        Whether the weights may be rounded to 16 bits before they are multiplied by 16-bit values.

    Returns
    -------
    Bounded
        The shape is [*batch, queries, dv].

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> q, k, v = (np.random.default_rng(i).normal(0, 1, (2, 4)).astype(np.float32) for i in range(3))
    >>> attention(q, k, v, causal=True, numerics=Numerics(exp=(3.6, 0.0))).ratio(pg.attention(q, k, v, causal=True)) < 1
    True
    """
    dtype = q.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    n, values = k.shape[-2], exact(v)
    weights, W, in_range, seen = _weights(q, k, mask, causal, scale, numerics)
    y = _matmul(weights, values)
    if not weights.size or not v.size:
        return stored(y, np.zeros(y.shape), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        size_v, w = _float(abs(values)), _float(weights)
        if dtype in _UNDERFLOW and rounds_weights:
            W = np.where(seen, W + FORMATS[dtype].unit * (w + W) + _UNDERFLOW[dtype], 0)
        error = W @ size_v + gamma(n + 1, u) * ((w + W) @ size_v) + s * (n + 3)
        in_range = in_range & (size_v.sum(axis=-2, keepdims=True) <= largest / 2)
        error = np.where(in_range, error, np.inf)
    return stored(y, error, dtype)


@_in_200_bits
def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    numerics: Numerics,
) -> Bounded:
    """Bound w = softmax(scale q k^T) over the n keys by W, which `attention` derives. A hidden weight is 0 exactly.

    Parameters
    ----------
    q, k, mask, causal, scale, numerics
        As for `attention`.

    Returns
    -------
    Bounded
        The shape is [*batch, queries, keys].

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> q, k = (np.random.default_rng(i).normal(0, 1, (2, 4)).astype(np.float32) for i in range(2))
    >>> expected = attention_weights(q, k, causal=True, numerics=Numerics(exp=(3.6, 0.0)))
    >>> expected.ratio(pg.attention_weights(q, k, causal=True)) < 1
    True
    """
    weights, W, in_range, seen = _weights(q, k, mask, causal, scale, numerics)
    found = stored(weights, np.where(in_range, W, np.inf), q.dtype.name)
    return Bounded(found.value, np.where(seen | ~in_range, found.error, 0))


def _weights(
    q: np.ndarray, k: np.ndarray, mask: np.ndarray | None, causal: bool, scale: float | None, numerics: Numerics
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the exact weights, their errors W, whether W holds for a query, and which keys are seen."""
    u, s, largest = FORMATS[computed_in(q.dtype.name)]
    c0, c1 = numerics.exp
    n = k.shape[-2]
    scores, seen, products, f, scale = _scores(q, k, mask, causal, scale)
    if not scores.size:
        return scores, np.zeros(scores.shape), np.ones((*scores.shape[:-1], 1), np.bool_), seen
    lowest = scores.min()
    distances = np.where(seen, scores, lowest).max(axis=-1, keepdims=True) - scores
    e = np.where(seen, _exp(-np.where(seen, distances, 0)), 0 * lowest)
    weights = np.where(seen, e / e.sum(axis=-1, keepdims=True), 0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        f = np.where(seen, f, 0)
        w, distances = _float(weights), np.where(seen, _float(distances), 0)
        log_w = np.where(seen, -distances - np.log(_float(e).sum(axis=-1, keepdims=True)), -np.inf)
        top = (log_w + f).max(axis=-1, keepdims=True)
        L = np.where(
            f.max(axis=-1, keepdims=True) < 1,
            np.log1p((w * np.expm1(np.minimum(f, 1))).sum(axis=-1, keepdims=True)),  # log(1 + x) is x for tiny x
            top + np.log(np.exp(log_w + f - top).sum(axis=-1, keepdims=True)),
        )
        t = u * ((1 + c1) * (distances + f + f.max(axis=-1, keepdims=True) + np.log(n)) + n + 2 * c0)
        exponent = f + L + t
        W = np.where(exponent < 1, w * np.expm1(np.minimum(exponent, 1)), np.exp(log_w + exponent) - w)
        W = np.where(seen, np.minimum(W, np.maximum(w, 1 - w) + (n + 2) * u) + 4 * s, 0)
        in_range = max(1, abs(scale)) * products.max(axis=-1, keepdims=True) <= largest / 4
    return weights, W, in_range, seen


@_in_200_bits
def cross_entropy(logits: np.ndarray, targets: np.ndarray, *, numerics: Numerics) -> Bounded:
    """Bound the mean over N rows of l = log S + d_t, S = sum_k exp(-d_k), d_k = max x - x_k.

    Let g be the softmax of a row of n logits. As in `softmax`, to first order:

    - S is at least 1. Its relative error is at most r = u ((1 + c1) sum_k g_k d_k + c0 + n - 1), plus 4s n for
      subnormal numbers. The absolute error of its logarithm is at most the same, plus c u log S (c: the error of log).
    - The error of d_t is at most u d_t + 4s. The sum of log S and d_t, both positive, adds u l. A kernel may compute
      x_t - m - log S instead, which is the same sum with the opposite sign.
    - The mean has N - 1 additions of positive numbers and a division, or a product with a rounded 1/N. Its error is at
      most the mean of the rows' errors, plus gamma(N + 1) times the mean, plus s.

    There is no bound if a row contains NaN or +inf, contains only -inf, or has -inf at its target, or if a sum
    overflows.

    Parameters
    ----------
    logits : float array [*batch, n]
        The logits.
    targets : int array [*batch]
        Ids from 0 to n - 1.
    numerics : Numerics
        The errors of exp, tanh and log that the backend states (`portable_gpt2.numerics.stated`).

    Returns
    -------
    Bounded
        The shape is [].

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> logits, targets = np.asarray([[1, 2, 3], [0, 0, 9]], np.float32), np.asarray([0, 2])
    >>> cross_entropy(logits, targets, numerics=Numerics(log=8.0)).ratio(pg.cross_entropy(logits, targets)) < 1
    True
    """
    dtype = logits.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    c0, c1 = numerics.exp
    n = logits.shape[-1]
    rows, targets = exact(logits.reshape(-1, n)), targets.reshape(-1, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        m = rows.max(axis=-1, keepdims=True)
        defined = bool(np.isfinite(_float(m)).all())
        d = m - rows
        e = _exp(-d)
        S = e.sum(axis=-1, keepdims=True)
        log_S, d_t = _log(S), np.take_along_axis(d, targets, axis=-1)
        value = (log_S + d_t).sum() / len(rows)
        weights = _float(e / S)
        mean = _weighted(weights, _float(d)).sum(axis=-1, keepdims=True)
        r = u * ((1 + c1) * mean + c0 + n - 1) + 4 * n * s
        errors = r + u * (numerics.log * _float(log_S) + _float(d_t) + _float(log_S + d_t)) + 4 * s
        error = errors.mean() + gamma(len(rows) + 1, u) * (float(value) + errors.mean()) + s
        in_range = defined and float(value) * len(rows) * (1 + 1e-3) <= largest
    return stored(np.asarray(value), np.asarray(error if in_range else np.inf), dtype)
