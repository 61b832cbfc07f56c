"""What a checkpoint is: a configuration, weights that fit it, perhaps a tokenizer, in a directory or on the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from .. import checks
from ..backend import StoredTensor
from ..config import GPT2Config
from ..tokenizer import Tokenizer
from . import hub
from .errors import CheckpointError
from .formats import INDEX, WEIGHTS_FILE, find_weights, formats, open_weights, read_json
from .names import by_path, is_openai

CONFIG_FILE, HPARAMS_FILE = "config.json", "hparams.json"
SHIPPED = Path(__file__).parent.parent / "models"

# Weights that there is no reader for, or that no reader of claims by their name.
_OTHER_FILES = (".bin", ".safetensors", ".index.json", ".h5", ".msgpack", ".index", ".gguf", ".onnx")


class Checkpoint(NamedTuple):
    """A checkpoint whose weights are not read yet."""

    source: str
    """What was found, in a few words."""
    config: GPT2Config
    tensors: dict[str, StoredTensor]
    """By path, in the order of `params.shapes`, in the files' dtypes."""
    tokenizer: Tokenizer | None


def read_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Find a checkpoint and check that its files are those of a whole GPT-2, before the weights are read.

    Parameters
    ----------
    source : path or str
        A directory: Hugging Face's layout (``config.json`` and ``model.safetensors``, or several files and their
        index, or ``pytorch_model.bin``), or OpenAI's release (``hparams.json`` and ``model.ckpt``). Where there is
        none of this name, the model ``shakespeare``, which is a part of this package, or one of the hub: ``gpt2``,
        ``user/model`` or ``user/model@revision``.

    Returns
    -------
    Checkpoint
        What is written to a tensor that was read does not reach the file.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, a file is missing, truncated or malformed, the configuration is not a GPT-2's,
        or a tensor is missing, one too many, or of another shape or dtype than it should be. Reading a tensor raises it
        too, if it holds a NaN or an infinity. The message names the file, and the tensor.
    BackendNotInstalled
        If it takes a framework to read the weights, which is not there. The message says what to install.
    """
    directory, said = _find(source)
    config_name = next((n for n in (CONFIG_FILE, HPARAMS_FILE) if (directory / n).exists()), CONFIG_FILE)
    config = _read_config(directory / config_name)
    weights = find_weights(directory)
    if weights is None:
        raise CheckpointError(_no_weights(directory))
    found = open_weights(weights)
    tensors = by_path(weights.file, found, config, config_name)

    layout = "OpenAI's release" if is_openai(found) else "Hugging Face's layout"
    files = weights.file.name if weights.shards is None else f"{weights.file.name} of {len(weights.shards)} files"
    dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    tokenizer = _read_tokenizer(directory, config)
    if config_name == HPARAMS_FILE and tokenizer is not None:  # which does not say it
        config = dataclasses.replace(config, eos_token_id=tokenizer.end_of_text)
    return Checkpoint(f"{said}{layout}, {files}, {dtypes}", config, tensors, tokenizer)


def _find(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """Return the directory that is meant, and where it is from if that is not plain."""
    directory = checks.path("source", source)
    if directory.is_dir():
        return directory, ""
    if isinstance(source, str) and source in shipped_models():
        return SHIPPED / source, f"{source}, which ships with portable_gpt2, "
    if isinstance(source, str) and not directory.exists() and hub.is_id(source):
        directory = hub.download(source)
        return directory, f"{source} of the hub at {directory.name[:8]}, "
    raise CheckpointError(
        f"{os.fspath(source)}: no such directory; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}, the id of a "
        f"model of the hub, such as gpt2, user/model or user/model@revision, or {', '.join(shipped_models())}"
    )


def shipped_models() -> list[str]:
    """Return the names of the models that are a part of this package."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{CONFIG_FILE}"))


def _read_config(file: Path) -> GPT2Config:
    if not file.exists():
        raise CheckpointError(
            f"{file}: no such file; a checkpoint holds {CONFIG_FILE} and {WEIGHTS_FILE}, or OpenAI's {HPARAMS_FILE} "
            f"and model.ckpt"
        )
    entries = read_json(file)
    try:
        return GPT2Config.from_hparams(entries) if file.name == HPARAMS_FILE else GPT2Config.from_dict(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _no_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.iterdir() if p.name.endswith(_OTHER_FILES))
    there = f" (there are {', '.join(others)})" if others else ""
    readable = ", ".join(format.pattern for format in formats())
    return f"{directory / WEIGHTS_FILE}: no such file{there}; weights are read from {readable}, or those of an {INDEX}"


def _read_tokenizer(directory: Path, config: GPT2Config) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.load(directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer is not None and len(tokenizer) > config.n_vocab:
        raise CheckpointError(f"{directory}: the tokenizer has {len(tokenizer)} entries and the model {config.n_vocab}")
    return tokenizer
