"""Decoding on an accelerator. If the framework reports no accelerator, the row says so."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .clock import in_turn
from .decode import NEW, PROMPT
from .rows import Row
from .run import Run
from .throughput import weight_bytes
from .worker import Worker, WorkerError


def plan(backend: str) -> list[Row]:
    """Return the planned row for one framework. NumPy does not use accelerators, so it has no row."""
    return [] if backend == "numpy" else [Row("accelerator", backend, "124M against the limit", "ms/token")]


def measure(run: Run, backend: str) -> Iterator[Row]:
    """Measure greedy decoding from position 128 to 192 on the first accelerator that the framework reports."""
    for row in plan(backend):
        try:
            with Worker() as worker:
                devices = worker.ask("model:accelerators", backend=backend)
                if devices:
                    yield _decode(run, backend, devices[0], worker, row)
                else:
                    yield row.failed("the framework reports no accelerator on this machine")
        except WorkerError as error:
            yield row.failed(str(error))


def _decode(run: Run, backend: str, device: str, worker: Worker, row: Row) -> Row:
    model = {"backend": backend, "directory": run.checkpoint("124M"), "prompt": PROMPT, "device": device}
    rate = f"GB/s of {device}"
    sides = {
        rate: lambda: worker.ask("model:device_bandwidth", backend=backend, device=device),
        "1 token": lambda: worker.ask("model:generate", **model, new=1),
        "all": lambda: worker.ask("model:generate", **model, new=1 + NEW),
    }
    failures: dict[str, str] = {}
    samples = in_turn(run.rounds, sides, failures)
    if failures:
        return row.failed("; ".join(failures.values()))
    value = (min(samples["all"]) - min(samples["1 token"])) / NEW * 1e3
    limit = weight_bytes("124M") / statistics.median(samples[rate]) / 1e6
    return row.measured(value, limit, "weights read once", samples=samples, note=device)
