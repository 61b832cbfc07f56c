"""Ball arithmetic, by python-flint: a number is a ball, a midpoint and a radius, that contains the exact result.

A ball is a ``flint.arb``. An array (`Array`) has balls, or it has floats, which stand for themselves: their radius is
0. Arrays from the host have floats, so the parameters of a model take no more memory than in NumPy, and are converted
to balls in blocks while a product is computed. Integers and bools are those of NumPy.

Each operation on balls returns a ball that contains all results of the operation on elements of its arguments. So the
result of a whole model contains the exact result of its formula, where the numbers that are written in the source, such
as 0.044715, stand for the float64 numbers that Python reads. The following points need care:

- ``+ - * /``, ``sqrt``, ``exp``, ``log``, ``tanh`` and products of matrices (``arb_mat``) are functions of FLINT, which
  adds the rounding error of the midpoint to the radius. A quotient whose divisor contains 0, and a square root or a
  logarithm whose argument contains numbers for which it is not defined, are indeterminate: NaN with an infinite radius.
- ``max`` returns a ball that contains the largest element, even if balls overlap and it is not known which is the
  largest. Softmax subtracts this ball from all elements, and each difference contains the exact difference.
- A hidden score is -inf exactly. If a finite ball is subtracted from it, it stays -inf, and its exponential is 0
  exactly. inf - inf is indeterminate.
- A comparison of balls that overlap is not decided, and raises an ArithmeticError.
- Labels of dtypes do not round: float32 and float64 differ only in `to_numpy`, which rounds the midpoints. There are no
  16-bit dtypes.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import flint
import numpy as np
from flint import arb, arb_mat

from portable_gpt2.backend import Backend
from portable_gpt2.host import Enclosure
from portable_gpt2.numerics import Numerics

_BITS = contextvars.ContextVar("portable_gpt2_bits", default=256)
_BLOCK = 2**18  # a matrix is converted to balls in blocks of this many elements, which take 15 MB
_ROWS = 61
"""FLINT multiplies matrices in fixed-point arithmetic if all lengths are at least this number.

Therefore, 8 rows or more are filled up with zeros. At 256 bits, the product of 16 rows by a matrix of 768 x 341 then
takes 0.17 s, and 0.34 s otherwise. Fewer rows are faster as they are.
"""
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


@contextlib.contextmanager
def _precision() -> Iterator[None]:
    """Compute in the working precision, within a ``with`` block. FLINT's own setting is restored afterwards."""
    before = flint.ctx.prec
    flint.ctx.prec = _BITS.get()
    try:
        yield
    finally:
        flint.ctx.prec = before


