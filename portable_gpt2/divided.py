"""Functions of a model whose weights are divided over several devices: tensor parallelism.

Each device runs the same program on its own arrays, which are ordinary arrays of the framework. It has whole heads of
c_attn, some columns of c_fc, the same rows of the two c_proj, and some rows of wte. The devices need each other's
results in four places only: after each c_proj and after the embedding, where their sums are added (`Backend.all_sum`),
and in the logits, of which each device has those of its own rows of wte.

With one device, each function is the op of the same name.

Notes
-----
Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import ops
from .params import Params
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # as in ops.py
    from jaxtyping import Float, Int

    Array = Any


class Split(NamedTuple):
    """How a model is divided, as one of its devices sees it."""

    n: int = 1
    """The number of devices that have the weights together."""
    index: Any = 0
    """The number of this device among them, from 0. While tracing it may be an array."""
    axis: Any = None
    """What the adapter needs to address these devices (see `Backend.all_sum`)."""
    n_vocab: int = 0
    """The number of entries of the whole vocabulary. The last device may have rows of wte beyond it, which are 0."""


WHOLE = Split()


def shared(x: Float[Array, "*shape"], split: Split) -> Float[Array, "*shape"]:
    """Return x, which is the same on all devices and which each multiplies by its own weights.

    The gradient of x is therefore the sum of the gradients of all devices.
    """
    return x if split.n == 1 else backend_of(x).all_copy(x, split.axis)


def project(x: Float[Array, "*batch nx"], p: Params, split: Split) -> Float[Array, "*batch nf"]:
    """Compute ``x w + b`` from the device's part of x, its last axis, and of w, its rows.

    The devices' products are added, and then b, once.
    """
    if split.n == 1:
        return ops.conv1d(x, **p)
    backend, b = backend_of(x), p["b"]
    product = ops.conv1d(x, p["w"], backend.zeros(backend.shape(b), like=b))
    return ops.add(sum_over(product, split), b)


def embed(ids: Int[Array, "*batch"], w: Float[Array, "rows d"], split: Split) -> Float[Array, "*batch d"]:
    """Return the row of each id. Each device looks up the ids of its own rows, and adds 0 for the others."""
    if split.n == 1:
        return ops.embed(ids, w)
    backend = backend_of(w)
    part: Callable[..., Any] = backend.kernels.get("embed_part", embed_part)
    return sum_over(part(ids, w, split), split)


def cross_entropy(logits: Float[Array, "*batch rows"], targets: Int[Array, "*batch"], split: Split) -> Float[Array, ""]:
    """Return the mean of -log p[target]. Each device has the logits of its own rows of wte."""
    if split.n == 1:
        return ops.cross_entropy(logits, targets)
    part: Callable[..., Any] = backend_of(logits).kernels.get("cross_entropy_part", cross_entropy_part)
    return part(logits, targets, split)


def embed_part(ids: Any, w: Any, split: Split) -> Any:
    """Return the rows of the ids that this device has, and zeros for the others; NaN for an id that is out of range."""
    xp = backend_of(w).xp
    index, is_here = _own(ids, w, split)
    rows = xp.where(is_here[..., None], ops.embed(index, w), 0)
    is_known = (ids >= 0) & (ids < split.n_vocab)
    return xp.where(is_known[..., None], rows, math.nan)


def embed_part_backward(ids: Any, w: Any, dy: Any, split: Split) -> Any:
    """Return dw: its row j is the sum of dy_i over all ids that are row j of this device."""
    backend = backend_of(w)
    index, is_here = _own(ids, w, split)
    n, d = backend.shape(w)
    flat = backend.xp.reshape(index, (math.prod(backend.shape(ids)),))
    dy = backend.xp.reshape(backend.xp.where(is_here[..., None], dy, 0), (*backend.shape(flat), d))
    return backend.index_add(backend.zeros((n, d), like=dy), backend.xp.astype(flat, backend.xp.int64), dy)


def _own(ids: Any, w: Any, split: Split) -> tuple[Any, Any]:
    """Return the row of each id in this device's part of wte, or 0, and whether the device has it."""
    backend = backend_of(w)
    n = backend.shape(w)[0]
    rows = ids - split.index * n
    is_here = (rows >= 0) & (rows < n)
    return backend.xp.where(is_here, rows, 0), is_here


