"""Handlers of SIGINT (Ctrl-C), SIGTERM and SIGHUP.

A signal that is ignored when the process starts, as under nohup, stays ignored. This module is imported first, and
imports little.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # defined here because the import of typing would take 3 ms

if TYPE_CHECKING:
    from typing import Any

_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

_is_ours = False
"""Whether `leave_at_once` was called."""


def status(signum: int) -> int:
    """Return the exit status by which a shell reports a signal."""
    return 128 + signum


def leave_at_once() -> None:
    """Let Ctrl-C end the process at once, without a traceback. This is for times when no file is being written.

    A KeyboardInterrupt is not reliable: inside an import or a callback of a framework, another error may replace it, or
    it may be printed and ignored.
    """
    global _is_ours
    _is_ours = True
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _set(signal.SIGINT, _leave)


def clean_up_first() -> None:
    """Let signals raise exceptions, so that unfinished files are removed.

    Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP raise SystemExit.

    If `leave_at_once` was not called, the process belongs to another program, and its handlers are not changed.
    """
    if not _is_ours:
        return
    if signal.getsignal(signal.SIGINT) is _leave:  # a shell's script starts a background process with it ignored
        _set(signal.SIGINT, signal.default_int_handler)
    for signum in _TERMINATING:
        if signal.getsignal(signum) is signal.SIG_DFL:
            _set(signum, _exit)


def report_abort(message: str, descriptor: int) -> None:
    """Write a line to a descriptor if a library aborts this process, as JAX's does if process 0 of a mesh has ended.

    No Python code runs in a process that is aborted. But Python writes the number of each signal to a pipe. Another
    process reads from the pipe until this process has ended, and then writes the line.
    """
    import subprocess

    if os.name != "posix" or not _set(signal.SIGABRT, _abort):
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # In a session of its own, it does not get the terminal's Ctrl-C.
    command = [sys.executable, "-I", "-S", "-c", _REPORT, str(int(signal.SIGABRT)), message]
    subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, stderr=descriptor, start_new_session=True)
    os.close(read)


_REPORT = """
import os, sys
signals = b""
while found := os.read(0, 1024):
    signals += found
if int(sys.argv[1]) in signals:
    print(sys.argv[2], file=sys.stderr)
"""


def ignore() -> None:
    """Ignore all signals from now on, because the process is ending."""
    for signum in (signal.SIGINT, *_TERMINATING):
        _set(signum, signal.SIG_IGN)


class Noted(list[int]):
    """A list of the signals that arrived during a ``with`` block.

    The block can look at the list and end in an orderly way. Only the first signal is recorded, unless `every` is true.
    A second signal has the effect that it has outside of the block.
    """

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self._every = every

    def __enter__(self) -> Noted:
        self._before = {}
        for signum in (signal.SIGINT, *_TERMINATING):
            if (handler := signal.getsignal(signum)) is not signal.SIG_IGN and _set(signum, self._note):
                self._before[signum] = handler
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            _set(*self._before.popitem())

    def _note(self, signum: int, _: Any) -> None:
        self.append(signum)
        if not self._every:
            self.__exit__()


def _leave(signum: int, _: Any) -> None:
    os._exit(status(signum))


def _abort(signum: int, _: Any) -> None:
    """End the process as if there were no handler. If a library aborts the process, this is not called."""
    _set(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _exit(signum: int, _: Any) -> None:
    raise SystemExit(status(signum))


def _set(signum: int, handler: Any) -> bool:
    """Set a handler. Return whether that was possible: Python allows it only in the main thread."""
    try:
        signal.signal(signum, handler)
    except ValueError:
        return False
    return True
