"""Prefill and batches, compared with the bare matrix products of the same shapes and with the memory's speed."""

from __future__ import annotations

from collections.abc import Iterator

from .clock import in_turn
from .rows import BANDWIDTH, Row
from .run import Run
from .worker import Worker

SEQ = 512
PROMPT, NEW = 128, 64
BATCHES = (8, 32)
ALL, LINEAR = f"{SEQ} tokens against all matrix products", f"{SEQ} tokens against the linear layers' alone"


def plan_prefill(backend: str) -> list[Row]:
    """Return the planned rows of a prefill."""
    return [Row("prefill", backend, name, "ms") for name in (ALL, LINEAR)]


def prefill(run: Run, backend: str) -> Iterator[Row]:
    """Measure the time from a prompt of 512 tokens to the first new token, which needs one row of logits."""
    directory, failures = run.checkpoint("124M"), {}
    with Worker() as worker:
        shape = {"name": backend, "shape": "124M"}
        sides = {
            "ours": lambda: worker.ask("model:generate", backend=backend, directory=directory, prompt=SEQ, new=1),
            "linear": lambda: worker.ask("products:linear_seconds", **shape, rows=SEQ, last=1),
            "attention": lambda: worker.ask("products:attention_seconds", **shape, seq=SEQ),
        }
        samples = in_turn(run.rounds, sides, failures)
        form = "" if failures else worker.ask("products:form", **shape, rows=SEQ, last=1)
    for row in plan_prefill(backend):
        if failures:
            yield row.failed("; ".join(failures.values()))
            continue
        counted = ("linear", "attention") if row.name == ALL else ("linear",)
        reference = sum(min(samples[side]) for side in counted)
        yield row.measured(min(samples["ours"]) * 1e3, reference * 1e3, "bare products", samples=samples, note=form)


def plan_batches(backend: str) -> list[Row]:
    """Return the planned rows of decode steps of batches."""
    return [Row("batches", backend, f"batch {batch}", "ms") for batch in BATCHES]


def batches(run: Run, backend: str) -> Iterator[Row]:
    """Measure a decode step of `pg.gpt2` for several texts at once, from position 128 to 192.

    A step reads every weight and the cached keys and values, and multiplies matrices. The reference is the time of this
    reading or the time of the multiplications, whichever is longer.
    """
    directory = run.checkpoint("124M")
    new = 8 if run.quick else NEW
    for batch, row in zip(BATCHES, plan_batches(backend), strict=True):
        failures: dict[str, str] = {}
        with Worker() as machine, Worker() as worker:
            step = {"backend": backend, "directory": directory, "batch": batch, "prompt": PROMPT, "new": new}
            products = {"name": backend, "shape": "124M", "rows": batch, "last": batch}
            sides = {
                BANDWIDTH: lambda: machine.ask("machine:bandwidth"),
                "ours": lambda step=step: worker.ask("model:batch_seconds", **step),
                "products": lambda products=products: worker.ask("products:linear_seconds", **products),
            }
            samples = in_turn(min(run.rounds, 3), sides, failures)
            form = "" if failures else worker.ask("products:form", **products)
        if failures:
            yield row.failed("; ".join(failures.values()))
            continue
        cached = batch * (PROMPT + new / 2) * cache_bytes("124M")
        yield row.measured(
            min(samples["ours"]) * 1e3,
            min(samples["products"]) * 1e3,
            "bare products",
            reads="weights and cache",
            n_bytes=weight_bytes("124M") + cached,
            samples=samples,
            note=form,
        )


def weight_bytes(shape: str) -> int:
    """Return the bytes of a model's float32 weights."""
    from portable_gpt2.params import count

    from .checkpoints import config

    return 4 * count(config(shape))


def cache_bytes(shape: str) -> int:
    """Return the bytes of one token's keys and values in float32."""
    from .checkpoints import config

    return 4 * 2 * config(shape).n_layer * config(shape).n_embd
