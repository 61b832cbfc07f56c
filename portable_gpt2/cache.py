"""The cache of keys and values, which attention would otherwise compute again for every new token.

`KVCache` is a NamedTuple, and so a pytree in every framework: a compiled function can take and return a cache, and
reuse its memory. While new tokens are read, `open_layers` computes their positions and the mask, and gives attention
one `LayerCache` per layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import checks
from .backend import Backend
from .config import GPT2Config
from .params import Params, check_memory, check_params
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # as in ops.py
    from jaxtyping import Bool, Float, Int

    Array = Any


class KVCache(NamedTuple):
    """The keys and values of the tokens that were read. Each layer has one buffer of keys and one of values.

    Parameters
    ----------
    k, v : tuple of float arrays [batch, n_head, capacity, head_size]
        The buffers, one per layer.
    position : int or int array []
        The number of tokens that were read. The next token is written to the row of this number. Inside and after
        `jax.jit`, the position is an array.
    padding : int array [batch], optional
        How many of the first tokens of each text are padding.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> cache = pg.new_cache(pg.init_params(config, backend="numpy"), config)
    >>> cache.position, cache.k[0].shape
    (0, (1, 2, 4, 4))
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    position: Any = 0
    padding: Any = None

    def extended(self, layers: Sequence[LayerCache], n: Any) -> KVCache:
        """Return the cache after n tokens were written to its layers."""
        k, v = tuple([layer.k for layer in layers]), tuple([layer.v for layer in layers])
        return KVCache(k, v, self.position + n, self.padding)


class LayerCache(NamedTuple):
    """One layer's buffers while new tokens are read, and a mask of the keys that the tokens see.

    Without a cache the buffers are None, and `update` returns the new keys and values themselves.
    """

    k: Any  # [batch, n_head, capacity, head_size]
    v: Any
    start: Any  # the row of the first new token
    n_keys: int | None  # how many rows attention reads; None if it reads all
    mask: Any  # bool [..., seq, n_keys], or None
    causal: bool  # whether there is no mask, because each token sees its own key and all keys before it

    def update(
        self, k: Float[Array, "batch heads seq d"], v: Float[Array, "batch heads seq d"]
    ) -> tuple[Float[Array, "batch heads keys d"], Float[Array, "batch heads keys d"], LayerCache]:
        """Write the new keys and values; return the keys and values that attention reads, and the updated layer."""
        if self.k is None:
            return k, v, self
        _, _, start, n_keys, mask, causal = self
        backend = backend_of(k)
        k, v = backend.write(self.k, k, start), backend.write(self.v, v, start)
        return k[..., :n_keys, :], v[..., :n_keys, :], LayerCache(k, v, start, n_keys, mask, causal)


def open_layers(
    tokens: Int[Array, "batch seq"], n_layer: int, cache: KVCache | None
) -> tuple[Int[Array, "*batch seq"], list[LayerCache]]:
    """Return the position of each new token in its text, and the `LayerCache` of each layer.

    If the cache's position is an int, attention reads only the rows that are filled. If the position is an array, no
    shape can depend on it: attention reads all rows, and the mask hides those that are not filled.
    """
    backend = backend_of(tokens)
    seq = backend.shape(tokens)[1]
    k, v, start, padding = ((None,) * n_layer, (None,) * n_layer, 0, None) if cache is None else cache
    is_known = isinstance(start, int)
    n_keys = start + seq if is_known else backend.shape(k[0])[-2]
    rows = start + backend.arange(seq, like=tokens)
    start = start if is_known else rows[0]  # it has the dtype of indices now, so no layer has to convert it
    positions = positions_in_text(rows, padding)
    if not is_known:  # nobody has checked that the tokens fit: if they do not, `embed` returns NaN for positions of -1
        has_room = (start >= 0) & (start + seq <= n_keys)
        positions, start = backend.xp.where(has_room, positions, -1), backend.xp.where(has_room, start, 0)
    causal = is_known and padding is None  # the new tokens are the last keys
    mask = None if causal else visible_keys(rows, n_keys, padding)
    n_read = n_keys if is_known else None
    return positions, [LayerCache(k[i], v[i], start, n_read, mask, causal) for i in range(n_layer)]


def positions_in_text(rows: Int[Array, "seq"], padding: Int[Array, "batch"] | None) -> Int[Array, "*batch seq"]:
    """Return the position of each new token in its own text, which begins after the padding. Padding has position 0."""
    if padding is None:
        return rows
    xp = backend_of(rows).xp
    start = xp.astype(padding, rows.dtype)[:, None]
    return xp.where(rows[None, :] >= start, rows[None, :] - start, 0)


