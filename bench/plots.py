"""Plots of the table of results, as PNG files. A row that was not measured leaves a gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .ops import BUILT_IN, CONV1D_TITLES, PRODUCT, SOFTMAX_TITLES
from .rows import Row

COLOURS = {"numpy": "#4c72b0", "jax": "#55a868", "torch": "#c44e52", "tensorflow": "#dd8452"}
BACKENDS = tuple(COLOURS)
GREY = "#8c8c8c"


def draw(rows: Iterable[Row], out: Path) -> None:
    """Plot the measured rows. If matplotlib is not installed, nothing is written."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    found = {row.key: row for row in rows if row.value is not None}
    for plot in (_decode, _positions, _limits, _ops, _questions):
        plot(found, out)


Found = Mapping[tuple[str, str, str], Row]


def _axes(width: float = 8.0, height: float = 4.5) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, file: Path) -> None:
    """Write a plot, unless it is empty."""
    import matplotlib.pyplot as plt

    if any(axes.patches or axes.get_legend() for axes in figure.axes):
        figure.savefig(file, dpi=120)
    plt.close(figure)


def _decode(found: Found, out: Path) -> None:
    """Plot the milliseconds per token of portable_gpt2 and of other libraries, and the time to read all weights."""
    bars: list[tuple[str, float, str]] = []
    limit = 0.0
    for backend in BACKENDS:
        ours = found.get(("decode", "124M against the limit", backend))
        if ours is None:
            continue
        bars.append((f"portable_gpt2 on {backend}", ours.value, COLOURS[backend]))
        limit = ours.reference  # the same for all backends
        for (group, _, owner), row in found.items():
            if group == "decode" and owner == backend != "numpy" and row.reference_name in ("transformers", "KerasHub"):
                bars.append((f"{row.reference_name} on {backend}", row.reference, GREY))
    if not bars:
        return
    figure, axes = _axes(height=1 + 0.4 * len(bars))
    names, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colours)
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("milliseconds per token (dashed: time to read all weights once)")
    axes.set_title("Decoding GPT-2 124M, float32, one text, greedy, position 128 to 192")
    _save(figure, out / "decode.png")


def _positions(found: Found, out: Path) -> None:
    """Plot the time of a token against its position."""
    figure, axes = _axes()
    for backend in BACKENDS:
        rows = [
            (int(name.split()[1]), row.value)
            for (group, name, owner), row in found.items()
            if group == "decode" and owner == backend and name.startswith("position ")
        ]
        if rows:
            axes.plot(*zip(*sorted(rows), strict=True), marker="o", color=COLOURS[backend], label=backend)
    if axes.lines:
        axes.set(xlabel="position (number of tokens before)", ylabel="milliseconds per token")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.set_title("Time of a token as the text grows (GPT-2 124M, float32, one text)")
    _save(figure, out / "positions.png")


def _limits(found: Found, out: Path) -> None:
    """Plot the measured values divided by the machine's limits, and the targets for these ratios."""
    places = {
        "decode\nbatch 1": ("decode", "124M against the limit"),
        "decode 355M\nbatch 1": ("decode", "355M against the limit"),
        "decode\nbatch 8": ("batches", "batch 8"),
        "decode\nbatch 32": ("batches", "batch 32"),
        "prefill\n512 tokens": ("prefill", "512 tokens against all matrix products"),
        "peak\nmemory": ("memory", "peak of a generation"),
    }
    figure, axes = _axes(9.0)
    _grouped(axes, {label: [found.get((*place, b)) for b in BACKENDS] for label, place in places.items()})
    axes.set_ylabel("ratio to the limit (black line: the target)")
    axes.set_title("Time / (time to read memory, or of bare matrix products); peak bytes / bytes of weights and cache")
    _save(figure, out / "limits.png")


def _ops(found: Found, out: Path) -> None:
    """Plot the ops' times, divided by those of the framework's own functions."""
    titles = [*SOFTMAX_TITLES, *CONV1D_TITLES]
    figure, axes = _axes(10.0)
    _grouped(axes, {_wrapped(title): [found.get(("ops", title, b)) for b in BACKENDS] for title in titles})
    axes.set_ylabel("time / time of the framework's own function\n(black line: the target)")
    axes.set_title("Ops, compared with the framework's own function, eager or compiled (NumPy: SciPy's softmax)")
    _save(figure, out / "ops.png")


def _questions(found: Found, out: Path) -> None:
    """Plot the answers to the two questions of the notebooks of 2019, which `ops` explains."""
    titles = [*(BUILT_IN + title for title in SOFTMAX_TITLES), *(PRODUCT + title for title in CONV1D_TITLES)]
    labels = [_wrapped(title.rpartition("? ")[2]) for title in titles]
    figure, axes = _axes(10.0)
    pairs = zip(labels, titles, strict=True)
    _grouped(axes, {label: [found.get(("ops", title, b)) for b in BACKENDS] for label, title in pairs})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("time / time of the alternative (log)")
    axes.set_title("Below 1: the built-in softmax, or the matrix product, is faster")
    _save(figure, out / "questions.png")


def _wrapped(title: str) -> str:
    return title.replace(" ", "\n", 1).replace(" by ", "\nby ")


def _grouped(axes: Any, groups: Mapping[str, list[Row | None]]) -> None:
    """Plot a group of bars for each label, one bar per backend, with a line at each row's target."""
    width = 0.8 / len(BACKENDS)
    for i, backend in enumerate(BACKENDS):
        label: str | None = backend
        for place, rows in enumerate(groups.values()):
            row = rows[i]
            if row is None or row.ratio is None:
                continue
            x = place + (i - (len(BACKENDS) - 1) / 2) * width
            bar = axes.bar(x, row.ratio, width * 0.9, color=COLOURS[backend], label=label)
            axes.bar_label(bar, fmt="%.3g", fontsize=7, padding=4)
            label = None  # one entry per backend in the legend
            if row.bound is not None:
                most = row.bound.times + row.bound.plus / row.reference
                axes.hlines(most, x - width * 0.45, x + width * 0.45, color="black", linewidth=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    if axes.patches:
        axes.legend(frameon=False, ncols=len(BACKENDS))
