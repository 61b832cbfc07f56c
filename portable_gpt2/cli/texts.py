"""Texts from files, pipes and stdin, in UTF-8."""

from __future__ import annotations

import codecs
import os
import select
import stat
import time
from collections.abc import Iterator

from .. import checks
from . import streams

_STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_CHUNK = 1 << 24  # bytes that are read at a time
_PATIENCE = 5  # seconds to wait until a named pipe is opened for writing
_OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, because the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Texts:
    """Reads the texts of one command. A pipe can be read only once."""

    def __init__(self) -> None:
        self._drained: set[tuple[int, int]] = set()

    def read(self, file: str) -> str:
        """Return the text of a file, or of stdin for ``-``.

        Line endings are not changed. A byte order mark at the beginning is removed.

        Raises
        ------
        OSError
            If the file cannot be read, is a directory or a device (which may have no end), or is a named pipe that is
            not opened for writing.
        ValueError
            If the text is not UTF-8, needs more memory than the machine has, or comes from a pipe that was read before.
        """
        data = b"".join(_within_memory(self._chunks(file), file))
        for mark, encoding in _OTHERS.items():
            if data.startswith(mark):
                raise ValueError(
                    f"{file}: not UTF-8 but {encoding}, as its byte order mark says; "
                    f"iconv -f {encoding} -t UTF-8 converts it"
                )
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8: {error}") from error

    def _chunks(self, file: str) -> Iterator[bytes]:
        try:
            if file in _STDIN:
                stream = streams.stdin()
                self._check(file, stream.fileno(), once=True)
                yield from iter(lambda: stream.read(_CHUNK), b"")
                return
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # does not wait until a named pipe has a writer
            with os.fdopen(descriptor, "rb", buffering=0) as stream:
                if self._check(file, descriptor) == stat.S_IFIFO:
                    yield _first_of_pipe(file, descriptor)
                os.set_blocking(descriptor, True)
                yield from iter(lambda: stream.read(_CHUNK), b"")
        except OSError as error:
            raise error if error.errno is None else OSError(f"{file}: {error.strerror}") from error

    def _check(self, file: str, descriptor: int, once: bool = False) -> int:
        """Return the kind of an open file. Devices, which may have no end, and pipes that were read are refused."""
        status = os.fstat(descriptor)
        kind = stat.S_IFMT(status.st_mode)
        is_null = kind == stat.S_IFCHR and os.path.samestat(status, os.stat(os.devnull))
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and not is_null and not os.isatty(descriptor):
            raise OSError(f"{file}: is a device; expected a text")
        if kind == stat.S_IFREG:
            checks.memory(2 * status.st_size, f"{file}: its text")  # the bytes and the decoded text
        if once or kind in (stat.S_IFIFO, stat.S_IFSOCK):
            if (identity := (status.st_dev, status.st_ino)) in self._drained:
                raise ValueError(f"{file}: was read before, and can be read only once; save it in a file")
            self._drained.add(identity)
        return kind


def _within_memory(chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    n = 0
    for chunk in chunks:
        n += len(chunk)
        checks.memory(2 * n, f"{file}: its text")
        yield chunk


def _first_of_pipe(file: str, descriptor: int) -> bytes:
    """Return the bytes that are in a pipe already. A named pipe that is not opened for writing is refused."""
    events = select.poll()
    events.register(descriptor, select.POLLHUP)  # this event means that a writer opened the pipe and closed it
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            if (found := os.read(descriptor, _CHUNK)) or events.poll(0):
                return found
        except BlockingIOError:  # a writer has opened the pipe and has not written yet
            return b""
        time.sleep(0.01)
    raise OSError(f"{file}: is a named pipe that nobody opened for writing within {_PATIENCE} seconds")
