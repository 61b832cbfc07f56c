"""``portable-gpt2 convert``: write a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import convert
from . import signals, streams
from .options import progress


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in the form that Hugging Face's transformers reads",
        description="Write any checkpoint as config.json and model.safetensors. The directory appears complete or not "
        "at all.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="directory of a checkpoint, or the name of a model of the hub, such as gpt2")
    add("directory", metavar="DST", help="directory to write")
    add(
        "--dtype",
        help="dtype of the weights that are written: float32, float64, bfloat16 or float16 (default: the dtype of each "
        "weight in SRC)",
    )
    add(
        "--force",
        action="store_true",
        help="replace the checkpoint in DST, which may be SRC; documents such as README.md stay",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    signals.clean_up_first()
    source = convert(
        arguments.source, arguments.directory, dtype=arguments.dtype, force=arguments.force, progress=progress
    )
    streams.say(f"{arguments.directory}: from {source}")
    return 0
