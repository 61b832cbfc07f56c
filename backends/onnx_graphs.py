"""Trace functions of ndonnx's arrays as graphs of ONNX; run a graph in ONNX Runtime, or write it to a file."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import ndonnx as ndx
import onnx
import onnxruntime
import spox

from portable_gpt2.host import StoredTensor, float_dtypes

from .onnx_ops import tracing


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
    with tracing():
        results = {name: ndx.asarray(y).unwrap_spox() for name, y in fn(lazy).items()}
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
