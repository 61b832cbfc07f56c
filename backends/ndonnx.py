"""ONNX, by ndonnx: an array has values, or it is lazy and stands for a value in a graph that is being traced.

An operation on arrays with values runs in ONNX Runtime at once, and takes about a millisecond. A compiled function is
one graph, whose inputs are all of its arrays: as constants, the parameters would be copied for every operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, BinaryIO

import ndonnx as ndx
import numpy as np
import spox.opset.ai.onnx.v21 as op
from spox._future import initializer

from portable_gpt2.backend import Backend
from portable_gpt2.host import StoredTensor
from portable_gpt2.numerics import Numerics

from . import onnx_graphs as graphs
from .onnx_graphs import constant


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
    fits = _shape(x) and (_shape(x)[-1], *_shape(b)) == _shape(w)
    return op.add(op.matmul(x, w), b) if fits else NotImplemented


@_kernel
def _softmax(x: Any, *, axis: int = -1) -> Any:
    fits = type(axis) is int and -len(_shape(x)) <= axis < len(_shape(x))
    return op.softmax(x, axis=axis) if fits else NotImplemented


@_kernel
def _gelu(x: Any) -> Any:
    return op.gelu(x, approximate="tanh")


@_kernel
def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    fits = _shape(x) and _shape(g) == _shape(b) == _shape(x)[-1:] and 0 <= eps < math.inf
    if not fits or x.unwrap_tensor().dtype == np.dtype("float64"):  # the operator's eps has float32
        return NotImplemented
    return op.layer_normalization(x, g, b, epsilon=eps)[0]


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


def _matmul(a: Any, b: Any) -> Any:
    """Return the product. ndonnx adds a branch for empty factors to each product of factors of unknown lengths."""
    is_empty = 0 in a.shape or 0 in b.shape
    return ndx.matmul(a, b) if is_empty else ndx.asarray(op.matmul(a.unwrap_spox(), b.unwrap_spox()))


def _take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:
    return ndx.take(x, ndx.astype(indices, ndx.int64, copy=False), axis=axis)  # ndonnx refuses int32


def _has_values(x: Any) -> bool:
    return x.unwrap_spox()._value is not None


class NdonnxBackend(Backend):
    """ndonnx. Compiled functions run in ONNX Runtime, and `write_graph` writes a function to a file of ONNX."""

    name = "ndonnx"
    array_types = (ndx.Array,)
    xp = SimpleNamespace(**{**vars(ndx), "matmul": _matmul, "reshape": graphs.reshape, "take": _take})
    kernels = {
        "conv1d": _conv1d,
        "softmax": _softmax,
        "gelu": _gelu,
        "layer_norm": _layer_norm,
        "embed": _embed,
        "unembed": _unembed,
    }
    compiles_per_shape = True
    numerics = {"cpu": {"float32": Numerics(tanh=8.0, log=4.0)}}  # of ONNX Runtime; measured: 5.33 and 3.65
    dtypes = {"float32": ndx.float32, "float64": ndx.float64, "float16": ndx.float16}

    def devices(self) -> dict[str, Any]:
        return {"cpu": ndx.__array_namespace_info__().default_device()}

    def put(self, a: np.ndarray, device: Any) -> Any:
        return ndx.asarray(initializer(a))

    def to_numpy(self, x: Any) -> np.ndarray:
        values: np.ndarray = x.unwrap_numpy()
        return values

    def peek(self, x: Any) -> np.ndarray | None:
        return self.to_numpy(x) if _has_values(x) else None

    def shape(self, x: Any) -> tuple[Any, ...]:
        return graphs.lengths(x)

    def arange(self, n: Any, *, like: Any) -> Any:
        return ndx.asarray(op.range(constant(0), graphs.scalar(n), constant(1)))

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        n, var = self.shape(value)[-2], value.unwrap_spox()
        last = graphs.scalar(self.shape(buffer)[-2] - n)  # a later start would be an error of ONNX Runtime
        start = op.min([graphs.scalar(start), last])
        rows = op.unsqueeze(op.range(start, op.add(start, graphs.scalar(n)), constant(1)), constant((1,)))
        return ndx.asarray(op.scatter_elements(buffer.unwrap_spox(), op.expand(rows, op.shape(var)), var, axis=-2))

    def split(self, x: Any, n: int) -> Sequence[Any]:
        return [ndx.asarray(part) for part in op.split(x.unwrap_spox(), axis=-1, num_outputs=n)]

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        compiled: dict[Any, Any] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            tree = graphs.flatten(((*bound, *args), kwargs), given)
            given = [x if isinstance(x, ndx.Array) else self.put(np.asarray(x), None) for x in given]
            if not all(map(_has_values, given)):  # another function is being traced
                args, kwargs = tree(given)
                return fn(*args, **kwargs)
            inputs = [(x.dtype, x.shape) for x in given]
            key = (repr(tree(range(len(given)))), *inputs)
            if key not in compiled:
                compiled[key] = graphs.compiled(fn, tree, inputs)
            run, results = compiled[key]
            return results([self.put(y, None) for y in run([self.to_numpy(x) for x in given])])

        return call

    def write_graph(
        self,
        fn: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
        tensors: Mapping[str, StoredTensor],
        inputs: Mapping[str, tuple[str, tuple[int | str, ...]]],
        outputs: Mapping[str, tuple[int | str, ...]],
        file: BinaryIO,
        weights: tuple[str, BinaryIO] | None = None,
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        def traced(arrays: dict[str, Any]) -> dict[str, Any]:
            return fn({name: arrays[name] for name in tensors}, {name: arrays[name] for name in inputs})

        model = graphs.trace(traced, {**{name: (x.dtype, x.shape) for name, x in tensors.items()}, **inputs})
        graphs.describe(model, outputs, properties)
        graphs.write(model, tensors, file, weights)
