"""The standard streams: what happens to text and to messages where one of them is closed, full or a broken pipe.

A command exists for its text: if stdout loses it, the command fails. Messages are a courtesy: if stderr loses them, the
command continues. See docs/decisions/0027.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from typing import Any, BinaryIO

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_closed: set[int] = set()
"""The descriptors that were closed when the process began."""


class LostOutput(OSError):
    """Text could not be written to stdout; `errno` says why."""


class _Courtesy(io.FileIO):
    """A file that takes all that it is given and drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        # None is also what a pipe that is full gives if it does not block.
        return memoryview(data).nbytes if written is None else written


def prepare() -> None:
    """Make the standard streams safe to write to. Nothing may have been opened before."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened, a checkpoint perhaps, would get this number, and with it what is printed.
            _to_null(descriptor)
            _closed.add(descriptor)
    if sys.stdin is None:
        sys.stdin = open(_STDIN, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(_STDOUT, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where an encoding lacks a character, the text continues
    warnings.formatwarning = _warning
    if sys.stderr is sys.__stderr__:  # and not what a caller of `main` put there
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        courtesy = io.BufferedWriter(_Courtesy(_STDERR, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(courtesy, encoding, "backslashreplace", line_buffering=True)


def write(text: str) -> None:
    """Write text to stdout, at once. With an empty text, find out whether stdout is closed before work begins.

    Raises
    ------
    LostOutput
        If stdout is closed, full, or a pipe that nobody reads.
    """
    if _STDOUT in _closed:
        raise LostOutput(errno.EBADF, "stdout is closed")
    try:
        print(text, end="", flush=True)
    except OSError as error:
        if sys.stdout is sys.__stdout__:
            _to_null(_STDOUT)  # the interpreter will try to write the rest of the buffer when it ends
        raise LostOutput(error.errno, f"cannot write to stdout: {error.strerror}") from error


def say(message: str) -> None:
    """Write a line to stderr."""
    print(message, file=sys.stderr, flush=True)


def _warning(message: Warning | str, *where: Any, **line: Any) -> str:
    """Return a warning as a line: where it is from in the source says nothing to who runs the command."""
    return f"portable-gpt2: warning: {' '.join(str(message).split())}\n"


def stdin() -> BinaryIO:
    """Return the bytes of stdin.

    Raises
    ------
    ValueError
        If it is closed.
    """
    if _STDIN in _closed:
        raise ValueError("stdin is closed")
    return sys.stdin.buffer


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)
