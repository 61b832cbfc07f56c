"""A correct backend whose arrays are NumPy's in a wrapper class: the tests of `check` break it in many ways.

No other backend has its array types, so it can be checked next to NumPy, with which some tests compare.
"""

import functools

import numpy as np
from portable_gpt2_backends.numpy import NumpyBackend

import portable_gpt2 as pg


class Array:
    """A NumPy array `a`, and the name of a device that is only a name."""

    __slots__ = ("a", "device", "dtype", "shape")
    __hash__ = None

    def __init__(self, a, device="cpu"):
        self.a, self.device = np.asarray(a), device
        self.dtype, self.shape = self.a.dtype, self.a.shape

    def __getitem__(self, key):
        return Array(self.a[unwrap(key)], self.device)

    def __setitem__(self, key, value):
        self.a[unwrap(key)] = unwrap(value)

    def __bool__(self):
        return bool(self.a)

    def __int__(self):
        return int(self.a)

    __index__ = __int__


def unwrap(x):
    """Return the NumPy arrays of Arrays, in tuples and lists as well."""
    if isinstance(x, Array):
        return x.a
    return type(x)(map(unwrap, x)) if isinstance(x, tuple | list) else x


def wrapping(function):
    """Return a function of NumPy as a function of Arrays. The result is on the device of the first Array."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        flat = [y for x in args for y in (x if isinstance(x, tuple | list) else [x])]
        device = kwargs.get("device") or next((x.device for x in flat if isinstance(x, Array)), "cpu")
        given = {key: unwrap(value) for key, value in kwargs.items() if key != "device"}
        result = function(*unwrap(args), **given)
        return Array(result, device) if isinstance(result, np.ndarray | np.generic) else result

    return call


OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow neg abs invert and rand or ror xor rxor lt le gt ge eq ne"
)
for _name in OPERATORS.split():
    setattr(Array, f"__{_name}__", wrapping(getattr(np.ndarray, f"__{_name}__")))


class Namespace:
    """NumPy's namespace for Arrays. The arguments replace functions of it; they take and return NumPy arrays."""

    def __init__(self, **replaced):
        self._replaced = replaced

    @functools.cache  # noqa: B019
    def _wrapped(self, name):
        function = self._replaced.get(name) or getattr(np, name)
        is_plain = isinstance(function, type) or not callable(function) or name == "isdtype"
        return function if is_plain else wrapping(function)

    def __getattr__(self, name):
        return self._wrapped(name)


def kernels(**own):
    """Return kernels of Arrays: those of NumPy, with some replaced by functions of NumPy arrays, or left out."""
    every = {**NumpyBackend.kernels, **own}
    return {name: wrapping(kernel) for name, kernel in every.items() if kernel is not None}


class OwnBackend(pg.Backend):
    """The wrapped NumPy, on the CPU."""

    name = "own"
    array_types = (Array,)
    xp = Namespace()
    dtypes = NumpyBackend.dtypes
    numerics = NumpyBackend.numerics
    kernels = kernels()

    def devices(self):
        return {"cpu": "cpu"}

    def device(self, x):
        return x.device

    def put(self, a, device):
        return Array(a, device or "cpu")

    def to_numpy(self, x):
        return x.a

    def peek(self, x):
        return x.a


def mapped(function, tree):
    """Return a tree with the results of a function of each Array."""
    if isinstance(tree, Array):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(function, each) for key, each in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(function, each) for each in tree))
    return type(tree)(mapped(function, each) for each in tree) if isinstance(tree, list | tuple) else tree


def differences(fn):
    """Return a function for the value and the gradient of `fn`, which is exact where `fn` is quadratic."""

    def value_and_grad(tree, *args):
        def slope(x):
            found = np.empty(x.shape, x.dtype)
            for index in np.ndindex(x.shape):
                kept, ends = x.a[index], []
                for change in (1, -1):
                    x.a[index] = kept + change
                    ends.append(fn(tree, *args).a)
                x.a[index] = kept
                found[index] = (ends[0] - ends[1]) / 2
            return Array(found)

        return fn(tree, *args), mapped(slope, mapped(lambda x: x, tree))

    return value_and_grad
