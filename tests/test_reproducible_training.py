"""Training in the reproducible mode: the same bits on every backend, also when a run is resumed on another one."""

import dataclasses
import hashlib
import inspect
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import runs

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.cli import main
from portable_gpt2.correct_rounding import exact_gradients, mode
from portable_gpt2.params import flatten, init_params, nest
from portable_gpt2.testing.plain_gpt2 import PASSAGE
from portable_gpt2.training import Moments, Recipe, Run, State, Trainer, batch, learning_rate, train
from portable_gpt2.training import trainer as trainer_module
from portable_gpt2.training.optimizer import no_moments, rates, reproducible_update

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=128, n_ctx=8, eos_token_id=None)
RECIPE = Recipe(
    steps=4,
    batch_size=3,
    gradient_accumulation_steps=2,
    warmup=2,
    learning_rate=0.01,
    max_grad_norm=0.5,
    reproducible=True,
)
TEXT = np.frombuffer(PASSAGE.encode(), np.uint8).astype(np.int32)
NOT_FOR = ("flint",)  # the mode refuses a backend whose arrays enclose exact results


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def sha256(state):
    found = hashlib.sha256()
    for tree in (state.params, *state.moments):
        for path, x in flatten(tree):
            found.update(path.encode() + np.ascontiguousarray(pg.to_numpy(x)).tobytes())
    return found.hexdigest()


def start(backend, config=CONFIG, recipe=RECIPE):
    trainer = Trainer(config, recipe, backend)
    return trainer, trainer.start(init_params(config, seed=1, backend=backend))


def take(trainer, state, steps, length=CONFIG.n_ctx + 1):
    n = trainer.recipe.gradient_accumulation_steps
    options = {"batch_size": trainer.recipe.batch_size, "length": length, "seed": 0}
    for _ in range(steps):
        state, loss, norm = trainer.step(state, [batch(TEXT, state.step * n + i, **options) for i in range(n)])
    return state, loss, norm


