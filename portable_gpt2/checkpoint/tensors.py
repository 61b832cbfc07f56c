"""Read tensors and parts of them from a file, convert and transpose them, and look for NaN and infinity."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..host import StoredTensor, float_dtypes, lengths, whole
from ..registry import backend_of

_BUFFER = 1 << 20  # bytes


class OpenFile:
    """An open file, from which tensors are read. It is closed when the last reference to this object is deleted."""

    def __init__(self, file: Path) -> None:
        self.stream = file.open("rb", buffering=0)
        self._lock = threading.Lock()  # because all threads share the position in the stream
        weakref.finalize(self, self.stream.close)

    def read(self, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return a copy of a tensor, which a later change of the file does not affect."""
        a = np.empty(shape, dtype)
        self._fill(a, start)
        return a

    def tensor(self, start: int, shape: tuple[int, ...], dtype: str) -> StoredTensor:
        """Return the tensor that begins at byte `start`. Its parts can be read."""

        def read_part(index: tuple[slice, ...]) -> np.ndarray:
            a = np.empty(lengths(index), float_dtypes[dtype])
            if a.size:
                self._fill_part(a, start, shape, index)
            return a

        return by_parts(shape, dtype, read_part)

    def _fill_part(self, a: np.ndarray, start: int, shape: tuple[int, ...], index: tuple[slice, ...]) -> None:
        """Read a part of a tensor into a contiguous array. The part has at least one element.

        Rows are the items along the first axis. If the part has whole rows, it is contiguous in the file. Otherwise
        small rows are read whole, many at a time, and large ones one by one.
        """
        row = math.prod(shape[1:]) * a.itemsize
        first, stop = (index[0].start, index[0].stop) if index else (0, 1)
        if index[1:] == whole(shape[1:]):
            self._fill(a, start + first * row)
        elif row > _BUFFER:
            for i in range(first, stop):
                self._fill_part(a[i - first], start + i * row, shape[1:], index[1:])
        else:
            n = _BUFFER // row
            for i in range(first, stop, n):
                to = a[i - first : i - first + n]
                to[...] = self.read(start + i * row, (len(to), *shape[1:]), a.dtype)[(slice(None), *index[1:])]

    def _fill(self, a: np.ndarray, start: int) -> None:
        """Read a contiguous array."""
        rest = a.reshape(-1).view(np.uint8).data
        with self._lock:
            self.stream.seek(start)
            while rest and (n := self.stream.readinto(rest)):  # one call reads at most 2 GiB on Linux
                rest = rest[n:]
        if rest:
            raise EOFError(f"the file ends {len(rest)} bytes too early; it has become shorter since it was opened")


def stored(x: Any) -> StoredTensor:
    """Return an array of any backend as a tensor that can be written to a file."""
    backend = backend_of(x)
    return StoredTensor(backend.shape(x), str(backend.dtype_names.get(x.dtype)), lambda: backend.to_numpy(x))


def by_parts(shape: tuple[int, ...], dtype: str, read_part: Callable[[tuple[slice, ...]], np.ndarray]) -> StoredTensor:
    """Return a tensor that is read by a function of the index of a part."""
    return StoredTensor(shape, dtype, functools.partial(read_part, whole(shape)), read_part)


def mapped(
    tensor: StoredTensor, function: Callable[[np.ndarray], np.ndarray], dtype: str | None = None
) -> StoredTensor:
    """Return a tensor to whose elements a function is applied when they are read.

    The function gets an array of all elements or of a part. It may change their dtype, or raise an error.
    """
    return by_parts(tensor.shape, dtype or tensor.dtype, lambda index: function(tensor.part(index)))


def transposed(tensor: StoredTensor) -> StoredTensor:
    """Return a tensor with its axes in reverse order."""
    return by_parts(tensor.shape[::-1], tensor.dtype, lambda index: np.asarray(tensor.part(index[::-1]).T, order="C"))


def without_leading_axes(tensor: StoredTensor, n_axes: int) -> StoredTensor:
    """Return a tensor with its last `n_axes` axes. The axes before them must have length 1."""
    n = len(tensor.shape) - n_axes
    return by_parts(
        tensor.shape[n:], tensor.dtype, lambda index: tensor.part((slice(1),) * n + index).reshape(lengths(index))
    )


def cast(path: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
    """Return a tensor whose values are converted to another dtype when it is read.

    Reading raises a ValueError if a value is beyond the range of that dtype.
    """

    def converted(a: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            a = a.astype(float_dtypes[dtype])
        if not is_finite(a):
            raise ValueError(f"{path} holds values beyond the range of {dtype}")
        return a

    return tensor if dtype == tensor.dtype else mapped(tensor, converted, dtype)


def is_finite(a: np.ndarray) -> bool:
    """Return whether no element is NaN or infinite.

    The bits of a NaN, read as an integer, are greater than those of an infinity of the same sign. So the maximum of the
    elements as signed integers finds a positive NaN or infinity, and their maximum as unsigned integers finds a
    negative NaN or infinity. Nothing is copied. The array is read in blocks of rows, so that the second maximum finds a
    block in the processor's cache: 124M parameters take 47 ms instead of 65.
    """
    if not a.size:
        return True
    infinity, signed, unsigned = np.asarray(np.inf, a.dtype), f"i{a.itemsize}", f"u{a.itemsize}"
    largest, largest_negative = infinity.view(signed), np.negative(infinity).view(unsigned)
    a = np.atleast_1d(a)
    n = 1 + (1 << 16) * len(a) // a.size
    blocks = (a[i : i + n] for i in range(0, len(a), n))
    return all(b.view(signed).max() < largest and b.view(unsigned).max() < largest_negative for b in blocks)
