"""The exact results of the ops as balls of 320 bits (`flint.arb`).

The bounds of the errors are relative to sums in which nothing cancels, so this precision is enough where the result is
nearly 0 too. The arguments are finite float64 arrays that hold float32 numbers. The constants are those float64 numbers
that the definitions write.
"""

import contextlib
import math

import flint
import numpy as np

arb = flint.arb


@contextlib.contextmanager
def precise():
    before, flint.ctx.prec = flint.ctx.prec, 320
    try:
        yield
    finally:
        flint.ctx.prec = before


def each(f, *arrays):
    return np.asarray(np.frompyfunc(f, len(arrays), 1)(*arrays), object)


def balls(a):
    return each(lambda x: arb(float(x)), a)


def conv1d(x, w, b=None):
    y = balls(x) @ balls(w.reshape(w.shape[-2:]))
    return y if b is None else y + balls(b)


def unembed(x, w):
    return conv1d(x, w.T)


def softmax(x, axis=-1):
    m = x.max(axis=axis, keepdims=True)
    e = each(lambda x, m: arb(0) if x == -np.inf else (arb(float(x)) - arb(float(m))).exp(), x, m)
    return e / e.sum(axis=axis, keepdims=True)


def gelu(x):
    def one(x):
        if x < -1e3:  # larger than -1e3 exp(-1e3)
            return arb(0, 1e-300)
        x = arb(float(x))
        return x / (1 + (-2 * arb(math.sqrt(2 / math.pi)) * (x + arb(0.044715) * x**3)).exp())

    return each(one, x)


def layer_norm(x, g, b, eps=1e-5):
    n = x.shape[-1]
    d = balls(x)
    d = d - d.sum(axis=-1, keepdims=True) / n
    r = each(arb.sqrt, (d * d).sum(axis=-1, keepdims=True) / n + arb(eps))
    return d / r * balls(g) + balls(b)


def scores(q, k, mask=None, causal=False, scale=None):
    """Return the scores, and which of them are visible."""
    seen = (
        np.ones((*q.shape[:-1], k.shape[-2]), bool)
        if mask is None
        else np.broadcast_to(mask, (*q.shape[:-1], k.shape[-2]))
    )
    if causal:
        seen = seen & np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    return np.matmul(balls(q), np.swapaxes(balls(k), -1, -2)) * arb(scale), seen


def attention_scores(q, k, mask=None, **options):
    s, seen = scores(q, k, mask, **options)
    return np.where(seen, s, -np.inf)


def attention_weights(q, k, mask=None, **options):
    s, seen = scores(q, k, mask, **options)
    middle = each(lambda ball: float(ball.mid()), s)
    m = np.where(seen, middle, -np.inf).max(axis=-1, keepdims=True)
    e = each(lambda s, m, seen: (s - arb(float(m))).exp() if seen else arb(0), s, m, seen)
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, mask=None, **options):
    return np.matmul(attention_weights(q, k, mask, **options), balls(v))


def cross_entropy(logits, targets):
    m = logits.max(axis=-1, keepdims=True)
    d = each(lambda x, m: arb(float(m)) - arb(float(x)), logits, m)
    total = each(lambda d: (-d).exp(), d).sum(axis=-1, keepdims=True)
    loss = each(arb.log, total) + np.take_along_axis(d, targets[..., None], axis=-1)
    return np.asarray(loss.sum() / loss.size, object)
