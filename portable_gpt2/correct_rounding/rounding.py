"""Rounding to float32, as the mode of correct rounding defines it: subnormal numbers count as 0, and zeros are +0."""

from __future__ import annotations

import numpy as np

__all__ = ["FLUSHED", "SMALLEST", "adjacent", "chosen", "nearest", "terms", "threshold", "to_odd"]

SMALLEST = 2.0**-126
"""The smallest positive normal float32 number."""
FLUSHED = 2.0**-126 - 2.0**-150
"""The smallest magnitude that does not become 0: the midpoint between `SMALLEST` and the largest subnormal number."""


def chosen(a: np.ndarray, at: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return a copy of chosen rows of a float32 array, in which subnormal numbers are 0.

    Parameters
    ----------
    a : float32 array
        The array.
    at : tuple of int arrays [rows]
        Indices into the leading axes. If there are none, the array is the only row.

    Returns
    -------
    float32 array [rows, ...]

    Examples
    --------
    >>> chosen(np.asarray([1e-39, 1.0, np.nan], np.float32), (np.asarray([2, 0]),))
    array([nan,  0.], dtype=float32)
    """
    found = a[at] if at else a[None].copy()
    found[np.abs(found) < SMALLEST] = 0
    return found


def terms(a: np.ndarray, b: np.ndarray, plus: np.ndarray | None = None) -> np.ndarray:
    """Return the terms of dot products of float32 numbers along the last axis, exactly, as float64.

    Parameters
    ----------
    a, b : float32 arrays [..., n]
        The factors, whose shapes broadcast. A product of two float32 numbers has 48 bits, and float64 has 53.
    plus : float32 array [...], optional
        A number that is added to each dot product: its last term.

    Examples
    --------
    >>> terms(np.ones((1, 2), np.float32), np.ones(2, np.float32), np.asarray([3], np.float32))
    array([[1., 1., 3.]])
    """
    shape = np.broadcast_shapes(a.shape, b.shape)
    found = np.empty((*shape[:-1], shape[-1] + (plus is not None)))
    np.multiply(a, b, out=found[..., : shape[-1]], dtype=np.float64)
    if plus is not None:
        found[..., -1] = plus
    return found


def to_odd(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return high + low as float64, rounded to odd: exactly, or the neighbouring number whose last bit is 1.

    Every float32 number and every midpoint between two of them is a float64 number whose last bit is 0. So the result
    is on the same side of each of them as the exact sum, and `nearest` of the result is that of the exact sum (Boldo
    and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE
    Transactions on Computers 57(4), 2008).

    Parameters
    ----------
    high : float64 array
        The float64 number that is nearest to the sum.
    low : float64 array
        The remainder, of which only the sign matters.

    Examples
    --------
    >>> to_odd(np.asarray([1.0, 1.0]), np.asarray([0.0, 1e-30])) - 1
    array([0.00000000e+00, 2.22044605e-16])
    """
    high, low = np.asarray(high, np.float64), np.asarray(low, np.float64)
    is_even = high.view(np.int64) % 2 == 0
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        found: np.ndarray = np.where(
            is_even & ((low > 0) | (low < 0)), np.nextafter(high, np.copysign(np.inf, low)), high
        )
    return found


def nearest(x: np.ndarray) -> np.ndarray:
    """Return the float32 numbers that are nearest to float64 numbers; see `to_odd` for other real numbers.

    Ties go to even. A magnitude of at least 2^128 - 2^103 becomes infinite, and one below `FLUSHED` becomes 0.

    Examples
    --------
    >>> nearest(np.asarray([1 + 2.0**-24, -1e-39, 2.0**128 - 2.0**103]))
    array([ 1.,  0., inf], dtype=float32)
    """
    with np.errstate(over="ignore"):
        found: np.ndarray = np.where(np.abs(x) < FLUSHED, 0.0, x).astype(np.float32)
    return found


def adjacent(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether b is the next larger result of `nearest` after a.

    Examples
    --------
    >>> adjacent(np.asarray([0, 1], np.float32), np.asarray([2.0**-126, 1.5], np.float32))
    array([ True, False])
    """
    with np.errstate(under="ignore", over="ignore"):
        following = np.nextafter(a, np.float32(np.inf))
    subnormal = np.abs(following) < SMALLEST  # the neighbours of 0 are the smallest normal numbers
    following = np.where(subnormal, np.where(a < 0, 0, SMALLEST), following).astype(np.float32)
    found: np.ndarray = following == b
    return found


def threshold(a: float, b: float) -> float:
    """Return the number at which the result of `nearest` changes from a to b, its next larger result.

    Examples
    --------
    >>> threshold(1.0, 1 + 2.0**-23) == 1 + 2.0**-24
    True
    """
    if a < 0:
        return -threshold(-b, -a)
    if a == 0:
        return FLUSHED
    return 2.0**128 - 2.0**103 if b == np.inf else (float(a) + float(b)) / 2
