"""MLX: its namespace, with the array API's keywords where they differ, and kernels of mx.fast.

MLX computes on its default device, whatever arrays it is given, because CPU and GPU share their memory. So there is one
device: ``gpu`` (Metal) if MLX finds it, and ``cpu`` elsewhere or after ``mx.set_default_device(mx.cpu)``. The tests run
on the CPU wheel for Linux. Nothing here has run on Metal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from portable_gpt2.backend import Backend
from portable_gpt2.numerics import Numerics


def _exp_by_expm1(x: Any) -> Any:
    return mx.where(x < 0, 1 / (1 + mx.expm1(-x)), 1 + mx.expm1(x))


# MLX computes exp of float64 in float32, with an error of 2e10 u, and the gradient of expm1 by exp.
_exp_in_float64 = mx.custom_function(_exp_by_expm1)
_exp_in_float64.vjp(lambda x, cotangent, result: cotangent * result)


def _exp(x: Any, /) -> Any:
    return _exp_in_float64(x) if x.dtype == mx.float64 else mx.exp(x)


# On a CPU, for one row of the 124M model, the kernels take 0.7 (softmax), 0.5 (layer_norm) and 0.6 times (attention to
# 64 keys) as long as the definitions. In float64, MLX's softmax has the error of its exp. In 16 bits, attention errs by
# 11 times its bound. On a GPU that has TF32, MLX multiplies float32 in TF32 unless MLX_ENABLE_TF32 is 0.


def _softmax(x: Any, *, axis: int = -1) -> Any:
    is_right = x.dtype != mx.float64 and mx.issubdtype(x.dtype, mx.floating)
    fits = is_right and x.size and type(axis) is int and -x.ndim <= axis < x.ndim
    return mx.softmax(x, axis, precise=True) if fits else NotImplemented


def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    fits = x.dtype == mx.float32 and x.ndim and x.size and g.shape == b.shape == x.shape[-1:]
    return mx.fast.layer_norm(x, g, b, eps) if fits and 0 <= eps < math.inf else NotImplemented


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None) -> Any:
    if q.dtype != mx.float32 or q.ndim != 4 or k.ndim != 4 or not q.size or not k.size or (causal and mask is not None):
        return NotImplemented
    (*batch, queries, d), keys = q.shape, k.shape[-2]
    if k.shape != (*batch, keys, d) or v.shape[:-1] != k.shape[:-1] or not (scale is None or math.isfinite(scale)):
        return NotImplemented
    shown: Any = "causal" if causal and queries > 1 else None
    if mask is not None:
        leading = zip(mask.shape[-3::-1], batch[::-1], strict=False)
        fits = mask.dtype == mx.bool_ and mask.shape[-2:] == (queries, keys) and mask.ndim <= 4
        if not fits or any(m not in (1, n) for m, n in leading):
            return NotImplemented
        shown = mx.where(mask, 0.0, -math.inf)  # given a bool mask, MLX hides a score by the lowest finite number
    if causal and queries > keys:
        return NotImplemented
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5 if scale is None else scale, mask=shown)


class MlxBackend(Backend):
    """MLX, lazy and not compiled: on a CPU, mx.compile saves no time, and takes 1 s for each function that it fuses."""

    name = "mlx"
    array_types = (mx.array,)
    xp = SimpleNamespace(**{**vars(mx), "exp": _exp, "astype": lambda x, dtype, *, copy=True: x.astype(dtype)})
    kernels = {"softmax": _softmax, "layer_norm": _layer_norm, "attention": _attention}
    # Measured; MLX states none. Its float32 exp rounds the product of x and log2(e), so its error grows with |x|.
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

    def put(self, a: np.ndarray, device: Any) -> Any:
        a = np.asarray(a, order="C")  # MLX refuses negative strides
        if a.dtype == np.float64 and "gpu" in self.devices():
            raise TypeError("MLX has no float64 on a GPU; convert the array, or mx.set_default_device(mx.cpu)")
        return mx.array(a, mx.float64) if a.dtype == np.float64 else mx.array(a)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x.view(mx.uint16)).view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else np.asarray(x)

    def peek(self, x: Any) -> np.ndarray | None:
        try:
            return None if "gpu" in self.devices() else self.to_numpy(x)
        except ValueError:  # x is traced, which its class does not tell
            return None

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        if isinstance(start, int):
            return super().write(buffer, value, start)
        return mx.slice_update(buffer, value, start, [buffer.ndim - 2])

    def runs_ahead(self, x: Any) -> bool:
        return False  # a GPU has no float64

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        differentiated: Callable[..., Any] = mx.value_and_grad(fn)
        return differentiated
