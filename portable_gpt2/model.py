"""GPT-2 out of the ops: pure functions of parameters and arrays, in order of dependency.

Parameters are a nested dict (`params`), a sub-tree of which is splatted into the function that uses it. The cache of
keys and values is a dict too: ``{"position": 5, "h0": {"k": ..., "v": ...}, ...}``.

Where a function takes `observe`, it calls it with the scope path and the array of what it computes on the way, such as
``observe("h3/attn/weights", weights)``; what is not observed costs nothing.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks
from .backend import Backend
from .config import GPT2Config
from .ops import attention, attention_weights, conv1d, cross_entropy, embed, gelu, layer_norm, unembed
from .params import Params, check_config, check_memory, check_params, place
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # as in ops.py
    from jaxtyping import Bool, Float, Int

    Array = Any

Cache = dict[str, Any]
Observe = Callable[[str, Any], None]


def split_heads(x: Float[Array, "batch seq n"], n_head: int) -> Float[Array, "batch heads seq d"]:
    """Cut the last axis into heads and put them before the sequence."""
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
    mask: Bool[Array, "*#batch seq keys"] | None,
    keys: Any,
    position: Any = 0,
    cache: Cache | None = None,
    observe: Observe | None = None,
) -> tuple[Float[Array, "batch seq n"], Cache | None]:
    """Let every position look at itself and at those before it, the cached ones included."""
    backend = backend_of(x)
    # Cut before reshaping into heads: an axis that is sharded could not be cut afterwards.
    q, k, v = (split_heads(c, n_head) for c in backend.split(conv1d(x, **c_attn), 3))
    if cache is not None:
        cache = {"k": backend.write(cache["k"], k, position), "v": backend.write(cache["v"], v, position)}
        k, v = cache["k"][..., :keys, :], cache["v"][..., :keys, :]
    if observe is not None:  # beside attention itself, of which a kernel makes no weights and observing changes nothing
        observe("attn/weights", attention_weights(q, k, mask=mask, scale=scale))
    a = attention(q, k, v, mask=mask, scale=scale)
    return conv1d(merge_heads(a), **c_proj), cache


def mlp(x: Float[Array, "batch seq n"], c_fc: Params, c_proj: Params) -> Float[Array, "batch seq n"]:
    """Widen, bend, narrow."""
    return conv1d(gelu(conv1d(x, **c_fc)), **c_proj)


def block(
    x: Float[Array, "batch seq n"], params: Params, *, eps: float, **attn_options: Any
) -> tuple[Float[Array, "batch seq n"], Cache | None]:
    """Add to the residual stream what attention says of it, then what the mlp does."""
    a, cache = attn(layer_norm(x, **params["ln_1"], eps=eps), **params["attn"], **attn_options)
    x = x + a
    return x + mlp(layer_norm(x, **params["ln_2"], eps=eps), **params["mlp"]), cache


def _at(scope: str, observe: Observe | None) -> Observe | None:
    return None if observe is None else lambda name, x: observe(f"{scope}/{name}", x)


def transformer(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: GPT2Config,
    cache: Cache | None = None,
    observe: Observe | None = None,
) -> tuple[Float[Array, "batch seq n"], Cache | None]:
    """Return the last hidden states, [batch, seq, n_embd]: `gpt2` without the logits' product."""
    check_inputs(params, tokens, config)
    position, keys = (0, None) if cache is None else check_cache(cache, tokens, params, config)
    try:
        return _transformer(params, tokens, config, cache, position, keys, observe)
    except Exception:  # say what is wrong, if it is the parameters, or where arrays live
        check_params(params, config)
        check_places(params=params["wte"], tokens=tokens, cache=None if cache is None else cache["h0"]["k"])
        raise


