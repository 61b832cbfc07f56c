"""Arithmetic that bounds its own errors: a formula is written once, and says how exactly a program can compute it.

An array has a value in float64, and a bound on the error of a program that computes it in a coarser arithmetic. Each
operation adds its own rounding error to those of its operands, to first order (running error analysis; Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...numerics import bounds
from ...numerics.bounds import FORMATS, Bounded
from ..trace import OF_ANY_FRAMEWORK


@dataclass(frozen=True, eq=False)
class Computed:
    """An array that a program computes.

    Parameters
    ----------
    value : float64 array
        The exact value, up to rounding errors in float64.
    error : float64 array
        The bound on the program's error. It is 0 where the value is infinite.
    u : float
        The bound on the relative error of one operation.

    Examples
    --------
    >>> x = Computed(np.asarray([1.0, 2.0]), np.zeros(2), 2.0**-24)
    >>> y = x / x.sum()
    >>> y.value.round(3), (y.error / 2.0**-24).round(3)
    (array([0.333, 0.667]), array([1.333, 2.667]))
    """

    value: np.ndarray
    error: np.ndarray
    u: float
    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def _new(self, value: Any, error: Any, roundings: float = 1.0) -> Computed:
        value = np.asarray(value)
        error = error + roundings * self.u * abs(value)
        return Computed(value, np.where(np.isfinite(value), error, 0.0), self.u)

    def _operand(self, other: Any) -> Computed:
        """Return an operand. A number is a constant of the program, which rounds it."""
        if isinstance(other, Computed):
            return other
        value = np.asarray(other, np.float64)
        return Computed(value, np.where(np.isfinite(value), self.u * abs(value), 0.0), self.u)

    def __neg__(self) -> Computed:
        return Computed(-self.value, self.error, self.u)

    def __add__(self, other: Any) -> Computed:
        other = self._operand(other)
        return self._new(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Any) -> Computed:
        return self + -self._operand(other)

    def __rsub__(self, other: Any) -> Computed:
        return self._operand(other) - self

    def __mul__(self, other: Any) -> Computed:
        other = self._operand(other)
        error = abs(self.value) * other.error + self.error * abs(other.value)
        return self._new(self.value * other.value, error)

    def __truediv__(self, other: Any) -> Computed:
        other = self._operand(other)
        value = self.value / other.value
        return self._new(value, (self.error + abs(value) * other.error) / abs(other.value))

    def __rtruediv__(self, other: Any) -> Computed:
        return self._operand(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __matmul__(self, other: Computed) -> Computed:
        a, b = abs(self.value), abs(other.value)
        error = a @ other.error + self.error @ b + bounds.gamma_probable(a.shape[-1], self.u) * (a @ b)
        return self._new(self.value @ other.value, error)

    def __getitem__(self, index: Any) -> Computed:
        return Computed(self.value[index], self.error[index], self.u)

    @property
    def mT(self) -> Computed:
        """The transposed matrices."""
        return Computed(np.swapaxes(self.value, -1, -2), np.swapaxes(self.error, -1, -2), self.u)

    def sum(self, axis: int = -1) -> Computed:
        """Return the sum over an axis, which is kept with length 1."""
        value, error, size = (a.sum(axis=axis, keepdims=True) for a in (self.value, self.error, abs(self.value)))
        return self._new(value, error + bounds.gamma_probable(self.value.shape[axis], self.u) * size)

    def mean(self, axis: int = -1) -> Computed:
        """Return the mean over an axis, which is kept with length 1."""
        return self.sum(axis) / float(self.value.shape[axis])

    def max(self, axis: int = -1) -> Computed:
        """Return the maximum over an axis, which is kept with length 1."""
        value, error = (a.max(axis=axis, keepdims=True) for a in (self.value, self.error))
        return Computed(value, error, self.u)

    def bounded(self, dtype: str) -> Bounded:
        """Return the value and the bound after the result was stored in a dtype. A NaN permits any number."""
        found = bounds.stored(self.value, self.error + 8 * FORMATS[bounds.computed_in(dtype)].smallest, dtype)
        return Bounded(found.value, np.where(np.isinf(found.value), 0.0, found.error))


def computed(x: np.ndarray, u: float, error: np.ndarray | float = 0.0) -> Computed:
    """Return an array that a program has, with its error."""
    value = np.asarray(x).astype(np.float64)
    return Computed(value, np.broadcast_to(error, value.shape), u)


def _function(
    f: Callable[[Any], Any], slope: Callable[[Any, Any], Any], own: tuple[float, float]
) -> Callable[[Computed], Computed]:
    """Return a function of computed arrays, given f, its derivative at x and y, and the errors that adapters state.

    An arithmetic of 16 bits rounds the result of a better one.
    """

    def call(x: Computed) -> Computed:
        y = f(x.value)
        fine = FORMATS["float32"].unit if x.u > 2.0**-20 else x.u
        own_error = (own[0] + own[1] * abs(np.where(np.isfinite(x.value), x.value, 0.0))) * fine * abs(y)
        return x._new(y, np.where(x.error > 0, abs(slope(x.value, y)) * x.error, 0.0) + own_error)

    return call


_N = OF_ANY_FRAMEWORK
_erf = np.vectorize(math.erf, otypes=[np.float64])
exp = _function(np.exp, lambda x, y: y, _N.exp)
log = _function(np.log, lambda x, y: 1 / x, (_N.log, 0.0))
tanh = _function(np.tanh, lambda x, y: 1 - y * y, (_N.tanh, 0.0))
sqrt = _function(np.sqrt, lambda x, y: 0.5 / y, (0.0, 0.0))
erf = _function(_erf, lambda x, y: 2 / math.sqrt(math.pi) * np.exp(-x * x), (_N.tanh, 0.0))


def where(condition: np.ndarray, x: Any, y: Any) -> Computed:
    """Choose between elements of two arrays or numbers, of which at least one is computed."""
    one = x if isinstance(x, Computed) else y
    a, b = (one._operand(each) for each in (x, y))
    return Computed(np.where(condition, a.value, b.value), np.where(condition, a.error, b.error), one.u)


def clip(x: Computed, low: float, high: float) -> Computed:
    """Limit an array to an interval."""
    return Computed(np.clip(x.value, low, high), x.error, x.u)
