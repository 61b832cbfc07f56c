"""GPT-2 as pure functions of parameters and arrays, in order of dependency.

Parameters are a nested dict, and each function takes its own sub-tree: ``mlp(x, **params["h0"]["mlp"])``. Attention
reads and extends a `KVCache`. A function that takes `observe` passes the result of each op through it, such as
``observe("ln_1", x)``, which returns x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import checks
from .cache import KVCache, LayerCache, check_cache, open_layers
from .config import GPT2Config
from .divided import WHOLE, Split, project, shared
from .divided import cross_entropy as divided_cross_entropy
from .divided import embed as divided_embed
from .ops import (
    add,
    attention,
    attention_scores,
    attention_weights,
    conv1d,
    embed,
    gelu,
    is_empty,
    layer_norm,
    unembed,
)
from .params import Params, check_config, check_params, place
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # as in ops.py
    from jaxtyping import Float, Int

    Array = Any

Observe = Callable[[str, Any], Any]


def ignore(name: str, x: Any) -> Any:
    """Observe nothing, and return x: the default of `observe`."""
    return x


def scoped(observe: Observe, scope: str = "") -> Observe:
    """Return an observer that puts a scope in front of each name, and returns the array that it was given."""
    if observe is ignore:
        return ignore

    def observed(name: str, x: Any) -> Any:
        observe(f"{scope}{name}", x)
        return x

    return observed


_IN_A_LAYER = (
    "ln_1",
    *(f"attn/{name}" for name in ("c_attn", "q", "k", "v", "scores", "weights", "attention", "c_proj", "residual")),
    "ln_2",
    *(f"mlp/{name}" for name in ("c_fc", "gelu", "c_proj")),
    "residual",
)


def observed_names(config: GPT2Config) -> list[str]:
    """Return the names of all results that `gpt2` observes, in the order of computation.

    Examples
    --------
    >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> observed_names(config)[:4]
    ['embedding', 'h0/ln_1', 'h0/attn/c_attn', 'h0/attn/q']
    """
    layers = [f"h{i}/{name}" for i in range(config.n_layer) for name in _IN_A_LAYER]
    return ["embedding", *layers, "ln_f", "logits"]


def split_heads(x: Float[Array, "batch seq n"], n_head: int) -> Float[Array, "batch heads seq d"]:
    """Split the last axis into heads, and move them in front of the sequence."""
    backend = backend_of(x)
    batch, seq, n = backend.shape(x)
    return backend.xp.permute_dims(backend.xp.reshape(x, (batch, seq, n_head, n // n_head)), (0, 2, 1, 3))


def merge_heads(x: Float[Array, "batch heads seq d"]) -> Float[Array, "batch seq n"]:
    """Undo `split_heads`."""
    backend = backend_of(x)
    batch, n_head, seq, d = backend.shape(x)
    return backend.xp.reshape(backend.xp.permute_dims(x, (0, 2, 1, 3)), (batch, seq, n_head * d))


def attn(
    x: Float[Array, "batch seq n"],
    c_attn: Params,
    c_proj: Params,
    *,
    n_head: int,
    scale: float,
    layer: LayerCache,
    observe: Observe = ignore,
    split: Split = WHOLE,
) -> tuple[Float[Array, "batch seq n"], LayerCache]:
    """Causal multi-head self-attention over cached and new keys, with all heads or with those of one device."""
    c = observe("c_attn", conv1d(shared(x, split), **c_attn))
    # Split q, k and v before reshaping into heads, because a sharded axis could not be split afterwards.
    q, k, v = (split_heads(part, n_head // split.n) for part in backend_of(c).split(c, 3))
    k, v, layer = layer.update(k, v)
    q, k, v = observe("q", q), observe("k", k), observe("v", v)
    # Kernels return neither scores nor weights. Observing must not change a result, so they are computed separately.
    if observe is not ignore:
        observe("scores", attention_scores(q, k, mask=layer.mask, causal=layer.causal, scale=scale))
        observe("weights", attention_weights(q, k, mask=layer.mask, causal=layer.causal, scale=scale))
    a = observe("attention", attention(q, k, v, mask=layer.mask, causal=layer.causal, scale=scale))
    return observe("c_proj", project(merge_heads(a), c_proj, split)), layer


def mlp(
    x: Float[Array, "batch seq n"], c_fc: Params, c_proj: Params, *, observe: Observe = ignore, split: Split = WHOLE
) -> Float[Array, "batch seq n"]:
    """Feed-forward network: expand to n_hidden, GELU, project back."""
    h = observe("gelu", gelu(observe("c_fc", conv1d(shared(x, split), **c_fc))))
    return observe("c_proj", project(h, c_proj, split))


def block(
    x: Float[Array, "batch seq n"],
    params: Params,
    *,
    n_head: int,
    scale: float,
    eps: float,
    layer: LayerCache,
    observe: Observe = ignore,
    split: Split = WHOLE,
) -> tuple[Float[Array, "batch seq n"], LayerCache]:
    """Pre-norm transformer block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""
    h = observe("ln_1", layer_norm(x, **params["ln_1"], eps=eps))
    options: dict[str, Any] = {"observe": scoped(observe, "attn/"), "split": split}
    a, layer = attn(h, **params["attn"], n_head=n_head, scale=scale, layer=layer, **options)
    x = observe("attn/residual", add(x, a))
    h = observe("ln_2", layer_norm(x, **params["ln_2"], eps=eps))
    return observe("residual", add(x, mlp(h, **params["mlp"], observe=scoped(observe, "mlp/"), split=split))), layer


