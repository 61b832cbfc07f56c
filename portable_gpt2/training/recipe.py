"""Recipe: the options of a training run, apart from the data and the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import flag, integer, number, seed, shown
from ..options import documented, option, validate

_DTYPES = ("float32", "float64", "bfloat16")

_NAMES_IN_FILES = {
    "gradient_accumulation_steps": "accumulate",
    "min_lr_ratio": "final_rate",
    "max_grad_norm": "clip",
}
"""The options whose names in the files of a run differ from the names of the fields."""


def _dtype(name: str, x: Any) -> str:
    if isinstance(x, str) and x in _DTYPES:
        return x
    raise ValueError(
        f"{name} is {shown(x)}; choose one of {', '.join(_DTYPES)} (in float16 the gradients would underflow)"
    )


@documented
@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW on random windows of text, without dropout.

    Parameters
    ----------
    {options}

    Raises
    ------
    ValueError
        If an option is not valid. The message names the option, the value and the values that are expected.

    Examples
    --------
    >>> from portable_gpt2.training import Recipe
    >>> Recipe(steps=300, learning_rate=6e-4).warmup
    100
    """

    steps: int = option(1000, "number of training steps", integer, low=1)
    batch_size: int = option(12, "number of windows of text in a batch", integer, low=1)
    gradient_accumulation_steps: int = option(
        1, "number of batches whose gradients are averaged for one training step", integer, low=1
    )
    context: int | None = option(
        None,
        "number of tokens that the model reads in a window of text; later positions are not trained",
        integer,
        low=1,
        note="or None",
        default_text="the model's n_ctx",
    )
    learning_rate: float = option(1e-3, "largest learning rate, which is reached at the end of the warm-up", number)
    warmup: int = option(100, "number of steps in which the learning rate rises linearly to the largest", integer)
    min_lr_ratio: float = option(
        0.1,
        "learning rate at the end of training, as a fraction of the largest; after the warm-up the learning rate falls "
        "along a cosine",
        number,
        high=1,
    )
    weight_decay: float = option(
        0.1, "weight decay of the matrices; biases and the gains of layer_norm do not decay", number
    )
    beta1: float = option(
        0.9, "decay rate of the moving average of the gradient, from 0 to below 1", number, high=1, below=True
    )
    beta2: float = option(
        0.99, "decay rate of the moving average of the squared gradient, from 0 to below 1", number, high=1, below=True
    )
    eps: float = option(1e-8, "number that is added to the denominator of Adam's update", number)
    max_grad_norm: float | None = option(
        1.0,
        "largest norm that the gradient of all parameters together may have; a gradient with a larger norm is scaled "
        "down to it",
        number,
        above=True,
        note="or None",
    )
    seed: int = option(0, "seed of the initial weights and of the choice of windows, from 0 to 2^64 - 1", seed)
    dtype: str = option(
        "float32",
        "dtype that the model computes in: float32, float64 or bfloat16; with bfloat16, the trained parameters are "
        "float32 and each step computes with a copy of them",
        _dtype,
    )
    eval_every: int = option(
        100,
        "number of steps between two evaluations on the held-out text, each of which also saves a checkpoint",
        integer,
        low=1,
    )

    reproducible: bool = option(
        False,
        "round every operation of a step correctly, so that training has the same bits on every backend, device and "
        "processor; a step then takes about 10 times as long",
        flag,
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.reproducible and self.dtype != "float32":
            raise ValueError(f"dtype is {self.dtype}; reproducible training is in float32")

    @property
    def master_dtype(self) -> str:
        """The dtype of the trained parameters."""
        return "float64" if self.dtype == "float64" else "float32"

    @staticmethod
    def names_in_files() -> dict[str, str]:
        """Return the name of each field, by its name in the files of a run."""
        return {_NAMES_IN_FILES.get(field.name, field.name): field.name for field in dataclasses.fields(Recipe)}

    def to_dict(self) -> dict[str, Any]:
        """Return the values by their names in the files of a run. Older files have no entry ``reproducible``."""
        entries = {stored: getattr(self, name) for stored, name in self.names_in_files().items()}
        if not self.reproducible:
            del entries["reproducible"]
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` of another recipe describes."""
        names = cls.names_in_files()
        return cls(**{names[stored]: value for stored, value in entries.items() if stored in names})
