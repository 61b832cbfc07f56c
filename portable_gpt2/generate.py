"""Token after token: prefill, then decode over cached keys and values.

Where a new shape costs a compilation (`Backend.recompiles`), prompts are padded and caches sized to 64, 128, 256 ... so
that a whole generation compiles a handful of times; elsewhere the cache is allocated once, at its final size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .backend import Backend
from .config import GPT2Config
from .model import Cache, grow_cache, new_cache, output_table, transformer
from .ops import unembed
from .params import Params
from .sampling import sample

_SMALLEST = 64


class Decoder:
    """A model made ready to produce one row of logits at a time.

    Parameters
    ----------
    backend : Backend
        The backend of the parameters.
    params : dict
        The model's parameters.
    config : GPT2Config
        The model's shape.
    device : device
        Where the parameters live, as the framework's own object.
    """

    def __init__(self, backend: Backend, params: Params, config: GPT2Config, device: Any) -> None:
        self.backend, self.params, self.config, self.device = backend, params, config, device

        def step(params: Params, tokens: Any, row: Any, cache: Cache) -> tuple[Any, Cache | None]:
            """Read tokens [1, seq]; return the logits [1, 1, n_vocab] after row [1] of them, and the cache."""
            h, cache_ = transformer(params, tokens, config, cache)
            return unembed(backend.xp.take(h, row, axis=1), output_table(params)), cache_

        self._step = backend.compile(step, bound=params, donate=("cache",))

    def capacity(self, length: int, final: int) -> int:
        """Return how many tokens a buffer should hold now for a text of this length that may grow to its final one."""
        return padded_length(length, self.config.n_ctx) if self.backend.recompiles else final

    def read(self, tokens: list[int], cache: Cache) -> tuple[np.ndarray, Cache]:
        """Extend the cache by tokens; return the logits [n_vocab] that follow the last of them, on the host.

        Tokens may be padded behind: the cache's rows for them are masked until they are overwritten.
        """
        n, start = len(tokens), cache["position"]
        if n > 1 and self.backend.recompiles:
            room = self.backend.shape(cache["h0"]["k"])[-2] - start
            tokens = tokens + [0] * (min(padded_length(n, self.config.n_ctx), room) - n)
        with self.backend.on(self.device):
            logits, grown = self._step(self._ints([tokens]), self._ints([n - 1]), cache)
        return self.backend.to_numpy(logits)[0, 0], {**grown, "position": start + n}

    def _ints(self, values: Any) -> Any:
        return self.backend.from_numpy(np.asarray(values, np.int32), device=self.device)

    def stream(self, prompt: list[int], max_new_tokens: int, **options: Any) -> Iterator[int]:
        """Yield new tokens, each drawn by `sampling.sample` with these options; the prompt has at least one token."""
        final = len(prompt) + max_new_tokens
        capacity = self.capacity(len(prompt), final)
        with self.backend.on(self.device):
            cache = new_cache(self.params, self.config, capacity=capacity)
        unread = prompt
        for position in range(len(prompt), final):
            if position > capacity:
                capacity = self.capacity(position, final)
                with self.backend.on(self.device):
                    cache = grow_cache(cache, capacity)
            logits, cache = self.read(unread, cache)
            unread = [sample(logits, position, **options)]
            yield unread[0]


def padded_length(n: int, n_ctx: int) -> int:
    """Return the first of 64, 128, 256 ... that is at least n, but at most n_ctx."""
    return min(max(_SMALLEST, 1 << (n - 1).bit_length()), n_ctx)