def known(logits: Float[Array, "*batch rows"], split: Split) -> Float[Array, "*batch rows"]:
    """Return the logits with -inf for the rows of wte beyond the vocabulary."""
    return (
        logits if split.n == 1 else backend_of(logits).xp.where(_ids(logits, split) < split.n_vocab, logits, -math.inf)
    )


def _ids(logits: Any, split: Split) -> Any:
    """Return the id of each logit of this device, int32 [rows]."""
    backend = backend_of(logits)
    n = backend.shape(logits)[-1]
    return backend.xp.astype(backend.arange(n, like=logits), backend.xp.int32) + split.index * n


def log_sum_exp(logits: Float[Array, "*batch rows"], split: Split) -> Float[Array, "*batch 1"]:
    """Return the logarithm of the sum of the exponentials of all logits, those of the other devices too."""
    backend = backend_of(logits)
    xp, top = backend.xp, backend.xp.max(logits, axis=-1, keepdims=True)
    if split.n > 1:
        top = backend.all_max(top, split.axis)
    return top + xp.log(sum_over(xp.sum(xp.exp(logits - top), axis=-1, keepdims=True), split))


def sum_over(x: Any, split: Split) -> Any:
    """Return the sum of the arrays x of all devices that have the weights together."""
    return x if split.n == 1 else backend_of(x).all_sum(x, split.axis)


def at(logits: Float[Array, "*batch rows"], ids: Int[Array, "*batch"], split: Split) -> Float[Array, "*batch 1"]:
    """Return the logit of each id, which one of the devices has; NaN for an id that is out of range."""
    backend = backend_of(logits)
    xp = backend.xp
    own = xp.where(_ids(logits, split) == ids[..., None], logits, 0.0)
    found = sum_over(xp.sum(own, axis=-1, keepdims=True), split)
    return xp.where(((ids >= 0) & (ids < split.n_vocab))[..., None], found, math.nan)


def cross_entropy_part(logits: Any, targets: Any, split: Split) -> Any:
    """Compute `cross_entropy`. The gradient is that of `cross_entropy_part_backward`."""
    xp = backend_of(logits).xp
    logits = known(logits, split)
    return xp.mean(log_sum_exp(logits, split) - at(logits, targets, split))


def cross_entropy_part_backward(logits: Any, targets: Any, factor: Any, split: Split) -> Any:
    """Return factor (p - 1) at the targets, and factor p elsewhere, for the logits of this device."""
    xp = backend_of(logits).xp
    logits = known(logits, split)
    p = xp.exp(logits - log_sum_exp(logits, split))
    is_target = _ids(logits, split) == targets[..., None]
    return xp.where(is_target, p - 1, p) * factor


def largest(logits: Float[Array, "batch rows"], k: int, split: Split) -> tuple[Any, Any]:
    """Return the k largest logits of each device and their ids, [..., k n], the same on all devices."""
    backend = backend_of(logits)
    values, columns = backend.top_k(known(logits, split), k)
    ids = backend.xp.astype(columns, backend.xp.int32) + split.index * backend.shape(logits)[-1]
    if split.n == 1:
        return values, ids
    return backend.all_concat(values, split.axis), backend.all_concat(ids, split.axis)


def scores(
    logits: Float[Array, "batch seq rows"], targets: Int[Array, "batch seq"], k: int, split: Split
) -> tuple[Any, Any, Any, Any]:
    """Return the log-probability and the rank of each target, and the largest log-probabilities with their ids.

    All are the same on all devices. The first two are [batch, seq, 1]; the others have the k largest of each device.
    """
    xp = backend_of(logits).xp
    logits = known(logits, split)
    total, own = log_sum_exp(logits, split), at(logits, targets, split)
    above = sum_over(xp.sum(xp.astype(logits > own, xp.int32), axis=-1, keepdims=True), split)
    values, ids = largest(logits, k, split)
    return own - total, above + 1, values - total, ids
