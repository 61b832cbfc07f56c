"""The cost of a new process: import time, load time, time to the first output, and peak memory of a generation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from .clock import in_turn
from .rows import Row
from .run import Run
from .throughput import cache_bytes, weight_bytes
from .worker import Worker, WorkerError

PROMPT, NEW = 128, 64
LOAD, IMPORT = "load and first forward pass", "import beyond NumPy"
COMMAND, CONTINUATION = "the generate command prints", "the generate command prints its first token"
TIMED_IMPORT = """
import time, numpy
start = time.perf_counter()
import portable_gpt2
print(time.perf_counter() - start)
"""


def plan_start(backend: str) -> list[Row]:
    """Return the planned rows. The command and the import are measured with NumPy only."""
    names = [LOAD, *([IMPORT, COMMAND, CONTINUATION] if backend == "numpy" else [])]
    return [Row("start", backend, name, "s") for name in names]


def start(run: Run, backend: str) -> Iterator[Row]:
    """Measure each row in new processes, with a warm file cache."""
    for row in plan_start(backend):
        try:
            if row.name == LOAD:
                samples = _load(run, backend)
            elif row.name == IMPORT:
                samples = in_turn(3 * run.rounds, {row.name: _import_seconds})[row.name]
            else:
                samples = _command(run, token=row.name == CONTINUATION)
            note = "without the import of the framework" if row.name == LOAD else ""
            yield row.measured(min(samples), samples={row.name: samples}, note=note)
        except (WorkerError, OSError, subprocess.SubprocessError) as error:
            yield row.failed(str(error))


def _load(run: Run, backend: str) -> list[float]:
    samples = []
    for _ in range(1 + run.rounds // 2):
        with Worker() as worker:
            samples.append(worker.ask("model:first_pass", backend=backend, directory=run.checkpoint("124M")))
    return samples


def _import_seconds() -> float:
    from .worker import ROOM

    result = subprocess.run([sys.executable, "-c", TIMED_IMPORT], cwd=ROOM, capture_output=True, text=True, check=True)
    return float(result.stdout)


def _command(run: Run, *, token: bool) -> list[float]:
    """Return the seconds until ``portable-gpt2 generate`` prints its first byte.

    If `token` is true, return the seconds until it prints its first byte after the prompt.
    """
    from .worker import ROOM

    prompt = "To be"
    command = [sys.executable, "-m", "portable_gpt2.cli", "generate", prompt, "--backend", "numpy", "--seed", "7"]
    command += ["--model", run.checkpoint("small")]

    def sample() -> float:
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOM, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            printed = b""
            while len(printed) <= (len(prompt) if token else 0):
                more = os.read(process.stdout.fileno(), 1)
                if not more:
                    raise OSError(f"the command printed {printed!r} and ended with status {process.wait()}")
                printed += more
            seconds = time.perf_counter() - began
            process.kill()
        return seconds

    sample()
    return in_turn(2 * run.rounds, {"": sample})[""]


def plan_memory(backend: str) -> list[Row]:
    """Return the planned row of peak memory."""
    return [Row("memory", backend, "peak of a generation", "MB")]


def memory(run: Run, backend: str) -> Iterator[Row]:
    """Compare peak memory with the size of the weights and the cache.

    The memory that the imported framework takes is not counted.
    """
    (row,) = plan_memory(backend)
    try:
        with Worker() as worker:
            model = {"backend": backend, "directory": run.checkpoint("124M")}
            peak = worker.ask("model:peak_bytes", **model, prompt=PROMPT, new=NEW)
    except WorkerError as error:
        yield row.failed(str(error))
        return
    needed = weight_bytes("124M") + (PROMPT + NEW) * cache_bytes("124M")
    yield row.measured(
        peak / 1e6,
        needed / 1e6,
        "weights and cache",
        samples={"bytes": [peak]},
        note=f"124M, loading included; a prompt of {PROMPT} tokens and {NEW} new tokens",
    )
