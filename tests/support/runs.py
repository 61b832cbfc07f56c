"""Small training runs on NumPy, and the contents of their directories."""

import json

import numpy as np

import portable_gpt2 as pg
from portable_gpt2.training import Recipe, Run, Trainer, train

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=32, n_ctx=8, eos_token_id=None)
RECIPE = Recipe(steps=6, batch_size=2, warmup=2, learning_rate=3e-3, eval_every=2, seed=5, dtype="float32")


def write_ids(file):
    file.write_bytes(np.random.default_rng(2).integers(0, CONFIG.n_vocab, 300).astype("<u2").tobytes())
    return 240


def begin(directory, recipe=RECIPE):
    backend = pg.get_backend("numpy")
    run = Run.create(directory, recipe, CONFIG, None, write_ids)
    trainer = Trainer(CONFIG, recipe, backend)
    return run, trainer, trainer.start(pg.init_params(CONFIG, seed=recipe.seed, backend=backend))


def resume(directory):
    """Resume a run as the command does, take its remaining steps, and return it."""
    backend = pg.get_backend("numpy")
    run = Run.open(directory)
    for _ in train(run, Trainer(run.config, run.recipe, backend), run.restore(backend)):
        pass
    return run


def lines(directory):
    """Return the metrics without the seconds, which differ between runs."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entries.items() if name != "seconds"} for entries in found]


def contents(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != "metrics.jsonl"
    }
