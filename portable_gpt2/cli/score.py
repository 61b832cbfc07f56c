"""``portable-gpt2 score``: the log-probability and the perplexity of texts."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from .. import strict_json
from ..files import check_new
from . import signals, streams
from .options import add_mesh, add_model, add_special, allow_special, at_least, load, open_mesh, progress, read_once
from .texts import Texts


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "score",
        help="compute the log-probability and the perplexity of texts",
        description="Write the log-probability and the perplexity of each text.",
    )
    add = parser.add_argument
    add("file", nargs="+", help="file with a text in UTF-8; - is stdin")
    add_model(parser)
    add_mesh(parser)
    add(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="distance in tokens between the windows in which a long text is read; a smaller distance is slower and "
        "gives each token more context (default: half of the context)",
    )
    add("--bos", action="store_true", help="put <|endoftext|> before each text, so that its first token is scored, too")
    add_special(parser, "a text")
    add(
        "--json",
        action="store_true",
        help="write one JSON object per text, each on one line, with the log-probability of each token; a number that "
        "is not finite is written as null",
    )
    add(
        "--html",
        metavar="FILE",
        help="also write a page, which a browser shows offline, with the tokens coloured by how much they surprise the "
        "model",
    )
    add("--force", action="store_true", help="replace the file of --html if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from .. import pages
    from ..pages.surprise_page import ALTERNATIVES

    mesh = open_mesh(arguments)

    def read() -> list[str]:
        streams.write("")
        if arguments.html:
            check_new(Path(arguments.html), arguments.force)
        texts = Texts()
        return [texts.read(name) for name in arguments.file]

    contents = list(zip(arguments.file, read_once(mesh, read), strict=True))
    model = load(arguments, mesh)
    streams.say(f"{model!r}, from {model.source}")
    scores = {}
    for name, text in contents:
        score = model.score(
            text,
            stride=arguments.stride,
            bos=arguments.bos,
            allow_special=allow_special(arguments),
            alternatives=min(ALTERNATIVES, model.config.n_vocab) if arguments.html else 0,
            progress=partial(progress, what=f"scoring {name}", unit="windows"),
        )
        if arguments.html:
            scores[name] = score
        if arguments.json:
            found = {"tokens": score.tokens, "log_probs": score.log_probs.tolist()}
            found |= {key: getattr(score, key) for key in ("total", "n_bytes", "perplexity", "byte_perplexity")}
            streams.write(strict_json.line({"file": name, **found}))
        else:
            streams.write(
                f"{name}: perplexity {score.perplexity:.4f} per token, {score.byte_perplexity:.4f} per byte; "
                f"log-probability {score.total:.4f} of {score.n_tokens} tokens, {score.n_bytes} bytes\n"
            )
    if arguments.html and (mesh is None or mesh.is_first):
        signals.clean_up_first()
        pages.surprise(model, scores).save(arguments.html, force=arguments.force)
        streams.say(f"wrote {arguments.html}")
    return 0
