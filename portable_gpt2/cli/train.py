"""``portable-gpt2 train``: train a model and write a directory that `GPT2.load` and transformers read."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..backend import Backend
from ..checkpoint import cast, read_checkpoint
from ..config import GPT2Config
from ..host import ProcessLost, StoredTensor
from ..mesh import MODEL, Mesh
from ..params import Params, check_memory, count, initial_tensors, nest
from ..registry import get_backend
from ..tokenizer import Tokenizer
from ..tokenizer_files import END_OF_TEXT
from ..training.data import check_window, documents, train_tokenizer, write_tokens
from ..training.loop import train
from ..training.recipe import Recipe
from ..training.run import Run, check_new
from ..training.trainer import State, Trainer, micro_batch_tokens
from . import signals, streams
from .options import add_backend, add_fields, at_least, connect, flag, given_fields, progress, sizes
from .texts import Texts

_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_ctx": 256}
"""The shape of a new model: the fields of GPT2Config that have options, and their defaults."""

_HELD_OUT = "0.05"
_VOCAB_SIZE = 2048


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands. An option that is not given is None; a resumed run keeps its value."""
    parser = commands.add_parser(
        "train",
        help="train a new model, or continue to train a checkpoint",
        description="Train a new model, or continue to train a checkpoint. DIR becomes a checkpoint, which the option "
        "--model of the other commands takes. Ctrl-C saves the run; --resume continues it, and gives the same bits as "
        "a run that was never interrupted.",
    )
    add = parser.add_argument
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="directory to write: a checkpoint of the best step, and the files from which the run can be resumed",
    )
    add("--resume", action="store_true", help="continue the run in DIR, with the data, the model and the recipe it has")
    add_backend(parser)
    add(
        "--mesh",
        type=sizes,
        metavar="SIZES",
        help="divide the weights and each batch over several devices of jax or torch, such as data=2,model=2; see the "
        "documentation of meshes",
    )
    add(
        "--shard-optimizer",
        action="store_true",
        help="divide the optimizer's moments over the axis data of the mesh as well, which saves memory",
    )
    add(
        "--plot",
        metavar="FILE",
        help="at the end, plot the losses, the norm of the gradient and the learning rate into this file, such as "
        "training.png, .svg or .pdf",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="files with texts in UTF-8; each file is one document, or several with <|endoftext|> between them; - is "
        "stdin",
    )
    add(
        "--held-out",
        metavar="FILE|SHARE",
        help="file with a text that is used for evaluation only; or a number from 0 to below 1, which is the share of "
        f"the tokens of --data, taken from their end, that is used for evaluation only (default: {_HELD_OUT})",
    )
    add(
        "--allow-special",
        action=argparse.BooleanOptionalAction,
        help="read every special token that is written in the texts as that token, or none of them (default: only "
        "<|endoftext|>, which separates documents)",
    )
    add(
        "--allow-special-token",
        action="append",
        metavar="NAME",
        help="read this special token as a token as well; may be given several times",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="directory of the files of a tokenizer (default: train a new tokenizer on the texts)",
    )
    add(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help=f"number of entries of the new tokenizer's vocabulary (default: {_VOCAB_SIZE})",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start from the weights, the shape and the tokenizer of a checkpoint: a directory, or the name of a model "
        "of the hub (default: start from random weights)",
    )
    add_fields(group, GPT2Config, _SHAPE)
    group.add_argument(
        "--scale-residual",
        action="store_true",
        default=None,
        help="divide the initial weights of the projections c_proj, whose results are added to the residual stream, by "
        "sqrt(2 n_layer)",
    )
    add_fields(parser.add_argument_group("recipe"), Recipe)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from .. import plot

    signals.clean_up_first()
    if arguments.plot:
        plot.check_file(arguments.plot)
    if arguments.mesh is not None and arguments.device is not None:
        raise ValueError("--device: a mesh has devices of its own; leave out --device or --mesh")
    try:
        return _run(arguments)
    except ProcessLost as error:
        raise ProcessLost(f"{error}{_advice(arguments)}") from error
    except SystemExit as ended:
        if arguments.mesh is None or not streams.is_shared() or not isinstance(ended.code, int):
            raise
        streams.say(
            f"portable-gpt2: this process got {signal.Signals(ended.code - 128).name}, which torchrun sends if another "
            f"process of the mesh has ended{_advice(arguments)}",
            always=True,
        )
        os._exit(ended.code)  # a framework would wait for the other processes