def _transformer(
    params: Params,
    tokens: Any,
    config: GPT2Config,
    cache: Cache | None,
    position: Any,
    keys: Any,
    observe: Observe | None,
) -> tuple[Any, Cache | None]:
    backend = backend_of(tokens)
    xp = backend.xp
    _, seq = backend.shape(tokens)
    keys = seq if keys is None else keys
    positions = position + backend.arange(seq, like=tokens)
    columns = backend.arange(keys, like=tokens)
    padding = None if cache is None else cache.get("padding")
    grown: Cache = {"position": position + seq}
    if padding is not None:
        grown["padding"] = padding
        positions, mask = _behind_padding(positions, columns, padding)
    elif isinstance(position, int) and isinstance(seq, int) and seq == 1:
        mask = None  # one token sees all that is read
    else:
        mask = positions[:, None] >= columns[None, :]
    p = embed(positions, params["wpe"])
    if not isinstance(position, int) and backend.recompiles:  # without room, `write` would go to another row or nowhere
        p = xp.where(position + seq <= keys, p, math.nan)
    x = embed(tokens, params["wte"]) + p
    if observe is not None:
        observe("embedding", x)
    for i in range(config.n_layer):
        x, grown[f"h{i}"] = block(
            x,
            params[f"h{i}"],
            eps=config.layer_norm_epsilon,
            n_head=config.n_head,
            scale=config.attention_scale(i),
            mask=mask,
            keys=keys,
            position=position,
            cache=None if cache is None else cache[f"h{i}"],
            observe=_at(f"h{i}", observe),
        )
        if observe is not None:
            observe(f"h{i}/residual", x)
    x = layer_norm(x, **params["ln_f"], eps=config.layer_norm_epsilon)
    if observe is not None:
        observe("ln_f", x)
    return x, None if cache is None else grown


def output_table(params: Params) -> Float[Array, "vocab n"]:
    """Return what the logits are products with: lm_head, or wte where the two are tied."""
    return params.get("lm_head", params["wte"])


def _behind_padding(
    positions: Int[Array, "seq"], columns: Int[Array, "keys"], padding: Int[Array, "batch"]
) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch 1 seq keys"]]:
    """Return each text's own positions, and a mask that hides its padding; what is padding sees itself as well."""
    xp = backend_of(positions).xp
    start = xp.astype(padding, positions.dtype)[:, None]
    before, itself = positions[:, None] >= columns[None, :], positions[:, None] == columns[None, :]
    mask = (before[None, :, :] & (columns[None, :] >= start)[:, None, :]) | itself[None, :, :]
    return xp.where(positions[None, :] >= start, positions[None, :] - start, 0), mask[:, None, :, :]


def gpt2(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: GPT2Config,
    cache: Cache | None = None,
    observe: Observe | None = None,
) -> tuple[
    Float[Array, "batch seq vocab"], Cache | Any
]:  # None if none was given, which whoever gave one need not check
    """Compute the logits of the token that follows each token.

    Parameters
    ----------
    params : dict
        As `init_params` makes them, or ``GPT2.load(...).params``.
    tokens : int array [batch, seq]
        Token ids from 0 to n_vocab - 1, of the parameters' framework, on their device. They are trusted: ids from
        outside are for `GPT2.logits`, which checks them.
    config : GPT2Config
        The model's shape; static under ``jax.jit``.
    cache : dict, optional
        As `new_cache` makes it, or the one returned with earlier tokens of the same texts.
    observe : callable, optional
        Called as ``observe(name, array)`` with what is computed on the way: ``embedding``, [batch, seq, n_embd]; for
        each layer ``h3/attn/weights``, [batch, n_head, seq, keys], and ``h3/residual``, the stream that leaves it,
        [batch, seq, n_embd]; ``ln_f``; ``logits``. Under a compiler they are tracers.

    Returns
    -------
    logits : float array [batch, seq, n_vocab]
    cache : dict or None
        The cache extended by these tokens; None if none was given. The one that was given may have been overwritten:
        do not use it again.

    Raises
    ------
    TypeError
        If tokens and parameters belong to different frameworks, or tokens are not integers.
    ValueError
        If the text is longer than n_ctx or than the cache. A position that is not known while tracing is not checked.

    Notes
    -----
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; ``model`` of OpenAI's
    ``src/model.py``. A cache whose position is an int is read as far as it is filled; where the position is traced,
    all of it is, with the rest masked.

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
    logits = unembed(h, output_table(params))
    if observe is not None:
        observe("logits", logits)
    return logits, cache


def loss(params: Params, tokens: Int[Array, "batch seq"], config: GPT2Config) -> Float[Array, ""]:
    """Return the mean cross-entropy, in nats, of each token after the first given those before it.

    Parameters
    ----------
    params : dict
        As `init_params` makes them.
    tokens : int array [batch, seq]
        Of at most n_ctx + 1 tokens: all but the last are read, all but the first are predicted.
    config : GPT2Config
        The model's shape.

    Returns
    -------
    float array []
        In float32 at least: logits of 16 bits are widened first.

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
    check_inputs(params, tokens, config, targets=1)
    backend = backend_of(tokens)
    logits, _ = gpt2(params, tokens[:, :-1], config)
    if backend.dtype_name(logits) in ("bfloat16", "float16"):
        logits = backend.xp.astype(logits, backend.xp.float32)
    return cross_entropy(logits, tokens[:, 1:])


