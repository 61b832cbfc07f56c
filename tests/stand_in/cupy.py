"""A stand-in for CuPy 13, over NumPy: the functions that CuPy has, with its names and restrictions, on a CPU.

It is on no import path but that of the processes that test the adapter. Its arrays are not NumPy's, and do not become
NumPy's except by `get`. An index that is out of range wraps around, as it does in CuPy. A kernel is compiled as C++.
"""

import ctypes
import functools
import operator
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import numpy as np

__version__ = "13.0.0"
float16, float32, float64, int32, int64, bool_ = np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_


class _Device:
    id = 0

    def __eq__(self, other):
        return isinstance(other, _Device)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    __hash__ = object.__hash__


class _Event:
    def record(self):
        self.is_recorded = True

    def synchronize(self):
        assert self.is_recorded


cuda = types.SimpleNamespace(Device=_Device, Event=_Event)


class ndarray:
    __array_ufunc__ = None  # NumPy's operators and functions refuse it
    device = _Device()

    def __init__(self, a):
        self._a = a if isinstance(a, np.ndarray) else np.asarray(a)
        assert self._a.dtype.char in "?bBhHiIlLqQefd", f"CuPy has no {self._a.dtype}"

    dtype = property(lambda self: self._a.dtype)
    shape = property(lambda self: self._a.shape)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __len__(self):
        return len(self._a)

    def __int__(self):
        return int(self._a)

    def __index__(self):
        raise AssertionError("the host waits for the device")

    __bool__ = __index__

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(self._a, order=order)
        out[...] = self._a
        return out

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        return ndarray(self._a.astype(dtype, copy=copy))

    def _index(self, key):
        """Return the index with NumPy's arrays, each index into range."""
        keys = key if isinstance(key, tuple) else (key,)
        n_used = len([k for k in keys if k is not None and k is not Ellipsis])
        axis, found = 0, []
        for k in keys:
            if isinstance(k, ndarray):
                k = k._a % self.shape[axis]
            found.append(k)
            axis += self.ndim - n_used if k is Ellipsis else k is not None
        return tuple(found)

    def __getitem__(self, key):
        return ndarray(self._a[self._index(key)])

    def __setitem__(self, key, value):
        self._a[self._index(key)] = _unwrapped(value)


def _unwrapped(x):
    if isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"Unsupported type {type(x)}")
    return x._a if isinstance(x, ndarray) else [*map(_unwrapped, x)] if isinstance(x, list | tuple) else x


def _on_arrays(function):
    """Return a function of NumPy as one of CuPy; it returns arrays, and takes its own arrays only."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with np.errstate(all="ignore"):
            return ndarray(function(*map(_unwrapped, args), **kwargs))

    return call


for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "pow",
    "and",
    "or",
    "xor",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
]:
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(ndarray, f"__{_name}__", _on_arrays(_function))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(ndarray, f"__r{_name}__", _on_arrays(lambda x, y, f=_function: f(y, x)))
ndarray.__neg__, ndarray.__invert__ = _on_arrays(operator.neg), _on_arrays(operator.invert)
ndarray.__abs__ = _on_arrays(operator.abs)

for _name in (
    *("log", "sqrt", "tanh", "max", "mean", "sum", "cumsum", "matmul", "where", "right_shift"),
    *("reshape", "transpose", "swapaxes", "concatenate", "argsort", "take_along_axis", "arange", "zeros"),
):
    globals()[_name] = _on_arrays(getattr(np, _name))


def exp(x):
    """NumPy's float32 exp errs by 3.5 u, which is more than CUDA's."""
    with np.errstate(all="ignore"):
        return ndarray(np.exp(x._a, dtype=np.float64).astype(x.dtype))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    assert not isinstance(a, ndarray)
    return ndarray(np.array(a, dtype, order="C"))


def take(a, indices, axis=None, out=None):
    n = a.size if axis is None else a.shape[axis]
    return ndarray(np.take(a._a, indices._a % n if n else indices._a, axis=axis))


def _add_at(a, indices, b):
    np.add.at(a._a, indices._a, b._a)


add = types.SimpleNamespace(at=_add_at)

_C = {"d": "double", "f": "float", "l": "long long", "q": "long long"}
_TYPES = {"float64": "d", "int64": "l"}


class ElementwiseKernel:
    """A kernel, which a C++ compiler of the host compiles for the dtypes of the first call with them."""

    def __init__(self, in_params, out_params, operation, name):
        self.params = [param.split() for param in in_params.split(", ")]
        ((self.out_type, self.out_name),) = [out_params.split()]
        self.operation, self.name, self._compiled = operation, name, {}

    def __call__(self, *args):
        (t, *others) = {x.dtype.char for x, (kind, _) in zip(args, self.params, strict=True) if isinstance(x, ndarray)}
        assert not others
        chars = [t if kind == "T" else _TYPES[kind] for kind, _ in self.params]
        arrays = np.broadcast_arrays(*map(_unwrapped, args))
        given = [np.ascontiguousarray(a, char) for a, char in zip(arrays, chars, strict=True)]
        out = np.empty(given[0].shape if arrays[0].ndim else (), t if self.out_type == "T" else _TYPES[self.out_type])
        if t not in self._compiled:
            self._compiled[t] = self._compile(t, [*chars, out.dtype.char])
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*given, out)]
        self._compiled[t](ctypes.c_longlong(out.size), *pointers)
        return ndarray(out)

    def _compile(self, t, chars):
        names = [*(name for _, name in self.params), self.out_name]
        heads = ", ".join(f"{_C[char]}* p_{name}" for char, name in zip(chars, names, strict=True))
        views = "".join(f"{_C[c]}& {name} = p_{name}[i]; " for c, name in zip(chars, names, strict=True))
        code = f"""
            #include <cmath>
            using namespace std;
            typedef {_C[t]} T;
            static unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {{
              return (unsigned long long)((unsigned __int128)x * y >> 64);
            }}
            extern "C" void kernel(long long n_elements, {heads}) {{
              for (long long i = 0; i < n_elements; ++i) {{ {views} {self.operation}; }}
            }}"""
        with tempfile.TemporaryDirectory() as room:
            source, library = Path(room, f"{self.name}.cpp"), Path(room, f"{self.name}.so")
            source.write_text(code)
            compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
            subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
            return ctypes.CDLL(str(library)).kernel