FORMULAS = {
    "add_backward": ([normal(3, 4, 5)], {"n_axes": 1}),
    "conv1d_backward": ([normal(6, 5), normal(1, 5, 4), normal(6, 4)], {}),
    "embed_backward": ([np.asarray([1, 5, 1, 0, 2, 5], np.int32), normal(6, 5)], {"n_vocab": 6}),
    "gelu_backward": ([4 * normal(30), normal(30, seed=1)], {}),
    "layer_norm_backward": ([normal(6, 5), normal(5), normal(6, 5, seed=1)], {"eps": 1e-5}),
    "attention_backward": ([normal(2, 4, 3, seed=i) for i in range(4)], {"causal": True, "scale": 0.5}),
    "cross_entropy_backward": ([4 * normal(6, 5), np.asarray([1, 4, 1, 0, 2, 3], np.int32)], {"factor": 1 / 6}),
    "adamw": ([normal(9), normal(9, seed=1), normal(9, seed=2) ** 2], {"constants": (0.999, 0.02, 1.5, 1e-8)}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_has_the_bits_of_exact_arithmetic(backend, name):
    """Catches a framework whose evaluation in float64 is not what its bound assumes."""
    arrays, options = FORMULAS[name]
    constants = options.get("constants", ())
    on_host = [*arrays, np.asarray(constants)] if constants else arrays
    options = {} if constants else options
    names = {"adamw": ("p", "m", "v")}.get(name) or inspect.signature(getattr(gradients, name)).parameters
    given = {key: backend.from_numpy(a) for key, a in zip(names, arrays, strict=False)}
    found = mode.Interpreter().formula(name, given, options, constants)
    found = {key: backend.to_numpy(x) for key, x in found.items()}
    at = {key: np.nonzero(np.ones(a.shape)) for key, a in found.items()}
    for key, expected in getattr(exact_gradients, name)(*on_host, **options, at=at).items():
        assert found[key].ravel().tobytes() == expected.tobytes(), key


# The SHA-256 of the parameters and moments after the fourth step.
PUBLISHED = "42b650da4647c7fce7542add2d6fd7d991dbddfcdbff2e8c081c043670280df0"


def test_a_run_that_is_resumed_on_another_backend_has_the_same_bits(torch):
    """Catches every operation of a step that depends on the backend: 2 steps with one, 2 steps with the other."""
    del torch
    after = []
    for names in (("numpy", "numpy"), ("torch", "torch"), ("numpy", "torch"), ("torch", "numpy")):
        first, second = map(pg.get_backend, names)
        state, *_ = take(*start(first), 2)
        trees = [
            nest({path: second.from_numpy(pg.to_numpy(x)) for path, x in flatten(tree)})
            for tree in (state.params, *state.moments)
        ]
        trainer, _ = start(second)
        state, loss, norm = take(trainer, State(2, trees[0], Moments(*trees[1:])), 2)
        held_out = trainer.evaluate(state.params, batch(TEXT, 9, batch_size=5, length=9, seed=1))
        after.append((sha256(state), loss, norm, held_out))
    assert after == [(PUBLISHED, *after[0][1:])] * 4
    assert after[0][3] < 0.97 * start_loss()


def test_the_gradient_of_a_batch_is_not_split(monkeypatch):
    """Catches sums over rows that are rounded once for each micro-batch, whose sizes differ between backends."""
    monkeypatch.setattr(trainer_module, "micro_batch_tokens", lambda *args: 8)
    state, *_ = take(*start(pg.get_backend("numpy")), 4)
    assert sha256(state) == PUBLISHED


def start_loss():
    trainer, state = start(pg.get_backend("numpy"))
    return trainer.evaluate(state.params, batch(TEXT, 9, batch_size=5, length=9, seed=1))


def test_a_step_is_near_that_in_float32():
    """Catches a scale that is applied twice, a correction or a decay that is left out."""
    for changed in ({}, {"max_grad_norm": None, "weight_decay": 0.0}, {"eps": 0.0}, {"beta1": 0.0}):
        recipe = dataclasses.replace(RECIPE, **changed)
        backend = pg.get_backend("numpy")
        exact, loss, norm = take(*start(backend, recipe=recipe), 3)
        plain, *other = take(*start(backend, recipe=dataclasses.replace(recipe, reproducible=False)), 3)
        assert (loss, norm) == pytest.approx(other, rel=1e-5)
        for one, two in zip((exact.params, *exact.moments), (plain.params, *plain.moments), strict=True):
            for (path, a), (_, b) in zip(flatten(one), flatten(two), strict=True):
                assert a.dtype == np.float32
                if path.endswith("c_attn/b"):  # the keys' bias changes no weight: its gradient is only rounding errors
                    a, b = np.delete(a, slice(8, 16)), np.delete(b, slice(8, 16))
                assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), path


def test_the_constants_of_a_step(monkeypatch):
    """Catches another order of operations, and an eps that is 0 on one framework and not on another."""
    given = []
    monkeypatch.setattr(
        mode.Interpreter,
        "formula",
        lambda self, name, arrays, **options: given.append(options) or {**arrays, "p": arrays.get("p")},
    )
    for eps, most in ((1e-8, 0.5), (1e-320, 2.0)):
        recipe = dataclasses.replace(RECIPE, eps=eps, max_grad_norm=most)
        params = {"w": np.ones(2, np.float32)}
        reproducible_update(params, params, no_moments(params), rates(0, recipe), recipe, mode.Interpreter())
    assert [each["constants"][3] for each in given[1::2]] == [1e-8, 0.0]
    scale = 1 / 2 * (0.5 / (float(np.float32(math.sqrt(0.5))) + 1e-6))
    for each, factor in ((given[0], scale), (given[2], 1 / 2)):  # the second gradient is not clipped
        assert each["constants"] == [0.9, (1 - 0.9) * factor, 0.99, (1 - 0.99) * (factor * factor)]


def test_the_recipe_of_a_run_keeps_the_mode(tmp_path):
    """Catches a resumed run that computes in float32, and a record of an ordinary run that older versions refuse."""
    recipe = dataclasses.replace(runs.RECIPE, steps=3, eval_every=1, reproducible=True)
    run, trainer, state = runs.begin(tmp_path / "run", recipe)
    steps = train(run, trainer, state)
    for _ in range(2):
        next(steps)
    steps.close()
    found = runs.resume(tmp_path / "run")
    assert found.recipe == recipe
    run, trainer, state = runs.begin(tmp_path / "whole", recipe)
    for _ in train(run, trainer, state):
        pass
    assert runs.lines(tmp_path / "run") == runs.lines(tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    next(train(*runs.begin(tmp_path / "plain")))
    record = json.loads((tmp_path / "plain" / "training" / "run.json").read_text())
    assert "reproducible" not in record["recipe"]
    assert Run.open(tmp_path / "plain").recipe.reproducible is False


def test_what_cannot_be_reproducible_is_refused(tmp_path, capsys):
    """Catches an option that is accepted and ignored."""
    with pytest.raises(ValueError, match=r"^dtype is bfloat16; reproducible training is in float32$"):
        Recipe(dtype="bfloat16", reproducible=True)
    with pytest.raises(ValueError, match=r"^reproducible is 'no'; expected true or false$"):
        Recipe(reproducible="no")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question. " * 40)
    shape = ["--n-layer", "1", "--n-head", "1", "--n-embd", "4", "--n-ctx", "4", "--vocab-size", "260"]
    options = ["--steps", "1", "--batch-size", "1", "--reproducible", "--backend", "numpy", *shape]
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *options]) == 0
    assert Run.open(tmp_path / "run").recipe.reproducible
    assert main(["train", "--resume", "--reproducible", "--out", str(tmp_path / "run")]) == 2
    assert "--reproducible: a run that is resumed keeps its options" in capsys.readouterr().err


def test_the_schedule_depends_on_no_library_of_the_platform():
    """Catches math.cos and powers of floats. The fractions of 50 digits are known."""
    recipe = Recipe(steps=7, warmup=0, learning_rate=1.0, min_lr_ratio=0.0)
    for step in range(8):
        assert learning_rate(step, recipe) == pytest.approx(
            (1 + math.cos(math.pi * step / 7)) / 2, rel=1e-14, abs=1e-16
        )
    assert learning_rate(3, recipe).hex() == "0x1.38f721c6048b1p-1"  # by math.cos, the last digit is 0
    assert learning_rate(7, recipe) == 0
    assert learning_rate(0, recipe) == 1
    for step in (0, 1, 9, 1000):
        _, m, v = rates(step, recipe)
        powers = [float(Fraction(beta) ** (step + 1)) for beta in (0.9, 0.99)]  # Python rounds a fraction correctly
        assert [m, v] == [1 / (1 - power) for power in powers]
