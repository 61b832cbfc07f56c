"""JAX: jax.numpy is an array-API namespace already; compiled by jax.jit, with float32 products at full precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from portable_gpt2.backend import Backend

# By default a GPU multiplies float32 in TF32.
_PRECISION = jax.lax.Precision.HIGHEST
_matmul = functools.partial(jnp.matmul, precision=_PRECISION)
_jit_softmax = jax.jit(jax.nn.softmax, static_argnames=("axis",))
_jit_gelu = jax.jit(functools.partial(jax.nn.gelu, approximate=True))


def _row_times(x: Any, w: Any) -> Any:
    """Multiply a row [nx] with w [nx, nf] block by block of w's rows, each of which lies in memory as one piece.

    The four products of a 124M layer, each alone, ran at 0.5 to 0.7 of the read bandwidth as x w, and at about 0.9 so
    or from a transposed copy; a whole step took 9% less (one run, of which 4% is noise). From 128 to 384 rows a block
    the steps differed by little more than that noise: 192 was not chosen by more than that.
    """
    nx, nf = w.shape
    rows = max(n for n in range(1, 193) if nx % n == 0)
    if rows < 64:
        return _matmul(x, w)
    blocks = jnp.reshape(w, (nx // rows, rows, nf)), jnp.reshape(x, (nx // rows, rows))
    return jnp.sum(jax.lax.dot_general(*blocks, (((1,), (1,)), ((0,), (0,))), precision=_PRECISION), axis=0)


@functools.partial(jax.jit, inline=True)
def _jit_conv1d(x: Any, w: Any, b: Any) -> Any:
    w = jnp.reshape(w, w.shape[-2:])
    if x.size != w.shape[0]:
        return _matmul(x, w) + b
    y = jax.lax.platform_dependent(jnp.reshape(x, (x.size,)), w, cpu=_row_times, default=_matmul)
    return jnp.reshape(y, (*x.shape[:-1], *b.shape)) + b


@functools.partial(jax.jit, inline=True)
def _jit_attend(q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
    """Attend by one query: k q^T reads the keys as they lie, where q k^T transposes them first."""
    scores = _matmul(k, jnp.matrix_transpose(q)) * scale
    if mask is not None:
        scores = jnp.where(jnp.matrix_transpose(mask), scores, jnp.finfo(scores.dtype).min)
    return _matmul(jnp.matrix_transpose(jax.nn.softmax(scores, axis=-2)), v)


@functools.partial(jax.jit, inline=True)
def _jit_unembed(x: Any, w: Any) -> Any:
    """Multiply one row with the table as w x: XLA fuses x w^T with the layer_norm before it (22 ms a step, not 18)."""
    return jnp.reshape(_matmul(w, jnp.reshape(x, (x.size,))), (*x.shape[:-1], w.shape[0]))


@functools.partial(jax.jit, inline=True)
def _write(buffer: Any, value: Any, start: Any) -> Any:
    def update(buffer: Any, value: Any, start: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(buffer, value, start, axis=-2)

    def apart(buffer: Any, value: Any, start: Any) -> Any:
        """Update inside a condition that always holds: else XLA's CPU code fuses it with what reads the buffer.

        It then copies the whole buffer. Twelve layers of writing and attending alone, 1024 rows: 60 ms, and 4 like
        this, which is what they take without writing. An optimization_barrier changed nothing, a scatter took 76.
        """
        return jax.lax.cond(start >= 0, update, lambda buffer, *_: buffer, buffer, value, start)

    return jax.lax.platform_dependent(buffer, value, start, cpu=apart, default=update)


def _is_wide(x: Any) -> bool:
    """Return whether x is not of 16 bits, in which jax.nn rounds every step."""
    return bool(x.dtype in (jnp.float32, jnp.float64))


def _softmax(x: Any, *, axis: int = -1) -> Any:
    if not _is_wide(x) or type(axis) is not int or not -x.ndim <= axis < x.ndim:
        return NotImplemented
    return _jit_softmax(x, axis=axis)


def _conv1d(x: Any, w: Any, b: Any) -> Any:
    fits = x.size and x.ndim and b.ndim == 1 and w.shape in ((x.shape[-1], b.shape[0]), (1, x.shape[-1], b.shape[0]))
    return _jit_conv1d(x, w, b) if fits and _is_wide(x) else NotImplemented


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, scale: float | None = None) -> Any:
    if q.ndim < 2 or k.ndim < 2 or q.shape[-2] != 1 or k.size == 0 or not _is_wide(q):
        return NotImplemented
    *batch, _, d = q.shape
    keys = k.shape[-2]
    if k.shape != (*batch, keys, d) or v.shape[:-1] != k.shape[:-1] or not (mask is None or mask.shape == (1, keys)):
        return NotImplemented
    return _jit_attend(q, k, v, mask, d**-0.5 if scale is None else scale)


def _unembed(x: Any, w: Any) -> Any:
    fits = x.size and x.ndim and w.ndim == 2 and x.shape[-1] == w.shape[1] == x.size
    return _jit_unembed(x, w) if fits and _is_wide(x) else NotImplemented


def _gelu(x: Any) -> Any:
    return _jit_gelu(x) if _is_wide(x) else NotImplemented


class JaxBackend(Backend):
    """JAX, on whatever platform it finds; `device` also takes a jax.Device or a jax.sharding.Sharding."""

    name = "jax"
    array_types = (jax.Array,)
    xp = SimpleNamespace(**{**vars(jnp), "matmul": _matmul})
    kernels = {
        "conv1d": _conv1d,
        "softmax": _softmax,
        "gelu": _gelu,
        "attention": _attention,
        "unembed": _unembed,
    }
    recompiles = True
    _dtypes = {name: jnp.dtype(name) for name in ("float32", "float64", "bfloat16", "float16")}

    def devices(self) -> list[str]:
        return list(self._devices())

    def _devices(self) -> dict[str, Any]:
        found = [*jax.devices("cpu"), *jax.devices()]
        return {_device_name(device): device for device in found}

    def _find_device(self, device: Any) -> Any:
        if isinstance(device, jax.Device | Sharding):
            return device
        devices = self._devices()
        return devices.get(device, devices.get(f"{device}:0", devices.get(str(device).removesuffix(":0"))))

    def device(self, x: Any) -> str:
        return ", ".join(sorted(_device_name(device) for device in x.devices()))

    def from_numpy(self, a: np.ndarray, dtype: str | None = None, device: Any = None) -> Any:
        a = self.host_array(a, dtype)
        if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype:
            raise TypeError(
                f"backend 'jax' would narrow {a.dtype} to {jax.dtypes.canonicalize_dtype(a.dtype)}; convert the array, "
                f"or allow 64 bits with jax.config.update('jax_enable_x64', True) or JAX_ENABLE_X64=1 at the start"
            )
        target = self.default_device if device is None else self.find_device(device)
        return jnp.asarray(a) if target is None else jax.device_put(a, target)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        return x.at[indices].add(rows)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        differentiated: Callable[..., Any] = jax.value_and_grad(fn)
        return differentiated

    def arange(self, n: Any, *, like: Any) -> Any:
        return jnp.arange(n, device=_replicated(like))

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        if isinstance(like, jax.core.Tracer):
            return jnp.zeros(shape, like.dtype)
        # Not jnp.zeros(device=): that fills them on the default device and copies.
        return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=_replicated(like))(shape, like.dtype)

    def placement(self, x: Any) -> Any:
        return _replicated(x)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        return _write(buffer, value, start)

    def compile(
        self,
        fn: Callable[..., Any],
        *,
        bound: Any = None,
        static: tuple[str, ...] = (),
        donate: tuple[str, ...] = (),
    ) -> Callable[..., Any]:
        # Parameters are an argument: closed over, they would be compiled in as constants (14 s and 1.6 GB for 124M).
        return functools.partial(jax.jit(fn, static_argnames=static, donate_argnames=donate), bound)


def _device_name(device: Any) -> str:
    platform = "cuda" if device.platform == "gpu" else device.platform
    return "cpu" if platform == "cpu" and device.id == 0 else f"{platform}:{device.id}"


def _replicated(like: Any) -> Any:
    """Return the placement of something small beside like: on its device, or whole on each device of its mesh."""
    if isinstance(like, jax.core.Tracer):
        return None  # the compiler places it
    if isinstance(like.sharding, NamedSharding):
        return NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.sharding