def transformer(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: GPT2Config,
    cache: KVCache | None = None,
    observe: Observe = ignore,
    split: Split = WHOLE,
) -> tuple[Float[Array, "batch seq n"], KVCache | None]:
    """Return the last hidden states, from which `gpt2` computes the logits, and the extended cache.

    If the model is divided, the parameters and the cache are those of one device, and are not checked.
    """
    if split.n > 1:
        return _transformer(params, tokens, config, cache, scoped(observe), split)
    check_inputs(params, tokens, config)
    cache = None if cache is None else check_cache(cache, tokens, params, config)
    try:
        return _transformer(params, tokens, config, cache, scoped(observe), split)
    except Exception:  # raise a clearer error if the parameters are wrong, or devices differ
        check_params(params, config)
        check_places(params=params["wte"], tokens=tokens, cache=None if cache is None else cache.k[0])
        raise


def _transformer(
    params: Params, tokens: Any, config: GPT2Config, cache: KVCache | None, observe: Observe, split: Split
) -> tuple[Any, KVCache | None]:
    eps = config.layer_norm_epsilon
    positions, layers = open_layers(tokens, config.n_layer, cache)
    x = observe("embedding", add(divided_embed(tokens, params["wte"], split), embed(positions, params["wpe"])))
    for i in range(config.n_layer):
        x, layers[i] = block(
            x,
            params[f"h{i}"],
            n_head=config.n_head,
            scale=config.attention_scale(i),
            eps=eps,
            layer=layers[i],
            observe=scoped(observe, f"h{i}/"),
            split=split,
        )
    x = observe("ln_f", layer_norm(x, **params["ln_f"], eps=eps))
    return x, None if cache is None else cache.extended(layers, backend_of(tokens).shape(tokens)[1])


def head(params: Params, h: Float[Array, "batch seq n"], split: Split = WHOLE) -> Float[Array, "batch seq vocab"]:
    """Return the logits of hidden states: their products with lm_head, or with wte if the config ties the two.

    If the model is divided, they are the logits of this device's rows.
    """
    return unembed(shared(h, split), params.get("lm_head", params["wte"]))


