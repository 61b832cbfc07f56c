"""Token after token: prefill, then decode over cached keys and values, of one text or several at once.

Where a new shape costs a compilation (`Backend.recompiles`), prompts are padded and caches sized to 64, 128, 256 ... so
that a whole generation compiles a handful of times; elsewhere the cache is allocated once, at its final size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Backend
from ..cache import KVCache, grow_cache, new_cache
from ..config import GPT2Config
from ..model import output_embedding, transformer
from ..ops import unembed
from ..params import Params
from ..sampling import Sampling, sample_with

_SMALLEST = 64


@dataclass(eq=False)
class Text:
    """A text that grows.

    Parameters
    ----------
    tokens : list of int
        The prompt, of at least one token, and the tokens that were sampled after it.
    sampling : Sampling
        How its tokens are sampled.
    index : int
        Which of several samples of one prompt it is.
    ended : bool
        Whether it is complete: no token is drawn any more.
    """

    tokens: list[int]
    sampling: Sampling
    index: int = 0
    ended: bool = False


class Decoder:
    """A model made ready to produce one row of logits for each text at a time.

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

        def step(params: Params, tokens: Any, row: Any, cache: KVCache) -> tuple[Any, KVCache | None]:
            """Read tokens [batch, seq]; return the logits [batch, 1, n_vocab] after row [1] of them, and the cache."""
            h, cache_ = transformer(params, tokens, config, cache)
            return unembed(backend.xp.take(h, row, axis=1), output_embedding(params)), cache_

        self._step = backend.compile(step, bound=params, donate=("cache",))

    def capacity(self, length: int, final: int) -> int:
        """Return how many tokens a buffer should hold now for a text of this length that may grow to its final one."""
        return padded_length(length, self.config.n_ctx) if self.backend.recompiles else final

    def read(self, rows: Sequence[list[int]], cache: KVCache) -> tuple[np.ndarray, KVCache]:
        """Extend the cache by rows of equal length; return the logits [batch, n_vocab] after each, on the host.

        Tokens may be padded behind: the cache's rows for them are masked until they are overwritten.
        """
        n, start = len(rows[0]), cache.position
        if n > 1 and self.backend.recompiles:
            room = self.backend.shape(cache.k[0])[-2] - start
            behind = [0] * (min(padded_length(n, self.config.n_ctx), room) - n)
            rows = [row + behind for row in rows]
        with self.backend.on(self.device):
            logits, grown = self._step(self._ints(rows), self._ints([n - 1]), cache)
        return self.backend.to_numpy(logits)[:, 0], grown._replace(position=start + n)

    def _ints(self, values: Any) -> Any:
        return self.backend.from_numpy(np.asarray(values, np.int32), device=self.device)

    def stream(self, texts: Sequence[Text], max_new_tokens: int) -> Iterator[Text]:
        """Sample new tokens; yield a text whenever one was added to it.

        Whoever finds a text complete marks it so. A text that fills n_ctx goes on from its last n_ctx // 2 tokens;
        texts of several lengths must not come to that, as the longest would cut the others.
        """
        n_ctx = self.config.n_ctx
        while max_new_tokens > 0 and not all(text.ended for text in texts):
            length = max(len(text.tokens) for text in texts)
            read = length if length < n_ctx else n_ctx // 2
            drawn = min(max_new_tokens, n_ctx - read)
            yield from self._fill(texts, read, read + drawn)
            max_new_tokens -= drawn

    def _fill(self, texts: Sequence[Text], read: int, final: int) -> Iterator[Text]:
        """Read the last tokens of each text, and draw until the longest is of its final length."""
        unread = [text.tokens[-read:] for text in texts]
        padding = [read - len(tokens) for tokens in unread]
        unread = [[0] * n + tokens for n, tokens in zip(padding, unread, strict=True)]
        capacity = self.capacity(read, final)
        with self.backend.on(self.device):
            ragged = padding if any(padding) else None
            cache = new_cache(self.params, self.config, batch=len(texts), capacity=capacity, padding=ragged)
        for position in range(read, final):
            if position > capacity:
                capacity = self.capacity(position, final)
                with self.backend.on(self.device):
                    cache = grow_cache(cache, capacity)
            logits, cache = self.read(unread, cache)
            for text, row in zip(texts, logits, strict=True):
                if not text.ended:
                    seen = text.tokens
                    text.tokens.append(sample_with(text.sampling, row, len(seen), seen, text.index))
                    yield text
            if all(text.ended for text in texts):
                return
            unread = [text.tokens[-1:] for text in texts]


def padded_length(n: int, n_ctx: int) -> int:
    """Return the first of 64, 128, 256 ... that is at least n, but at most n_ctx."""
    return min(max(_SMALLEST, 1 << (n - 1).bit_length()), n_ctx)
