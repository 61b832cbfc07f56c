"""PyTorch: the array-API functions that portable code uses, written directly over torch, and kernels from torch.

array_api_compat.torch has these functions too, but it resolves types on every call, which slows down an eager decode
step.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import inspect
import math
import mmap
import os
import re
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from portable_gpt2.backend import Backend, subclass_refusal
from portable_gpt2.host import TIMEOUT_VARIABLE, CheckpointError, ProcessLost, StoredTensor, mesh_timeout
from portable_gpt2.numerics import Numerics

_FLOATS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FLOATING = frozenset(_FLOATS.values())
_WIDE = (torch.float32, torch.float64)
_Axis = int | tuple[int, ...] | None
_UNINITIALIZED = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class _Namespace:
    """The array-API functions that portable code uses, over torch.Tensor."""

    float32, float64, int32, int64 = torch.float32, torch.float64, torch.int32, torch.int64
    exp, log, tanh, sqrt, matmul = torch.exp, torch.log, torch.tanh, torch.sqrt, torch.matmul
    where, reshape, arange, zeros = torch.where, torch.reshape, torch.arange, torch.zeros
    bitwise_right_shift = torch.bitwise_right_shift

    @staticmethod
    def max(x: Any, /, *, axis: _Axis = None, keepdims: bool = False) -> Any:
        return torch.amax(x, () if axis is None else axis, keepdim=keepdims)

    @staticmethod
    def sum(x: Any, /, *, axis: _Axis = None, dtype: Any = None, keepdims: bool = False) -> Any:
        return torch.sum(x, axis, keepdim=keepdims, dtype=dtype)

    @staticmethod
    def cumulative_sum(x: Any, /, *, axis: int | None = None) -> Any:  # axis may be None only for a vector
        return torch.cumsum(x, axis or 0)

    @staticmethod
    def mean(x: Any, /, *, axis: _Axis = None, keepdims: bool = False) -> Any:
        return torch.mean(x, axis, keepdim=keepdims)

    @staticmethod
    def matrix_transpose(x: Any, /) -> Any:
        return x.mT

    @staticmethod
    def permute_dims(x: Any, /, axes: tuple[int, ...]) -> Any:
        return torch.permute(x, axes)

    @staticmethod
    def take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:  # axis may be None only for a vector
        return torch.index_select(x, axis or 0, indices)

    @staticmethod
    def take_along_axis(x: Any, indices: Any, /, *, axis: int = -1) -> Any:
        if x.shape[:-1] == indices.shape[:-1] and axis in (-1, x.ndim - 1):
            return torch.gather(x, -1, indices.long())  # take_along_dim would reduce an index modulo the length
        return torch.take_along_dim(x, indices.long(), axis)

    @staticmethod
    def concat(arrays: Any, /, *, axis: int | None = 0) -> Any:
        return torch.cat([x.reshape(-1) for x in arrays] if axis is None else list(arrays), axis or 0)

    @staticmethod
    def astype(x: Any, dtype: Any, /, *, copy: bool = True) -> Any:
        return x.to(dtype, copy=copy)

    @staticmethod
    def isdtype(dtype: Any, kind: str) -> bool:
        return dtype in {"bool": (torch.bool,), "integral": _INTEGERS, "real floating": _FLOATS.values()}[kind]


_SMALL = 1 << 14
"""Up to this many elements, the overhead of a call takes longer than the computation."""

_LARGE = 1 << 18
"""From this many elements on, a weight is processed in blocks. Smaller weights fit into the CPU's caches."""


_IS_BLOCKED = torch.backends.cpu.get_cpu_capability() != "AVX512"
"""Whether a weight is processed in blocks for small batches, which depends on the processor and never on a timing.

On an AMD processor without AVX-512, MKL does not use its threads well for a small batch: it reads a weight at 0.6 times
the memory bandwidth, and in blocks at 0.95 times. On an Intel processor with AVX-512, MKL's own product is faster: a
decode step of the 124M model takes 0.93 times as long as with blocks for 1 row, 0.86 times for 8 rows, and 0.83 times
for 32 rows.
"""


def _blocks(x: Any, w: Any) -> int:
    """Return the number of blocks in which to compute the product of rows x [..., nx] and w [nx, nf].

    The number is 0 if the product should be computed as a whole. If it is divided into blocks, each thread computes
    whole blocks and reads at full bandwidth. More than two blocks per thread were not faster. Blocks are not used if a
    gradient is needed, because they would not be faster; in 16 bits, because each block would be rounded; and under
    torch.compile, which divides products itself.
    """
    if not _IS_BLOCKED or w.numel() < _LARGE or not w.is_cpu or w.dtype not in _WIDE or torch.compiler.is_compiling():
        return 0
    if _is_distributed(w) or _is_distributed(x):
        return 0
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return 0
    return min(2 * int(torch.get_num_threads()), 16)


