"""The benchmark's bounds and its reference figures, without a measurement."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench():
    """Import the package from the checkout, which must not be on sys.path: the tests use an installed copy."""
    spec = importlib.util.spec_from_file_location("bench", DIRECTORY / "__init__.py")
    sys.modules["bench"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def planned():
    from bench.__main__ import BACKENDS, GROUPS
    from bench.gpu import jobs

    plans = [plan(backend) for plan, _ in GROUPS.values() for backend in BACKENDS]
    plans += [job.rows for device in ("cuda:0", "cpu") for job in jobs(device, ["torch", "jax"], 0.0)]
    return [row for rows in plans for row in rows]


def report_of(rows, directory):
    from bench.report import Report

    report = Report(directory, {}, quick=False)
    report.add(*rows)
    return report


def limited_rows(*bandwidths):
    """Return measured rows that memory limits, each with its own samples of the bandwidth."""
    from bench.rows import BANDWIDTH, Row

    rows = [Row("machine", "-", "read bandwidth", "GB/s").measured(99.0, samples={BANDWIDTH: bandwidths[0]})]
    for backend, samples in zip(("numpy", "jax"), bandwidths[1:], strict=True):
        row = Row("decode", backend, "124M against the limit", "ms/token")
        rows.append(row.measured(30.0, reads="weights", n_bytes=500e6, samples={BANDWIDTH: samples, "ours": [30.0]}))
    return rows


def test_every_bound_is_read_by_a_row():
    """Catches a bound whose row was renamed, and one that an earlier pattern hides: neither would ever be missed."""
    from bench import bounds

    read = {id(row.bound) for row in planned() if row.bound is not None}
    assert [bound for bound in bounds.BOUNDS if id(bound) not in read] == []


def test_a_row_meets_its_bound_or_misses_it():
    """Catches a bound that is not read where the verdict is made."""
    from bench.bounds import find
    from bench.rows import Row

    row = Row("ops", "torch", "softmax 3x3", "us")
    most = find(*row.key).times * 10.0 + find(*row.key).plus
    assert row.measured(most - 0.01, 10.0).met is True
    assert row.measured(most + 0.01, 10.0).met is False
    assert Row("start", "numpy", "import beyond NumPy", "s").measured(1e3).met is False
    assert row.met is None


def test_one_bandwidth_serves_the_whole_table(tmp_path):
    """Catches a limit that a burst of the memory makes too small, and rows that are compared with different limits."""
    samples = [20.0, 22.0], [19.0, 66.0, 21.0], [20.0, 20.0, 23.0]
    report = report_of(limited_rows(*samples), tmp_path)
    bandwidth = statistics.median([rate for each in samples for rate in each])
    machine, *rows = report.rows
    assert machine.value == bandwidth == 20.5
    assert [row.reference for row in rows] == [pytest.approx(500 / bandwidth)] * 2
    assert {row.reference_name for row in rows} == {"weights read once"}
    assert f"{500 / bandwidth:.3g} weights read once" in (tmp_path / "README.md").read_text()


def test_a_larger_reference_is_kept():
    """Catches a batch that is compared with memory alone although its bare products take longer."""
    from bench.rows import Row

    row = Row("batches", "jax", "batch 8", "ms").measured(50.0, 40.0, "bare products", reads="weights", n_bytes=500e6)
    assert row.limited_by(20.0).reference == 40.0
    assert row.limited_by(10.0).reference == 50.0
    assert row.limited_by(10.0).reference_name == "weights read once"


def test_the_plot_has_its_line_where_the_table_has_its_limit(tmp_path, monkeypatch):
    """Catches a dashed line that stands at another limit than the one that the rows were compared with."""
    pytest.importorskip("matplotlib")
    from bench import plots

    lines = []

    def keep(figure, file):
        if file.name == "decode.png":
            lines.extend(line.get_xdata()[0] for line in figure.axes[0].lines)

    monkeypatch.setattr(plots, "_save", keep)
    report = report_of(limited_rows([20.0], [66.0], [10.0]), tmp_path)
    plots.draw(report.rows, tmp_path)
    assert lines == [report.rows[1].reference] == [25.0]


# One device, in a single call


def test_the_table_of_a_device_has_every_row(tmp_path):
    """Catches a row that is missing, or that says nothing, where the time is over; and a table that is not written."""
    from bench.gpu import RECORDED, jobs

    wanted = [(backend, op) for backend in ("torch", "jax") for op, _ in RECORDED]
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--seconds", "6", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=DIRECTORY.parent, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    planned_rows = [row for job in jobs("cpu", ["torch", "jax"], 0.0) for row in job.rows]
    assert [(row["group"], row["row"], row["backend"]) for row in rows] == [row.key for row in planned_rows]
    assert all((row["value"] is None) == bool(row["not_measured"]) for row in rows)
    assert "not run" not in {row["not_measured"] for row in rows}
    assert all(row["row"] in done.stdout for row in rows if "error / bound" not in row["row"])
    assert all(f"| {backend}, {op} | not measured |" in done.stdout for backend, op in wanted)


def test_a_device_is_asked_everything_that_was_promised():
    """Catches a question that is dropped from the plan: the table would be complete without it."""
    from bench.gpu import jobs

    planned_rows = {(row.backend, row.name) for job in jobs("cuda:0", ["torch", "jax"], 0.0) for row in job.rows}
    steps = [f"training, {batch} x 1024{part}" for batch in (8, 32) for part in ("", ": first step", ": peak memory")]
    decoding = [f"greedy, batch {batch}" for batch in (1, 32)] + [f"first token of {n}" for n in (128, 512, 1000)]
    decoding += ["sampled, batch 1", "kernels", "device time", "host time between steps"]
    for backend in ("torch", "jax"):
        wanted = [f"{d} {name}" for d in ("float32", "bfloat16") for name in (*decoding, *steps)]
        wanted += [f"{d} first text, with compilations" for d in ("float32", "bfloat16")]
        wanted += [f"largest error of {name}, float32" for name in ("exp", "tanh", "log")]
        wanted += ["bytes of text that differ from NumPy's", "bfloat16 losses of 50 steps against float32's"]
        wanted += ["sum of an array", "copy of an array", "tests that fail", "error / bound: attention, bfloat16"]
        wanted += ["is the built-in faster than the definition? softmax 12x1024x1024"]
        wanted += ["is the product faster than a convolution? conv1d 8x128x768 by 768x3072"]
        assert {(backend, name) for name in wanted} <= planned_rows
    peer = [*steps, "greedy, batch 1, eager", "greedy, batch 1, static cache, compiled"]
    peer = [f"{d} {name}" for d in ("float32", "bfloat16") for name in peer]
    assert {("transformers", name) for name in peer} <= planned_rows
    assert ("torch", "bfloat16 step by torch.compile in a graph of ours") in planned_rows


def test_a_text_that_differs_misses_its_target():
    """Catches a check that passes although the text differs: one byte, one that is missing, and one too many."""
    from bench.device import differences
    from bench.gpu import CHECKS, TEXT
    from bench.rows import Row

    assert differences(b"ROMEO", b"ROMEO") == 0
    assert [differences(b"ROMEO", other) for other in (b"ROMEo", b"ROME", b"ROMEO.")] == [1, 1, 1]
    assert Row(CHECKS, "torch", TEXT, "bytes").measured(0).met is True
    assert Row(CHECKS, "torch", TEXT, "bytes").measured(1).met is False


def test_a_job_that_fails_says_why(tmp_path):
    """Catches a failing row that ends the run, or that keeps the value of another."""
    from bench.gpu import Job, Table, run
    from bench.rows import Row
    from bench.worker import WorkerError

    def broken(ask, values):
        raise WorkerError("the reason")

    rows = [Row("trial speed", "torch", name, "ms") for name in ("one", "two", "three")]
    jobs = [Job("a", rows[:2], broken), Job("b", rows[2:], lambda ask, values: [rows[2].measured(1.0)])]
    table = Table(tmp_path / "gpu.json", "cpu")
    run(jobs, table, deadline=time.monotonic() + 60, reserved=0.0)
    assert [(row.value, row.reason) for row in table.rows.values()] == [(None, "the reason")] * 2 + [(1.0, "")]


def test_the_time_of_a_token_is_not_that_of_one_round():
    """Catches a difference of two samples of the same round, which noise makes too small, even negative."""
    from bench.device import per_token

    assert per_token({"long": [9.0, 5.0, 6.0], "short": [1.0, 8.0, 2.0]}, 4) == 1000.0
