"""Intervals of any precision, with the decimal numbers of Python's standard library.

An interval has a lower and an upper end, which are ``decimal.Decimal`` numbers. ``+ - * /`` round the lower end down
and the upper end up. The standard library's ``exp``, ``ln`` and ``sqrt`` round correctly to the nearest number, so the
exact result is between the two neighbours of the rounded number. Float64 numbers are decimal numbers exactly.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from .rounding import terms, to_odd

__all__ = ["Decimals", "Interval", "exact_dot"]

_INFINITY = Decimal("Infinity")
_EXACT = decimal.Context(
    prec=10_000, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[decimal.Inexact, decimal.InvalidOperation]
)


class Interval:
    """An array of intervals, in the arithmetic that computes with them.

    Parameters
    ----------
    lower, upper : array
        The ends, of dtype object. They are infinite if nothing is known.
    arithmetic : Decimals
        The precision, and the directions in which results are rounded.
    """

    __slots__ = ("arithmetic", "lower", "upper")
    __array_ufunc__ = None

    def __init__(self, lower: Any, upper: Any, arithmetic: Decimals) -> None:
        self.lower, self.upper, self.arithmetic = np.asarray(lower, object), np.asarray(upper, object), arithmetic

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lower[index], self.upper[index], self.arithmetic)

    def __neg__(self) -> Interval:
        return Interval(_each(Decimal.copy_negate, self.upper), _each(Decimal.copy_negate, self.lower), self.arithmetic)

    def __add__(self, other: Interval) -> Interval:
        down, up = self.arithmetic.contexts
        return Interval(
            _each(down.add, self.lower, other.lower), _each(up.add, self.upper, other.upper), self.arithmetic
        )

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        down, up = self.arithmetic.contexts
        return self._pairs(other, down.multiply, up.multiply)

    def __truediv__(self, other: Interval) -> Interval:
        down, up = self.arithmetic.contexts
        return self._pairs(other, down.divide, up.divide, divides=True)

    def _pairs(
        self,
        other: Interval,
        down: Callable[[Decimal, Decimal], Decimal],
        up: Callable[[Decimal, Decimal], Decimal],
        divides: bool = False,
    ) -> Interval:
        """Return the smallest and the largest result of an operation on the ends, in both directions of rounding."""

        def ends(a: Decimal, b: Decimal, c: Decimal, d: Decimal) -> tuple[Decimal, Decimal]:
            if not (a.is_finite() and b.is_finite() and c.is_finite() and d.is_finite()) or (divides and c <= 0 <= d):
                return -_INFINITY, _INFINITY
            pairs = {(x, y) for x in (a, b) for y in (c, d)}
            return min(down(x, y) for x, y in pairs), max(up(x, y) for x, y in pairs)

        found = np.frompyfunc(ends, 4, 2)(self.lower, self.upper, other.lower, other.upper)
        return Interval(found[0], found[1], self.arithmetic)

    def exp(self) -> Interval:
        """Return the exponentials."""
        return self._monotone(lambda context: context.exp)

    def log(self) -> Interval:
        """Return the logarithms of positive numbers."""
        return self._monotone(lambda context: lambda x: context.ln(x) if x > 0 else -_INFINITY)

    def sqrt(self) -> Interval:
        """Return the square roots of positive numbers."""
        return self._monotone(lambda context: lambda x: context.sqrt(x) if x > 0 else Decimal(0))

    def _monotone(self, function: Callable[[decimal.Context], Callable[[Decimal], Decimal]]) -> Interval:
        """Apply an increasing function that rounds to the nearest number to the ends, and step to the neighbours."""
        down, up = self.arithmetic.contexts
        lower = _each(lambda x: down.next_minus(function(down)(x)), self.lower)
        return Interval(lower, _each(lambda x: up.next_plus(function(up)(x)), self.upper), self.arithmetic)

    def sum(self) -> Interval:
        """Return the sums along the last axis."""
        down, up = self.arithmetic.contexts

        def along(context: decimal.Context, ends: np.ndarray) -> np.ndarray:
            found = np.empty(ends.shape[:-1], object)
            for i in np.ndindex(found.shape):
                found[i] = functools.reduce(context.add, ends[i], Decimal(0))
            return found

        return Interval(along(down, self.lower), along(up, self.upper), self.arithmetic)

    def only(self, is_kept: np.ndarray) -> Interval:
        """Return the numbers where is_kept is true, and 0 elsewhere."""
        zero = np.asarray(Decimal(0), object)
        return Interval(np.where(is_kept, self.lower, zero), np.where(is_kept, self.upper, zero), self.arithmetic)

    @property
    def approximate(self) -> np.ndarray:
        """Numbers in the intervals."""
        return self.lower

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 numbers below and above which the number does not lie, rounded to odd."""
        lower, upper = (
            to_odd(*(part.astype(np.float64) for part in np.frompyfunc(_float, 1, 2)(ends)))
            for ends in (self.lower.ravel(), self.upper.ravel())
        )
        return lower.reshape(self.lower.shape), upper.reshape(self.upper.shape)

    def sign(self) -> int | None:
        """Return the sign of a single number; None if it is not known."""
        lower, upper = self.lower[()], self.upper[()]
        return 1 if lower > 0 else -1 if upper < 0 else 0 if lower == upper else None


def _each(function: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """Apply a function to each element."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), object)


def _float(x: Decimal) -> tuple[float, int]:
    """Return the float64 number that is nearest to a decimal number, and the sign of the remainder."""
    high = float(x)
    return high, x.compare(Decimal(high)).__int__()


class Decimals:
    """The arithmetic of `Interval`, with a number of decimal digits.

    Parameters
    ----------
    digits : int
        The precision to which results are rounded. Numbers that are given are exact, whatever their precision.
    """

    def __init__(self, digits: int) -> None:
        self.contexts = tuple(
            decimal.Context(prec=digits, rounding=rounding, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
            for rounding in (decimal.ROUND_FLOOR, decimal.ROUND_CEILING)
        )

    def number(self, a: Any) -> Interval:
        """Return numbers as intervals that contain nothing else."""
        ends = _each(Decimal, a)
        return Interval(ends, ends, self)

    def dot(self, a: np.ndarray, b: np.ndarray, plus: np.ndarray | None = None) -> Interval:
        """Return the sums of products of float32 numbers along the last axis, plus a float32 number, exactly."""
        ends = exact_dot(a, b, plus)
        return Interval(ends, ends, self)


def exact_dot(a: np.ndarray, b: np.ndarray, plus: np.ndarray | None = None) -> np.ndarray:
    """Return the exact sums of products of float32 numbers along the last axis, plus a number, as decimal numbers.

    A product of two float32 numbers is a float64 number. ``math.fsum`` rounds a sum of float64 numbers correctly, so
    the sums of the terms, of the terms and minus the first sum, and so on, are the digits of the exact sum.

    Examples
    --------
    >>> exact_dot(np.asarray([2.0**60, 1, -(2.0**60)]), np.asarray([1.0, 0.5, 1.0]))
    array(Decimal('0.5'), dtype=object)
    """
    products = terms(a, b, plus)
    found = np.empty(products.shape[:-1], object)
    for i in np.ndindex(found.shape):
        parts, total = products[i].tolist(), Decimal(0)
        while part := math.fsum(parts):
            total = _EXACT.add(total, Decimal(part))
            parts.append(-part)
        found[i] = total
    return found
