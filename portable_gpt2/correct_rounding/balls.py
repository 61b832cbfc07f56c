"""Balls of about 100 bits: arrays of float64 pairs, and rigorous bounds of their errors.

A number is represented by the sum of two float64 numbers, high + low, where |low| <= u |high| and u = 2^-53, and by a
bound of its error. Arithmetic follows Dekker, "A floating-point technique for extending the available precision",
Numer. Math. 18, 1971. Each operation adds a bound of its own error, which a comment derives, to the errors of its
operands. Quotients and square roots verify themselves: the bound follows from the remainder.

The bounds are computed in float64, with at most 10 roundings per operation. The factor `_UP` makes up for them, and for
the use of |high| as the magnitude of high + low. Numbers far below 2^-900 may underflow; `_TINY` exceeds the error.
Overflow gives NaN or an infinite bound, which decides nothing.
"""

from __future__ import annotations

import decimal
import functools
import math
from typing import Any

import numpy as np

from .rounding import terms, to_odd

__all__ = ["Ball", "DoubleDouble"]

_U = 2.0**-53
_UP = 1 + 2.0**-48
_TINY = 2.0**-960


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a + b, rounded, and the exact error of the rounding (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _split(a: Any) -> tuple[Any, Any]:
    """Return two numbers of at most 26 bits whose sum is a (Veltkamp)."""
    shifted = a * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - a)
    return high, a - high


