"""Find and open the files of weights, in every format that can be read here."""

from __future__ import annotations

import ctypes
import fnmatch
import functools
import glob
import importlib.metadata
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checks import named, shown
from ..host import CheckpointError, StoredTensor, lengths, whole
from ..registry import BackendNotInstalled, available_backends, get_backend, how_to_install
from .contents import exists, is_safetensors, is_torch, mistaken, read_json, start
from .gguf_files import MAGIC, open_gguf
from .names import Found, prefix_of
from .safetensors_files import open_safetensors
from .tensors import is_finite

ENTRY_POINTS = "portable_gpt2.checkpoints"
WEIGHTS_FILE = "model.safetensors"
GGUF_FILES = "*.gguf"
_LARGE = 1 << 18  # the number of elements from which a tensor is large
INDEX = ".index.json"
"""The end of the name of an index, which lists several files of weights.

The beginning of its name is the name that a single file would have.
"""


class Format(NamedTuple):
    """A file format of weights."""

    pattern: str
    """The pattern of the names of these files, for `fnmatch`."""
    backend: str | None
    """The name of the backend whose `read_checkpoint` reads such files; None for safetensors and GGUF, read here."""


def formats() -> list[Format]:
    """Return all formats in order of preference.

    First comes safetensors, then the formats of installed frameworks, GGUF, and the formats of other frameworks.
    """
    declared = [*_declared(), Format(GGUF_FILES, None)]
    readable = {None, *available_backends()}
    return [Format(WEIGHTS_FILE, None), *sorted(declared, key=lambda format: format.backend not in readable)]


@functools.cache
def _declared() -> list[Format]:
    points = sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return [Format(pattern, point.name) for point in points for pattern in point.load()]


class Weights(NamedTuple):
    """The files that hold a model's weights."""

    file: Path
    """The file of all weights, or the index if there are several files."""
    format: Format
    shards: dict[str, list[str]] | None
    """The names of the tensors in each file, by the file's name; None if there is one file."""


class Opened(NamedTuple):
    """Files of weights that were opened."""

    tensors: dict[str, Found]
    rest: dict[str, Any]
    """The other entries of a training state, or the values of a GGUF file, by name."""


def find_weights(directory: Path, file: Path | None = None) -> Weights | None:
    """Return the weights in a directory, or those in one file of it; None if there are none.

    Raises
    ------
    CheckpointError
        If several files could be meant, an index is malformed, or something other than a regular file has such a name.
    """
    try:
        names = [file.name] if file is not None else os.listdir(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror}") from None
    for each in formats():
        if whole := fnmatch.filter(names, each.pattern):
            return Weights(_the_one(directory, whole), each, None)
        if indices := fnmatch.filter(names, each.pattern + INDEX):
            index = _the_one(directory, indices)
            return Weights(index, each, read_index(index))
    return None


def _the_one(directory: Path, names: list[str]) -> Path:
    if len(names) > 1:
        raise CheckpointError(f"{directory}: holds {' and '.join(sorted(names))}; keep the one that is meant")
    exists(directory / names[0])
    return directory / names[0]


