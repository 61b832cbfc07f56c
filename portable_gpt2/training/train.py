"""The loop: steps, evaluations and checkpoints of a run, until it is done or ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from typing import NamedTuple

from .data import batch, windows
from .optimizer import learning_rate
from .run import Run
from .trainer import State, Trainer


class Diverged(ArithmeticError):
    """The loss, or its gradient, is no number any more."""


class Report(NamedTuple):
    """What a step gave."""

    step: int
    """How many steps were taken, with this one; 0 is of the evaluation before the first."""
    loss: float | None
    """Of the step's batches, before the step, in nats a token."""
    norm: float | None
    """Of the gradient, before it was clipped."""
    rate: float | None
    held_out: float | None
    """The loss of the held-out text after the step, where the recipe says that it is evaluated."""
    seconds: float
    """That the step took, without evaluation."""


def train(run: Run, trainer: Trainer, state: State) -> Generator[Report, None, None]:
    """Take the steps that a run lacks; what each gives is yielded, and written to its metrics.

    At the beginning, every ``eval_every`` steps and at the end, the held-out text is evaluated and a checkpoint saved;
    also when the iterator is closed, or interrupted from the keyboard, in the midst. A run that goes on from a
    checkpoint ends in the same bits as one that was never interrupted, on the same backend and machine: a step's
    windows depend on nothing but the seed and the step.

    Parameters
    ----------
    run : Run
    trainer : Trainer
        Of the run's configuration and recipe.
    state : State
        The first, or what `Run.restore` returns.

    Raises
    ------
    Diverged
        If a loss or a gradient is not finite. The last checkpoint is as it was.
    ValueError
        If there is too little text for one window.
    """
    recipe = run.recipe
    length = (recipe.context or run.config.n_ctx) + 1
    training, held = run.tokens()
    held_out_windows = windows(held, length) if len(held) else None
    options = {"batch_size": recipe.batch_size, "length": length, "seed": recipe.seed}
    run.forget_metrics(state.step)
    saved = state.step if run.has_checkpoint else None

    def evaluated() -> float | None:
        return None if held_out_windows is None else trainer.evaluate(state.params, held_out_windows)

    with run.metrics_file.open("a", encoding="utf-8", buffering=1) as metrics:

        def written(made: Report) -> Report:
            metrics.write(
                json.dumps({name: value for name, value in made._asdict().items() if value is not None}) + "\n"
            )
            return made

        try:
            if saved is None:
                loss = evaluated()
                run.save(state, loss)
                saved = 0
                yield written(Report(0, None, None, None, loss, 0.0))
            while state.step < recipe.steps:
                start, step = time.perf_counter(), state.step
                first = step * recipe.accumulate
                batches = (batch(training, first + i, **options) for i in range(recipe.accumulate))
                after, loss, norm = trainer.step(state, batches)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise Diverged(_advice(step, loss, norm, run))
                state, seconds = after, time.perf_counter() - start
                held_out = None
                if state.step % recipe.eval_every == 0 or state.step == recipe.steps:
                    held_out = evaluated()
                    run.save(state, held_out)
                    saved = state.step
                yield written(Report(state.step, loss, norm, learning_rate(step, recipe), held_out, seconds))
        except (GeneratorExit, KeyboardInterrupt):
            if saved != state.step:
                run.save(state, None)
            raise


def _advice(step: int, loss: float, norm: float, run: Run) -> str:
    return (
        f"step {step + 1} diverged: the loss is {loss}, the gradient's norm {norm}. Try a lower learning rate than "
        f"{run.recipe.learning_rate}, more steps of warm-up than {run.recipe.warmup}, or a clip below "
        f"{run.recipe.clip}, in a new directory; {run.directory} keeps its checkpoint of step {run.last['step']}"
    )
