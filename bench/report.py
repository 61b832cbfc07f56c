"""The table of results, in Markdown and JSON. It is written after each row, so an interrupted run keeps its results."""

from __future__ import annotations

import json
import statistics
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from .rows import BANDWIDTH, Row

TITLES = {
    "machine": "The machine's limits",
    "ops": "Latency of ops, compared with the framework's own function",
    "prefill": "Prefill, compared with the bare matrix products",
    "decode": "Decode, one text",
    "batches": "A decode step of a batch, position 128 to 192",
    "compilations": "Compilations",
    "start": "Start",
    "memory": "Memory beyond the imported framework",
}
HEADER = "| backend | row | value | reference | value / reference | target, at most | |\n" + "| --- " * 7 + "|"
FILE = "README"  # the Markdown file is README.md, because code hosts show it with the folder


class Report:
    """The rows of one run, by key. A measured row replaces the planned row with the same key."""

    def __init__(self, out: Path, about: dict[str, str], *, quick: bool) -> None:
        self.out, self.about, self.quick = out, about, quick
        self.planned: dict[tuple[str, str, str], Row] = {}
        self.took: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order planned. All rows that memory limits are compared with the same bandwidth."""
        return [row.limited_by(self.bandwidth) for row in self.planned.values()]

    @property
    def bandwidth(self) -> float | None:
        """The GB/s at which memory is read: the median of all samples, which were taken in turn with the rows' others.

        A single burst, in which the memory was twice as fast as usual, does not change the median.
        """
        found = [rate for row in self.planned.values() for rate in row.samples.get(BANDWIDTH, ())]
        return statistics.median(found) if found else None

    def add(self, *rows: Row) -> None:
        """Add rows and write the files."""
        for row in rows:
            self.planned[row.key] = row
        self.write()
        if len(rows) == 1 and rows[0].value is not None:
            print("  ", *cells(rows[0].limited_by(self.bandwidth)), sep="  ", file=sys.stderr, flush=True)

    def write(self, seconds: float | None = None) -> None:
        """Write the Markdown and the JSON file. When the run is over, `seconds` is its duration."""
        self._replace(".json", json.dumps(self._everything(seconds), indent=1) + "\n")
        self._replace(".md", self._markdown(seconds))

    def _replace(self, suffix: str, text: str) -> None:
        file = self.out / (("benchmarks" if suffix == ".json" else FILE) + suffix)
        draft = file.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)

    def _everything(self, seconds: float | None) -> dict[str, Any]:
        return {
            "measured_with": self.about,
            "quick": self.quick,
            "seconds": seconds,
            "seconds_by_part": self.took,
            "rows": [row.to_dict() for row in self.rows],
        }

    def _markdown(self, seconds: float | None) -> str:
        with_bound = [row for row in self.rows if row.bound is not None]
        met, missed = (sum(row.met is verdict for row in with_bound) for verdict in (True, False))
        lines = [
            "# Benchmarks",
            "",
            "This file was written by `nox -s bench`. All sides of a row are measured in turn, and the best of",
            "several samples counts. The memory's bandwidth is measured in turn with them. The median of all its",
            "samples in the table counts for every row. A ratio below 1 means that ours is faster or smaller. Ratios",
            "are more reliable than absolute figures, which vary with the load of the machine. A target such as `1.05",
            "x + 0.5` allows 1.05 times the reference plus 0.5 units.",
            "",
            f"There are {len(with_bound)} targets: {met} met, {missed} missed, {len(with_bound) - met - missed} not "
            f"measured.{' Quick mode: few samples.' if self.quick else ''}",
            "",
            ", ".join(f"{name} {version}" for name, version in self.about.items()) + ".",
        ]
        lines += ["", f"The run took {seconds / 60:.0f} minutes."] if seconds is not None else []
        for group, rows in groupby(self.rows, lambda row: row.group):
            lines += ["", f"## {TITLES[group]}", "", HEADER, *(f"| {' | '.join(cells(row))} |" for row in rows)]
        return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    """Return the cells of a row of the table."""
    name = row.name + (f" ({row.note})" if row.note else "")
    bound = str(row.bound or "")
    if row.value is None:
        return [row.backend, name, f"not measured: {row.reason.replace('|', '/')}", "", "", bound, ""]
    beside = "" if row.reference is None else f"{_number(row.reference)} {row.reference_name}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return [row.backend, name, f"{_number(row.value)} {row.unit}", beside, ratio, bound, _verdict(row)]


def _verdict(row: Row) -> str:
    return {None: "", True: "met", False: "**missed**"}[row.met]


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"
