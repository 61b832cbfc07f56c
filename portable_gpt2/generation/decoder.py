"""Tokens from a model: prefill, then decode over cached keys and values, for a batch of texts.

If the backend compiles again for every new shape (`Backend.compiles_per_shape`), prompts are padded, and caches have
room for 64, 128, 256 ... tokens, so that a whole generation compiles only a few times. On other backends the cache has
its final size from the start.

On a CPU, the host reads the logits of each step and samples from them. An accelerator would wait meanwhile, so there
the device chooses the tokens (`Backend.runs_ahead`), and the host reads them while the device computes the next ones.
If the device cannot decide a token, the host samples it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backend import Backend
from ..cache import KVCache, grow_cache, new_cache
from ..config import GPT2Config
from ..correct_rounding import functions
from ..model import head, transformer
from ..params import Params
from ..sampling import Sampling, sample_with
from .choice import Draw, Rule, choose, common_rule, gumbel_on, new_draw

_SMALLEST = 64
_STEPS = 16
"""How many tokens a loop on the device generates per call."""


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


class State(NamedTuple):
    """The data that stays on the device from one call to the next. Its memory is donated to each call."""

    cache: KVCache
    """The cache; its position is None, because it is in `progress`."""
    progress: Any
    """int32 [2, batch]: the last token of each text, and the number of tokens in the cache before this token."""
    shifts: Any
    """int32 [batch]: the next token has this position in its text, plus the number of tokens in the cache."""
    limit: Any
    """int32 [1]: at this number of tokens in the cache, a loop stops."""
    ends: Any
    """int32 [1, n]: the tokens that end a text, and -1 for unused entries."""
    has_ended: Any
    """int32 [batch, 1]: 1 if the text has one of the tokens that end it, otherwise 0. A loop stops if all are 1."""
    draw: Draw


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
    compile : callable, optional
        A function with the signature of `Backend.compile`, which it is unless given.
    reproducible : bool
        Whether the choice of a token must not depend on the processor. The host then chooses all tokens.
    """

    def __init__(
        self,
        backend: Backend,
        params: Params,
        config: GPT2Config,
        device: Any,
        *,
        compile: Callable[..., Any] | None = None,
        reproducible: bool = False,
    ) -> None:
        self.backend, self.params, self.config, self.device = backend, params, config, device

        def step(params: Params, tokens: Any, last: Any, cache: KVCache) -> tuple[Any, KVCache | None]:
            """Return the logits [batch, 1, n_vocab] after the token at index `last`, an array [1], and the cache."""
            h, extended = transformer(params, tokens, config, cache)
            return head(params, backend.xp.take(h, last, axis=1)), extended

        self._step = (compile or backend.compile)(step, params, donate=("cache",))
        wte = params["wte"]
        self.runs_ahead = not reproducible and backend.dtype_names[wte.dtype] != "float64" and backend.runs_ahead(wte)
        self._functions = (functions.exp, functions.log) if reproducible else ()
        self._n_steps = _STEPS if backend.compiles_per_shape else 1
        self._runs: dict[Rule, Callable[[State], tuple[Any, State]]] = {}

    def _run(self, rule: Rule) -> Callable[[State], tuple[Any, State]]:
        """Return a function that generates tokens on the device, compiled once for each rule.

        The function returns the tokens and the new state. The tokens are in the first `_n_steps` rows of an int32 array
        [n, batch]. A step that was not computed has tokens of -1. If there is only one step, the array is `progress`
        itself, so that nothing has to be copied.
        """
        if rule in self._runs:
            return self._runs[rule]
        backend, config, xp = self.backend, self.config, self.backend.xp
        gumbel = gumbel_on(backend, self.device)

        def step(params: Params, state: State) -> State:
            n_cached = state.progress[1, :]
            # If a token is undecided, the host will decide it, and this step is computed in vain.
            tokens = xp.where(state.progress[0, :] < 0, 0, state.progress[0, :])[:, None]
            h, cache = transformer(params, tokens, config, state.cache._replace(position=n_cached[0]))
            assert cache is not None
            logits = head(params, h)[:, 0, :]
            chosen = choose(backend, logits, (n_cached + state.shifts)[:, None], state.draw, rule, gumbel)
            progress = xp.concat([chosen[:, 0][None, :], (n_cached + 1)[None, :]], axis=0)
            progress = backend.write(state.progress, progress, 0)
            return state._replace(cache=cache._replace(position=None), progress=progress)

        def one(params: Params, state: State) -> tuple[Any, State]:
            state = step(params, state)
            return state.progress, state

        def several(params: Params, state: State) -> tuple[Any, State]:
            def is_unfinished(loop: tuple[Any, Any, State]) -> Any:
                i, _, state = loop
                has_room = state.progress[1, 0] < state.limit[0]
                # XLA for CUDA computed the maximum of -x, of integers in a larger function, as that of x.
                n_unfinished = xp.sum(xp.astype(state.has_ended == 0, xp.int32))
                n_undecided = xp.sum(xp.astype(state.progress < 0, xp.int32))
                return (i < _STEPS) & has_room & (n_unfinished > 0) & (n_undecided == 0)

            def body(loop: tuple[Any, Any, State]) -> tuple[Any, Any, State]:
                i, found, state = loop
                state = step(params, state)
                chosen = state.progress[:1, :]
                is_end = xp.astype(state.progress[0, :][:, None] == state.ends, xp.int32)
                has_ended = xp.max(xp.concat([state.has_ended, is_end], axis=1), axis=1, keepdims=True)
                return i + 1, backend.write(found, chosen, i), state._replace(has_ended=has_ended)

            batch = backend.shape(state.progress)[1]
            none = backend.zeros((_STEPS, batch), like=state.progress) - 1
            _, found, state = backend.while_loop(is_unfinished, body, (0, none, state))
            return found, state

        run = backend.compile(several if self._n_steps > 1 else one, self.params, donate=("state",))
        self._runs[rule] = run
        return run

    def capacity(self, length: int, final: int) -> int:
        """Return the capacity, in tokens, of the cache of a text that now has `length` tokens and will have `final`."""
        return padded_length(length, self.config.n_ctx) if self.backend.compiles_per_shape else final

    def new_cache(self, batch: int, capacity: int, padding: Iterable[int] | None) -> KVCache:
        """Return an empty cache, as `cache.new_cache` does."""
        return new_cache(self.params, self.config, batch=batch, capacity=capacity, padding=padding)

    def grow_cache(self, cache: KVCache, capacity: int) -> KVCache:
        """Return a cache with room for more tokens, as `cache.grow_cache` does."""
        return grow_cache(cache, capacity)

    def n_largest(self, samplings: Sequence[Sampling]) -> int | None:
        """Return how many of the largest logits the host must know to sample; None if it must know all."""
        return None

    def read(
        self, rows: Sequence[list[int]], cache: KVCache, n_largest: int | None = None
    ) -> tuple[np.ndarray, KVCache]:
        """Extend the cache by rows of equal length; return the logits [batch, n_vocab] after each row, on the host.

        Rows may be padded at the end: the mask hides the padding's keys until they are overwritten. Logits that are
        not among the n largest may be -inf.
        """
        n, start = len(rows[0]), cache.position
        if n > 1 and self.backend.compiles_per_shape:
            room = self.backend.shape(cache.k[0])[-2] - start
            padding = [0] * (min(padded_length(n, self.config.n_ctx), room) - n)
            rows = [row + padding for row in rows]
        logits, extended = self._read(rows, n - 1, cache, n_largest)
        return logits, extended._replace(position=start + n)

    def _read(self, rows: Sequence[list[int]], last: int, cache: KVCache, n: int | None) -> tuple[np.ndarray, KVCache]:
        """Return the logits after the token at index `last` of each row, and the extended cache."""
        logits, extended = self._step(self._ints(rows), self._ints([last]), cache)
        return self.backend.to_numpy(logits)[:, 0], extended

    def _ints(self, values: Any) -> Any:
        return self.backend.from_numpy(np.asarray(values, np.int32), device=self.device)

    def stream(
        self, generations: Sequence[Generation], max_new_tokens: int, ends: Collection[int] = ()
    ) -> Iterator[Generation]:
        """Append new tokens; yield a generation each time it has one more token.

        The caller marks a generation as finished, at the latest after one of the tokens in `ends`. When a text fills
        n_ctx, its last n_ctx // 2 tokens are read again, and generation continues from these. Texts of different
        lengths must not reach that point, because the longest text would truncate the others.
        """
        n_ctx = self.config.n_ctx
        while max_new_tokens > 0 and not all(generation.finished for generation in generations):
            length = max(len(generation.tokens) for generation in generations)
            n_read = length if length < n_ctx else n_ctx // 2
            n_new = min(max_new_tokens, n_ctx - n_read)
            yield from self._stream_window(generations, n_read, n_read + n_new, ends)
            max_new_tokens -= n_new

    def _stream_window(
        self, generations: Sequence[Generation], n_read: int, final: int, ends: Collection[int]
    ) -> Iterator[Generation]:
        """Read the last n_read tokens of each text, and generate until the longest has its final length."""
        unread = [generation.tokens[-n_read:] for generation in generations]
        padding = [n_read - len(tokens) for tokens in unread]
        unread = [[0] * n + tokens for n, tokens in zip(padding, unread, strict=True)]
        capacity = self.capacity(n_read, final)
        ragged = padding if any(padding) else None
        cache = self.new_cache(len(generations), capacity, ragged)
        samplings = [generation.sampling for generation in generations]
        n_largest = self.n_largest(samplings)
        rule = common_rule(samplings, self.config.n_vocab) if self.runs_ahead else None
        state: State | None = None
        length = n_read
        while length < final:
            cache = self._with_room(cache, length, final)
            logits, cache = self.read(unread, cache, n_largest)
            for generation, row in zip(generations, logits, strict=True):
                if not generation.finished:
                    seen = generation.tokens
                    arguments = (generation.sampling, row, len(seen), seen, generation.index)
                    seen.append(sample_with(*arguments, *self._functions))
                    yield generation
            length += 1
            if all(generation.finished for generation in generations):
                return
            if rule is not None and length < final:
                state = self._state(generations, cache, rule, ends, state)
                length, state = yield from self._run_ahead(generations, state, rule, length, final)
                cache = state.cache._replace(position=length - 1)
            unread = [generation.tokens[-1:] for generation in generations]

    def _state(
        self, generations: Sequence[Generation], cache: KVCache, rule: Rule, ends: Collection[int], state: State | None
    ) -> State:
        """Return the state after the host has sampled. A previous state of the same texts is used again."""
        tokens = [generation.tokens[-1] for generation in generations]
        progress = self._ints([tokens, [cache.position] * len(tokens)])
        has_ended = self._ints([[int(generation.finished)] for generation in generations])
        cache, n_cached = cache._replace(position=None), cache.position
        if state is not None:  # the same memory, so that a recorded graph stays valid
            progress = self.backend.write(state.progress, progress, 0)
            return state._replace(
                cache=cache, progress=progress, has_ended=self.backend.write(state.has_ended, has_ended, 0)
            )
        samplings, indices = zip(*[(generation.sampling, generation.index) for generation in generations], strict=True)
        options, keys = (self.backend.from_numpy(a, device=self.device) for a in new_draw(samplings, indices, rule))
        n_ends = max(8, 1 << (len(ends) - 1).bit_length())  # few lengths, each of which is compiled
        return State(
            cache,
            progress,
            shifts=self._ints([len(generation.tokens) - n_cached for generation in generations]),
            limit=self._ints([0]),
            ends=self._ints([[*ends, *[-1] * (n_ends - len(ends))]]),
            has_ended=has_ended,
            draw=Draw(options, keys),
        )

    def _run_ahead(
        self, generations: Sequence[Generation], state: State, rule: Rule, length: int, final: int
    ) -> Generator[Generation, None, tuple[int, State]]:
        """Generate on the device, from a length of the longest text to its final length, or to an undecided token.

        The tokens of one call are read after the next call was dispatched. Return the length that was reached, and the
        last state, whose cache may contain more tokens.
        """
        run, n_cached = self._run(rule), length - 1
        previous: tuple[Callable[[], np.ndarray], int] | None = None
        while previous is not None or n_cached < final - 1:
            current = None
            if n_cached < final - 1:
                cache = self._with_room(state.cache, n_cached + 1, final)
                limit = min(self._capacity_of(cache), final - 1)
                if self._n_steps > 1 and (cache is not state.cache or previous is None):
                    state = state._replace(cache=cache, limit=self._ints([limit]))
                tokens, state = run(state)
                n_new = min(self._n_steps, limit - n_cached)
                current = self.backend.fetch(tokens), n_new
                n_cached += n_new
            rows = [] if previous is None else previous[0]()[: previous[1]].tolist()
            for row in rows:
                if min(row) < 0:  # it is undecided, or was not computed
                    return length, state
                length += 1
                for generation, token in zip(generations, row, strict=True):
                    if not generation.finished:
                        generation.tokens.append(token)
                        yield generation
                if all(generation.finished for generation in generations):
                    return length, state
            previous = current
        return length, state

    def _with_room(self, cache: KVCache, length: int, final: int) -> KVCache:
        """Return the cache with room for a text of that length."""
        return cache if length <= self._capacity_of(cache) else self.grow_cache(cache, self.capacity(length, final))

    def _capacity_of(self, cache: KVCache) -> int:
        return int(self.backend.shape(cache.k[0])[-2])


def padded_length(n: int, n_ctx: int) -> int:
    """Return the smallest of 64, 128, 256 ... that is at least n, but at most n_ctx."""
    return min(max(_SMALLEST, 1 << (n - 1).bit_length()), n_ctx)