def read_index(file: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each file that an index lists, by the file's name."""
    files = read_json(file).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{file}: weight_map is {files!r}; expected an object that maps tensors to files")
    shards: dict[str, list[str]] = {}
    for tensor, name in files.items():
        # The author of an index must not choose other files to be read, so a shard must be in the same directory. The
        # owner of the directory may choose them: symbolic links are followed, and the hub's cache consists of links.
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:*?[]"):
            raise CheckpointError(
                f"{file}: {named(tensor)} is said to be in {name!r}; expected the bare name of a file"
            )
        shards.setdefault(name, []).append(tensor)
    return shards


def open_weights(weights: Weights) -> Opened:
    """Open the files of weights without reading a tensor."""
    if weights.shards is None:
        return _open_file(weights.file, weights.format)
    tensors: dict[str, Found] = {}
    for name, expected in weights.shards.items():
        file = weights.file.parent / name
        if not exists(file):
            raise CheckpointError(f"{file}: no such file; {weights.file.name} says that it holds {named(expected[0])}")
        held = _open_file(file, weights.format).tensors
        if held.keys() != set(expected):
            tensor = min(held.keys() ^ set(expected))
            holds, says = ("holds", "does not say so") if tensor in held else ("lacks", "says that it is there")
            raise CheckpointError(f"{file}: {holds} {named(tensor)}; {weights.file.name} {says}")
        tensors.update(held)
    return Opened(tensors, {})


def _open_file(file: Path, format: Format) -> Opened:
    if format.backend is not None and format.backend not in available_backends():
        raise BackendNotInstalled(
            f"{file}: reading it takes {format.backend}, which is not installed: {how_to_install(format.backend)}"
        )
    for part in file.parent.glob(f"{glob.escape(file.stem)}.*"):  # TensorFlow writes several files
        exists(part)
    head = start(file)
    is_gguf = format.pattern == GGUF_FILES
    if (what := mistaken(head)) and not (is_gguf and head.startswith(MAGIC)):
        raise CheckpointError(f"{file}: is {what}")
    held: Mapping[str, Any]
    rest: dict[str, Any] = {}
    if is_gguf:
        rest, held = open_gguf(file)
    elif format.backend is None:
        if is_torch(head):
            raise CheckpointError(f"{file}: is a file of PyTorch; give it the name pytorch_model.bin")
        held = open_safetensors(file)
    else:
        if is_safetensors(head):
            raise CheckpointError(f"{file}: is a safetensors file; give it the name {WEIGHTS_FILE}")
        try:
            held = get_backend(format.backend).read_checkpoint(str(file))
        except Exception as error:  # a framework may raise an error of any class for a damaged file
            raise CheckpointError(f"{file}: {_brief(error)}") from None
    if format.backend is not None:
        held, rest = _unnested(file, held)
    return Opened(
        {name: Found(file, _checked(file, name, tensor)) for name, tensor in held.items()},
        rest,
    )


def _unnested(file: Path, held: Any) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Return the tensors of a model and the rest of the file.

    If the file is a training state, the tensors are one of its entries.
    """
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{file}: holds an object of type {type(held).__name__}; expected tensors by name")
    if models := [name for name, entry in held.items() if _is_model(entry)]:
        if len(models) > 1:
            names = " and ".join(map(repr, models))
            raise CheckpointError(f"{file}: holds several models, {names}; save the one that is meant")
        return dict(held[models[0]]), {name: entry for name, entry in held.items() if name != models[0]}
    for name, entry in held.items():
        if not isinstance(name, str) or not isinstance(entry, StoredTensor):
            raise CheckpointError(
                f"{file}: holds {shown(name)}, of type {type(entry).__name__}; expected names and tensors, or a "
                f"training state that holds those of one GPT-2"
            )
    return dict(held), {}


def _is_model(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and all(isinstance(name, str) and isinstance(x, StoredTensor) for name, x in entry.items())
        and prefix_of(entry) is not None
    )


def _checked(file: Path, name: str, tensor: StoredTensor) -> StoredTensor:
    """Return a tensor that is checked when it is read. A tensor that cannot be read in parts is checked as a whole."""
    read_part = functools.partial(_read, file, name, tensor)
    read = functools.partial(read_part, whole(tensor.shape))
    return tensor._replace(read=read, read_part=tensor.read_part and read_part)


def _read(file: Path, name: str, tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
    """Read a tensor or a part. Raise an error if its shape or dtype is not as expected, or it has NaN or infinity."""
    shape, dtype = lengths(index), tensor.dtype
    if math.prod(shape) >= _LARGE:
        _trim()
    try:
        a = tensor.part(index)
    except Exception as error:
        raise CheckpointError(f"{file}: {name}: {_brief(error)}") from None
    if (a.shape, a.dtype.name) != (shape, dtype):
        raise CheckpointError(
            f"{file}: {name} turned out to be {a.dtype.name} {list(a.shape)}; expected {dtype} {list(shape)}"
        )
    if not is_finite(a):
        raise CheckpointError(f"{file}: {name} holds a NaN or an infinity")
    return a


def _trim() -> None:
    """Tell the C library to return freed memory to the system, which it would otherwise keep for each thread.

    While the 124M model was loaded without these calls, the peak of memory was 1.22 times the weights for TensorFlow
    and 1.15 times for JAX. With these calls it is 1.00 and 1.03 times the weights. All calls together take 0.07 s.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        malloc_trim(0)


def _brief(error: Exception) -> str:
    """Return the message of an exception in one line. Some frameworks' messages have many lines."""
    if isinstance(error, CheckpointError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
