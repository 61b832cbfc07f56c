"""AdamW, gradient clipping and the learning-rate schedule, written once in array-API terms."""

from __future__ import annotations

import decimal
import functools
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from ..checks import integer
from ..correct_rounding.mode import Interpreter
from ..params import Params, flatten, map_tree, nest
from ..random import cos_pi
from ..registry import backend_of
from .recipe import Recipe

_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_LEAST_EPS = 2.0**-500  # in the reproducible mode, a smaller eps counts as 0, as frameworks replace 1e-310 by 0
_CONTEXT = decimal.Context(prec=50)


class Moments(NamedTuple):
    """Moving averages of the gradient (m) and of the squared gradient (v): trees with the paths of the parameters."""

    m: Params
    v: Params


def no_moments(params: Params) -> Moments:
    """Return the moments before the first step, which are zeros."""

    def zeros(x: Any) -> Any:
        backend = backend_of(x)
        return backend.zeros(backend.shape(x), like=x)

    return Moments(map_tree(zeros, params), map_tree(zeros, params))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step (from 0): a linear warm-up to the largest rate, then a cosine to the smallest.

    Examples
    --------
    >>> from portable_gpt2.training import Recipe, learning_rate
    >>> recipe = Recipe(steps=300, learning_rate=1e-3, warmup=100, min_lr_ratio=0.1)
    >>> [round(learning_rate(step, recipe), 6) for step in (0, 49, 99, 200, 300)]
    [1e-05, 0.0005, 0.001, 0.00055, 0.0001]
    """
    step = integer("step", step)
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    share = recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * (1 + float(cos_pi(Decimal(min(1.0, done))))) / 2
    return recipe.learning_rate * share


def rates(step: int, recipe: Recipe) -> np.ndarray:
    """Return the numbers that differ between steps, [3]: the learning rate, and the bias corrections of m and v.

    A bias correction is 1 / (1 - beta^t), where t counts the steps from 1. The numbers are an array because a compiler
    would treat Python's numbers as constants, and compile each step.
    """
    powers = (float(_CONTEXT.power(Decimal(beta), step + 1)) for beta in (recipe.beta1, recipe.beta2))
    bias = (1 / (1 - power) for power in powers)
    return np.asarray([learning_rate(step, recipe), *bias])


def global_norm(tree: Params) -> Any:
    """Return the Euclidean norm of the vector of all elements of a tree, a scalar array."""
    total = sum_of_squares([x for _, x in flatten(tree)])
    return backend_of(total).xp.sqrt(total)


def sum_of_squares(arrays: Sequence[Any]) -> Any:
    """Return the sum of the squares of all elements of several arrays, a scalar array."""
    backend = backend_of(arrays[0])
    first, *rest = backend.for_each(lambda x: backend.xp.sum(x * x), arrays)
    return sum(rest, first)


def adamw(p: Any, g: Any, m: Any, v: Any, rates: Any, recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return a parameter p and its moments m and v after a step with the gradient g.

    If eps is 0, an element whose gradient has always been 0 does not change (0 / 0 is taken as 0).

    Notes
    -----
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    xp = backend_of(rates).xp
    rate, bias_m, bias_v = rates[0], rates[1], rates[2]
    m = recipe.beta1 * m + (1 - recipe.beta1) * g
    v = recipe.beta2 * v + (1 - recipe.beta2) * (g * g)
    size = xp.sqrt(v * bias_v) + recipe.eps
    # In float32, such a small eps is rounded to 0, so `size` may be 0. A larger eps keeps `size` above 0.
    if recipe.eps < _SMALLEST:
        size = xp.where(size == 0, 1.0, size)
    step = (m * bias_m) / size
    if recipe.weight_decay:
        step = step + recipe.weight_decay * p
    return p - rate * step, m, v


def update(params: Params, grads: Params, moments: Moments, rates: Any, recipe: Recipe) -> tuple[Params, Moments, Any]:
    """Take a step, given the sum of the gradients of its batches. The gradient is averaged and clipped here.

    Only matrices decay.

    Returns
    -------
    params, moments
        The parameters and moments after the step.
    norm : float array []
        The norm of the averaged gradient before it was clipped.
    """
    norm = global_norm(grads) / recipe.gradient_accumulation_steps
    return *updated(params, grads, moments, rates, norm, recipe, 1 / recipe.gradient_accumulation_steps), norm


def updated(
    params: Params, grads: Params, moments: Moments, rates: Any, norm: Any, recipe: Recipe, scale: float = 1.0
) -> tuple[Params, Moments]:
    """Return the parameters and moments after a step with the gradient ``scale * grads``, whose norm is given."""
    backend = backend_of(rates)
    if recipe.max_grad_norm is not None:
        scale = scale * backend.xp.where(norm > recipe.max_grad_norm, recipe.max_grad_norm / (norm + 1e-6), 1.0)
    p, g, m, v = (dict(flatten(tree)) for tree in (params, grads, *moments))
    matrices = [path for path, x in p.items() if len(backend.shape(x)) >= 2]
    vectors = [path for path, x in p.items() if len(backend.shape(x)) < 2]

    def step(recipe: Recipe, p: Any, g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        return adamw(p, g * scale, m, v, rates, recipe)

    for paths, options in ((matrices, recipe), (vectors, replace(recipe, weight_decay=0.0))):
        lists = ([tree[path] for path in paths] for tree in (p, g, m, v))
        found = backend.for_each(functools.partial(step, options), *lists)
        for path, after in zip(paths, found, strict=True):
            p[path], m[path], v[path] = after
    return nest(p), Moments(nest(m), nest(v))


def reproducible_update(
    params: Params, grads: Params, moments: Moments, rates: np.ndarray, recipe: Recipe, interpreter: Interpreter
) -> tuple[Params, Moments, float]:
    """Take the step of `update` in the reproducible mode, in which each result is rounded once.

    The arguments and the results are those of `update`, except that `rates` and the norm are on the host. Numbers such
    as the scale of the gradient are computed on the host in float64, in the order in which they are written here. The
    moments are each one formula of float32 arrays, and the parameters are one formula of the new moments.
    """
    n = recipe.gradient_accumulation_steps
    norm = interpreter.norm([g for _, g in flatten(grads)], n)
    scale = 1 / n
    if recipe.max_grad_norm is not None and norm > recipe.max_grad_norm:
        scale = scale * (recipe.max_grad_norm / (norm + 1e-6))
    rate, bias_m, bias_v = map(float, rates)
    new, rest = 1 - recipe.beta1, 1 - recipe.beta2
    of_moments = [recipe.beta1, new * scale, recipe.beta2, rest * (scale * scale)]
    p, g, m, v = (dict(flatten(tree)) for tree in (params, grads, *moments))
    for path, x in p.items():
        after = interpreter.formula("moments", {"g": g[path], "m": m[path], "v": v[path]}, constants=of_moments)
        m[path], v[path] = after["m"], after["v"]
        decay = recipe.weight_decay if len(backend_of(x).shape(x)) >= 2 else 0.0
        of_step = [1 - rate * decay, rate * bias_m, bias_v, recipe.eps if recipe.eps >= _LEAST_EPS else 0.0]
        p[path] = interpreter.formula("adamw", {"p": x, "m": m[path], "v": v[path]}, constants=of_step)["p"]
    return nest(p), Moments(nest(m), nest(v)), norm
