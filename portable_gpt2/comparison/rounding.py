"""Which rounding explains a difference: the formats through which weights may have passed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..host import float_dtypes

ROWS = 32  # a multiple of the length of Q8_0's blocks
BLOCK = 1 << 18  # the number of elements that a check reads at once
_FORMATS = {name: float_dtypes[name] for name in ("bfloat16", "float16", "float32", "float64")}
_FORMATS |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")}


def _format(name: str) -> Any:
    return _FORMATS.get(name, np.dtype("float64"))


class Precision(NamedTuple):
    """The rounding of the coarser of the dtypes that two tensors are stored in."""

    unit: float
    """The largest relative error of a rounded element."""
    tiny: float
    """The distance of the elements that are nearest to 0."""


def precision_of(*dtypes: str) -> Precision:
    """Return the precision of the coarsest of some dtypes."""
    finfo: Any = ml_dtypes.finfo  # it has no types
    found = [finfo(_format(dtype)) for dtype in dtypes]
    return Precision(max(float(f.eps) for f in found) / 2, max(float(f.smallest_subnormal) for f in found))


def blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of two arrays of one shape in blocks.

    The first block has 32 rows, so that a check which fails costs little, and needs little memory if it does not.
    """
    step = ROWS * max(1, BLOCK // (ROWS * max(1, math.prod(x.shape[1:]))))
    for start, end in itertools.pairwise([0, *range(ROWS, max(len(x), ROWS + 1), step), len(x)]):
        if start < end:
            yield x[start:end], y[start:end]


def everywhere(check: Callable[..., Any], x: np.ndarray, y: np.ndarray, *args: Any) -> bool:
    """Return whether two arrays have one shape, and ``check(p, q, *args)`` accepts each block of their rows."""
    if x.shape != y.shape:
        return False
    with np.errstate(all="ignore"):
        return all(check(p, q, *args) for p, q in blocks(*np.atleast_1d(x, y)))


def conversion(x: np.ndarray, y: np.ndarray, dtype_x: str, dtype_y: str) -> str | None:
    """Explain a difference by the dtypes that two tensors are stored in: "" if they are equal.

    If neither dtype holds the values of the other, the original values are not known. Then the two may be as far apart
    as two roundings of one number.
    """
    if everywhere(np.array_equal, x, y):
        return ""
    if dtype_x == dtype_y:
        return None
    for words, p, q, name in (("", x, y, dtype_y), ("a is ", y, x, dtype_x)):
        if everywhere(converts_to, p, q, name):
            return f"{words}rounded through {name}"
    (u, d), (v, e) = (precision_of(name) for name in (dtype_x, dtype_y))
    if everywhere(_is_within, x, y, 1.01 * (u + v), d + e):
        return f"rounded through {dtype_y}, a through {dtype_x}"
    return None


def rounding(x: np.ndarray, y: np.ndarray, by_columns: bool) -> str | None:
    """Explain a difference by rounding of one of the two: "" if they are equal.

    With `by_columns`, Q8_0's blocks run along the first axis: in a GGUF file, a weight is transposed.
    """
    if everywhere(np.array_equal, x, y):
        return ""
    for name, p, q in (("b", x, y), ("a", y, x)):
        if (kind := _one_way(p, q, by_columns)) is not None:
            return kind if name == "b" else f"a is {kind}"
    return None


def _one_way(x: np.ndarray, y: np.ndarray, by_columns: bool) -> str | None:
    """Explain y by a rounding of x."""
    if not everywhere(is_near, x, y):
        return None
    for name in _FORMATS:
        if everywhere(converts_to, x, y, name):
            return f"rounded through {name}"
    if x.ndim > 1 or not by_columns:
        z, w = (x.T, y.T) if by_columns else (x, y)
        if z.shape[-1] % ROWS == 0 and everywhere(_becomes, z, w, q8_0):
            return "rounded through Q8_0 of GGUF"
    if (bits := _mantissa_bits(y)) is not None and 3 <= bits < 23:
        for words, how in (("rounded to", _to_nearest), ("rounded half away from zero to", _away), ("cut to", _cut)):
            if everywhere(_becomes, x, y, how, bits):
                known = {7: ", those of bfloat16", 10: ", those of TF32"}.get(bits, "")
                return f"{words} {bits} bits after the binary point{known}"
    for digits in range(1, 8):
        if everywhere(_has_decimals, x, y, digits):
            return f"rounded to {digits} decimals"
    return _whole_numbers(x, y)


def _has_decimals(x: np.ndarray, y: np.ndarray, digits: int) -> Any:
    exact = np.round(x.astype(np.float64), digits)
    return (np.abs(y - exact) <= np.finfo(y.dtype).eps * np.abs(exact)).all()


def _whole_numbers(x: np.ndarray, y: np.ndarray) -> str | None:
    """Explain y by whole numbers that have a scale, or a scale and an offset, in common."""
    scopes: dict[str, tuple[int | None, np.ndarray, np.ndarray]] = {
        "the tensor": (None, x, y),
        "each row": (1, x, y),
        "each column": (0, x, y),
    }
    for name, z, w in (("row", x, y), ("column", x.T, y.T)):
        for n in (32, 64, 128) if x.ndim == 2 else ():
            if z.shape[1] % n == 0:
                scopes[f"each {n} elements of a {name}"] = (1, z.reshape(-1, n), w.reshape(-1, n))
    for (scope, (axis, p, q)), (name, levels) in itertools.product(scopes.items(), {"int8": 127, "int4": 7}.items()):
        if (p.size if axis is None else p.shape[axis] if p.ndim == 2 else 0) < ROWS:
            continue
        low, high = q.min(axis=axis, keepdims=True), q.max(axis=axis, keepdims=True)
        if _is_on_grid(p, q, np.maximum(high, -low) / levels):
            return f"rounded to {name} with one scale for {scope}"
        if _is_on_grid(p, q, (high - low) / (2 * levels + 1), low):
            return f"rounded to {name} with one scale and one offset for {scope}"
    return None


def converts_to(x: np.ndarray, y: np.ndarray, name: str) -> bool:
    """Return whether y is x after it was rounded to a dtype."""
    return np.array_equal(x.astype(_format(name)).astype(y.dtype), y)


def _is_within(x: np.ndarray, y: np.ndarray, relative: float, absolute: float) -> Any:
    return (np.abs(x - y) <= relative * np.maximum(np.abs(x), np.abs(y)) + absolute).all()


def _becomes(x: np.ndarray, y: np.ndarray, fn: Callable[..., np.ndarray], *args: Any) -> bool:
    return np.array_equal(fn(x, *args), y)


def is_near(x: np.ndarray, y: np.ndarray) -> Any:
    """Return whether y may be x in a coarser format: the coarsest are float8_e5m2 and int4."""
    return (np.abs(x - y) <= 0.126 * np.abs(x) + np.abs(x).max(initial=0.0) / 6).all()


def _is_on_grid(x: np.ndarray, y: np.ndarray, scale: np.ndarray, offset: np.ndarray | float = 0.0) -> bool:
    """Return whether y has the multiples of its scale, plus an offset, that are nearest to x.

    A multiple is accepted with a tolerance, because a tie of x may have been rounded either way.
    """
    scales, offsets = (np.broadcast_to(each, x.shape) for each in (scale, offset))
    for (p, q), (s, zero) in zip(blocks(x, y), blocks(scales, offsets), strict=True):
        multiple = np.divide(q - zero, s, out=np.zeros_like(q), where=s > 0)
        if not ((np.abs(multiple - np.rint(multiple)) < 1e-3) & (np.abs(p - q) <= 0.5001 * s)).all():
            return False
    return True


def _mantissa_bits(y: np.ndarray) -> int | None:
    """Return how many bits after the binary point the elements of a float32 array need at most."""
    if y.dtype != np.float32:
        return None
    used = 0
    for block, _ in blocks(*np.atleast_1d(y, y)):
        used |= int(np.bitwise_or.reduce(np.ascontiguousarray(block).view(np.uint32).reshape(-1) & 0x7FFFFF))
        if used & 1:
            return 23
    return 23 - ((used & -used).bit_length() - 1) if used else 0


def _to_nearest(x: np.ndarray, bits: int) -> np.ndarray:
    shift, word = 23 - bits, np.ascontiguousarray(x).view(np.uint32)
    return ((word + (1 << (shift - 1)) - 1 + ((word >> shift) & 1)) >> shift << shift).view(np.float32)


def _away(x: np.ndarray, bits: int) -> np.ndarray:
    shift, word = 23 - bits, np.ascontiguousarray(x).view(np.uint32)
    return ((word + (1 << (shift - 1))) >> shift << shift).view(np.float32)


def _cut(x: np.ndarray, bits: int) -> np.ndarray:
    shift, word = 23 - bits, np.ascontiguousarray(x).view(np.uint32)
    return (word >> shift << shift).view(np.float32)


def q8_0(x: np.ndarray) -> np.ndarray:
    """Return an array after a round trip through Q8_0, GGUF's format of blocks: [..., n], n a multiple of 32.

    A block of 32 elements is stored as 32 integers and a scale, float16: the largest magnitude divided by 127. An
    element is rounded to the nearest multiple of the scale before the scale itself is rounded; ties are rounded away
    from zero.
    """
    a = x.reshape(*x.shape[:-1], -1, ROWS).astype(np.float32)
    scale = np.abs(a).max(axis=-1, keepdims=True) / np.float32(127)
    multiple = np.abs(a * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0))
    whole = np.floor(multiple)
    nearest: np.ndarray = np.copysign(whole + (multiple - whole >= 0.5), a)
    nearest *= scale.astype(np.float16).astype(np.float32)
    return nearest.reshape(x.shape)
