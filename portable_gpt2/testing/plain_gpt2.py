"""A second implementation of GPT-2, in plain NumPy without the package's ops. The tests compare with it.

Its result in float64 is the expected one. Its error in float32 is the unit in which a backend's error is measured.
"""

import math

import numpy as np

import portable_gpt2 as pg

from ..sampling import Sampling, sample_with

U = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def plain_gpt2(flat, tokens, config, observe=lambda name, x: None):
    """Return the logits [batch, seq, n_vocab] in the dtype of the parameters. `flat` has the parameters by path.

    `observe` is called with the name and the value of each intermediate array that `GPT2.trace` returns.
    """

    def seen(name, x):
        observe(name, x)
        return x

    def norm(x, scope):
        d = x - x.mean(-1, keepdims=True)
        variance = (d * d).mean(-1, keepdims=True)
        return seen(scope, flat[f"{scope}/g"] * d / np.sqrt(variance + config.layer_norm_epsilon) + flat[f"{scope}/b"])

    def linear(x, scope):
        return seen(scope, x @ flat[f"{scope}/w"] + flat[f"{scope}/b"])

    seq, width = tokens.shape[1], config.n_embd // config.n_head
    visible = np.tril(np.ones((seq, seq), bool))
    x = seen("embedding", flat["wte"][tokens] + flat["wpe"][:seq])
    for i in range(config.n_layer):
        qkv = np.split(linear(norm(x, f"h{i}/ln_1"), f"h{i}/attn/c_attn"), 3, axis=-1)
        q, k, v = (np.stack(np.split(part, config.n_head, axis=-1), axis=1) for part in qkv)
        for name, part in zip("qkv", (q, k, v), strict=True):
            seen(f"h{i}/attn/{name}", part)
        divisor = (math.sqrt(width) if config.scale_attn_weights else 1) * (
            i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )
        heads, scores, weights = [], [], []
        for head in range(config.n_head):
            scores.append(q[:, head] @ np.swapaxes(k[:, head], -1, -2) / divisor)
            top = np.where(visible, scores[-1].real, -np.inf).max(-1, keepdims=True)
            e = np.where(visible, np.exp(np.where(visible, scores[-1] - top, 0)), 0)
            weights.append(e / e.sum(-1, keepdims=True))
            heads.append(weights[-1] @ v[:, head])
        seen(f"h{i}/attn/scores", np.where(visible, np.stack(scores, axis=1), -np.inf))
        seen(f"h{i}/attn/weights", np.stack(weights, axis=1))
        a = seen(f"h{i}/attn/attention", np.stack(heads, axis=1))
        x = seen(f"h{i}/attn/residual", x + linear(np.concatenate([*np.moveaxis(a, 1, 0)], -1), f"h{i}/attn/c_proj"))
        h = linear(norm(x, f"h{i}/ln_2"), f"h{i}/mlp/c_fc")
        h = seen(f"h{i}/mlp/gelu", h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h * h * h))) / 2)
        x = seen(f"h{i}/residual", x + linear(h, f"h{i}/mlp/c_proj"))
    return seen("logits", norm(x, "ln_f") @ flat.get("lm_head", flat["wte"]).T)


