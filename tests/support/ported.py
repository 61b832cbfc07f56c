"""A GPT-2 as somebody might port it, in plain NumPy and float32, with the mistakes that people make as switches.

It shares no code with the package. It emits its results under the names of `GPT2.trace`. `bugs` draws mistakes, each
with the result at which it first shows and a pattern of the cause.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import portable_gpt2 as pg
from portable_gpt2.testing.plain_gpt2 import random_weights

FORMATS = {"float16": np.float16}
FORMATS |= {name: getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mistake in a port: its kind, the results where it first shows, and the cause that should be guessed."""

    kind: str = ""
    site: str = ""  # a pattern of the names of results
    value: Any = None
    cause: str = ""  # a pattern
    tensors: dict = dataclasses.field(
        default_factory=dict
    )  # for a mistake in the weights: the tensors that are changed

    def hits(self, kind, name):
        return self.kind == kind and re.fullmatch(self.site, name) is not None

    def culprit(self, names):
        return next(name for name in names if re.fullmatch(self.site, name))


def in_form(x, form):
    """Round float32 numbers to 16 bits or to TF32, and return them as float32."""
    if form == "TF32":
        scaled = x.astype(np.float64)
        mantissa, exponent = np.frexp(scaled)
        return np.ldexp(np.rint(mantissa * 2.0**11), exponent - 11).astype(np.float32)
    return x.astype(FORMATS[form]).astype(np.float32)


STYLES = (
    "plain",
    "reversed",
    "one by one",
    "bias in the product",
    "einsum",
    "reciprocal",
    "scale at q",
    "scale at both",
    "divided",
    "fused",
    "finite mask",
    "-10000",
    "smallest number",
    "no maximum",
    "powers",
)


