"""The ``portable-gpt2`` command: text on stdout, all else on stderr, wrong use in one line with exit status 2."""

from __future__ import annotations

import argparse
import io
import os
import secrets
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from .backend import BackendNotInstalled, available_backends, get_backend, how_to_install, known_backends
from .checkpoint import convert
from .gpt2 import GPT2

USAGE_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # the last two as a shell reports SIGINT and SIGPIPE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number_or_off(text: str) -> float | None:
    return None if text == "off" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="portable-gpt2", description="GPT-2, written once, on the array framework of your choice.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Write a prompt and its continuation to stdout, as it is drawn.",
    )
    add = generate.add_argument
    add("prompt", help="the text to continue")
    add("--model", required=True, metavar="DIR", help="a checkpoint's directory, or a model of the hub such as gpt2")
    add("--backend", metavar="NAME", help="what computes (default: $PORTABLE_GPT2_BACKEND, else numpy)")
    add("--device", help="where: cpu, cuda, cuda:1 ... (default: the framework's)")
    add("--dtype", help="float32 (default), float64, bfloat16, float16")
    add("-n", "--max-new-tokens", type=int, default=100, metavar="N", help="draw at most N tokens (default: 100)")
    add("--temperature", type=float, default=1.0, metavar="T", help="divide the logits by T; 0 is greedy (default: 1)")
    add("--top-k", type=int, default=40, metavar="K", help="draw from the K likeliest; 0 is off (default: 40)")
    add("--top-p", type=_number_or_off, metavar="P", help="draw from the fewest that reach P together (default: off)")
    add("--seed", type=int, help="the same seed draws the same text on every backend (default: one is drawn)")
    generate.set_defaults(run=_generate)

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint anew, as Hugging Face's transformers reads it",
        description="Write any checkpoint as config.json and model.safetensors. The directory appears complete or not.",
    )
    add = convert.add_argument
    add("source", metavar="SRC", help="a checkpoint's directory, or a model of the hub such as gpt2")
    add("directory", metavar="DST", help="where to")
    add("--dtype", help="float32, float64, bfloat16, float16 (default: as they are)")
    add("--force", action="store_true", help="replace DST, with all that it holds; it may be SRC")
    convert.set_defaults(run=_convert)

    backends = commands.add_parser("backends", help="list the array frameworks and their devices")
    backends.set_defaults(run=_backends)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            return int(arguments.run(arguments))
        finally:
            _write("")  # a pipe that is closed shows here, and not when the interpreter ends
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush would complain
        return PIPE_CLOSED
    except (ValueError, TypeError, OSError, BackendNotInstalled) as error:
        print(f"portable-gpt2: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def _generate(arguments: argparse.Namespace) -> int:
    model = GPT2.load(
        arguments.model,
        backend=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        progress=_progress,
    )
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    pieces = model.stream(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=seed,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console of few characters must not end the text
    print(f"{model!r}, seed {seed}, from {model.source}", file=sys.stderr, flush=True)
    _write(arguments.prompt)
    start, drawn = time.perf_counter(), 0
    for drawn, piece in enumerate(pieces, 1):  # noqa: B007 - counted for the last line
        _write(piece)
    seconds = time.perf_counter() - start
    drawn = min(drawn, arguments.max_new_tokens)  # a text that ends within a character has a piece more
    _write("\n")
    print(f"{drawn} tokens in {seconds:.2f} s, {drawn / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    found = convert(
        arguments.source, arguments.directory, dtype=arguments.dtype, force=arguments.force, progress=_progress
    )
    print(f"{arguments.directory}: from {found}", file=sys.stderr)
    return 0


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _progress(tensors: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(tensors, desc="loading", unit=" tensors", delay=1, leave=False)
    return bar


def _backends(arguments: argparse.Namespace) -> int:
    rows = [("backend", "version", "devices")]
    for name in known_backends():
        try:
            if name not in available_backends():
                rows.append((name, "-", f"not installed: {how_to_install(name)}"))
                continue
            devices = get_backend(name).devices()
            rows.append((name, str(getattr(sys.modules[name], "__version__", "?")), ", ".join(devices)))
        except BackendNotInstalled as error:
            rows.append((name, "-", " ".join(str(error).split())))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for first, second, last in rows:
        print(f"{first:{widths[0]}}  {second:{widths[1]}}  {last}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
