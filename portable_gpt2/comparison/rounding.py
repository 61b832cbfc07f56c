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
_SCOPES = {"the tensor": None, "each row": 1, "each column": 0}  # what shares a scale, and the axis of its elements


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
        if everywhere(_converts_to, p, q, name):
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
        if everywhere(_converts_to, x, y, name):
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
    for scope, axis in _SCOPES.items():
        if (axis is None and x.size >= ROWS) or (axis is not None and x.ndim == 2 and x.shape[axis] >= ROWS):
            largest = np.maximum(y.max(axis=axis, keepdims=True), -y.min(axis=axis, keepdims=True))
            for name, levels in {"int8": 127, "int4": 7}.items():
                if _is_on_grid(x, y, largest / levels):
                    return f"rounded to {name} with one scale for {scope}"
    return None


def _converts_to(x: np.ndarray, y: np.ndarray, name: str) -> bool:
    return np.array_equal(x.astype(_format(name)).astype(y.dtype), y)


def _is_within(x: np.ndarray, y: np.ndarray, relative: float, absolute: float) -> Any:
    return (np.abs(x - y) <= relative * np.maximum(np.abs(x), np.abs(y)) + absolute).all()


def _becomes(x: np.ndarray, y: np.ndarray, fn: Callable[..., np.ndarray], *args: Any) -> bool:
    return np.array_equal(fn(x, *args), y)


def is_near(x: np.ndarray, y: np.ndarray) -> Any:
    """Return whether y may be x in a coarser format: the coarsest are float8_e5m2 and int4."""
    return (np.abs(x - y) <= 0.126 * np.abs(x) + np.abs(x).max(initial=0.0) / 6).all()


def _is_on_grid(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> bool:
    """Return whether y has the multiples of its scale that are nearest to x.

    A multiple is accepted with a tolerance, because a tie of x may have been rounded either way.
    """
    scales = np.broadcast_to(scale, x.shape)
    for (p, q), (s, _) in zip(blocks(x, y), blocks(scales, y), strict=True):
        multiple = np.divide(q, s, out=np.zeros_like(q), where=s > 0)
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
