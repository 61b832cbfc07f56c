"""A step of AdamW, against the formula of the paper in plain NumPy and float64."""

import dataclasses
import math

import numpy as np
import pytest

from portable_gpt2.backend import Backend
from portable_gpt2.params import flatten, map_tree, nest
from portable_gpt2.testing.plain_gpt2 import U
from portable_gpt2.testing.strategies import wide_dtypes
from portable_gpt2.training import Recipe, learning_rate
from portable_gpt2.training.optimizer import no_moments, rates, update

pytestmark = pytest.mark.every_device


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "wte": scale * rng.standard_normal((5, 4)),
        "h0": {"ln_1": {"g": 1 + scale * rng.standard_normal(4), "b": scale * rng.standard_normal(4)}},
    }


def on(backend, tree, dtype):
    return map_tree(lambda a: backend.from_numpy(a, dtype), tree)


def host(backend, tree):
    return {path: backend.to_numpy(x) for path, x in flatten(tree)}


def plain_adamw(params, grads_of_steps, recipe):
    """Return the parameters after some steps, in plain NumPy and float64, as the paper has it."""
    p = {path: np.asarray(x) for path, x in flatten(params)}
    m, v = ({path: np.zeros_like(x) for path, x in p.items()} for _ in range(2))
    for t, grads in enumerate(grads_of_steps, 1):
        g = {path: x / recipe.gradient_accumulation_steps for path, x in flatten(grads)}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        clip = 1.0 if recipe.max_grad_norm is None else min(1.0, recipe.max_grad_norm / (norm + 1e-6))
        rate = learning_rate(t - 1, recipe)
        for path in p:
            m[path] = recipe.beta1 * m[path] + (1 - recipe.beta1) * clip * g[path]
            v[path] = recipe.beta2 * v[path] + (1 - recipe.beta2) * (clip * g[path]) ** 2
            m_hat, v_hat = m[path] / (1 - recipe.beta1**t), v[path] / (1 - recipe.beta2**t)
            decay = recipe.weight_decay if p[path].ndim == 2 else 0.0
            p[path] = p[path] - rate * (m_hat / (np.sqrt(v_hat) + recipe.eps) + decay * p[path])
    return p


@wide_dtypes
@pytest.mark.parametrize("scale", [10.0, 1e-3])  # clipped, and not
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"weight_decay": 0.0},
        {"max_grad_norm": None},
        {"gradient_accumulation_steps": 3},
        {"beta1": 0.0, "eps": 1e-3},
    ],
    ids=str,
)
def test_a_step_is_adamw(backend, dtype, scale, changed):
    """Catches decay on gains or of the gradient, a bias left in the moments, clipping leaf by leaf or of the sum, and
    results that are assigned to another parameter or moment.
    """
    recipe = dataclasses.replace(Recipe(steps=9, warmup=2, learning_rate=0.01), **changed)
    steps = [random_tree(seed, scale) for seed in range(1, 6)]
    params = on(backend, random_tree(0), dtype)
    moments = no_moments(params)
    for i, grads in enumerate(steps):
        now = backend.from_numpy(rates(i, recipe), dtype)
        params, moments, norm = update(params, on(backend, grads, dtype), moments, now, recipe)
    expected = plain_adamw(random_tree(0), steps, recipe)
    tolerance = 1e-13 if dtype == "float64" else 40 * U["float32"]
    for path, x in host(backend, params).items():
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=tolerance * 2)
    squares = sum((x**2).sum() for _, x in flatten(steps[-1]))
    np.testing.assert_allclose(
        backend.to_numpy(norm), math.sqrt(squares) / recipe.gradient_accumulation_steps, rtol=1e-5
    )


@pytest.mark.about("for_each")
@pytest.mark.parametrize(
    "changed",
    [{}, {"eps": 0.0, "weight_decay": 0.0}, {"max_grad_norm": None, "gradient_accumulation_steps": 3}],
    ids=str,
)
def test_for_each_gives_the_bits_of_one_parameter_after_the_other(backend, monkeypatch, changed):
    """Catches results that are assigned to other parameters, or to another moment, another order of rounding, and a
    step that writes into its arguments.
    """
    recipe = dataclasses.replace(Recipe(steps=9, warmup=2), **changed)
    sizes = [(7, 5), (5,), (3, 2), (9,), (4, 4), (4,)]

    def tree(seed):
        rng = np.random.default_rng(seed)
        leaves = {f"h{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}
        leaves["h2"][0] = 0  # a gradient that is 0
        return nest({path: backend.from_numpy(a) for path, a in leaves.items()})

    def three_steps():
        params = tree(0)
        moments = no_moments(params)
        for i in range(3):
            now, grads = backend.from_numpy(rates(i, recipe), "float32"), tree(i + 1)
            given = params, grads, *moments
            before = [{path: x.tobytes() for path, x in host(backend, each).items()} for each in given]
            params, moments, norm = update(params, grads, moments, now, recipe)
            after = [{path: x.tobytes() for path, x in host(backend, each).items()} for each in given]
            assert after == before, "a step changed its arguments"
        return [host(backend, each) for each in (params, *moments, {"norm": norm})]

    found = three_steps()
    monkeypatch.setattr(type(backend), "for_each", Backend.for_each)
    for name, one, other in zip(("params", "m", "v", "norm"), found, three_steps(), strict=True):
        assert one.keys() == other.keys()
        for path, x in one.items():
            assert x.tobytes() == other[path].tobytes(), f"{path} of {name}"
