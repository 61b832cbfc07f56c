"""The correctly rounded results of each gradient, a second time: its definition, computed with FLINT's balls.

The definitions are those in portable_gpt2.gradients, which other tests compare with complex steps. They share no code
with portable_gpt2.correct_rounding.
"""

from fractions import Fraction

import flint
import numpy as np
from oracle import rounded

import portable_gpt2 as pg
from portable_gpt2 import gradients

MOST = 8000  # bits, which are 2,400 digits: a number that they do not decide is a tie


def interval(ball):
    """Return the end points of a ball as fractions. An end point below 2^-10000 in magnitude becomes 2^-300.

    FLINT's precision must be larger than that of the ball.
    """
    if isinstance(ball, float | np.floating):
        return Fraction(float(ball)), Fraction(float(ball))
    middle, radius = ball.mid(), ball.rad()
    found = []
    for end in (middle - radius, middle + radius):
        mantissa, exponent = map(int, end.mid().man_exp())
        sign = (mantissa > 0) - (mantissa < 0)
        is_tiny = exponent + mantissa.bit_length() < -10_000
        found.append(Fraction(sign) / 2**300 if is_tiny else mantissa * Fraction(2) ** exponent)
    return tuple(found)


def intervals(name, arrays, options, bits=400):
    """Return an interval for each element of each result, by the name of the result."""
    backend = pg.get_backend("flint")
    with backend.working_precision(bits):
        given = [None if a is None else backend.from_numpy(a) for a in arrays]
        found = getattr(gradients, name).__wrapped__(*given, **options)
    before, flint.ctx.prec = flint.ctx.prec, 2 * bits
    try:
        result = {}
        for key, x in found.items():
            result[key] = np.empty(x.values.shape, object)
            for i in np.ndindex(x.values.shape):
                result[key][i] = interval(x.values[i])
        return result
    finally:
        flint.ctx.prec = before


def correct(name, arrays, options):
    """Return each result, correctly rounded."""
    found = {}
    for bits in (200, 2000, MOST):
        for key, pairs in intervals(name, arrays, options, bits).items():
            a = found.setdefault(key, np.full(pairs.shape, np.nan, np.float32))
            for i in np.argwhere(np.isnan(a)):
                low, high = map(rounded, pairs[tuple(i)])
                if low == high or bits == MOST:
                    a[tuple(i)] = low if low == high else rounded(_middle(low, high))
        if not any(np.isnan(a).any() for a in found.values()):
            return found
    raise AssertionError


def _middle(a, b):
    """Return the number halfway between two results."""
    if a < 0:
        return -_middle(-b, -a)
    return Fraction(2) ** -126 - Fraction(2) ** -150 if a == 0 else (Fraction(float(a)) + Fraction(float(b))) / 2
