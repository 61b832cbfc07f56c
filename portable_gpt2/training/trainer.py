"""Trainer: the step of training and the loss of held-out text, on one backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .. import gradients
from ..backend import Backend
from ..checks import check_ids, check_length, shown
from ..config import GPT2Config
from ..model import loss
from ..params import Params, check_params, flatten, map_tree
from ..registry import get_backend
from .optimizer import Moments, no_moments, rates, update
from .recipe import Recipe

# NumPy alone would warn of each overflow on the way to a loss that is NaN, which `train` reports.
_QUIET = functools.partial(np.errstate, all="ignore")


class State(NamedTuple):
    """Where a run stands: all that the steps to come depend on, the data and the recipe aside."""

    step: int
    """How many steps were taken."""
    params: Params
    moments: Moments


class Diverged(ArithmeticError):
    """A loss, a gradient, or what a step makes of the parameters or of their moments, is NaN or infinite."""


class Trainer:
    """What trains a model of one shape by one recipe, on the backend and device of the parameters that it is given.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    recipe : Recipe
    backend : Backend or str
        What computes.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> from portable_gpt2.training import Recipe, Trainer
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> trainer = Trainer(config, Recipe(learning_rate=0.1, warmup=0), pg.get_backend("numpy"))
    >>> state = trainer.start(pg.init_params(config, backend="numpy"))
    >>> text = np.asarray([[1, 2, 3, 4, 5]])
    >>> for _ in range(20):
    ...     state, value, norm = trainer.step(state, [text])
    >>> value < 0.1, state.step
    (True, 20)
    """

    def __init__(self, config: GPT2Config, recipe: Recipe, backend: Backend | str) -> None:
        for name, given, kind in (("config", config, GPT2Config), ("recipe", recipe, Recipe)):
            if not isinstance(given, kind):
                raise TypeError(f"{name} is {shown(given)}; expected a {kind.__name__}")
        backend = get_backend(backend)
        backend.dtype(recipe.dtype)
        self.config, self.recipe, self.backend = config, recipe, backend
        self._loss = backend.compile(self._loss_of)
        self._gradient = backend.compile(self._gradient_of)
        self._add = backend.compile(lambda one, other: map_tree(lambda x, y: x + y, one, other))
        self._update = backend.compile(
            lambda params, grads, moments, rates: update(params, grads, moments, rates, recipe)
        )

    def start(self, params: Params) -> State:
        """Return the state before the first step.

        Raises
        ------
        ValueError
            If the parameters do not fit the configuration, or their dtype is not the recipe's `Recipe.master_dtype`.
        TypeError
            If they are not arrays of the trainer's backend.
        """
        check_params(params, self.config)
        for path, x in flatten(params):
            if not isinstance(x, self.backend.array_types):
                raise TypeError(f"{path} is a {type(x).__name__}; expected an array of {self.backend.name}")
            if (dtype := self.backend.dtype_name(x)) != self.recipe.master_dtype:
                raise ValueError(
                    f"{path} is {dtype}; a recipe of dtype {self.recipe.dtype} trains {self.recipe.master_dtype}"
                )
        return State(0, params, no_moments(params))

    def step(self, state: State, batches: Iterable[np.ndarray]) -> tuple[State, float, float]:
        """Take a step.

        Parameters
        ----------
        state : State
        batches : int arrays [batch, seq + 1]
            Windows of text, as many arrays as the recipe accumulates, of any integer dtype.

        Returns
        -------
        state : State
            After the step. The one that was given is as it was.
        loss : float
            The mean over the batches, before the step.
        norm : float
            The gradient's, before it was clipped.

        Raises
        ------
        ValueError
            If there are more or fewer batches than the recipe accumulates; if a batch has no window, is not of two
            axes, or has an id that is not in the vocabulary, or if its windows are longer than n_ctx + 1.
        TypeError
            If a batch does not hold integers, or state is not a State.
        """
        if not isinstance(state, State):
            raise TypeError(f"state is {shown(state)}; expected the State that `start` or `step` returns")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches is {shown(batches)}; expected arrays of windows, int [batch, seq + 1]")
        device = self.backend.placement(state.params["wte"])
        size = self.backend.part_size(state.params["wte"])
        with self.backend.on(device), _QUIET():
            values, grads = [], None
            for tokens in batches:
                parts = self.backend.from_numpy(_in_parts(self._windows(tokens), size), device=device)
                value, more = self._gradient(state.params, parts)
                values.append(value)
                grads = more if grads is None else self._add(grads, more)
            if len(values) != self.recipe.accumulate:
                raise ValueError(
                    f"{len(values)} batches were given; the recipe's accumulate is {self.recipe.accumulate}"
                )
            now = self.backend.from_numpy(rates(state.step, self.recipe), self.recipe.master_dtype, device)
            params, moments, norm = self._update(state.params, grads, state.moments, now)
            losses = [float(self.backend.to_numpy(value)) for value in values]
            return State(state.step + 1, params, moments), float(np.mean(losses)), float(self.backend.to_numpy(norm))

    def evaluate(self, params: Params, windows: np.ndarray) -> float:
        """Return the mean loss of windows of text, int [n, seq + 1], in nats a token; they are checked as by `step`."""
        windows = self._windows(windows)
        device = self.backend.placement(params["wte"])
        size, losses = self.recipe.batch_size, []
        with self.backend.on(device), _QUIET():
            for i in range(0, len(windows), size):
                batch = windows[i : i + size]
                value = self._loss(params, self.backend.from_numpy(batch, device=device))
                losses.append(len(batch) * float(self.backend.to_numpy(value)))
        return float(np.sum(losses) / len(windows))

    def _windows(self, given: Any) -> np.ndarray:
        tokens = check_ids(given, self.config, axes=2)
        if tokens.shape[1] < 2:
            raise ValueError("a window has one token, and nothing to predict; expected int [batch, seq + 1]")
        check_length(tokens.shape[1] - 1, self.config)
        return tokens

    def _loss_of(self, params: Params, tokens: Any) -> Any:
        return loss(self._computing(params), tokens, self.config)

    def _gradient_of(self, params: Params, parts: Any) -> tuple[Any, Params]:
        """Return the mean loss of windows [parts, batch, seq + 1] and its gradient, one part after the other."""
        backend = self.backend
        n = backend.shape(parts)[0]
        if n == 1:
            return self._gradient_of_part(params, parts[0, ...], 1.0)

        def add(i: Any, total: tuple[Any, Params]) -> tuple[Any, Params]:
            value, grads = self._gradient_of_part(params, parts[i, ...], 1 / n)
            return total[0] + value, map_tree(lambda x, y: x + y, total[1], grads)

        zeros = map_tree(lambda x: backend.zeros(backend.shape(x), like=x), params)
        return backend.fori_loop(n, add, (backend.zeros((), like=params["wte"]), zeros))  # type: ignore[no-any-return]

    def _gradient_of_part(self, params: Params, tokens: Any, share: float) -> tuple[Any, Params]:
        """Return a share of the loss and its gradient: by hand where that is faster, or where the framework has none.

        Compiled as a whole it is: it takes 0.73 of the time of jax.value_and_grad, 0.91 of tf.GradientTape's, before
        attention is cut into thirds. One call after the other it is not: 1.4 times that of PyTorch's autograd.
        """
        by_framework = self.backend.value_and_grad(lambda params: share * self._loss_of(params, tokens))
        by_hand = self.backend.handwritten_gradient_is_faster and self.recipe.dtype == self.recipe.master_dtype
        if by_framework is not NotImplemented and not by_hand:
            found: tuple[Any, Params] = by_framework(params)
            return found
        # 16 bits are storage here: what was rounded to them is computed with in the dtype of the parameters.
        xp, rounded = self.backend.xp, self._computing(params)
        rounded = map_tree(lambda x, p: xp.astype(x, p.dtype, copy=False), rounded, params)
        value, backward = gradients.loss(rounded, tokens, self.config)
        return share * value, backward(share)

    def _computing(self, params: Params) -> Params:
        """Return the parameters in the dtype that the model computes in."""
        if self.recipe.dtype == self.recipe.master_dtype:
            return params
        xp, dtype = self.backend.xp, self.backend.dtype(self.recipe.dtype)
        return map_tree(lambda x: xp.astype(x, dtype), params)


def _in_parts(tokens: np.ndarray, size: int | None) -> np.ndarray:
    """Cut windows [batch, seq + 1] into equal parts, [parts, n, seq + 1], which predict about `size` tokens each.

    Without a size they are one part, and where no number of windows divides the batch well.

    Examples
    --------
    >>> _in_parts(np.zeros((12, 257)), 1024).shape, _in_parts(np.zeros((7, 257)), 1024).shape
    ((3, 4, 257), (1, 7, 257))
    """
    batch, length = tokens.shape
    if size is None:
        return tokens[None]
    divisors = (n for n in range(1, batch + 1) if batch % n == 0)
    return tokens.reshape(-1, min(divisors, key=lambda n: abs(math.log(n * (length - 1) / size))), length)
