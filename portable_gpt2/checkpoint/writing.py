"""Checkpoints are written in Hugging Face's layout, and appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import checks
from ..backend import StoredTensor, float_dtypes
from ..config import GPT2Config
from ..files import appearing
from ..tokenizer import Tokenizer
from .companions import TOKENIZER_FILES, written_companions
from .formats import WEIGHTS_FILE, cast
from .names import prefixed_name
from .reading import read_checkpoint
from .safetensors_files import write_safetensors


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: GPT2Config,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None = None,
    *,
    companions: Mapping[str, bytes] = MappingProxyType({}),
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
    companions : dict
        Other files to add, by name, as `read_checkpoint` returns them.
    force : bool
        Whether to replace a directory, with all that it holds.
    progress : callable, optional
        Wraps the iterable of tensors, as tqdm does.

    Raises
    ------
    FileExistsError
        If the directory exists and may not be replaced.
    """
    directory = _free(directory, force)
    with appearing(directory, force) as draft:
        write_files(draft, config, tensors, tokenizer, companions, progress)


def write_files(
    directory: Path,
    config: GPT2Config,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    companions: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write the files of a checkpoint into a directory that is there."""
    files = written_companions(config, (tensor.dtype for tensor in tensors.values()), companions)
    for name, content in files.items():
        if tokenizer is None or name not in TOKENIZER_FILES:  # a tokenizer that was put in their place has its own
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
    named = {prefixed_name(path): tensor for path, tensor in tensors.items()}
    write_safetensors(directory / WEIGHTS_FILE, named, progress)
    if tokenizer is not None:
        tokenizer.save(directory)


def _free(directory: str | os.PathLike[str], force: bool) -> Path:
    """Return a directory that may be written, by its real path: a link to a directory stays one."""
    directory = Path(os.path.realpath(checks.path("directory", directory)))
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory}: exists already; give a new directory, this is none")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise FileExistsError(f"{directory}: exists already; give a new directory, or replace this one by force")
    return directory


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
    checks.path("source", source)
    _free(directory, force)  # before anything is fetched or read
    found, inside = read_checkpoint(source), Path(source).resolve()
    if Path(directory).resolve() in inside.parents:
        raise ValueError(f"{os.fspath(directory)}: holds {os.fspath(source)}, and more; give another directory")
    tensors = {path: cast(path, tensor, dtype or tensor.dtype) for path, tensor in found.tensors.items()}
    write_checkpoint(
        directory,
        found.config,
        tensors,
        found.tokenizer,
        companions=found.companions,
        force=force,
        progress=progress,
    )
    return found.source