def port(config, flat, tokens, bug=Bug(), *, style="plain", seed=0):
    """Return the results by name. A style is another order of computation, and no mistake."""
    c, random = config, np.random.default_rng(seed)
    flat = {path: np.asarray(a, np.float32) for path, a in flat.items()}
    arrays = {}

    def seen(name, x):
        if bug.hits("result in fewer bits", name):
            x = in_form(x, bug.value)
        if bug.hits("sign", name):
            x = -x
        if bug.hits("dropout", name):
            x = np.where(random.random(x.shape) < bug.value, 0, x / np.float32(1 - bug.value))
        if bug.hits("shifted", name):
            x = np.roll(x, bug.value, axis=-2)
        if bug.hits("scaled", name):
            x = x * np.float32(bug.value)
        if bug.hits("clipped", name):
            x = np.clip(x, -np.float32(bug.value), np.float32(bug.value))
        if bug.hits("capped", name):
            x = np.float32(bug.value) * np.tanh(x / np.float32(bug.value))
        if bug.hits("offset", name):
            x = x + np.float32(bug.value) * np.cos(np.arange(x.shape[-1], dtype=np.float32))
        if bug.hits("a copy", name):
            x = arrays[bug.value.format(h=name.partition("/")[0])].reshape(x.shape)
        if bug.hits("not a number", name):
            x = np.where(x > np.quantile(x, 0.9), np.float32(np.nan), x)
        if bug.hits("overflow", name):
            x = np.where(abs(x) > 65504, np.copysign(np.float32(np.inf), x), x)
        if bug.hits("few digits", name):
            x = np.round(x.astype(np.float64), bug.value) if bug.value > 0 else np.rint(x * 64) / 64
        if bug.hits("one head", name):
            x = np.concatenate([x[:, :1], x[:, 1:2, :, ::-1], x[:, 2:]], axis=1)
        if bug.hits("one position", name):
            x = np.concatenate([x[..., :-1, :], x[..., -1:, ::-1]], axis=-2)
        arrays[name] = x.astype(np.float32)
        return arrays[name]

    def shifted(scope, name):
        """Return the scope that a mistake reads instead of the right one."""
        if bug.hits("another layer's weights", name):
            layer, rest = re.fullmatch(r"h(\d+)/(.*)", scope).groups()
            return f"h{(int(layer) + bug.value) % c.n_layer}/{rest}"
        if bug.hits("swapped layer norms", name):
            return scope.replace("ln_1", "ln_?").replace("ln_2", "ln_1").replace("ln_?", "ln_2")
        return scope

    def norm(name, x):
        scope = shifted(name, name)
        g, b = flat[f"{scope}/g"], flat[f"{scope}/b"]
        if bug.hits("norm is missing", name):
            return seen(name, x)
        if bug.hits("missing parameters", name):
            g, b = (np.ones_like(g) if "g" in bug.value else g), (np.zeros_like(b) if "b" in bug.value else b)
        if bug.hits("gain", name):
            g = 1 + g
        if bug.hits("gain and bias are exchanged", name):
            g, b = b, g
        if bug.hits("parameters in fewer bits", name):
            g, b = in_form(g, bug.value), in_form(b, bug.value)
        n = x.shape[-1]
        eps = bug.value if bug.hits("eps", name) else c.layer_norm_epsilon
        if bug.hits("norm over positions", name):
            d = x - x.mean(-2, keepdims=True)
            return seen(name, d / np.sqrt((d * d).mean(-2, keepdims=True) + np.float32(eps)) * g + b)
        if bug.hits("no mean, no bias", name):
            b = np.zeros_like(b)
        no_mean = bug.hits("no mean", name) or bug.hits("no mean, no bias", name)
        d = x if no_mean else x - x.mean(-1, keepdims=True)
        total = np.einsum("...i,...i->...", d, d)[..., None] if style == "einsum" else (d * d).sum(-1, keepdims=True)
        variance = total / np.float32(n - 1 if bug.hits("n - 1", name) else n)
        if bug.hits("eps outside", name):
            y = d / (np.sqrt(total / np.float32(n - bug.value)) + np.float32(eps))
        elif style == "reciprocal":
            y = d * (np.float32(1) / np.sqrt(variance + np.float32(eps)))
        else:
            y = d / np.sqrt(variance + np.float32(eps))
        if bug.hits("not divided", name):
            y = d
        if bug.hits("norm is applied twice", name):
            x = y * g + b
            d = x - x.mean(-1, keepdims=True)
            y = d / np.sqrt((d * d).mean(-1, keepdims=True) + np.float32(eps))
        return seen(name, y * g + b)

    def product(x, w):
        if style == "reversed":
            return x[..., ::-1] @ w[::-1]
        if style == "one by one":
            total = np.zeros((*x.shape[:-1], w.shape[-1]), np.float32)
            for k in range(x.shape[-1]):
                total = total + x[..., k, None] * w[k]
            return total
        return x @ w

    def linear(name, x):
        scope = shifted(name, name)
        w, b = flat[f"{scope}/w"], flat[f"{scope}/b"]
        if bug.hits("transposed", name):
            w = w.reshape(w.shape[::-1]).T
        if bug.hits("no bias", name):
            b = np.zeros_like(b)
        if bug.hits("order", name):
            thirds = [np.split(a, 3, axis=-1) for a in (w, b)]
            w, b = (np.concatenate([third["qkv".index(i)] for i in bug.value], axis=-1) for third in thirds)
        if bug.hits("order of the biases", name) or bug.hits("order of the weights", name):
            thirds = np.split(b if "bias" in bug.kind else w, 3, axis=-1)
            found = np.concatenate([thirds["qkv".index(i)] for i in bug.value], axis=-1)
            w, b = (w, found) if "bias" in bug.kind else (found, b)
        if bug.hits("no bias of one part", name):
            b = np.concatenate([y * (part != bug.value) for part, y in zip("qkv", np.split(b, 3), strict=True)])
        if bug.hits("bias is added twice", name):
            b = 2 * b
        if bug.hits("columns by head", name):
            w, b = (a.reshape(*a.shape[:-1], 3, c.n_head, -1).swapaxes(-2, -3).reshape(a.shape) for a in (w, b))
        if bug.hits("weight is scaled", name):
            w = w * np.float32(bug.value)
        if bug.hits("weight in int8", name):
            step = abs(w).max(axis=bug.value, keepdims=True) / np.float32(127)
            w = np.rint(w / step) * step
        if bug.hits("factors in fewer bits", name):
            w, x = in_form(w, bug.value), in_form(x, bug.value)
        if bug.hits("weight in fewer bits", name):
            w = in_form(w, bug.value)
        if bug.hits("sum in 16 bits", name):
            form, total = FORMATS[bug.value], np.zeros((*x.shape[:-1], w.shape[-1]), FORMATS[bug.value])
            for k in range(x.shape[-1]):
                total = (total + (x[..., k, None] * w[k]).astype(form)).astype(form)
            return seen(name, total.astype(np.float32) + b)
        if style == "bias in the product":
            return seen(name, np.concatenate([np.ones_like(x[..., :1]), x], -1) @ np.concatenate([b[None], w]))
        return seen(name, product(x, w) + b)

    def split(x):
        return x.reshape(1, -1, c.n_head, x.shape[-1] // c.n_head).transpose(0, 2, 1, 3)

    seq = tokens.shape[1]
    name = "embedding"
    ids, positions = tokens[0], np.arange(seq)
    if bug.hits("positions", name):
        positions = bug.value(positions)
    if bug.hits("tokens", name):
        ids = (ids + bug.value) % c.n_vocab
    rows, where = flat["wte"][ids], flat["wpe"][positions]
    if bug.hits("no positions", name):
        where = np.zeros_like(where)
    if bug.hits("no tokens", name):
        rows = np.zeros_like(rows)
    if bug.hits("positions are scaled", name):
        where = where * np.float32(bug.value)
    if bug.hits("sinusoids", name):
        angles = np.arange(seq)[:, None] / 10000.0 ** (np.arange(0, c.n_embd, 2) / c.n_embd)
        waves = [np.sin(angles), np.cos(angles)]
        where = np.stack(waves, -1).reshape(seq, -1) if bug.value else np.concatenate(waves, -1)
        where = where.astype(np.float32)
    if bug.hits("embeddings in fewer bits", name):
        rows, where = in_form(rows, bug.value), in_form(where, bug.value)
    if bug.hits("embedding is scaled", name):
        rows = rows * np.float32(math.sqrt(c.n_embd))
    x = seen(name, (rows + where)[None])

    visible = np.tril(np.ones((seq, seq), bool))
    for i in range(c.n_layer):
        at = f"h{i}"
        normal = norm(f"{at}/ln_1", x)
        source = x if bug.hits("reads the stream", f"{at}/attn/c_attn") else normal
        qkv = linear(f"{at}/attn/c_attn", source)
        d = c.head_size
        parts = dict(zip("qkv", map(split, np.split(qkv, 3, axis=-1)), strict=True))
        for part in "qkv":
            name = f"{at}/attn/{part}"
            which = "qkv".index(part)
            if bug.hits("interleaved heads", name):
                parts[part] = qkv.reshape(1, seq, c.n_head, 3, d)[:, :, :, which].transpose(0, 2, 1, 3)
            if bug.hits("heads without a transposition", name):
                parts[part] = np.split(qkv, 3, axis=-1)[which].reshape(1, c.n_head, seq, d)
            if bug.hits("heads by element", name):
                parts[part] = np.split(qkv, 3, axis=-1)[which].reshape(1, seq, d, c.n_head).transpose(0, 3, 1, 2)
            if bug.hits("wrong part", name):
                parts[part] = split(np.split(qkv, 3, axis=-1)["qkv".index(bug.value)])
            if bug.hits("one head for all", name):
                parts[part] = np.repeat(parts[part][:, :1], c.n_head, axis=1)
            if bug.hits("heads in another order", name):
                parts[part] = parts[part][:, ::-1]
            if bug.hits("rotated", name):
                parts[part] = rotated(parts[part], bug.value)
            if bug.hits("normalised", name):
                y = parts[part]
                parts[part] = y / np.sqrt((y * y).mean(-1, keepdims=True) + np.float32(1e-6))
            if bug.hits("scaled early", name):
                parts[part] = parts[part] * np.float32(bug.value(c))
            if bug.hits("previous layer's", name) and i:
                parts[part] = arrays[f"h{i - 1}/attn/{part}"]
            if bug.hits("cache in 16 bits", name):
                parts[part] = in_form(parts[part], bug.value)
            if bug.hits("cache is shifted", name):
                parts[part] = np.concatenate([np.zeros_like(parts[part][..., :1, :]), parts[part][..., :-1, :]], -2)
            seen(name, parts[part])
        q, k, v = (arrays[f"{at}/attn/{part}"] for part in "qkv")
        name = f"{at}/attn/scores"
        scale = 1.0 if not c.scale_attn_weights else d**-0.5
        if c.scale_attn_by_inverse_layer_idx != bug.hits("inverse layer index", name):
            scale /= i + 1
        if bug.hits("scale", name):
            scale = bug.value(c)
        keys = np.swapaxes(k, -1, -2)
        if bug.hits("q and k are exchanged", name):
            scores = (k @ np.swapaxes(q, -1, -2)) * np.float32(scale)
        elif bug.hits("q is k", name):
            scores = (q @ np.swapaxes(q, -1, -2)) * np.float32(scale)
        elif style == "scale at q":
            scores = (q * np.float32(scale)) @ keys
        elif style == "scale at both":
            scores = (q * np.float32(math.sqrt(scale))) @ (keys * np.float32(math.sqrt(scale)))
        elif style == "divided":
            scores = (q @ keys) / np.float32(1 / scale)
        else:
            scores = (q @ keys) * np.float32(scale)
        seen_keys = np.tri(seq, k=bug.value, dtype=bool) if bug.hits("mask", name) else visible
        if bug.hits("no mask", name):
            seen_keys = np.ones_like(visible)
        if bug.hits("another mask", name):
            seen_keys = bug.value(visible)
        if bug.hits("linear bias", name):
            slopes = 2.0 ** (-8 * (np.arange(c.n_head) + 1) / c.n_head)
            distance = np.arange(seq) - np.arange(seq)[:, None]
            scores = scores + (slopes[:, None, None] * distance).astype(np.float32)
        if bug.hits("hidden scores", name):
            scores = np.where(seen_keys, scores, np.float32(bug.value))
        elif bug.hits("hidden scores, added", name):
            scores = np.where(seen_keys, scores, scores + np.float32(bug.value))
        elif style == "finite mask":
            scores = np.where(seen_keys, scores, np.float32(-1e9))
        elif style == "-10000":
            scores = scores + np.where(seen_keys, np.float32(0), np.float32(-1e4))
        elif style == "smallest number":
            scores = np.where(seen_keys, scores, np.finfo(np.float32).min)
        else:
            scores = np.where(seen_keys, scores, np.float32(-np.inf))
        scores = seen(name, scores)
        name = f"{at}/attn/weights"
        axis = -2 if bug.hits("softmax over queries", name) else -3 if bug.hits("softmax over heads", name) else -1
        with np.errstate(invalid="ignore"):
            e = np.exp(scores - scores.max(axis, keepdims=True))
            if bug.hits("softmax in 16 bits", name):
                form = FORMATS[bug.value]
                e = np.exp((scores - scores.max(-1, keepdims=True)).astype(form)).astype(form)
                total = np.zeros_like(e[..., :1])
                for key in range(seq):
                    total = (total + e[..., key, None]).astype(form)
                w = (e / total).astype(form).astype(np.float32)
            elif bug.hits("one more in the softmax", name):
                w = e / (np.exp(-scores.max(-1, keepdims=True)) + e.sum(-1, keepdims=True))
            elif bug.hits("mask after the softmax", name):
                raw = (q @ keys) * np.float32(scale)
                e = np.exp(raw - raw.max(-1, keepdims=True))
                w = e / e.sum(-1, keepdims=True) * visible
            elif bug.hits("no division", name):
                w = e
            elif style == "no maximum":
                e = np.exp(scores)
                w = e / e.sum(axis, keepdims=True)
            else:
                w = e / e.sum(axis, keepdims=True)
        w = seen(name, w)
        name = f"{at}/attn/attention"
        if style == "fused":
            a = (e @ v) / e.sum(-1, keepdims=True)
        elif bug.hits("weights in 16 bits", name):
            a = in_form(w, bug.value) @ v
        elif bug.hits("values are queries", name):
            a = w @ q
        elif bug.hits("weights are transposed", name):
            a = np.swapaxes(w, -1, -2) @ v
        elif bug.hits("values are keys", name):
            a = w @ k
        else:
            a = w @ v
        a = seen(name, a)
        name = f"{at}/attn/c_proj"
        if bug.hits("heads are merged wrongly", name):
            merged = a.reshape(1, seq, c.n_embd)
        elif bug.hits("heads are merged by element", name):
            merged = a.transpose(0, 2, 3, 1).reshape(1, seq, c.n_embd)
        else:
            merged = a.transpose(0, 2, 1, 3).reshape(1, seq, c.n_embd)
        a = linear(name, merged)
        before, x = x, added(bug, f"{at}/attn/residual", x, a, normal, seen)
        normal = norm(f"{at}/ln_2", before if bug.hits("parallel", f"{at}/ln_2") else x)
        h = linear(f"{at}/mlp/c_fc", x if bug.hits("reads the stream", f"{at}/mlp/c_fc") else normal)
        name = f"{at}/mlp/gelu"
        if bug.hits("activation", name):
            y = ACTIVATIONS[bug.value](h)
        elif style == "powers":
            y = (
                np.float32(0.5)
                * h
                * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (h + np.float32(0.044715) * np.power(h, 3))))
            )
        else:
            inner = np.float32(math.sqrt(2 / math.pi)) * (h + np.float32(0.044715) * h * h * h)
            y = h / 2 * (1 + np.tanh(inner))
        x = added(bug, f"{at}/residual", x, linear(f"{at}/mlp/c_proj", seen(name, y)), normal, seen)
    last = norm("ln_f", x)
    name = "logits"
    w = flat.get("lm_head", flat["wte"])
    if bug.hits("another head", name):
        w = flat[bug.value]
    if bug.hits("vocabulary is shifted", name):
        w = np.roll(w, bug.value, axis=0)
    if bug.hits("factors in fewer bits", name):
        w, last = in_form(w, bug.value), in_form(last, bug.value)
    if bug.hits("no final norm", name):
        last = x
    logits = product(last, w.T)
    if bug.hits("probabilities", name):
        e = np.exp(logits - logits.max(-1, keepdims=True))
        logits = e / e.sum(-1, keepdims=True)
    if bug.hits("log-probabilities", name):
        shifted_logits = logits - logits.max(-1, keepdims=True)
        logits = shifted_logits - np.log(np.exp(shifted_logits).sum(-1, keepdims=True))
    seen(name, logits)
    return arrays


