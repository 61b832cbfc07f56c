"""Run the benchmark: ``python -m bench [--quick] [--backends numpy torch] [--rows ops decode] [--out DIRECTORY]``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import compilations, decode, machine, ops, plots, process, throughput
from .report import Report
from .run import Run
from .worker import environment

BACKENDS = ("numpy", "jax", "torch", "tensorflow")

# The groups of rows, in the order measured. Each has a function that plans its rows and one that measures them.
GROUPS = {
    "machine": (machine.plan, machine.measure),
    "ops": (ops.plan, ops.measure),
    "prefill": (throughput.plan_prefill, throughput.prefill),
    "decode": (decode.plan, decode.measure),
    "batches": (throughput.plan_batches, throughput.batches),
    "compilations": (compilations.plan, compilations.measure),
    "start": (process.plan_start, process.start),
    "memory": (process.plan_memory, process.memory),
}


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("--quick", action="store_true", help="take a few minutes: measure fewer rounds and leave out slow rows")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="measure only these backends")
    add("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="measure only these groups of rows")
    add("--threads", type=int, default=2, help="number of processors for each side (default: 2)")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="directory of the results (default: docs/benchmarks)")
    chosen = parser.parse_args()

    processors = sorted(os.sched_getaffinity(0))[: chosen.threads]
    os.sched_setaffinity(0, processors)  # inherited by all processes that are started later
    os.environ.update(environment(len(processors)))

    partial = chosen.quick or set(chosen.backends) < set(BACKENDS) or set(chosen.rows) < set(GROUPS)
    out = chosen.out / "partial" if partial else chosen.out  # a partial run does not replace the whole table
    report = Report(out, machine.describe(len(processors)), quick=chosen.quick)
    for group, (plan, _) in GROUPS.items():
        for backend in BACKENDS:
            wanted = group in chosen.rows and backend in chosen.backends
            report.add(*(row if wanted else row.failed("not chosen in this run") for row in plan(backend)))

    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measured rows are still written and plotted
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            run = Run(Path(directory), quick=chosen.quick)
            for group in filter(chosen.rows.__contains__, GROUPS):
                for backend in chosen.backends:
                    started = time.perf_counter()
                    for row in GROUPS[group][1](run, backend):
                        report.add(row)
                    seconds = time.perf_counter() - started
                    report.took[f"{group}, {backend}"] = seconds
                    print(f"{group}, {backend}: {seconds:.0f} s", file=sys.stderr, flush=True)
    finally:
        report.write(time.perf_counter() - began)
        plots.draw(report.rows, out)
    print(out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
