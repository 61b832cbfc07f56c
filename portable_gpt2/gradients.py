"""The loss, and the backward pass of every op and of the whole model, written once in array-API terms.

Each function here computes what its namesake in `ops` or `model` does, and returns a second function: from the gradient
of its result to the gradients of its arguments. It is how a framework without differentiation of its own (NumPy)
trains, and one that compiles a step as a whole; and what the gradients by frameworks are held against.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from .config import GPT2Config
from .model import check_inputs, merge_heads, output_embedding, split_heads
from .params import Params, check_params
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # as in ops.py
    from jaxtyping import Bool, Float, Int

    Array = Any

Backward = Callable[..., Any]


def _rows(x: Any) -> Any:
    """Return x as a matrix, all of its leading axes in one."""
    backend = backend_of(x)
    *start, n = backend.shape(x)
    return backend.xp.reshape(x, (math.prod(start), n))


def conv1d(
    x: Float[Array, "*batch nx"], w: Float[Array, "nx nf"] | Float[Array, "1 nx nf"], b: Float[Array, "nf"]
) -> tuple[Float[Array, "*batch nf"], Backward]:
    """Compute y = x w + b: dx = dy w^T, dw = x^T dy, db = the sum of dy over all rows."""
    backend = backend_of(x)
    xp, shape = backend.xp, backend.shape(w)

    def backward(dy: Any) -> tuple[Any, Params]:
        rows, wt = _rows(dy), xp.matrix_transpose(xp.reshape(w, shape[-2:]))
        dw = xp.matmul(xp.matrix_transpose(_rows(x)), rows)
        return xp.reshape(xp.matmul(rows, wt), backend.shape(x)), {
            "w": xp.reshape(dw, shape),
            "b": xp.sum(rows, axis=0),
        }

    return ops.conv1d(x, w, b), backward


def softmax(x: Float[Array, "*shape"], *, axis: int = -1) -> tuple[Float[Array, "*shape"], Backward]:
    """Compute y_j = exp(x_j) / sum_k exp(x_k): dx = y (dy - sum_k y_k dy_k). The maximum that is subtracted cancels."""
    y = ops.softmax(x, axis=axis)
    xp = backend_of(x).xp
    return y, lambda dy: y * (dy - xp.sum(y * dy, axis=axis, keepdims=True))


def gelu(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Backward]:
    """Compute y = x (1 + t) / 2, t = tanh(u), u = c (x + 0.044715 x^3): dx = dy ((1 + t) + x (1 - t^2) du/dx) / 2."""
    xp, c = backend_of(x).xp, math.sqrt(2 / math.pi)

    def backward(dy: Any) -> Any:
        t = xp.tanh(c * (x + 0.044715 * x * x * x))
        return 0.5 * dy * (1 + t + x * (1 - t * t) * (c * (1 + 3 * 0.044715 * x * x)))

    return ops.gelu(x), backward


def layer_norm(
    x: Float[Array, "*batch n"], g: Float[Array, "n"], b: Float[Array, "n"], *, eps: float = 1e-5
) -> tuple[Float[Array, "*batch n"], Backward]:
    """Compute y = g z + b, z = (x - mean) / s: dg = sum dy z, db = sum dy, dx = (dz - mean(dz) - z mean(dz z)) / s."""
    xp = backend_of(x).xp

    def backward(dy: Any) -> tuple[Any, Params]:
        z = x - xp.mean(x, axis=-1, keepdims=True)
        s = xp.sqrt(xp.mean(z * z, axis=-1, keepdims=True) + eps)
        z = z / s
        dz = dy * g
        dx = dz - xp.mean(dz, axis=-1, keepdims=True) - z * xp.mean(dz * z, axis=-1, keepdims=True)
        return dx / s, {"g": xp.sum(_rows(dy * z), axis=0), "b": xp.sum(_rows(dy), axis=0)}

    return ops.layer_norm(x, g, b, eps=eps), backward


def attention(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    v: Float[Array, "*batch keys dv"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "*batch queries dv"], Backward]:
    """Compute y = w v with w the softmax of scale q k^T. Masked keys have weight 0, so they get no gradient."""
    backend, _ = ops.attention.check(q, k, v, mask=mask, scale=scale)  # of v, the weights know nothing
    xp, t = backend.xp, backend.xp.matrix_transpose
    scale = max(backend.shape(q)[-1], 1) ** -0.5 if scale is None else scale
    w = ops.attention_weights(q, k, mask=mask, scale=scale)

    def backward(dy: Any) -> tuple[Any, Any, Any]:
        dw = xp.matmul(dy, t(v))
        ds = scale * w * (dw - xp.sum(w * dw, axis=-1, keepdims=True))
        return xp.matmul(ds, k), xp.matmul(t(ds), q), xp.matmul(t(w), dy)

    return xp.matmul(w, v), backward


def causal_attention(
    q: Float[Array, "*batch seq d"], k: Float[Array, "*batch seq d"], v: Float[Array, "*batch seq dv"], *, scale: float
) -> tuple[Float[Array, "*batch seq dv"], Backward]:
    """Compute `attention` where each position sees itself and those before it: a third of the queries at a time.

    Each third takes the keys that its last query sees, so that a third of the products is left out. A gradient of 4
    layers, 4 heads and 256 positions took 0.92 (JAX), 0.94 (TensorFlow) and 0.77 (NumPy) of its time with all queries
    at once; halves, quarters and sixths were no faster.
    """
    backend = backend_of(q)
    xp, seq = backend.xp, backend.shape(q)[-2]
    positions = backend.arange(seq, like=q)
    thirds = [*itertools.pairwise(sorted({0, seq // 3, 2 * seq // 3, seq}))]
    ys, backs = [], []
    for start, stop in thirds:
        mask = positions[start:stop, None] >= positions[None, :stop]
        y, back = attention(q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], mask, scale=scale)
        ys.append(y)
        backs.append(back)

    def backward(dy: Any) -> tuple[Any, Any, Any]:
        *before, last = [back(dy[..., start:stop, :]) for (start, stop), back in zip(thirds, backs, strict=True)]
        dqs, (_, dk, dv) = [dq for dq, _, _ in (*before, last)], last

        def add(dx: Any, part: Any) -> Any:
            """Add what concerns the first positions alone."""
            n = backend.shape(part)[-2]
            return xp.concat([dx[..., :n, :] + part, dx[..., n:, :]], axis=-2)

        for _, dk_part, dv_part in before:
            dk, dv = add(dk, dk_part), add(dv, dv_part)
        return xp.concat(dqs, axis=-2), dk, dv

    return xp.concat(ys, axis=-2), backward


def embed(ids: Int[Array, "*batch"], w: Float[Array, "vocab d"]) -> tuple[Float[Array, "*batch d"], Backward]:
    """Compute y_i = w[ids_i]: each row of dw is the sum of the dy_i whose id it is."""
    backend = backend_of(w)

    def backward(dy: Any) -> Any:
        index, known = ops.in_range("embed: ids", ids, backend.shape(w)[0])
        if known is not None:  # an id that is out of range is looked up as 0, to which it adds nothing
            dy = backend.xp.where(known[..., None], dy, 0)
        flat = backend.xp.reshape(index, (math.prod(backend.shape(ids)),))
        return backend.index_add(backend.zeros(backend.shape(w), like=w), flat, _rows(dy))

    return ops.embed(ids, w), backward


def unembed(x: Float[Array, "*batch d"], w: Float[Array, "vocab d"]) -> tuple[Float[Array, "*batch vocab"], Backward]:
    """Compute y = x w^T: dx = dy w, dw = dy^T x."""
    backend = backend_of(x)
    xp = backend.xp

    def backward(dy: Any) -> tuple[Any, Any]:
        rows = _rows(dy)
        return xp.reshape(xp.matmul(rows, w), backend.shape(x)), xp.matmul(xp.matrix_transpose(rows), _rows(x))

    return ops.unembed(x, w), backward


def cross_entropy(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> tuple[Float[Array, ""], Backward]:
    """Average -log softmax(logits)[target]: dlogits = (softmax(logits) - 1 at the target) / how many there are."""
    value = ops.cross_entropy(logits, targets)
    backend = backend_of(logits)
    xp = backend.xp
    *start, vocab = backend.shape(logits)

    def backward(dy: Any = 1.0) -> Any:
        if ops.is_empty(logits):  # of no targets
            return logits
        index, known = ops.in_range("cross_entropy: targets", targets, vocab)
        is_target = index[..., None] == xp.astype(backend.arange(vocab, like=targets), index.dtype)
        p = ops.softmax(logits)
        if known is not None:
            p = xp.where(known[..., None], p, math.nan)
        return xp.where(is_target, p - 1, p) * (dy / math.prod(start))

    return value, backward


def mlp(x: Float[Array, "batch seq n"], c_fc: Params, c_proj: Params) -> tuple[Float[Array, "batch seq n"], Backward]:
    """Widen, bend, narrow."""
    h, back_fc = conv1d(x, **c_fc)
    a, back_gelu = gelu(h)
    y, back_proj = conv1d(a, **c_proj)

    def backward(dy: Any) -> tuple[Any, Params]:
        da, d_proj = back_proj(dy)
        dx, d_fc = back_fc(back_gelu(da))
        return dx, {"c_fc": d_fc, "c_proj": d_proj}

    return y, backward


def attn(
    x: Float[Array, "batch seq n"],
    c_attn: Params,
    c_proj: Params,
    *,
    n_head: int,
    scale: float,
) -> tuple[Float[Array, "batch seq n"], Backward]:
    """Let every position look at itself and at those before it."""
    backend = backend_of(x)
    c, back_attn = conv1d(x, **c_attn)
    q, k, v = (split_heads(part, n_head) for part in backend.split(c, 3))
    a, back_attention = causal_attention(q, k, v, scale=scale)
    y, back_proj = conv1d(merge_heads(a), **c_proj)

    def backward(dy: Any) -> tuple[Any, Params]:
        da, d_proj = back_proj(dy)
        dqkv = back_attention(split_heads(da, n_head))
        dx, d_attn = back_attn(backend.xp.concat([merge_heads(d) for d in dqkv], axis=-1))
        return dx, {"c_attn": d_attn, "c_proj": d_proj}

    return y, backward


def block(
    x: Float[Array, "batch seq n"], params: Params, *, eps: float, **attn_options: Any
) -> tuple[Float[Array, "batch seq n"], Backward]:
    """Add to the residual stream what attention says of it, then what the mlp does."""
    h, back_ln_1 = layer_norm(x, **params["ln_1"], eps=eps)
    a, back_attn = attn(h, **params["attn"], **attn_options)
    x = x + a
    h, back_ln_2 = layer_norm(x, **params["ln_2"], eps=eps)
    m, back_mlp = mlp(h, **params["mlp"])

    def backward(dy: Any) -> tuple[Any, Params]:
        dh, d_mlp = back_mlp(dy)
        dx, d_ln_2 = back_ln_2(dh)
        dx = dy + dx
        dh, d_attn = back_attn(dx)
        dy, d_ln_1 = back_ln_1(dh)
        return dx + dy, {"ln_1": d_ln_1, "attn": d_attn, "ln_2": d_ln_2, "mlp": d_mlp}

    return x + m, backward


def loss(
    params: Params, tokens: Int[Array, "batch seq"], config: GPT2Config
) -> tuple[Float[Array, ""], Callable[..., Params]]:
    """Return `model.loss`, and a function that returns its gradient by every parameter, as a tree like theirs.

    It takes the gradient of the loss itself, a number: 1 unless given.
    """
    check_inputs(params, tokens, config, targets=1)
    check_params(params, config)
    backend = backend_of(tokens)
    seq = backend.shape(tokens)[1] - 1
    positions = backend.arange(seq, like=tokens)
    e, back_wte = embed(tokens[:, :-1], params["wte"])
    p, back_wpe = embed(positions, params["wpe"])
    x, back_blocks = e + p, []
    for i in range(config.n_layer):
        options = {"n_head": config.n_head, "scale": config.attention_scale(i), "eps": config.layer_norm_epsilon}
        x, back_block = block(x, params[f"h{i}"], **options)
        back_blocks.append(back_block)
    h, back_ln_f = layer_norm(x, **params["ln_f"], eps=config.layer_norm_epsilon)
    logits, back_table = unembed(h, output_embedding(params))
    value, back_loss = cross_entropy(logits, tokens[:, 1:])

    def backward(dy: Any = 1.0) -> Params:
        grads: Params = {}
        dh, table = back_table(back_loss(dy))
        dx, grads["ln_f"] = back_ln_f(dh)
        for i in reversed(range(config.n_layer)):
            dx, grads[f"h{i}"] = back_blocks[i](dx)
        grads["wpe"] = back_wpe(backend.xp.sum(dx, axis=0))
        grads["wte"] = back_wte(dx)
        if "lm_head" in params:
            grads["lm_head"] = table
        else:
            grads["wte"] = grads["wte"] + table
        return grads

    return value, backward
