"""``portable-gpt2 fingerprint``: hashes of a model, which are equal on every framework and machine."""

from __future__ import annotations

import argparse
from typing import Any

from .. import strict_json
from ..fingerprint import TEXT
from . import streams
from .options import add_backend, add_source, add_special, allow_special, load


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "fingerprint",
        help="print hashes of a model that are equal on every framework and machine",
        description="Print the SHA-256 of a model's logits for a text, and of its weights. The logits are computed in "
        "the reproducible mode, so the hashes are the same on every backend, device and processor. Quote them to say "
        "which model was run, and that it was loaded correctly.",
    )
    add = parser.add_argument
    add("text", type=str, nargs="?", help=f"text that the model reads (default: {TEXT!r})")
    add_source(parser)
    add_backend(parser)
    add_special(parser, "the text")
    add("--json", action="store_true", help="write one JSON object, which also has the token ids")
    parser.set_defaults(run=run, reproducible=True, dtype="float32")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    streams.write("")
    model = load(arguments)
    streams.say(f"{model!r}, from {model.source}")
    found = model.fingerprint(arguments.text, allow_special=allow_special(arguments))
    if arguments.json:
        streams.write(strict_json.line(found._asdict()))
    else:
        streams.write(f"logits  {found.logits}\nweights {found.weights}\n")
    return 0