class Array:
    """An array of balls, of floats that stand for themselves, of integers or of bools.

    Parameters
    ----------
    values : array
        A NumPy array: of dtype object if its elements are balls.
    dtype : dtype, optional
        The NumPy dtype to which the midpoints of balls are rounded on the host. For other arrays, it is their own dtype
        unless given.
    """

    __slots__ = ("dtype", "values")
    __array_ufunc__ = None  # an operator of a NumPy number and an Array is that of the Array
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: Any, dtype: Any = None) -> None:
        if not isinstance(values, np.ndarray):  # an index or a reduction returns an element itself
            element, values = values, np.empty((), object if isinstance(values, arb) else np.asarray(values).dtype)
            values[()] = element
        self.values: np.ndarray = values
        self.dtype: np.dtype = values.dtype if dtype is None else dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return self.values.shape

    def __repr__(self) -> str:
        return f"Array({self.values!r}, {self.dtype})"

    def __getitem__(self, index: Any) -> Array:
        parts = index if isinstance(index, tuple) else (index,)
        return Array(self.values[tuple(int(i) if isinstance(i, Array) else i for i in parts)], self.dtype)

    def __int__(self) -> int:
        return int(_plain(self))

    __index__ = __int__

    def __bool__(self) -> bool:
        return bool(_plain(self))

    def __neg__(self) -> Array:
        with _precision():
            return Array(-self.values, self.dtype)

    def __abs__(self) -> Array:
        with _precision():
            return Array(abs(self.values), self.dtype)

    def __add__(self, other: Any) -> Array:
        return _arithmetic(operator.add, self, other)

    def __radd__(self, other: Any) -> Array:
        return _arithmetic(operator.add, other, self)

    def __sub__(self, other: Any) -> Array:
        return _arithmetic(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Array:
        return _arithmetic(operator.sub, other, self)

    def __mul__(self, other: Any) -> Array:
        return _arithmetic(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Array:
        return _arithmetic(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Array:
        return _arithmetic(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Array:
        return _arithmetic(operator.truediv, other, self)

    def __pow__(self, other: Any) -> Array:
        return _arithmetic(operator.pow, self, other)

    def __and__(self, other: Any) -> Array:
        return Array(_plain(self) & _plain(other))

    def __or__(self, other: Any) -> Array:
        return Array(_plain(self) | _plain(other))

    def __xor__(self, other: Any) -> Array:
        return Array(_plain(self) ^ _plain(other))

    def __eq__(self, other: Any) -> Array:  # type: ignore[override]
        return _compare(operator.eq, operator.ne, self, other)

    def __ne__(self, other: Any) -> Array:  # type: ignore[override]
        return _compare(operator.ne, operator.eq, self, other)

    def __lt__(self, other: Any) -> Array:
        return _compare(operator.lt, operator.ge, self, other)

    def __le__(self, other: Any) -> Array:
        return _compare(operator.le, operator.gt, self, other)

    def __gt__(self, other: Any) -> Array:
        return _compare(operator.gt, operator.le, self, other)

    def __ge__(self, other: Any) -> Array:
        return _compare(operator.ge, operator.lt, self, other)


def _has_balls(x: Any) -> bool:
    return isinstance(x, Array) and x.values.dtype == object


def _plain(x: Any) -> Any:
    """Return a number, or the NumPy array of an Array that has no balls; floats become float64, which is exact."""
    if not isinstance(x, Array):
        return np.float64(x) if isinstance(x, float) else x
    if x.values.dtype == object:
        raise TypeError("flint: this operation takes exact numbers; the array has balls")
    return x.values.astype(np.float64, copy=False) if x.dtype in _FLOATS else x.values


def _balls(x: Any) -> Any:
    """Return the balls of a float Array as a NumPy array, or a number as a ball. Nothing is rounded."""
    if not isinstance(x, Array):
        return arb(x)
    if x.values.dtype == object:
        return x.values
    if x.dtype not in _FLOATS:
        raise TypeError(f"flint: an array of {x.dtype} and an array of floats; convert one of them")
    return _each(arb, x.values.astype(np.float64))


def _each(f: Callable[..., Any], *arrays: Any, n_results: int = 1) -> Any:
    """Apply a function to each element."""
    return np.frompyfunc(f, len(arrays), n_results)(*arrays)


def _like(x: Any, y: Any) -> Array:
    """Return the Array among two operands. Refuse two arrays of different floating dtypes."""
    if isinstance(x, Array) and isinstance(y, Array) and x.dtype != y.dtype and {x.dtype, y.dtype} & {*_FLOATS}:
        raise TypeError(f"flint: the arrays have dtypes {x.dtype} and {y.dtype}; convert one of them")
    found: Array = x if isinstance(x, Array) else y
    return found


def _arithmetic(f: Callable[[Any, Any], Any], x: Any, y: Any) -> Array:
    if not all(isinstance(each, Array | int | float) for each in (x, y)):
        return NotImplemented  # type: ignore[no-any-return]
    dtype = _like(x, y).dtype
    if dtype in _FLOATS:
        with _precision():
            return Array(f(_balls(x), _balls(y)), dtype)
    found = Array(f(_plain(x), _plain(y)))
    if found.dtype in _FLOATS:
        raise TypeError("flint: an operation on integers has a result that is not an integer; convert them to floats")
    return found


def _compare(f: Callable[[Any, Any], Any], opposite: Callable[[Any, Any], Any], x: Any, y: Any) -> Array:
    """Return f(x, y) for a comparison f. FLINT's comparison of balls is true if it holds for all of their elements."""
    if not all(isinstance(each, Array | int | float) for each in (x, y)):
        return NotImplemented  # type: ignore[no-any-return]
    _like(x, y)
    if not _has_balls(x) and not _has_balls(y):
        return Array(f(_plain(x), _plain(y)))
    a, b = _balls(x), _balls(y)
    found = np.asarray(f(a, b), np.bool_)
    is_decided = found | np.asarray(opposite(a, b), np.bool_)
    if not is_decided.all():
        raise ArithmeticError(
            f"flint: a comparison is not decided for {np.sum(~is_decided)} of {is_decided.size} elements, because the "
            f"balls overlap; a higher working precision makes them smaller"
        )
    return Array(found)


# From balls to floats


def _rounded(balls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 numbers that are nearest to the midpoints, and the signs of what they lack.

    The midpoint of a ball with an infinite radius says nothing, and becomes NaN.
    """

    def rounded(x: Any) -> tuple[float, int]:
        middle = float(x) if x.rad() < math.inf else math.nan
        rest = x.mid() - middle
        return middle, (rest > 0) - (rest < 0)

    middle, rest = _each(rounded, balls, n_results=2)
    return np.asarray(middle, np.float64), np.asarray(rest, np.int64)


def _nearest(balls: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the numbers of a floating dtype that are nearest to the midpoints.

    Rounding to float64 first and then to float32 may round twice in the same direction. Therefore, if float64 is not
    exact, the midpoint is rounded towards zero and the last bit is set ("round to odd"). Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on
    Computers 57(4), 2008, prove that the second rounding then has the result of one.
    """
    middle, rest = _rounded(balls)
    if dtype == np.float64:
        return middle
    with np.errstate(over="ignore", under="ignore"):
        towards_zero = np.where(rest * np.sign(middle) < 0, np.nextafter(middle, 0), middle)
        odd = (towards_zero.view(np.int64) | (rest != 0)).view(np.float64)
        return np.asarray(odd.astype(np.float32))


def _radius(x: Any) -> float:
    """Return the radius of a ball, rounded up."""
    radius = x.rad()
    found = float(radius)  # exact if it is a normal number, because a radius has 30 bits
    return math.nextafter(found, math.inf) if radius > found else found


def _enclosure(balls: np.ndarray) -> Enclosure:
    """Return float64 bounds of balls, rounded outwards, and the radii."""
    middle, rest = _rounded(balls)
    radius = np.asarray(_each(_radius, balls), np.float64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        low = np.where(rest < 0, np.nextafter(middle, -np.inf), middle)
        high = np.where(rest > 0, np.nextafter(middle, np.inf), middle)
        lower = np.where(radius > 0, np.nextafter(low - radius, -np.inf), low)
        upper = np.where(radius > 0, np.nextafter(high + radius, np.inf), high)
    is_unknown = np.isnan(middle)
    lower, upper = np.where(is_unknown, -np.inf, lower), np.where(is_unknown, np.inf, upper)
    return Enclosure(lower, upper, np.where(is_unknown, np.inf, radius))


# The namespace


def _elementwise(f: Callable[[Any], Any]) -> Callable[[Array], Array]:
    def apply(x: Array) -> Array:
        with _precision():
            return Array(_each(f, _balls(x)), x.dtype)

    return apply


def _max(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    if x.values.dtype != object:
        return Array(np.max(x.values, axis=axis, keepdims=keepdims), x.dtype)
    values, axis = (x.values.ravel(), 0) if axis is None else (x.values, axis)
    with _precision():
        return Array(np.frompyfunc(arb.max, 2, 1).reduce(values, axis=axis, keepdims=keepdims), x.dtype)


def _sum(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    if x.dtype not in _FLOATS:
        return Array(np.sum(x.values, axis=axis, keepdims=keepdims, dtype=x.dtype))
    if not x.values.size:
        return Array(np.sum(x.values.astype(np.float64), axis=axis, keepdims=keepdims), x.dtype)
    with _precision():
        return Array(np.sum(_balls(x), axis=axis, keepdims=keepdims), x.dtype)


def _mean(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    n = x.values.size if axis is None else x.shape[axis]
    return _sum(x, axis=axis, keepdims=keepdims) / n if n else Array(np.full((), np.nan), x.dtype)


def _cumulative_sum(x: Array, axis: int = -1) -> Array:
    if x.dtype not in _FLOATS:
        return Array(np.cumsum(x.values, axis=axis, dtype=x.dtype))
    with _precision():
        return Array(np.add.accumulate(_balls(x), axis=axis), x.dtype)


def _entries(a: np.ndarray) -> list[Any]:
    """Return balls, or floats that stand for themselves, row by row."""
    entries: list[Any] = (a if a.dtype == object else a.astype(np.float64, copy=False)).ravel().tolist()
    return entries


def _matmul(x: Array, y: Array) -> Array:
    *batch, n, _ = x.shape
    found = np.empty((*batch, n, y.shape[-1]), object)
    with _precision():
        for index in np.ndindex(*batch):
            _product(x.values[index], y.values[index], found[index])
    return Array(found, x.dtype)


def _product(a: np.ndarray, b: np.ndarray, found: np.ndarray) -> None:
    """Write the product of two matrices to `found`, block by block of the columns of b."""
    (n, k), m = a.shape, b.shape[1]
    if not n * k * m:
        found[...] = arb(0)
        return
    step = max(_ROWS, _BLOCK // k)
    rows = max(n, _ROWS) if n >= 8 and min(k, m) >= _ROWS else n
    left = arb_mat(rows, k, [*_entries(a), *[0] * ((rows - n) * k)])
    for j in range(0, m, step):
        right = b[:, j : j + step]
        product = (left * arb_mat(k, right.shape[1], _entries(right))).entries()
        found[:, j : j + step] = np.fromiter(product, object, len(product)).reshape(rows, -1)[:n]


def _where(condition: Array, x: Any, y: Any) -> Array:
    dtype = _like(x, y).dtype
    convert = _balls if _has_balls(x) or _has_balls(y) else _plain
    found = np.where(condition.values, convert(x), convert(y))
    return Array(found if dtype in _FLOATS else found.astype(dtype, copy=False), dtype)


def _concat(arrays: Sequence[Array], axis: int = 0) -> Array:
    convert = _balls if any(map(_has_balls, arrays)) else _plain
    return Array(np.concatenate([convert(x) for x in arrays], axis=axis), arrays[0].dtype)


def _astype(x: Array, dtype: np.dtype, copy: bool = True) -> Array:
    """Return x with another label. Integers become floats or balls that are equal to them."""
    if dtype not in _FLOATS or x.dtype in _FLOATS:
        return Array(x.values, dtype) if dtype in _FLOATS else Array(_plain(x).astype(dtype))
    floats = x.values.astype(np.float64)
    is_exact = x.dtype.itemsize < 8 or bool((abs(floats) <= 2.0**53).all())
    return Array(floats if is_exact else _each(lambda i: arb(int(i)), x.values.astype(object)), dtype)


_XP = SimpleNamespace(
    float32=_FLOATS[0],
    float64=_FLOATS[1],
    int32=np.dtype(np.int32),
    int64=np.dtype(np.int64),
    exp=_elementwise(arb.exp),
    log=_elementwise(arb.log),
    sqrt=_elementwise(arb.sqrt),
    tanh=_elementwise(arb.tanh),
    max=_max,
    mean=_mean,
    sum=_sum,
    cumulative_sum=_cumulative_sum,
    matmul=_matmul,
    matrix_transpose=lambda x: Array(np.matrix_transpose(x.values), x.dtype),
    permute_dims=lambda x, axes: Array(np.transpose(x.values, axes), x.dtype),
    reshape=lambda x, shape: Array(np.reshape(x.values, shape), x.dtype),
    concat=_concat,
    take=lambda x, indices, axis: Array(np.take(x.values, indices.values, axis=axis), x.dtype),
    take_along_axis=lambda x, indices, axis: Array(np.take_along_axis(x.values, indices.values, axis), x.dtype),
    where=_where,
    astype=_astype,
    isdtype=np.isdtype,
    bitwise_right_shift=lambda x, n: Array(x.values >> n),
    argsort=lambda x, axis: Array(np.argsort(_plain(x), axis=axis)),
)


class FlintBackend(Backend):
    """Ball arithmetic on the CPU. A model runs as it does on other backends, and its logits are balls."""

    name = "flint"
    array_types = (Array,)
    xp = _XP
    dtypes = {"float32": _FLOATS[0], "float64": _FLOATS[1]}
    # A midpoint is rounded to the nearest number of the dtype.
    numerics = {"cpu": dict.fromkeys(("float32", "float64"), Numerics(exp=(1.0, 0.0), tanh=1.0, log=1.0))}

    def devices(self) -> dict[str, Any]:
        return {"cpu": "cpu"}

    def put(self, a: np.ndarray, device: Any) -> Any:
        if a.dtype.kind not in "biu" and a.dtype not in _FLOATS:
            raise TypeError(f"backend 'flint' has no arrays of {a.dtype}; its floating dtypes are float32 and float64")
        return Array(np.asarray(a))

    def to_numpy(self, x: Any) -> np.ndarray:
        values: np.ndarray = x.values
        if values.dtype == object:
            return _nearest(values, x.dtype)
        return values.astype(x.dtype, copy=False)

    def peek(self, x: Any) -> np.ndarray:
        return self.to_numpy(x)

    def arange(self, n: Any, *, like: Any) -> Any:
        return Array(np.arange(int(n)))

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        return Array(np.zeros(shape, like.dtype))

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        rows = _balls(value) if _has_balls(buffer) else value.values
        if _has_balls(value) and not _has_balls(buffer):
            buffer = Array(_balls(buffer), buffer.dtype)
        common = np.promote_types(buffer.values.dtype, rows.dtype)  # floats may be wider than their label says
        buffer = Array(buffer.values.astype(common, copy=False), buffer.dtype)
        buffer.values[..., int(start) : int(start) + value.shape[-2], :] = rows
        return buffer

    def enclosure(self, x: Any) -> Enclosure:
        if x.values.dtype == object:
            return _enclosure(x.values)
        exact = x.values.astype(np.float64)
        return Enclosure(exact, exact, np.zeros(x.shape))

    @contextlib.contextmanager
    def working_precision(self, bits: int) -> Iterator[None]:
        if not isinstance(bits, int) or not 2 <= bits <= 2**24:
            raise ValueError(f"the working precision is {bits!r}; expected a number of bits from 2 to 2^24")
        token = _BITS.set(bits)
        try:
            yield
        finally:
            _BITS.reset(token)