def new_cache(
    params: Params,
    config: GPT2Config,
    *,
    batch: int = 1,
    capacity: int | None = None,
    padding: Iterable[int] | None = None,
) -> Cache:
    """Return an empty cache for `gpt2`, on the parameters' device and of their dtype.

    Parameters
    ----------
    params : dict
        The parameters that it will be used with.
    config : GPT2Config
        The model's shape.
    batch : int
        How many texts it holds.
    capacity : int, optional
        How many tokens of each; n_ctx unless given.
    padding : ints, optional
        How many tokens before each text, [batch], are padding, where texts of several lengths are to end together: any
        ids, which no token of the text will see.

    Returns
    -------
    dict
        ``position`` (0), ``padding`` if it was given and, for each layer, ``k`` and ``v``: [batch, n_head, capacity,
        head_size].

    Raises
    ------
    ValueError
        If batch is not at least 1, capacity not from 1 to n_ctx, or padding not one int below capacity for each text;
        if the parameters are those of another model; or if the cache would take more memory than the machine has.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> params = pg.init_params(config, backend="numpy")
    >>> cache = pg.new_cache(params, config)
    >>> for token in [1, 2, 3]:
    ...     logits, cache = pg.gpt2(params, np.asarray([[token]]), config, cache)
    >>> logits.shape, cache["position"]
    ((1, 1, 16), 3)
    """
    check_params(params, config)
    batch = checks.integer("batch", batch, 1)
    capacity = config.n_ctx if capacity is None else checks.integer("capacity", capacity, 1, config.n_ctx, note="n_ctx")
    if padding is not None:
        padding = [
            checks.integer("padding", n, 0, capacity - 1, note="for each text")
            for n in checks.several("padding", padding, "an int for each text")
        ]
        if len(padding) != batch:
            raise ValueError(f"padding is {checks.shown(padding)}; expected {batch} ints, one for each text")
    check_cache_size(params, config, batch, capacity)
    wte = params["wte"]
    backend = backend_of(wte)
    zeros, shape = backend.zeros, (batch, config.n_head, capacity, config.head_size)
    cache = {f"h{i}": {"k": zeros(shape, like=wte), "v": zeros(shape, like=wte)} for i in range(config.n_layer)}
    if padding is not None:
        cache["padding"] = backend.from_numpy(np.asarray(padding, np.int32), device=backend.placement(wte))
    return {"position": 0, **cache}


