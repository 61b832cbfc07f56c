"""exp and log of float64 numbers, rounded correctly, and so with the same bits on every processor.

The last bit of NumPy's own functions depends on the instructions that the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal

import numpy as np

from .balls import Ball, DoubleDouble

_CONTEXT = Context(prec=60, Emax=10**6, Emin=-(10**6))
"""60 digits, or 199 bits, decide. 158 bits are enough for exp and 118 for log, for every float64 number.

Lefèvre and Muller, "Worst cases for correct rounding of the elementary functions in double precision", ARITH-15, 2001.
"""


def log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithms of positive finite numbers, float64.

    Examples
    --------
    >>> log(np.asarray([1.0, 2.0]))
    array([0.        , 0.69314718])
    """
    return _nearest(DoubleDouble().number(x).log(), x, Decimal.ln)


def exp(x: np.ndarray) -> np.ndarray:
    """Return the exponentials of numbers that are at most 0, float64. They are 0 below -600.

    Examples
    --------
    >>> exp(np.asarray([0.0, -1.0, -np.inf]))
    array([1.        , 0.36787944, 0.        ])
    """
    found = np.zeros(x.shape)
    is_large = x > -600
    found[is_large] = _nearest(DoubleDouble().number(x[is_large]).exp(), x[is_large], Decimal.exp)
    return found


def _nearest(ball: Ball, x: np.ndarray, function: Callable[[Decimal, Context], Decimal]) -> np.ndarray:
    """Return the float64 numbers nearest to the elements of a ball, which encloses a function of x."""
    margin = ball.error * (1 + 2.0**-50) + abs(ball.low) * 2.0**-52
    low: np.ndarray
    low, high = ball.high + (ball.low - margin), ball.high + (ball.low + margin)
    for i in np.flatnonzero(low != high):
        low.flat[i] = float(function(Decimal(float(x.flat[i])), _CONTEXT))
    return low
