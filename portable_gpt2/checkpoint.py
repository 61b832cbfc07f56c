"""Checkpoints in Hugging Face's layout: a directory with ``config.json`` and ``model.safetensors``, read and written.

Tensors cross this module as NumPy arrays by path (``h3/attn/c_attn/w``); which framework they end in is decided above.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import GPT2Config
from .params import shapes

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

_PREFIX = "transformer."
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LEAVES = {"w": "weight", "g": "weight", "b": "bias"}
_OTHER_FILES = (".bin", ".safetensors", ".index.json", ".h5", ".msgpack", ".index")  # weights that are not read here
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as a GPT-2; the message names the file, and the tensor if it is one."""


def hugging_face_name(path: str) -> str:
    """Return Hugging Face's name of a parameter, without prefix: ``h3/ln_1/g`` is ``h.3.ln_1.weight``."""
    scope, _, leaf = path.rpartition("/")
    if not scope:
        return f"{leaf}.weight"
    return re.sub(r"^h(\d+)\.", r"h.\1.", f"{scope.replace('/', '.')}.") + _LEAVES[leaf]


def read_checkpoint(directory: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Read a checkpoint's configuration and map its tensors into memory, without reading them.

    Parameters
    ----------
    directory : path
        Holds ``config.json`` and ``model.safetensors``.

    Returns
    -------
    config : GPT2Config
    tensors : dict
        Arrays by path, in the order of `params.shapes`, in the file's dtype. Their memory is the file's, private to
        this process: what is written to it does not reach the file.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated or malformed, the configuration is not a GPT-2's, or a tensor is missing, one
        too many, or of another shape than the configuration says.

    Notes
    -----
    Tensors may carry the prefix ``transformer.`` or not; the buffers of masks that old versions wrote are dropped, and
    so is an ``lm_head.weight`` that equals wte.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = _read_config(directory / CONFIG_FILE)
    return config, _map_tensors(directory / WEIGHTS_FILE, config)


def _read_config(file: Path) -> GPT2Config:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a checkpoint holds {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    try:
        return GPT2Config.from_dict(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _map_tensors(file: Path, config: GPT2Config) -> dict[str, np.ndarray]:
    if not file.is_file():
        others = sorted(p.name for p in file.parent.iterdir() if p.name.endswith(_OTHER_FILES))
        there = f" (there are {', '.join(others)})" if others else ""
        raise CheckpointError(
            f"{file}: no such file{there}; save the model as one safetensors file, as transformers' "
            f"save_pretrained does for models under its max_shard_size"
        )
    found = _map_safetensors(file)
    if config.n_layer > len(found):  # before a list of what so many layers should hold is made
        raise CheckpointError(f"{file}: holds {len(found)} tensors; {CONFIG_FILE} says n_layer = {config.n_layer}")
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in found) else ""
    expected = {f"{prefix}{hugging_face_name(path)}": (path, shape) for path, shape in shapes(config).items()}

    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{file}: lacks {_some(missing)}")
    head = found.pop("lm_head.weight", None)
    extra = [
        name
        for name in found
        if name not in expected and not (name.startswith(prefix) and _MASK_BUFFER.fullmatch(name[len(prefix) :]))
    ]
    if extra:
        raise CheckpointError(f"{file}: holds {_some(extra)}, which a GPT-2 of this {CONFIG_FILE} does not have")
    for name, (_, shape) in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(found[name].shape)}; {CONFIG_FILE} makes it {list(shape)}"
            )
    if head is not None and not np.array_equal(head, found[f"{prefix}wte.weight"]):
        raise CheckpointError(f"{file}: lm_head.weight differs from wte.weight, but {CONFIG_FILE} ties the two")
    return {path: found[name] for name, (path, _) in expected.items()}


def _map_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Map the tensors of a file. The safetensors package checks its header; arrays of its own would be copies."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            if _MASK_BUFFER.fullmatch(name.removeprefix(_PREFIX)):
                continue
            raise CheckpointError(f"{file}: {name} is of dtype {entry['dtype']}; expected {' or '.join(_DTYPES)}")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(memory, _DTYPES[entry["dtype"]], math.prod(entry["shape"]), offset=start)
        weakref.finalize(flat, _release, memory, start, end).atexit = False
        tensors[name] = np.require(flat, requirements="A").reshape(entry["shape"])
    return tensors


def _release(memory: mmap.mmap, start: int, end: int) -> None:
    """Give back the pages of a tensor that nothing refers to any more: what was copied would be in memory twice.

    Only whole pages: what a neighbour has written to its part of a page it would lose.
    """
    page = mmap.ALLOCATIONGRANULARITY
    start, end = -(-start // page) * page, end // page * page
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def write_checkpoint(
    directory: str | os.PathLike[str], config: GPT2Config, tensors: Mapping[str, np.ndarray], write_more: Any = None
) -> None:
    """Write a checkpoint that `read_checkpoint` and transformers read. The directory appears complete or not at all.

    Parameters
    ----------
    directory : path
        Where to; it must not exist, or be empty.
    config : GPT2Config
    tensors : dict
        Arrays by path, as `read_checkpoint` returns them.
    write_more : callable, optional
        Called with the directory before it takes its name, to add files (the tokenizer's) to it.

    Raises
    ------
    FileExistsError
        If the directory exists and is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: exists already; give a new directory")
    with _appearing(directory) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        named = {f"{_PREFIX}{hugging_face_name(path)}": np.ascontiguousarray(a) for path, a in tensors.items()}
        save_file(named, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        if write_more is not None:
            write_more(draft)


@contextlib.contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """Give a temporary sibling directory that takes its name when the block ends well, and vanishes otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        draft.replace(directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
