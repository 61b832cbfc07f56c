"""``portable-gpt2 train``: from texts to a directory that `GPT2.load` and transformers load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from ..backend import Backend
from ..checkpoint import Checkpoint, cast, read_checkpoint
from ..config import GPT2Config
from ..params import check_memory, count, init_params, nest
from ..registry import get_backend
from ..tokenizer import Tokenizer
from ..tokenizer_files import END_OF_TEXT
from ..training.data import check_room, documents, train_tokenizer, write_tokens
from ..training.loop import train
from ..training.recipe import Recipe
from ..training.run import Run, check_new
from ..training.trainer import State, Trainer
from . import signals, streams
from .options import at_least, number_or_off

_MODEL = {
    "n_layer": (4, "blocks"),
    "n_head": (4, "attention heads of each"),
    "n_embd": (256, "width"),
    "n_ctx": (256, "positions"),
}
_RECIPE = {
    "steps": "number of training steps",
    "batch_size": "windows of text in a batch",
    "accumulate": "batches whose gradients are averaged for one step",
    "context": "tokens in a window",
    "learning_rate": "learning rate at the end of warm-up, the highest",
    "warmup": "steps of linear warm-up of the learning rate",
    "final_rate": "learning rate at the end of the cosine, as a share of the highest",
    "weight_decay": "weight decay of the matrices; biases and gains do not decay",
    "beta1": "decay rate of the gradient's moving average",
    "beta2": "decay rate of the squared gradient's moving average",
    "eps": "added to the denominator of Adam's update",
    "clip": "scale the gradient down to this norm where it is larger; off never scales it",
    "seed": "seed of the initial weights and of the choice of windows",
    "dtype": "dtype of the computation: float32, float64 or bfloat16",
    "eval_every": "steps from one evaluation on held-out text to the next; each saves a checkpoint",
}
_INTS = ("steps", "batch_size", "accumulate", "context", "warmup", "seed", "eval_every")
_HELD_OUT = "0.05"
_VOCAB_SIZE = 2048


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the command. An option that is not given is None: a run that is resumed has its own."""
    add = command.add_argument
    add("--out", required=True, metavar="DIR", help="what to write: a checkpoint, and what it takes to resume")
    add("--resume", action="store_true", help="go on with the run in DIR, as it was begun")
    add("--backend", metavar="NAME", help="what computes (default: $PORTABLE_GPT2_BACKEND, else numpy)")
    add("--device", help="where: cpu, cuda, cuda:1 ... (default: the framework's)")
    add("--plot", metavar="FILE", help="draw the losses at the end: .png, .svg, .pdf ...")

    add = command.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="texts in UTF-8, each a document, or several with <|endoftext|> between them; - is stdin",
    )
    add(
        "--held-out",
        metavar="FILE|SHARE",
        help=f"a text, or the last share of them (default: {_HELD_OUT})",
    )
    add(
        "--allow-special",
        action=argparse.BooleanOptionalAction,
        help="read all special tokens in the texts as tokens, or none (default: <|endoftext|>, between documents)",
    )
    add(
        "--allow-special-token",
        action="append",
        metavar="NAME",
        help="read this special token as a token, too; may be given several times",
    )
    add("--tokenizer", metavar="DIR", help="the directory of a tokenizer's files")
    add(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help=f"else, entries of the one to be made (default: {_VOCAB_SIZE})",
    )

    add = command.add_argument_group("model").add_argument
    add(
        "--init-from",
        metavar="CHECKPOINT",
        help="begin with a checkpoint's weights: a directory, or a model of the hub",
    )
    for name, (default, text) in _MODEL.items():
        add(_option(name), type=int, metavar="N", help=f"{text} (default: {default})")
    add("--scale-residual", action="store_true", default=None, help="begin with c_proj divided by sqrt(2 n_layer)")

    add = command.add_argument_group("recipe").add_argument
    for name, text in _RECIPE.items():
        default = getattr(Recipe(), name)
        said = "n_ctx" if name == "context" else default
        kind: Any = None if name == "dtype" else int if name in _INTS else number_or_off if name == "clip" else float
        add(_option(name), type=kind, metavar="N" if kind else "NAME", help=f"{text} (default: {said})")


