"""Trace functions of ndonnx's arrays as graphs of ONNX; run a graph in ONNX Runtime, or write it to a file."""

from __future__ import annotations

import contextvars
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import ndonnx as ndx
import onnx
import onnxruntime
import spox
import spox.opset.ai.onnx.v21 as op
from spox._future import initializer

from portable_gpt2.host import StoredTensor, float_dtypes

_LENGTHS: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("lengths", default=None)
"""The unknown lengths of the graph that is being traced, by their names in its inputs, or by the value and the axis."""


@functools.cache
def constant(value: Any, dtype: Any = "int64") -> Any:
    """Return a number, or a tuple of numbers, as a value in a graph.

    `const` of ONNX's operators would run ONNX Runtime to find the value of each constant. This took half of the time
    of a trace.
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
    if 0 in x.shape or len(unknown - copied) > 1:
        parts = [op.reshape(scalar(n), constant((1,))) for n in shape]
        return ndx.asarray(op.reshape(var, op.concat(parts, axis=0) if parts else constant(()), allowzero=True))
    codes = tuple(0 if i in copied else -1 if i in unknown else n for i, n in enumerate(shape))
    return ndx.asarray(op.reshape(var, constant(codes)))


def scalar(n: Any) -> Any:
    """Return an int or a scalar array as a value in a graph."""
    return constant(n) if isinstance(n, int) else n.unwrap_spox()


def flatten(tree: Any, leaves: list[Any]) -> Callable[[Sequence[Any]], Any]:
    """Append the arrays and ints of a tree to a list. Return a function that makes the tree of such a list."""
    if isinstance(tree, ndx.Array | int) and not isinstance(tree, bool):
        leaves.append(tree)
        return operator.itemgetter(len(leaves) - 1)
    if isinstance(tree, dict):
        children = {key: flatten(child, leaves) for key, child in tree.items()}
        return lambda new: {key: child(new) for key, child in children.items()}
    if isinstance(tree, list | tuple):
        parts, make = [flatten(child, leaves) for child in tree], getattr(tree, "_make", type(tree))
        return lambda new: make([part(new) for part in parts])
    return lambda new: tree


def trace(fn: Callable[[dict[str, Any]], Mapping[str, Any]], inputs: Mapping[str, tuple[Any, Any]]) -> onnx.ModelProto:
    """Return the graph of a function that takes and returns arrays by name. Each input has a dtype and a shape."""
    lazy = {name: ndx.argument(shape=shape, dtype=dtype) for name, (dtype, shape) in inputs.items()}
    before = _LENGTHS.set({})
    try:
        results = {name: ndx.asarray(y).unwrap_spox() for name, y in fn(lazy).items()}
    finally:
        _LENGTHS.reset(before)
    return spox.build({name: x.unwrap_spox() for name, x in lazy.items()}, results)


def compiled(fn: Callable[..., Any], tree: Callable[[Any], Any], inputs: Sequence[tuple[Any, Any]]) -> Any:
    """Compile a function for inputs of given dtypes and shapes, from which `tree` makes the function's arguments.

    Return a function from NumPy's arrays to those of the results, and a function that makes a tree of results.
    """
    results: list[Any] = []
    trees: list[Any] = []

    def traced(arrays: dict[str, Any]) -> dict[str, Any]:
        args, kwargs = tree([*arrays.values()])
        trees.append(flatten(fn(*args, **kwargs), results))
        return {f"y{i}": y for i, y in enumerate(results)}

    model = trace(traced, {f"x{i}": each for i, each in enumerate(inputs)})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda arrays: session.run(None, {f"x{i}": a for i, a in enumerate(arrays)}), trees[0]


def describe(
    model: onnx.ModelProto, outputs: Mapping[str, tuple[int | str, ...]], properties: Mapping[str, str]
) -> None:
    """Set the names of the lengths of the outputs, and the properties."""
    for value in model.graph.output:
        for dim, length in zip(value.type.tensor_type.shape.dim, outputs[value.name], strict=True):
            if isinstance(length, str):
                dim.dim_param = length
    model.producer_name = "portable_gpt2"
    onnx.helper.set_model_props(model, dict(properties))


_ALIGNMENT = 4096  # so that a file of weights can be mapped into memory


def write(
    model: onnx.ModelProto, tensors: Mapping[str, StoredTensor], file: BinaryIO, weights: tuple[str, BinaryIO] | None
) -> None:
    """Write a graph whose first inputs become constants: tensors, which are read one at a time.

    The message is put together here, because `SerializeToString` would need twice the memory of all tensors.
    """
    del model.graph.input[: len(tensors)]
    stored, n_bytes = [], []
    for name, tensor in tensors.items():
        dtype = float_dtypes[tensor.dtype]
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        stored.append(onnx.TensorProto(name=name, dims=tensor.shape, data_type=kind))
        n_bytes.append(dtype.itemsize * math.prod(tensor.shape))
    if weights is not None:
        for proto, size, tensor in zip(stored, n_bytes, tensors.values(), strict=True):
            weights[1].write(bytes(-weights[1].tell() % _ALIGNMENT))
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", weights[0]), ("offset", weights[1].tell()), ("length", size)):
                proto.external_data.add(key=key, value=str(value))
            weights[1].write(tensor.read().tobytes())
        model.graph.initializer.extend(stored)
        file.write(model.SerializeToString())
        return
    heads = []
    for proto, size in zip(stored, n_bytes, strict=True):
        head = proto.SerializeToString() + _start(onnx.TensorProto, "raw_data", size)
        heads.append(_start(onnx.GraphProto, "initializer", len(head) + size) + head)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    length = len(graph) + sum(map(len, heads)) + sum(n_bytes)
    file.write(model.SerializeToString() + _start(onnx.ModelProto, "graph", length) + graph)
    for head, tensor in zip(heads, tensors.values(), strict=True):
        file.write(head + tensor.read().tobytes())


def _start(message: Any, field: str, length: int) -> bytes:
    """Return the bytes that stand before the content of a message's field: its number, and the content's length."""
    key, coded = message.DESCRIPTOR.fields_by_name[field].number << 3 | 2, bytearray()
    for n in (key, length):
        while n > 127:
            coded.append(n & 127 | 128)
            n >>= 7
        coded.append(n)
    return bytes(coded)
