"""Data on the host, for the package and its adapters: dtypes by name, tensors in files, bounds of exact values."""

from __future__ import annotations

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


class StoredTensor(NamedTuple):
    """A tensor in a file. Its shape and dtype are known; calling `read` reads its values."""

    shape: tuple[int, ...]
    dtype: str
    """``float32``, ``float64``, ``bfloat16`` or ``float16``; for any other dtype, the file's own name for it."""
    read: Callable[[], np.ndarray]
    """Returns an array of this shape and dtype. It may raise any Exception."""


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
