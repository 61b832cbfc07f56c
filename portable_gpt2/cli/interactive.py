"""``portable-gpt2 generate --interactive``: read prompts line by line, and continue each of them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from ..language_model import GPT2
from ..sampling import Sampling
from . import signals, streams

_PROMPT = "> "


def run(model: GPT2, options: dict[str, Any]) -> int:
    """Read prompts from stdin until it ends, and write each with its continuation; return the exit status.

    Each text is the one that ``generate`` writes for the prompt and the seed. An empty line starts from
    ``<|endoftext|>``. On a terminal, a prompt that cannot be continued is reported, and the next one is read; elsewhere
    it ends the command, as it does without ``--interactive``.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        signals.clean_up_first()  # Ctrl-C at the prompt raises an error, so that the terminal's state is restored
        streams.say("Type a prompt. Ctrl-C ends a text, and Ctrl-D ends the command.")
    for prompt in _typed() if on_terminal else _lines():
        try:
            status = _continue(model, prompt, options)
        except (ValueError, TypeError) as error:
            if not on_terminal:
                raise
            streams.say(f"portable-gpt2: {' '.join(str(error).split())}")
            continue
        if status and not (on_terminal and status == signals.status(signal.SIGINT)):
            return status
    return 0


def _continue(model: GPT2, prompt: str, options: dict[str, Any]) -> int:
    """Write a prompt and its continuation. Return the status of the signal that ended the text, or 0."""
    seed = options.get("seed", Sampling().seed)
    pieces = model.stream(prompt, **{**options, "seed": seed})
    with signals.Noted() as received:
        streams.write(prompt)
        for piece in pieces:
            streams.write(piece)
            if received:
                break
        streams.write("\n")
    if "seed" not in options:
        streams.say(f"seed {seed}")
    return signals.status(received[0]) if received else 0


def _typed() -> Iterator[str]:
    """Yield the lines that are typed on a terminal, with line editing and a history where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import changes `input`
    shows_prompt = sys.stdout.isatty()  # otherwise `input` would write the prompt into the text
    while True:
        try:
            if not shows_prompt:
                print(_PROMPT, end="", file=sys.stderr, flush=True)
            yield input(_PROMPT if shows_prompt else "")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _lines() -> Iterator[str]:
    """Yield the lines of stdin, which must be UTF-8."""
    for i, line in enumerate(iter(streams.stdin().readline, b"")):
        try:
            text = line.decode("utf-8-sig" if i == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: line {i + 1} is not UTF-8: {error}") from error
        yield text.removesuffix("\n").removesuffix("\r")