def _advice(arguments: argparse.Namespace) -> str:
    return f"; to continue from the last checkpoint, on any mesh: portable-gpt2 train --resume --out {arguments.out}"


def _run(arguments: argparse.Namespace) -> int:
    from .. import plot

    run, trainer, state = _resume(arguments) if arguments.resume else _begin(arguments)
    stopped = _train(run, trainer, state)
    if arguments.plot and not streams.is_silent():
        plot.save(plot.draw_training(run.metrics()), arguments.plot)
        streams.say(f"wrote {arguments.plot}")
    last, best = run.last, run.best
    if last["step"] < run.recipe.steps:
        streams.say(
            f"stopped after step {last['step']} of {run.recipe.steps}; to continue: portable-gpt2 train --resume --out "
            f"{run.directory}"
        )
        return signals.status(stopped[0] if stopped else signal.SIGTERM)  # the signal of another process
    loss = "" if best["held_out"] is None else f", held-out loss {best['held_out']:.4f} nats per token"
    streams.say(f"{run.directory}: the model of step {best['step']}{loss}")
    return 0


def _train(run: Run, trainer: Trainer, state: State) -> list[int]:
    """Take the steps that are left. Return the signals that ended training before the last step."""
    from tqdm import tqdm

    recipe = run.recipe
    n_tokens = recipe.batch_size * recipe.gradient_accumulation_steps * (recipe.context or run.config.n_ctx)
    mesh = trainer.mesh
    device = trainer.backend.device(state.params["wte"]) if mesh is None else f"the mesh {mesh}"
    where = f"{trainer.backend.name}, {device}"
    streams.say(f"{count(run.config):,} parameters on {where}, {n_tokens:,} tokens per step")
    # With disable=None, the bar is shown only if stderr is a terminal.
    disable = streams.is_silent() or None
    bar = tqdm(total=recipe.steps, initial=state.step, unit=" steps", desc="training", mininterval=0.5, disable=disable)
    reports = train(run, trainer, state)
    # The signal is Ctrl-C, or the one by which a scheduler announces that it will end the process. torchrun sends each
    # signal on to processes that the terminal has sent it to already, and kills those that run for half a minute more.
    with signals.Noted(every=mesh is not None and not mesh.is_alone) as stopped:
        try:
            for report in reports:
                if report.step > bar.n:
                    bar.update()
                if report.loss is not None:
                    speed = f"{n_tokens / report.seconds:,.0f} tokens/s"
                    bar.set_postfix_str(f"loss {report.loss:.4f}, {speed}", refresh=False)
                if report.held_out is not None and not streams.is_silent():
                    bar.write(f"step {report.step}: held-out loss {report.held_out:.4f}", file=sys.stderr)
                # All processes of a mesh stop after the same step.
                if stopped if mesh is None else not mesh.agree(not stopped):
                    break
        finally:
            reports.close()  # saves the last step
            bar.close()
    return stopped


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options with these names that were given, by name."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _resume(arguments: argparse.Namespace) -> tuple[Run, Trainer, State]:
    """Open a run. Options that would change it are refused."""
    data = ("data", "held_out", "allow_special", "allow_special_token", "tokenizer", "vocab_size")
    given = _given(arguments, *data, "init_from", "scale_residual")
    given |= given_fields(arguments, GPT2Config) | given_fields(arguments, Recipe)
    if given:
        names = ", ".join(map(flag, given))
        raise ValueError(
            f"{names}: a run that is resumed keeps its options; to change them, start another run with --init-from "
            f"{arguments.out}"
        )
    run = Run.open(arguments.out)
    where = {**run.where, **_given(arguments, "backend", "device")}
    backend = get_backend(where.get("backend"), None if arguments.mesh else where.get("device"))
    trainer = _trainer(arguments, run.config, run.recipe, backend, _mesh(arguments, backend))
    return run, trainer, run.restore(trainer)


