"""Arithmetic that bounds its own errors: the bound permits a float32 program, and is not much larger than needed."""

import numpy as np
import pytest

from portable_gpt2.comparison.guesses import arithmetic
from portable_gpt2.comparison.guesses.arithmetic import Computed, clip, computed, erf, exp, log, sqrt, tanh, where

U = 2.0**-24
# Each formula of x [4, 12], y [4, 12] and w [12, 3]. Those of one operation come first.
FORMULAS = {
    "+": lambda x, y, w: x + y,
    "-": lambda x, y, w: x - y,
    "*": lambda x, y, w: x * y,
    "/": lambda x, y, w: x / y,
    "negative": lambda x, y, w: -x,
    "number on the left": lambda x, y, w: 0.3 - 1 / (0.7 * x + 2.1),
    "matmul": lambda x, y, w: x @ w,
    "sum": lambda x, y, w: x.sum(),
    "mean": lambda x, y, w: x.mean(-2),
    "max": lambda x, y, w: x.max(),
    "exp": lambda x, y, w: exp(x),
    "log": lambda x, y, w: log(y),
    "tanh": lambda x, y, w: tanh(x),
    "sqrt": lambda x, y, w: sqrt(y),
    "erf": lambda x, y, w: erf(x),
    "where": lambda x, y, w: where(x.value < y.value, x, y),
    "clip": lambda x, y, w: clip(x, -1, 1),
    "softmax": lambda x, y, w: exp(x - x.max()) / exp(x - x.max()).sum(),
    "mT": lambda x, y, w: (x.mT @ y)[1:],
}


def arguments(random):
    x, y, w = (random.standard_normal(shape) for shape in ((4, 12), (4, 12), (12, 3)))
    return x, abs(y) + 0.5, w


@pytest.mark.parametrize("name", FORMULAS)
def test_errors_of_the_operands_are_propagated(name):
    """Catches an operation that forgets the error of an operand, and one that counts it many times over."""
    random, e, largest = np.random.default_rng(0), 1e-7, 0.0
    for _ in range(60):
        exact = arguments(random)
        bounded = FORMULAS[name](*(computed(a, 0.0, e) for a in exact))
        moved = FORMULAS[name](*(computed(a + e * random.choice([-1, 1], a.shape), 0.0) for a in exact))
        ratio = abs(moved.value - bounded.value) / np.maximum(bounded.error, 1e-300)
        assert ratio.max() <= 1.001
        largest = max(largest, ratio.max())
    assert largest >= 0.3


@pytest.mark.parametrize("name", FORMULAS)
def test_rounding_errors_are_counted(name):
    """Catches an operation without a rounding error of its own; the program computes in float32."""
    random = np.random.default_rng(1)
    for _ in range(60):
        x, y, w = (a.astype(np.float32) for a in arguments(random))
        bounded = FORMULAS[name](*(computed(a, U) for a in (x, y, w)))
        program = FORMULAS[name](*(InFloat32(a) for a in (x, y, w)))
        assert (abs(program.value - bounded.value) <= bounded.error).all()
    if name not in ("negative", "max", "where", "clip"):
        assert bounded.error.all()


class InFloat32(Computed):
    """The same operations in float32, with the functions of NumPy."""

    def __init__(self, value):
        super().__init__(value, np.zeros_like(value), 0.0)

    def _new(self, value, error, roundings=1.0):
        return InFloat32(np.asarray(value, np.float32))

    def _operand(self, other):
        return other if isinstance(other, Computed) else InFloat32(np.asarray(other, np.float32))

    def __neg__(self):
        return InFloat32(-self.value)


def test_an_infinite_score_has_no_error():
    """Catches NaN in the bound of a hidden score, whose exp is exactly 0."""
    s = where(np.asarray([True, False]), computed(np.asarray([0.5, 3.0]), U), -np.inf)
    e = exp(s - s.max())
    assert e.value.tolist() == [1.0, 0.0]
    assert s.bounded("float32").error[1] == e.error[1] == 0
    assert arithmetic.computed(np.asarray([np.nan]), U).bounded("float32").error == np.inf
