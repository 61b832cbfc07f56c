"""Each op in more precision than it is computed in, with a bound on its rounding error that is derived, not picked.

A function here takes the op's NumPy arguments and returns a `Bounded`: the exact value (in float64 for arguments of
float32 and below, in 200 bits of mpmath for float64, whose own errors are less than 1e-5 of the bound) and, for each
element, how far a correct implementation can be from it. The bound is infinite where an intermediate result may
overflow: nothing is promised there.

Notation: u is the unit round-off, s the smallest normal number (what it costs that a subnormal number may be flushed
to zero), gamma(k) = ku / (1 - ku) bounds the relative error of k roundings in a row (Higham, "Accuracy and Stability
of Numerical Algorithms", 2002, lemma 3.1). "First order" says that products of two errors are left out: they are below
1e-4 of the bound. What is stored in 16 bits is computed in float32 and rounded once: see `_stored`.

Every bound holds for any order of summation, and with or without fused multiply-add. docs/numerics.md explains all of
them, with the assumptions and the largest errors seen.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import ml_dtypes
import numpy as np
from mpmath.ctx_mp import MPContext

_mp = MPContext()
_mp.prec = 200


class Format(NamedTuple):
    """A floating-point format: its unit round-off, its smallest normal number and its largest number."""

    unit: float
    smallest: float
    largest: float


FORMATS = {
    "float64": Format(2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max)),
    "float32": Format(2.0**-24, 2.0**-126, float(np.finfo(np.float32).max)),
    "bfloat16": Format(2.0**-8, 2.0**-126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "float16": Format(2.0**-11, 2.0**-14, float(np.finfo(np.float16).max)),
}

# The relative error of a backend's exp and tanh in units of u, where the result is normal: twice the error in ulps that
# its authors give, or what was seen over two million points in float32 and twenty thousand in float64, rounded up.
# The tests measure it again, on the namespace's own function and, through softmax and attention, on the kernels'.
_ONE_ULP = 2.0
_EXP = {
    ("numpy", "float32"): 3.6,  # 2.1264e-7 over all of float32, says its loops_exponent_log.dispatch.c.src; seen 3.41
    ("array_api_strict", "float32"): 3.6,
    ("tensorflow", "float32"): 7.0,  # seen 6.42 in tf.nn.softmax, which is oneDNN's, and 1.98 in tf.exp
    ("tensorflow", "float64"): 2.5,  # seen 1.92
    ("jax", "float64"): 2.5,  # seen 2.20; in float32 1.52
}
_TANH = {
    ("tensorflow", "float32"): 8.0,  # a rational function in Eigen and in XLA, "accurate up to a couple of ulps"
    ("tensorflow", "float64"): 8.0,  # seen 7.40
    ("jax", "float32"): 8.0,
    ("jax", "float64"): 8.0,  # seen 6.92
}

LOG_ERROR = 8.0  # of every backend's log between 1 and a million; seen 3.9 in tf.math.log, 3.6 in NumPy's, 2.0 in JAX's


def exp_error(backend: str, dtype: str) -> float:
    """Return the error of the backend's exp in units of u, the c of docs/numerics.md."""
    return _EXP.get((backend, computed_in(dtype)), _ONE_ULP)


def tanh_error(backend: str, dtype: str) -> float:
    return _TANH.get((backend, computed_in(dtype)), _ONE_ULP)


class Bounded(NamedTuple):
    """An exact value and, for each element, a bound on the error of computing it."""

    value: np.ndarray
    error: np.ndarray

    def ratio(self, computed: np.ndarray) -> float:
        """Return the largest error of what was computed, in units of its bound."""
        assert computed.shape == self.error.shape, f"shape {computed.shape}, expected {self.error.shape}"
        return float(np.max(quotient(distance(computed, self.value), self.error), initial=0))


def computed_in(dtype: str) -> str:
    """Return the dtype that an op computes in: float32 where 16 bits are stored."""
    return "float64" if dtype == "float64" else "float32"


