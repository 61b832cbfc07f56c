"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP do. One that is ignored when the process begins, as by nohup, stays so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_Handler = Callable[[int, Any], Any] | int | None


def status(signum: int) -> int:
    """Return the exit status by which a shell reports a signal."""
    return 128 + signum


def leave_at_once() -> None:
    """Let Ctrl-C end the process there and then, without a traceback: where nothing would be lost.

    Inside of an import a KeyboardInterrupt may become an ImportError, or be printed and forgotten.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _set(signal.SIGINT, lambda signum, _: os._exit(status(signum)))


def clean_up_first() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, SIGTERM and SIGHUP SystemExit: unfinished files are removed on the way."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        _set(signal.SIGINT, signal.default_int_handler)
    for signum in _TERMINATING:
        if signal.getsignal(signum) is signal.SIG_DFL:
            _set(signum, _exit)


@contextmanager
def noted() -> Iterator[list[int]]:
    """Note the first of these signals in the list that is given, and leave it to the block to end in good order.

    The second one has the effect that the first would have had outside of the block.
    """
    found: list[int] = []
    before: dict[int, _Handler] = {}

    def note(signum: int, _: Any) -> None:
        found.append(signum)
        restore()

    def restore() -> None:
        while before:
            _set(*before.popitem())

    for signum in (signal.SIGINT, *_TERMINATING):
        if (handler := signal.getsignal(signum)) is not signal.SIG_IGN and _set(signum, note):
            before[signum] = handler
    try:
        yield found
    finally:
        restore()


def _exit(signum: int, _: Any) -> None:
    raise SystemExit(status(signum))


def _set(signum: int, handler: _Handler) -> bool:
    """Set a handler where that is possible: Python allows it in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signum, handler)
    return True
