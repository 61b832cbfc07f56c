"""CuPy: NumPy's counterpart on a GPU from NVIDIA. Its names of the array API, and three kernels that fuse operations.

CuPy computes on the current device, whatever arrays it is given. So there is one device, the current one, which
``cupy.cuda.Device(1).use()`` changes. Products of float32 are in full precision unless CUPY_TF32 is set. A first
version of 30 lines ran on an H100. This version has not run on a GPU: the tests run it on a stand-in for CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cupy
import cupyx
import numpy as np

from portable_gpt2.backend import Backend
from portable_gpt2.numerics import Numerics

# CuPy 13 lacks these names of the array API, and version 14 has some of them.
_MISSING = {
    "astype": lambda x, dtype, *, copy=True: x.astype(dtype, copy=copy),
    "bitwise_right_shift": cupy.right_shift,
    "concat": lambda arrays, *, axis=0: cupy.concatenate(arrays, axis=axis),
    "cumulative_sum": lambda x, *, axis=None: cupy.cumsum(x, axis=axis),
    "isdtype": lambda dtype, kind: dtype.kind in {"bool": "b", "integral": "iu", "real floating": "f"}[kind],
    "matrix_transpose": lambda x: cupy.swapaxes(x, -1, -2),
    "permute_dims": cupy.transpose,
}

# CuPy launches each operation by itself, and a launch takes longer than a few thousand elements take to compute. These
# kernels compute in T, float32 or float64, as the definitions do.

_GELU = cupy.ElementwiseKernel(
    "T x", "T y", "y = T(0.5) * x * (T(1) + tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)))", "gelu"
)
_NORMALISE = cupy.ElementwiseKernel(
    "T x, T variance, T g, T b, T eps", "T y", "y = x / sqrt(variance + eps) * g + b", "normalise"
)
_GUMBEL = cupy.ElementwiseKernel(
    "int64 entry, int64 place, int64 seed, int64 stream",
    "float64 g",
    """
    typedef unsigned long long word;
    const word m0 = 0xD2E7470EE14C6C93ULL, m1 = 0xCA5A826395121157ULL;
    word c0 = (word)(entry / 4 + 1), c1 = (word)place, c2 = 0, c3 = 0, k0 = (word)seed, k1 = (word)stream;
    for (int round = 0; round < 10; ++round) {
      const word upper0 = __umul64hi(m0, c0), lower0 = m0 * c0, upper1 = __umul64hi(m1, c2), lower1 = m1 * c2;
      c0 = upper1 ^ c1 ^ k0, c1 = lower1, c2 = upper0 ^ c3 ^ k1, c3 = lower0;
      k0 += 0x9E3779B97F4A7C15ULL, k1 += 0xBB67AE8584CAA73BULL;
    }
    const word lane = entry % 4, chosen = lane == 0 ? c0 : lane == 1 ? c1 : lane == 2 ? c2 : c3;
    g = -log(-log(((double)(chosen >> 12) + 0.5) * 2.220446049250313e-16))
    """,
    "gumbel",
)


def _gelu(x: Any) -> Any:
    return _GELU(x) if x.dtype.char in "fd" else NotImplemented


def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    fits = x.dtype.char in "fd" and x.ndim and x.size and g.shape == b.shape == x.shape[-1:]
    if not fits or not 0 <= eps < math.inf:
        return NotImplemented
    x = x - cupy.mean(x, axis=-1, keepdims=True)
    return _NORMALISE(x, cupy.mean(x * x, axis=-1, keepdims=True), g, b, eps)


class CupyBackend(Backend):
    """CuPy on the current CUDA device. It is eager, and cannot differentiate."""

    name = "cupy"
    array_types = (cupy.ndarray,)
    xp = SimpleNamespace(**{**vars(cupy), **_MISSING})
    kernels = {"gelu": _gelu, "layer_norm": _layer_norm}
    # Measured on one H100, in PyTorch, which calls the same functions of CUDA: exp 2.35, tanh 2.88; log is documented.
    numerics = {"cuda": {"float32": Numerics(exp=(2.5, 0.0), tanh=3.0, log=4.0)}}
    dtypes = {name: np.dtype(name) for name in ("float32", "float64", "float16")}

    def devices(self) -> dict[str, Any]:
        device = cupy.cuda.Device()
        return {f"cuda:{device.id}": device}

    def put(self, a: np.ndarray, device: Any) -> Any:
        if a.dtype.char not in "?bBhHiIlLqQefd":
            raise TypeError(f"CuPy has no {a.dtype}")
        return cupy.asarray(a)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x.get())

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        if isinstance(start, int):
            return super().write(buffer, value, start)
        buffer[..., start + cupy.arange(value.shape[-2]), :] = value  # a slice would wait for the value of start
        return buffer

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        cupy.add.at(x, indices, rows)
        return x

    def fetch(self, x: Any) -> Callable[[], np.ndarray]:
        # The device copies to page-locked memory while the host continues.
        host, copied = cupyx.empty_pinned(x.shape, x.dtype), cupy.cuda.Event()
        x.get(out=host, blocking=False)
        copied.record()

        def wait() -> Any:
            copied.synchronize()
            return host

        return wait

    def gumbel(self, entries: Any, places: Any, seeds: Any, streams: Any) -> Any:
        return _GUMBEL(entries, places, seeds, streams)
