"""Tokens from a model: prefill, then decode over cached keys and values, for a batch of texts.

If the backend compiles again for every new shape (`Backend.compiles_per_shape`), prompts are padded, and caches have
room for 64, 128, 256 ... tokens, so that a whole generation compiles only a few times. On other backends the cache has
its final size from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Backend
from ..cache import KVCache, grow_cache, new_cache
from ..config import GPT2Config
from ..model import head, transformer
from ..params import Params
from ..sampling import Sampling, sample_with

_SMALLEST = 64


@dataclass(eq=False)
class Generation:
    """A text that is being generated.

    Parameters
    ----------
    tokens : list of int
        The prompt, of at least one token, and the tokens that were generated after it.
    sampling : Sampling
        The sampling options.
    index : int
        The number of the sample among those of the same prompt.
    finished : bool
        Whether the text is complete. No more tokens are generated then.
    """

    tokens: list[int]
    sampling: Sampling
    index: int = 0
    finished: bool = False


class Decoder:
    """Computes the logits of the next token, and samples from them, for a batch of texts.

    Parameters
    ----------
    backend : Backend
        The backend of the parameters.
    params : dict
        The model's parameters.
    config : GPT2Config
        The model's shape.
    device : device
        The device of the parameters, as the framework's own object.
    """

    def __init__(self, backend: Backend, params: Params, config: GPT2Config, device: Any) -> None:
        self.backend, self.params, self.config, self.device = backend, params, config, device

        def step(params: Params, tokens: Any, last: Any, cache: KVCache) -> tuple[Any, KVCache | None]:
            """Return the logits [batch, 1, n_vocab] after the token at index `last`, an array [1], and the cache."""
            h, extended = transformer(params, tokens, config, cache)
            return head(params, backend.xp.take(h, last, axis=1)), extended

        self._step = backend.compile(step, params, donate=("cache",))

    def capacity(self, length: int, final: int) -> int:
        """Return the capacity, in tokens, of the cache of a text that now has `length` tokens and will have `final`."""
        return padded_length(length, self.config.n_ctx) if self.backend.compiles_per_shape else final

    def read(self, rows: Sequence[list[int]], cache: KVCache) -> tuple[np.ndarray, KVCache]:
        """Extend the cache by rows of equal length; return the logits [batch, n_vocab] after each row, on the host.

        Rows may be padded at the end: the mask hides the padding's keys until they are overwritten.
        """
        n, start = len(rows[0]), cache.position
        if n > 1 and self.backend.compiles_per_shape:
            room = self.backend.shape(cache.k[0])[-2] - start
            padding = [0] * (min(padded_length(n, self.config.n_ctx), room) - n)
            rows = [row + padding for row in rows]
        logits, extended = self._step(self._ints(rows), self._ints([n - 1]), cache)
        return self.backend.to_numpy(logits)[:, 0], extended._replace(position=start + n)

    def _ints(self, values: Any) -> Any:
        return self.backend.from_numpy(np.asarray(values, np.int32), device=self.device)

    def stream(self, generations: Sequence[Generation], max_new_tokens: int) -> Iterator[Generation]:
        """Append new tokens; yield a generation each time it has one more token.

        The caller marks a generation as finished. When a text fills n_ctx, its last n_ctx // 2 tokens are read again,
        and generation continues from these. Texts of different lengths must not reach that point, because the longest
        text would truncate the others.
        """
        n_ctx = self.config.n_ctx
        while max_new_tokens > 0 and not all(generation.finished for generation in generations):
            length = max(len(generation.tokens) for generation in generations)
            n_read = length if length < n_ctx else n_ctx // 2
            n_new = min(max_new_tokens, n_ctx - n_read)
            yield from self._stream_window(generations, n_read, n_read + n_new)
            max_new_tokens -= n_new

    def _stream_window(self, generations: Sequence[Generation], n_read: int, final: int) -> Iterator[Generation]:
        """Read the last n_read tokens of each text, and generate until the longest has its final length."""
        unread = [generation.tokens[-n_read:] for generation in generations]
        padding = [n_read - len(tokens) for tokens in unread]
        unread = [[0] * n + tokens for n, tokens in zip(padding, unread, strict=True)]
        capacity = self.capacity(n_read, final)
        ragged = padding if any(padding) else None
        cache = new_cache(self.params, self.config, batch=len(generations), capacity=capacity, padding=ragged)
        for length in range(n_read, final):
            if length > capacity:
                capacity = self.capacity(length, final)
                cache = grow_cache(cache, capacity)
            logits, cache = self.read(unread, cache)
            for generation, row in zip(generations, logits, strict=True):
                if not generation.finished:
                    seen = generation.tokens
                    seen.append(sample_with(generation.sampling, row, len(seen), seen, generation.index))
                    yield generation
            if all(generation.finished for generation in generations):
                return
            unread = [generation.tokens[-1:] for generation in generations]


def padded_length(n: int, n_ctx: int) -> int:
    """Return the smallest of 64, 128, 256 ... that is at least n, but at most n_ctx."""
    return min(max(_SMALLEST, 1 << (n - 1).bit_length()), n_ctx)
