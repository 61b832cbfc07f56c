"""TensorFlow: an array-API namespace over raw tensors, for eager code, `tf.function` and XLA alike."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from portable_gpt2.backend import Backend, StoredTensor

_FLOATS = {"float32": tf.float32, "float64": tf.float64, "bfloat16": tf.bfloat16, "float16": tf.float16}
_Axis = int | tuple[int, ...] | None
_PARTS = 4  # of a product's depth


class _Namespace:
    """The array-API functions that portable code uses, over tf.Tensor."""

    float32 = tf.float32
    exp, log, tanh, sqrt, where, reshape = tf.exp, tf.math.log, tf.tanh, tf.sqrt, tf.where, tf.reshape
    matrix_transpose = tf.linalg.matrix_transpose

    @staticmethod
    def max(x: Any, /, *, axis: _Axis = None, keepdims: bool = False) -> Any:
        return tf.reduce_max(x, axis, keepdims)

    @staticmethod
    def sum(x: Any, /, *, axis: _Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
        return tf.reduce_sum(x if dtype is None else tf.cast(x, dtype), axis, keepdims)

    @staticmethod
    def mean(x: Any, /, *, axis: _Axis = None, keepdims: bool = False) -> Any:
        return tf.reduce_mean(x, axis, keepdims)

    @staticmethod
    def matmul(x: Any, y: Any, /) -> Any:
        vectors = x.shape.rank == 1 or y.shape.rank == 1
        return tf.experimental.numpy.matmul(x, y) if vectors else tf.linalg.matmul(x, y)

    @staticmethod
    def permute_dims(x: Any, /, axes: tuple[int, ...]) -> Any:
        return tf.transpose(x, axes)

    @staticmethod
    def take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:  # of vectors alone the axis may be left out
        indices = indices if indices.dtype in (tf.int32, tf.int64) else tf.cast(indices, tf.int64)
        return tf.gather(x, indices, axis=axis or 0)

    @staticmethod
    def take_along_axis(x: Any, indices: Any, /, *, axis: int = -1) -> Any:
        return tf.experimental.numpy.take_along_axis(x, indices, axis)

    @staticmethod
    def concat(arrays: Any, /, *, axis: int | None = 0) -> Any:
        return tf.concat([tf.reshape(x, [-1]) for x in arrays] if axis is None else list(arrays), axis or 0)

    @staticmethod
    def astype(x: Any, dtype: Any, /, *, copy: bool = True) -> Any:
        return tf.cast(x, dtype)

    @staticmethod
    def finfo(dtype: Any) -> Any:
        return np.finfo(dtype.as_numpy_dtype)

    @staticmethod
    def isdtype(dtype: Any, kind: str) -> bool:
        if kind == "bool":
            return bool(dtype.is_bool)
        return bool(dtype.is_integer if kind == "integral" else dtype in _FLOATS.values())


def _in_xla() -> bool:
    """Return whether what is traced now will be compiled by XLA."""
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _is_wide(x: Any) -> bool:
    """Return whether x is not of 16 bits, which the definition widens to accumulate in float32."""
    return x.dtype in (tf.float32, tf.float64)


def _conv1d(x: Any, w: Any, b: Any) -> Any:
    if not _is_wide(x) or not (x.shape.is_fully_defined() and w.shape.is_fully_defined() and b.shape.rank == 1):
        return NotImplemented
    (*start, nx), (*one, nf) = x.shape, w.shape[1:] if w.shape.rank == 3 and w.shape[0] == 1 else w.shape
    if one != [nx] or b.shape[0] != nf or math.prod(start) != 1 or nx % _PARTS or not _in_xla():
        return NotImplemented
    # As one product of a vector it uses the second core little. In four parts of the depth, summed with the bias after,
    # a chain of 48 products read 28 GB/s, as one 20 to 24; on one core alone 18 and 17. The gain of a whole decode step
    # was 7 to 15% on a quiet machine, and none on a loaded one.
    parts = tf.matmul(tf.reshape(x, (_PARTS, 1, nx // _PARTS)), tf.reshape(w, (_PARTS, nx // _PARTS, nf)))
    return tf.reshape(tf.reduce_sum(parts, 0) + b, (*start, nf))


def _softmax(x: Any, *, axis: int = -1) -> Any:
    rank = x.shape.rank
    if not _is_wide(x) or type(axis) is not int or rank is None or not -rank <= axis < rank:
        return NotImplemented
    if rank > 5 or _in_xla():  # refused on a CPU, by oneDNN; XLA makes as much of the definition
        return NotImplemented
    y = tf.nn.softmax(x, axis)
    return y + 0 * tf.reduce_sum(y, axis, keepdims=True)  # it leaves zeros beside a NaN: the whole row becomes NaN


def _gelu(x: Any) -> Any:
    # In float64 its 0.044715 is one of float32.
    return tf.nn.gelu(x, approximate=True) if x.dtype == tf.float32 else NotImplemented


class TensorflowBackend(Backend):
    """TensorFlow; `device` also takes a tf.config.LogicalDevice."""

    name = "tensorflow"
    array_types = (tf.Tensor, tf.Variable)
    xp = _Namespace
    kernels = {"conv1d": _conv1d, "softmax": _softmax, "gelu": _gelu}
    recompiles = True
    _dtypes = _FLOATS

    def shape(self, x: Any) -> tuple[Any, ...]:
        if x.shape.rank is None:
            raise ValueError("a tensor's number of axes must be known while tracing; give it a shape such as [None, 5]")
        static = x.shape.as_list()
        if None not in static:
            return tuple(static)
        dynamic = tf.shape(x)
        return tuple(dynamic[i] if n is None else n for i, n in enumerate(static))

    def devices(self) -> list[str]:
        return list(self._devices())

    def _devices(self) -> dict[str, str]:
        names = [device.name for kind in ("CPU", "GPU") for device in tf.config.list_logical_devices(kind)]
        return {_device_name(name): name for name in names}

    def _find_device(self, device: Any) -> Any:
        name = str(getattr(device, "name", device))
        devices = self._devices()
        if "device:" in name.lower():
            name = _device_name(name)
        return devices.get(name, devices.get(f"{name}:0", devices.get(name.removesuffix(":0"))))

    def device(self, x: Any) -> str:
        return _device_name(x.device)

    def on(self, device: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if device is None else tf.device(self.find_device(device))

    def from_numpy(self, a: np.ndarray, dtype: str | None = None, device: Any = None) -> Any:
        with self.on(self.default_device if device is None else device):
            return tf.identity(tf.convert_to_tensor(self.host_array(a, dtype)))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x.numpy())

    def read_checkpoint(self, path: str) -> dict[str, StoredTensor]:
        directory, name = os.path.split(path)
        if name == "checkpoint":  # it names the latest of several, where they were written: perhaps on another machine
            state = tf.train.get_checkpoint_state(directory)
            if state is None:
                raise ValueError("it does not say model_checkpoint_path")
            name = f"{os.path.basename(state.model_checkpoint_path)}.index"
        prefix = os.path.join(directory, name.removesuffix(".index"))
        if not os.path.isfile(f"{prefix}.index"):  # a directory would be searched
            raise ValueError(f"there is no {name} beside it")
        reader = tf.train.load_checkpoint(prefix)
        dtypes = reader.get_variable_to_dtype_map()
        return {
            name: StoredTensor(tuple(shape), dtypes[name].name, functools.partial(reader.get_tensor, name))
            for name, shape in reader.get_variable_to_shape_map().items()
        }

    def arange(self, n: Any, *, like: Any) -> Any:
        with _beside(like):
            return tf.range(n)

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        with _beside(like):
            return tf.zeros(shape, like.dtype)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        n, capacity = self.shape(value)[-2], self.shape(buffer)[-2]
        rows = tf.range(capacity) - start
        taken = tf.gather(value, tf.clip_by_value(rows, 0, n - 1), axis=-2)
        return tf.where(((rows >= 0) & (rows < n))[:, None], taken, buffer)

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        return tf.tensor_scatter_nd_add(x, indices[:, None], rows)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def differentiated(tree: Any, *args: Any) -> tuple[Any, Any]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tree)
                value = fn(tree, *args)
            # The gradient of a look-up comes as the rows alone.
            grads = tape.gradient(value, tree, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return value, tf.nest.map_structure(tf.convert_to_tensor, grads)

        return differentiated

    def compile(
        self,
        fn: Callable[..., Any],
        *,
        bound: Any = None,
        static: tuple[str, ...] = (),
        donate: tuple[str, ...] = (),
    ) -> Callable[..., Any]:
        # Parameters are captured: as arguments, 148 of them cost 2.5 to 4.3 ms a call; captured, 0.4.
        compiled = tf.function(lambda *args: fn(bound, *args), jit_compile=True, autograph=False)
        names = list(inspect.signature(fn).parameters)[1:]

        def call(*args: Any) -> Any:
            pairs = zip(names, args, strict=False)
            return compiled(*(a if name in static else tf.nest.map_structure(_as_traced, a) for name, a in pairs))

        return call


def _as_traced(leaf: Any) -> Any:
    return np.int32(leaf) if type(leaf) is int else leaf  # tf.function traces anew for each new Python int


def _device_name(name: str) -> str:
    """Shorten TensorFlow's name of a device, ``/job:localhost/replica:0/task:0/device:GPU:1``, to ``cuda:1``."""
    kind, _, index = name.rpartition("device:")[2].lower().partition(":")
    return "cpu" if kind == "cpu" and index == "0" else f"{'cuda' if kind == 'gpu' else kind}:{index}"


def _beside(like: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context on like's device; in a graph, whose tensors have none yet, the context is the caller's."""
    device = getattr(like, "device", "")
    return tf.device(device) if device else contextlib.nullcontext()
