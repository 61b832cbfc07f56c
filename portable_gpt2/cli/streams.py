"""The standard streams, any of which may be closed, full or a broken pipe.

If text cannot be written to stdout, the command fails. If a message cannot be written to stderr, the command continues.
See docs/decisions/0027.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import warnings
from typing import Any, BinaryIO

from . import signals

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_closed: set[int] = set()
"""The descriptors that were closed when the process began."""
_silent: list[bool] = []
"""Not empty if this process writes nothing, because another one does."""
_is_prepared = False
_kept: list[int] = []
"""Copies of the descriptors of stdout and stderr, if `share` was called."""


class LostOutput(OSError):
    """Text could not be written to stdout; `errno` says why."""


class _Courtesy(io.FileIO):
    """A file that drops the data that it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        # FileIO.write returns None if a non-blocking pipe is full.
        return memoryview(data).nbytes if written is None else written


def prepare() -> None:
    """Make the standard streams safe to write to. This must be called before a file is opened."""
    global _is_prepared
    _is_prepared = True
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get the number of this stream, and receive the text that is printed.
            _to_null(descriptor)
            _closed.add(descriptor)
    if sys.stdin is None:
        sys.stdin = open(_STDIN, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(_STDOUT, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the encoding lacks becomes a question mark
    warnings.formatwarning = _warning
    if sys.stderr is sys.__stderr__:  # a caller of `main` may have replaced it
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        courtesy = io.BufferedWriter(_Courtesy(_STDERR, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(courtesy, encoding, "backslashreplace", line_buffering=True)


def is_silent() -> bool:
    """Return whether another process writes for this one."""
    return bool(_silent)


def share(is_first: bool) -> None:
    """Leave stdout and stderr to the first process of a mesh. The others write no text, messages or warnings.

    Libraries that connect processes write messages to the descriptor of stdout. These are dropped in all processes. In
    a process of another program, the descriptors are not changed.
    """
    _silent[:] = [] if is_first else [True]
    if not is_first:
        warnings.simplefilter("ignore")
    if not _is_prepared:
        return
    if not _kept:
        _kept.extend((os.dup(_STDOUT), os.dup(_STDERR)))
        sys.stdout = open(os.dup(_STDOUT), "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115
        _to_null(_STDOUT)
    for descriptor, kept in zip((sys.stdout.fileno(), _STDERR), _kept, strict=True):
        if is_first:
            os.dup2(kept, descriptor, inheritable=descriptor == _STDERR)
        else:
            _to_null(descriptor)


def is_shared() -> bool:
    """Return whether this may be one of several processes, of which the first alone writes."""
    return bool(_kept)


def report_abort(message: str) -> None:
    """Write a line to stderr if a library aborts this process, which may be one that is silent otherwise."""
    if _kept:
        signals.report_abort(_plain(message), _kept[1])


def speak() -> None:
    """Write messages to stderr again: about an error that no other process has."""
    if _silent and _kept:
        os.dup2(_kept[1], _STDERR)


def write(text: str) -> None:
    """Write text to stdout without delay. An empty text checks that stdout is open, before work begins.

    Raises
    ------
    LostOutput
        If stdout is closed, its disk is full, or it is a pipe that nobody reads.
    """
    if _silent:
        return
    if _STDOUT in _closed:
        raise LostOutput(errno.EBADF, "stdout is closed")
    try:
        print(text, end="", flush=True)
    except OSError as error:
        if sys.stdout is sys.__stdout__ or _kept:
            _to_null(sys.stdout.fileno())  # because the interpreter writes the rest of the buffer when it ends
        raise LostOutput(error.errno, f"cannot write to stdout: {error.strerror}") from error


def is_coloured() -> bool:
    """Return whether text on stdout may have colours: it is a terminal that has them, and NO_COLOR is not set.

    See https://no-color.org.
    """
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and _STDOUT not in _closed and sys.stdout.isatty()


def width() -> int:
    """Return the number of characters of a line on stdout: the width of the terminal from 60 to 120, or else 80."""
    is_terminal = _STDOUT not in _closed and sys.stdout.isatty()
    return min(max(shutil.get_terminal_size().columns, 60), 120) if is_terminal else 80


def say(message: str, *, always: bool = False) -> None:
    """Write a line to stderr. Characters that control a terminal are escaped, because files may contain them.

    A process that is silent writes only what it must `always` write.
    """
    if always:
        speak()
    if always or not _silent:
        print(_plain(message), file=sys.stderr, flush=True)


def _warning(message: Warning | str, *where: Any, **line: Any) -> str:
    """Return a warning as one line, without the line of source code that Python shows."""
    return f"portable-gpt2: warning: {_plain(' '.join(str(message).split()))}\n"


def _plain(text: str) -> str:
    from ..checks import plain  # its imports open files, and come after `prepare`

    return plain(text)


def stdin() -> BinaryIO:
    """Return the bytes of stdin.

    Raises
    ------
    ValueError
        If stdin is closed.
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
