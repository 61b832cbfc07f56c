"""The machine's limits: the speed of reading memory, and of each framework's matrix products."""

from __future__ import annotations

import functools
import os
import platform
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np

from . import frameworks
from .clock import repeated, seconds
from .rows import BANDWIDTH, Row
from .run import Run
from .worker import Worker, WorkerError

SHAPE = 768, 3072
ROWS, MATRICES = 512, 60  # 566 MB of weights, more than any processor cache
PACKAGES = ("numpy", "scipy", "torch", "jax", "jaxlib", "tensorflow", "keras", "transformers", "keras-hub")


def plan(backend: str) -> list[Row]:
    """Return the planned rows for one framework. The row of the memory's speed is planned with NumPy's rows."""
    shared = [Row("machine", "-", "read bandwidth", "GB/s")] if backend == "numpy" else []
    return [
        *shared,
        Row("machine", backend, f"matrix product [{ROWS}, 768] x [768, 3072]", "GFLOP/s"),
        Row("machine", backend, "matrix-vector products [1, 768] x [768, 3072]", "GB/s"),
    ]


def measure(run: Run, backend: str) -> Iterator[Row]:
    """Measure the planned rows on one framework."""
    with Worker() as worker:
        for row in plan(backend):
            try:
                if row.backend == "-":
                    rates = [worker.ask("machine:bandwidth") for _ in range(3 * run.rounds)]
                    yield row.measured(
                        statistics.median(rates), samples={BANDWIDTH: rates}, note="median of the table's samples"
                    )
                    continue
                rows = 1 if "vector" in row.name else ROWS
                rates = worker.ask("machine:product_rates", name=backend, rows=rows, rounds=run.rounds)
                best = max(rates, key=lambda name: max(rates[name]))
                yield row.measured(
                    max(rates[best]), samples=rates, best_of=max, note=f"best of {', '.join(rates)}: {best}"
                )
            except WorkerError as error:
                yield row.failed(str(error))


@functools.cache
def _numbers() -> tuple[np.ndarray, Any]:
    numbers = np.random.default_rng(0).standard_normal(150_000_000, np.float32)
    if not frameworks.installed("torch"):
        return numbers, None
    import torch

    return numbers, torch.from_numpy(numbers)


def bandwidth() -> float:
    """Return the GB/s at which 600 MB are read.

    The numbers are summed three times by NumPy on all threads and, if PyTorch is installed, three times by PyTorch. The
    fastest sum counts.
    """
    numbers, tensor = _numbers()
    parts = np.array_split(numbers, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(len(parts)) as pool:
        sums = [lambda: list(pool.map(np.sum, parts))] + ([tensor.sum] if tensor is not None else [])
        return numbers.nbytes / min(seconds(each) for each in sums for _ in range(3)) / 1e9


def product_rates(name: str, rows: int, rounds: int) -> dict[str, list[float]]:
    """Return the rates of the product x w, for each mode of the framework and each layout of w.

    The unit is GFLOP/s. If x is a single row, the rate is instead the GB/s at which w is read.
    """
    own = frameworks.get(name)
    random = np.random.default_rng(0)
    x = own.array(random.standard_normal((rows, SHAPE[0]), np.float32))
    number = MATRICES if rows == 1 else 6
    calls = {}
    for layout, shape in (("x w", SHAPE), ("x w^T", SHAPE[::-1])):
        weights = [own.array(random.standard_normal(shape, np.float32)) for _ in range(number)]

        def products(x: Any, weights: list[Any], turned: bool = layout == "x w^T") -> list[Any]:
            return [own.matmul(x, own.transpose(w) if turned else w) for w in weights]

        for mode, run in own.fast_modes.items():
            calls[f"{mode} {layout}"] = lambda f=own.bind(run, products, weights): own.wait(f(x))
    samples = repeated(calls, rounds=rounds, at_least=0.0)
    amount = number * SHAPE[0] * SHAPE[1] * (4 if rows == 1 else 2 * rows) / 1e9
    return {call: [amount / each for each in times] for call, times in samples.items()}


def describe(threads: int) -> dict[str, str]:
    """Return the processor, the number of threads, and the versions of Python and of the packages."""
    found = {"processor": _processor(), "threads": str(threads), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
