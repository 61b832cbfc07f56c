"""Check and measure one device in a single call, without a network: ``python -m bench.gpu [--device cuda:0]``.

    pip install --no-index --no-deps portable_gpt2-*.whl            # next to torch, jax, pytest, hypothesis, ...
    git archive HEAD bench tests pyproject.toml | tar x -C ROOM     # or a checkout: its own packages are not imported
    cd ROOM && python -m bench.gpu --device cuda:0 --out results    # at most 8 minutes; writes results/gpu.json

The most important rows come first, and the file is written after each row. When no time is left, the remaining rows say
so. With ``--device cpu``, small models are used, so that the whole table takes a few minutes on a laptop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from . import machine, ops
from .device import per_token
from .report import HEADER, cells
from .rows import Row
from .worker import ROOM, Worker, WorkerError

BACKENDS = ("torch", "jax")
PEER = "transformers"
DTYPES = ("float32", "bfloat16")
CHECKS, SPEED, TRIAL = "device checks", "device speed", "trial speed"  # a trial has no targets of speed
NO_TIME = "no time left"
FOR_TESTS = 0.35  # the part of the time that is reserved for the tests
LATE = 0.92  # the tests end at this part of the time, so that the last rows still get some
LOSSES = "bfloat16 losses of 50 steps against float32's"
TEXT = "bytes of text that differ from NumPy's"
FAILURES = "tests that fail"
ERROR = "error / bound: "
# What the tests record for every dtype, and what they record for float32.
OPS = (
    "conv1d",
    "softmax",
    "gelu",
    "layer_norm",
    "attention",
    "attention_scores",
    "attention_weights",
    "unembed",
    "cross_entropy",
    "gpt2",
)
FUNCTIONS = ("exp", "tanh", "log", "gradient")
RECORDED_IN = ("float32", "bfloat16", "float16")
RECORDED = [(op, dtype) for op in OPS for dtype in RECORDED_IN] + [(op, "float32") for op in FUNCTIONS]


class Size(NamedTuple):
    """How much is measured."""

    shape: str
    prompts: tuple[int, ...]
    new: int
    rounds: int
    batch: int
    windows: tuple[tuple[int, int], ...]
    """The batches of a training step: the number of windows, and their length."""
    steps: int
    megabytes: int
    points: int
    questions: tuple[str, ...]


QUESTIONS = tuple(row.name for row in ops.plan("torch") if row.name.startswith((ops.BUILT_IN, ops.PRODUCT)))
FULL = Size("124M", (128, 512, 1000), 64, 3, 32, ((8, 1024), (32, 1024)), 5, 600, 2_000_000, QUESTIONS)
SMALL = Size("tiny", (128, 512, 1000), 16, 2, 4, ((2, 64), (4, 64)), 3, 40, 100_000, QUESTIONS[:1] + QUESTIONS[4:5])

Ask = Callable[..., Any]


class Job(NamedTuple):
    """Some rows that are measured together."""

    worker: str
    """The name of the process that measures. Jobs of one process share models and compiled functions."""
    rows: list[Row]
    measure: Callable[[Ask, dict[Any, float]], list[Row]]
    """A function of `Worker.ask` and of the values so far, by backend and name. It returns the measured rows."""


def main() -> int:
    """Run all jobs; return the exit status, which is 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("--device", default="cuda:0", help="the device, such as cuda:0 or cpu (default: cuda:0)")
    add("--out", type=Path, default=Path("."), help="the JSON file, or a directory for gpu.json (default: .)")
    add("--seconds", type=float, default=480, help="time for everything (default: 480)")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="measure only these backends")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.seconds
    os.environ.update(
        XLA_PYTHON_CLIENT_PREALLOCATE="false", HF_HUB_OFFLINE="1", TF_CPP_MIN_LOG_LEVEL="3", PYTHONWARNINGS="ignore"
    )
    file = chosen.out if chosen.out.suffix == ".json" else chosen.out / "gpu.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = Table(file, chosen.device)
    plan = list(jobs(chosen.device, chosen.backends, deadline - (1 - LATE) * chosen.seconds))
    for job in plan:
        table.add(*job.rows)
    run(plan, table, deadline, FOR_TESTS * chosen.seconds)
    print(table.text())
    print(file)
    return int(any(row.group == CHECKS and row.met is False for row in table.rows.values()))