def grow_cache(cache: Cache, capacity: int) -> Cache:
    """Return a cache with room for more tokens, and what it holds.

    Parameters
    ----------
    cache : dict
        As `new_cache` makes it, or `gpt2` returns it. Do not use it again.
    capacity : int
        How many tokens of each text there is to be room for: at least as many as the cache has, and at most n_ctx,
        which `gpt2` checks.

    Returns
    -------
    dict

    Raises
    ------
    TypeError
        If the cache is not one.
    ValueError
        If capacity is less than the cache has, or the cache's buffers differ in shape.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> cache = pg.new_cache(pg.init_params(config, backend="numpy"), config, capacity=2)
    >>> pg.grow_cache(cache, 4)["h0"]["k"].shape
    (1, 2, 4, 4)
    """
    backend, buffers = _buffers(cache)
    buffer, shape = buffers[0], backend.shape(buffers[0])
    for other in buffers:
        if len(shape) != 4 or not _may_be_equal(backend.shape(other), shape):
            found = f"{list(shape)} and {list(backend.shape(other))}"
            raise ValueError(f"the cache has buffers of shapes {found}; expected one of new_cache")
    batch, n_head, held, d = shape
    capacity = checks.integer("capacity", capacity, held, note=f"the cache has room for {held} tokens already")
    if isinstance(batch, int):  # else it is not known while tracing
        check_memory(len(buffers) * batch * n_head * capacity * d, buffer, f"a cache of {capacity:,} tokens")

    def grow(buffer: Any) -> Any:
        return backend.write(backend.zeros((batch, n_head, capacity, d), like=buffer), buffer, 0)

    return {
        name: {key: grow(buffer) for key, buffer in value.items()} if isinstance(value, dict) else value
        for name, value in cache.items()
    }


# What the model is given. These checks read shapes and Python's ints, which are known while tracing too.


def check_inputs(params: Params, tokens: Any, config: GPT2Config, targets: int = 0) -> None:
    """Refuse tokens that the model cannot read, and parameters that are plainly those of another model.

    `targets` is 1 where the last token is only predicted.
    """
    check_config(config)
    backend = backend_of(tokens)
    shape = backend.shape(tokens)
    if len(shape) != 2 or backend.is_empty(tokens):
        raise ValueError(f"tokens have shape {list(shape)}; expected int [batch, seq]; no dimension may be 0")
    if isinstance(seq := shape[1], int):
        if seq <= targets:
            raise ValueError("a window has one token, and nothing to predict; expected int [batch, seq + 1]")
        checks.check_length(seq - targets, config)
    n_scopes = 3 + config.n_layer + (not config.tie_word_embeddings)  # wpe, wte and ln_f
    if not isinstance(params, Mapping) or len(params) != n_scopes or not {"wpe", "wte"} <= params.keys():
        check_params(params, config)
    for table, length in ((params["wpe"], config.n_ctx), (params["wte"], config.n_vocab)):
        if backend_of(table).shape(table) != (length, config.n_embd):
            check_params(params, config)


def check_cache(cache: Cache, tokens: Any, params: Params, config: GPT2Config) -> tuple[Any, Any]:
    """Return a cache's position and how many keys there are to look at; refuse a cache that does not fit, or is full.

    A position that is traced is not known here: all keys are looked at then.
    """
    owner, buffers = _buffers(cache, config.n_layer)
    backend, dtype = backend_of(tokens), params["wte"].dtype
    if owner is not backend:
        raise TypeError(f"the cache is of {owner.name} and tokens are of {backend.name}; make one of this model")
    batch, seq = backend.shape(tokens)
    capacity = backend.shape(buffers[0])[-2]
    expected = (batch, config.n_head, capacity, config.head_size)
    fits = _may_be_equal if backend.recompiles else operator.eq
    for i, buffer in enumerate(buffers):
        if not fits(shape := backend.shape(buffer), expected):
            raise ValueError(
                f"the cache of layer {i // 2} has shape {list(shape)}; tokens and config make it "
                f"[batch, n_head, capacity, head_size] = {list(expected)}"
            )
        if buffer.dtype != dtype:
            raise TypeError(f"the cache of layer {i // 2} has dtype {buffer.dtype}; the parameters have {dtype}")
    padding: Any = cache.get("padding")
    if padding is not None:
        if not isinstance(padding, backend.array_types):
            raise TypeError(f"the cache's padding is {checks.shown(padding)}; expected an array of {backend.name}")
        if not fits(shape := backend.shape(padding), (batch,)):
            raise ValueError(f"the cache's padding has shape {list(shape)}; {batch} texts were given")
    if isinstance(capacity, int) and capacity > config.n_ctx:
        raise ValueError(f"the cache has room for {capacity} tokens; the model has n_ctx = {config.n_ctx} positions")
    position: Any = cache["position"]
    position = int(position) if isinstance(position, np.integer) else position
    is_array = isinstance(position, backend.array_types)
    if is_array:
        if backend.shape(position):
            raise ValueError(f"the cache's position has shape {list(backend.shape(position))}; expected one int")
        if not backend.xp.isdtype(position.dtype, "integral"):
            raise TypeError(f"the cache's position has dtype {position.dtype}; expected an int")
        if (span := backend.span(position)) is not None:
            _check_room(span[0], seq, capacity, config)
        return position, capacity  # the shape of what is read cannot depend on it
    if not isinstance(position, int):
        raise TypeError(f"the cache's position is {checks.shown(position)}; expected an int")
    _check_room(position, seq, capacity, config)
    return position, position + seq


