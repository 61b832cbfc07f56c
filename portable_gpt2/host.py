"""Data on the host, for the package and its adapters: dtypes by name, tensors in files, bounds of exact values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

float_dtypes = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float64", "float32", "float16", "bfloat16")
}
"""NumPy's floating dtypes by name; bfloat16 comes from ml_dtypes."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read as a GPT-2. The message names the file, and the tensor if one is at fault."""


class TokenizerError(CheckpointError):
    """The tokenizer of a checkpoint cannot be used, but its weights can, with token ids. The message says why."""


class ProcessLost(RuntimeError):
    """Another process of a mesh has ended, or does not answer. The message says what this process waited for."""


TIMEOUT_VARIABLE = "PORTABLE_GPT2_MESH_TIMEOUT"


def mesh_timeout() -> float:
    """Return the seconds for which a process of a mesh waits for the others: PORTABLE_GPT2_MESH_TIMEOUT, or 600.

    Raises
    ------
    ValueError
        If the variable is not a number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise ValueError(f"{TIMEOUT_VARIABLE} is {text!r}; expected a number of seconds above 0 and below a million")
    return seconds


class StoredTensor(NamedTuple):
    """A tensor in a file. Its shape and dtype are known; calling `read` reads its values."""

    shape: tuple[int, ...]
    dtype: str
    """``float32``, ``float64``, ``bfloat16`` or ``float16``; for any other dtype, the file's own name for it."""
    read: Callable[[], np.ndarray]
    """Returns an array of this shape and dtype. It may raise any Exception."""
    read_part: Callable[[tuple[slice, ...]], np.ndarray] | None = None
    """Returns a part, as a contiguous array of its own, without reading the rest; None if the file does not allow this.

    `part` calls it with one slice for each axis. Each has a start and a stop within the axis, and no step.
    """

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return ``read()[index]`` as a contiguous array. Little more than this part is read where the file allows it.

        This is so for safetensors files and for the tensors of GGUF files that are not quantized. Reading takes the
        memory of the part and a buffer of at most 1 MiB; a part that is also converted or transposed is in memory twice
        meanwhile. For other files, the whole tensor is read.

        Parameters
        ----------
        index : tuple of slice
            At most one slice for each axis, with step 1. Missing slices stand for whole axes.

        Returns
        -------
        np.ndarray
            The part, which may be empty.

        Raises
        ------
        ValueError
            If the index has too many items, or one that is not a slice of step 1.
        Exception
            Whatever `read` raises. Only the values that are read are looked at for NaN and infinity.

        Examples
        --------
        >>> import numpy as np
        >>> from portable_gpt2.host import StoredTensor
        >>> tensor = StoredTensor((2, 3), "float32", lambda: np.arange(6, dtype=np.float32).reshape(2, 3))
        >>> tensor.part((slice(None), slice(1, 3)))
        array([[1., 2.],
               [4., 5.]], dtype=float32)
        """
        if len(index) > len(self.shape) or any(not isinstance(s, slice) or s.step not in (None, 1) for s in index):
            raise ValueError(f"the index of a part is {index}; expected at most {len(self.shape)} slices with step 1")
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        bounds += [(0, n) for n in self.shape[len(index) :]]
        normal = tuple(slice(start, max(start, stop)) for start, stop in bounds)
        if self.read_part is not None:
            return self.read_part(normal)
        a = self.read()
        # A copy of a part does not keep the rest in memory.
        return np.asarray(a, order="C") if normal == whole(self.shape) else a[normal].copy()


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the index of all elements of a tensor, with which `StoredTensor.part` returns what `read` does."""
    return tuple(slice(0, n) for n in shape)


def lengths(index: tuple[slice, ...]) -> tuple[int, ...]:
    """Return the shape of a part, from the index that `StoredTensor.read_part` takes."""
    return tuple(s.stop - s.start for s in index)


def value_range(integers: np.ndarray) -> tuple[int, int]:
    """Return the smallest and the largest element of an integer array; (0, -1) if the array is empty."""
    return (int(integers.min()), int(integers.max())) if integers.size else (0, -1)


class Enclosure(NamedTuple):
    """Bounds of exact values: each value is at least `lower` and at most `upper`."""

    lower: np.ndarray
    """float64, rounded down."""
    upper: np.ndarray
    """float64, rounded up."""
    radius: np.ndarray
    """float64, rounded up: the distance of a value to the midpoint of its ball, which may have more bits than float64.

    It may therefore be far smaller than ``upper - lower``. It is infinite where nothing is known.
    """