class Table:
    """The rows by key, and the file that they are written to."""

    def __init__(self, file: Path, device: str) -> None:
        self.file, self.device = file, device
        self.about = machine.describe(len(os.sched_getaffinity(0)))
        self.rows: dict[Any, Row] = {}
        self.started = time.monotonic()

    def add(self, *rows: Row) -> None:
        """Add or replace rows, and write the file."""
        self.rows |= {row.key: row for row in rows}
        found = {
            "measured_with": self.about,
            "device": self.device,
            "seconds": time.monotonic() - self.started,
            "rows": [row.to_dict() for row in self.rows.values()],
        }
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(self.file)

    def values(self) -> dict[Any, float]:
        """Return the measured values by backend and name of the row."""
        return {(row.backend, row.name): row.value for row in self.rows.values() if row.value is not None}

    def text(self) -> str:
        """Return the table in Markdown. The errors have one line per op, with all dtypes."""
        about = ", ".join(f"{name} {version}" for name, version in self.about.items())
        plain = [row for row in self.rows.values() if not row.name.startswith(ERROR)]
        lines = [f"{self.device}: {about}.", "", HEADER, *(f"| {' | '.join(cells(row))} |" for row in plain), ""]
        lines += [
            "| largest error / bound | " + " | ".join(RECORDED_IN) + " |",
            "| --- " * (1 + len(RECORDED_IN)) + "|",
        ]
        for backend in dict.fromkeys(row.backend for row in self.rows.values() if row.name.startswith(ERROR)):
            for op in (*OPS, *FUNCTIONS):
                found = [self.rows.get((CHECKS, f"{ERROR}{op}, {dtype}", backend)) for dtype in RECORDED_IN]
                lines.append(f"| {backend}, {op} | {' | '.join(map(_ratio, found))} |")
        return "\n".join(lines)


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return "not measured" if row.value is None else f"{row.value:.3g}{' **missed**' * (row.met is False)}"


def run(plan: list[Job], table: Table, deadline: float, reserved: float) -> None:
    """Run the jobs in order. Before the tests, `reserved` seconds are left for them; rows without time are skipped.

    The skipped rows are tried once more after the tests.
    """
    workers: dict[str, Worker] = {}
    tests = [job for job in plan if job.worker == "tests"]
    skipped: list[Job] = []
    for is_late, some in ((False, [job for job in plan if job not in tests]), (True, tests), (True, skipped)):
        for place, job in enumerate(some):
            left = deadline - time.monotonic() - (0 if is_late or not tests else reserved)
            if left < 2:
                if not is_late:
                    skipped.append(job)
                table.add(*(row.failed(NO_TIME) for row in job.rows))
                continue
            until = time.monotonic() + left

            def ask(function: str, _until: float = until, _name: str = job.worker, **arguments: Any) -> Any:
                worker = workers[_name] if _name in workers else workers.setdefault(_name, Worker())
                return worker.ask(function, limit=max(0.1, _until - time.monotonic()), **arguments)

            try:
                measured = job.measure(ask, table.values())
            except (WorkerError, OSError, KeyError) as error:
                reason = NO_TIME if time.monotonic() >= until - 0.1 else f"{error}"
                measured = [row.failed(reason) for row in job.rows]
                if (worker := workers.get(job.worker)) and worker.process.poll() is not None:
                    workers.pop(job.worker).__exit__()
            table.add(*measured)
            for row in measured:
                print("  ", *cells(row), sep="  ", file=sys.stderr, flush=True)
            later = {job.worker for job in some[place + 1 :]}
            for name in [name for name in workers if name not in later]:  # frees the memory of its models
                workers.pop(name).__exit__()


