"""Checkpoints are written in Hugging Face's layout, and appear complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import StoredTensor, float_dtypes
from ..config import GPT2Config
from ..tokenizer import Tokenizer
from .formats import WEIGHTS_FILE, is_finite
from .names import prefixed_name
from .reading import CONFIG_FILE, read_checkpoint
from .safetensors_files import write_safetensors


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: GPT2Config,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None = None,
    *,
    force: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write a checkpoint that `read_checkpoint` and transformers read. The directory appears complete or not at all.

    Parameters
    ----------
    directory : path
        Where to; unless force is given, it must not exist, or be empty.
    config : GPT2Config
    tensors : dict
        By path, as `read_checkpoint` returns them; each is read when it is written.
    tokenizer : Tokenizer, optional
        Whose files to add.
    force : bool
        Whether to replace a directory, with all that it holds.
    progress : callable, optional
        Wraps the iterable of tensors, as tqdm does.

    Raises
    ------
    FileExistsError
        If the directory exists and may not be replaced.
    """
    directory = Path(os.path.realpath(directory))  # a link to a directory stays one
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory}: exists already; give a new directory, this is none")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise FileExistsError(f"{directory}: exists already; give a new directory, or replace this one by force")
    with _appearing(directory, force) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        named = {prefixed_name(path): tensor for path, tensor in tensors.items()}
        write_safetensors(draft / WEIGHTS_FILE, named, progress)
        if tokenizer is not None:
            tokenizer.save(draft)


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> str:
    """Write any checkpoint anew in Hugging Face's layout; nothing is computed.

    Parameters
    ----------
    source : path or str
        What `read_checkpoint` takes; it may be the directory itself, with force.
    directory : path
        Where to.
    dtype : str, optional
        ``float32``, ``float64``, ``bfloat16`` or ``float16``; the source's own unless given.
    force : bool
        Whether to replace a directory, with all that it holds.
    progress : callable, optional
        Wraps the iterable of tensors, as tqdm does.

    Returns
    -------
    str
        What the source was found to be.

    Raises
    ------
    CheckpointError
        If the source is not a whole GPT-2.
    FileExistsError
        If the directory exists and may not be replaced.
    ValueError
        If there is no such dtype, or a weight is beyond its range.
    """
    if dtype is not None and dtype not in float_dtypes:
        raise ValueError(f"no floating dtype {dtype!r}; choose one of {', '.join(float_dtypes)}")
    found, inside = read_checkpoint(source), Path(source).resolve()
    if Path(directory).resolve() in inside.parents:
        raise ValueError(f"{os.fspath(directory)}: holds {os.fspath(source)}, and more; give another directory")
    tensors = {path: _cast(path, tensor, dtype or tensor.dtype) for path, tensor in found.tensors.items()}
    write_checkpoint(directory, found.config, tensors, found.tokenizer, force=force, progress=progress)
    return found.source


def _cast(path: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
    def read() -> np.ndarray:
        with np.errstate(over="ignore"):
            a = tensor.read().astype(float_dtypes[dtype], copy=False)
        if not is_finite(a):
            raise ValueError(f"{path} holds numbers that are beyond the range of {dtype}")
        return a

    return StoredTensor(tensor.shape, dtype, tensor.read if dtype == tensor.dtype else read)


@contextlib.contextmanager
def _appearing(directory: Path, force: bool) -> Iterator[Path]:
    """Give a temporary sibling directory that takes its name when the block ends well, and vanishes otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        for file in draft.iterdir():  # on the disk before its name is: after a power cut too it is whole or absent
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if force and directory.exists():
            _exchange(draft, directory)
        else:
            draft.replace(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _exchange(draft: Path, directory: Path) -> None:
    """Swap the names of two directories; where the system can, there is one of either name at every moment."""
    if _swap(draft, directory):
        return
    aside = draft.with_name(f"{draft.name}-old")
    directory.rename(aside)
    try:
        draft.rename(directory)
    except BaseException:
        aside.rename(directory)
        raise
    aside.rename(draft)  # to be removed by this name


def _swap(first: Path, second: Path) -> bool:
    """Swap two names at once; return False where the system cannot. Linux can, and Python has no name for it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # of the kernel, of the file system
        return False
    raise OSError(code, os.strerror(code), str(second))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
