"""``portable-gpt2 generate``: continue texts."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from .. import strict_json
from ..generation.completion import Completion, Piece
from ..sampling import Sampling
from . import interactive, streams
from .options import (
    add_fields,
    add_mesh,
    add_model,
    add_special,
    allow_special,
    at_least,
    given_fields,
    load,
    open_mesh,
    read_once,
    stop_text,
)
from .texts import Texts


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "generate",
        help="continue one text, or several",
        description="Write a prompt and its continuation to stdout. The continuation of a single prompt is written "
        "while it is sampled; several prompts are written one after the other. Without a prompt, the text starts from "
        "<|endoftext|>. The same seed gives the same text on every backend.",
    )
    add = parser.add_argument
    add("prompt", nargs="*", type=str, help="text to continue; quote a text of several words")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="file whose whole content is a prompt; - is stdin; may be given several times",
    )
    add(
        "--interactive",
        action="store_true",
        help="read prompts from stdin, one per line, and continue each of them; Ctrl-C ends a text, and Ctrl-D ends "
        "the command",
    )
    add_model(parser)
    add_mesh(parser)
    add(
        "-n",
        "--max-new-tokens",
        type=at_least(0),
        default=100,
        metavar="N",
        help="largest number of tokens to sample (default: 100)",
    )
    add_fields(parser, Sampling)
    add(
        "--stop",
        action="append",
        default=[],
        type=stop_text,
        metavar="TEXT",
        help="end the text before this string; may be given several times",
    )
    add(
        "--stop-token",
        action="append",
        default=[],
        type=at_least(0),
        metavar="ID",
        help="end the text before this token id; may be given several times",
    )
    add(
        "--num-samples",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of continuations of each prompt (default: 1)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="number of texts that are computed at a time (default: 8)",
    )
    add("--sliding", action="store_true", help="when the context is full, continue from its last half")
    add_special(parser, "a prompt")
    json = parser.add_mutually_exclusive_group()
    json.add_argument("--json", action="store_true", help="write one JSON object per text, each on one line")
    json.add_argument(
        "--stream-json",
        action="store_true",
        help="write one JSON object per token as soon as it is sampled, each on one line: prompt_index, index (the "
        "sample), token (its id; null for text that was held back until the end) and piece (its text); and after the "
        "last token of a text the object of --json, with finish_reason (stop or length), seed and prompt_index",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    sampling = Sampling(**given_fields(arguments, Sampling))  # checked before a text is read or a model is loaded
    as_json = arguments.json or arguments.stream_json
    if arguments.interactive:
        _check_interactive(arguments)
    mesh = open_mesh(arguments)
    if arguments.interactive and mesh is not None and not mesh.is_alone:
        raise ValueError("--interactive works in one process; the mesh has several: leave out --interactive or --mesh")

    def read() -> tuple[list[str], int | None]:
        streams.write("")
        texts = Texts()
        return [*arguments.prompt, *map(texts.read, arguments.prompt_file)] or [""], sampling.seed

    prompts, seed_of_one = read_once(mesh, read)
    model = load(arguments, mesh)
    options: dict[str, Any] = {
        **given_fields(arguments, Sampling),
        "max_new_tokens": arguments.max_new_tokens,
        "stop": [*arguments.stop, *arguments.stop_token],
        "sliding": arguments.sliding,
        "allow_special": allow_special(arguments),
    }
    if arguments.interactive:
        streams.say(f"{model!r}, from {model.source}")
        return interactive.run(model, options)
    is_single = len(prompts) == arguments.num_samples == 1 and not as_json
    if is_single:
        options["seed"] = seed_of_one
        pieces = model.stream(prompts[0], **options)
    else:
        many = {"num_samples": arguments.num_samples, "batch_size": arguments.batch_size}
        on_piece = _write_piece if arguments.stream_json else None
        completions = model.complete(prompts, on_piece=on_piece, **many, **options)
    seed = f", seed {options['seed']}" if "seed" in options else ""
    streams.say(f"{model!r}{seed}, from {model.source}")
    start = time.perf_counter()
    if is_single:
        streams.write(prompts[0])
        n = 0
        for n, piece in enumerate(pieces, 1):  # noqa: B007 - n is the number of pieces after the loop
            streams.write(piece)
        n = min(n, arguments.max_new_tokens)  # a text that ends within a character has one more piece than tokens
        streams.write("\n")
    else:
        n = _write_all(completions, arguments)
    seconds = time.perf_counter() - start
    streams.say(f"{n} tokens in {seconds:.2f} s, {n / seconds:.1f} tokens/s")
    return 0


def _check_interactive(arguments: argparse.Namespace) -> None:
    """Refuse options that --interactive does not have."""
    others = {
        "a prompt": arguments.prompt,
        "--prompt-file": arguments.prompt_file,
        "--json": arguments.json,
        "--stream-json": arguments.stream_json,
        "--num-samples": arguments.num_samples > 1,
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"--interactive reads prompts from stdin, and writes one text for each: leave out {name}")
    streams.stdin()  # raises an error if it is closed


def _write_piece(piece: Piece) -> None:
    streams.write(strict_json.line(dataclasses.asdict(piece)))


def _write_all(completions: Iterable[Completion], arguments: argparse.Namespace) -> int:
    """Write each completion as soon as it is complete. Return the number of tokens of all completions."""
    n = 0
    for i, completion in enumerate(completions):
        n += len(completion.tokens)
        prompt_index = i // arguments.num_samples
        if arguments.stream_json:
            streams.write(strict_json.line({"prompt_index": prompt_index, **dataclasses.asdict(completion)}))
        elif arguments.json:
            streams.write(strict_json.line(dataclasses.asdict(completion)))
        else:
            which = f"prompt {prompt_index + 1}, sample {completion.index + 1}"
            which += f", seed {completion.seed}" if arguments.seed is None else ""
            streams.write(f"{'=' * 20} {which} {'=' * 20}\n{completion.prompt}{completion.text}\n")
    return n
