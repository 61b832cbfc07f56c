"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP do. One that is ignored when the process begins, as by nohup, stays so.

This module is imported first, and imports little.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # that of typing takes 3 ms to import

if TYPE_CHECKING:
    from typing import Any

_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def status(signum: int) -> int:
    """Return the exit status by which a shell reports a signal."""
    return 128 + signum


def leave_at_once() -> None:
    """Let Ctrl-C end the process at once, without a traceback: where no file is being written.

    A KeyboardInterrupt that is raised inside of an import, or of what a framework calls back, may become another error,
    or be printed and forgotten.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _set(signal.SIGINT, _leave)


def clean_up_first() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, SIGTERM and SIGHUP SystemExit: unfinished files are removed on the way.

    Where `leave_at_once` was not called, the process is somebody else's, and its signals are left alone.
    """
    if signal.getsignal(signal.SIGINT) is not _leave:
        return
    _set(signal.SIGINT, signal.default_int_handler)
    for signum in _TERMINATING:
        if signal.getsignal(signum) is signal.SIG_DFL:
            _set(signum, _exit)


class Noted(list[int]):
    """The signals that came within a ``with`` block, which is left to end in good order.

    Only the first is noted. The second has the effect that the first would have had outside of the block.
    """

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
        self.__exit__()


def _leave(signum: int, _: Any) -> None:
    os._exit(status(signum))


def _exit(signum: int, _: Any) -> None:
    raise SystemExit(status(signum))


def _set(signum: int, handler: Any) -> bool:
    """Set a handler and return whether that was possible: Python allows it in the main thread only."""
    try:
        signal.signal(signum, handler)
    except ValueError:
        return False
    return True
