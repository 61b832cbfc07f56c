"""The files that hold weights: which names they have, who reads them, and how one set is spread over several."""

from __future__ import annotations

import ctypes
import fnmatch
import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import (
    BackendNotInstalled,
    StoredTensor,
    available_backends,
    backend_of,
    float_dtypes,
    get_backend,
    how_to_install,
)
from .errors import CheckpointError
from .names import Found
from .safetensors_files import map_safetensors

ENTRY_POINTS = "portable_gpt2.checkpoints"
WEIGHTS_FILE = "model.safetensors"
_LARGE = 1 << 18  # numbers
INDEX = ".index.json"  # behind the name that the weights would have in one file


class Format(NamedTuple):
    """Files of weights, and what reads them."""

    pattern: str
    """Of their names, as `fnmatch` understands it."""
    backend: str | None
    """Whose `Backend.read_checkpoint` reads them; None: they are safetensors, which are read here."""


def formats() -> list[Format]:
    """Return all formats there is a reader for, the preferred first: safetensors, then what can be read here."""
    available = available_backends()
    return [Format(WEIGHTS_FILE, None), *sorted(_declared(), key=lambda format: format.backend not in available)]


@functools.cache
def _declared() -> list[Format]:
    points = sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return [Format(pattern, point.name) for point in points for pattern in point.load()]


class Weights(NamedTuple):
    """The files that hold a model's weights."""

    file: Path
    """The one that holds them, or the index of those that do."""
    format: Format
    shards: dict[str, list[str]] | None
    """The names of the tensors in each of several files, by the file's name."""


def find_weights(directory: Path) -> Weights | None:
    """Return the weights that a directory holds, if any.

    Raises
    ------
    CheckpointError
        If it is not clear which are meant, or an index is malformed.
    """
    names = [file.name for file in directory.iterdir() if file.is_file()]
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
    return directory / names[0]


def read_index(file: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each of the files that an index speaks of."""
    files = read_json(file).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{file}: weight_map is {files!r}; expected an object of tensors' names and files'")
    shards: dict[str, list[str]] = {}
    for tensor, name in files.items():
        # Who wrote an index has no say in what else is read: a shard stands beside it. (Who set up the directory has:
        # symbolic links are followed, and the hub's cache is made of them.)
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:*?[]"):
            raise CheckpointError(f"{file}: {tensor} is said to be in {name!r}; expected the bare name of a file")
        shards.setdefault(name, []).append(tensor)
    return shards


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return entries


def open_weights(weights: Weights) -> dict[str, Found]:
    """Return the tensors of all files by name, none of them read."""
    if weights.shards is None:
        return dict(_open_file(weights.file, weights.format))
    found = {}
    for name, expected in weights.shards.items():
        file = weights.file.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; {weights.file.name} says that it holds {expected[0]}")
        held = dict(_open_file(file, weights.format))
        if held.keys() != set(expected):
            tensor = min(held.keys() ^ set(expected))
            holds, says = ("holds", "does not say so") if tensor in held else ("lacks", "says that it is there")
            raise CheckpointError(f"{file}: {holds} {tensor}; {weights.file.name} {says}")
        found.update(held)
    return found


def _open_file(file: Path, format: Format) -> Iterator[tuple[str, Found]]:
    if format.backend is None:
        tensors = map_safetensors(file)
    else:
        if format.backend not in available_backends():
            raise BackendNotInstalled(
                f"{file}: it takes {format.backend} to read it, which is not installed: "
                f"{how_to_install(format.backend)}"
            )
        reader = get_backend(format.backend)
        try:
            tensors = reader.read_checkpoint(str(file))
        except Exception as error:  # a damaged file may make a framework raise anything
            raise CheckpointError(f"{file}: {_brief(error)}") from error
    for name, tensor in tensors.items():
        yield name, Found(file, tensor._replace(read=functools.partial(_read, file, name, tensor)))


def _read(file: Path, name: str, tensor: StoredTensor) -> np.ndarray:
    """Read a tensor, and refuse it if it is not what its file said, or holds what is no number."""
    if math.prod(tensor.shape) >= _LARGE:
        _trim()
    try:
        a = tensor.read()
    except Exception as error:
        raise CheckpointError(f"{file}: {name}: {_brief(error)}") from error
    if (a.shape, a.dtype.name) != (tensor.shape, tensor.dtype):
        raise CheckpointError(
            f"{file}: {name} turned out to be {a.dtype.name} {list(a.shape)}; "
            f"expected {tensor.dtype} {list(tensor.shape)}"
        )
    if not is_finite(a):
        raise CheckpointError(f"{file}: {name} holds a NaN or an infinity")
    return a


def _trim() -> None:
    """Have the C library give back the memory of the tensors before, which its heaps, one a thread, would hold on to.

    Without it, loading 124M peaked at up to 1.22 of the weights (TensorFlow) and 1.15 (JAX), with it at 1.00 and 1.03.
    All calls together took 0.07 s.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        malloc_trim(0)


def is_finite(a: np.ndarray) -> bool:
    """Return whether no element is NaN or infinite.

    Their bits are those of an infinity or above, taken for an int, with sign or without: two reductions, no copy.
    """
    infinity, signed, unsigned = np.asarray(np.inf, a.dtype), f"i{a.itemsize}", f"u{a.itemsize}"
    return bool(
        a.view(signed).max() < infinity.view(signed) and a.view(unsigned).max() < np.negative(infinity).view(unsigned)
    )


def stored(x: Any) -> StoredTensor:
    """Return an array of any backend as a tensor to be written."""
    backend = backend_of(x)
    return StoredTensor(backend.shape(x), str(backend.dtype_name(x)), lambda: backend.to_numpy(x))


def cast(path: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
    """Return a tensor that is read in another dtype; reading raises a ValueError if a number is beyond its range."""

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):
            a = tensor.read().astype(float_dtypes[dtype], copy=False)
        if not is_finite(a):
            raise ValueError(f"{path} holds numbers that are beyond the range of {dtype}")
        return a

    return StoredTensor(tensor.shape, dtype, tensor.read if dtype == tensor.dtype else read)


def _brief(error: Exception) -> str:
    """Return an exception in a line: some frameworks' go on for many."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
