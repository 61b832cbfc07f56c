"""Maps of attention and curves of losses, drawn by matplotlib (the extra ``plot``)."""

from __future__ import annotations

import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import checks
from .files import replacing

_PANEL = 2.2  # inches of a map in a grid
_LABELLED = 60  # tokens that have room for their names on an axis
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"})


def draw_attention(weights: np.ndarray, tokens: Sequence[str], title: str) -> Any:
    """Draw one map: each row is a query, and how much it weighs the key of each column.

    Parameters
    ----------
    weights : float array [seq, seq]
        Each row sums to 1.
    tokens : strs
        The text of each position.
    title : str
        What stands above.

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
    """Draw many maps side by side, each [seq, seq] under its name.

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


def draw_losses(metrics: Iterable[Mapping[str, Any]], title: str = "") -> Any:
    """Draw the loss of each step, and that of the held-out text.

    Parameters
    ----------
    metrics : dicts
        Of steps, as `training.Run.metrics` returns them: ``step`` and, of those that there are, ``loss``, ``held_out``.
    title : str, optional
        What stands above.

    Returns
    -------
    matplotlib.figure.Figure
    """
    metrics = list(metrics)
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for name, label, style in (("loss", "training", {"linewidth": 0.6}), ("held_out", "held-out", {"marker": "o"})):
        found = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if found:
            axes.plot(*zip(*found, strict=True), label=f"{label}, at the end {found[-1][1]:.3f}", **style)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def check_file(file: str | os.PathLike[str]) -> None:
    """Refuse a file that `save` could not write, before anything is drawn.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed. The message says what to install.
    ValueError
        If matplotlib knows no format of this name.
    OSError
        If there is no such directory (FileNotFoundError), it cannot be written to, or the file is a directory itself.
    """
    file, formats = checks.path("file", file), _figure(1, 1).canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        raise ValueError(f"{file}: the name ends in no format that can be drawn: {', '.join(sorted(formats))}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory")
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a directory; expected the name of a file")
    try:
        tempfile.TemporaryDirectory(prefix=".plot-", dir=file.parent).cleanup()
    except OSError as error:
        raise OSError(f"{file.parent}: cannot be written to: {error.strerror}") from error


def save(figure: Any, file: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the file's name ends in; the file appears complete or not at all."""
    file = checks.path("file", file)
    with replacing(file) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure.savefig(draft, dpi=150, format=file.suffix[1:].lower())


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib is not installed, which draws: pip install 'portable-gpt2[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
