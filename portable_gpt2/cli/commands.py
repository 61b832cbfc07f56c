"""The program: it parses the arguments, runs a command, and reports an error in one line."""

from __future__ import annotations

import argparse
import errno
import signal

from . import (
    attend,
    backends,
    certify,
    check,
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="portable-gpt2", description="GPT-2, written once, on the array framework of your choice.")
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
    ):
        command.add_to(commands)
    return parser


def run(argv: list[str] | None) -> int:
    """Run a command; return its exit status.

    An error that a function of this package raises because of its arguments is reported in one line. Every other error
    is a bug, and its traceback is shown.
    """
    try:
        arguments = _parser().parse_args(argv)
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
