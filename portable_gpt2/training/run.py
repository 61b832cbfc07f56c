"""Run: the directory of a training run, in which nothing is ever half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from ..backend import Backend, StoredTensor
from ..checkpoint import WEIGHTS_FILE, read_checkpoint, stored, write_files
from ..checkpoint.safetensors_files import map_safetensors, write_safetensors
from ..config import GPT2Config
from ..files import appearing, replacing
from ..params import Params, flatten, nest
from ..tokenizer import Tokenizer
from .data import open_tokens
from .optimizer import Moments
from .recipe import Recipe
from .trainer import State

_INSIDE = "training"
_RUN, _TOKENS, _POINTERS, _MOMENTS = "run.json", "tokens.bin", "checkpoints.json", "adamw.safetensors"
METRICS_FILE = "metrics.jsonl"


class Run:
    """A directory that holds a model in Hugging Face's layout, the best so far, and what it takes to go on.

    ::

        config.json, vocab.json, model.safetensors ...   what `GPT2.load` reads: the best checkpoint
        metrics.jsonl                                    an object for each step
        training/run.json, tokens.bin                    what was asked for; the text as token ids
        training/step-400/                               a checkpoint, with the optimizer's moments
        training/checkpoints.json                        which is the last, which the best

    A checkpoint is written as a new directory, then the one small file that says so is replaced: however a run ends, it
    goes on from there. `Run.create` makes a new one, `Run.open` finds one again.

    Attributes
    ----------
    recipe : Recipe
    config : GPT2Config
    tokenizer : Tokenizer or None
    n_training : int
        How many of the tokens are for training; those behind them are held out.
    where : dict
        The backend and the device that it was begun on, by name.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        recipe: Recipe,
        config: GPT2Config,
        tokenizer: Tokenizer | None,
        n_training: int,
        where: Mapping[str, Any],
    ) -> None:
        self.directory = checks.path("directory", directory)
        self.recipe, self.config, self.tokenizer = recipe, config, tokenizer
        self.n_training, self.where = n_training, dict(where)

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        recipe: Recipe,
        config: GPT2Config,
        tokenizer: Tokenizer | None,
        write_tokens: Callable[[Path], int],
        **where: Any,
    ) -> Run:
        """Make the directory of a new run, which appears complete or not at all.

        Parameters
        ----------
        directory : path
            It must not exist, or be empty.
        recipe, config, tokenizer
            Of the run.
        write_tokens : callable
            Writes the text as token ids into the file that it is given, as `data.write_tokens` does, and returns how
            many of them are for training.
        **where
            ``backend`` and ``device``, by name: what the run goes on with unless it is told otherwise.

        Raises
        ------
        FileExistsError
            If the directory exists and is not empty. Nothing is written.
        """
        check_new(directory)
        with appearing(Path(os.path.realpath(directory)), force=False) as draft:
            inside = draft / _INSIDE
            inside.mkdir()
            n_training = write_tokens(inside / _TOKENS)
            entries = {"recipe": recipe.to_dict(), "n_training": n_training, "where": where}
            (inside / _RUN).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        return cls(directory, recipe, config, tokenizer, n_training, where)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Run:
        """Find a run again.

        Raises
        ------
        ValueError
            If there is none, or it ended before its first checkpoint.
        """
        file = checks.path("directory", directory) / _INSIDE / _RUN
        if not file.is_file():
            raise ValueError(f"{os.fspath(directory)}: holds no training run to resume; start one there, with data")
        entries = json.loads(file.read_text("utf-8"))
        last = _pointers(Path(directory)).get("last")
        if last is None:
            raise ValueError(f"{os.fspath(directory)}: the run ended before its first checkpoint; start anew")
        found = read_checkpoint(file.parent / last["name"])
        recipe = Recipe(**entries["recipe"])
        return cls(directory, recipe, found.config, found.tokenizer, entries["n_training"], entries["where"])

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids for training, and those that are held out."""
        tokens = open_tokens(self.directory / _INSIDE / _TOKENS, self.config.n_vocab)
        return tokens[: self.n_training], tokens[self.n_training :]

    @property
    def metrics_file(self) -> Path:
        """Where there is an object for each step, a line each."""
        return self.directory / METRICS_FILE

    @property
    def has_checkpoint(self) -> bool:
        """Whether one was saved."""
        return bool(_pointers(self.directory))

    @property
    def last(self) -> dict[str, Any]:
        """``step`` and ``held_out`` of the last checkpoint."""
        return dict(_pointers(self.directory)["last"])

    @property
    def best(self) -> dict[str, Any]:
        """``step`` and ``held_out`` of the checkpoint whose held-out loss is the lowest."""
        return dict(_pointers(self.directory)["best"])

    def save(self, state: State, held_out: float | None) -> None:
        """Write a checkpoint, which is the last from then on, and the best unless another's held-out loss is lower."""
        inside, pointers = self.directory / _INSIDE, _pointers(self.directory)
        saved: dict[str, Any] = {"name": f"step-{state.step}", "step": state.step, "held_out": held_out}
        with appearing(inside / saved["name"], force=True) as draft:
            write_files(draft, self.config, _stored(state.params), self.tokenizer)
            write_safetensors(draft / _MOMENTS, _stored({"m": state.moments.m, "v": state.moments.v}))
        best = pointers.get("best", saved)
        if _loss(saved) <= _loss(best):
            best = saved
        if best is saved:  # before it is said: a run that ends between the two comes by here again
            self._publish(inside / saved["name"])
        with replacing(inside / _POINTERS) as draft:
            draft.write_text(json.dumps({"last": saved, "best": best}, indent=2) + "\n", encoding="utf-8")
        for other in inside.glob("step-*"):
            if other.name not in (saved["name"], best["name"]):
                shutil.rmtree(other)

    def _publish(self, checkpoint: Path) -> None:
        """Put a checkpoint's files where `GPT2.load` looks for them, the weights last."""
        names = (file.name for file in checkpoint.iterdir() if file.name != _MOMENTS)
        for name in sorted(names, key=WEIGHTS_FILE.__eq__):
            with replacing(self.directory / name) as draft:
                shutil.copyfile(checkpoint / name, draft)

    def restore(self, backend: Backend, device: Any = None) -> State:
        """Return the state of the last checkpoint on a backend: the bits that were saved."""
        last = self.last
        directory = self.directory / _INSIDE / last["name"]
        moments = nest(_read(map_safetensors(directory / _MOMENTS), backend, device))
        params = nest(_read(read_checkpoint(directory).tensors, backend, device))
        return State(last["step"], params, Moments(moments["m"], moments["v"]))

    def metrics(self) -> list[dict[str, Any]]:
        """Return what each step gave."""
        return [json.loads(line) for line in self.metrics_file.read_text("utf-8").splitlines()]

    def forget_metrics(self, step: int) -> None:
        """Remove what is said of steps after one: they are to be taken again. So is a line that is not whole."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text("utf-8").split("\n")[:-1]
        with replacing(self.metrics_file) as draft:
            draft.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step), "utf-8")


def check_new(directory: str | os.PathLike[str]) -> None:
    """Refuse a directory that holds anything."""
    path = checks.path("directory", directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; give a new directory, or resume the run that it holds")


def _pointers(directory: Path) -> dict[str, Any]:
    file = directory / _INSIDE / _POINTERS
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def _loss(checkpoint: Mapping[str, Any]) -> float:
    return float("inf") if checkpoint["held_out"] is None else float(checkpoint["held_out"])


def _stored(tree: Params) -> dict[str, StoredTensor]:
    return {path: stored(x) for path, x in flatten(tree)}


def _read(tensors: Mapping[str, StoredTensor], backend: Backend, device: Any) -> dict[str, Any]:
    """Return tensors on a backend, in memory of their own: as it lies in a file, a kernel may sum in another order."""
    return {path: backend.from_numpy(t.read().copy(), t.dtype, device) for path, t in tensors.items()}
