"""portable_gpt2 in a worker: these functions time the functions that a user calls."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

import portable_gpt2 as pg

from . import frameworks


@functools.cache
def load(backend: str, directory: str, device: str | None = None) -> pg.GPT2:
    """Return the model of a checkpoint. It is loaded by the first call and kept."""
    return pg.GPT2.load(directory, backend=backend, device=device)


def parameters(backend: str, directory: str) -> int:
    """Load a model and return the number of its parameters."""
    return pg.params.count(load(backend, directory).config)


def generate(
    backend: str, directory: str, prompt: int, new: int, sampled: bool = False, device: str | None = None
) -> float:
    """Return the seconds to generate `new` tokens after a prompt of `prompt` ids.

    Decoding is greedy or, if `sampled` is true, samples with top_k 40 and top_p 0.95.
    """
    model = load(backend, directory, device)
    options = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 7} if sampled else {"temperature": 0}
    ids = list(range(prompt))
    start = time.perf_counter()
    for _ in model.stream_ids(ids, max_new_tokens=new, **options):
        pass
    return time.perf_counter() - start


def token_seconds(backend: str, directory: str, position: int, new: int) -> float:
    """Return the mean seconds per token of `new` tokens that follow `position` + 1 other tokens."""
    stream = load(backend, directory).stream_ids(list(range(position)), max_new_tokens=1 + new, temperature=0)
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - start) / new


@functools.cache
def _step(backend: str, directory: str) -> Any:
    """Return a function ``step(tokens, cache)`` that runs `pg.gpt2`, compiled by the backend."""
    model = load(backend, directory)

    def step(params: Any, tokens: Any, cache: Any) -> Any:
        return pg.gpt2(params, tokens, model.config, cache)

    return model.backend.compile(step, model.params, donate=("cache",))


def batch_seconds(backend: str, directory: str, batch: int, prompt: int, new: int) -> float:
    """Return the mean seconds that `pg.gpt2` takes for a decode step of a batch, after prompts of equal length.

    The prompts are not computed. Random keys and values are written into the cache instead.
    """
    model, step, own = load(backend, directory), _step(backend, directory), frameworks.get(backend)
    c, from_numpy = model.config, model.backend.from_numpy
    random = np.random.default_rng(0)
    columns = [from_numpy(random.integers(0, c.n_vocab, (batch, 1), np.int32)) for _ in range(new)]
    rows = from_numpy(random.standard_normal((batch, c.n_head, prompt, c.head_size), np.float32))
    cache = pg.new_cache(model.params, c, batch=batch, capacity=prompt + new)
    k, v = (tuple(own.wait(model.backend.write(x, rows, 0)) for x in buffers) for buffers in (cache.k, cache.v))
    cache = cache._replace(k=k, v=v)
    start = time.perf_counter()
    for position, column in enumerate(columns, prompt):
        if position == prompt + 1:  # the first step may compile, so it is not timed
            start = time.perf_counter()
        logits, cache = step(column, cache._replace(position=position))
        own.wait(logits)
    return (time.perf_counter() - start) / (new - 1)


def first_pass(backend: str, directory: str) -> float:
    """Return the seconds to load a model and compute the logits of one token. The framework is imported before."""
    pg.get_backend(backend)
    start = time.perf_counter()
    model = pg.GPT2.load(directory, backend=backend)
    pg.to_numpy(model.logits([[0]]))
    return time.perf_counter() - start


def peak_bytes(backend: str, directory: str, prompt: int, new: int) -> int:
    """Return the bytes by which peak memory grows while a model is loaded and generates text.

    The process must be new.
    """
    pg.to_numpy(pg.get_backend(backend).from_numpy(np.zeros(1, np.float32)))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak, VmHWM, so that the import does not count
    before = _status("VmRSS")
    generate(backend, directory, prompt, new)
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))
