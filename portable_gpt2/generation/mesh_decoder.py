"""A model on a mesh: decoding, logits and scores. No device has all logits, so the largest of each are gathered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..cache import KVCache
from ..config import GPT2Config
from ..divided import largest, scores
from ..mesh import DATA, MODEL, Mesh
from ..model import head, transformer
from ..params import Params
from ..sampling import Sampling, check_finite
from ..score import Scored
from .decoder import Decoder, Generation, padded_length


class MeshDecoder(Decoder):
    """A `Decoder` of a model on a mesh. Each process samples every token, from the same logits.

    Parameters
    ----------
    mesh : Mesh
        The mesh.
    params : dict
        The parameters on the mesh.
    config : GPT2Config
        The model's shape.
    """

    runs_ahead = False

    def __init__(self, mesh: Mesh, params: Params, config: GPT2Config) -> None:
        self.mesh, self.backend, self.params, self.config = mesh, mesh.backend, params, config
        self._functions = ()
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def _once(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]

    def stream(
        self, generations: Sequence[Generation], max_new_tokens: int, ends: Collection[int] = ()
    ) -> Iterator[Generation]:
        """Generate as `Decoder.stream` does, after a check that all processes generate the same texts."""
        texts = [(each.tokens, each.sampling, each.index) for each in generations]
        self.mesh.check_common("prompts, seeds or options", [texts, max_new_tokens, sorted(ends)])
        yield from super().stream(generations, max_new_tokens, ends)

    def new_cache(self, batch: int, capacity: int, padding: Iterable[int] | None) -> KVCache:
        """Return an empty cache, whose heads and texts are divided over the mesh."""
        mesh, config, backend = self.mesh, self.config, self.backend
        axis = mesh.batch_axis(batch)
        part = batch // (mesh.sizes[DATA] if axis else 1)
        shape = (part, config.n_head // mesh.sizes[MODEL], capacity, config.head_size)
        spec = mesh.cache_spec(config.n_layer, axis, False)

        def make() -> Callable[..., Any]:
            def zeros(wte: Any) -> Any:
                k, v = (tuple(backend.zeros(shape, like=wte) for _ in range(config.n_layer)) for _ in "kv")
                return k, v

            return mesh.compile(zeros, (mesh.spec("wte"),), (spec.k, spec.v))

        k, v = self._once(("new", batch, capacity), make)(self.params["wte"])
        given = None if padding is None else mesh.put(np.asarray(list(padding), np.int32), axis)
        return KVCache(k, v, 0, given)

    def grow_cache(self, cache: KVCache, capacity: int) -> KVCache:
        """Return a cache with room for more tokens."""
        mesh, backend = self.mesh, self.backend
        batch = backend.shape(cache.k[0])[0]
        spec = mesh.cache_spec(self.config.n_layer, mesh.batch_axis(batch), False)

        def make() -> Callable[..., Any]:
            def grown(buffers: tuple[Any, ...]) -> tuple[Any, ...]:
                found = []
                for buffer in buffers:
                    *start, _, d = backend.shape(buffer)
                    found.append(backend.write(backend.zeros((*start, capacity, d), like=buffer), buffer, 0))
                return tuple(found)

            return mesh.compile(lambda k, v: (grown(k), grown(v)), (spec.k, spec.v), (spec.k, spec.v), donate=(0, 1))

        k, v = self._once(("grow", batch, backend.shape(cache.k[0])[-2], capacity), make)(cache.k, cache.v)
        return cache._replace(k=k, v=v)

    def n_largest(self, samplings: Sequence[Sampling]) -> int | None:
        """Return how many of the largest logits decide the next tokens; None if all may matter."""
        needed = []
        for sampling in samplings:
            if sampling.repetition_penalty != 1:
                return None
            needed.append(1 if sampling.temperature == 0 else sampling.top_k or self.config.n_vocab)
        return max(needed) if max(needed) < self.config.n_vocab // 4 else None

    def _read(self, rows: Sequence[list[int]], last: int, cache: KVCache, n: int | None) -> tuple[np.ndarray, KVCache]:
        """Return the logits after the token at index `last`; -inf for those that are not among the n largest."""
        mesh, config, backend = self.mesh, self.config, self.backend
        tokens = np.asarray(rows, np.int32)
        axis = mesh.batch_axis(len(tokens))
        k = 0 if n is None else min(1 << n.bit_length(), mesh.rows(config.n_vocab) // mesh.sizes[MODEL])
        has_padding = cache.padding is not None
        step = self._once((axis, has_padding, k), lambda: self._step_of(axis, has_padding, k))
        given = mesh.put(tokens, axis, None), mesh.put(np.asarray([last], np.int32), None)
        head_of, extended = step(self.params, *given, cache)
        # The cache's hidden rows are written again, so the step may be repeated.
        values, ids = (backend.to_numpy(x) for x in head_of)
        found = np.full((len(tokens), config.n_vocab), -np.inf, values.dtype)
        known = ids < config.n_vocab
        rows_of = np.broadcast_to(np.arange(len(tokens))[:, None], ids.shape)
        found[rows_of[known], ids[known]] = values[known]
        extended = extended._replace(position=cache.position)
        if n is not None and _may_lack(values, k, n):
            return self._read(rows, last, extended, None)
        return found, extended

    def _step_of(self, axis: str | None, has_padding: bool, k: int) -> Callable[..., Any]:
        """Return a function that reads tokens. It returns the k largest logits of each device, or all for k = 0."""
        mesh, config, backend = self.mesh, self.config, self.backend
        cache_spec = mesh.cache_spec(config.n_layer, axis, has_padding)

        def step(params: Params, tokens: Any, last: Any, cache: KVCache) -> tuple[Any, KVCache]:
            params, split = mesh.local(params), mesh.split(config.n_vocab)
            h, extended = transformer(params, tokens, config, cache, split=split)
            assert extended is not None
            logits = head(params, backend.xp.take(h, last, axis=1), split)[:, 0, :]
            n = k or backend.shape(logits)[-1]
            found = largest(logits, n, split)
            if axis is not None and mesh.sizes[DATA] > 1:
                _, data = backend.mesh_split(mesh.own, DATA)
                found = tuple(backend.all_concat(x, data, 0) for x in found)  # type: ignore[assignment]
            return found, extended._replace(position=cache.position)

        specs = (mesh.params_spec(config), mesh.on(axis, None), (None,), cache_spec)
        results = (((None, None), (None, None)), cache_spec)
        return mesh.compile(step, specs, results, donate=(3,))

    def logits(self, tokens: np.ndarray) -> Any:
        """Return the logits of the token that follows each token, [batch, seq, n_vocab], gathered along ``model``."""
        mesh, config, backend = self.mesh, self.config, self.backend
        axis = mesh.batch_axis(len(tokens))

        def make() -> Callable[..., Any]:
            def logits(params: Params, tokens: Any) -> Any:
                params, split = mesh.local(params), mesh.split(config.n_vocab)
                found = head(params, transformer(params, tokens, config, split=split)[0], split)
                return found if split.n == 1 else backend.all_concat(found, split.axis)[..., : config.n_vocab]

            specs = (mesh.params_spec(config), mesh.on(axis, None))
            return mesh.compile(logits, specs, mesh.on(axis, None, None))

        return self._once(("logits", axis), make)(self.params, mesh.put(tokens.astype(np.int32), axis, None))

    def score(self, windows: Sequence[tuple[list[int], int]], alternatives: int) -> list[Scored]:
        """Score windows as a `Scorer` does, without gathering the logits: one on each device along ``data``."""
        mesh, config, backend = self.mesh, self.config, self.backend
        n_data = mesh.sizes[DATA]
        texts = [window for window, _ in windows]
        texts += texts[:1] * (n_data - len(texts))  # the other devices repeat the first window
        n = max(map(len, texts)) - 1
        n = padded_length(n, config.n_ctx) if backend.compiles_per_shape else n
        k = min(max(1, alternatives), mesh.rows(config.n_vocab) // mesh.sizes[MODEL])
        rows = mesh.on(DATA, None)

        def make() -> Callable[..., Any]:
            def scored(params: Params, tokens: Any, targets: Any) -> Any:
                params, split = mesh.local(params), mesh.split(config.n_vocab)
                logits = head(params, transformer(params, tokens, config, split=split)[0], split)
                if logits.dtype != backend.xp.float64:
                    logits = backend.xp.astype(logits, backend.xp.float32)
                return scores(logits, targets, k, split)

            return mesh.compile(scored, (mesh.params_spec(config), rows, rows), (mesh.on(DATA, None, None),) * 4)

        given = [
            mesh.put(np.asarray([ids + [0] * (n - len(ids)) for ids in part], np.int32), DATA, None)
            for part in ([text[:-1] for text in texts], [text[1:] for text in texts])
        ]
        arrays = [backend.to_numpy(x) for x in self._once(("score", k), make)(self.params, *given)]
        return [
            _ranked([x[i, first - 1 : len(window) - 1] for x in arrays], alternatives)
            for i, (window, first) in enumerate(windows)
        ]


def _ranked(found: list[np.ndarray], alternatives: int) -> Scored:
    """Return the scores of a window from the results of `divided.scores` for it."""
    own, ranks, values, ids = found
    for each in own.flat:
        check_finite(each)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :alternatives]
    likeliest, log_probs = (np.take_along_axis(x, order, axis=-1) for x in (ids, values))
    return Scored(own[:, 0].astype(np.float64), ranks[:, 0], likeliest, log_probs.astype(np.float64))


def _may_lack(values: np.ndarray, k: int, n: int) -> bool:
    """Return whether a device may have a further logit that is at least the n-th largest: one that equals it."""
    ordered = np.sort(values, axis=-1)
    threshold = ordered[:, -n]
    smallest = values.reshape(len(values), -1, k).min(axis=-1)
    return bool((smallest >= threshold[:, None]).any())
