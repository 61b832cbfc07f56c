"""Replace a checkpoint by another one.

The configuration, the weights and the tokenizer are replaced. Documents and the state of training stay. A directory
with any other file is not replaced, because that file might be lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..files import DRAFTS, Locked, appearing, lock
from .companions import CONFIG_FILE, GENERATION_FILE, UNREAD
from .formats import INDEX, WEIGHTS_FILE, formats

RUN = "training"
"""The name of the directory with the state of a training run, inside the directory of the run."""
RUN_LOCK = "lock"
"""The name of the lock that a training process holds, inside the directory RUN."""

_WEIGHTS = (
    WEIGHTS_FILE,
    "model-*.safetensors",
    "pytorch_model*.bin",
    "model.ckpt*",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "*.tflite",
    "*.onnx",
    "*.gguf",
)
_DESCRIPTION = (
    CONFIG_FILE,
    "hparams.json",
    GENERATION_FILE,
    "tokenizer*.json",
    *UNREAD,
    "chat_template.*",
    "checkpoint",  # TensorFlow's file with the name of the last model.ckpt
    ".DS_Store",  # macOS adds it to every directory that is viewed
    f"{DRAFTS}*",
)
_STAYS = (
    # documents
    "README*",
    "MODEL_CARD*",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
    # the state of training, as this package and transformers' Trainer write it
    "metrics.jsonl",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*.pth",
)
_DIRECTORIES = {"additional_chat_templates": "*.jinja", ".cache": "huggingface"}  # the hub's client makes .cache


@contextlib.contextmanager
def replacing_checkpoint(directory: Path, force: bool) -> Iterator[Path]:
    """Write the directory of a checkpoint that appears complete or not at all, as `files.appearing` does.

    With force, a checkpoint or a training run that exists is replaced. Documents such as ``README.md`` and the state of
    training stay.

    Raises
    ------
    OSError
        As for `files.appearing`, and if the directory contains a file that does not belong to a checkpoint or a run, or
        if a process is training the run.
    """
    with appearing(directory, force) as draft, _locked(directory):
        stay = _check_contents(directory)
        yield draft
        for name in stay:
            if not os.path.lexists(draft / name):
                _link(directory / name, draft / name)


def _check_contents(directory: Path) -> list[str]:
    """Return the names of the files that stay; raise an error if the directory is not a checkpoint's or a run's."""
    entries = sorted(directory.iterdir()) if directory.exists() else []
    weights = [*_WEIGHTS, *(pattern for format in formats() for pattern in (format.pattern, format.pattern + INDEX))]
    found, stay, foreign = False, [], []
    for entry in entries:
        name = entry.name
        if name == RUN and (entry / "run.json").is_file():
            found = True
            stay.append(name)
        elif entry.is_dir():
            if not (name in _DIRECTORIES and all(fnmatchcase(n, _DIRECTORIES[name]) for n in os.listdir(entry))):
                foreign.append(f"{name}/")
        elif not entry.is_file():
            foreign.append(name)
        elif _matches(name, weights):
            found = True
        elif _matches(name, _STAYS):
            stay.append(name)
        elif not _matches(name, _DESCRIPTION):
            foreign.append(name)
    if entries and (foreign or not found):
        names = foreign or [entry.name for entry in entries]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        why = "more than a checkpoint" if found else "no checkpoint"
        raise FileExistsError(f"{directory}: is not replaced, since it holds {why}: {shown}; give another directory")
    return stay


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of the run in a directory, if there is one, so that no process trains it while the block runs."""
    with contextlib.ExitStack() as stack:
        if (directory / RUN).is_dir():
            try:
                stack.enter_context(lock(directory / RUN / RUN_LOCK))
            except Locked as error:
                raise FileExistsError(f"{directory}: process {error.pid} trains there; wait until it ends") from None
        yield


def _link(old: Path, new: Path) -> None:
    """Give a file or a directory a second name. The contents are copied only if the file system needs that."""
    if old.is_dir() and not old.is_symlink():
        ignored = shutil.ignore_patterns(RUN_LOCK, f"{DRAFTS}*")
        shutil.copytree(old, new, symlinks=True, ignore=ignored, copy_function=_link_file)
    else:
        _link_file(str(old), str(new))


def _link_file(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # FAT and some network file systems have no hard links
        shutil.copy2(old, new, follow_symlinks=False)
