"""``portable-gpt2 diff``: where two models part."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import strict_json
from ..comparison.compare import compare
from ..comparison.page import page
from ..comparison.report import report
from ..comparison.sides import Side, open_side
from ..comparison.trace import is_trace
from ..files import check_new, write_text
from . import signals, streams
from .options import add_computation, add_reproducible, add_special, allow_special, progress
from .texts import Texts

_PART = 1
"""The exit status if the models part, or if it is not known whether rounding explains a difference."""

_STDOUT = "-"

_TEXT = """In 1687 Newton wrote that every body keeps its state of rest, or of uniform motion in a straight line.
"Is that so?" asked the student. "Then why does my cup of tea stop moving when I stop pushing it?" """
"""The text that two models read unless another is given."""


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "diff",
        help="find where two models part",
        description="Compare two models: their weights, the result of each operation, and the growth of the difference "
        "from layer to layer. A is the reference. Each operation of B is computed again in higher precision from the "
        "inputs that it had in B. An error that is larger than rounding can cause shows which operation is wrong. The "
        "exit status is 0 if rounding explains every difference, 1 if the models part or if it is not known whether "
        "rounding explains a difference, and 2 after wrong use or another error.",
    )
    add = parser.add_argument
    side = (
        "directory of a checkpoint; name of a model of the Hugging Face hub, such as gpt2; or file of a trace, .npz or "
        ".safetensors, as `portable-gpt2 trace` writes it"
    )
    add("a", metavar="A", help=f"the reference: {side}")
    add("b", metavar="B", help="the model that is judged, in one of the forms of A")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text",
        type=str,
        help="text that both models read (default: the tokens of a trace; or else a short English text that comes with "
        "this package)",
    )
    text.add_argument("--text-file", metavar="FILE", help="file with the text in UTF-8; - is stdin")
    add_special(parser, "the text")
    add_computation(parser)
    add_reproducible(parser)
    for name, metavar in (("backend", "NAME"), ("device", "DEVICE"), ("dtype", "DTYPE")):
        add(f"--{name}-b", metavar=metavar, help=f"{name} of B, if it differs from that of A (default: --{name})")
    add(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write all findings to FILE as one JSON object, in which a number that is not finite is null; without "
        "FILE, write the object to stdout, and no tables",
    )
    add(
        "--html",
        metavar="FILE",
        help="write a page with curves and a heat map, which a browser shows offline",
    )
    add("--force", action="store_true", help="replace the files of --json and --html if they exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    streams.write("")
    files = [Path(file) for file in (arguments.json, arguments.html) if file not in (None, _STDOUT)]
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"--json and --html: both name {files[0]}; expected two files")
    for file in files:
        check_new(file, arguments.force)
    text = Texts().read(arguments.text_file) if arguments.text_file else arguments.text
    if text == "":
        raise ValueError("the text is empty; give one that both models can read, or leave it out")
    a, b = _sides(arguments)
    text = _default(a, b) if text is None else text
    found = compare(a, b, text, allow_special=allow_special(arguments), progress=progress)
    decode = _decoder(a, b)
    signals.clean_up_first()
    if arguments.json not in (None, _STDOUT):
        _write(Path(arguments.json), strict_json.line(found.as_json()), arguments.force)
    if arguments.html:
        _write(Path(arguments.html), page(found, decode=decode), arguments.force)
    if arguments.json == _STDOUT:
        streams.write(strict_json.line(found.as_json()))
    else:
        text = report(found, width=streams.width(), colour=streams.is_coloured(), decode=decode)
        streams.write(f"{text}\n")
    return 0 if found.equal else _PART


def _write(file: Path, text: str, force: bool) -> None:
    write_text(file, text, force)
    streams.say(f"wrote {file}")


def _sides(arguments: argparse.Namespace) -> tuple[Side, Side]:
    """Return the two sides. An option without ``-b`` is for both; one that no side takes is refused."""
    names = ("backend", "device", "dtype")
    for_both = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.reproducible:
        for_both["reproducible"] = True
    for_b = {name: value for name in names if (value := getattr(arguments, f"{name}_b")) is not None}
    if is_trace(arguments.b) and for_b:
        raise ValueError(f"--{next(iter(for_b))}-b is given, but {arguments.b} is a trace, which is not computed again")
    if is_trace(arguments.a) and is_trace(arguments.b) and for_both:
        raise ValueError(f"--{next(iter(for_both))} is given, but both sides are traces, which are not computed again")

    def side(source: str, options: dict[str, Any]) -> Side:
        return open_side(source, **({} if is_trace(source) else options), progress=progress)

    return side(arguments.a, for_both), side(arguments.b, {**for_both, **for_b})


def _default(a: Side, b: Side) -> list[int] | None:
    """Return the token ids that two sides read if no text is given; None if a side has its own.

    These are the tokens of `_TEXT`, as many as both models have positions. Without a tokenizer, they are other ids.
    """
    if a.tokens is not None or b.tokens is not None:
        return None
    configs = [side.config for side in (a, b) if side.config is not None]
    n_vocab, n_ctx = (min(getattr(config, name) for config in configs) for name in ("n_vocab", "n_ctx"))
    tokenizer = a.tokenizer or b.tokenizer
    ids = tokenizer.encode(_TEXT) if tokenizer else [7919 * i % n_vocab for i in range(1, 65)]
    return ids[:n_ctx]


def _decoder(a: Side, b: Side) -> Callable[[Sequence[int]], str] | None:
    """Return a function that returns the text of token ids, if a tokenizer is known."""
    if (tokenizer := a.tokenizer or b.tokenizer) is None:
        return None
    return lambda ids: "".join(map(tokenizer.decoder(), [*ids, None]))  # an id without text becomes U+FFFD
