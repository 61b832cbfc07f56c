"""Kernels and functions of ndonnx's arrays, written with ONNX's operators."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import ndonnx as ndx
import numpy as np
import spox.opset.ai.onnx.v21 as op
from spox._future import initializer

_LENGTHS: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("lengths", default=None)
"""The unknown lengths of the graph that is being traced, by their names in its inputs, or by the value and the axis."""


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Give each unknown length the same array in the whole block, which traces one graph."""
    before = _LENGTHS.set({})
    try:
        yield
    finally:
        _LENGTHS.reset(before)


@functools.cache
def constant(value: Any, dtype: Any = "int64") -> Any:
    """Return a number, or a tuple of numbers, as a value in a graph.

    `const` of ONNX's operators would run ONNX Runtime to find the value of each constant, which took half of the time
    that tracing took.
    """
    return initializer(value, dtype)


def lengths(x: Any) -> tuple[Any, ...]:
    """Return the shape of an array. A length that is unknown while tracing is a scalar array, the same at each call."""
    return tuple(_length(x.unwrap_spox(), axis, n) for axis, n in enumerate(x.unwrap_spox().unwrap_tensor().shape))


def _length(x: Any, axis: int, length: int | str | None) -> Any:
    if isinstance(length, int):
        return length
    found, key = _LENGTHS.get(), length or (x, axis)
    if found is None or key not in found:
        array = ndx.asarray(op.squeeze(op.shape(x, start=axis, end=axis + 1), constant((0,))))
        if found is None:
            return array
        found[key] = array
    return found[key]


def reshape(x: Any, shape: tuple[Any, ...]) -> Any:
    """Reshape an array. A length that is unknown while tracing is copied from x, or follows from the other lengths.

    ONNX can then infer the other lengths of the result, which it cannot do if the shape is computed.
    """
    given, var = lengths(x), x.unwrap_spox()
    unknown = {i for i, n in enumerate(shape) if not isinstance(n, int)}
    copied = {i for i in unknown if i < len(given) and shape[i] is given[i]}
    if shape and (0 in x.shape or len(unknown - copied) > 1):
        computed = op.concat([op.reshape(scalar(n), constant((1,))) for n in shape], axis=0)
        return ndx.asarray(op.reshape(var, computed, allowzero=True))
    codes = tuple(0 if i in copied else -1 if i in unknown else n for i, n in enumerate(shape))
    return ndx.asarray(op.reshape(var, constant(codes)))


def scalar(n: Any) -> Any:
    """Return an int or a scalar array as an int64 value in a graph."""
    if isinstance(n, int):
        return constant(n)
    return (n if n.dtype == ndx.int64 else ndx.astype(n, ndx.int64)).unwrap_spox()


def matmul(a: Any, b: Any) -> Any:
    """Return the product. ndonnx adds a branch for empty factors to each product of factors of unknown lengths."""
    is_empty = 0 in a.shape or 0 in b.shape
    return ndx.matmul(a, b) if is_empty else ndx.asarray(op.matmul(a.unwrap_spox(), b.unwrap_spox()))


def take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:
    """Take elements along an axis. ndonnx's function refuses indices that are not int64."""
    return ndx.take(x, ndx.astype(indices, ndx.int64, copy=False), axis=axis)


def _kernel(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that calls a function of values in a graph. It computes in float32 at least."""

    def widened(x: Any) -> Any:
        if not isinstance(x, ndx.Array):
            return x
        return op.cast(x.unwrap_spox(), to=np.dtype("float32")) if x.dtype == ndx.float16 else x.unwrap_spox()

    @functools.wraps(fn)
    def kernel(*args: Any, **options: Any) -> Any:
        arrays = [x for x in (*args, *options.values()) if isinstance(x, ndx.Array)]
        if any(0 in x.shape for x in arrays):
            return NotImplemented
        y = fn(*map(widened, args), **{name: widened(x) for name, x in options.items()})
        if y is NotImplemented:
            return y
        return ndx.asarray(op.cast(y, to=np.dtype("float16")) if any(x.dtype == ndx.float16 for x in arrays) else y)

    return kernel


def _shape(x: Any) -> Any:
    return x.unwrap_tensor().shape


@_kernel
def _conv1d(x: Any, w: Any, b: Any) -> Any:
    fits = _shape(x) and len(_shape(b)) == 1 and (_shape(x)[-1], *_shape(b)) == _shape(w)
    return op.add(op.matmul(x, w), b) if fits else NotImplemented


@_kernel
def _softmax(x: Any, *, axis: int = -1) -> Any:
    fits = type(axis) is int and -len(_shape(x)) <= axis < len(_shape(x))
    return op.softmax(x, axis=axis) if fits else NotImplemented


@_kernel
def _gelu(x: Any) -> Any:
    is_exact = x.unwrap_tensor().dtype == np.dtype("float32")  # in float64, the operator's constants have float32
    return op.gelu(x, approximate="tanh") if is_exact else NotImplemented


@_kernel
def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    fits = _shape(x) and _shape(g) == _shape(b) == _shape(x)[-1:] and 0 <= eps < math.inf
    is_exact = x.unwrap_tensor().dtype == np.dtype("float32")  # the operator's eps has float32
    return op.layer_normalization(x, g, b, epsilon=eps)[0] if fits and is_exact else NotImplemented


@_kernel
def _embed(ids: Any, w: Any) -> Any:
    if ids._value is not None or len(_shape(w)) != 2:  # the definition raises an error for an id that is out of range
        return NotImplemented
    index = op.cast(ids, to=np.dtype("int64"))
    known = op.and_(op.greater_or_equal(index, constant(0)), op.less(index, constant(_shape(w)[0])))
    rows = op.gather(w, op.where(known, index, constant(0)))
    return op.where(op.unsqueeze(known, constant((-1,))), rows, constant(math.nan, rows.unwrap_tensor().dtype))


@_kernel
def _unembed(x: Any, w: Any) -> Any:
    fits = _shape(x) and len(_shape(w)) == 2 and _shape(x)[-1] == _shape(w)[1]
    return op.matmul(x, op.transpose(w, perm=(1, 0))) if fits else NotImplemented


KERNELS = {
    "conv1d": _conv1d,
    "softmax": _softmax,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "embed": _embed,
    "unembed": _unembed,
}