def visible_keys(
    rows: Int[Array, "seq"], n_keys: Any, padding: Int[Array, "batch"] | None
) -> Bool[Array, "seq keys"] | Bool[Array, "batch 1 seq keys"]:
    """Return a mask that is True for the keys that each new token sees.

    A token sees its own key and those of earlier tokens of its text. A padding token sees only itself.
    """
    backend = backend_of(rows)
    columns = backend.arange(n_keys, like=rows)
    causal = rows[:, None] >= columns[None, :]
    if padding is None:
        return causal
    start = backend.xp.astype(padding, rows.dtype)[:, None]
    itself = rows[:, None] == columns[None, :]
    mask = (causal[None, :, :] & (columns[None, :] >= start)[:, None, :]) | itself[None, :, :]
    return mask[:, None, :, :]


def new_cache(
    params: Params,
    config: GPT2Config,
    *,
    batch: int = 1,
    capacity: int | None = None,
    padding: Iterable[int] | None = None,
) -> KVCache:
    """Return an empty cache for `gpt2`, on the parameters' device and of their dtype.

    Parameters
    ----------
    params : dict
        The parameters of the model that the cache is for.
    config : GPT2Config
        The model's shape.
    batch : int
        The number of texts.
    capacity : int, optional
        The number of tokens per text that the cache has room for; n_ctx unless given.
    padding : ints, optional
        The number of padding tokens in front of each text, [batch], so that texts of different lengths end together.
        Any ids can serve as padding: no token of a text sees them.

    Returns
    -------
    KVCache
        An empty cache, at position 0.

    Raises
    ------
    ValueError
        If batch is not at least 1, capacity is not from 1 to n_ctx, or padding is not one int below capacity for each
        text; if the parameters belong to another model; or if the cache would take more memory than the machine has.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> params = pg.init_params(config, backend="numpy")
    >>> cache = pg.new_cache(params, config)
    >>> for token in [1, 2, 3]:
    ...     logits, cache = pg.gpt2(params, np.asarray([[token]]), config, cache)
    >>> logits.shape, cache.position
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
    backend, shape = backend_of(wte), (batch, config.n_head, capacity, config.head_size)

    def buffers() -> tuple[Any, ...]:
        return tuple(backend.zeros(shape, like=wte) for _ in range(config.n_layer))

    if padding is not None:
        padding = backend.from_numpy(np.asarray(padding, np.int32), device=backend.placement(wte))
    return KVCache(buffers(), buffers(), 0, padding)


def grow_cache(cache: KVCache, capacity: int) -> KVCache:
    """Return a cache with the same keys and values, and room for more tokens.

    Parameters
    ----------
    cache : KVCache
        A cache that `new_cache` or `gpt2` returned. Do not use it again.
    capacity : int
        The new number of tokens per text: at least the present one, and at most n_ctx, which `gpt2` checks.

    Returns
    -------
    KVCache

    Raises
    ------
    TypeError
        If cache is not a KVCache.
    ValueError
        If capacity is less than at present, or the cache's buffers differ in shape.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> cache = pg.new_cache(pg.init_params(config, backend="numpy"), config, capacity=2)
    >>> pg.grow_cache(cache, 4).k[0].shape
    (1, 2, 4, 4)
    """
    backend, buffers = _buffers(cache)
    buffer, shape = buffers[0], backend.shape(buffers[0])
    for other in buffers:
        if len(shape) != 4 or not _may_be_equal(backend.shape(other), shape):
            found = f"{list(shape)} and {list(backend.shape(other))}"
            raise ValueError(f"the cache has buffers of shapes {found}; expected a cache from new_cache")
    batch, n_head, held, d = shape
    capacity = checks.integer("capacity", capacity, held, note=f"the cache has room for {held} tokens already")
    if isinstance(batch, int):  # an unknown length, while tracing, is an array
        check_memory(len(buffers) * batch * n_head * capacity * d, buffer, f"a cache of {capacity:,} tokens")

    def grown(buffers: Iterable[Any]) -> tuple[Any, ...]:
        shape = (batch, n_head, capacity, d)
        return tuple([backend.write(backend.zeros(shape, like=buffer), buffer, 0) for buffer in buffers])

    return cache._replace(k=grown(cache.k), v=grown(cache.v))


# Checks. They read shapes and Python's ints, which are known while tracing too.


def check_cache(cache: KVCache, tokens: Any, params: Params, config: GPT2Config) -> KVCache:
    """Return the cache. If its position is NumPy's int, convert the position to Python's int.

    Refuse a cache that does not fit the tokens or the model, or that has no room for the tokens.
    """
    if isinstance(cache, KVCache) and isinstance(cache.position, np.integer):
        cache = cache._replace(position=int(cache.position))
    owner, buffers = _buffers(cache, config.n_layer)
    backend, dtype = backend_of(tokens), params["wte"].dtype
    if owner is not backend:
        raise TypeError(f"the cache is of {owner.name} and tokens are of {backend.name}; make a new cache")
    batch, seq = backend.shape(tokens)
    first = backend.shape(buffers[0])
    capacity = first[2] if len(first) == 4 else config.n_ctx  # another number of axes is refused below
    expected = (batch, config.n_head, capacity, config.head_size)
    for i, buffer in enumerate(buffers):
        if not _may_be_equal(shape := backend.shape(buffer), expected):
            raise ValueError(
                f"the cache of layer {i % config.n_layer} has shape {list(shape)}; tokens and config require "
                f"[batch, n_head, capacity, head_size] = {list(expected)}"
            )
        if buffer.dtype != dtype:
            raise TypeError(
                f"the cache of layer {i % config.n_layer} has dtype {buffer.dtype}; the parameters have {dtype}"
            )
    if cache.padding is not None:
        if not isinstance(cache.padding, backend.array_types):
            raise TypeError(
                f"the cache's padding is {checks.shown(cache.padding)}; expected an array of {backend.name}"
            )
        if not _may_be_equal(shape := backend.shape(cache.padding), (batch,)):
            raise ValueError(f"the cache's padding has shape {list(shape)}; {batch} texts were given")
    if isinstance(capacity, int) and capacity > config.n_ctx:
        raise ValueError(f"the cache has room for {capacity} tokens; the model has n_ctx = {config.n_ctx} positions")
    _check_position(backend, cache.position, seq, capacity, config)
    return cache


def _check_position(backend: Backend, position: Any, seq: Any, capacity: Any, config: GPT2Config) -> None:
    """Refuse a position that is negative or leaves no room for the tokens. A traced position is not checked."""
    is_array = isinstance(position, backend.array_types)
    if is_array:
        if backend.shape(position):
            raise ValueError(f"the cache's position has shape {list(backend.shape(position))}; expected one int")
        if not backend.xp.isdtype(position.dtype, "integral"):
            raise TypeError(f"the cache's position has dtype {position.dtype}; expected an int")
        if (value := backend.peek(position)) is None:
            return
        position = int(value)
    if not isinstance(position, int):
        raise TypeError(f"the cache's position is {checks.shown(position)}; expected an int")
    if position < 0 or isinstance(position, bool):
        raise ValueError(f"the cache's position is {position}; expected an int of at least 0")
    if isinstance(seq, int) and isinstance(capacity, int) and position + seq > capacity:
        raise ValueError(
            f"{seq} tokens were given at position {position}; the cache has room for {capacity} "
            f"(grow_cache makes room, up to n_ctx = {config.n_ctx})"
        )


def check_cache_size(params: Params, config: GPT2Config, batch: int, capacity: int) -> None:
    """Refuse a cache that would take more memory than the machine has."""
    n = 2 * config.n_layer * batch * capacity * config.n_embd
    check_memory(n, params["wte"], f"a cache of {batch:,} texts of {capacity:,} tokens")


def _buffers(cache: Any, n_layer: int | None = None) -> tuple[Backend, list[Any]]:
    """Return a cache's backend and buffers. Refuse an object that is not a cache, or not one of n_layer layers."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache is {checks.shown(cache)}; expected a cache from new_cache")
    k, v = cache.k, cache.v
    if not (isinstance(k, tuple) and isinstance(v, tuple) and len(k) == len(v) == (n_layer or len(k)) > 0):
        n_k, n_v = (f"{len(x)} arrays" if isinstance(x, tuple) else checks.shown(x) for x in (k, v))
        expected = "a cache from new_cache" if n_layer is None else f"a cache from new_cache for {n_layer} layers"
        raise ValueError(f"the cache has {n_k} for k and {n_v} for v; expected {expected}")
    buffers = [*k, *v]
    try:
        owners = list(map(backend_of, buffers))
    except TypeError as error:
        raise TypeError(f"the cache: {error}") from None
    for owner in owners:
        if owner is not owners[0]:
            raise TypeError(f"the cache has arrays of {owners[0].name} and of {owner.name}; make a new cache")
    return owners[0], buffers


def _may_be_equal(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Return whether two shapes are equal as far as they are known while tracing."""
    if len(shape) != len(expected):
        return False
    for m, n in zip(shape, expected, strict=True):
        if m is not n and isinstance(m, int) and isinstance(n, int) and m != n:
            return False
    return True
