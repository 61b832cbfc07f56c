"""``portable-gpt2 convert``: write a checkpoint in Hugging Face's layout, or as a GGUF file."""

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
        help="write a checkpoint in the form that Hugging Face's transformers or llama.cpp reads",
        description="Write any checkpoint as a directory with config.json and model.safetensors or, if the name of DST "
        "ends in .gguf, as a GGUF file for llama.cpp. DST appears complete or not at all.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="directory of a checkpoint, GGUF file, or the name of a model of the hub, such as gpt2",
    )
    add("target", metavar="DST", help="directory or GGUF file to write, such as gpt2.gguf")
    add(
        "--dtype",
        help="dtype of the weights that are written: float32, float64, bfloat16 or float16 (default: the dtype of each "
        "weight in SRC); a GGUF file does not have float64, and its biases, gains and positions are in float32",
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
        arguments.source, arguments.target, dtype=arguments.dtype, force=arguments.force, progress=progress
    )
    streams.say(f"{arguments.target}: from {source}")
    return 0
