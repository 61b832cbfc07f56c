"""Read and write safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open

from ..host import CheckpointError, StoredTensor, float_dtypes
from .contents import parse_json
from .tensors import OpenFile

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name without reading them. The safetensors package checks the file's header."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None
    opened = OpenFile(file)
    size = int.from_bytes(opened.stream.read(8), "little")
    header = parse_json(file, opened.stream.read(size))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), _NAMES.get(entry["dtype"], entry["dtype"])
            tensors[name] = opened.tensor(8 + size + entry["data_offsets"][0], shape, dtype)
    return tensors


def write_safetensors(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write tensors, of float dtypes or int64, by name. Each tensor is read just before it is written.

    The writer of the safetensors package would need all tensors in memory. The default of `metadata` is the entry
    without which transformers refuses a file.
    """
    dtypes = {name: np.dtype(float_dtypes.get(tensor.dtype, tensor.dtype)) for name, tensor in tensors.items()}
    # The widest dtypes come first, as in files of the safetensors package, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    codes, end = {"int64": "I64", **{name: code for code, name in _NAMES.items()}}, 0
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    for name in names:
        shape, dtype, *_ = tensors[name]
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in progress(names):
            stream.write(np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data)
