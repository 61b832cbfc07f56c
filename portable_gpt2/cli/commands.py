"""The program: it parses the arguments, runs a command, and reports an error in one line."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..host import ProcessLost
from ..mesh import MeshError
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


_PATIENCE = 60
"""The seconds for which a process that writes nothing waits until process 0 has written the error of both.

torchrun ends all processes as soon as one of them has failed.
"""


def run(argv: list[str] | None) -> int:
    """Run a command; return its exit status.

    An error that a function of this package raises because of its arguments is reported in one line. Every other error
    is a bug, and its traceback is shown. On a mesh, only process 0 writes.
    """
    if argv is None and (number := _process_number(sys.argv[1:])) is not None:
        streams.share(number == 0)
    status: Any = None
    try:
        return (status := _run(argv))
    except SystemExit as ended:
        status = ended.code
        raise
    finally:
        if status == FAILED and streams.is_shared() and streams.is_silent() and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(_PATIENCE)
    return status


def _process_number(arguments: Sequence[str]) -> int | None:
    """Return the number of this process among those of a mesh, by the environment; None if there is no mesh.

    An error of the arguments is reported before the processes are connected.
    """
    if not any(each == "--mesh" or each.startswith("--mesh=") for each in arguments):
        return None
    found = (os.environ.get(name, "") for name in ("RANK", "JAX_PROCESS_ID"))
    return next((int(each) for each in found if each.isdecimal()), 0)


def _run(argv: list[str] | None) -> int:
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
    except MeshError as error:
        return _failed(str(error))
    except ProcessLost as error:
        signals.ignore()  # torchrun sends one to each process that is left, while it ends
        status = _failed(f"another process of the mesh has ended, or does not answer: {error}", always=True)
        if streams.is_shared():
            os._exit(status)  # a framework would wait for the other processes
        return status
    except Exception as error:
        if _is_out_of_memory(error):
            if streams.is_silent():  # process 0 does not know the reason
                streams.say(f"portable-gpt2: out of memory in another process of the mesh: {error}", always=True)
                os._exit(FAILED)
            return _failed(f"out of memory: {error}")
        streams.speak()
        raise


def _failed(message: str, *, always: bool = False) -> int:
    streams.say(f"portable-gpt2: {' '.join(message.split())}", always=always)
    return FAILED


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the host or of a device is full: a MemoryError, or a framework's message for it."""
    words = ("RESOURCE_EXHAUSTED", "OOM when", "can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
