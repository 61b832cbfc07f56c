"""NumPy, whose namespace is the array API. Each kernel allocates one array and computes in place."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from portable_gpt2.backend import Backend, subclass_refusal
from portable_gpt2.numerics import Numerics

_BLOCK = 2**18  # softmax processes this many bytes at a time, so that they stay in the CPU's cache between its passes
_SHORT = 16  # a softmax over an axis of at most this many elements is computed with that axis first
_FEW = 64
"""From 2 to this many rows, a product x w with a w in Fortran order is computed as (w^T x^T)^T.

The products with c_proj of the MLP of the 124M model take 0.68 times as long in this form for 8 rows, 0.73 times for 32
rows, and 0.93 times for 64 rows on an Intel processor; 0.91 and 0.93 times for 8 and 32 rows with the kernels for an
AMD Zen. For 512 rows, they take 1.4 times as long.
"""
_QUERIES = 64  # attention processes this many queries at a time


def _is_wide(x: Any) -> bool:
    """Return whether x has 32 or 64 bits. The definitions in `ops` handle 16-bit floats, converted to float32."""
    return x.dtype.char in "fd"


def _conv1d(x: Any, w: Any, b: Any) -> Any:
    if w.ndim == 3 and len(w) == 1:
        w = w[0]
    if not _is_wide(x) or not x.size or w.ndim != 2 or w.shape != x.shape[-1:] + b.shape:
        return NotImplemented
    rows = x.reshape(-1, x.shape[-1])
    if 1 < len(rows) <= _FEW and w.flags.f_contiguous:
        y = np.ascontiguousarray((w.T @ np.ascontiguousarray(rows.T)).T)
    else:
        y = rows @ w
    y += b
    return y.reshape(x.shape[:-1] + b.shape)


def _softmax(x: Any, *, axis: int = -1) -> Any:
    if not _is_wide(x) or not x.size or type(axis) is not int or not -x.ndim <= axis < x.ndim:
        return NotImplemented
    n = x.shape[axis]
    if n <= _SHORT and x.size >= 64 * n:  # a short row takes as long to reduce as a row of one element
        return np.moveaxis(_softmax_into(None, np.ascontiguousarray(np.moveaxis(x, axis, 0)), 0), 0, axis)
    if x.nbytes <= _BLOCK or not x.flags.c_contiguous:
        return _softmax_into(None, x, axis)
    y = np.empty_like(x)
    rows, into = (a.reshape(-1, n, math.prod(x.shape[axis:][1:])) for a in (x, y))
    step = max(1, _BLOCK // rows[0].nbytes)
    for i in range(0, len(rows), step):
        _softmax_into(into[i : i + step], rows[i : i + step], 1)
    return y


def _softmax_into(y: Any, x: Any, axis: int) -> Any:
    """Write the softmax of x to y and return y. y may be x. If y is None, a new array is returned."""
    y = np.subtract(x, np.maximum.reduce(x, axis=axis, keepdims=True), out=y)
    np.exp(y, out=y)
    y /= np.add.reduce(y, axis=axis, keepdims=True)
    return y


def _gelu(x: Any) -> Any:
    if not _is_wide(x) or not x.ndim:
        return NotImplemented
    scale = math.sqrt(2 / math.pi)
    y = x * x
    y *= 0.044715 * scale
    y += scale
    y *= x
    np.tanh(y, out=y)
    y += 1
    y *= 0.5  # before the multiplication by x, because 2 x may overflow
    y *= x
    return y


def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    if (
        not _is_wide(x)
        or not x.size
        or not x.ndim
        or not (g.shape == b.shape == x.shape[-1:])
        or not 0 <= eps < math.inf
    ):
        return NotImplemented
    n = x.shape[-1]
    y = x - np.add.reduce(x, axis=-1, keepdims=True) / n
    s = np.vecdot(y, y)[..., None] / n
    y /= np.sqrt(s + eps)
    y *= g
    y += b
    return y


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None) -> Any:
    if not _is_wide(q) or q.ndim < 2 or k.ndim < 2 or not q.size or not k.size:
        return NotImplemented
    *batch, queries, d = q.shape
    keys = k.shape[-2]
    if k.shape != (*batch, keys, d) or v.shape[:-1] != k.shape[:-1] or not (scale is None or math.isfinite(scale)):
        return NotImplemented
    if mask is not None and (mask.dtype.char != "?" or mask.shape[-2:] != (queries, keys) or mask.ndim > q.ndim):
        return NotImplemented
    if mask is not None and any(m not in (1, n) for m, n in zip(mask.shape[-3::-1], q.shape[-3::-1], strict=False)):
        return NotImplemented
    if causal and queries > keys:
        return NotImplemented
    y = np.empty((*batch, queries, v.shape[-1]), q.dtype)
    for i in range(0, queries, _QUERIES):
        rows = slice(i, i + _QUERIES)
        shown, seen, hidden = None if mask is None else mask[..., rows, :], keys, None
        if causal and queries > 1:
            own = np.arange(queries)[rows, None] + (keys - queries)  # the number of each query's own key
            shown = (own >= np.arange(keys)) & (True if shown is None else shown)
        if shown is not None and not shown.all():
            if queries > 1:  # skip the keys that no query sees: about half of them if attention is causal
                seen = keys - int(np.argmax(shown.any(axis=tuple(range(shown.ndim - 1)))[::-1]))
            hidden = ~shown[..., :seen]
        scores = q[..., rows, :] @ k[..., :seen, :].mT
        scores *= d**-0.5 if scale is None else scale
        if hidden is not None:
            np.copyto(scores, -np.inf, where=hidden)
        _softmax_into(scores, scores, -1)
        np.matmul(scores, v[..., :seen, :], out=y[..., rows, :])
    return y


def _unembed(x: Any, w: Any) -> Any:
    if not _is_wide(x) or w.ndim != 2 or w.shape[1:] != x.shape[-1:]:
        return NotImplemented
    return (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w.T).reshape(*x.shape[:-1], len(w))


def _embed(ids: Any, w: Any) -> Any:
    if ids.dtype.kind not in "iu" or w.ndim != 2:
        return NotImplemented
    if ids.size and not 0 <= ids.min() <= ids.max() < w.shape[0]:  # a negative id would count from the end
        return NotImplemented
    return w[ids]  # numpy.take is twenty times slower on a table in Fortran order


class NumpyBackend(Backend):
    """NumPy on the CPU. Arrays may have 16-bit floats; ops compute in float32 at least."""

    name = "numpy"
    array_types = (np.ndarray, np.generic)
    xp: ClassVar[Any] = np
    kernels = {
        "conv1d": _conv1d,
        "softmax": _softmax,
        "gelu": _gelu,
        "layer_norm": _layer_norm,
        "attention": _attention,
        "embed": _embed,
        "unembed": _unembed,
    }
    numerics = {
        "cpu": {
            # NumPy states at most 2.1264e-7 for exp in all of float32, and 3.83 ulp for log
            # (loops_exponent_log.dispatch.c.src); measured: 3.41 and 3.95.
            "float32": Numerics(exp=(3.6, 0.0), log=8.0),
        }
    }
    dtypes = {
        "float32": np.dtype(np.float32),
        "float64": np.dtype(np.float64),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype(np.float16),
    }

    def refusal(self, x: Any) -> str | None:
        # NumPy defines numpy.matrix, masked arrays and record arrays as well, but they compute differently.
        is_plain = type(x) in (np.ndarray, np.memmap) or isinstance(x, np.generic)
        return None if is_plain else subclass_refusal("numpy", "numpy.asarray(x)")

    def devices(self) -> dict[str, Any]:
        return {"cpu": "cpu"}

    def peek(self, x: Any) -> np.ndarray:
        return self.to_numpy(x)

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        np.add.at(x, indices, rows)
        return x

    def relayout(self, path: str, x: Any) -> Any:
        # The product of one row and a matrix takes as long as reading the matrix. A tall matrix is read faster in
        # Fortran order than in C order: c_proj of the mlp at 32 instead of 25 GB/s, and wte for the logits at 32
        # instead of 27 GB/s. For comparison, np.sum reads at 28 GB/s.
        if x.ndim != 2 or x.shape[0] < 4 * x.shape[1] or x.flags.f_contiguous:
            return x
        y = np.empty(x.shape, x.dtype, order="F")
        # 64 rows fit into the CPU's cache. Copying wte of the 124M model takes 83 ms in this way, and 195 ms with all
        # rows at once.
        for i in range(0, len(x), 64):
            y[i : i + 64] = x[i : i + 64]
        return y