def _check_room(position: int, seq: Any, capacity: Any, config: GPT2Config) -> None:
    """Refuse tokens that would stand before the cache's first place, or after its last, as far as that is known."""
    if position < 0 or isinstance(position, bool):
        raise ValueError(f"the cache's position is {position}; expected an int of at least 0")
    if isinstance(seq, int) and isinstance(capacity, int) and position + seq > capacity:
        raise ValueError(
            f"{seq} tokens were given at position {position}; the cache has room for {capacity} "
            f"(grow_cache makes room, up to n_ctx = {config.n_ctx})"
        )


def check_places(**arrays: Any) -> None:
    """Refuse arrays that live on different devices, as far as that is known: not while tracing."""
    places = {name: place(x) for name, x in arrays.items() if x is not None}
    known = {name: where for name, where in places.items() if where is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{name} on {where}" for name, where in known.items())
        raise ValueError(f"the arrays live on different devices: {found}; put them on one")


def _buffers(cache: Any, n_layer: int | None = None) -> tuple[Backend, list[Any]]:
    """Return a cache's backend and its buffers, k and v of each layer; refuse what is not a cache of so many layers."""
    if not isinstance(cache, Mapping):
        raise TypeError(f"cache is {checks.shown(cache)}; expected one of new_cache")
    n_layer = sum(name not in ("position", "padding") for name in cache) if n_layer is None else n_layer
    try:
        _ = cache["position"]
        buffers = [cache[f"h{i}"][name] for i in range(n_layer) for name in ("k", "v")]
    except (KeyError, TypeError, IndexError):
        buffers = []
    if len(cache) != 1 + n_layer + ("padding" in cache) or not buffers:
        raise ValueError(
            f"the cache holds {checks.shown(sorted(map(str, cache)))}; expected one of new_cache for {n_layer} layers"
        )
    try:
        owners = list(map(backend_of, buffers))
    except TypeError as error:
        raise TypeError(f"the cache: {error}") from None
    for owner in owners:
        if owner is not owners[0]:
            raise TypeError(f"the cache has arrays of {owners[0].name} and of {owner.name}; make one of this model")
    return owners[0], buffers


def _may_be_equal(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Return whether two shapes are equal as far as they are known while tracing."""
    return len(shape) == len(expected) and all(
        m == n for m, n in zip(shape, expected, strict=True) if isinstance(m, int) and isinstance(n, int)
    )


def check_cache_size(params: Params, config: GPT2Config, batch: int, capacity: int) -> None:
    """Refuse a cache that would take more memory than the machine has."""
    n = 2 * config.n_layer * batch * capacity * config.n_embd
    check_memory(n, params["wte"], f"a cache of {batch:,} texts of {capacity:,} tokens")