def _sum_of_blocks(rows: Any, w: Any, blocks: int) -> Any:
    """Return the product of rows and w as a sum over blocks of nx. Each block of w is contiguous."""
    nx, nf = w.shape
    return torch.bmm(rows.reshape(-1, blocks, nx // blocks).transpose(0, 1), w.view(blocks, nx // blocks, nf)).sum(0)


_HAS_FBGEMM = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _multiplied() -> dict[Any, bool]:
    if not torch.backends.mkldnn.is_available():
        return dict.fromkeys((torch.bfloat16, torch.float16), False)
    of_bfloat16, of_float16 = (getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")() for name in ("bf16", "fp16"))
    if _HAS_FBGEMM:  # of_bfloat16 is true for each AVX-512, which emulates the product
        names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        of_bfloat16 = of_bfloat16 and any(getattr(torch.cpu, name, bool)() for name in names)
    return {torch.bfloat16: of_bfloat16, torch.float16: of_float16}


_MULTIPLIED = _multiplied()
"""Whether the processor multiplies matrices of a 16-bit dtype. If it does not, they are converted to float32.

Otherwise PyTorch emulates the product. For 64 rows and a weight of the mlp of the 124M model, in bfloat16, this takes 6
ms with AVX-512 and 300 ms with AVX2; the conversion and the product in float32 take 2.3 ms, and a product with AMX 0.7.
"""


def _is_converted(w: Any) -> bool:
    return w.is_cpu and not _MULTIPLIED.get(w.dtype, True) and not _is_distributed(w)


_COLUMNS = 192
"""The least number of columns of a 16-bit weight in a block. A decode step of the 124M model took 22.6 ms with 96
columns, 21.1 ms with 128, 20.8 ms with 192, and 22.2 ms with 256."""


@functools.lru_cache(maxsize=64)
def _rows_of_blocks(nx: int, blocks: int) -> tuple[Any, Any]:
    """Return the row numbers of each block of columns of w [nx, nf], one block after another, and where each begins.

    A row number is an index into w.view(nx * blocks, nf // blocks).
    """
    rows = torch.arange(nx) * blocks + torch.arange(blocks)[:, None]
    return rows.view(-1).int(), (torch.arange(blocks) * nx).int()


def _sum_of_rows(x: Any, w: Any) -> Any:
    """Return the product of a row x [1, nx] with a 16-bit w [nx, nf], or None if this form is not supported.

    The product is the sum of the rows of w, weighted by x: an embedding bag per block of columns. PyTorch's kernel for
    this form, FBGEMM, uses all threads, sums in float32 and rounds once. It reads a 16-bit w at the memory bandwidth,
    with AVX-512 and with AVX2. PyTorch's products in bfloat16 take 1.7 to 2.4 times as long with AMX, as long as in
    float32; with AVX2 they take 8 times as long or more. It has no gradient, so it is for inference mode, in which a
    decode step runs.
    """
    nx, nf = w.shape
    if w.dtype in _WIDE or w.numel() < _LARGE or not w.is_cpu or not w.is_contiguous() or type(x) is not torch.Tensor:
        return None
    if not torch.is_inference_mode_enabled() or torch.compiler.is_compiling() or not _HAS_FBGEMM:
        return None
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    blocks = next(nf // n for n in range(min(_COLUMNS, nf), nf + 1) if nf % n == 0)
    if blocks < torch.get_num_threads():
        return None
    rows, starts = _rows_of_blocks(nx, blocks)
    weights = x.expand(blocks, nx).reshape(-1)
    # The positional arguments are: scale by frequency, the mode (a sum), a sparse gradient.
    sums, *_ = torch.embedding_bag(w.view(nx * blocks, nf // blocks), rows, starts, False, 0, False, weights)
    return sums.view(1, nf)


def _conv1d(x: Any, w: Any, b: Any) -> Any:
    if w.ndim == 3 and w.shape[0] == 1:
        w = w[0]
    if w.ndim != 2 or w.shape != x.shape[-1:] + b.shape:
        return NotImplemented
    if x.numel() + w.numel() <= _SMALL and x.dtype in _WIDE:  # in 16 bits, addmm rounds once and not twice
        return torch.matmul(x, w) + b  # addmm takes 1.5 times as long, because x must become a matrix
    *start, nx = x.shape
    n, (nf,) = math.prod(start), b.shape
    blocks = _blocks(x, w) if 0 < n <= 256 else 0
    # The four products of a layer of the 124M model were timed with 2 threads, relative to addmm. In blocks of nx they
    # take 0.66 times as long for 1 row, and 0.60 times for 2 rows. In blocks of nf they take 0.56 times as long for 4
    # rows, 0.8 times for 8 to 32 rows, 0.92 times for 128 rows, equally long for 512 rows, and longer for more rows.
    # In a weight in Fortran order (see `relayout`), the blocks of nf are contiguous.
    if blocks and n < 4 and nx % blocks == 0 and w.is_contiguous():
        return (_sum_of_blocks(x, w, blocks) + b).view(*start, nf)
    rows = x.reshape(n, nx)
    if blocks and nf % blocks == 0:
        columns = w.view(nx, blocks, nf // blocks).transpose(0, 1)
        y = torch.baddbmm(b.view(blocks, 1, nf // blocks), rows.expand(blocks, n, nx), columns)
        return y.transpose(0, 1).reshape(*start, nf)
    if n == 1 and (y := _sum_of_rows(rows, w)) is not None:
        return (y + b).view(*start, nf)
    if _is_converted(w):
        return torch.addmm(b.float(), rows.float(), w.float()).to(w.dtype).reshape(*start, nf)
    return torch.addmm(b, rows, w).reshape(*start, nf)


def _padding(n: int, w: Any) -> int:
    """Return the number of rows that are added to the embedding matrix w for its product with n hidden states.

    On an H100 in bfloat16, the products with 50,257 rows, and those of their gradients, took 15 of the 99 ms of a
    training step, because the rows of the logits are not aligned. With few hidden states, the copy of w would take
    longer than it saves, and in float32 padding saved nothing.
    """
    is_narrow = w.is_floating_point() and w.dtype not in _WIDE
    return -w.shape[0] % 64 if n >= 256 and is_narrow and not w.is_cpu and not _is_distributed(w) else 0


def _unembed(x: Any, w: Any) -> Any:
    if w.ndim != 2 or x.shape[-1:] != w.shape[1:]:
        return NotImplemented
    *start, d = x.shape
    n = math.prod(start)
    if padding := _padding(n, w):
        return F.linear(x, F.pad(w, (0, 0, 0, padding)))[..., : w.shape[0]]
    w = w.mT
    rows = x.reshape(n, d)
    blocks = _blocks(rows, w) if w.is_contiguous() else 0  # `relayout` makes the transposed w contiguous
    # In blocks, the product takes 0.55 times as long as x w^T for 1 row, and 0.9 times for 32 rows. For more rows, the
    # sum over the blocks takes too long.
    if blocks and d % blocks == 0 and 6 * blocks * n <= d:
        y = _sum_of_blocks(rows, w, blocks)
    elif n == 1 and (found := _sum_of_rows(rows, w)) is not None:
        y = found
    elif _is_converted(w):  # a part at a time, because a whole copy in float32 would take twice the memory of w
        y = torch.cat([torch.matmul(rows.float(), part.float()).to(w.dtype) for part in w.split(_PART, 1)], 1)
    else:
        y = torch.matmul(rows, w)
    return y.reshape(*start, w.shape[1])


_PART = 1 << 13
"""How many rows of a 16-bit embedding matrix are converted to float32 at a time."""


def _softmax(x: Any, *, axis: int = -1) -> Any:
    if axis == -1 and type(axis) is int and x.ndim:  # the fast path: for a small x, every check takes measurable time
        return torch.softmax(x, -1)
    if type(axis) is not int or not -x.ndim <= axis < x.ndim:
        return NotImplemented
    if x.dtype not in _WIDE and axis != x.ndim - 1:
        return NotImplemented  # over any other axis than the last, a CPU rounds to 16 bits more than once
    return torch.softmax(x, axis)


def _gelu(x: Any) -> Any:
    return F.gelu(x, approximate="tanh") if x.dtype in _FLOATING else NotImplemented  # F.gelu accepts quantised tensors


def _layer_norm(x: Any, g: Any, b: Any, *, eps: float = 1e-5) -> Any:
    if not x.ndim or not g.shape == b.shape == x.shape[-1:] or not x.numel() or not 0 <= eps < math.inf:
        return NotImplemented
    return F.layer_norm(x, g.shape, g, b, eps)


def _attention(q: Any, k: Any, v: Any, mask: Any = None, *, causal: bool = False, scale: float | None = None) -> Any:
    if q.dtype not in _FLOATING or _is_distributed(q) or not q.numel() or not k.numel():
        return NotImplemented
    if q.ndim < 2 or k.ndim < 2 or k.shape != (*q.shape[:-2], k.shape[-2], q.shape[-1]) or k.shape[:-1] != v.shape[:-1]:
        return NotImplemented
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[-2:] != (q.shape[-2], k.shape[-2]) or mask.ndim > q.ndim:
            return NotImplemented
        if any(m not in (1, n) for m, n in zip(mask.shape[-3::-1], q.shape[-3::-1], strict=False)):
            return NotImplemented
    if scale is not None and not math.isfinite(scale):
        return NotImplemented
    queries, keys = q.shape[-2], k.shape[-2]
    if causal and queries > keys:
        return NotImplemented
    if queries == 1 and _is_launched(q):
        return _attend(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    if queries == 1:
        causal = False  # one query sees all keys
    if causal and (queries < keys or mask is not None):  # PyTorch's is_causal is for as many queries as keys, no mask
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        mask, causal = earlier if mask is None else mask & earlier, False
    # In 16 bits, the fused kernels round the weight of each key once; docs/numerics.md permits it.
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if mask is not None and not _is_read(y):  # PyTorch makes the row of a query that sees no key 0
        y = torch.where(mask.any(-1, keepdim=True), y, math.nan)
    return y if _has_weights(y) else NotImplemented


def _is_launched(x: Any) -> bool:
    """Return whether an operation on x launches a kernel of an accelerator, and has no gradient."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return not (x.is_cpu or needs_gradient or torch.compiler.is_compiling())


def _attend(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """Compute attention for one query by two small products.

    On an H100, F.scaled_dot_product_attention took 32 us for one query of 12 heads, and converted the mask to floats in
    every layer. The two products, with the softmax between them, took 10 us.
    """
    *batch, _, d = q.shape
    n, keys = math.prod(batch), k.shape[-2]
    scores = _scaled_products(q.reshape(n, 1, d), k.reshape(n, keys, d).mT, scale)
    if mask is not None:
        scores = torch.where(mask, scores.view(*batch, 1, keys), -math.inf).view(n, 1, keys)
    weights = torch.softmax(scores, -1).to(v.dtype)  # in 16 bits, rounded once
    return torch.bmm(weights, v.reshape(n, keys, v.shape[-1])).view(*batch, 1, v.shape[-1])


def _scaled_products(a: Any, b: Any, scale: float) -> Any:
    """Return scale a b for batches of matrices, in float32 at least."""
    if a.dtype in _WIDE:
        return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)
    if a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():  # since PyTorch 2.8, on CUDA
        return torch.bmm(a, b, out_dtype=torch.float32) * scale
    return torch.bmm(a.float(), b.float()) * scale


def _is_read(y: Any) -> bool:
    """Return whether `_has_weights` reads values of y."""
    return bool(y.is_cpu and y.shape[-1]) and not torch.compiler.is_compiling()


def _has_weights(y: Any) -> bool:
    """Return False if a row of attention's result is known to come from scores that are all -inf, and otherwise True.

    PyTorch makes such a row 0; the op's definition in `ops` makes it NaN. Only results on a CPU are checked. Only one
    column of a result is read, which takes 3 us for one query.
    """
    if not _is_read(y):
        return True
    try:
        return bool(y.select(-1, 0).all())
    except RuntimeError:  # y is mapped by torch.func, or has no values
        return True


def _embed(ids: Any, w: Any) -> Any:
    if ids.dtype not in (torch.int32, torch.int64) or w.ndim != 2:
        return NotImplemented
    if _is_checked(ids):
        try:
            return F.embedding(ids, w)
        except IndexError:
            return NotImplemented
    if not w.shape[0]:
        return NotImplemented
    index = ids.clamp(0, w.shape[0] - 1)  # launches fewer kernels than two comparisons
    return torch.where((index == ids)[..., None], F.embedding(index, w), math.nan)


def _is_checked(ids: Any) -> bool:
    """Return whether PyTorch raises an error for ids that are out of range. On CUDA, such ids end the process."""
    return bool(ids.is_cpu) and not torch.compiler.is_compiling()


def _cross_entropy(logits: Any, targets: Any) -> Any:
    if logits.dtype not in _WIDE or targets.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    if not logits.ndim or not logits.shape[-1] or targets.shape != logits.shape[:-1] or targets.device != logits.device:
        return NotImplemented
    if _is_distributed(logits) or _is_distributed(targets):
        return NotImplemented
    # F.cross_entropy is not used, because it ignores targets of -100.
    log_p, targets = torch.log_softmax(logits, -1), targets.long()
    if _is_checked(targets):
        try:
            return -log_p.gather(-1, targets[..., None]).mean()
        except RuntimeError:  # the error of the op's definition says which targets are out of range
            return NotImplemented
    known = (targets >= 0) & (targets < logits.shape[-1])
    found = log_p.gather(-1, torch.where(known, targets, 0)[..., None])
    return -(found[..., 0] * torch.where(known, 1.0, math.nan).to(found.dtype)).mean()


GUMBEL = """
template <typename T> T gumbel(T entry, T place, T seed, T stream) {
  typedef unsigned long long word;
  word c[4] = {(word)(entry / 4 + 1), (word)place, 0, 0}, key[2] = {(word)seed, (word)stream};
  const word multipliers[2] = {0xD2E7470EE14C6C93ULL, 0xCA5A826395121157ULL};
  for (int i = 0; i < 10; ++i) {
    word upper[2], lower[2];
    for (int j = 0; j < 2; ++j) {
      word x = c[2 * j], m = multipliers[j], x0 = x & 0xFFFFFFFFULL, x1 = x >> 32, m0 = m & 0xFFFFFFFFULL, m1 = m >> 32;
      word middle = x1 * m0 + (x0 * m0 >> 32), other = x0 * m1 + (middle & 0xFFFFFFFFULL);
      upper[j] = x1 * m1 + (middle >> 32) + (other >> 32);
      lower[j] = x * m;
    }
    c[0] = upper[1] ^ c[1] ^ key[0];
    c[2] = upper[0] ^ c[3] ^ key[1];
    c[1] = lower[1];
    c[3] = lower[0];
    key[0] += 0x9E3779B97F4A7C15ULL;
    key[1] += 0xBB67AE8584CAA73BULL;
  }
  union { double number; T bits; } variate;
  variate.number = -log(-log(((double)(c[entry % 4] >> 12) + 0.5) * 2.220446049250313e-16));
  return variate.bits;
}
"""
"""The kernel of `Backend.gumbel`: NumPy's Philox, and the bits of -log(-log u) as an integer.

All arguments and the result of a kernel of torch.cuda.jiterator have one type, here int64. The portable definition has
about 400 operations, each of which PyTorch would launch as a kernel.
"""


@functools.cache
def _gumbel_kernel() -> Callable[..., Any]:
    from torch.cuda.jiterator import _create_jit_fn

    kernel: Callable[..., Any] = _create_jit_fn(GUMBEL)
    return kernel


def _is_distributed(x: Any) -> bool:
    return hasattr(x, "device_mesh")  # only a DTensor has one; importing that class takes half a second


def _is_on_cuda(tree: Any) -> bool:
    """Return whether all tensors of a tree are on one CUDA device, and none is distributed."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    devices = {x.device for x in tensors}
    return len(devices) == 1 and devices.pop().type == "cuda" and not any(map(_is_distributed, tensors))


def _record(fn: Callable[[], Any], device: Any) -> tuple[Callable[[], None], Any]:
    """Record the kernels that fn launches on a CUDA device as a graph.

    Return a function that runs the graph, and the results. Recording does not run the kernels. The graph always reads
    the inputs, and writes the results, at the addresses that inputs and results had during the recording.
    """
    graph = torch.cuda.CUDAGraph()
    # With "thread_local", CUDA calls of other threads do not make the recording fail.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        results = fn()

    def launch() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return launch, results


class _GraphedCall:
    """A function that is called repeatedly with the same buffers. From the second call on, it runs as one CUDA graph.

    The first call runs eagerly, because kernels must be loaded before the recording. The graph writes to the buffers in
    place, and this object keeps no reference to them. All other tensors, and Python ints, which a graph would treat as
    constants, are copied into tensors of the graph before each launch.
    """

    def __init__(self, fn: Callable[..., Any], spec: Any, leaves: list[Any], is_buffer: list[bool]) -> None:
        self._fn, self._spec, self._n_calls = fn, spec, 0
        self._device = leaves[is_buffer.index(True)].device
        self._inputs = [
            None if buffer or not isinstance(x, torch.Tensor | int) else torch.as_tensor(x, device=self._device).clone()
            for x, buffer in zip(leaves, is_buffer, strict=True)
        ]
        self._launch: Callable[[], None] | None = None

    def __call__(self, leaves: list[Any]) -> Any:
        given = [x if own is None else _set(own, x) for x, own in zip(leaves, self._inputs, strict=True)]
        self._n_calls += 1
        if self._n_calls == 2:
            self._try_to_record(given)
        if self._launch is None:
            return self._fn(*tree_unflatten(given, self._spec))
        self._launch()
        # A result that is a buffer is the given tensor itself. Other results are copied, because the next launch
        # overwrites them.
        results = [_copy(x) if place is None else leaves[place] for x, place in self._results]
        return tree_unflatten(results, self._structure)

    def _try_to_record(self, given: list[Any]) -> None:
        try:
            launch, results = _record(lambda: self._fn(*tree_unflatten(given, self._spec)), self._device)
        except Exception as error:  # from the driver; recording writes to no tensor, so the call can run eagerly
            warnings.warn(f"no CUDA graph was recorded: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=4)
            return
        leaves, self._structure = tree_flatten(results)
        places = {id(x): i for i, (x, own) in enumerate(zip(given, self._inputs, strict=True)) if own is None}
        self._results = [(None if id(x) in places else x, places.get(id(x))) for x in leaves]
        self._launch = launch


class _CUDAGraphCache:
    """A function with donated arguments on a CUDA device, recorded as one CUDA graph per set of buffers.

    The donated tensors, whose memory the function may reuse, are the buffers. A call is recorded if its other tensors
    have at most MAX_ELEMENTS elements together, as in a decode step. For a small model, a decode step takes as long as
    its kernel launches. The buffers of the next text often have the same addresses as those of the previous text, and
    then the same graph is used again. Only the MAX_GRAPHS most recently used graphs are kept.
    """

    MAX_ELEMENTS, MAX_GRAPHS = 64, 8

    def __init__(self, fn: Callable[..., Any], donates: list[bool]) -> None:
        self._fn, self._donates = fn, donates
        self._calls: dict[Any, _GraphedCall] = {}  # in the order of their last use

    def __call__(self, *args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        donated = {id(x) for a, is_given in zip(args, self._donates, strict=True) if is_given for x in tree_leaves(a)}
        is_buffer = [isinstance(x, torch.Tensor) and id(x) in donated for x in leaves]
        rest = [x for x, owned in zip(leaves, is_buffer, strict=True) if isinstance(x, torch.Tensor) and not owned]
        if not any(is_buffer) or sum(x.numel() for x in rest) > self.MAX_ELEMENTS:
            return self._fn(*args)
        key = (spec, *map(_fixed_properties, leaves, is_buffer))
        step = self._calls.pop(key, None) or _GraphedCall(self._fn, spec, leaves, is_buffer)
        self._calls[key] = step
        if len(self._calls) > self.MAX_GRAPHS:
            del self._calls[next(iter(self._calls))]
        return step(leaves)


def _set(own: Any, x: Any) -> Any:
    return own.copy_(x) if isinstance(x, torch.Tensor) else own.fill_(x)


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


def _fixed_properties(x: Any, is_buffer: bool) -> Any:
    """Return the properties of an argument that are fixed in a graph. Other properties need another graph."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.device, (x.data_ptr(), x.stride()) if is_buffer else None
    return int if isinstance(x, int) else x


_TOGETHER = 1 << 25
"""`TorchBackend.for_each` computes with about this many elements at once, so that temporary results stay small."""


class _Tensors:
    """Several tensors that are computed with at once: an operation launches a few kernels for all of them.

    An operation is ``torch._foreach_NAME``, which gives the same bits as ``torch.NAME`` for each tensor. If there is no
    such function, ``torch.NAME`` is called for each tensor. The other argument may be a number or a tensor of one
    element.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self.tensors = list(tensors)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Tensors:
        foreach = getattr(torch, f"_foreach_{function.__name__}", None)
        given = [x.tensors if isinstance(x, cls) else x for x in args]
        if function.__name__ in ("add", "mul") and not isinstance(args[0], cls):
            given.reverse()  # a list must come first
        if foreach is not None and isinstance(given[0], list) and not kwargs:
            return cls(foreach(*given))
        n = next(len(x.tensors) for x in args if isinstance(x, cls))
        each = zip(*(x if isinstance(x, list) else [x] * n for x in given), strict=True)
        return cls([function(*arguments, **(kwargs or {})) for arguments in each])

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)

    def __eq__(self, other: object) -> Any:
        return torch.eq(self, other)  # type: ignore[call-overload]

    __radd__, __rmul__, __hash__ = __add__, __mul__, None  # type: ignore[assignment]


class TorchBackend(Backend):
    """PyTorch, eager, on a CPU or an accelerator. On CUDA, a decode step is one CUDA graph."""

    name = "torch"
    array_types = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    xp = _Namespace
    kernels = {
        "conv1d": _conv1d,
        "softmax": _softmax,
        "gelu": _gelu,
        "layer_norm": _layer_norm,
        "attention": _attention,
        "embed": _embed,
        "unembed": _unembed,
        "cross_entropy": _cross_entropy,
    }
    # Measured on one H100: exp 2.35, tanh 2.88. CUDA documents 1 ulp for log, as it does for exp.
    numerics = {"cuda": {"float32": Numerics(exp=(2.5, 0.0), tanh=3.0, log=4.0)}}
    dtypes = _FLOATS

    def refusal(self, x: Any) -> str | None:
        module = type(x).__module__
        if module.partition(".")[0] != "torch" or module.startswith(("torch.masked", "torch.sparse")):
            return subclass_refusal("torch", "x.as_subclass(torch.Tensor)")
        if x.layout is not torch.strided or x.is_nested:
            return f"is {'nested' if x.is_nested else 'sparse'} ({x.layout}); give a dense tensor, such as x.to_dense()"
        return "has no shape yet; initialize it first" if isinstance(x, _UNINITIALIZED) else None

    def peek(self, x: Any) -> np.ndarray | None:
        if not x.is_cpu or type(x) is not torch.Tensor or torch.compiler.is_compiling():
            return None
        if torch._C._functorch.maybe_current_level() is not None:
            return None  # inside torch.func even plain tensors are wrapped when they are read
        try:
            x.data_ptr()
        except RuntimeError:  # x has no storage: it is sparse, for example
            return None
        return self.to_numpy(x)

    def devices(self) -> dict[str, Any]:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        names = ["cpu"]
        if accelerator is not None:
            names += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        return {name: torch.device(name) for name in names}

    def resolve_device(self, device: Any) -> Any:
        name = str(device) if isinstance(device, torch.device) else device
        if isinstance(name, str) and name.partition(":")[0] == "meta":
            raise ValueError(
                f"device 'meta' holds shapes and no values; a model needs one of the devices here: "
                f"{', '.join(self.devices())}"
            )
        return super().resolve_device(name)

    def device(self, x: Any) -> str:
        return str(x.device)

    def placement(self, x: Any) -> Any:
        return x.device  # even without an accelerator, x may be on ``meta``

    def put(self, a: np.ndarray, device: Any) -> Any:
        a = np.asarray(a)
        if not a.flags.writeable or any(stride < 0 for stride in a.strides):  # torch.from_numpy accepts neither
            a = a.copy()
        if a.dtype == ml_dtypes.bfloat16:
            x = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        else:
            x = torch.from_numpy(a)
        return x.to(torch.get_default_device() if device is None else device)

    def to_numpy(self, x: Any) -> np.ndarray:
        x = x.detach()
        if _is_distributed(x):
            with _reporting_losses("the parts of an array"):
                x = x.full_tensor()
        x = x.cpu().resolve_neg()
        if x.dtype == torch.bfloat16:
            return np.asarray(x.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(x.numpy())

    def read_checkpoint(self, path: str) -> Any:
        storages = _mappable(path)
        held = _load(path, is_mapped=storages is not None)
        if storages is not None and not _lie_at(storages, held):
            storages, held = None, _load(path, is_mapped=False)
        owners: dict[int, object] = {}  # maps a storage's address to the tensor that was first read from it

        def read(x: Any, tensor: object) -> np.ndarray:
            a = self.to_numpy(x)
            is_owner = not _is_plain(x) or owners.setdefault(x.untyped_storage().data_ptr(), tensor) is tensor
            if storages is None and is_owner:
                return a
            a = a.copy()  # it must not share memory with another parameter, or with a file, which may be overwritten
            if storages is not None and x.is_contiguous():
                _let_go(x)
            return a

        def stored(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            dtype = str(x.dtype).removeprefix("torch.")
            if not _is_plain(x):
                kind = "without data" if x.is_meta else str(x.layout).removeprefix("torch.").replace("_", " ")
                dtype = f"{dtype} ({kind})"
            return StoredTensor(tuple(x.shape), dtype, functools.partial(read, x, object()))

        return tree_map(stored, held)

    def arange(self, n: Any, *, like: Any) -> Any:
        return _replicated(torch.arange(n, device=like.device), like)

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        return _replicated(torch.zeros(shape, dtype=like.dtype, device=like.device), like)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        if not isinstance(start, torch.Tensor):
            return super().write(buffer, value, start)
        # Slicing would wait for the value of start.
        n = value.shape[-2]
        rows = start.reshape(1).long() if n == 1 else start + torch.arange(n, device=start.device)
        buffer.index_copy_(-2, rows, value)
        return buffer

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        return x.index_add(0, indices, rows)

    def split(self, x: Any, n: int) -> Sequence[Any]:
        parts: Sequence[Any] = x.chunk(n, -1)  # its gradient is a concatenation; the gradient of n slices is a sum
        return parts

    def runs_ahead(self, x: Any) -> bool:
        return _is_on_cuda(x)

    def fetch(self, x: Any) -> Callable[[], np.ndarray]:
        if not x.is_cuda:
            return super().fetch(x)
        # The device copies to page-locked memory while the host continues. The event waits only for the copy.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(x.device))

        def wait() -> np.ndarray:
            copied.synchronize()
            return self.to_numpy(host)

        return wait

    def top_k(self, x: Any, k: int) -> tuple[Any, Any]:
        values, indices = torch.topk(x, k)
        return values, indices

    def gumbel(self, entries: Any, places: Any, seeds: Any, streams: Any) -> Any:
        if not entries.is_cuda:
            return NotImplemented
        return _gumbel_kernel()(entries, places, seeds, streams).view(torch.float64)

    def process(self) -> tuple[int, int]:
        import torch.distributed as distributed

        if not distributed.is_available() or not distributed.is_initialized():
            if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process, and others
                return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()

    def mesh(self, sizes: Mapping[str, int]) -> Any:
        import torch.distributed as distributed
        from torch.distributed.device_mesh import DeviceMesh

        timeout = datetime.timedelta(seconds=mesh_timeout())
        n, given = math.prod(sizes.values()), ",".join(f"{name}={size}" for name, size in sizes.items())
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        if not distributed.is_initialized():
            found = int(os.environ.get("WORLD_SIZE", "1"))
            if n == found == 1 and "MASTER_ADDR" not in os.environ:
                distributed.init_process_group(
                    _PROCESS_GROUPS[device.type], store=distributed.HashStore(), rank=0, world_size=1
                )
            elif n == found:
                with _reporting_losses("the connection with the other processes"):
                    distributed.init_process_group(_PROCESS_GROUPS[device.type], timeout=timeout)
        else:
            found = distributed.get_world_size()
        if n != found:
            raise ValueError(
                f"the mesh {given} needs {n} processes; there {'is' if found == 1 else 'are'} {found}. Start them with "
                f"torchrun --nproc-per-node {n} -m portable_gpt2 ..., or torchrun with your own program"
            )
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        # `init_device_mesh` would make groups that wait for half an hour.
        groups, stride = [], n
        with _reporting_losses("the connection with the other processes"):
            for size in sizes.values():
                stride //= size
                firsts = [first for first in range(n) if first // stride % size == 0]
                rows = [[*range(first, first + size * stride, stride)] for first in firsts]
                is_whole = size == n  # the processes already have this group
                groups.append(
                    distributed.group.WORLD
                    if is_whole
                    else distributed.new_subgroups_by_enumeration(rows, timeout=timeout)[0]
                )
        ranks = torch.arange(n).reshape(*sizes.values())
        return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=tuple(sizes))

    def mesh_sizes(self, mesh: Any) -> dict[str, int] | None:
        if type(mesh).__name__ != "DeviceMesh":
            return None
        names = mesh.mesh_dim_names or [f"axis {i}" for i in range(mesh.ndim)]
        return dict(zip(names, mesh.shape, strict=True))

    def mesh_split(self, mesh: Any, axis: str) -> tuple[Any, Any]:
        return mesh.get_local_rank(axis), mesh.get_group(axis)

    def from_parts(self, mesh: Any, spec: Any, shape: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Any:
        index = []
        for name, n in zip(spec, shape, strict=True):
            size, i = (1, 0) if name is None else (n // mesh.size(_dimension(mesh, name)), mesh.get_local_rank(name))
            index.append(slice(0, n) if name is None else slice(i * size, (i + 1) * size))
        return _divided(self.from_numpy(read(tuple(index)), device=_local_device(mesh)), mesh, spec)

    def on_mesh(
        self, fn: Callable[..., Any], mesh: Any, specs: Any, results: Any, *, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch.inference_mode():
                return _divided_tree(fn(*map(_local_tree, args)), mesh, results)

        return call

    def all_sum(self, x: Any, axis: Any) -> Any:
        return _reduced(x, axis, "SUM")

    def all_max(self, x: Any, axis: Any) -> Any:
        return _reduced(x, axis, "MAX")

    def all_concat(self, x: Any, axis: Any, along: int = -1) -> Any:
        import torch.distributed as distributed

        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size(axis))
        ]
        with _reporting_losses("the values of", axis):
            distributed.all_gather(parts, x.contiguous(), group=axis)
        return torch.cat(parts, along)

    def all_sum_part(self, x: Any, axis: Any, along: int) -> Any:
        import torch.distributed as distributed

        # PyTorch 2.13 warns of the older name. Gloo sums the whole and takes the part; NCCL sends half of the messages.
        name = "single" if hasattr(distributed, "reduce_scatter_single") else "tensor"
        parts = x.chunk(distributed.get_world_size(axis), along)
        part = torch.empty(parts[0].numel(), dtype=x.dtype, device=x.device)
        with _reporting_losses("a sum with", axis):
            given = torch.cat([each.reshape(-1) for each in parts])
            getattr(distributed, f"reduce_scatter_{name}")(part, given, group=axis)
        return part.reshape(parts[0].shape)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def differentiated(tree: Any, *args: Any) -> tuple[Any, Any]:
            with torch.enable_grad():
                leaves, spec = tree_flatten(tree)
                leaves = [x.detach().requires_grad_() for x in leaves]
                value = fn(tree_unflatten(leaves, spec), *args)
                grads = torch.autograd.grad(value, leaves)
            return value.detach(), tree_unflatten(list(grads), spec)

        return differentiated

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        # A function with donated arguments (their memory may be reused) is never differentiated. In inference mode,
        # autograd does not record views, and a decode step takes 0.6 ms less.
        step = super().compile(fn, *bound, donate=donate)
        if not donate:
            return step
        if _is_on_cuda(bound):
            step = _CUDAGraphCache(step, [name in donate for name in inspect.signature(step).parameters]).__call__
        inferred: Callable[..., Any] = torch.inference_mode()(step)
        return inferred

    def for_each(self, fn: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
        # An elementwise step of AdamW for the 148 parameters of the 124M model would be 148 launches, most of them of
        # small vectors: on an H100, AdamW took 15 of the 99 ms of a step in this way.
        if not _is_on_cuda(lists):
            return super().for_each(fn, *lists)
        found, start, n = list[Any](), 0, 0
        for stop, x in enumerate(lists[0], 1):
            n += x.numel()
            if n >= _TOGETHER or stop == len(lists[0]):
                results = fn(*(_Tensors(arrays[start:stop]) for arrays in lists))
                several = isinstance(results, tuple)
                found += zip(*(x.tensors for x in results), strict=True) if several else results.tensors
                start, n = stop, 0
        return found

    def relayout(self, path: str, x: Any) -> Any:
        # For small batches, a tall matrix in Fortran order is read at full memory bandwidth. In C order, a decode step
        # reads wte for the logits at 0.5 times that bandwidth. It reads c_proj of the mlp at 0.75 times where weights
        # are processed in blocks; elsewhere, a step of a batch of 8 takes 0.89 times as long with c_proj in C order.
        is_tall = x.ndim == 2 and x.shape[0] >= 4 * x.shape[1] and not x.mT.is_contiguous()
        return x if not is_tall or (path.endswith("/w") and x.is_cpu and not _IS_BLOCKED) else x.mT.contiguous().mT


def _load(path: str, is_mapped: bool) -> Any:
    """Return the contents of a file that torch.save wrote.

    The contents must be tensors, numbers, strings, lists and dicts. No pickle is executed.
    """
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)  # about old pickles and TorchScript
            if is_mapped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            stream = stack.enter_context(open(path, "rb"))
            return torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        # PyTorch's own messages advise the reader to execute the pickle.
        text = str(error)
        if named := re.search(r"GLOBAL (\S+)|class (\S+)|TorchScript", text):
            kind = next((name for name in named.groups() if name), "a TorchScript program")
            raise CheckpointError(
                f"holds objects other than tensors ({kind[:80]}), and no pickle is executed to make them; if you trust "
                f"the file, save its state_dict alone, as model.safetensors, with the program that wrote it"
            ) from None
        raise CheckpointError(
            f"is not a whole file of tensors as PyTorch writes them ({type(error).__name__}); it may be cut off or "
            f"damaged: download or write it again"
        ) from None


def _mappable(path: str) -> list[tuple[int, int]] | None:
    """Return the offset and length of each storage in a file; None if the file cannot be memory-mapped.

    torch.load does not check this: it would map compressed storages, and storages in the other byte order, without
    converting them. Files that are not zip archives were written by PyTorch before 1.6 and cannot be mapped.
    """
    found = []
    try:
        path.encode()  # torch.load can map only a file whose name is valid UTF-8
        with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members) or members[0].header_offset:
                return None
            for member in members:
                stream.seek(member.header_offset)
                header = stream.read(30)
                flags, method, *lengths = struct.unpack("<4x2xHH16xHH", header)
                if header[:4] != b"PK\3\4" or (flags | member.flag_bits) & 1 or method or member.compress_type:
                    return None
                if member.filename.endswith("/byteorder") and archive.read(member) != sys.byteorder.encode():
                    return None
                if "/data/" in member.filename and member.file_size:
                    found.append((member.header_offset + len(header) + sum(lengths), member.file_size))
    except (OSError, ValueError, LookupError, struct.error, zipfile.BadZipFile, NotImplementedError):
        return None
    return sorted(found)


def _lie_at(storages: list[tuple[int, int]], held: Any) -> bool:
    """Return whether the mapped tensors use exactly the given parts of a file, which are pairs of offset and length."""
    found = (x.untyped_storage() for x in tree_leaves(held) if _is_plain(x))
    used = sorted({(storage.data_ptr(), storage.nbytes()) for storage in found if storage.nbytes()})
    start = used[0][0] - storages[0][0] if used and storages else 0
    return start % mmap.PAGESIZE == 0 and used == [(start + offset, n) for offset, n in storages]


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta and not x.is_quantized


def _let_go(x: Any) -> None:
    """Free the memory pages of a mapped tensor after it was copied; otherwise it would be in memory twice."""
    page = mmap.PAGESIZE
    start, end = -(-x.data_ptr() // page) * page, (x.data_ptr() + x.nbytes) // page * page
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


_PROCESS_GROUPS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""The library that moves data between processes, by type of device."""


def _reduced(x: Any, group: Any, name: str) -> Any:
    import torch.distributed as distributed

    x = x.clone(memory_format=torch.contiguous_format)
    with _reporting_losses("a sum with" if name == "SUM" else "a maximum with", group):
        distributed.all_reduce(x, getattr(distributed.ReduceOp, name), group=group)
    return x


@contextlib.contextmanager
def _reporting_losses(what: str, group: Any = None) -> Iterator[None]:
    """Convert the error of an operation in which a process waits for the others to a `ProcessLost`."""
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if group is not None:
            n = group.size() - 1
            what += f" the {'other process' if n == 1 else f'{n} other processes'} along an axis of the mesh"
        seconds = time.monotonic() - start
        if seconds > 0.9 * mesh_timeout():
            raise ProcessLost(f"{what} did not come within {seconds:.0f} s ({TIMEOUT_VARIABLE})") from error
        # PyTorch's message has a place in its source before the first sentence, and advice after it.
        line = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise ProcessLost(f"{what} failed: {line}") from error


def _dimension(mesh: Any, name: str) -> int:
    return list(mesh.mesh_dim_names).index(name)


def _local_device(mesh: Any) -> Any:
    return (
        torch.device(mesh.device_type, torch.accelerator.current_device_index()) if mesh.device_type != "cpu" else "cpu"
    )


def _divided(x: Any, mesh: Any, spec: Any) -> Any:
    """Return the DTensor of which x is this process's part."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(spec.index(name)) if name in spec else Replicate() for name in mesh.mesh_dim_names]
    return DTensor.from_local(x, mesh, placements, run_check=False)


def _local_tree(tree: Any) -> Any:
    return tree_map(lambda x: x.to_local() if isinstance(x, torch.Tensor) and _is_distributed(x) else x, tree)


def _divided_tree(tree: Any, mesh: Any, specs: Any) -> Any:
    """Return the tree with a DTensor for each tensor, whose spec is at the same place in another tree."""
    if isinstance(tree, torch.Tensor):
        return _divided(tree, mesh, specs)
    if isinstance(tree, dict):
        return {key: _divided_tree(each, mesh, specs[key]) for key, each in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_divided_tree(each, mesh, spec) for each, spec in zip(tree, specs, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def _replicated(x: Any, like: Any) -> Any:
    if not _is_distributed(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim)
