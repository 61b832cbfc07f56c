"""The benchmark's bounds and its reference figures, without a measurement."""

import importlib.util
import statistics
import sys
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

    return [row for plan, _ in GROUPS.values() for backend in BACKENDS for row in plan(backend)]


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
