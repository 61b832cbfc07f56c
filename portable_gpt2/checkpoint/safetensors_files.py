"""Files of safetensors: mapped tensor by tensor, and written tensor by tensor."""

from __future__ import annotations

import functools
import json
import math
import mmap
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..backend import StoredTensor, float_dtypes
from .contents import parse_json
from .errors import CheckpointError

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def map_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. The package checks its header; arrays of its own would be copies."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = parse_json(file, stream.read(size))
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), _NAMES.get(entry["dtype"], entry["dtype"])
            read = functools.partial(_map, memory, 8 + size + entry["data_offsets"][0], shape, dtype)
            tensors[name] = StoredTensor(shape, dtype, read)
    return tensors


def _map(memory: mmap.mmap, start: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return a tensor; its memory is the file's, private to this process: what is written to it reaches no file."""
    flat = np.frombuffer(memory, float_dtypes[dtype], math.prod(shape), offset=start)
    weakref.finalize(flat, _release, memory, start, start + flat.nbytes).atexit = False
    return np.require(flat, requirements="A").reshape(shape)


def _release(memory: mmap.mmap, start: int, end: int) -> None:
    """Give back the pages of a tensor that nothing refers to any more: what was copied would be in memory twice.

    Only whole pages: what a neighbour has written to its part of a page it would lose.
    """
    page = mmap.ALLOCATIONGRANULARITY
    start, end = -(-start // page) * page, end // page * page
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def write_safetensors(
    file: Path, tensors: Mapping[str, StoredTensor], progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> None:
    """Write tensors by name, each read when it is its turn: the package's own writer wants all of them in memory."""
    # Wide numbers first, as the package does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -float_dtypes[tensors[name].dtype].itemsize)
    codes, end = {name: code for code, name in _NAMES.items()}, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses the file
    for name in names:
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * float_dtypes[dtype].itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in progress(names):
            stream.write(np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data)
