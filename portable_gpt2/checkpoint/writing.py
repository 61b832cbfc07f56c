"""Write checkpoints in Hugging Face's layout or as a GGUF file. A checkpoint appears complete or not at all."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import checks
from ..config import GPT2Config
from ..files import already_exists, holds_file, replacing
from ..host import StoredTensor, TokenizerError, float_dtypes
from ..tokenizer import Tokenizer
from .companions import TOKENIZER_FILES, UNREAD, written_companions
from .formats import GGUF_FILES, WEIGHTS_FILE
from .gguf_files import write_gguf
from .gguf_models import FILE_TYPES, gguf_model
from .names import prefixed_name
from .reading import read_checkpoint
from .safetensors_files import write_safetensors
from .target import replacing_checkpoint
from .tensors import cast


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
        The target. Without force, it must be empty or not exist.
    config : GPT2Config
        The configuration of the model.
    tensors : dict
        The parameters by path, as `read_checkpoint` returns them. Each is read just before it is written.
    tokenizer : Tokenizer, optional
        The tokenizer whose files are added.
    companions : dict
        Other files to add, by name, as `read_checkpoint` returns them.
    force : bool
        Whether to replace the checkpoint, or the model of a training run, in the directory. Documents such as
        ``README.md`` and the state of training stay. A directory with any other file, a mount point, the current
        directory and the directories above it are never replaced.
    progress : callable, optional
        A function that wraps the iterable of tensors, as tqdm does.

    Raises
    ------
    OSError
        If the directory may not be replaced (FileExistsError), or cannot be written. This is checked before a tensor is
        read. The message names the files that are in the way.
    """
    with replacing_checkpoint(checks.path("directory", directory), force) as draft:
        write_files(draft, config, tensors, tokenizer, companions, progress)


def write_files(
    directory: Path,
    config: GPT2Config,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    companions: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write the files of a checkpoint into an existing directory."""
    files = written_companions(config, (tensor.dtype for tensor in tensors.values()), companions)
    for name, content in files.items():
        if tokenizer is None or name not in TOKENIZER_FILES:  # `save` below writes the files of the given tokenizer
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
    named = {prefixed_name(path): tensor for path, tensor in tensors.items()}
    write_safetensors(directory / WEIGHTS_FILE, named, progress)
    if tokenizer is not None:
        tokenizer.save(directory)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> str:
    """Copy a checkpoint of any layout to Hugging Face's layout or to a GGUF file, in its own dtype or another.

    A tokenizer that cannot be used here is copied unchanged to a directory, and left out of a GGUF file. A warning says
    why.

    Parameters
    ----------
    source : path or str
        The checkpoint, as `read_checkpoint` takes it. With force, it may be the target itself.
    target : path
        The directory or, if its name ends in ``.gguf``, the GGUF file. Without force, a directory must be empty or not
        exist, and a file must not exist.
    dtype : str, optional
        ``float32``, ``float64``, ``bfloat16`` or ``float16`` (default: the dtype of each tensor in the source). A GGUF
        file does not have float64; its biases, gains and positions are always in float32.
    force : bool
        Whether to replace a checkpoint in the directory, as for `write_checkpoint`, or the file.
    progress : callable, optional
        A function that wraps the iterable of tensors, as tqdm does.

    Returns
    -------
    str
        A description of the source.

    Raises
    ------
    CheckpointError
        If the source is not a complete GPT-2.
    OSError
        If the directory may not be replaced (FileExistsError), or cannot be written. This is checked before anything is
        downloaded or read.
    ValueError
        If there is no such dtype, a weight is beyond its range, or llama.cpp does not compute such a model.
    """
    checks.path("source", source)
    file = checks.path("target", target)
    is_gguf = fnmatch.fnmatchcase(file.name, GGUF_FILES)
    dtypes = FILE_TYPES if is_gguf else float_dtypes
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"no floating dtype {dtype!r}; choose one of {', '.join(dtypes)}")
    with (_replacing_file if is_gguf else replacing_checkpoint)(file, force) as draft:
        try:
            found = read_checkpoint(source)
        except TokenizerError as error:
            found = read_checkpoint(source, tokenizer=None)
            copied = ", ".join(name for name in found.companions if name in UNREAD) or "none of its files"
            without = "the file has no tokenizer" if is_gguf else f"copied unchanged: {copied}"
            warnings.warn(f"{error}; {without}", UserWarning, stacklevel=2)
        if is_gguf:
            if others := found.config.ends[1:]:
                why = f"a GGUF file has one end of text: {found.config.ends[0]} is kept, and {list(others)} is not"
                warnings.warn(why, UserWarning, stacklevel=2)
            write_gguf(draft, *gguf_model(found.config, found.tensors, found.tokenizer, dtype), progress)
        else:
            tensors = {path: cast(path, tensor, dtype or tensor.dtype) for path, tensor in found.tensors.items()}
            write_files(draft, found.config, tensors, found.tokenizer, found.companions, progress)
    return found.source


@contextlib.contextmanager
def _replacing_file(file: Path, force: bool) -> Iterator[Path]:
    with replacing(file) as draft:
        if holds_file(file) and not force:
            raise already_exists(file)
        yield draft