def added(bug, name, x, branch, normal, seen):
    """Return the residual stream after a branch."""
    if bug.hits("no residual", name):
        return seen(name, branch)
    if bug.hits("residual of the norm", name):
        return seen(name, normal + branch)
    if bug.hits("subtracted", name):
        return seen(name, x - branch)
    if bug.hits("no branch", name):
        return seen(name, x)
    if bug.hits("branch is scaled", name):
        return seen(name, x + np.float32(bug.value) * branch)
    if bug.hits("stream is scaled", name):
        return seen(name, np.float32(bug.value) * x + branch)
    if bug.hits("half of both", name):
        return seen(name, (x + branch) / 2)
    return seen(name, x + branch)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "erf": lambda x: (
        np.float32(0.5) * x * (1 + np.vectorize(math.erf)(x.astype(np.float64) / math.sqrt(2)).astype(np.float32))
    ),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "quick": lambda x: x * sigmoid(np.float32(1.702) * x),
    "none": lambda x: x,
    "leaky": lambda x: np.where(x < 0, np.float32(0.01) * x, x),
    "elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "square": lambda x: np.maximum(x, 0) ** 2,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "hard": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "typo": lambda x: gelu(x, cubic=0.044),
    "0.8": lambda x: gelu(x, slope=0.8),
    "no cube": lambda x: gelu(x, cubic=0.0),
    "no half": lambda x: 2 * gelu(x),
    "twice": lambda x: gelu(gelu(x)),
}