def _mesh(arguments: argparse.Namespace, backend: Backend) -> Mesh | None:
    """Return the mesh. From then on, only process 0 writes to stdout and stderr."""
    return None if arguments.mesh is None else connect(backend, arguments.mesh, _advice(arguments))


def _trainer(
    arguments: argparse.Namespace, config: GPT2Config, recipe: Recipe, backend: Backend, mesh: Mesh | None
) -> Trainer:
    return Trainer(config, recipe, backend, mesh, shard_optimizer=arguments.shard_optimizer)


class _Start(NamedTuple):
    """The model that training starts from."""

    config: GPT2Config
    tokenizer: Tokenizer | None
    """None if a tokenizer is to be trained on the texts."""
    tensors: Mapping[str, StoredTensor] | None = None
    """The weights of a checkpoint; None for random weights."""
    companions: Mapping[str, bytes] = {}


def _begin(arguments: argparse.Namespace) -> tuple[Run, Trainer, State]:
    """Create a run. Before the texts are read, everything is checked that can be checked without them."""
    if not arguments.data:
        raise ValueError("--data: give the files to train on, or --resume to continue a run")
    recipe = Recipe(**given_fields(arguments, Recipe))
    share = _share(arguments.held_out or _HELD_OUT)
    backend = get_backend(arguments.backend, arguments.device)
    mesh = _mesh(arguments, backend)
    if is_first := mesh is None or mesh.is_first:
        check_new(arguments.out)
    backend.dtype(recipe.dtype)
    start = _from_checkpoint(arguments) if arguments.init_from else _from_random_weights(arguments)
    if recipe.context is not None and recipe.context > start.config.n_ctx:
        raise ValueError(f"--context {recipe.context}: the model has n_ctx = {start.config.n_ctx} positions")
    trainer = _trainer(arguments, start.config, recipe, backend, mesh)
    _check_memory(start.config, recipe, backend, 1 if mesh is None else mesh.sizes[MODEL])

    def read() -> tuple[Tokenizer, Callable[[Path], int]] | None:
        """Read the texts in process 0."""
        return _writing(arguments, recipe, start, share) if is_first else None

    # The texts are read before memory is taken for the weights, because they may be too short for the vocabulary.
    writing = read() if mesh is None else mesh.together(read)
    params = _initial(start, trainer, scale_residual=bool(arguments.scale_residual))

    def create() -> Run | None:
        """Create the run in process 0."""
        if writing is None:
            return None
        where = {"backend": backend.name, **_given(arguments, "device")}
        companions = start.companions
        return Run.create(arguments.out, recipe, start.config, *writing, companions=companions, **where)

    if mesh is None:
        run = create()
    else:
        created = mesh.together(create)  # the others wait until the run exists
        run = mesh.together(lambda: created or Run.begun(arguments.out, start.config))
    assert run is not None
    return run, trainer, trainer.start(params)


def _writing(
    arguments: argparse.Namespace, recipe: Recipe, start: _Start, share: float | None
) -> tuple[Tokenizer, Callable[[Path], int]]:
    """Return the tokenizer, and the function that writes the tokens of the texts."""
    read = Texts().read
    texts = [read(file) for file in arguments.data]
    held_out = [read(arguments.held_out)] if share is None else []
    named = arguments.allow_special_token or []
    if (tokenizer := start.tokenizer) is None:
        is_literal = arguments.allow_special is False and END_OF_TEXT not in named
        whole = texts if is_literal else chain.from_iterable(map(documents, texts))
        tokenizer = train_tokenizer(whole, start.config.n_vocab)
    special = _special_tokens(tokenizer, arguments.allow_special, named, [*texts, *held_out])

    encode = partial(write_tokens, tokenizer=tokenizer, n_vocab=start.config.n_vocab, allow_special=special)
    length = (recipe.context or start.config.n_ctx) + 1

    def write(file: Path) -> int:
        """Write the token ids of the texts, then those of held-out texts, if there are any.

        Return the number of ids to train on.
        """
        n = encode(texts, file=file, progress=partial(progress, what="tokenizing", unit="pieces"))
        n_held_out = encode(held_out, file=file) if share is None else round(share * n)
        n_training = n if share is None else n - n_held_out
        check_window(n_training, length, "text")
        if share != 0:
            check_window(n_held_out, length, "held-out text")
        return n_training

    return tokenizer, write