def run(arguments: argparse.Namespace, read: Callable[[str], str]) -> int:
    """Train as the arguments say; ``read`` returns the text of a file."""
    from tqdm import tqdm

    from .. import plot

    signals.clean_up_first()
    if arguments.plot:
        plot.check_file(arguments.plot)
    run, trainer, state = _resumed(arguments) if arguments.resume else _begun(arguments, read)
    where = f"{trainer.backend.name}, {trainer.backend.device(state.params['wte'])}"
    n_tokens = run.recipe.batch_size * run.recipe.accumulate * (run.recipe.context or run.config.n_ctx)
    streams.say(f"{count(run.config):,} parameters on {where}, {n_tokens:,} tokens a step")
    bar = tqdm(total=run.recipe.steps, initial=state.step, unit=" steps", desc="training", mininterval=0.5)
    reports = train(run, trainer, state)
    with signals.Noted() as stopped:  # Ctrl-C, or a scheduler's warning before it kills the process
        try:
            for report in reports:
                if report.step > bar.n:
                    bar.update()
                if report.loss is not None:
                    speed = f"{n_tokens / report.seconds:,.0f} tokens/s"
                    bar.set_postfix_str(f"loss {report.loss:.4f}, {speed}", refresh=False)
                if report.held_out is not None:
                    bar.write(f"step {report.step}: held-out loss {report.held_out:.4f}", file=sys.stderr)
                if stopped:
                    break
        finally:
            reports.close()  # which saves what was not
            bar.close()
    if arguments.plot:
        plot.save(plot.draw_losses(run.metrics()), arguments.plot)
        streams.say(f"wrote {arguments.plot}")
    last, best = run.last, run.best
    if last["step"] < run.recipe.steps:
        streams.say(
            f"stopped after step {last['step']} of {run.recipe.steps}; to go on: portable-gpt2 train --resume --out "
            f"{run.directory}"
        )
        return signals.status(stopped[0])
    loss = "" if best["held_out"] is None else f", held-out loss {best['held_out']:.4f} nats a token"
    streams.say(f"{run.directory}: the model of step {best['step']}{loss}")
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _resumed(arguments: argparse.Namespace) -> tuple[Run, Trainer, State]:
    data = ("data", "held_out", "allow_special", "allow_special_token", "tokenizer", "vocab_size")
    fixed = (*data, "init_from", "scale_residual", *_MODEL, *_RECIPE)
    if given := _given(arguments, *fixed):
        names = ", ".join(map(_option, given))
        raise ValueError(f"{names}: a run goes on as it was begun; for another, give --init-from {arguments.out}")
    run = Run.open(arguments.out)
    where = {**run.where, **_given(arguments, "backend", "device")}
    backend = get_backend(where.get("backend"), where.get("device"))
    return run, Trainer(run.config, run.recipe, backend), run.restore(backend)


def _begun(arguments: argparse.Namespace, read: Callable[[str], str]) -> tuple[Run, Trainer, State]:
    if not arguments.data:
        raise ValueError("--data: name the texts to train on, or a run to --resume")
    chosen: dict[str, Any] = {name: None if x == "off" else x for name, x in _given(arguments, *_RECIPE).items()}
    recipe = Recipe(**chosen)
    held_out = _HELD_OUT if arguments.held_out is None else arguments.held_out
    share = _share(held_out)
    check_new(arguments.out)
    backend = get_backend(arguments.backend, arguments.device)
    backend.dtype(recipe.dtype)
    if arguments.init_from:
        found = _checkpoint(arguments)
        config, tokenizer = found.config, found.tokenizer
    else:
        tokenizer = _tokenizer(arguments)
        config = _config(arguments, tokenizer)
    if recipe.context is not None and recipe.context > config.n_ctx:
        raise ValueError(f"--context {recipe.context}: the model has n_ctx = {config.n_ctx} positions")
    _check_memory(config, recipe, backend)

    texts = [read(file) for file in arguments.data]
    held_out_texts = [read(held_out)] if share is None else []
    if tokenizer is None:
        tokenizer = train_tokenizer(_separated(arguments, texts), config.n_vocab)
    special = _special(arguments, tokenizer, [*texts, *held_out_texts])
    dtype = recipe.master_dtype
    if arguments.init_from:
        arrays = {path: cast(path, tensor, dtype).read() for path, tensor in found.tensors.items()}
        params = nest({path: backend.from_numpy(array, dtype) for path, array in arrays.items()})
    else:
        scale_residual = bool(arguments.scale_residual)
        params = init_params(config, seed=recipe.seed, backend=backend, dtype=dtype, scale_residual=scale_residual)

    def write(file: Path) -> int:
        n = write_tokens(texts, tokenizer, config.n_vocab, file, _progress, allow_special=special)
        if share is None:
            n_held_out = write_tokens(held_out_texts, tokenizer, config.n_vocab, file, allow_special=special)
        else:
            n_held_out = round(share * n)
        n_training = n if share is None else n - n_held_out
        length = (recipe.context or config.n_ctx) + 1
        check_room(n_training, length, "text")
        if share != 0:
            check_room(n_held_out, length, "held-out text")
        return n_training

    where = {"backend": backend.name} | _given(arguments, "device")
    trainer = Trainer(config, recipe, backend)
    companions = found.companions if arguments.init_from else {}
    run = Run.create(arguments.out, recipe, config, tokenizer, write, companions=companions, **where)
    return run, trainer, trainer.start(params)


