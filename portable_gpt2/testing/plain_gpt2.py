"""A second implementation of GPT-2, in plain NumPy without the package's ops. The tests compare with it.

Its result in float64 is the expected one. Its error in float32 is the unit in which a backend's error is measured.
"""

import math

import numpy as np

import portable_gpt2 as pg

U = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def plain_gpt2(flat, tokens, config):
    """Return the logits [batch, seq, n_vocab] in the dtype of the parameters. `flat` has the parameters by path."""

    def norm(x, scope):
        d = x - x.mean(-1, keepdims=True)
        variance = (d * d).mean(-1, keepdims=True)
        return flat[f"{scope}/g"] * d / np.sqrt(variance + config.layer_norm_epsilon) + flat[f"{scope}/b"]

    def linear(x, scope):
        return x @ flat[f"{scope}/w"] + flat[f"{scope}/b"]

    seq, width = tokens.shape[1], config.n_embd // config.n_head
    seen = np.tril(np.ones((seq, seq), bool))
    x = flat["wte"][tokens] + flat["wpe"][:seq]
    for i in range(config.n_layer):
        q, k, v = np.split(linear(norm(x, f"h{i}/ln_1"), f"h{i}/attn/c_attn"), 3, axis=-1)
        divisor = (math.sqrt(width) if config.scale_attn_weights else 1) * (
            i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )
        heads = []
        for columns in (slice(h * width, (h + 1) * width) for h in range(config.n_head)):
            scores = q[..., columns] @ np.swapaxes(k[..., columns], -1, -2) / divisor
            top = np.where(seen, scores.real, -np.inf).max(-1, keepdims=True)
            e = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)
            heads.append(e / e.sum(-1, keepdims=True) @ v[..., columns])
        x = x + linear(np.concatenate(heads, -1), f"h{i}/attn/c_proj")
        h = linear(norm(x, f"h{i}/ln_2"), f"h{i}/mlp/c_fc")
        h = h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h * h * h))) / 2
        x = x + linear(h, f"h{i}/mlp/c_proj")
    return norm(x, "ln_f") @ flat.get("lm_head", flat["wte"]).T


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


def in_dtype(flat, dtype):
    """Return the weights in a NumPy dtype."""
    return {path: a.astype(dtype) for path, a in flat.items()}


def truth_and_error(flat, tokens, config):
    """Return the logits in float64, and the largest error of the same formula in float32."""
    truth = plain_gpt2(flat, tokens, config)
    return truth, float(abs(plain_gpt2(in_dtype(flat, np.float32), tokens, config) - truth).max())


def on_backend(backend, flat, dtype="float32", device=None):
    """Return the parameters as a tree of arrays on a backend."""
    return pg.params.nest({path: backend.from_numpy(a, dtype, device) for path, a in flat.items()})
