"""Records in the directory of a run: JSON files with a digest, digests of the other files, and a file of metrics.

A record that was changed after it was written is refused, so a run is resumed from the data that were saved or not at
all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import CheckpointError
from ..checks import is_int, is_number, shown
from ..files import holds_file, regular, replacing

_SEAL = "sha256"


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Convert an OSError into a CheckpointError that names a file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        text = str(error) if error.strerror is None else error.strerror
        raise CheckpointError(text if text.startswith(str(file)) else f"{file}: {text}") from error


def is_there(file: Path) -> bool:
    """Return whether there is a regular file of this name. Anything else of this name is refused."""
    with naming(file):
        return holds_file(file)


def read_bytes(file: Path) -> bytes:
    """Return the content of a regular file."""
    with naming(file):
        return regular(file).read_bytes()


def digest(file: Path) -> str:
    """Return the SHA-256 of a regular file as 64 hexadecimal digits (1.2 GiB per second on one core)."""
    with naming(file), regular(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def check_digest(file: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is not the expected one."""
    if digest(file) != expected:
        raise CheckpointError(f"{file}: damaged, or changed since it was written (its SHA-256 differs); {RESTORE}")


RESTORE = "restore the directory from a copy, or start a new run with --init-from"


def write_record(file: Path, entries: Mapping[str, Any]) -> None:
    """Write a JSON object, with the digest of its entries as one more entry. The file is replaced atomically."""
    with replacing(file) as draft:
        draft.write_text(sealed(entries), "utf-8")


def sealed(entries: Mapping[str, Any]) -> str:
    """Return the text of a record."""
    return json.dumps({**entries, _SEAL: _seal(entries)}, indent=2, allow_nan=False) + "\n"


def read_record(file: Path, *names: str) -> dict[str, Any]:
    """Return the entries of a record, which must have these names and no others.

    Raises
    ------
    CheckpointError
        If the file is not a JSON object, its entries have other names, or they were changed after they were written.
    """
    content = read_bytes(file)
    try:
        entries = _parse(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}; {RESTORE}") from error
    fields(file, "the record", entries, *names, _SEAL)
    seal = entries.pop(_SEAL)
    if seal != _seal(entries):
        raise CheckpointError(f"{file}: changed since it was written (the SHA-256 of its entries differs); {RESTORE}")
    return dict(entries)


def _parse(content: bytes) -> Any:
    """Return the value of a JSON text. NaN and Infinity, which Python's parser accepts, are refused."""

    def refused(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(content.decode(), parse_constant=refused)


def _seal(entries: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(entries, sort_keys=True).encode())


def fields(file: Path, what: str, entries: Any, *names: str) -> dict[str, Any]:
    """Return a JSON object of a file, which must have entries of these names and no others."""
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: {what} is {shown(entries)}; expected an object")
    for verb, found in (("lacks", set(names) - entries.keys()), ("has the unknown", entries.keys() - set(names))):
        if found:
            raise CheckpointError(f"{file}: {what} {verb} {shown(min(found))}; expected {', '.join(names)}")
    return entries


def is_digest(x: Any) -> bool:
    """Return whether x is a SHA-256 as `digest` returns it."""
    return isinstance(x, str) and len(x) == 64 and set(x) <= set("0123456789abcdef")


class End(NamedTuple):
    """The lines of metrics that belong to a checkpoint."""

    lines: int
    """The number of lines."""
    sha256: str
    """The SHA-256 of the lines without their ``seconds``: it is the same for all runs of one text and recipe."""


class Metrics:
    """The file of metrics, to which a run adds a line for each step.

    The line of a step is written before its checkpoint, whose record has the number of lines. When a run is resumed,
    the lines after this number are removed, because the steps after the checkpoint are taken again.

    Parameters
    ----------
    file : Path
        The file.
    end : End, optional
        The lines that belong to the last checkpoint. Without it, all lines are removed.

    Raises
    ------
    CheckpointError
        If some of these lines are missing, or were changed.
    """

    def __init__(self, file: Path, end: End | None) -> None:
        n = 0 if end is None else end.lines
        content = whole_lines(file)
        kept = content.split(b"\n")[:-1][:n]
        hashed = hashlib.sha256()
        for entries in _parsed(file, kept):
            hashed.update(_hashed_part(entries))
        if end is not None and (len(kept), hashed.hexdigest()) != end:
            wrong = f"has {len(kept)} of the {n} lines" if len(kept) < n else f"the first {n} lines were changed"
            raise CheckpointError(f"{file}: {wrong}, which belong to the last checkpoint; {RESTORE}")
        size = sum(len(line) + 1 for line in kept)
        with naming(file):
            self._stream = open(file, "r+b" if is_there(file) else "w+b", buffering=0)  # noqa: SIM115 - see `close`
            self._stream.truncate(size)
        # The state is in one variable, because Ctrl-C could interrupt between the assignments of several variables.
        self._now = (-1, n, size, hashed)

    def add(self, step: int, entries: Mapping[str, Any]) -> None:
        """Write the line of a step. If it is the last line already, nothing changes."""
        last, n, size, hashed = self._now
        if step == last:
            return
        line = memoryview(json.dumps(entries, allow_nan=False).encode() + b"\n")
        hashed = hashed.copy()
        hashed.update(_hashed_part(entries))
        self._stream.seek(size)
        left = line
        while left:
            left = left[self._stream.write(left) :]
        self._now = (step, n + 1, size + len(line), hashed)

    def end(self) -> End:
        """Return the number and the digest of the lines. They are on the disk when this returns."""
        os.fsync(self._stream.fileno())
        _, n, _, hashed = self._now
        return End(n, hashed.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def whole_lines(file: Path) -> bytes:
    """Return the complete lines of a file. A run may be writing the last line."""
    content = read_bytes(file) if is_there(file) else b""
    return content[: content.rfind(b"\n") + 1]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics as dicts of numbers.

    Raises
    ------
    CheckpointError
        If a line is not a JSON object of finite numbers, or its step is not after the step of the line before. The
        message names the file and the line.
    """
    return list(_parsed(file, whole_lines(file).split(b"\n")[:-1]))


def end_of(metrics: Iterable[Mapping[str, Any]]) -> End:
    """Return the number and the digest of lines that `read_metrics` returned."""
    parts = [_hashed_part(entries) for entries in metrics]
    return End(len(parts), digest_of(b"".join(parts)))


def _parsed(file: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    least = 0
    for i, line in enumerate(lines, 1):
        try:
            entries = _parse(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: line {i} is not JSON: {error}") from error
        if not isinstance(entries, dict) or not is_int(entries.get("step")) or entries["step"] < least:
            raise CheckpointError(f"{file}: line {i} is {shown(entries)}; expected an object of step {least} or later")
        for name, value in entries.items():
            if not is_number(value) or value in (math.inf, -math.inf):
                raise CheckpointError(f"{file}: line {i}: {shown(name)} is {shown(value)}; expected a finite number")
        least = entries["step"] + 1
        yield entries


def _hashed_part(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in entries.items() if name != "seconds"}).encode() + b"\n"
