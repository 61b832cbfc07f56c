"""``portable-gpt2 export``: write a model as a graph of ONNX."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import read_checkpoint
from ..export import GRAPHS, export
from . import signals, streams


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "export",
        help="write a model as a file of ONNX, which runs without Python",
        description="Write a model as a graph of ONNX, for any number of texts of any length. The file appears "
        "complete or not at all.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="directory of a checkpoint, or the name of a model of the hub, such as gpt2")
    add("path", metavar="FILE", help="file to write, such as gpt2.onnx")
    add(
        "--what",
        choices=GRAPHS,
        default="logits",
        help="logits: from tokens to the logits after each token; step: from tokens and a cache to the logits after "
        "the last token and the extended cache (default: logits)",
    )
    add("--dtype", default="float32", help="dtype of the weights: float32, float64 or float16 (default: float32)")
    add(
        "--external-data",
        action="store_true",
        help="write the weights to a second file, FILE.data, as is always done if they take more than 2 GB",
    )
    add("--force", action="store_true", help="replace FILE, and FILE.data, if they exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    signals.clean_up_first()
    found = read_checkpoint(arguments.source, tokenizer=None)
    written = export(
        arguments.path,
        found.config,
        found.tensors,
        what=arguments.what,
        dtype=arguments.dtype,
        external_data=arguments.external_data,
        force=arguments.force,
    )
    streams.say(f"{' and '.join(map(str, written))}: from {found.source}")
    return 0