def plain_text(flat, prompt, n, config, *, dtype=np.float64, noise=None, index=0, **options):
    """Return n tokens that continue a prompt. All logits are computed again for each token, and the host samples.

    When a text fills n_ctx, its last n_ctx // 2 tokens are read again. `noise` is a function that returns an error that
    is added to the logits.
    """
    flat, sampling = in_dtype(flat, dtype), Sampling(**options)
    text, n_ctx = list(prompt), config.n_ctx
    window = text[:] if len(text) < n_ctx else text[-(n_ctx // 2) :]
    for _ in range(n):
        logits = plain_gpt2(flat, np.asarray([window]), config)[0, -1]
        logits = logits if noise is None else logits + noise(logits.shape)
        text.append(sample_with(sampling, logits, len(text), text, index))
        window = [*window, text[-1]] if len(window) + 1 < n_ctx else text[-(n_ctx // 2) :]
    return text[len(prompt) :]


def random_weights(config, seed=0, spread=1.5):
    """Return float64 weights by path. With these weights, mistakes in an implementation change the logits.

    Attention is far from uniform, no bias is 0 and no gain is 1. All weights are exact in bfloat16 and float16, too:
    each has eight significant bits, and none is subnormal in float16.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        x = rng.standard_normal(shape)
        if path.endswith("/w"):
            x *= spread / math.sqrt(shape[0])
        elif path.endswith("/g"):
            x = 1 + 0.3 * x
        elif path != "wpe":  # wpe stays larger, because otherwise a greedy text soon repeats one token
            x *= 0.5
        mantissa, exponent = np.frexp(x)
        x = np.ldexp(np.round(mantissa * 256), exponent - 8)
        return np.where(abs(x) < 2.0**-14, 0, x)

    return {path: draw(path, shape) for path, shape in pg.params.shapes(config).items()}


# Results of the shipped model, which tests/test_shipped.py computes with `plain_gpt2`: a prompt, options, the text.
SHAKESPEARE = [
    (
        "ROMEO.",
        {"max_new_tokens": 40, "temperature": 0.8, "seed": 7},
        "\nSo, to the king, that the religence here\nI have left a friend; yet not to know\n"
        "In election, by us and all of your grace,\n",
    ),
    ("ROMEO.", {"max_new_tokens": 24, "temperature": 0}, "\nI am not a man of man.\n\nMALVOLIO.\nI am not a man.\n"),
    (
        "To be, or not to be",
        {"max_new_tokens": 24, "top_k": None, "top_p": 0.9, "seed": 8},
        " wrong'd.\n\n[Enter CALE Messenger.]\n\nBut let our noble Glouces",
    ),
]

PASSAGE = """ROMEO.
But soft! What light through yonder window breaks?
It is the east, and Juliet is the sun.
"""
PERPLEXITY = 46.581532  # of the passage, by the shipped model


def in_dtype(flat, dtype):
    """Return the weights in a NumPy dtype."""
    return {path: a.astype(dtype) for path, a in flat.items()}


PLAIN = pg.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_vocab=101, n_ctx=48, eos_token_id=None)
CONFIGS = {
    "as published": PLAIN,
    # Each option that changes the computation has another value than in the published models.
    "every option": pg.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=24,
        n_vocab=64,
        n_ctx=40,
        n_inner=40,
        layer_norm_epsilon=0.02,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        eos_token_id=None,
    ),
    # The axis of the heads has length 1.
    "one head, unscaled": pg.GPT2Config(
        n_layer=1, n_head=1, n_embd=24, n_vocab=50, n_ctx=33, scale_attn_weights=False, eos_token_id=None
    ),
}


def some_tokens(config, batch=2, seq=None, seed=1):
    """Return random token ids [batch, seq]; seq is n_ctx unless given."""
    return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, seq or config.n_ctx)).astype(np.int32)


def truth_and_error(flat, tokens, config):
    """Return the logits in float64, and the largest error of the same formula in float32."""
    truth = plain_gpt2(flat, tokens, config)
    return truth, float(abs(plain_gpt2(in_dtype(flat, np.float32), tokens, config) - truth).max())


def yardstick(error, dtype):
    """Return the allowed error of logits in a dtype, given the largest error of the same formula in float32.

    A backend may err four times as much as plain NumPy. An error is proportional to the unit round-off. In float64, the
    truth itself is off by one such error.
    """
    return 4 * error * (U[dtype] / U["float32"]) * (1.25 if dtype == "float64" else 1)


def on_backend(backend, flat, dtype="float32", device=None):
    """Return the parameters as a tree of arrays on a backend."""
    return pg.params.nest({path: backend.from_numpy(a, dtype, device) for path, a in flat.items()})
