"""JAX: jax.numpy is an array-API namespace already; compiled by jax.jit, with float32 products at full precision."""

from __future__ import annotations

import functools
import math
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


def _astype(x: Any, dtype: Any, /, *, copy: bool = False, device: Any = None) -> Any:
    """Convert as `jnp.astype`, which warns where JAX has 32 bits for a dtype of 64."""
    return jnp.astype(x, jax.dtypes.canonicalize_dtype(dtype), copy=copy, device=device)


_barrier: Callable[[Any], Any] = jax.lax.optimization_barrier


def _jit(kernel: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a kernel, which then computes in float32 at least; what else is wrong with its input, it says by failing.

    So all checks run while tracing, where they cost nothing: on the arrays themselves those of `conv1d` took 4 us.
    """

    @functools.wraps(kernel)
    def traced(x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.dtype not in JaxBackend.dtypes.values():
            raise TypeError(f"x has dtype {x.dtype}")

        def widen(a: Any) -> Any:
            return a.astype(jnp.promote_types(a.dtype, jnp.float32)) if isinstance(a, jax.Array) else a

        return kernel(widen(x), *map(widen, args), **{name: widen(a) for name, a in kwargs.items()}).astype(x.dtype)

    compiled: Callable[..., Any] = jax.jit(traced, inline=True, **options)
    return compiled


_jit_softmax = _jit(jax.nn.softmax, static_argnames=("axis",))


@_jit
def _gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=True)


_FEW = 32
"""Up to how many rows a product reads the weight rather than computes: at 64, x w took 0.85 of `_rows_times`."""


def _row_times(x: Any, w: Any) -> Any:
    """Multiply a row [1, nx] with w [nx, nf] block by block of w's rows, each of which lies in memory as one piece.

    The four products of a 124M layer, each alone, ran at 0.5 to 0.7 of the read bandwidth as x w, and at about 0.9 so
    or from a transposed copy; a whole step took 9% less (one run, of which 4% is noise). From 128 to 384 rows a block
    the steps differed by little more than that noise: 192 was not chosen by more than that.
    """
    nx, nf = w.shape
    rows = max(n for n in range(1, 193) if nx % n == 0)
    if rows < 64:
        return _matmul(x, w)
    blocks = jnp.reshape(w, (nx // rows, rows, nf)), jnp.reshape(x, (nx // rows, rows))
    y = jax.lax.dot_general(*blocks, (((1,), (1,)), ((0,), (0,))), precision=_PRECISION)
    return jnp.sum(y, axis=0, keepdims=True)


def _rows_times(x: Any, w: Any) -> Any:
    """Multiply few rows [n, nx] with w [nx, nf] by another of XLA's libraries, which takes x transposed.

    XLA gives x w to YNNPACK, which reads w at 9 GB/s, and this to Eigen: for 8 rows the products of all 124M layers
    took 0.7 of the time so, for 32 0.8, for 2 as long. Without the barrier the transpositions cancel out.
    """
    return _matmul(jnp.matrix_transpose(_barrier(jnp.matrix_transpose(x))), w)


@_jit
def _conv1d(x: Any, w: Any, b: Any) -> Any:
    *start, nx = x.shape
    (nf,) = b.shape
    if w.shape not in ((nx, nf), (1, nx, nf)):
        raise ValueError(f"w has shape {w.shape}")
    w = jnp.reshape(w, (nx, nf))
    n = math.prod(start)
    if n == 0 or n > _FEW:
        return _matmul(x, w) + b
    rows = jnp.reshape(x, (n, nx))
    y = jax.lax.platform_dependent(rows, w, cpu=_row_times if n == 1 else _rows_times, default=_matmul)
    return jnp.reshape(y, (*start, nf)) + b


@functools.partial(jax.jit, inline=True)
def _jit_attend(q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
    """Attend by one query: k q^T reads the keys as they lie, where q k^T transposes them first.

    The softmax is over the last axis: over the keys of [..., keys, 1] it took four times as long.
    """
    scores = jnp.squeeze(_matmul(k, jnp.matrix_transpose(q)), axis=-1) * scale
    if mask is not None:
        scores = jnp.where(jnp.squeeze(mask, axis=-2), scores, -jnp.inf)
    return _matmul(jax.nn.softmax(scores)[..., None, :], v)


def _table_times(x: Any, w: Any) -> Any:
    """Return x w^T for few rows [n, d] of x: the table times x^T, with the small side transposed and not the table.

    For 8 rows and a 124M model it took half the time of x w^T, for 32 0.7. Without the barriers XLA folds the
    transpositions into the product: without the first it took twice as long as x w^T, without the second as long.
    """
    transposed = _barrier(jnp.matrix_transpose(x))
    return jnp.matrix_transpose(_barrier(_matmul(w, transposed)))


@functools.partial(jax.jit, inline=True)
def _jit_unembed(x: Any, w: Any) -> Any:
    """Multiply one row with the table as w x: XLA fuses x w^T with the layer_norm before it (22 ms a step, not 18)."""
    vocab, d = w.shape
    if x.size == d:
        y = _matmul(w, jnp.reshape(x, (d,)))
    else:
        rows = jnp.reshape(x, (x.size // d, d))
        y = jax.lax.platform_dependent(
            rows, w, cpu=_table_times, default=lambda x, w: _matmul(x, jnp.matrix_transpose(w))
        )
    return jnp.reshape(y, (*x.shape[:-1], vocab))


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
    if type(axis) is not int:  # True and 1.0 would find what was compiled for 1
        return NotImplemented
    return _jit_softmax(x) if axis == -1 else _jit_softmax(x, axis=axis)  # a keyword costs 1 us of 10


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, scale: float | None = None) -> Any:
    if q.ndim < 2 or k.ndim < 2 or q.shape[-2] != 1 or not k.size or not q.size or not _is_wide(q):
        return NotImplemented
    *batch, _, d = q.shape
    keys = k.shape[-2]
    if k.shape != (*batch, keys, d) or v.shape[:-1] != k.shape[:-1] or not (scale is None or math.isfinite(scale)):
        return NotImplemented
    if mask is not None:
        leading = zip(mask.shape[-3::-1], batch[::-1], strict=False)
        fits = mask.dtype == jnp.bool_ and mask.shape[-2:] == (1, keys) and mask.ndim <= q.ndim
        if not fits or any(m not in (1, n) for m, n in leading):
            return NotImplemented
    return _jit_attend(q, k, v, mask, d**-0.5 if scale is None else scale)


def _unembed(x: Any, w: Any) -> Any:
    fits = x.size and x.ndim and w.ndim == 2 and x.shape[-1] == w.shape[1] and x.size <= _FEW * w.shape[1]
    return _jit_unembed(x, w) if fits and _is_wide(x) else NotImplemented


class JaxBackend(Backend):
    """JAX, on whatever platform it finds; `device` also takes a jax.Device or a jax.sharding.Sharding."""

    name = "jax"
    array_types = (jax.Array,)
    xp = SimpleNamespace(**{**vars(jnp), "matmul": _matmul, "astype": _astype})
    kernels = {
        "conv1d": _conv1d,
        "softmax": _softmax,
        "gelu": _gelu,
        "attention": _attention,
        "unembed": _unembed,
    }
    compiles_per_shape = True
    handwritten_gradient_is_faster = True
    dtypes = {name: jnp.dtype(name) for name in ("float32", "float64", "bfloat16", "float16")}

    def refusal(self, x: Any) -> str | None:
        # No class is refused: all subclasses of jax.Array belong to JAX, and other classes register themselves.
        if not isinstance(x, jax.core.Tracer) and x.is_deleted():
            return "was deleted, or donated to a compiled function; make the array again"
        return None

    def peek(self, x: Any) -> np.ndarray | None:
        if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
            return None
        return self.to_numpy(x) if all(device.platform == "cpu" for device in x.devices()) else None

    def devices(self) -> dict[str, Any]:
        found = [*jax.devices("cpu"), *jax.devices()]
        return {_device_name(device): device for device in found}

    def resolve_device(self, device: Any) -> Any:
        return device if isinstance(device, jax.Device | Sharding) else super().resolve_device(device)

    def device(self, x: Any) -> str:
        return ", ".join(sorted(_device_name(device) for device in x.devices()))

    def put(self, a: np.ndarray, device: Any) -> Any:
        if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype:
            raise TypeError(
                f"backend 'jax' would narrow {a.dtype} to {jax.dtypes.canonicalize_dtype(a.dtype)}; convert the array, "
                f"or allow 64 bits with jax.config.update('jax_enable_x64', True) or JAX_ENABLE_X64=1 at the start"
            )
        if a.size == 1 and isinstance(device, Sharding):
            return _put_one(device)(a)
        x = jnp.asarray(a) if device is None else jax.device_put(a, device)
        # JAX copies asynchronously and keeps the source alive until then. Without waiting, a model that is loaded
        # tensor by tensor would be in memory twice.
        return x.block_until_ready() if a.nbytes >= 2**20 else x

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        return x.at[indices].add(rows)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        differentiated: Callable[..., Any] = jax.value_and_grad(fn)
        return differentiated

    def fori_loop(self, n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
        return jax.lax.fori_loop(0, n, body, state)

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

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        # The compiled function takes the parameters as arguments: as constants in it, they took 14 s to compile and
        # 1.6 GB for the 124M model.
        return functools.partial(jax.jit(fn, donate_argnames=donate), *bound)


@functools.cache
def _put_one(target: Sharding) -> Callable[[Any], Any]:
    """Return what puts one number on target: device_put takes 0.25 ms between two steps of a model, and this 0.06."""
    put: Callable[[Any], Any] = jax.jit(lambda a: a, out_shardings=target)
    return put


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
