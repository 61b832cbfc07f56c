"""AdamW, the clipping of gradients and the schedule of the learning rate, written once in array-API terms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..checks import integer
from ..params import Params, flatten, map_tree, nest
from ..registry import backend_of
from .recipe import Recipe

_SMALLEST = float(np.finfo(np.float32).smallest_normal)


class Moments(NamedTuple):
    """Running averages of the gradient and of its square, trees like the parameters'."""

    m: Params
    v: Params


def no_moments(params: Params) -> Moments:
    """Return the moments from which training starts: zeros."""

    def zeros(x: Any) -> Any:
        backend = backend_of(x)
        return backend.zeros(backend.shape(x), like=x)

    return Moments(map_tree(zeros, params), map_tree(zeros, params))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of a step, from 0: linear warm-up to the recipe's rate, then a cosine to its final share of it.

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
    share = recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return recipe.learning_rate * share


def rates(step: int, recipe: Recipe) -> np.ndarray:
    """Return what differs from step to step, [3], as an array: of a number, a compiler would make a constant.

    They are the learning rate, and what makes up for the moments having started from 0: 1 / (1 - beta^t) of each, where
    t counts from 1.
    """
    bias = (1 / (1 - beta ** (step + 1)) for beta in (recipe.beta1, recipe.beta2))
    return np.asarray([learning_rate(step, recipe), *bias])


def global_norm(tree: Params) -> Any:
    """Return the Euclidean norm of all leaves together, a scalar array."""
    leaves = [x for _, x in flatten(tree)]
    xp = backend_of(leaves[0]).xp
    first, *rest = [xp.sum(x * x) for x in leaves]
    return xp.sqrt(sum(rest, first))


def adamw(p: Any, g: Any, m: Any, v: Any, rates: Any, recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return a parameter, and its moments, after a step along its gradient.

    Only matrices decay: the biases and the gains of layer_norm have no scale that they could lose. With an eps of 0, a
    parameter that never had a gradient does not move (its step would be 0 / 0).

    Notes
    -----
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    backend = backend_of(p)
    rate, bias_m, bias_v = rates[0], rates[1], rates[2]
    m = recipe.beta1 * m + (1 - recipe.beta1) * g
    v = recipe.beta2 * v + (1 - recipe.beta2) * (g * g)
    size = backend.xp.sqrt(v * bias_v) + recipe.eps
    if recipe.eps < _SMALLEST:  # 0 in float32; a larger eps costs no pass over the parameters, and changes no bit
        size = backend.xp.where(size == 0, 1.0, size)
    step = (m * bias_m) / size
    if len(backend.shape(p)) >= 2:
        step = step + recipe.weight_decay * p
    return p - rate * step, m, v


def update(params: Params, grads: Params, moments: Moments, rates: Any, recipe: Recipe) -> tuple[Params, Moments, Any]:
    """Average and clip the sum of the gradients of a step's batches, and take a step along it.

    Returns
    -------
    params, moments
        After the step.
    norm : float array []
        The gradient's, before it was clipped.
    """
    xp = backend_of(rates).xp
    norm = global_norm(grads) / recipe.gradient_accumulation_steps
    scale = 1 / recipe.gradient_accumulation_steps
    if recipe.max_grad_norm is not None:
        scale = scale * xp.where(norm > recipe.max_grad_norm, recipe.max_grad_norm / (norm + 1e-6), 1.0)
    p, g, m, v = (dict(flatten(tree)) for tree in (params, grads, *moments))
    for path in p:
        p[path], m[path], v[path] = adamw(p[path], g[path] * scale, m[path], v[path], rates, recipe)
    return nest(p), Moments(nest(m), nest(v)), norm
