"""Read the text files of a checkpoint, and recognise a file that is not what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import files, strict_json
from ..host import CheckpointError

LARGEST_TEXT = 1 << 26
"""The size limit of a text file, in bytes.

The text files of real checkpoints are far smaller. Only files of weights are larger.
"""

_PAGE = "an HTML page, perhaps the error page of a server; download the file again"
_ARCHIVE = "archive; unpack it and give the directory"
_STARTS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": (
        "a Git LFS pointer to a file that was not downloaded; run `git lfs pull` in its repository"
    ),
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"\x1f\x8b": f"a gzip {_ARCHIVE}",
    b"BZh": f"a bzip2 {_ARCHIVE}",
    b"\xfd7zXZ\0": f"an xz {_ARCHIVE}",
    b"\x28\xb5\x2f\xfd": f"a zstd {_ARCHIVE}",
    b"7z\xbc\xaf": f"a 7z {_ARCHIVE}",
    b"GGUF": "a GGUF file, of llama.cpp; give it a name that ends in .gguf",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them; convert it with transformers to model.safetensors",
}


def exists(file: Path) -> bool:
    """Return whether there is a file of this name.

    Raises
    ------
    CheckpointError
        If there is something other than a regular file, which could block for ever when it is opened, or if the path
        cannot be followed.
    """
    try:
        return files.holds_file(file)
    except OSError as error:
        raise CheckpointError(str(error)) from None


def start(file: Path, n: int = 64) -> bytes:
    """Return the first bytes of a regular file."""
    try:
        with files.regular(file).open("rb") as stream:
            return stream.read(n)
    except OSError as error:
        raise CheckpointError(_with_name(file, error)) from None


def mistaken(head: bytes) -> str | None:
    """Describe a file, with advice, if its first bytes do not fit its name; return None if they may fit."""
    if not head:
        return "an empty file; download or write it again"
    text = head.lstrip().lower()
    for known, what in _STARTS.items():
        if head.startswith(known) or (known.startswith(b"<") and text.startswith(known)):
            return what
    return None


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins like a safetensors file: with the length of a JSON object, then the object."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def is_torch(head: bytes) -> bool:
    """Return whether a file begins like those that PyTorch writes, which are zip files or pickles."""
    return head.startswith((b"PK\x03\x04", b"\x80\x02"))


def check_text(file: Path) -> None:
    """Raise an error if a text file is too large, or if it is another kind of file, such as a Git LFS pointer."""
    head = start(file)
    if head and (what := mistaken(head)):
        raise CheckpointError(f"{file}: is {what}")
    if (size := file.stat().st_size) > LARGEST_TEXT:
        raise CheckpointError(f"{file}: has {size:,} bytes; expected at most {LARGEST_TEXT:,}")


def read_text(file: Path) -> bytes:
    """Return the bytes of a text file that `check_text` accepts."""
    check_text(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(_with_name(file, error)) from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return parse_json(file, read_text(file))


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that the content of a file describes.

    Raises
    ------
    CheckpointError
        If the content is not JSON, is not an object, or has an object with two entries of the same name.
    """
    if not content:
        raise CheckpointError(f"{file}: is {mistaken(content)}")
    try:
        entries = strict_json.parse(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return entries


def _with_name(file: Path, error: OSError) -> str:
    """Return the message of an operating system's error, with the file's name."""
    return f"{file}: {error.strerror}" if error.strerror else str(error)