def jobs(device: str, backends: list[str], tests_until: float) -> Iterator[Job]:
    """Yield the jobs, the most important first."""
    is_full = device != "cpu"
    size, speed = (FULL, SPEED) if is_full else (SMALL, TRIAL)
    for backend in backends:
        yield _checks(backend, device, size, speed)
    for backend in backends:
        for dtype in DTYPES:
            yield from _decoding(backend, device, dtype, size, speed)
    for windows in size.windows:
        for side in (PEER, *backends):  # a first step of JAX takes longest, so its larger batch comes last
            for dtype in reversed(DTYPES):
                if side != "jax" or windows == size.windows[0]:
                    yield _training(side, device, dtype, *windows, size, speed)
    for dtype in DTYPES:
        yield _peer(device, dtype, False, size, speed)
    yield _losses(PEER, device, size)
    for backend in backends:
        yield _losses(backend, device, size)
        yield _functions(backend, device, size)
        yield _tests(backend, device, tests_until, len(backends))
    for backend in backends:
        yield from _questions(backend, device, size, speed)
    if "torch" in backends:
        for dtype in DTYPES:
            yield _compiled(device, dtype, size, speed)
    for dtype in DTYPES:
        yield _peer(device, dtype, True, size, speed)
    if "jax" in backends:
        for dtype in reversed(DTYPES):
            yield _training("jax", device, dtype, *size.windows[1], size, speed)


def _checks(backend: str, device: str, size: Size, speed: str) -> Job:
    rows = [
        Row(CHECKS, backend, TEXT, "bytes"),
        Row(speed, backend, "sum of an array", "GB/s"),
        Row(speed, backend, "copy of an array", "GB/s"),
    ]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        where = {"backend": backend, "device": device}
        note = "; ".join(ask("device:describe", **where).values())
        rates = ask("device:bandwidth", **where, megabytes=size.megabytes)
        text = rows[0].measured(ask("device:differing_bytes", **where), note=note)
        return [text, *(row.measured(rate) for row, rate in zip(rows[1:], rates, strict=True))]

    return Job(backend, rows, measure)


def _decoding(backend: str, device: str, dtype: str, size: Size, speed: str) -> Iterator[Job]:
    where = {"backend": backend, "device": device, "shape": size.shape, "dtype": dtype}
    prompt, worker = size.prompts[0], f"{backend} {dtype}"

    def job(name: str, unit: str, measure: Callable[[Row, Ask, dict[Any, float]], Row]) -> Job:
        row = Row(speed, backend, f"{dtype} {name}", unit)
        return Job(worker, [row], lambda ask, values: [measure(row, ask, values)])

    def first(row: Row, ask: Ask, values: dict[Any, float]) -> Row:
        return row.measured(ask("device:text_seconds", **where, prompt=prompt, new=1 + size.new))

    def greedy(row: Row, ask: Ask, values: dict[Any, float]) -> Row:
        samples = ask("device:token_ms", **where, prompt=prompt, new=size.new, rounds=size.rounds)
        rates = [values[key] for key in values if key[1] in ("sum of an array", "copy of an array")]
        limit = ask("device:weight_bytes", **where) / max(rates) / 1e6 if rates else None
        return row.measured(per_token(samples, size.new), limit, "weights read once", samples=samples)

    def sampled(row: Row, ask: Ask, values: dict[Any, float]) -> Row:
        samples = ask("device:token_ms", **where, prompt=prompt, new=size.new, rounds=size.rounds, sampled=True)
        other = values.get((backend, f"{dtype} greedy, batch 1"))
        return row.measured(per_token(samples, size.new), other, "greedy", samples=samples)

    def batch(row: Row, ask: Ask, values: dict[Any, float]) -> Row:
        counts = {"batch": size.batch, "prompt": prompt, "new": size.new, "rounds": size.rounds}
        samples = ask("device:batch_ms", **where, **counts)
        other = values.get((backend, f"{dtype} greedy, batch 1"))
        return row.measured(per_token(samples, size.new), other, "batch 1", samples=samples)

    yield job("first text, with compilations", "s", first)
    yield job("greedy, batch 1", "ms/token", greedy)
    yield job("sampled, batch 1", "ms/token", sampled)
    yield job(f"greedy, batch {size.batch}", "ms/step", batch)
    counted = [
        Row(speed, backend, f"{dtype} kernels", "per token"),
        Row(speed, backend, f"{dtype} device time", "ms/token"),
        Row(speed, backend, f"{dtype} host time between steps", "ms/token"),
    ]

    def profile(ask: Ask, values: dict[Any, float]) -> list[Row]:
        found = ask("device:profile", **where, prompt=prompt, new=min(size.new, 16))
        names = ("kernels", "device ms", "host ms")
        absent = "no clock of the device on a CPU"
        return [
            row.measured(found[k]) if k in found else row.failed(absent) for row, k in zip(counted, names, strict=True)
        ]

    yield Job(worker, counted, profile)
    for n in size.prompts:

        def prefill(row: Row, ask: Ask, values: dict[Any, float], n: int = n) -> Row:
            samples = ask("device:first_token_ms", **where, prompt=n, rounds=size.rounds)
            return row.measured(min(samples), samples={"ours": samples})

        yield job(f"first token of {n}", "ms", prefill)


