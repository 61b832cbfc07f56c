"""The program: it parses the arguments, runs a command, and reports an error in one line."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import signal
import sys
from typing import Any

from . import (
    attend,
    backends,
    certify,
    check,
    completion,
    convert,
    diff,
    export,
    fingerprint,
    generate,
    score,
    signals,
    streams,
    trace,
    train,
)
from .options import FAILED, Command, Parser

# The number of the signal for a broken pipe, which Windows does not define. The exit status is then 128 + 13.
_SIGPIPE = 13


_FIRST_STEPS = """GPT-2, written once, on the array framework of your choice. Try:

  portable-gpt2 generate "To be, or not to be"    continue a text
  portable-gpt2 generate "In 1905" --model gpt2   use OpenAI's GPT-2
  portable-gpt2 generate --interactive            type one prompt after another
  portable-gpt2 attend "To be" -o attention.html  see where a token attends
  portable-gpt2 score text.txt --html score.html  see what surprises the model
  portable-gpt2 backends                          list the array frameworks

`portable-gpt2 --help` lists all commands, and `portable-gpt2 COMMAND --help`
explains one of them.
"""
"""The text that is written if no arguments are given."""


class _Version(argparse.Action):
    """Writes the version. It is looked up only if it is asked for."""

    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        streams.write(f"portable-gpt2 {importlib.metadata.version('portable-gpt2')}\n")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(prog="portable-gpt2", description="GPT-2, written once, on the array framework of your choice.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    for command in (
        generate,
        score,
        attend,
        fingerprint,
        certify,
        trace,
        diff,
        train,
        convert,
        export,
        backends,
        check,
        completion,
    ):
        command.add_to(commands)
    return parser


def run(argv: list[str] | None) -> int:
    """Run a command; return its exit status.

    An error that a function of this package raises because of its arguments is reported in one line. Every other error
    is a bug, and its traceback is shown.
    """
    try:
        if not (sys.argv[1:] if argv is None else argv):
            streams.write(_FIRST_STEPS)
            return 0
        arguments = parser().parse_args(argv)
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return signals.status(signal.SIGINT)
    except streams.LostOutput as error:
        if error.errno == errno.EPIPE:
            return signals.status(_SIGPIPE)
        return _failed(str(error.strerror))
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        return _failed(str(error))
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(f"out of memory: {error}")


def _failed(message: str) -> int:
    streams.say(f"portable-gpt2: {' '.join(message.split())}")
    return FAILED


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the host or of a device is full: a MemoryError, or a framework's message for it."""
    words = ("RESOURCE_EXHAUSTED", "OOM when", "can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
