"""Plots of attention weights and of training, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import checks
from .files import check_writable, replacing

_PANEL = 2.2  # inches: the size of a plot in a grid
_LABELLED = 60  # the largest number of tokens whose labels fit on an axis
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"})


def draw_attention(weights: np.ndarray, tokens: Sequence[str], title: str) -> Any:
    """Plot attention weights: a row shows the weight that a query gives to the key of each column.

    Parameters
    ----------
    weights : float array [seq, seq]
        Each row sums to 1.
    tokens : strs
        The text of each token.
    title : str
        The title of the plot.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed. The message says what to install.
    """
    n = len(tokens)
    figure = _figure(2 + 0.22 * min(n, _LABELLED), 1.6 + 0.22 * min(n, _LABELLED))
    axes = figure.add_subplot()
    image = axes.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    axes.set_title(title)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    step = max(1, -(-n // _LABELLED))
    names = [token.translate(_VISIBLE) for token in tokens[::step]]
    axes.set_xticks(range(0, n, step), names, rotation=90)
    axes.set_yticks(range(0, n, step), names)
    figure.colorbar(image, label="weight", fraction=0.046)
    return figure


def draw_grid(maps: Mapping[str, np.ndarray], columns: int, title: str) -> Any:
    """Plot the attention weights [seq, seq] of several heads in a grid, each with its name.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = checks.integer("columns", columns, 1)
    rows = -(-len(maps) // columns)
    figure = _figure(_PANEL * columns, _PANEL * rows + 0.5)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, weights) in zip(grid, maps.items(), strict=False):
        axes.imshow(weights, cmap="viridis", vmin=0, vmax=1)
        axes.set_title(name, fontsize=8)
    figure.suptitle(textwrap.shorten(title, 80).replace("$", r"\$"))
    return figure


def draw_training(metrics: Iterable[Mapping[str, Any]], title: str = "") -> Any:
    """Plot the course of training over the steps: the losses, the norm of the gradient, and the learning rate.

    Parameters
    ----------
    metrics : dicts
        The metrics of each step, as `training.Run.metrics` returns them: ``step``, and those of ``loss``, ``held_out``,
        ``norm`` and ``rate`` that are known.
    title : str, optional
        The title of the plot.

    Returns
    -------
    matplotlib.figure.Figure
        Three plots with one axis of steps.
    """
    metrics = list(metrics)
    figure = _figure(7, 7.5)
    losses, norms, rates = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))

    def draw(axes: Any, name: str, label: str, **style: Any) -> None:
        found = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if found:
            label = f"{label}, at the end {found[-1][1]:.3f}" if label else ""
            axes.plot(*zip(*found, strict=True), label=label, **style)

    draw(losses, "loss", "training", linewidth=0.6, color="tab:blue")
    draw(losses, "held_out", "held-out", marker="o", color="tab:orange")
    draw(norms, "norm", "", linewidth=0.6, color="tab:blue")
    draw(rates, "rate", "", color="tab:blue")
    losses.set(ylabel="loss, nats per token", title=title.replace("$", r"\$"))
    norms.set(ylabel="norm of the\ngradient", yscale="log")
    rates.set(ylabel="learning rate", xlabel="step")
    if losses.lines:
        losses.legend()
    for axes in (losses, norms, rates):
        axes.grid(alpha=0.3)
    return figure


def check_file(file: str | os.PathLike[str]) -> None:
    """Refuse a file that `save` could not write, before anything is computed.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed. The message says what to install.
    ValueError
        If the name does not end in a format of matplotlib.
    OSError
        As for `files.check_writable`.
    """
    file, formats = checks.path("file", file), _figure(1, 1).canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        raise ValueError(f"{file}: the name must end in a format of matplotlib: {', '.join(sorted(formats))}")
    check_writable(file)


def save(figure: Any, file: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the file's name ends in; the file appears complete or not at all."""
    file = checks.path("file", file)
    with replacing(file) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box for the glyph
        figure.savefig(draft, dpi=150, format=file.suffix[1:].lower())


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib, which is needed for plots, is not installed: pip install 'portable-gpt2[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
