"""The training loop: the steps, evaluations and checkpoints of a run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from .data import batch, windows
from .optimizer import learning_rate
from .records import Metrics
from .run import Run
from .trainer import Diverged, State, Trainer

__all__ = ["Diverged", "Report", "train"]


class Report(NamedTuple):
    """The results of a step."""

    step: int
    """The number of steps that were taken. The report of step 0 has the evaluation before the first step."""
    loss: float | None
    """The mean loss of the step's batches before the step, in nats per token."""
    norm: float | None
    """The norm of the gradient before it was clipped."""
    rate: float | None
    """The learning rate."""
    held_out: float | None
    """The loss of the held-out text after the step, or None if it was not evaluated."""
    seconds: float
    """The duration of the step without the evaluation."""


def train(run: Run, trainer: Trainer, state: State) -> Generator[Report, None, None]:
    """Take the remaining steps of a run. The report of each step is yielded, and written to the run's metrics.

    The held-out text is evaluated and a checkpoint is saved before the first step, every ``eval_every`` steps, and at
    the end. A checkpoint is also saved when the iterator is closed, or interrupted by Ctrl-C, between two evaluations.
    A run that is resumed gives the same bits as one that was never interrupted, on the same backend and machine,
    because the windows of a step depend only on the seed and the step's number. On CUDA, PyTorch's fused attention has
    a deterministic gradient only after ``torch.use_deterministic_algorithms(True)``.

    On a mesh, each process calls this with the same arguments, and takes the iterator's reports to the same step.
    Process 0 writes the files of the run, which the others read; so the directory must be the same for all.

    The run is locked until the iterator ends, is closed or is deleted.

    Parameters
    ----------
    run : Run
        The run.
    trainer : Trainer
        A trainer with the run's configuration and recipe.
    state : State
        The state that `Trainer.start` or `Run.restore` returned.

    Raises
    ------
    Diverged
        If a loss, a gradient, a parameter or a moment is NaN or infinite. The last checkpoint is kept.
    ValueError
        If a text has fewer tokens than a window, another process or thread trains the run, or the trainer or the state
        belongs to another run.
    CheckpointError
        If a file of the run is damaged. The message names it.
    MeshError
        If another process of the mesh could not open the run, or could not write a file of it.
    """
    mesh = trainer.mesh
    is_first = mesh is None or mesh.is_first
    if (trainer.config, trainer.recipe) != (run.config, run.recipe):
        raise ValueError(f"{run.directory}: the trainer has another configuration, or another recipe, than the run")
    with contextlib.ExitStack() as stack:

        def opened() -> tuple[Metrics | None, int | None]:
            """Lock the run. No process continues before all have looked for a checkpoint."""
            metrics = stack.enter_context(run.training()) if is_first else None
            return metrics, run.last["step"] if run.has_checkpoint else None

        metrics, last = opened() if mesh is None else mesh.together(opened)
        if state.step != (last or 0):
            at = "has no checkpoint" if last is None else f"has its last checkpoint at step {last}"
            raise ValueError(f"{run.directory}: {at}; the state is at step {state.step}: restore it from the run")
        yield from _steps(run, trainer, state, metrics, last)


def _steps(
    run: Run, trainer: Trainer, state: State, metrics: Metrics | None, saved: int | None
) -> Generator[Report, None, None]:
    recipe = run.recipe
    length = (recipe.context or run.config.n_ctx) + 1
    training, held = run.tokens()
    held_out_windows = windows(held, length) if len(held) else None
    options = {"batch_size": recipe.batch_size, "length": length, "seed": recipe.seed}

    def batches(step: int) -> Iterator[np.ndarray]:
        first = step * recipe.gradient_accumulation_steps
        return (batch(training, first + i, **options) for i in range(recipe.gradient_accumulation_steps))

    def loss_of(state: State, text: np.ndarray, what: str) -> float:
        """Return the loss of a text after a step, which must be finite."""
        loss = trainer.evaluate(state.params, text)
        if not math.isfinite(loss):
            raise run.diverged(state.step, f"the loss of {what} is {loss} after this step")
        return loss

    def try_out(state: State) -> None:
        loss_of(state, next(batches(max(0, state.step - 1))), "its text")

    def evaluated(state: State) -> float | None:
        if held_out_windows is None:
            try_out(state)
            return None
        return loss_of(state, held_out_windows, "the held-out text")

    def is_due(step: int) -> bool:
        return step % recipe.eval_every == 0 or step == recipe.steps

    # A step is done when it has been evaluated. One statement assigns its state and its report, because Ctrl-C may come
    # between two statements.
    done: tuple[State, Report] | None = None

    def finish(save: bool) -> None:
        """Write the metrics of the step that is done, then its checkpoint, which records where the metrics end."""
        nonlocal saved
        assert done is not None
        state, report = done

        def write() -> None:
            if metrics is not None:
                metrics.add(state.step, {name: value for name, value in report._asdict().items() if value is not None})

        write() if trainer.mesh is None else trainer.mesh.together(write)
        if save:
            run.save(state, report.held_out, trainer)
            saved = state.step

    try:
        if saved is None:
            done = state, Report(0, None, None, None, evaluated(state), 0.0)
            finish(save=True)
            yield done[1]
        while state.step < recipe.steps:
            start, step = time.perf_counter(), state.step
            after, loss, norm = trainer.step(state, batches(step))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise run.diverged(step + 1, f"the loss is {loss}, the gradient's norm {norm}")
            seconds, due = time.perf_counter() - start, is_due(after.step)
            held_out = evaluated(after) if due else None
            done = after, Report(after.step, loss, norm, learning_rate(step, recipe), held_out, seconds)
            finish(save=due)
            state, _ = done
            yield done[1]
    except (GeneratorExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and trainer.mesh is not None and not trainer.mesh.is_alone:
            raise  # the other processes may not be at the same step, and would not take part in saving it
        if done is not None and done[0].step != saved:
            try_out(done[0])
            finish(save=True)
        raise
