"""A small array library: NumPy arrays that count the multiplications of their matrix products.

It is an example of a framework that portable_gpt2 does not know. The names of the array API standard are attributes of
this module: ``counting.exp(x)`` is NumPy's exp of the wrapped array.
"""

import numpy as np

multiplications = 0


class Array:
    """A NumPy array `a` in a wrapper."""

    device = "cpu"

    def __init__(self, a):
        self.a = np.asarray(a)
        self.dtype, self.shape = self.a.dtype, self.a.shape

    def __getitem__(self, key):
        return Array(self.a[_unwrap(key)])

    def __setitem__(self, key, value):
        self.a[_unwrap(key)] = _unwrap(value)


def _unwrap(x):
    return x.a if isinstance(x, Array) else tuple(map(_unwrap, x)) if isinstance(x, tuple) else x


def _wrapping(function):
    """Return a function that applies a function of NumPy to Arrays."""

    def call(*args, **kwargs):
        return Array(function(*map(_unwrap, args), **kwargs))

    return call


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv pow neg abs invert and or lt le gt ge eq ne"
for _name in _OPERATORS.split():
    setattr(Array, f"__{_name}__", _wrapping(getattr(np.ndarray, f"__{_name}__")))


def matmul(x, y):
    """Multiply two matrices, or stacks of matrices, and count the multiplications."""
    global multiplications
    product = np.matmul(x.a, y.a)
    multiplications += product.size * x.shape[-1]
    return Array(product)


def __getattr__(name):
    thing = getattr(np, name)
    return thing if isinstance(thing, type) or not callable(thing) else _wrapping(thing)
