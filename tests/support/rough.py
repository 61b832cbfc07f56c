"""A backend whose arithmetic is as inexact as the standard model of rounding allows, in directions that a test chooses.

An operation whose exact result needs more than 35 bits errs by u = 2^-35, relative to the result; exp and log err by as
much as is stated for them. float64, in which the results are computed, is so much more precise that its own errors do
not matter. Sums are computed from the first term to the last.
"""

import math

import numpy as np
from portable_gpt2_backends.numpy import NumpyBackend

import portable_gpt2 as pg

UNIT = 2.0**-35


class Array:
    """A NumPy array `a`."""

    __slots__ = ("a",)
    __hash__ = None

    def __init__(self, a):
        self.a = np.asarray(a)

    dtype = property(lambda self: self.a.dtype)
    shape = property(lambda self: self.a.shape)

    def __getitem__(self, key):
        return Array(self.a[key])


class Signs:
    """The direction of every error, by the kind of the operation.

    Parameters
    ----------
    numerics : Numerics
        The errors of exp and log, in units of `UNIT`.
    seed : int
        Where no direction is given, it is random.
    directions : int or tuple
        1 or -1 for all elements, or ``("at", j)`` for 1 at the index j of the last axis and -1 elsewhere, or ``("not
        at", j)`` for the opposite.
    """

    def __init__(self, numerics, seed, **directions):
        self.numerics, self.random, self.directions = numerics, np.random.default_rng(seed), directions

    def of(self, kind, shape):
        chosen = self.directions.get(kind)
        if chosen is None:
            return self.random.choice([-1.0, 1.0], shape)
        if isinstance(chosen, int):
            return np.full(shape, float(chosen))
        where, j = chosen
        at = np.arange(shape[-1]) == j if shape else np.asarray(True)
        return np.broadcast_to(np.where(at == (where == "at"), 1.0, -1.0), shape)

    def rounded(self, kind, result):
        mantissa = np.frexp(result)[0] * 2.0**35
        fits = mantissa == np.rint(mantissa)
        return np.where(fits, result, result * (1 + UNIT * self.of(kind, result.shape)))


SIGNS = [None]
"""The directions of the errors of the present test."""


def plain(x):
    return type(x)(map(plain, x)) if isinstance(x, list | tuple) else x.a if isinstance(x, Array) else x


def add(kind, x, y):
    """Add arrays; to add 0 is exact."""
    with np.errstate(invalid="ignore"):
        return np.where(x == 0, y + 0 * x, np.where(y == 0, x + 0 * y, SIGNS[0].rounded(kind, x + y)))


def multiply(kind, x, y):
    """Multiply arrays; to multiply by a power of two is exact."""
    is_power = (abs(np.frexp(x)[0]) == 0.5) | (abs(np.frexp(y)[0]) == 0.5)
    return np.where(is_power, x * y, SIGNS[0].rounded(kind, x * y))


def total(kind, terms):
    """Return the sum of an iterable of arrays, from the first to the last."""
    found = None
    for term in terms:
        found = term if found is None else add(kind, found, term)
    return found


def operator(function):
    def call(self, other):
        return Array(function(np.asarray(self.a), np.asarray(plain(other))))

    return call


def divide(x, y):
    with np.errstate(divide="ignore", invalid="ignore"):
        return SIGNS[0].rounded("/", x / y)


for _name, _function in {
    "add": lambda x, y: add("+", x, y),
    "radd": lambda x, y: add("+", x, y),
    "sub": lambda x, y: add("-", x, -y),
    "rsub": lambda x, y: add("-", y, -x),
    "mul": lambda x, y: multiply("*", x, y),
    "rmul": lambda x, y: multiply("*", x, y),
    "truediv": divide,
    "rtruediv": lambda x, y: divide(y, x),
    **{name: getattr(np.ndarray, f"__{name}__") for name in ("lt", "le", "gt", "ge", "eq", "ne", "and")},
}.items():
    setattr(Array, f"__{_name}__", operator(_function))
Array.__neg__ = lambda self: Array(-self.a)
Array.__abs__ = lambda self: Array(abs(self.a))


class Namespace:
    """The functions of the array API that `correct_rounding.float64` calls."""

    float64, int64 = np.float64, np.int64

    def __getattr__(self, name):  # functions without an error
        def call(*args, **kwargs):
            return Array(getattr(np, name)(*plain(args), **kwargs))

        return call

    def exp(self, x):
        c0, c1 = SIGNS[0].numerics.exp
        return Array(np.exp(x.a) * (1 + UNIT * (c0 + c1 * abs(x.a)) * SIGNS[0].of("exp", x.shape)))

    def log(self, x):
        return Array(np.log(x.a) * (1 + UNIT * SIGNS[0].numerics.log * SIGNS[0].of("log", x.shape)))

    def sqrt(self, x):
        return Array(SIGNS[0].rounded("sqrt", np.sqrt(x.a)))

    def sum(self, x, axis=None, keepdims=False):
        a = x.a.reshape(-1) if axis is None else np.moveaxis(x.a, axis, 0)
        found = np.asarray(total("sum", a))
        return Array(np.expand_dims(found, axis) if keepdims else found)

    def matmul(self, x, y):
        columns, rows = np.moveaxis(x.a, -1, 0)[..., None], np.moveaxis(y.a, -2, 0)[..., None, :]
        return Array(total("matmul", (multiply("*", a, b) for a, b in zip(columns, rows, strict=True))))


class RoughBackend(pg.Backend):
    name = "rough"
    array_types = (Array,)
    xp = Namespace()
    dtypes = NumpyBackend.dtypes

    def devices(self):
        return {"cpu": "cpu"}

    def put(self, a, device):
        return Array(a)

    def to_numpy(self, x):
        return x.a

    def peek(self, x):
        return x.a


assert math.frexp(1 + UNIT)[0] * 2**35 % 1 == 0.5  # 1 + u lies between two numbers of 35 bits
