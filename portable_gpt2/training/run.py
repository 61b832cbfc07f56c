"""Run: the directory of a training run. Files are replaced atomically, and damaged files are refused."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .. import checks, files
from ..backend import Backend
from ..checkpoint import WEIGHTS_FILE, Checkpoint, CheckpointError, read_checkpoint, write_files
from ..checkpoint.safetensors_files import open_safetensors, write_safetensors
from ..checkpoint.tensors import is_finite, mapped
from ..checks import integer, is_int, number, shown
from ..config import GPT2Config
from ..files import appearing, replacing
from ..host import StoredTensor
from ..params import nest, shapes
from ..tokenizer import Tokenizer
from . import records
from .data import open_tokens
from .optimizer import Moments
from .recipe import Recipe
from .trainer import Diverged, State, Trainer, tensors_of

_INSIDE = "training"
_RUN, _TOKENS, _POINTERS, _MOMENTS, _LOCK = "run.json", "tokens.bin", "checkpoints.json", "adamw.safetensors", "lock"
METRICS_FILE = "metrics.jsonl"


class _Saved(NamedTuple):
    """A checkpoint, as the record of checkpoints describes it."""

    step: int
    held_out: float | None
    files: dict[str, str]
    """The SHA-256 of each file of the checkpoint, by the file's name."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's directory."""
        return f"step-{self.step}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "step": self.step, "held_out": self.held_out}


class _Pointers(NamedTuple):
    """The checkpoints that exist, and the lines of metrics up to the last checkpoint."""

    last: _Saved
    best: _Saved
    metrics: records.End


class Run:
    """The directory of a training run: the best model so far in Hugging Face's layout, and files to resume from.

    ::

        config.json, vocab.json, model.safetensors ...   the best checkpoint, which `GPT2.load` reads
        metrics.jsonl                                    one JSON object per step
        training/run.json, tokens.bin                    the recipe; the texts as token ids
        training/step-400/                               a checkpoint, with the optimizer's moments
        training/checkpoints.json                        names the last checkpoint and the best one
        training/lock                                    exists while a process trains the run

    A checkpoint is saved in three steps: its line of metrics is written, then a new directory, and then the small file
    that names the checkpoints is replaced. A run that ends at any moment can therefore be resumed from its last
    checkpoint. The records have a SHA-256 of every file that a run resumes from; a file that was damaged or changed is
    refused by its name. `Run.create` makes a new run, and `Run.open` opens one that exists.

    Attributes
    ----------
    recipe : Recipe
        The options of training.
    config : GPT2Config
        The model's shape.
    tokenizer : Tokenizer or None
        The tokenizer that is saved with each checkpoint.
    n_training : int
        The number of tokens for training. The tokens after them are held out.
    where : dict
        The names of the backend and the device that the run was started on.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        recipe: Recipe,
        config: GPT2Config,
        tokenizer: Tokenizer | None,
        n_training: int,
        where: Mapping[str, Any],
        companions: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.directory = checks.path("directory", directory)
        self.recipe, self.config, self.tokenizer = recipe, config, tokenizer
        self.n_training, self.where, self.companions = n_training, dict(where), companions
        self._metrics: records.Metrics | None = None

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        recipe: Recipe,
        config: GPT2Config,
        tokenizer: Tokenizer | None,
        write_tokens: Callable[[Path], int],
        *,
        companions: Mapping[str, bytes] = MappingProxyType({}),
        **where: Any,
    ) -> Run:
        """Make the directory of a new run, which appears complete or not at all.

        Parameters
        ----------
        directory : path
            A directory that does not exist, is empty, or holds a run that ended before its first checkpoint.
        recipe, config, tokenizer
            The attributes of the run.
        write_tokens : callable
            A function of a file. It writes the token ids of the texts into the file, as `data.write_tokens` does, and
            returns the number of tokens for training.
        companions : dict
            Contents of other files to write with each checkpoint, by name, as `read_checkpoint` returns them. Files in
            subdirectories are left out with a warning.
        **where
            The names of the backend and the device, as ``backend`` and ``device``. A run that is resumed uses them
            unless others are given.

        Raises
        ------
        FileExistsError
            If the directory holds anything else. Nothing is written.
        ValueError
            If the recipe's context is longer than the model's, or `write_tokens` returns more tokens than it wrote.
        """
        target = check_new(directory)
        _check_context(recipe, config)
        where = _check_where(where)
        if nested := [name for name in companions if "/" in name]:
            lost = f"a run does not keep {', '.join(nested)}: copy it to the trained model"
            warnings.warn(lost, UserWarning, stacklevel=2)
            companions = {name: content for name, content in companions.items() if name not in nested}
        with contextlib.ExitStack() as stack:
            if ended_early := (target / _INSIDE).exists():
                stack.enter_context(_locked(target))
                check_new(target)  # a second time, now that no other process can write to the directory
            draft = stack.enter_context(appearing(target, force=ended_early))
            inside = draft / _INSIDE
            inside.mkdir()
            n_training = write_tokens(inside / _TOKENS)
            size = (inside / _TOKENS).stat().st_size
            n_training = integer("the number of tokens for training", n_training, 0, size // 2)
            tokens = {"bytes": size, "sha256": records.digest(inside / _TOKENS)}
            entries = {"recipe": recipe.to_dict(), "n_training": n_training, "tokens": tokens, "where": where}
            records.write_record(inside / _RUN, entries)
        return cls(directory, recipe, config, tokenizer, n_training, where, companions)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Run:
        """Open the directory of a run, which another process may be training.

        This checks the records, the small files of the last checkpoint, and the names, shapes and dtypes of its
        tensors. `tokens` and `restore` check the large files when they read them.

        Raises
        ------
        ValueError
            If the directory holds no run, or the run ended before its first checkpoint.
        CheckpointError
            If a file is missing, damaged, or was changed. The message names it.
        """
        root = checks.path("directory", directory)
        file = root / _INSIDE / _RUN
        if not records.is_there(file):
            if records.is_there(root / _INSIDE / _POINTERS):
                raise CheckpointError(f"{file}: no such file; {records.RESTORE}")
            raise ValueError(f"{os.fspath(directory)}: holds no training run to resume; start one there, with data")
        entries = _read_run(file)
        recipe: Recipe = entries["recipe"]
        _, found, _ = _open_last(root, recipe)
        n_training, where = entries["n_training"], entries["where"]
        return cls(root, recipe, found.config, found.tokenizer, n_training, where, found.companions)

    @classmethod
    def begun(cls, directory: str | os.PathLike[str], config: GPT2Config) -> Run:
        """Return a run that another process of a mesh has just created, to take part in it without writing.

        Raises
        ------
        CheckpointError
            If its record is missing or damaged.
        """
        root = checks.path("directory", directory)
        entries = _read_run(root / _INSIDE / _RUN)
        return cls(root, entries["recipe"], config, None, entries["n_training"], entries["where"])

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays: the token ids for training, and those that are held out.

        Raises
        ------
        CheckpointError
            If the file is not the one that was written when the run was created.
        """
        inside = self.directory / _INSIDE
        entries = _read_run(inside / _RUN)
        if (entries["recipe"], entries["n_training"]) != (self.recipe, self.n_training):
            raise CheckpointError(
                f"{inside / _RUN}: belongs to another run than the one that was opened; open it again"
            )
        records.check_digest(inside / _TOKENS, entries["tokens"]["sha256"])
        tokens = open_tokens(inside / _TOKENS, self.config.n_vocab)
        if self.n_training > len(tokens):
            raise CheckpointError(
                f"{inside / _RUN}: n_training is {self.n_training}; {_TOKENS} has {len(tokens)} tokens"
            )
        return tokens[: self.n_training], tokens[self.n_training :]

    @property
    def metrics_file(self) -> Path:
        """The file of metrics, which has one JSON object per line and step."""
        return self.directory / METRICS_FILE

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was saved."""
        return _read_pointers(self.directory) is not None

    @property
    def last(self) -> dict[str, Any]:
        """The ``name``, ``step`` and ``held_out`` loss of the last checkpoint."""
        return self._pointers().last.to_dict()

    @property
    def best(self) -> dict[str, Any]:
        """The ``name``, ``step`` and ``held_out`` loss of the checkpoint whose held-out loss is the lowest."""
        return self._pointers().best.to_dict()

    def _pointers(self) -> _Pointers:
        return _existing_pointers(self.directory)

    @contextlib.contextmanager
    def training(self) -> Iterator[records.Metrics]:
        """Hold the run's lock while the block runs. The metrics of steps after the last checkpoint are removed.

        Raises
        ------
        ValueError
            If another process or thread trains the run. The message has the process id.
        CheckpointError
            If the metrics, or the files of the best checkpoint, are damaged.
        """
        with _locked(self.directory):
            pointers = _read_pointers(self.directory)
            self._tidy(pointers)
            metrics = records.Metrics(self.metrics_file, None if pointers is None else pointers.metrics)
            self._metrics = metrics
            try:
                yield metrics
            finally:
                self._metrics = None
                metrics.close()

    def save(self, state: State, held_out: float | None, trainer: Trainer | None = None) -> None:
        """Write a checkpoint. It becomes the last one, and the best one unless another has a lower held-out loss.

        A state on a mesh needs its trainer. All processes of the mesh call this together, and process 0 writes.

        Raises
        ------
        Diverged
            If a parameter, a moment or the held-out loss is NaN or infinite. Nothing is changed.
        ValueError
            If another process or thread trains the run.
        MeshError
            If process 0 could not write the checkpoint.
        """
        if held_out is not None:
            held_out = float(held_out)
            if not np.isfinite(held_out):
                raise self.diverged(state.step, f"the held-out loss is {held_out}")
        mesh = None if trainer is None else trainer.mesh
        params, moments = tensors_of(state) if trainer is None else trainer.tensors(state)

        def write(tensors: Mapping[str, StoredTensor]) -> None:
            with contextlib.nullcontext() if self._metrics is not None else _locked(self.directory):
                of_params, of_moments = ({name: tensors[name] for name in each} for each in (params, moments))
                self._write(state.step, held_out, of_params, of_moments)

        if mesh is None:
            write(params | moments)
        else:
            mesh.write(params | moments, write)

    def _write(
        self,
        step: int,
        held_out: float | None,
        params: Mapping[str, StoredTensor],
        moments: Mapping[str, StoredTensor],
    ) -> None:
        """Write a checkpoint of a run that is locked."""
        metrics = records.end_of(self.metrics()) if self._metrics is None else self._metrics.end()
        inside, before = self.directory / _INSIDE, _read_pointers(self.directory)
        saved = _Saved(integer("the step", step), held_out, {})
        params, moments = _finite(params), _finite(moments)
        _check_state(inside / saved.name, self.config, self.recipe, params, moments)
        try:
            with appearing(inside / saved.name, force=True) as draft:
                write_files(draft, self.config, params, self.tokenizer, self.companions)
                write_safetensors(draft / _MOMENTS, moments)
                saved.files.update((file.name, records.digest(file)) for file in sorted(draft.iterdir()))
        except _NotFinite as error:
            raise self.diverged(step, str(error)) from None
        best = saved if before is None or _loss(saved) <= _loss(before.best) else before.best
        # The files are copied before the record is written. If the run ends in between, `_tidy` copies the best
        # checkpoint of the old record again.
        if best is saved:
            self._publish(saved)
        entries = {name: {**each.to_dict(), "files": each.files} for name, each in (("last", saved), ("best", best))}
        records.write_record(inside / _POINTERS, {**entries, "metrics": metrics._asdict()})
        self._remove_checkpoints(saved, best)

    def _publish(self, checkpoint: _Saved) -> None:
        """Copy the files of a checkpoint to the run's directory, which `GPT2.load` reads. The weights come last."""
        for name in sorted(checkpoint.files.keys() - {_MOMENTS}, key=WEIGHTS_FILE.__eq__):
            with replacing(self.directory / name) as draft:
                shutil.copyfile(self.directory / _INSIDE / checkpoint.name / name, draft)

    def _tidy(self, pointers: _Pointers | None) -> None:
        """Copy the best checkpoint to the run's directory and remove old checkpoints.

        A run that was killed may have left this undone.
        """
        if pointers is None:
            return
        last, best, _ = pointers
        self._remove_checkpoints(last, best)
        source = self.directory / _INSIDE / best.name
        for name, expected in best.files.items():
            if name == _MOMENTS:
                continue
            with records.naming(self.directory / name):
                if not files.holds_file(self.directory / name) or records.digest(self.directory / name) != expected:
                    records.check_digest(source / name, expected)
                    with replacing(self.directory / name) as draft:
                        shutil.copyfile(source / name, draft)

    def _remove_checkpoints(self, *kept: _Saved) -> None:
        for other in (self.directory / _INSIDE).glob("step-*"):
            if other.name not in {each.name for each in kept}:
                other.unlink() if other.is_symlink() or not other.is_dir() else shutil.rmtree(other)

    def restore(self, backend: Backend | Trainer, device: Any = None) -> State:
        """Return the state of the last checkpoint on a backend, or where a trainer computes, with the saved bits.

        On a mesh, each process reads only the parts of its own devices.

        Raises
        ------
        CheckpointError
            If a file of the checkpoint is damaged or was changed. The message names it.
        """
        saved, found, moments = _open_last(self.directory, self.recipe, contents=True)
        directory = self.directory / _INSIDE / saved.name
        if found.config != self.config:
            raise CheckpointError(f"{directory}: the model has another shape than when the run was opened")

        def read(path: str, tensor: StoredTensor, is_moment: bool = False) -> Any:
            tensor = _whole_tensor(tensor)
            if isinstance(backend, Trainer):
                return backend.place(path, tensor, is_moment=is_moment)
            return backend.from_numpy(tensor.read(), tensor.dtype, device)

        params = nest({path: read(path, tensor) for path, tensor in found.tensors.items()})
        trees = nest({name: read(name.partition("/")[2], tensor, True) for name, tensor in moments.items()})
        return State(saved.step, params, Moments(trees["m"], trees["v"]))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each step so far, as dicts.

        Raises
        ------
        CheckpointError
            If a line is not a JSON object of numbers. The message names the file and the line.
        """
        return records.read_metrics(self.metrics_file)

    def diverged(self, step: int, why: str) -> Diverged:
        """Return the error of a step whose result is not finite. It says what happened and what can be tried."""
        pointers = _read_pointers(self.directory)
        if pointers is None:
            return Diverged(f"step {step}: {why}; training cannot begin with these weights; give other weights")
        recipe, norm = self.recipe, self.recipe.max_grad_norm
        clip = "a max_grad_norm" if norm is None else f"a max_grad_norm below {norm}"
        return Diverged(
            f"step {step} diverged: {why}. Try a lower learning rate than {recipe.learning_rate}, more steps of "
            f"warm-up than {recipe.warmup}, {clip}, or an eps above {recipe.eps}, in a new directory; "
            f"{self.directory} keeps its checkpoint of step {pointers.last.step}"
        )


def check_new(directory: str | os.PathLike[str]) -> Path:
    """Return the real path of a new run's directory. A directory with files that could be lost is refused.

    A run that ended before its first checkpoint has only its texts, and may be started again.
    """
    given = checks.path("directory", directory)
    target = Path(os.path.realpath(given))
    if not os.path.lexists(target):
        return target
    if not target.is_dir() or (any(target.iterdir()) and not _ended_early(target)):
        raise FileExistsError(f"{given}: exists already; give a new directory, or resume the run that it holds")
    return target


def _ended_early(directory: Path) -> bool:
    """Return whether every file in a directory was written by a run that ended before its first checkpoint."""
    inside, ours = directory / _INSIDE, {_INSIDE, METRICS_FILE}
    if not (inside / _RUN).is_file() or (inside / _POINTERS).exists():
        return False
    first = inside / _Saved(0, None, {}).name
    published = {file.name for file in first.iterdir()} if first.is_dir() else set()
    contents = {file.name for file in inside.iterdir() if not file.name.startswith(".")}
    return contents <= {_RUN, _TOKENS, _LOCK, first.name} and all(
        file.name in ours | published or file.name.startswith(".") for file in directory.iterdir()
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run while the block runs."""
    file = directory / _INSIDE / _LOCK
    with contextlib.ExitStack() as stack:
        try:
            with records.naming(file):
                stack.enter_context(files.lock(file))
        except CheckpointError as error:
            if not isinstance(error.__cause__, files.Locked):
                raise
            who = f"process {error.__cause__.pid}" if error.__cause__.pid else "another process"
            raise ValueError(
                f"{directory}: {who} is training this run; wait for it to end, or end it (only one may train a run)"
            ) from None
        yield


# Reading and checking the records


def _read_run(file: Path) -> dict[str, Any]:
    """Return the entries of a run's record: its recipe, the size of its texts, and the number of training tokens."""
    entries = records.read_record(file, "recipe", "n_training", "tokens", "where")
    try:
        names = Recipe.names_in_files()
        if isinstance(entries["recipe"], dict) and "reproducible" not in entries["recipe"]:
            del names["reproducible"]
        recipe = Recipe.from_dict(records.fields(file, "recipe", entries["recipe"], *names))
        tokens = records.fields(file, "tokens", entries["tokens"], "bytes", "sha256")
        size = integer("the size of the tokens", tokens["bytes"])
        n_training = integer("n_training", entries["n_training"], 0, size // 2)
        where = _check_where(entries["where"])
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not records.is_digest(tokens["sha256"]):
        raise CheckpointError(f"{file}: the SHA-256 of the tokens is {shown(tokens['sha256'])}")
    text = file.with_name(_TOKENS)
    if not records.is_there(text):
        raise CheckpointError(f"{text}: no such file; {records.RESTORE}")
    if text.stat().st_size != size:
        raise CheckpointError(f"{text}: has {text.stat().st_size} bytes; {size} were written; {records.RESTORE}")
    return {"recipe": recipe, "n_training": n_training, "tokens": tokens, "where": where}


def _check_where(where: Any) -> dict[str, str]:
    """Return the names of the backend and the device."""
    if not isinstance(where, Mapping) or not where.keys() <= {"backend", "device"}:
        raise ValueError(f"where is {shown(where)}; expected the names of the backend and the device")
    given = {name: value for name, value in where.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}; expected a name")
    return given


def _check_context(recipe: Recipe, config: GPT2Config) -> None:
    if recipe.context is not None and recipe.context > config.n_ctx:
        raise ValueError(f"context is {recipe.context}; the model has n_ctx = {config.n_ctx} positions")


def _read_pointers(directory: Path) -> _Pointers | None:
    """Return the checkpoints that exist, or None if the run ended before its first checkpoint."""
    inside = directory / _INSIDE
    file = inside / _POINTERS
    if not records.is_there(file):
        if later := [each.name for each in inside.glob("step-*") if each.name != _Saved(0, None, {}).name]:
            raise CheckpointError(f"{file}: no such file, and there is {min(later)}; {records.RESTORE}")
        return None
    entries = records.read_record(file, "last", "best", "metrics")
    end = records.fields(file, "metrics", entries["metrics"], "lines", "sha256")
    if not is_int(end["lines"]) or end["lines"] < 0 or not records.is_digest(end["sha256"]):
        raise CheckpointError(f"{file}: metrics is {shown(end)}; expected the number of lines and their SHA-256")
    last, best = (_check_saved(file, name, entries[name]) for name in ("last", "best"))
    return _Pointers(last, best, records.End(**end))


def _existing_pointers(directory: Path) -> _Pointers:
    pointers = _read_pointers(directory)
    if pointers is None:
        raise ValueError(f"{directory}: the run ended before its first checkpoint; start it again, with its data")
    return pointers


def _check_saved(file: Path, what: str, entries: Any) -> _Saved:
    """Return a checkpoint as the record describes it."""
    records.fields(file, what, entries, "name", "step", "held_out", "files")
    try:
        step = integer("its step", entries["step"])
        held_out = None if entries["held_out"] is None else number("its held-out loss", entries["held_out"])
    except ValueError as error:
        raise CheckpointError(f"{file}: {what}: {error}") from error
    saved = _Saved(step, held_out, entries["files"])
    if entries["name"] != saved.name:
        raise CheckpointError(f"{file}: {what}: its name is {shown(entries['name'])}; expected {saved.name!r}")
    if not isinstance(saved.files, dict) or not saved.files.keys() >= {WEIGHTS_FILE, _MOMENTS}:
        raise CheckpointError(f"{file}: {what}: its files are {shown(saved.files)}; expected SHA-256 by name")
    for name, hashed in saved.files.items():
        if Path(name).name != name or not records.is_digest(hashed):
            found = f"{shown(name)} has {shown(hashed)}"
            raise CheckpointError(f"{file}: {what}: {found}; expected a file's bare name and its SHA-256")
    return saved


def _open_last(
    directory: Path, recipe: Recipe, contents: bool = False
) -> tuple[_Saved, Checkpoint, dict[str, StoredTensor]]:
    """Return the last checkpoint, its model and its moments, after checking them.

    If another process saves a new checkpoint and removes this one meanwhile, the new one is opened instead.
    """
    while True:
        saved = _existing_pointers(directory).last
        try:
            return saved, *_open_checkpoint(directory / _INSIDE, saved, recipe, contents)
        except CheckpointError:
            if _existing_pointers(directory).last == saved:
                raise


def _open_checkpoint(
    inside: Path, saved: _Saved, recipe: Recipe, contents: bool
) -> tuple[Checkpoint, dict[str, StoredTensor]]:
    """Return the model and the moments of a checkpoint, after checking them.

    If `contents` is true, the SHA-256 of large files is checked, too.
    """
    directory = inside / saved.name
    with records.naming(directory):
        held = {file.name for file in directory.iterdir() if not file.name.startswith(".")}
    if held != saved.files.keys():
        name = min(held ^ saved.files.keys())
        why = "was not written by this run; remove it" if name in held else f"no such file; {records.RESTORE}"
        raise CheckpointError(f"{directory / name}: {why}")
    large = {WEIGHTS_FILE, _MOMENTS}
    for name in sorted(saved.files, key=large.__contains__):
        with records.naming(directory / name):
            files.regular(directory / name)
        if contents or name not in large:
            records.check_digest(directory / name, saved.files[name])
    found = read_checkpoint(directory)
    moments = open_safetensors(directory / _MOMENTS)
    _check_state(directory, found.config, recipe, found.tensors, moments)
    try:
        _check_context(recipe, found.config)
    except ValueError as error:
        raise CheckpointError(f"{inside / _RUN}: {error}") from error
    return found, {name: _checked(directory / _MOMENTS, name, tensor) for name, tensor in moments.items()}


def _check_state(
    directory: Path,
    config: GPT2Config,
    recipe: Recipe,
    params: Mapping[str, StoredTensor],
    moments: Mapping[str, StoredTensor],
) -> None:
    """Refuse the tensors of a checkpoint unless a run of this configuration and recipe trains these tensors."""
    expected = {path: (shape, recipe.master_dtype) for path, shape in shapes(config).items()}
    _check_tensors(directory / WEIGHTS_FILE, params, expected)
    _check_tensors(directory / _MOMENTS, moments, {f"{s}/{path}": t for s in "mv" for path, t in expected.items()})


def _check_tensors(
    file: Path, tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Refuse tensors whose names, shapes or dtypes are not the expected ones."""
    for verb, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{file}: {verb} {', '.join(sorted(names)[:3])}; {records.RESTORE}")
    for name, (shape, dtype) in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise CheckpointError(
                f"{file}: {name} is {tensors[name].dtype} {list(tensors[name].shape)}; expected {dtype} {list(shape)}"
            )


def _checked(file: Path, name: str, tensor: StoredTensor) -> StoredTensor:
    """Return a moment that is checked when it is read: it must be finite, and an average of squares at least 0."""

    def checked(a: np.ndarray) -> np.ndarray:
        if not is_finite(a) or (name.startswith("v/") and a.size and a.min() < 0):
            raise CheckpointError(f"{file}: {name} holds a NaN, an infinity, or an average of squares below 0")
        return a

    return mapped(tensor, checked)


def _loss(checkpoint: _Saved) -> float:
    return float("inf") if checkpoint.held_out is None else checkpoint.held_out


class _NotFinite(ArithmeticError):
    """A tensor that is being saved holds a NaN or an infinity."""


def _finite(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return tensors to be written. Each is copied to the host and checked when it is written."""

    def checked(name: str, a: np.ndarray) -> np.ndarray:
        if not is_finite(a):
            scope, _, path = name.partition("/")
            what = _AVERAGES[scope].format(path) if scope in _AVERAGES else name
            raise _NotFinite(f"{what} holds a NaN or an infinity after this step")
        return a

    return {name: mapped(each, functools.partial(checked, name)) for name, each in tensors.items()}


_AVERAGES = {
    "m": "the running average of the gradient of {}",
    "v": "the running average of the squared gradient of {}",
}


def _whole_tensor(tensor: StoredTensor) -> StoredTensor:
    """Return a tensor whose values are copied when it is read.

    They are copied because a kernel may sum in another order if the memory is aligned differently.
    """
    return StoredTensor(tensor.shape, tensor.dtype, lambda: tensor.read().copy(), tensor.read_part)