def _share(text: str) -> float | None:
    """Return the share of the tokens that is held out, or None if the text is the name of a file."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise ValueError(f"--held-out {text}: expected a file, or a share of at least 0 and below 1")
    return share


def _from_checkpoint(arguments: argparse.Namespace) -> _Start:
    given = _given(arguments, "tokenizer", "vocab_size", "scale_residual") | given_fields(arguments, GPT2Config)
    if given:
        raise ValueError(f"{', '.join(map(flag, given))}: the checkpoint of --init-from has its own")
    found = read_checkpoint(arguments.init_from)
    if found.tokenizer is None:
        raise ValueError(f"{arguments.init_from}: has no tokenizer, which training needs to read text")
    return _Start(found.config, found.tokenizer, found.tensors, found.companions)


def _from_random_weights(arguments: argparse.Namespace) -> _Start:
    shape = _SHAPE | given_fields(arguments, GPT2Config)
    if arguments.tokenizer is None:
        n_vocab = _VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size
        # `train_tokenizer` gives the end of text the id 0.
        return _Start(GPT2Config(n_vocab=n_vocab, eos_token_id=0, **shape), None)
    if arguments.vocab_size is not None:
        raise ValueError("--vocab-size is an option of a new tokenizer; --tokenizer has its own vocabulary")
    tokenizer = Tokenizer.load(arguments.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{arguments.tokenizer}: holds neither tokenizer.json, nor vocab.json and merges.txt")
    return _Start(GPT2Config(n_vocab=tokenizer.n_vocab, eos_token_id=tokenizer.end_of_text, **shape), tokenizer)


def _special_tokens(tokenizer: Tokenizer, allow: bool | None, named: list[str], texts: list[str]) -> list[str]:
    """Return the special tokens that are read as tokens."""
    if allow is False:
        return [*named]
    if tokenizer.end_of_text is None and any(END_OF_TEXT in text for text in texts):
        raise ValueError(
            f"--data: the texts hold {END_OF_TEXT}, which the tokenizer lacks; --no-allow-special reads it as text"
        )
    separators = [END_OF_TEXT] if tokenizer.end_of_text is not None else []
    return [*named, *(tokenizer.special_tokens if allow else separators)]


def _initial(start: _Start, trainer: Trainer, *, scale_residual: bool) -> Params:
    """Return the parameters before the first step. On a mesh, they are placed one at a time."""
    recipe = trainer.recipe
    dtype = recipe.master_dtype
    tensors = start.tensors
    if tensors is None:
        tensors = initial_tensors(start.config, seed=recipe.seed, dtype=dtype, scale_residual=scale_residual)
    return nest({path: trainer.place(path, cast(path, tensor, dtype)) for path, tensor in tensors.items()})


def _check_memory(config: GPT2Config, recipe: Recipe, backend: Backend, n_parts: int) -> None:
    """Refuse a run that needs more memory than there is. The estimates are lower bounds, for one process of a mesh."""
    context = recipe.context or config.n_ctx
    windows = 12 * recipe.batch_size * (context + 1)  # bytes: 8 for the place of each token in the text, 4 for its id
    checks.memory(windows, f"a batch of {recipe.batch_size} windows of {context} tokens")
    scalar, n = backend.from_numpy(np.zeros(()), recipe.master_dtype), count(config) // n_parts
    check_memory(4 * n, scalar, f"training {n:,} parameters, with a gradient and two moments of each,")
    at_once = recipe.batch_size * context
    if (size := micro_batch_tokens(backend, scalar)) is not None:
        at_once = min(at_once, max(size, context))
    # The activations that the backward pass needs: in each layer, the residual stream, queries, keys, values and hidden
    # units; and the logits.
    activations = config.n_layer * (5 * config.n_embd + config.n_hidden) + config.n_vocab
    check_memory(4 * n + at_once * activations, scalar, f"training on {at_once:,} tokens at a time")
