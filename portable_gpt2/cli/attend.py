"""``portable-gpt2 attend``: plot attention weights."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..registry import to_numpy
from . import signals, streams
from .options import add_model, add_special, allow_special, index_or_all, load


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "attend",
        help="plot the attention weights of a text",
        description="Plot the attention weights of a text. Each row belongs to one token, and shows how much that "
        "token attends to the token of each column.",
    )
    add = parser.add_argument
    add("text", type=str, help="text that the model reads")
    add_model(parser)
    add_special(parser, "the text")
    for name in ("layer", "head"):
        text = f"number of a {name}, from 0, or all (default: all)"
        add(f"--{name}", type=index_or_all, default="all", metavar="N|all", help=text)
    add("-o", "--output", required=True, metavar="FILE", help="file to write, such as attention.png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from .. import plot

    signals.clean_up_first()
    plot.check_file(arguments.output)
    model = load(arguments)
    layers = _indices("layer", arguments.layer, model.config.n_layer)
    heads = _indices("head", arguments.head, model.config.n_head)
    special = allow_special(arguments)
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
