"""``portable-gpt2 certify``: enclosures of the exact logits of a text, and what they prove."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from .. import strict_json
from ..certificate import certify
from ..language_model import GPT2
from . import streams
from .options import add_model, add_special, allow_special, at_least, load, progress


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "certify",
        help="prove which token has the largest logit, and how far computed logits are from the exact ones",
        description="Enclose the exact logits of a text by ball arithmetic. Write, for each position, the token with "
        "the largest exact logit, and the largest error of the logits that the model computes on its backend in its "
        "dtype.",
    )
    add = parser.add_argument
    add("text", type=str, help="text that the model reads")
    add_model(parser)
    add_special(parser, "the text")
    add(
        "--max-new-tokens",
        type=at_least(0),
        default=0,
        metavar="N",
        help="continue the text greedily by N tokens, and prove that each of them has the largest exact logit "
        "(default: 0)",
    )
    add(
        "--radius",
        type=float,
        default=1e-30,
        metavar="X",
        help="largest permitted distance of an exact logit to the midpoint of its enclosure; the working precision is "
        "doubled until it is reached (default: 1e-30)",
    )
    add(
        "--original-weights",
        action="store_true",
        help="enclose the logits of the weights of the checkpoint, and not of the weights that were rounded to the "
        "dtype of the computation",
    )
    add("--json", action="store_true", help="write one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    streams.write("")
    model = load(arguments)
    streams.say(f"{model!r}, from {model.source}")
    weights = None
    if arguments.original_weights:
        weights = GPT2.load(arguments.model, backend="numpy", dtype="float64", progress=progress)
    certificate = certify(
        model,
        arguments.text,
        max_new_tokens=arguments.max_new_tokens,
        radius=arguments.radius,
        weights=weights,
        allow_special=allow_special(arguments),
        progress=partial(progress, what="certifying", unit="results"),
    )
    streams.write(strict_json.line(certificate.summary()) if arguments.json else f"{certificate}\n")
    return 0