def _training(side: str, device: str, dtype: str, batch: int, length: int, size: Size, speed: str) -> Job:
    name = f"{dtype} training, {batch} x {length}"
    rows = [
        Row(speed, side, name, "ms/step"),
        Row(speed, side, f"{name}: first step", "s"),
        Row(speed, side, f"{name}: peak memory", "GB"),
    ]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        steps = {"shape": size.shape, "device": device, "dtype": dtype, "batch": batch, "length": length}
        steps["steps"] = 3 + size.steps
        own = {} if side == PEER else {"backend": side}
        seconds = ask("device:peer_train" if side == PEER else "device:train", **own, **steps)["seconds"]
        memory = ask("device:peak_gigabytes", backend=side, device=device)
        best = min(seconds[3:])
        against = {"torch": PEER, "jax": "torch"}.get(side, "")
        other = values.get((against, name))
        row = rows[0].measured(best * 1e3, other, against, note=f"{batch * length / best:.0f} tokens/s")
        first = rows[1].measured(seconds[0])
        return [row, first, rows[2].failed("not counted on a CPU") if memory is None else rows[2].measured(memory)]

    return Job(f"{side} training {dtype} {batch}", rows, measure)


def _peer(device: str, dtype: str, static: bool, size: Size, speed: str) -> Job:
    kind = "static cache, compiled" if static else "eager"
    rows = [
        Row(speed, PEER, f"{dtype} greedy, batch 1, {kind}", "ms/token"),
        Row(speed, PEER, f"{dtype} first text, {kind}", "s"),
    ]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        text = {"device": device, "shape": size.shape, "dtype": dtype, "prompt": size.prompts[0], "new": size.new}
        if static and device == "cpu":
            return [row.failed("transformers compiles its step on a GPU only") for row in rows]
        found = ask("device:peer_token_ms", **text, rounds=size.rounds, static=static)
        value = per_token(found["samples"], size.new)
        return [rows[0].measured(value, samples=found["samples"]), rows[1].measured(found["first"])]

    return Job(f"{PEER} {dtype} {kind}", rows, measure)


def _losses(side: str, device: str, size: Size) -> Job:
    row = Row(CHECKS, side, LOSSES, "nats")

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        shape = "small" if device != "cpu" else "tiny"
        given = {"side": side, "device": device, "shape": shape, "batch": 4, "length": 64}
        return [row.measured(ask("device:loss_difference", **given, steps=50), values.get((PEER, LOSSES)), PEER)]

    return Job(f"{side} losses", [row], measure)


def _functions(backend: str, device: str, size: Size) -> Job:
    rows = [Row(CHECKS, backend, f"largest error of {name}, float32", "u") for name in FUNCTIONS[:3]]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        found = ask("device:function_errors", backend=backend, device=device, points=size.points)
        given = zip(rows, FUNCTIONS, strict=False)
        note = f"{size.points} points"
        return [row.measured(found[name][0], found[name][1], "stated", note=note) for row, name in given]

    return Job(f"{backend} losses", rows, measure)


def _questions(backend: str, device: str, size: Size, speed: str) -> Iterator[Job]:
    for name in size.questions:
        row = Row(speed, backend, name, "us")

        def measure(ask: Ask, values: dict[Any, float], row: Row = row) -> list[Row]:
            given = {"name": backend, "row": row.name, "quick": True, "device": device}
            return [row.measured(**ask("ops:measure_one", **given))]

        yield Job(f"{backend} questions", [row], measure)


