"""Train a model on meshes, and write what the steps compute: ``python train_divided.py ENGINE DIRECTORY TASKS``.

With the engine ``torch`` it is one of several processes. TASKS is JSON: a list of lists, each with the name of a
function of this file and its arguments. ``test_mesh_training.py`` looks at the files, and at what each process
returned.
"""

import contextlib
import functools
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import portable_gpt2 as pg
from portable_gpt2.cli.commands import run as command
from portable_gpt2.cli.streams import _silent
from portable_gpt2.mesh import MeshError, parse
from portable_gpt2.params import flatten, initial_tensors, nest
from portable_gpt2.training import Recipe, Run, Trainer, train

# n_vocab is not a multiple of the devices, and no length equals another by chance. With a larger eps than usual, the
# biases of the keys, whose gradient is only rounding errors, do not change by a learning rate in each step.
CONFIG = pg.GPT2Config(n_layer=1, n_head=4, n_embd=8, n_inner=20, n_vocab=33, n_ctx=6, eos_token_id=None)
RECIPE = Recipe(
    steps=50, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, warmup=5, max_grad_norm=0.5, eps=1e-4,
    dtype="float64", eval_every=25, seed=3,
)  # fmt: skip
TEXT = np.random.default_rng(0).integers(0, 33, 400).astype("<u2")
N_TRAINING = 360  # the 40 others are 6 windows: 4 that are divided over a mesh, and 2 that may be whole


def create(directory):
    def write(file):
        TEXT.tofile(file)
        return N_TRAINING

    return Run.create(directory, RECIPE, CONFIG, None, write, backend="numpy")


def trained(directory, trainer, until=None):
    """Begin or continue a run, up to a step. Return the last state."""
    mesh, exists = trainer.mesh, os.path.exists(directory)
    if mesh is not None:
        exists = mesh.agree(exists)  # no process makes the directory before all have looked
    if not exists:
        run = create(directory) if mesh is None or mesh.is_first else None
        if mesh is not None:
            mesh.together(lambda: None)
        run = run or Run.begun(directory, CONFIG)
        tensors = initial_tensors(CONFIG, seed=RECIPE.seed, dtype=RECIPE.master_dtype)
        state = trainer.start(nest({path: trainer.place(path, tensor) for path, tensor in tensors.items()}))
    else:
        run = Run.open(directory)
        state = run.restore(trainer)
    reports = train(run, trainer, state)
    for report in reports:
        if report.step == until:
            break
    reports.close()
    return run


@functools.cache  # what it has compiled is used again
def on_mesh(engine, sizes, shard=False):
    return Trainer(CONFIG, RECIPE, engine, parse(sizes), shard_optimizer=shard)


def whole(engine, directory, sizes, shard, until=None):
    """Train a run on a mesh. Return the number of elements of parameters and moments that this device has."""
    trainer = on_mesh(engine, sizes, shard)
    run = trained(directory, trainer, until)
    state = run.restore(trainer)
    return [sum(held(x) for _, x in flatten(tree)) for tree in (state.params, *state.moments)]


def held(x):
    local = x.to_local() if hasattr(x, "to_local") else x.addressable_data(0)
    return int(np.prod(local.shape))


def refused_write(engine, directory, sizes):
    """Let the process that writes fail in the middle of a checkpoint. Return the error of each process."""
    trainer = on_mesh(engine, sizes)
    run = trained(directory, trainer, 2)
    state = run.restore(trainer)
    n = 0
    from portable_gpt2.training import run as module

    finite = module.is_finite

    def full(a):
        nonlocal n
        n += 1
        if n == 20:
            raise OSError("no space left")
        return finite(a)

    module.is_finite = full
    try:
        run.save(state, 1.0, trainer)
    except (OSError, MeshError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        module.is_finite = finite
    return None


def told(engine, *arguments):
    """Return the status and the messages of the command."""
    said, texts = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(texts):
        status = command([*arguments])
    _silent.clear()
    return [status, texts.getvalue(), said.getvalue()]


def killed(engine, how, number, step, *arguments):
    """Kill or stop one process in a step. The others return how long they still ran, and what they said."""
    rank = pg.get_backend(engine).process()[0]
    taken, original, start = 0, Trainer.step, [0.0]

    def counted(self, *given):
        nonlocal taken
        taken += 1
        if taken == step:
            start[0] = time.monotonic()
            if rank == number:
                os.kill(os.getpid(), getattr(signal, how))
        return original(self, *given)

    Trainer.step = counted
    return [*told(engine, *arguments), time.monotonic() - start[0]]


def main(engine, directory, tasks):
    rank = os.environ.get("RANK", "0")
    for i, (name, *arguments) in enumerate(json.loads(tasks)):
        os.chdir(directory)
        found = globals()[name](engine, *arguments)
        Path(f"{engine}-{i}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # because gloo's threads may abort an interpreter that shuts down normally


if __name__ == "__main__":
    main(*sys.argv[1:])
