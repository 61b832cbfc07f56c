"""ONNX, by ndonnx: an array has values, or it is lazy and stands for a value in a graph that is being traced.

An operation on arrays with values runs in ONNX Runtime at once, and takes about a millisecond. A compiled function is
one graph, whose inputs are all of its arrays: as constants, the parameters would be copied for every operation.
"""

from __future__ import annotations

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

from . import onnx_graphs, onnx_ops
from .onnx_ops import constant, scalar


def _has_values(x: Any) -> bool:
    return x.unwrap_spox()._value is not None


class NdonnxBackend(Backend):
    """ndonnx. Compiled functions run in ONNX Runtime, and `write_graph` writes a function to a file of ONNX."""

    name = "ndonnx"
    array_types = (ndx.Array,)
    xp = SimpleNamespace(**{**vars(ndx), "matmul": onnx_ops.matmul, "reshape": onnx_ops.reshape, "take": onnx_ops.take})
    kernels = onnx_ops.KERNELS
    compiles_per_shape = True
    numerics = {
        "cpu": {
            # ONNX Runtime's tanh is a rational function. Measured: tanh 5.33 and 7.38, log 3.65, exp in float64 2.04.
            "float32": Numerics(tanh=8.0, log=4.0),
            "float64": Numerics(exp=(2.5, 0.0), tanh=8.0),
        }
    }
    dtypes = {"float32": ndx.float32, "float64": ndx.float64, "float16": ndx.float16}

    def devices(self) -> dict[str, Any]:
        return {"cpu": ndx.__array_namespace_info__().default_device()}

    def put(self, a: np.ndarray, device: Any) -> Any:
        try:
            return ndx.asarray(initializer(a))
        except ValueError as error:  # ndonnx has no bfloat16
            raise TypeError(f"backend 'ndonnx' has no arrays of {a.dtype}: {error}") from None

    def to_numpy(self, x: Any) -> np.ndarray:
        values: np.ndarray = x.unwrap_numpy()
        return values

    def peek(self, x: Any) -> np.ndarray | None:
        return self.to_numpy(x) if _has_values(x) else None

    def shape(self, x: Any) -> tuple[Any, ...]:
        return onnx_ops.lengths(x)

    def arange(self, n: Any, *, like: Any) -> Any:
        return ndx.asarray(op.range(constant(0), scalar(n), constant(1)))

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        n, var = self.shape(value)[-2], value.unwrap_spox()
        first = scalar(start)
        rows = op.unsqueeze(op.range(first, op.add(first, scalar(n)), constant(1)), constant((1,)))
        return ndx.asarray(op.scatter_elements(buffer.unwrap_spox(), op.expand(rows, op.shape(var)), var, axis=-2))

    def split(self, x: Any, n: int) -> Sequence[Any]:
        return [ndx.asarray(part) for part in op.split(x.unwrap_spox(), axis=-1, num_outputs=n)]

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        compiled: dict[Any, Any] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            tree = onnx_graphs.flatten(((*bound, *args), kwargs), given)
            given = [x if isinstance(x, ndx.Array) else self.put(x, None) for x in given]
            if not all(map(_has_values, given)):  # another function is being traced
                args, kwargs = tree(given)
                return fn(*args, **kwargs)
            inputs = [(x.dtype, x.shape) for x in given]
            key = (repr(tree(range(len(given)))), *inputs)
            if key not in compiled:
                compiled[key] = onnx_graphs.compiled(fn, tree, inputs)
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

        model = onnx_graphs.trace(traced, {**{name: (x.dtype, x.shape) for name, x in tensors.items()}, **inputs})
        onnx_graphs.describe(model, outputs, properties)
        onnx_graphs.write(model, tensors, file, weights)