def _compiled(device: str, dtype: str, size: Size, speed: str) -> Job:
    name = f"{dtype} step by torch.compile in a graph of ours"
    rows = [Row(speed, "torch", name, "ms/token"), Row(speed, "torch", f"{name}: compilation", "s")]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        if not device.startswith("cuda"):
            return [row.failed("only CUDA records a graph") for row in rows]
        text = {"device": device, "shape": size.shape, "dtype": dtype, "prompt": size.prompts[0], "new": size.new}
        step, compiling = ask("device:compiled_step_ms", **text)
        ours = values.get(("torch", f"{dtype} greedy, batch 1"))
        return [rows[0].measured(step, ours, "stream_ids"), rows[1].measured(compiling)]

    return Job(f"torch compile {dtype}", rows, measure)


# The tests


def _tests(backend: str, device: str, until: float, shares: int) -> Job:
    rows = [Row(CHECKS, backend, FAILURES, "tests")]
    rows += [Row(CHECKS, backend, f"{ERROR}{op}, {dtype}", "") for op, dtype in RECORDED]

    def measure(ask: Ask, values: dict[Any, float]) -> list[Row]:
        left = until - time.monotonic()
        seconds = left / shares if backend == BACKENDS[0] else left
        if seconds < 20:
            return [row.failed(NO_TIME) for row in rows]
        found, crashes, late = _run_tests(backend, device, seconds)
        ratios: dict[tuple[str, str], float] = {}
        for each in found:
            for op, _, dtype, ratio in each["ratios"]:
                ratios[op, dtype] = max(ratio, ratios.get((op, dtype), 0.0))
        failed = [name for each in found for name in each["failed"]] + crashes
        passed, left_out = (sum(each[key] for each in found) for key in ("passed", "not_run"))
        note = f"{passed} passed, {left_out} not run" + (f", no time for {', '.join(late)}" if late else "")
        note += "".join(f"; {name}" for name in failed[:6])
        first = rows[0].measured(len(failed), note=note) if passed else rows[0].failed(f"no test passed: {note}")
        missing = f"no test recorded it ({passed} passed, {left_out} not run)"
        more = [
            row.measured(ratios[key]) if key in ratios else row.failed(missing)
            for row, key in zip(rows[1:], RECORDED, strict=True)
        ]
        return [first, *more]

    return Job("tests", rows, measure)


def _run_tests(backend: str, device: str, seconds: float) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Run the tests of the kit and of ours that are marked gpu, of one backend on a device: a process for each file.

    Return the results that conftest wrote for each file, the files whose process died, and those without time left.
    """
    spec = importlib.util.find_spec("portable_gpt2.testing")
    assert spec is not None
    kit = [file for place in spec.submodule_search_locations or [] for file in Path(place).glob("*/test_*.py")]
    of_both = sorted(kit) + sorted(ROOM.glob("tests/test_*.py"))
    files = [file for file in of_both if "pytest.mark.every_device" in file.read_text()]
    files += [ROOM / "tests" / f"test_{name}.py" for name in ("devices", "cuda_graphs")]
    at_once = max(2, len(os.sched_getaffinity(0)) // 2)
    ends = time.monotonic() + seconds
    found, crashes, late = [], [], []
    profile = {} if device != "cpu" else {"HYPOTHESIS_PROFILE": "few"}
    some = (
        [] if device != "cpu" else ["-k", "error_bound or errs_by or loss_agree or logits or stray"]
    )  # those that record

    def one(file: Path) -> None:
        left = ends - time.monotonic()
        if left < 15:
            late.append(file.name)
            return
        with tempfile.TemporaryDirectory() as room:
            record = Path(room, "record.json")
            options = ["-q", "-m", "gpu", f"--device={device}", f"--backend={backend}", "-p", "no:cacheprovider"]
            options += ["-c", str(ROOM / "pyproject.toml")]  # the files of the kit are outside of the checkout
            options += [f"--record={record}", f"--seconds={max(1.0, left - 10)}", *some, str(file)]
            command = [sys.executable, "-P", "-m", "pytest", *options]
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOM,
                    env={**os.environ, **profile},
                    capture_output=True,
                    text=True,
                    timeout=max(1, left),
                )
                last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), done.stderr[-200:])
            except subprocess.TimeoutExpired:
                late.append(file.name)
                return
            if record.exists():
                found.append(json.loads(record.read_text()))
            else:
                crashes.append(f"{file.name}: {last}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, files))
    return found, crashes, late


if __name__ == "__main__":
    sys.exit(main())