def _two_product(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a b, rounded, and the exact error of the rounding (Dekker)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _sum(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sums of float64 numbers along the last axis, in two parts, and s. The array p is overwritten.

    The error of the sum of both parts is at most 1.01 n^2 u^2 s, where n is the number of terms. The first part is at
    most s, and the second at most n u s.

    Here s is a power of two that is at least 2 n |p| for all terms p. So q = (s + p) - s is a multiple of u s, differs
    from p by at most u s, and p - q is computed exactly. The sum of the q is exact in any order, because all partial
    sums are multiples of u s, and at most s. The sum of the n numbers p - q in any order has an error of at most
    1.01 n u times the sum of their magnitudes (Rump, Ogita and Oishi, "Accurate floating-point summation", SIAM J. Sci.
    Comput. 31(1), 2008).
    """
    n = p.shape[-1]
    size = np.maximum(p.max(axis=-1, initial=0), -p.min(axis=-1, initial=0))
    s = np.ldexp(1.0, np.frexp(size)[1] + (2 * max(n, 1)).bit_length())
    q = p + s[..., None]
    q -= s[..., None]
    p -= q
    return q.sum(axis=-1), p.sum(axis=-1), s


class Ball:
    """An array of balls: each contains a real number, at a distance of at most `error` from high + low.

    Parameters
    ----------
    high, low : float64 array
        The midpoint is the sum of both, and |low| <= u |high|.
    error : float64 array
        The radius. It is 0 for exact numbers, and infinite or NaN if nothing is known.
    """

    __slots__ = ("error", "high", "low")
    __array_ufunc__ = None  # a product with a NumPy array is that of this class

    def __init__(self, high: Any, low: Any, error: Any) -> None:
        self.high, self.low, self.error = high, low, error

    def __getitem__(self, index: Any) -> Ball:
        return Ball(self.high[index], self.low[index], self.error[index])

    def __neg__(self) -> Ball:
        return Ball(-self.high, -self.low, self.error)

    def __add__(self, other: Ball) -> Ball:
        # The roundings of low + low, of its sum with the error of the sum, in units of u^2 (|a| + |b|): 1 + 2.
        total, rest = _two_sum(self.high, other.high)
        high, low = _two_sum(total, rest + (self.low + other.low))
        own = 4 * _U**2 * (np.abs(self.high) + np.abs(other.high))
        return Ball(high, low, (self.error + other.error + own) * _UP)

    def __sub__(self, other: Ball) -> Ball:
        return self + -other

    def __mul__(self, other: Ball) -> Ball:
        # In units of u^2 |a b|: low low, which is left out, 1; the two products 1 each, their sum 2, the last sum 3.
        product, rest = _two_product(self.high, other.high)
        high, low = _two_sum(product, rest + (self.high * other.low + self.low * other.high))
        a, b = np.abs(self.high), np.abs(other.high)
        error = a * other.error + b * self.error + self.error * other.error + 16 * _U**2 * (a * b) + _TINY
        return Ball(high, low, error * _UP)

    def __truediv__(self, other: Ball) -> Ball:
        # |a / b - q| = |a - q b| / |b|, for all numbers a and b in the balls.
        first = self.high / other.high
        rest = self - other * _exactly(first)
        found = _exactly(*_two_sum(first, rest.high / other.high))
        divisor = (np.abs(other.high) - other.error) / _UP
        error = (self - found * other)._magnitude() / np.where(divisor > 0, divisor, np.nan)
        return Ball(found.high, found.low, error * _UP + _TINY)

    def sqrt(self) -> Ball:
        """Return the square roots."""
        # |sqrt(a) - s| = |a - s^2| / (sqrt(a) + s) <= |a - s^2| / s
        first = np.sqrt(self.high)
        rest = self - _exactly(first) * _exactly(first)
        found = _exactly(*_two_sum(first, rest.high / (2 * first)))
        return Ball(found.high, found.low, (self - found * found)._magnitude() / found.high * _UP**2 + _TINY)

    def exp(self) -> Ball:
        """Return the exponentials.

        With n the integer nearest to 1024 x / log 2, exp(x) = 2^(n / 1024) exp(r), and |r| <= 0.00034 < 2^-11.5. The
        powers of 2 are in a table. The Taylor series of exp(r) ends after degree 8. Float64 is enough for the terms
        from degree 3 on, t r^3 with t about 1/6: the relative error of this product is at most 2^-48, and the terms
        that are missing are below 2^-70 of it. The radius of r changes it by at most r^2 times the radius. So the
        relative error of the result is about 2^-84.
        """
        log2, powers = _constants()
        with np.errstate(invalid="ignore"):
            in_range = np.abs(self.high) <= 600
            n = np.where(in_range, np.rint(self.high * (1024 / math.log(2))), 0)
        x = Ball(np.where(in_range, self.high, 0), np.where(in_range, self.low, 0), np.zeros(np.shape(n)))
        r = x - _exactly(n) * log2
        t = np.full(np.shape(n), 1 / math.factorial(8))
        for k in range(7, 2, -1):
            t = t * r.high + 1 / math.factorial(k)
        r_squared = r.high * r.high
        t *= r_squared * r.high
        rest = Ball(t, np.zeros(np.shape(n)), (2.0**-48 * np.abs(t) + r_squared * r.error) * _UP)
        square = r * r
        half = Ball(square.high / 2, square.low / 2, square.error / 2)
        n = n.astype(np.int64)
        power = powers[n % 1024]
        found = power + power * (r + (half + rest))
        high, low, error = (np.ldexp(part, n // 1024) for part in (found.high, found.low, found.error))
        # exp(x + d) differs from exp(x) by at most exp(x) (exp(d) - 1), which is below 1.004 d exp(x) for d <= 2^-7.
        with np.errstate(invalid="ignore"):
            growth = np.where(self.error <= 2.0**-7, 1.01 * self.error, np.inf)
            error = (error + high * growth) * _UP
            # Far below the range, the result is between 0 and exp(-590) < 2^-850, if the argument is known well enough.
            is_zero = (self.high < -600) & (self.error <= 10)
        zero = np.where(in_range | is_zero, 1.0, np.nan)
        return Ball(
            np.where(in_range, high, 0 * zero), np.where(in_range, low, 0), np.where(in_range, error, 2.0**-850 * zero)
        )

    def log(self) -> Ball:
        """Return the logarithms of positive numbers."""
        # With y near log a and z = a exp(-y) - 1: log a = y + log(1 + z), and |log(1 + z) - z + z^2 / 2| <= |z|^3.
        y = _exactly(np.log(self.high))
        z = self * (-y).exp() - _exactly(np.ones(np.shape(self.high)))
        size = z._magnitude()
        half = _exactly(np.full(np.shape(size), 0.5))
        found = y + (z - half * z * z)
        return Ball(found.high, found.low, (found.error + np.where(size < 0.5, size**3, np.inf)) * _UP)

    def sum(self) -> Ball:
        """Return the sums along the last axis."""
        n = np.shape(self.high)[-1]
        if n > 256:  # the error below grows with the third power of n
            whole = n - n % 256
            shape = (*np.shape(self.high)[:-1], n // 256, 256)
            blocks = Ball(*(part[..., :whole].reshape(shape) for part in _parts(self)))
            return blocks.sum().sum() + self[..., whole:].sum()
        # `_sum` errs by 1.01 n^2 u^2 s, where s is at least 2 n |high|. The sum of the numbers low errs by at most
        # n u times the sum of their magnitudes, n u^2 s, and its addition to `rest` by (n + 1) u^2 s.
        total, rest, s = _sum(self.high.copy())
        high, low = _two_sum(total, rest + self.low.sum(axis=-1))
        return Ball(high, low, (self.error.sum(axis=-1) * (1 + n * _U) + 1.01 * (n + 1) ** 2 * _U**2 * s) * _UP)

    def only(self, is_kept: np.ndarray) -> Ball:
        """Return the numbers where is_kept is true, and 0 elsewhere."""
        return Ball(*(np.where(is_kept, part, 0) for part in _parts(self)))

    @property
    def approximate(self) -> Any:
        """The float64 numbers that are nearest to the midpoints."""
        return self.high

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 numbers below and above which the number does not lie, rounded to odd."""
        with np.errstate(invalid="ignore"):
            lower = np.where(self.error == 0, self.low, np.nextafter(self.low - self.error, -np.inf))
            upper = np.where(self.error == 0, self.low, np.nextafter(self.low + self.error, np.inf))
            return to_odd(*_two_sum(self.high, lower)), to_odd(*_two_sum(self.high, upper))

    def _magnitude(self) -> Any:
        """Return an upper bound of the magnitudes."""
        return (np.abs(self.high) + self.error) * _UP


def _parts(x: Ball) -> tuple[Any, Any, Any]:
    return x.high, x.low, x.error


def _exactly(high: Any, low: Any = None) -> Ball:
    """Return balls with a radius of 0."""
    high = np.asarray(high, np.float64)
    zeros = np.zeros(high.shape)
    return Ball(high, zeros if low is None else low, zeros)


@functools.cache
def _constants() -> tuple[Ball, Ball]:
    """Return log(2) / 1024, and the powers 2^(j / 1024) for j = 0 to 1023."""
    context = decimal.Context(prec=40)
    log2 = context.divide(context.ln(decimal.Decimal(2)), decimal.Decimal(1024))
    numbers = [log2, *(context.exp(context.multiply(log2, decimal.Decimal(j))) for j in range(1024))]
    high = np.asarray([float(x) for x in numbers])
    low = [float(context.subtract(x, decimal.Decimal(h))) for x, h in zip(numbers, high.tolist(), strict=True)]
    found = Ball(high, np.asarray(low), 2 * _U**2 * high)  # rounding low to float64 has an error of at most u^2 high
    return found[0], found[1:]


class DoubleDouble:
    """The arithmetic of `Ball`."""

    def number(self, a: Any) -> Ball:
        """Return float64 numbers as balls with a radius of 0."""
        return _exactly(a)

    def dot(self, a: np.ndarray, b: np.ndarray, plus: np.ndarray | None = None) -> Ball:
        """Return the sums of products of float32 numbers along the last axis, plus a float32 number.

        The terms are float64 numbers, and `_sum` adds them.
        """
        products = terms(a, b, plus)
        total, rest, s = _sum(products)
        return Ball(*_two_sum(total, rest), 1.01 * products.shape[-1] ** 2 * _U**2 * s)
