"""Strategies for arrays with any number of axes, including empty axes, any magnitude, and any memory layout."""

import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from ..numerics import bounds

_SHAPES = [(), (5,), (0,), (3, 4), (2, 1, 2, 1, 3), (1,), (1, 17), (4, 0), (2, 3, 2), (2, 1, 0, 3), (1, 2, 2, 3)]
"""The shapes of a fast run. A thorough run uses any."""

_COMPILES = [False]


def compile_per_shape(backend: Any) -> None:
    """Draw fewer shapes from now on if a backend compiles for each new one, which takes most of the time of a test."""
    _COMPILES[0] = backend is not None and backend.compiles_per_shape


def _is_thorough() -> bool:
    profile: str = hypothesis.settings.get_current_profile_name()
    return profile.endswith("thorough")


def fewer(test: Any) -> Any:
    """Run a test with two fifths of the examples: its property follows from a bound that has a test of its own."""
    return hypothesis.settings(max_examples=max(1, hypothesis.settings().max_examples * 2 // 5))(test)


# For a test of the dtypes in which ops compute. Arrays of 16-bit dtypes are converted to float32.
wide_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"], scope="module")
narrow_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"], scope="module")

LAYOUTS = ["C", "Fortran", "transposed", "strided", "reversed", "read-only"]


def takes(backend: Any, dtype: str) -> bool:
    """Return whether a backend has a dtype. JAX has int64 and float64 only with JAX_ENABLE_X64=1."""
    try:
        backend.from_numpy(np.zeros(1, bounds.host_dtype(dtype)))
    except TypeError:
        return False
    return True


@functools.cache
def integer_dtypes(backend: Any) -> list[str]:
    """Return the integer dtypes that a backend has."""
    return [dtype for dtype in ("int8", "uint8", "int16", "int32", "int64") if takes(backend, dtype)]


def shapes(*, least: int = 0, most: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Return a strategy for shapes with `least` to `most` axes, any of which may have length 0."""
    few = [shape for shape in _SHAPES if least <= len(shape) <= most]
    return cases(few, hnp.array_shapes(min_dims=least, max_dims=most, min_side=0, max_side=4))


def lengths(few: list[int], *, most: int, least: int = 0) -> st.SearchStrategy[int]:
    """Return a strategy for the lengths in `few`; in a thorough run, for all lengths from `least` to `most`."""
    return cases(few, st.integers(least, most))


def cases(few: list, rest: st.SearchStrategy) -> st.SearchStrategy:
    """Return a strategy for the cases in `few`; in a thorough run, also for those of another strategy.

    For a backend that compiles for each new shape, it draws the first five.
    """
    if _is_thorough():
        return st.sampled_from(few) | rest
    return st.sampled_from(few[:5] if _COMPILES[0] else few)


@st.composite
def floats(draw, shape: tuple[int, ...], dtype: str, *, largest: float | None = None) -> np.ndarray:
    """Draw finite numbers, including zeros and subnormals, of magnitude up to `largest` (default: any).

    hypothesis draws each number, or only a seed. With a seed, the numbers have a normal distribution with a random mean
    and width, or exponents that are uniformly distributed over those of the dtype.
    """
    host = bounds.host_dtype(dtype)
    limits = ml_dtypes.finfo(host)
    top = float(limits.max) if largest is None else min(largest, float(limits.max))
    high = int(np.log2(top))
    low = int(limits.minexp) - int(limits.nmant)
    size = int(np.prod(shape))
    kind = draw(st.sampled_from(["normal", "normal", "every exponent", "one by one"]))
    if kind == "one by one" and size <= 24:
        a = draw(hnp.arrays(np.float64, shape, elements=st.floats(-top, top)))
    else:
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        if kind == "every exponent":
            a = random.choice([-1.0, 1.0], shape) * 2.0 ** random.uniform(low, high, shape)
        else:
            width = 2.0 ** draw(st.integers(max(-12, low), min(9, high - 3)))
            mean = draw(st.sampled_from([0.0, 0.0, 1.0, -7.0, 100.0])) * width
            a = random.normal(mean, width, shape)
    return np.asarray(np.clip(a, -top, top)).astype(host)


@st.composite
def laid_out(draw, a: np.ndarray) -> np.ndarray:
    """Draw an array with the same elements in another memory layout, or read-only."""
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "Fortran":
        a = np.asfortranarray(a)
    elif layout == "transposed" and a.ndim:
        a = np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)
    elif layout == "strided" and a.ndim:
        wide = np.ones((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        a = wide[..., ::2]
    elif layout == "reversed" and a.ndim:
        a = np.ascontiguousarray(a[::-1, ..., ::-1] if a.ndim > 1 else a[::-1])
        a = a[::-1, ..., ::-1] if a.ndim > 1 else a[::-1]
    elif layout == "read-only":
        a = a.copy()
        a.flags.writeable = False
    return a


def arrays(shape: tuple[int, ...], dtype: str, *, largest: float | None = None) -> st.SearchStrategy[np.ndarray]:
    """Return a strategy for the arrays of `floats`, in any memory layout."""
    return floats(shape, dtype, largest=largest).flatmap(laid_out)