def _share(text: str) -> float | None:
    """Return the share that a text says; None if it names a file."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise ValueError(f"--held-out {text}: expected a file, or a share of at least 0 and below 1")
    return share


def _tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    """Return the tokenizer that was given; None if one is to be made."""
    if arguments.tokenizer is None:
        return None
    if arguments.vocab_size is not None:
        raise ValueError("--vocab-size is of a tokenizer to be made; --tokenizer has its own")
    found = Tokenizer.load(arguments.tokenizer)
    if found is None:
        raise ValueError(f"{arguments.tokenizer}: holds neither tokenizer.json, nor vocab.json and merges.txt")
    return found


def _special(arguments: argparse.Namespace, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Return the special tokens that are tokens where the texts spell them."""
    named = arguments.allow_special_token or []
    if arguments.allow_special is False:
        return [*named]
    if tokenizer.end_of_text is None and any(END_OF_TEXT in text for text in texts):
        raise ValueError(
            f"--data: the texts hold {END_OF_TEXT}, which the tokenizer lacks; --no-allow-special reads it as text"
        )
    separators = [END_OF_TEXT] if tokenizer.end_of_text is not None else []
    return [*named, *(tokenizer.special_tokens if arguments.allow_special else separators)]


def _separated(arguments: argparse.Namespace, texts: list[str]) -> Iterable[str]:
    """Return the texts that a tokenizer is made for: documents, without what separates them."""
    if arguments.allow_special is False and END_OF_TEXT not in (arguments.allow_special_token or []):
        return texts
    return chain.from_iterable(map(documents, texts))


def _config(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> GPT2Config:
    shape = {name: default for name, (default, _) in _MODEL.items()} | _given(arguments, *_MODEL)
    if tokenizer is not None:
        return GPT2Config(n_vocab=tokenizer.n_vocab, eos_token_id=tokenizer.end_of_text, **shape)
    n_vocab = _VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size
    return GPT2Config(n_vocab=n_vocab, eos_token_id=0, **shape)  # as `train_tokenizer` makes it


def _checkpoint(arguments: argparse.Namespace) -> Checkpoint:
    if given := _given(arguments, "tokenizer", "vocab_size", "scale_residual", *_MODEL):
        raise ValueError(f"{', '.join(map(_option, given))}: the checkpoint of --init-from has its own")
    found = read_checkpoint(arguments.init_from)
    if found.tokenizer is None:
        raise ValueError(f"{arguments.init_from}: has no tokenizer, without which no text can be read")
    return found


def _check_memory(config: GPT2Config, recipe: Recipe, backend: Backend) -> None:
    """Refuse a run that needs more memory than there is, before a text is read. The sums are lower bounds."""
    context = recipe.context or config.n_ctx
    windows = 12 * recipe.batch_size * (context + 1)  # where each token is in the text, and its id
    checks.memory(windows, f"a batch of {recipe.batch_size} windows of {context} tokens")
    scalar, n = backend.from_numpy(np.zeros(()), recipe.master_dtype), count(config)
    check_memory(4 * n, scalar, f"training {n:,} parameters, with a gradient and two moments of each,")
    at_once = recipe.batch_size * context
    if (part := backend.part_size(scalar)) is not None:
        at_once = min(at_once, max(part, context))
    # For the backward pass: the residual stream, queries, keys, values and hidden units of each layer, and the logits.
    activations = config.n_layer * (5 * config.n_embd + config.n_hidden) + config.n_vocab
    check_memory(4 * n + at_once * activations, scalar, f"training on {at_once:,} tokens at a time")


def _progress(pieces: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(pieces, desc="tokenizing", unit=" pieces", delay=1, leave=False)
    return bar
