"""Records of a run's directory: sealed JSON files, digests of the other files, and one line of metrics for each step.

A record that was changed after it was written is refused. A run that resumes therefore computes with what was saved, or
not at all.
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
    """Turn an error of the system into a CheckpointError that names a file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        text = str(error) if error.strerror is None else error.strerror
        raise CheckpointError(text if text.startswith(str(file)) else f"{file}: {text}") from error


def is_there(file: Path) -> bool:
    """Return whether there is a regular file of this name; refuse anything else that has the name."""
    with naming(file):
        return holds_file(file)


def read_bytes(file: Path) -> bytes:
    """Return the content of a regular file."""
    with naming(file):
        return regular(file).read_bytes()


def digest(file: Path) -> str:
    """Return the SHA-256 of a regular file as 64 hexadecimal digits: 1.2 GiB per second on one core."""
    with naming(file), regular(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def check_digest(file: Path, expected: str) -> None:
    """Refuse a file whose content is not the content that was recorded."""
    if digest(file) != expected:
        raise CheckpointError(f"{file}: damaged, or changed since it was written (its SHA-256 is another); {RESTORE}")


RESTORE = "restore the directory from a copy, or start a new run with --init-from"


def write_record(file: Path, entries: Mapping[str, Any]) -> None:
    """Write a JSON object, with the digest of its entries as one more entry. The file is replaced as a whole."""
    with replacing(file) as draft:
        draft.write_text(sealed(entries), "utf-8")


def sealed(entries: Mapping[str, Any]) -> str:
    """Return the text of a record."""
    return json.dumps({**entries, _SEAL: _seal(entries)}, indent=2, allow_nan=False) + "\n"


def read_record(file: Path, *names: str) -> dict[str, Any]:
    """Return the entries of a record, which must be those of these names.

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
        raise CheckpointError(f"{file}: changed since it was written (its entries have another SHA-256); {RESTORE}")
    return dict(entries)


def _parse(content: bytes) -> Any:
    """Return the value of a JSON text, which has neither NaN nor Infinity."""

    def refused(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(content.decode(), parse_constant=refused)


def _seal(entries: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(entries, sort_keys=True).encode())


def fields(file: Path, what: str, entries: Any, *names: str) -> dict[str, Any]:
    """Return a JSON object of a file if it has the entries of these names and no others."""
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
    """Where the lines of metrics end that belong to a checkpoint."""

    lines: int
    sha256: str
    """Of these lines without their ``seconds``: runs of the same text and recipe have the same records."""


class Metrics:
    """The file of metrics, to which a run adds a line for each step.

    A line is written before the checkpoint of its step is, and the record of the checkpoint says where the lines end.
    A run that resumes removes what stands after that end: the steps after the checkpoint are taken again.

    Parameters
    ----------
    file : Path
    end : End, optional
        Where the lines of the last checkpoint end. Without it, all lines are removed.

    Raises
    ------
    CheckpointError
        If the file lacks some of these lines, or they were changed.
    """

    def __init__(self, file: Path, end: End | None) -> None:
        n = 0 if end is None else end.lines
        content = whole_lines(file)
        kept = content.split(b"\n")[:-1][:n]
        hashed = hashlib.sha256()
        for entries in _parsed(file, kept):
            hashed.update(_hashed_part(entries))
        if end is not None and (len(kept), hashed.hexdigest()) != end:
            wrong = f"has {len(kept)} lines of {n}" if len(kept) < n else f"the first {n} lines were changed"
            raise CheckpointError(f"{file}: {wrong}, those of the steps so far; {RESTORE}")
        size = sum(len(line) + 1 for line in kept)
        with naming(file):
            self._stream = open(file, "r+b" if is_there(file) else "w+b", buffering=0)  # noqa: SIM115 - see `close`
            self._stream.truncate(size)
        # One variable, assigned at once: Ctrl-C finds all of a line in it, or nothing.
        self._now = (-1, n, size, hashed)

    def add(self, step: int, entries: Mapping[str, Any]) -> None:
        """Write the line of a step. To write the last line once more changes nothing."""
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
        """Return where the lines end, once they are on the disk."""
        os.fsync(self._stream.fileno())
        _, n, _, hashed = self._now
        return End(n, hashed.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def whole_lines(file: Path) -> bytes:
    """Return the lines of a file without the last one if it is cut: a run may be writing it."""
    content = read_bytes(file) if is_there(file) else b""
    return content[: content.rfind(b"\n") + 1]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics, each of which must be an object of numbers and of a later step than the line before.

    Raises
    ------
    CheckpointError
        If one is not. The message names the file and the line.
    """
    return list(_parsed(file, whole_lines(file).split(b"\n")[:-1]))


def end_of(metrics: Iterable[Mapping[str, Any]]) -> End:
    """Return where metrics end, as `read_metrics` returns them."""
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