def gelu(x, slope=0.7978845608, cubic=0.044715):
    return x / 2 * (1 + np.tanh(np.float32(slope) * (x + np.float32(cubic) * x * x * x)))


def rotated(x, is_interleaved):
    """Rotate pairs of elements by angles that are proportional to the position, as rotary embeddings do."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] / 10000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = (x[..., ::2], x[..., 1::2]) if is_interleaved else (x[..., :half], x[..., half:])
    y = a * cos - b * sin, a * sin + b * cos
    return np.stack(y, -1).reshape(x.shape) if is_interleaved else np.concatenate(y, -1)


class Kind(NamedTuple):
    """A kind of mistake: the results where it may be, its values, and the cause for each value."""

    sites: list[str]
    causes: dict[Any, str]
    needs: Callable[[Any], bool] = lambda config: True


EVERY = r"h\d+/"
NORMS = [EVERY + "ln_1", EVERY + "ln_2", "ln_f", EVERY + "ln_[12]|ln_f"]
LINEAR = [EVERY + "attn/c_attn", EVERY + "attn/c_proj", EVERY + "mlp/c_fc", EVERY + "mlp/c_proj", "h1/mlp/c_fc"]
SCORES = [EVERY + "attn/scores", "h1/attn/scores"]


def _later(x):
    return x + 1


def _padded(x):
    return x + 3


def _restarted(x):
    return x % 5


def _zero(x):
    return np.zeros_like(x)


def _reversed(x):
    return x[::-1]


def _window(seen):
    return seen & ~np.tri(len(seen), k=-4, dtype=bool)


def _padding(seen):
    return seen & ((np.arange(len(seen)) >= 2) | np.eye(len(seen), dtype=bool))


def _prefix(seen):
    return seen | (np.arange(len(seen)) < 5)


def _transposed(seen):
    return seen.T


def _squared(c):
    return 1 / c.head_size if c.scale_attn_weights else 1.0


def _root(c):
    return c.head_size**-0.25


def _usual(c):
    return c.head_size**-0.5


def _clipped(x):
    return np.maximum(x - 2, 0)


def _one(c):
    return 1.0


def _inverse(c):
    return 1 / c.head_size


def _embedding(c):
    return c.n_embd**-0.5


def _once(c):
    return c.head_size**-0.25


KINDS = {
    "eps": Kind(
        [EVERY + "ln_1", EVERY + "ln_[12]|ln_f", "h0/ln_1"],
        {1e-3: "eps is 0.001", 1e-6: "eps is 1e-06", 1e-12: "eps is 1e-12", 0.0: "eps is (0|1e-12)"},
    ),
    "eps outside": Kind(NORMS[:1] + NORMS[3:], {0: "standard deviation, not", 1: "standard deviation of n - 1"}),
    "n - 1": Kind(NORMS, {None: "n - 1"}),
    "no mean": Kind(NORMS, {None: "mean is not subtracted"}),
    "missing parameters": Kind(
        NORMS, {"g": "gain is missing", "b": "bias is missing", "gb": "gain and bias are missing"}
    ),
    "gain": Kind(NORMS, {None: r"1 \+ g"}),
    "norm is missing": Kind(NORMS, {None: "its result is"}),
    "swapped layer norms": Kind([EVERY + "ln_[12]"], {None: r"parameters of h\d+/ln_2"}),
    "another layer's weights": Kind(LINEAR[:4] + NORMS[:2], {1: "parameters of h1/", -1: r"parameters of h\d+/"}),
    "transposed": Kind(LINEAR, {None: "transposed"}),
    "no bias": Kind(LINEAR, {None: "bias is missing"}),
    "order": Kind(
        [EVERY + "attn/c_attn", "h1/attn/c_attn"],
        {p: f"the order is {p[0]}, {p[1]}, {p[2]}" for p in ("kqv", "vkq", "kvq", "qvk")},
    ),
    "factors in fewer bits": Kind(
        [*LINEAR, "logits"], {form: f"factors are rounded to {form}" for form in ("TF32", "bfloat16", "float16")}
    ),
    "weight in fewer bits": Kind(LINEAR, {form: f"weight is rounded to {form}" for form in ("bfloat16", "float16")}),
    "sum in 16 bits": Kind(
        LINEAR[:2], {"float16": "errors are those of float16", "bfloat16": "errors are those of bfloat16"}
    ),
    "result in fewer bits": Kind(
        [
            EVERY + "ln_1",
            EVERY + "mlp/gelu",
            EVERY + "residual",
            EVERY + "attn/c_proj",
            EVERY + "attn/scores",
            "embedding",
            "logits",
        ],
        {form: f"result is rounded to {form}" for form in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")},
    ),
    "few digits": Kind(
        [EVERY + "ln_1", EVERY + "mlp/c_fc", EVERY + "attn/weights", "logits"],
        {4: "rounded to 4 decimals", 2: "rounded to 2 decimals", 0: "rounded to multiples of 1/64"},
    ),
    "positions": Kind(
        ["embedding"],
        {
            _later: r"positions are off by \+1",
            _padded: r"positions are off by \+3",
            _clipped: "positions are 0, 0, 0, 1, 2",
            _restarted: "positions are 0, 1, 2, 3, 4, 0",
            _zero: "positions are 0, 0, 0",
            _reversed: "positions are",
        },
    ),
    "no positions": Kind(["embedding"], {None: "positions are not added"}),
    "tokens": Kind(["embedding"], {1: "token ids are off by|token ids are", -1: "token ids are"}),
    "embedding is scaled": Kind(["embedding"], {None: r"multiplied by sqrt\(n_embd\)"}),
    "reads the stream": Kind([EVERY + "attn/c_attn", EVERY + "mlp/c_fc"], {None: "it reads"}),
    "interleaved heads": Kind([EVERY + "attn/[qkv]"], {None: "interleaved"}),
    "heads without a transposition": Kind([EVERY + "attn/[qkv]"], {None: "without a transposition"}),
    "heads by element": Kind([EVERY + "attn/[qkv]"], {None: "element by element"}),
    "wrong part": Kind([EVERY + "attn/v"], {"k": "columns of k", "q": "columns of q"}),
    "cache in 16 bits": Kind(
        [EVERY + "attn/[kv]"], {form: f"rounded to {form}, as in a cache" for form in ("float16", "bfloat16")}
    ),
    "cache is shifted": Kind([EVERY + "attn/[kv]"], {None: "positions are shifted by 1"}),
    "inverse layer index": Kind([r"h[1-9]\d*/attn/scores"], {None: "layer's number"}),
    "scale": Kind(
        SCORES,
        {
            _one: "not scaled",
            _inverse: "1/d,",
            _embedding: r"1/sqrt\(n_embd\)",
            _once: r"d\^\(-1/4\)",
            _squared: "1/d,",
        },
        lambda c: c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx,
    ),
    "q and k are exchanged": Kind(SCORES, {None: "inputs are k, q"}),
    "mask": Kind(SCORES, {1: "sees the key after its own", -1: "does not see its own key"}),
    "no mask": Kind(SCORES, {None: "no mask"}),
    "hidden scores": Kind(
        SCORES, {-20.0: "hidden scores are -20", -5.0: "hidden scores are -5", 0.0: "hidden scores are 0"}
    ),
    "hidden scores, added": Kind(SCORES, {-20.0: "-20 is added", -10.0: "-10 is added"}),
    "softmax over queries": Kind([EVERY + "attn/weights"], {None: "over the queries"}),
    "softmax in 16 bits": Kind([EVERY + "attn/weights"], {"float16": "float16", "bfloat16": "bfloat16"}),
    "weights in 16 bits": Kind(
        [EVERY + "attn/attention"],
        {"float16": "weights are rounded to float16", "bfloat16": "weights are rounded to bfloat16"},
    ),
    "values are keys": Kind(
        [EVERY + "attn/attention"], {None: "inputs are q, k, k|it reads .*attn/k instead of .*attn/v"}
    ),
    "heads are merged wrongly": Kind([EVERY + "attn/c_proj"], {None: "merged without a transposition"}),
    "no residual": Kind([EVERY + "attn/residual", EVERY + "residual"], {None: "residual connection is missing"}),
    "residual of the norm": Kind(
        [EVERY + "attn/residual", EVERY + "residual"], {None: r"it reads h\d+/ln_[12] instead"}
    ),
    "subtracted": Kind([EVERY + "attn/residual", EVERY + "residual"], {None: "subtracted"}),
    "no branch": Kind([EVERY + "residual"], {None: "branch is missing|its result is"}),
    "parallel": Kind([EVERY + "ln_2"], {None: "it reads (embedding|h\\d+/residual) instead"}),
    "activation": Kind(
        [EVERY + "mlp/gelu"],
        {
            "erf": "erf form",
            "relu": "ReLU",
            "silu": "SiLU",
            "quick": "1.702",
            "none": "its result is",
            "leaky": "leaky ReLU",
            "elu": "ELU",
            "softplus": "softplus",
            "sigmoid": "the sigmoid",
            "tanh": "is tanh",
            "square": "square of ReLU",
            "mish": "Mish",
            "hard": "hard swish",
            "typo": r"0\.044,? ",
            "0.8": r"0\.8,? ",
            "no cube": "cubic term is missing",
            "no half": "multiplied by 2",
            "twice": "applied twice",
        },
    ),
    "another head": Kind(["logits"], {"wte": "head is wte"}, lambda c: not c.tie_word_embeddings),
    "vocabulary is shifted": Kind(["logits"], {1: r"token ids are off by \+1", -1: "token ids are off by -1"}),
    "no final norm": Kind(["logits"], {None: r"it reads h\d+/residual instead of ln_f"}),
    "log-probabilities": Kind(["logits"], {None: "log-probabilities"}),
    "sign": Kind([EVERY + "attn/c_proj", EVERY + "mlp/c_proj", EVERY + "attn/attention"], {None: "sign is reversed"}),
    "dropout": Kind(
        ["embedding", EVERY + "attn/weights", EVERY + "attn/c_proj", EVERY + "mlp/c_proj"],
        {0.1: "dropout is active, with p = 0.1", 0.2: "dropout is active, with p = 0.2"},
    ),
    "shifted": Kind(
        [EVERY + "ln_1", EVERY + "mlp/c_proj", "logits"],
        {1: "positions are shifted by 1", -1: "positions are shifted by -1"},
    ),
    "scaled": Kind(
        [EVERY + "mlp/c_proj", EVERY + "attn/attention", "ln_f", "logits"],
        {0.5: "multiplied by 0.5", 1.1: "multiplied by 1.1", 0.8: "multiplied by 0.8"},
    ),
    "clipped": Kind(["logits", EVERY + "residual"], {0.5: "clipped to [^ ]*0.5", 1.0: "clipped to [^ ]*1"}),
    "capped": Kind(["logits", *SCORES], {30.0: "30 tanh", 15.0: "15 tanh"}),
    "offset": Kind(["logits", LINEAR[2], LINEAR[3]], {0.5: "the same vector is added at every position"}),
    "a copy": Kind([EVERY + "attn/attention"], {"{h}/attn/v": "its result is h0/attn/v"}),
    "not a number": Kind([EVERY + "mlp/gelu", EVERY + "attn/c_proj"], {None: "NaN"}),
    "one head": Kind([EVERY + "attn/attention", EVERY + "attn/[qkv]"], {None: "only head 1 "}),
    "one position": Kind([EVERY + "ln_1", EVERY + "attn/c_proj", "logits"], {None: "only position [0-9]+ "}),
    "gain and bias are exchanged": Kind(NORMS, {None: "gain and bias are exchanged"}),
    "parameters in fewer bits": Kind(
        NORMS, {"float16": "parameters are rounded to float16", "bfloat16": "parameters are rounded to bfloat16"}
    ),
    "norm over positions": Kind(NORMS, {None: "over the positions"}),
    "no mean, no bias": Kind(NORMS, {None: "neither the mean is subtracted nor the bias added"}),
    "not divided": Kind(NORMS, {None: "not divided by the standard deviation"}),
    "norm is applied twice": Kind(NORMS, {None: "applied twice"}),
    "order of the biases": Kind([EVERY + "attn/c_attn"], {"kqv": "order of the biases is k, q, v"}),
    "order of the weights": Kind([EVERY + "attn/c_attn"], {"kqv": "order of the weights is k, q, v"}),
    "no bias of one part": Kind([EVERY + "attn/c_attn"], {part: f"the bias of {part} is missing" for part in "qkv"}),
    "bias is added twice": Kind(LINEAR, {None: "bias is added twice"}),
    "columns by head": Kind([EVERY + "attn/c_attn"], {None: "interleaved"}),
    "weight is scaled": Kind(LINEAR, {0.5: "weight is multiplied by 0.5", 0.9: "weight is multiplied by 0.9"}),
    "weight in int8": Kind(
        LINEAR,
        {0: "rounded to int8 with one scale for each column", None: "rounded to int8 with one scale for the tensor"},
    ),
    "no tokens": Kind(["embedding"], {None: "token embedding is not added"}),
    "positions are scaled": Kind(["embedding"], {0.5: "position embedding is multiplied by 0.5"}),
    "sinusoids": Kind(["embedding"], {True: "sines and cosines", False: "sines and cosines"}),
    "embeddings in fewer bits": Kind(
        ["embedding"], {"float16": "rounded to float16", "bfloat16": "rounded to bfloat16"}
    ),
    "one head for all": Kind([EVERY + "attn/[kv]"], {None: "every head has head 0"}),
    "heads in another order": Kind([EVERY + "attn/[qkv]"], {None: "heads are in reverse order"}),
    "rotated": Kind([EVERY + "attn/[qk]"], {True: "rotated by its position", False: "rotated by its position"}),
    "normalised": Kind([EVERY + "attn/[qk]"], {None: "divided by its root mean square"}),
    "scaled early": Kind(
        [EVERY + "attn/q"],
        {_usual: "scale of the scores", _root: "square root of the scale"},
        lambda c: c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx,
    ),
    "previous layer's": Kind([r"h[1-9]\d*/attn/[kv]"], {None: r"its result is h\d+/attn/[kv]"}),
    "q is k": Kind(SCORES, {None: "inputs are q, q"}),
    "another mask": Kind(
        SCORES,
        {
            _window: "sees only its own key and the 3 before it",
            _padding: "no later query sees the keys 0 to 1",
            _prefix: "every query sees the keys 0 to 4",
            _transposed: "mask is transposed",
        },
    ),
    "linear bias": Kind(SCORES, {None: "ALiBi"}),
    "softmax over heads": Kind([EVERY + "attn/weights"], {None: "over the heads"}),
    "one more in the softmax": Kind([EVERY + "attn/weights"], {None: "1 is added to the denominator"}),
    "mask after the softmax": Kind([EVERY + "attn/weights"], {None: "masked after the softmax"}),
    "no division": Kind([EVERY + "attn/weights"], {None: "not divided by their sum"}),
    "values are queries": Kind([EVERY + "attn/attention"], {None: "inputs are q, k, q|it reads"}),
    "weights are transposed": Kind([EVERY + "attn/attention"], {None: "weights are transposed"}),
    "heads are merged by element": Kind([EVERY + "attn/c_proj"], {None: "wrong order of axes"}),
    "branch is scaled": Kind(
        [EVERY + "attn/residual", EVERY + "residual"],
        {0.5: "branch is multiplied by 0.5", 1.1: "branch is multiplied by 1.1"},
    ),
    "stream is scaled": Kind([EVERY + "residual"], {0.5: "residual stream is multiplied by 0.5"}),
    "half of both": Kind([EVERY + "residual"], {None: "multiplied by 0.5"}),
    "probabilities": Kind(["logits"], {None: "results are probabilities"}),
}


def some_config(random):
    """Return a random small configuration. Every other one has the options of the published models."""
    heads = int(random.choice([2, 3, 4]))
    options = {}
    if random.random() < 0.5:
        options = {
            "n_inner": int(random.choice([24, 56, 96])),
            "scale_attn_by_inverse_layer_idx": bool(random.random() < 0.5),
            "tie_word_embeddings": bool(random.random() < 0.5),
            "layer_norm_epsilon": float(random.choice([1e-5, 1e-4])),
        }
    return pg.GPT2Config(
        n_layer=int(random.choice([2, 3])),
        n_head=heads,
        n_embd=heads * int(random.choice([8, 16, 24])),
        n_vocab=int(random.choice([61, 130])),
        n_ctx=40,
        eos_token_id=None,
        **options,
    )


def right_models(n, options=True):
    """Yield n configurations, each with weights and tokens, of more shapes than `some_config` has.

    Without `options`, they have those of the published models.
    """
    random = np.random.default_rng(n)
    for seed in range(n):
        heads = int(random.choice([1, 2, 4, 6]))
        config = pg.GPT2Config(
            n_layer=int(random.choice([1, 2, 4])),
            n_head=heads,
            n_embd=heads * int(random.choice([4, 16, 33, 64])),
            n_vocab=int(random.choice([50, 300, 2000])),
            n_ctx=160,
            eos_token_id=None,
        )
        if options and random.random() < 0.5:
            config = dataclasses.replace(
                config,
                n_inner=int(random.choice([24, 100])),
                scale_attn_weights=bool(random.random() < 0.8),
                scale_attn_by_inverse_layer_idx=bool(random.random() < 0.5),
                tie_word_embeddings=bool(random.random() < 0.5),
                layer_norm_epsilon=float(random.choice([1e-6, 1e-3])),
            )
        tokens = random.integers(0, config.n_vocab, (1, int(random.choice([1, 2, 7, 20, 64, 160]))))
        yield config, random_weights(config, seed), tokens


def some_weights(config, random):
    """Return float32 weights whose magnitudes are about those of a trained GPT-2."""

    def draw(path, shape):
        noise = random.standard_normal(shape)
        last = path.rpartition("/")[2]
        width = {"g": 0.2, "b": 0.1, "w": 1.2 * shape[0] ** -0.5, "wte": 0.14, "wpe": 0.1, "lm_head": 0.14}[last]
        return ((last == "g") * 0.8 + width * noise).astype(np.float32)

    return {path: draw(path, shape) for path, shape in pg.params.shapes(config).items()}


def bugs(n, seed=0):
    """Yield n mistakes, with a configuration, weights and tokens. Every kind occurs in turn."""
    random = np.random.default_rng(seed)
    kinds = list(KINDS)
    for i in range(n):
        name = kinds[i % len(kinds)]
        kind = KINDS[name]
        config = some_config(random)
        while not kind.needs(config):
            config = some_config(random)
        values = list(kind.causes)
        value = (
            values[(i // len(kinds)) % len(values)] if i >= len(kinds) else values[int(random.integers(len(values)))]
        )
        site = kind.sites[int(random.integers(len(kind.sites)))]
        tokens = random.integers(0, config.n_vocab, (1, int(random.integers(12, 33))))
        yield Bug(name, site, value, kind.causes[value]), config, some_weights(config, random), tokens


def assert_no_alarm(found, missing=()):
    """Assert that every result but some is judged and within its bound, and that no guess was made."""
    assert found.equal, found.verdict
    assert {name.rpartition("/")[2] for name in found.missing} <= {*missing}
    assert max(finding.ratio for finding in found.ops) <= 1
    assert not any(finding.guess for finding in found.ops)
    for each in found.growth:
        assert each.difference <= each.rounding, each
