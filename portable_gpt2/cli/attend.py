"""``portable-gpt2 attend``: plot attention weights."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..files import check_new
from ..registry import to_numpy
from . import signals, streams
from .options import add_model, add_special, allow_special, index_or_all, load


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "attend",
        help="show which tokens the model attends to",
        description="Write the attention weights of a text as a page for a browser or as a plot. On a page, point at a "
        "token to see where it attends, and choose a layer and a head. In a plot, each row belongs to one token, and "
        "shows how much that token attends to the token of each column. Plots need pip install 'portable-gpt2[plot]'.",
    )
    add = parser.add_argument
    add("text", type=str, help="text that the model reads")
    add_model(parser)
    add_special(parser, "the text")
    for name in ("layer", "head"):
        text = f"number of a {name}, from 0, or all (default: all)"
        add(f"--{name}", type=index_or_all, default="all", metavar="N|all", help=text)
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="file to write: a page, attention.html; or a plot, attention.png, .svg or .pdf",
    )
    add("--force", action="store_true", help="replace a page that exists; a plot is always replaced")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from .. import pages, plot

    signals.clean_up_first()
    is_page = Path(arguments.output).suffix.lower() in (".html", ".htm")
    if is_page:
        check_new(Path(arguments.output), arguments.force)
    else:
        plot.check_file(arguments.output)
    model = load(arguments)
    layers = _indices("layer", arguments.layer, model.config.n_layer)
    heads = _indices("head", arguments.head, model.config.n_head)
    special = allow_special(arguments)
    if is_page:
        page = pages.attention(model, arguments.text, layers=layers, heads=heads, allow_special=special)
        page.save(arguments.output, force=arguments.force)
        streams.say(f"wrote {arguments.output}")
        return 0
    traced = model.trace(arguments.text, names=["*/attn/weights"], allow_special=special)
    maps = {f"layer {i}, head {j}": to_numpy(traced[f"h{i}/attn/weights"])[0, j] for i in layers for j in heads}
    if len(maps) == 1:
        assert model.tokenizer is not None  # if the model has no tokenizer, `trace` has refused the text
        ((name, weights),) = maps.items()
        tokens = model.tokenizer.encode(arguments.text, allow_special=special)
        figure = plot.draw_attention(weights, [model.tokenizer.decode([token]) for token in tokens], name)
    else:
        columns = len(heads) if len(heads) > 1 else math.isqrt(len(maps) - 1) + 1
        figure = plot.draw_grid(maps, columns, arguments.text)
    plot.save(figure, arguments.output)
    streams.say(f"wrote {arguments.output}")
    return 0


def _indices(name: str, chosen: int | str, n: int) -> range | list[int]:
    """Return the indices of the layers or heads that an option chooses."""
    if isinstance(chosen, str):
        return range(n)
    if not 0 <= chosen < n:
        raise ValueError(f"there is no {name} {chosen}; the model has {n}, from 0")
    return [chosen]