def host_dtype(dtype: str) -> np.dtype:
    """Return NumPy's dtype of that name, ml_dtypes' bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def exact(a: np.ndarray) -> np.ndarray:
    """Return an array in more precision than its dtype's: numbers of mpmath for float64, else float64."""
    return _each(_mp.mpf, a) if a.dtype == np.float64 else a.astype(np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |a - b|, where b is `exact`, rounded to float64; inf where a is not finite."""
    with np.errstate(invalid="ignore"):
        a = exact(a)
        return np.nan_to_num(_float(abs(a - b)), nan=np.inf)


def quotient(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Return error / bound; 0 where there is no error or no bound."""
    judged = (error > 0) & (bound < np.inf)
    with np.errstate(divide="ignore"):
        return np.divide(error, bound, out=np.zeros(np.shape(error)), where=judged)


def _each(f, *arrays):
    """Apply a function of mpmath's to each element."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.frompyfunc(f, len(arrays), 1)(*arrays), dtype=object)


def _float(a):
    return np.asarray(a).astype(np.float64)


def _exp(x):
    # Clipped, because exp(-1e5) is 0 in every format while exp(-1e308) is a needless effort.
    return _each(_mp.exp, np.maximum(x, -_mp.mpf(1e5))) if x.dtype == object else np.exp(x)


def exponential(a: np.ndarray) -> np.ndarray:
    """Return exp, as `exact`."""
    return _exp(exact(a))


def hyperbolic_tangent(a: np.ndarray) -> np.ndarray:
    """Return tanh, as `exact`."""
    return _each(_mp.tanh, exact(a)) if a.dtype == np.float64 else np.tanh(exact(a))


def logarithm(a: np.ndarray) -> np.ndarray:
    """Return log, as `exact`."""
    return _log(exact(a))


def _log(x):
    return _each(_mp.log, x) if x.dtype == object else np.log(x)


def _sqrt(x):
    return _each(_mp.sqrt, x) if x.dtype == object else np.sqrt(x)


def _weighted(weights, x):
    """Multiply a weight with something that may be infinite where the weight is 0."""
    with np.errstate(over="ignore"):
        return weights * np.minimum(x, 1e300)


def gamma(k: int, u: float) -> float:
    """Bound the relative error of k roundings in a row, at their worst."""
    return k * u / (1 - k * u)


def gamma_at_random(k: int, u: float) -> float:
    """Bound the relative error of k roundings in a row whose signs are random: 4 sqrt(k) u.

    Independent errors of up to u, of mean 0, have a sum of standard deviation sqrt(k) u or less; 4 of these are passed
    once in 16,000 times, and for errors that are uniform between -u and u, 4 sqrt(k) u is 6.9 of them. It is for fixed
    inputs of mean 0 only: roundings of constant inputs all go one way.
    """
    return 4 * k**0.5 * u


def _stored(value: np.ndarray, error: np.ndarray, dtype: str) -> Bounded:
    """Round what was computed to the dtype that it is stored in.

    Computed y^ with |y^ - y| <= B, and stored as fl(y^) with |fl(y^) - y^| <= u |y^| <= u (|y| + B): together
    u |y| + (1 + u) B. A bfloat16 has the exponents of a float32, so that its subnormals may be flushed; float16's
    subnormals are normal in float32, and the conversion rounds them to the nearest: half of the smallest, 2^-25.
    """
    if dtype not in ("float64", "float32"):
        u = FORMATS[dtype].unit
        half_of_the_smallest = {"bfloat16": FORMATS["bfloat16"].smallest, "float16": 2.0**-25}
        error = u * abs(value) + (1 + u) * error + half_of_the_smallest[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        overflows = ~(abs(_float(value)) + error <= FORMATS[dtype].largest)
    return Bounded(np.asarray(value), np.where(overflows, np.inf, error))


def softmax(x: np.ndarray, *, axis: int = -1, c: float) -> Bounded:
    """Bound softmax, with its maximum subtracted, with division, componentwise.

    Blanchard, Higham and Higham, "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal.
    41(4), 2021. With m = max x and d_j = |x_j - m|, to first order:

    - x_j - m has a relative error of u, so that exp of it errs by u d_j, and by c u for exp itself;
    - the sum errs by the mean of those, sum_k g_k u (d_k + c), and by (n - 1) u for its additions;
    - the division adds u. Together

          u g_j (d_j + sum_k g_k d_k + n + 2c) + 4s,

    4s for what is subnormal among the inputs, the exponentials and the results. A row with NaN, with +inf or of
    nothing but -inf has no bound.
    """
    dtype = x.dtype.name
    u, s, _ = FORMATS[computed_in(dtype)]
    if not x.size:
        return _stored(exact(x), np.zeros(x.shape), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        a = exact(x)
        m = a.max(axis=axis, keepdims=True)
        defined = np.isfinite(_float(m))
        d = np.where(defined, m - a, 0)
        e = _exp(-d)
        g = e / e.sum(axis=axis, keepdims=True)
        weights, d = _float(g), _float(d)
        terms = d + _weighted(weights, d).sum(axis=axis, keepdims=True) + x.shape[axis] + 2 * c
        error = np.where(defined, u * _weighted(weights, terms) + 4 * s, np.inf)
    return _stored(g, error, dtype)


def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> Bounded:
    """Bound y = x w + b, of depth K.

    Each product x_k w_k passes through at most K + 1 roundings: its own, K - 1 additions and the bias's (Higham, 2002,
    section 3.1; K without a bias), so that with A = |x| |w| + |b| the error is at most gamma(K + 1) A. Flushing x_k
    costs s |w_k|, flushing w_k costs s |x_k|. Where an intermediate result is flushed, one of the K + 1 terms and
    partial sums is lost for s, and there is one result: K + 2 at most.

    In 16 bits, this bound is computed for float32 and the result is rounded once, after the bias was added.
    """
    dtype = x.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    w = w.reshape(w.shape[-2:])
    K = x.shape[-1]
    value = np.matmul(exact(x), exact(w))
    absolute_x, absolute_w = _float(abs(exact(x))), _float(abs(exact(w)))
    with np.errstate(over="ignore", invalid="ignore"):
        A = absolute_x @ absolute_w
        if b is not None:
            value = value + exact(b)
            A = A + _float(abs(exact(b)))
        g = gamma(K if b is None else K + 1, u)
        flushed = s * (absolute_x.sum(axis=-1)[..., None] + absolute_w.sum(axis=0) + K + 2)
        error = np.where((1 + g) * A <= largest, g * A + flushed, np.inf)
    return _stored(value, error, dtype)


def linear_at_random(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> Bounded:
    """Bound y = x w + b for fixed random inputs of mean 0: 4 sqrt(K + 1) u Q.

    Let the K products and b be independent, of mean 0, and Q^2 the sum of their squares. A partial sum has a mean
    square of at most Q^2, so that rounding it has a variance of at most u^2 Q^2: K of these, and u^2 Q^2 for the
    products, make
    (K + 1) u^2 Q^2. The 4 is explained at `gamma_at_random`. Q, a 2-norm, is less than the A of `linear`, a 1-norm, by
    a factor of about sqrt(K): this implies 4 sqrt(K + 1) u A.
    """
    unit = FORMATS[computed_in(x.dtype.name)].unit
    squares = [a.astype(np.float64) ** 2 for a in (x, w, b)]
    Q = np.sqrt(squares[0] @ squares[1] + squares[2])
    return _stored(linear(x, w, b).value, gamma_at_random(x.shape[-1] + 1, unit) * Q, x.dtype.name)


def gelu(x: np.ndarray, *, c: float) -> Bounded:
    """Bound y = x/2 (1 + tanh(z)), z = z1 + z3, z1 = sqrt(2/pi) x, z3 = sqrt(2/pi) 0.044715 x^3; c is tanh's error.

    To first order, each step's error being carried to y by the derivative of what follows:

    - z1 and z3 have the same sign, so that nothing cancels. z1 meets three roundings (the sum, the constant, its
      product), z3 these and four more (the constant, three products): e_z = u (3 |z1| + 7 |z3|).
    - tanh carries e_z over by its derivative, 1 - tanh(z)^2, and errs by c u |tanh(z)| itself.
    - the sum 1 + tanh(z) and the product with x/2 have one rounding each, relative to the result. Together

          |x|/2 (e_z (1 - tanh(z)^2) + c u |tanh(z)| + 2 u (1 + tanh(z))) + 4s.

    For negative x the middle term is larger than the result is: 1 + tanh(z) cancels, in this form of GELU by design.
    Where x^3 overflows, tanh is 1 or -1 exactly and the bound still holds. The 4s are for x (the derivative is less
    than 1.13), z, tanh(z) where x is small, and y.
    """
    dtype = x.dtype.name
    u, s, _ = FORMATS[computed_in(dtype)]
    a = exact(x.reshape(-1))
    one = _mp.mpf(1) if a.dtype == object else 1.0
    root = _mp.sqrt(2 / _mp.pi) if a.dtype == object else np.sqrt(2 / np.pi)
    z1, z3 = root * a, root * a * a * a * 44715 / 10**6
    q = _exp(-2 * abs(z1 + z3))  # (1 - q) / (1 + q) is |tanh(z)|
    half = np.where(a < 0, a * q, a) / (one + q)  # x/2 (1 + tanh(z)), with nothing cancelled
    derivative, tanh = _float(4 * q / (one + q) ** 2), _float((one - q) / (one + q))
    with np.errstate(over="ignore"):
        size = _float(abs(a)) / 2
        e_z = 3 * _float(abs(z1)) + 7 * _float(abs(z3))
        error = u * size * (_weighted(derivative, e_z) + c * tanh) + 2 * u * _float(abs(half)) + 4 * s
    return _stored(half.reshape(x.shape), error.reshape(x.shape), dtype)


def layer_norm(
    x: np.ndarray,
    g: np.ndarray,
    b: np.ndarray,
    *,
    eps: float = 1e-5,
    gamma: Callable[[int, float], float] = gamma,
) -> Bounded:
    """Bound y = g N + b, N = d / r, d = x - mean(x), r = sqrt(mean(d^2) + eps), computed in two passes.

    Let n be the length, M = mean |x| and V = mean(d^2).

    - The mean has n - 1 additions and a division (or a product with a rounded 1/n, one more): it errs by
      e = gamma(n + 1) M. A deviation errs by e and by its own rounding: D_j = e + u (|d_j| + e) + 4s, the 4s for what
      is flushed among x, the mean and d. Their root mean square is at most D = (1 + u) e + u sqrt(V) + 4s.
    - r is the Euclidean norm of the vector (d_1, ..., d_n, sqrt(n eps)) / sqrt(n). By the triangle inequality it
      changes by at most D when the d_j change by D_j. Squares (1), additions (n - 1), the division (2) and the sum with
      eps (1), eps itself being rounded (1), have the relative error gamma(n + 4) in what is under the root, all of it
      being positive, half of that in the root, and u for the root: p = gamma(n + 4) / 2 + u. A flushed square costs
      s / r. So r errs by R = D + p (r + D) + s / r.
    - d'/r' - d/r = (d' - d)/r' - (d/r) (r' - r)/r', so that N errs by (D_j + |N_j| R) / (r - R), and by 2u more for the
      quotient (or a product with a rounded 1/r').
    - g N + b adds a rounding each. With E_j the error of N_j, to first order:

          |g_j| E_j + u (|g_j N_j| + |y_j|) + s (|g_j| + |N_j| + 3).

    It is infinite where R >= r: there the deviations are smaller than the error of the mean, and no digit is right.
    """
    dtype = x.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    n = x.shape[-1]
    if not x.size:
        return _stored(exact(x), np.zeros(x.shape), dtype)
    a = exact(x)
    d = a - a.sum(axis=-1, keepdims=True) / n
    variance = (d * d).sum(axis=-1, keepdims=True) / n
    r = _sqrt(variance + (_mp.mpf(eps) if a.dtype == object else eps))
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
    return _stored(y, error, dtype)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    c: float,
) -> Bounded:
    """Bound y = w v, w = softmax(S) over the n keys, S = scale q k^T; c is exp's error.

    - A score is a linear layer without bias, of depth d, times a rounded scale: two roundings more, or four where q and
      k are each multiplied by a rounded square root of it. With A = |scale| |q| |k|^T it errs by
      f = gamma(d + 4) A + s (|scale| (sum |q| + sum |k| + d) + 3).
    - If the scores change by at most f_j, then the weight w_j = exp(S_j) / sum_k exp(S_k) changes by a factor of at
      most
      exp(f_j + L), with L = log(sum_k w_k exp(f_k)).
    - The softmax of the changed scores errs as in `softmax`. There, the distance of S_j to the maximum is at most
      d_j + f_j + max f, and sum_k w_k d_k, which is the entropy of w plus log(max w), at most log(n):
      t = u (d_j + f_j + max f + log(n) + n + 2c). A fused kernel divides after the product with v; the roundings are
      the same.
    - So a weight errs by W_j = w_j (exp(f_j + L + t) - 1) + 4s, and by no more than max(w_j, 1 - w_j) + (n + 2) u + 4s,
      as computed weights are between 0 and 1. A masked weight is 0 exactly: exp underflows.
    - The product with v has n roundings, and one more where the division comes last:

          sum_j W_j |v_j| + gamma(n + 1) sum_j (w_j + W_j) |v_j| + s (n + 3).

    The scores, masked ones too, must be below a quarter of the largest number, and sum |v| below the largest.
    """
    dtype = q.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
    d, n = q.shape[-1], k.shape[-2]
    scale = d**-0.5 if scale is None else scale
    a, b, values = exact(q), exact(k), exact(v)
    scores = np.matmul(a, np.swapaxes(b, -1, -2)) * (_mp.mpf(scale) if a.dtype == object else scale)
    seen = np.broadcast_to(True if mask is None else mask, scores.shape)
    if not scores.size or not v.size:
        y = np.matmul(scores, values)
        return _stored(y, np.zeros(y.shape), dtype)
    lowest = scores.min()
    distances = np.where(seen, scores, lowest).max(axis=-1, keepdims=True) - scores
    e = np.where(seen, _exp(-np.where(seen, distances, 0)), 0 * lowest)
    weights = e / e.sum(axis=-1, keepdims=True)
    y = np.matmul(weights, values)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        size_q, size_k, size_v = _float(abs(a)), _float(abs(b)), _float(abs(values))
        products = size_q @ np.swapaxes(size_k, -1, -2)
        sums = size_q.sum(axis=-1)[..., :, None] + size_k.sum(axis=-1)[..., None, :]
        f = gamma(d + 4, u) * abs(scale) * products + s * (abs(scale) * (sums + d) + 3)
        f = np.where(seen, f, 0)
        w, distances = _float(weights), np.where(seen, _float(distances), 0)
        log_w = np.where(seen, -distances - np.log(_float(e).sum(axis=-1, keepdims=True)), -np.inf)
        top = (log_w + f).max(axis=-1, keepdims=True)
        L = np.where(
            f.max(axis=-1, keepdims=True) < 1,
            np.log1p((w * np.expm1(np.minimum(f, 1))).sum(axis=-1, keepdims=True)),  # log(1 + x) is x for a tiny x
            top + np.log(np.exp(log_w + f - top).sum(axis=-1, keepdims=True)),
        )
        t = u * (distances + f + f.max(axis=-1, keepdims=True) + np.log(n) + n + 2 * c)
        exponent = f + L + t
        W = np.where(exponent < 1, w * np.expm1(np.minimum(exponent, 1)), np.exp(log_w + exponent) - w)
        W = np.where(seen, np.minimum(W, np.maximum(w, 1 - w) + (n + 2) * u) + 4 * s, 0)
        error = W @ size_v + gamma(n + 1, u) * ((w + W) @ size_v) + s * (n + 3)
        in_range = max(1, abs(scale)) * products.max(axis=-1, keepdims=True) <= largest / 4
        in_range = in_range & (size_v.sum(axis=-2, keepdims=True) <= largest / 2)
        error = np.where(in_range, error, np.inf)
    return _stored(y, error, dtype)


def cross_entropy(logits: np.ndarray, targets: np.ndarray, *, c: float) -> Bounded:
    """Bound the mean over N rows of l = log S + d_t, S = sum_k exp(-d_k), d_k = max x - x_k; c is exp's error.

    With g the softmax of a row of n, as in `softmax` and to first order:

    - S is at least 1, and has the relative error r = u (sum_k g_k d_k + c + n - 1), and 4s n by what is subnormal. Its
      logarithm errs by as much, absolutely, and by LOG_ERROR u log S itself.
    - d_t errs by u d_t and 4s, and the sum of the two, both positive, by u l. What a kernel subtracts in the place of
      d_t, x_t - m - log S, is the same sum.
    - The mean has N - 1 additions of positive numbers and a division, or a product with a rounded 1/N: it errs by the
      mean of the rows' errors, by gamma(N + 1) times the mean, and by s.

    There is no bound where a row has NaN, +inf, nothing but -inf or -inf at its target, or where a sum overflows.
    """
    dtype = logits.dtype.name
    u, s, largest = FORMATS[computed_in(dtype)]
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
        r = u * (_weighted(weights, _float(d)).sum(axis=-1, keepdims=True) + c + n - 1) + 4 * n * s
        errors = r + u * (LOG_ERROR * _float(log_S) + _float(d_t) + _float(log_S + d_t)) + 4 * s
        error = errors.mean() + gamma(len(rows) + 1, u) * (float(value) + errors.mean()) + s
        in_range = defined and float(value) * len(rows) * (1 + 1e-3) <= largest
    return _stored(np.asarray(value), np.asarray(error if in_range else np.inf), dtype)


def compute(op: Callable[..., Any], backend: Any, *arrays: np.ndarray | None, **options: Any) -> np.ndarray:
    """Run an op on NumPy arrays through a backend, and see that it left them as they were."""
    given = [None if a is None else backend.from_numpy(a) for a in arrays]
    with np.errstate(all="ignore"):
        result = backend.to_numpy(op(*given, **options))
    for a, x in zip(arrays, given, strict=True):
        assert a is None or backend.to_numpy(x).tobytes() == a.tobytes(), f"{op.__name__} changed its argument"
    return result


def forms(op: Any, backend: Any, *, compiled: bool = False, **options: Any) -> dict[str, Callable[..., Any]]:
    """Return the ways to run an op, by name: its kernel, its definition, and both compiled where that differs."""
    found = {"kernel": op, "reference": op.reference}
    if compiled and backend.compiles_per_shape:
        for name, form in list(found.items()):
            found[f"compiled {name}"] = _compiled(form, backend, options)
    return found


def _compiled(form: Callable[..., Any], backend: Any, options: dict[str, Any]) -> Callable[..., Any]:
    function = backend.compile(lambda arrays: form(*arrays, **options))

    @functools.wraps(form)
    def call(*arrays: Any, **_: Any) -> Any:
        return function(arrays)

    return call


def assert_within(bounded: Bounded, computed: np.ndarray, op: str, backend: Any, dtype: str, form: str) -> float:
    """Assert that what was computed is within its bound; record the ratio, and steer hypothesis toward a larger one."""
    assert computed.dtype == host_dtype(dtype), f"{form} of {op} returned {computed.dtype} for {dtype}"
    ratio = bounded.ratio(computed)
    record(op, backend.name, dtype, ratio)
    if hypothesis.currently_in_test_context():
        hypothesis.target(min(ratio, 1e9), label=form)
    assert ratio <= 1, f"{form} of {op}, {backend.name}, {dtype}: the error is {ratio:.3g} times its bound"
    return ratio


# What was seen, for the table at the end of a run.

_WORST: dict[tuple[str, str, str], float] = {}


def recorded() -> list[tuple[str, str, str, float]]:
    """Return what was recorded in this process, for another one to record."""
    return [(*key, ratio) for key, ratio in _WORST.items()]


def record(op: str, backend: str, dtype: str, ratio: float) -> None:
    """Remember the worst error, in units of its bound, of an op on a backend in a dtype."""
    key = (op, backend, dtype)
    _WORST[key] = max(ratio, _WORST.get(key, 0.0))


def table() -> list[str]:
    """Return the worst errors recorded, in units of their bounds, a line for each op and backend."""
    rows = list(dict.fromkeys((op, backend) for op, backend, _ in sorted(_WORST)))
    head = f"{'op':<19}{'backend':<18}" + "".join(f"{dtype:>10}" for dtype in FORMATS)
    cells = [[_WORST.get((*row, dtype)) for dtype in FORMATS] for row in rows]
    lines = [
        f"{op:<19}{backend:<18}" + "".join(f"{'' if cell is None else format(cell, '.3g'):>10}" for cell in line)
        for (op, backend), line in zip(rows, cells, strict=True)
    ]
    return [head, *lines] if lines else []
