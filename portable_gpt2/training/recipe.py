"""Recipe: the numbers that fix a training run, the data and the model aside."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..checks import integer, number, seed

_POSITIVE = ("steps", "batch_size", "accumulate", "eval_every")
_COMPUTE = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW on random windows of text, without dropout.

    Parameters
    ----------
    steps : int
        How many steps there are.
    batch_size : int
        Windows of text that are computed at a time.
    accumulate : int
        Batches whose gradients are averaged into one step.
    context : int, optional
        Tokens that a window reads; the model's n_ctx unless given. Positions behind it are not trained.
    learning_rate : float
        The highest, which warm-up ends at.
    warmup : int
        Steps in which the rate grows to it, in proportion.
    final_rate : float
        The share of it, from 0 to 1, that the cosine ends at.
    weight_decay : float
        Of matrices (w, wte, wpe, lm_head); biases and gains do not decay.
    beta1, beta2 : float
        How much of the running averages of the gradient and of its square a step keeps, from 0 to 1.
    eps : float
        Added to the square root of the latter.
    clip : float, optional
        The greatest norm that a gradient, of all parameters together, may have; None leaves it as it is.
    seed : int
        From 0 to 2^64 - 1: of the windows and of the initial parameters.
    dtype : str
        What the model computes in: ``float32``, ``float64`` or ``bfloat16``. The parameters that are trained are
        float32 at least; of bfloat16, each step computes with a copy.
    eval_every : int
        Steps between evaluations, each of which saves a checkpoint too.

    Raises
    ------
    ValueError
        If a number is not in its range. The message names it.

    Examples
    --------
    >>> from portable_gpt2.training import Recipe
    >>> Recipe(steps=300, learning_rate=6e-4).warmup
    100
    """

    steps: int = 1000
    batch_size: int = 12
    accumulate: int = 1
    context: int | None = None
    learning_rate: float = 1e-3
    warmup: int = 100
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float | None = 1.0
    seed: int = 0
    dtype: str = "float32"
    eval_every: int = 100

    def __post_init__(self) -> None:
        made: dict[str, Any] = {name: integer(name, getattr(self, name), 1) for name in _POSITIVE}
        made["warmup"] = integer("warmup", self.warmup)
        made["seed"] = seed(self.seed)
        made |= {name: number(name, getattr(self, name)) for name in ("learning_rate", "weight_decay", "eps")}
        made["final_rate"] = number("final_rate", self.final_rate, 0, 1)
        made |= {name: number(name, getattr(self, name), 0, 1, below=True) for name in ("beta1", "beta2")}
        if self.context is not None:
            made["context"] = integer("context", self.context, 1, note="or None")
        if self.clip is not None:
            made["clip"] = number("clip", self.clip, above=True, note="or None")
        if self.dtype not in _COMPUTE:
            raise ValueError(
                f"dtype is {self.dtype!r}; choose one of {', '.join(_COMPUTE)} (the gradients of float16 would vanish)"
            )
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def master_dtype(self) -> str:
        """The dtype of the parameters that are trained."""
        return "float64" if self.dtype == "float64" else "float32"

    def to_dict(self) -> dict[str, Any]:
        """Return its numbers by name."""
        return dataclasses.asdict(self)
