"""MLX: its namespace with the array API's keywords where they differ, kernels of mx.fast, and functions by mx.compile.

MLX computes on its default device, whatever arrays it is given, because CPU and GPU share their memory. So this backend
has one device: ``gpu`` (Metal) where MLX finds one, and ``cpu`` elsewhere or after ``mx.set_default_device(mx.cpu)``.
It is tested with the CPU wheel for Linux. It has not been run on Metal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from portable_gpt2.backend import Backend
from portable_gpt2.numerics import Numerics


@mx.custom_function
def _exp_in_float64(x: Any) -> Any:
    """Return exp from expm1, because MLX computes exp of float64 in float32, with an error of 2e10 u."""
    return mx.where(x < 0, 1 / (1 + mx.expm1(-x)), 1 + mx.expm1(x))


@_exp_in_float64.vjp
def _exp_in_float64_vjp(x: Any, cotangent: Any, result: Any) -> Any:
    return cotangent * result  # MLX's gradient of expm1 calls exp


def _exp(x: Any, /) -> Any:
    return _exp_in_float64(x) if x.dtype == mx.float64 else mx.exp(x)


def _sum(x: Any, /, *, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
    return mx.sum(x if dtype is None else x.astype(dtype), axis, keepdims)


def _astype(x: Any, dtype: Any, /, *, copy: bool = True) -> Any:
    return x.astype(dtype)


def _softmax(x: Any, *, axis: int = -1) -> Any:
    is_right = x.dtype != mx.float64 and mx.issubdtype(x.dtype, mx.floating)  # in float64, it uses MLX's exp
    if not is_right or not x.size or type(axis) is not int or not -x.ndim <= axis < x.ndim:
        return NotImplemented
    return mx.softmax(x, axis, precise=True)


def _conv1d(x: Any, w: Any, b: Any) -> Any:
    if w.ndim == 3 and w.shape[0] == 1:
        w = w[0]
    if x.dtype != mx.float32 or not x.size or w.ndim != 2 or w.shape != x.shape[-1:] + b.shape:
        return NotImplemented
    return mx.addmm(b, x, w)


def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    fits = x.dtype == mx.float32 and x.ndim and x.size and g.shape == b.shape == x.shape[-1:]
    return mx.fast.layer_norm(x, g, b, eps) if fits and 0 <= eps < math.inf else NotImplemented


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None) -> Any:
    if q.dtype != mx.float32 or q.ndim != 4 or k.ndim != 4 or not q.size or not k.size:
        return NotImplemented
    (*batch, queries, d), keys = q.shape, k.shape[-2]
    if k.shape != (*batch, keys, d) or v.shape[:-1] != k.shape[:-1] or not (scale is None or math.isfinite(scale)):
        return NotImplemented
    if mask is not None:
        leading = zip(mask.shape[-3::-1], batch[::-1], strict=False)
        fits = mask.dtype == mx.bool_ and mask.shape[-2:] == (queries, keys) and mask.ndim <= 4
        if causal or not fits or any(m not in (1, n) for m, n in leading):
            return NotImplemented
        mask = mx.where(mask, 0.0, -math.inf)  # MLX itself would use the lowest finite number, which hides no -inf
    if causal and queries > keys:
        return NotImplemented
    shown = "causal" if causal and queries > 1 else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5 if scale is None else scale, mask=shown)


class MlxBackend(Backend):
    """MLX, lazy or compiled. float64 exists on a CPU only."""

    name = "mlx"
    array_types = (mx.array,)
    xp = SimpleNamespace(**{**vars(mx), "astype": _astype, "exp": _exp, "sum": _sum})
    kernels = {"softmax": _softmax, "conv1d": _conv1d, "layer_norm": _layer_norm, "attention": _attention}
    compiles_per_shape = True
    # Measured, as MLX states none. Its float32 exp multiplies x by log2(e) in float32, so its error grows with |x|.
    numerics = {
        "cpu": {
            "float32": Numerics(exp=(2.0, 1.25), tanh=3.0, log=2.0),
            "float64": Numerics(exp=(3.0, 0.0), tanh=4.0, log=2.0),
        }
    }
    dtypes = {"float32": mx.float32, "float64": mx.float64, "bfloat16": mx.bfloat16, "float16": mx.float16}

    def devices(self) -> dict[str, Any]:
        device = mx.default_device()
        return {"gpu" if device == mx.Device(mx.gpu) else "cpu": device}

    def device(self, x: Any) -> str:
        return next(iter(self.devices()))

    def placement(self, x: Any) -> Any:
        return mx.default_device()

    def put(self, a: np.ndarray, device: Any) -> Any:
        a = np.asarray(a, order="C")  # MLX refuses negative strides
        if a.dtype != np.float64:
            return mx.array(a)
        if "gpu" in self.devices():
            raise TypeError("MLX has no float64 on a GPU; convert the array, or mx.set_default_device(mx.cpu)")
        return mx.array(a, mx.float64)

    def to_numpy(self, x: Any) -> np.ndarray:
        # A copy: MLX would reuse the memory of a view, because it does not count NumPy's reference to it.
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(x)

    def peek(self, x: Any) -> np.ndarray | None:
        try:
            return None if "gpu" in self.devices() else self.to_numpy(x)
        except ValueError:  # x is traced: tracers are of the same class as arrays
            return None

    def arange(self, n: Any, *, like: Any) -> Any:
        return mx.arange(n)

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        return mx.zeros(shape, like.dtype)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        # MLX writes outside of the buffer if there is no room.
        start = mx.clip(mx.array(start), 0, buffer.shape[-2] - value.shape[-2])
        return mx.slice_update(buffer, value, start, [buffer.ndim - 2])

    def runs_ahead(self, x: Any) -> bool:
        return False  # a GPU has no float64

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        differentiated: Callable[..., Any] = mx.value_and_grad(fn)
        return differentiated

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        compiled = mx.compile(fn)

        def call(*args: Any) -> Any:  # as arrays, ints are data, and not constants of the compiled function
            given = [tree_map(lambda x: mx.array(x) if type(x) is int else x, arg) for arg in args]
            return compiled(*bound, *given)

        return call