def gpt2(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: GPT2Config,
    cache: KVCache | None = None,
    observe: Observe = ignore,
) -> tuple[
    Float[Array, "batch seq vocab"], KVCache | Any
]:  # the result is None only without a cache; because of Any, callers with a cache need no type check
    """Compute the logits of the token that follows each token.

    Parameters
    ----------
    params : dict
        The parameters, such as ``init_params(config)`` or ``GPT2.load(...).params``.
    tokens : int array [batch, seq]
        Token ids from 0 to n_vocab - 1, an array of the parameters' framework on their device. The ids are not
        checked; `GPT2.logits` checks them.
    config : GPT2Config
        The model's shape. Under ``jax.jit``, it must be a static argument.
    cache : KVCache, optional
        An empty cache from `new_cache`, or the cache that was returned for the preceding tokens of the same texts.
    observe : callable, optional
        Called as ``observe(name, array)`` with the result of each op, in the order of computation; `GPT2.trace` lists
        the names. In a compiled function the arrays are tracers.

    Returns
    -------
    logits : float array [batch, seq, n_vocab]
    cache : KVCache or None
        The cache extended by these tokens; None if no cache was given. Do not use the given cache again: its buffers
        may have been overwritten.

    Raises
    ------
    TypeError
        If tokens and parameters belong to different frameworks, or tokens are not integers.
    ValueError
        If there are more tokens than n_ctx, or than the cache has room for. If the cache's position is traced, and so
        not known, the logits are NaN instead.

    Notes
    -----
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; ``model`` of OpenAI's
    ``src/model.py``.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> params = pg.init_params(config, backend="numpy")
    >>> logits, _ = pg.gpt2(params, np.asarray([[1, 2, 3]]), config)
    >>> logits.shape
    (1, 3, 16)
    """
    h, cache = transformer(params, tokens, config, cache, observe)
    logits = head(params, h)
    observe("logits", logits)
    return logits, cache


def loss(params: Params, tokens: Int[Array, "batch seq"], config: GPT2Config, split: Split = WHOLE) -> Float[Array, ""]:
    """Return the mean cross-entropy, in nats, of each token but the first, given the tokens before it.

    Parameters
    ----------
    params : dict
        The parameters, such as ``init_params(config)``.
    tokens : int array [batch, seq]
        At most n_ctx + 1 tokens per text. All tokens but the last are read, and all but the first are predicted.
    config : GPT2Config
        The model's shape.
    split : Split
        How the model is divided over devices; unless given, it is not. Then the parameters are those of one device.

    Returns
    -------
    float array []
        The dtype is float64 if the parameters have it, and otherwise float32, to which 16-bit logits are converted
        first.

    Raises
    ------
    TypeError, ValueError
        As for `gpt2`.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> params = pg.init_params(config, backend="numpy")
    >>> round(float(pg.loss(params, np.asarray([[1, 2, 3, 4, 5]]), config)), 2)  # near log 16
    2.77
    """
    if split.n == 1:
        check_inputs(params, tokens, config, targets=1)
    backend = backend_of(tokens)
    h, _ = transformer(params, tokens[:, :-1], config, split=split)
    logits = head(params, h, split)
    if backend.dtype_names[logits.dtype] in ("bfloat16", "float16"):
        logits = backend.xp.astype(logits, backend.xp.float32)
    return divided_cross_entropy(logits, tokens[:, 1:], split)


# Checks. They read shapes and Python's ints, which are known while tracing too.


def check_inputs(params: Params, tokens: Any, config: GPT2Config, targets: int = 0) -> None:
    """Refuse tokens that the model cannot read, and parameters whose number or embeddings do not fit the config.

    `targets` is the number of tokens at the end of each text that are predicted and not read: 1 for a loss.
    """
    check_config(config)
    backend = backend_of(tokens)
    shape = backend.shape(tokens)
    if len(shape) != 2 or is_empty(tokens):
        raise ValueError(f"tokens have shape {list(shape)}; expected int [batch, seq]; no dimension may be 0")
    if isinstance(seq := shape[1], int):
        if seq <= targets:
            raise ValueError("a window has one token, and nothing to predict; expected int [batch, seq + 1]")
        checks.positions(seq - targets, config.n_ctx)
    n_scopes = 3 + config.n_layer + (not config.tie_word_embeddings)  # 3 for wpe, wte and ln_f
    if not isinstance(params, Mapping) or len(params) != n_scopes or not {"wpe", "wte"} <= params.keys():
        check_params(params, config)
    for table, length in ((params["wpe"], config.n_ctx), (params["wte"], config.n_vocab)):
        if backend_of(table).shape(table) != (length, config.n_embd):
            check_params(params, config)


def check_places(**arrays: Any) -> None:
    """Refuse arrays that live on different devices. While tracing, devices are not known, and nothing is refused."""
    places = {name: place(x) for name, x in arrays.items() if x is not None}
    known = {name: where for name, where in places.items() if where is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{name} on {where}" for name, where in known.items())
        raise ValueError(f"the arrays live on different devices: {found}; put them on one")
