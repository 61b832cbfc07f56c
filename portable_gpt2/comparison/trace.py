"""A trace: the results of a model's ops for given tokens, with what is known about the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from ..config import GPT2Config
from ..host import StoredTensor
from ..numerics import Numerics


@dataclass(frozen=True)
class Trace:
    """The results of the ops of a model for given tokens, on the host.

    Parameters
    ----------
    source : str
        What the results come from, such as ``gpt2 on torch, cpu, float32``.
    tokens : int array [1, seq]
        The token ids.
    arrays : dict of float arrays
        Results by the names of `GPT2.trace`, in any order. Names may be missing.
    dtype : str
        The dtype that the ops compute in, such as ``float32``; that of the arrays may be wider.
    config : GPT2Config, optional
        The model's shape and options, if they are known.
    weights : dict of StoredTensor
        The parameters by path, as far as they are known.
    numerics : Numerics
        The errors of exp, tanh and log of the framework that computed the results.
    """

    source: str
    tokens: np.ndarray
    arrays: Mapping[str, np.ndarray]
    dtype: str = "float32"
    config: GPT2Config | None = None
    weights: Mapping[str, StoredTensor] = field(default_factory=lambda: MappingProxyType({}))
    numerics: Numerics = field(default_factory=Numerics)
