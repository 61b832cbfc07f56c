"""``portable-gpt2 trace``: write the results of a model's ops to a file."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from ..comparison.sides import short_name, trace_model
from ..comparison.trace import check_target
from . import signals, streams
from .options import add_model, add_special, allow_special, load, progress


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "trace",
        help="write the results of a model's ops for a text to a file",
        description="Write the results of a model's ops for a text to a file, by their names, such as h3/ln_1. The "
        "file appears complete or not at all. `portable-gpt2 diff` compares it with a model or with another such file.",
    )
    add = parser.add_argument
    add("text", type=str, help="text that the model reads")
    add_model(parser)
    add_special(parser, "the text")
    add(
        "--names",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names of the results to write, or patterns such as '*/residual' (default: all results)",
    )
    add(
        "--weights",
        action="store_true",
        help="write the weights, too, which makes the file as large as a checkpoint; two traces can be compared op by "
        "op only if one of them has the weights",
    )
    add("-o", "--output", required=True, metavar="FILE", help="file to write, such as gpt2.npz or gpt2.safetensors")
    add("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    signals.clean_up_first()
    check_target(arguments.output, arguments.force)
    model = load(arguments)
    if model.tokenizer is None:
        raise ValueError(f"{arguments.model}: has no tokenizer, so that it cannot read a text")
    tokens = np.asarray([model.tokenizer.encode(arguments.text, allow_special=allow_special(arguments))])
    trace = trace_model(model, tokens, arguments.names, name=short_name(arguments.model), progress=progress)
    trace.save(arguments.output, force=arguments.force, weights=arguments.weights)
    streams.say(f"wrote {arguments.output}: {len(trace.arrays)} results for {tokens.shape[1]} tokens")
    return 0
