"""An interpreter computes the ops of a ``with`` block instead of kernels and definitions."""

import numpy as np

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.op import interpreted

X, Y = np.ones((2, 3)), np.arange(3.0)


class Recorder:
    """Returns what it was asked for."""

    def __call__(self, signature, backend, given):
        return signature.name, backend.name, given

    def add(self, x, y):
        return "add", x, y


def test_an_interpreter_computes_ops_and_sums():
    """Catches a sum of the residual stream that is computed without the interpreter, or with its terms swapped."""
    with interpreted(Recorder()):
        assert pg.softmax(X, axis=0) == ("softmax", "numpy", {"x": X, "axis": 0})
        name, x, y = ops.add(X, Y)
        assert (name, x is X, y is Y) == ("add", True, True)
        with interpreted(None):
            np.testing.assert_array_equal(ops.add(X, Y), X + Y)
    np.testing.assert_array_equal(ops.add(X, Y), X + Y)
    np.testing.assert_array_equal(pg.softmax(X), np.full((2, 3), 1 / 3))
