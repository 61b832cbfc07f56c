"""What stands in a checkpoint's file: JSON without ambiguities, or something else than the file's name promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import files, strict_json
from ..host import CheckpointError

LARGEST_TEXT = 1 << 26
"""The largest file of text that is read, in bytes: all but weights are far smaller."""

_PAGE = "an HTML page, perhaps the error page of a server; download the file again"
_ARCHIVE = "archive; unpack it and give the directory"
_STARTS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": (
        "a Git LFS pointer, which stands for a file that was not downloaded; run `git lfs pull` in its repository"
    ),
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"\x1f\x8b": f"a gzip {_ARCHIVE}",
    b"BZh": f"a bzip2 {_ARCHIVE}",
    b"\xfd7zXZ\0": f"an xz {_ARCHIVE}",
    b"\x28\xb5\x2f\xfd": f"a zstd {_ARCHIVE}",
    b"7z\xbc\xaf": f"a 7z {_ARCHIVE}",
    b"GGUF": "a GGUF file, of llama.cpp; give the checkpoint that it was made from",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them; convert it with transformers to model.safetensors",
}


def exists(file: Path) -> bool:
    """Return whether there is a file of this name.

    Raises
    ------
    CheckpointError
        If there is something other than a regular file, or it cannot be reached. To open it might wait for ever.
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
    """Describe a file that is another thing than its name promises, with advice; None if its first bytes look right."""
    if not head:
        return "an empty file; download or write it again"
    text = head.lstrip().lower()
    for known, what in _STARTS.items():
        if head.startswith(known) or (known.startswith(b"<") and text.startswith(known)):
            return what
    return None


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins as safetensors do: with the length of a header, and the header's brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def is_torch(head: bytes) -> bool:
    """Return whether a file begins as those that PyTorch writes: as a zip file or as a pickle."""
    return head.startswith((b"PK\x03\x04", b"\x80\x02"))


def check_text(file: Path) -> None:
    """Refuse a file of text that is larger than any such file, or is something else, such as a Git LFS pointer."""
    head = start(file)
    if head and (what := mistaken(head)):
        raise CheckpointError(f"{file}: is {what}")
    if (size := file.stat().st_size) > LARGEST_TEXT:
        raise CheckpointError(f"{file}: has {size:,} bytes; expected at most {LARGEST_TEXT:,}")


def read_text(file: Path) -> bytes:
    """Return the bytes of a file of text, once `check_text` accepts it."""
    check_text(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(_with_name(file, error)) from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds."""
    return parse_json(file, read_text(file))


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that a file's content is.

    Raises
    ------
    CheckpointError
        If it is not JSON, not an object, or an object in it has two entries of one name.
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
    """Return an error of the system as a sentence that names the file."""
    return f"{file}: {error.strerror}" if error.strerror else str(error)
