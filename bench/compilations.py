"""The number of compilations: how often a framework traces the functions that are given to `Backend.compile`.

The number is the same for models of all sizes. The tests check the same limits; this file puts the numbers into the
table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from .rows import Row
from .run import Run
from .worker import Worker, WorkerError

FULL, PROMPTS = "a full-length generation", "prompts of 1 to 1000 tokens, after it"


def plan(backend: str) -> list[Row]:
    """Return the planned rows, for the frameworks that compile."""
    return [
        Row("compilations", backend, name, "traces") for name in (FULL, PROMPTS) if backend in ("jax", "tensorflow")
    ]


def measure(run: Run, backend: str) -> Iterator[Row]:
    """Count the traces of a generation from 1 token to n_ctx, then the further traces for prompts of many lengths."""
    rows = plan(backend)
    if not rows:
        return
    try:
        with Worker() as worker:
            step = 37 if run.quick else 1
            counts = worker.ask("compilations:count", backend=backend, directory=run.checkpoint("tiny"), step=step)
    except WorkerError as error:
        yield from (row.failed(str(error)) for row in rows)
        return
    for row, count in zip(rows, counts, strict=True):
        yield row.measured(count, note=f"every {step}th length of prompt" if step > 1 and row.name == PROMPTS else "")


def count(backend: str, directory: str, step: int) -> tuple[int, int]:
    """Return the number of traces of a full-length generation, and the number of additional traces for the prompts.

    The model has two layers and the published context of 1,024 tokens.
    """
    import portable_gpt2 as pg

    traces = 0
    owner = type(pg.get_backend(backend))
    compile_ = owner.compile

    def counting(self: Any, fn: Any, *bound: Any, **options: Any) -> Any:
        @functools.wraps(fn)
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal traces
            traces += 1
            return fn(*args, **kwargs)

        return compile_(self, counted, *bound, **options)

    owner.compile = counting
    model = pg.GPT2.load(directory, backend=backend)
    n_ctx = model.config.n_ctx
    for _ in model.stream_ids([1], max_new_tokens=n_ctx - 1, temperature=0):
        pass
    full = traces
    for length in range(1, 1001, step):
        for _ in model.stream_ids([1] * length, max_new_tokens=2, temperature=0):
            pass
    return full, traces - full
