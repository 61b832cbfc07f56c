"""What a comparison finds: differences of weights, ops beyond their bounds, and the growth of the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class WeightFinding(NamedTuple):
    """A tensor that differs.

    Parameters
    ----------
    path : str
        The parameter, such as ``h0/attn/c_attn/w``.
    kind : str
        The kind of difference in a few words, such as ``transposed`` or ``rounded through bfloat16``.
    largest : float
        The largest difference of two elements; NaN if the shapes differ.
    """

    path: str
    kind: str
    largest: float


class OpFinding(NamedTuple):
    """The judgement on one result: whether it was computed from its inputs within the bound of the op.

    Parameters
    ----------
    name : str
        The result, such as ``h3/ln_1``.
    op : str
        The operation that computes it, such as ``layer_norm``.
    ratio : float
        The largest ratio of the error to the bound; above 1, the op is not the one that GPT-2 defines.
    element : tuple of int
        The index of the element with this ratio.
    computed, exact, permitted : float
        This element, its exact value for the inputs in the trace, and the largest error that is permitted.
    guess : str
        A definition that explains the result within its bound, such as ``eps is 1e-3``; empty if none was found, or
        none is needed.
    """

    name: str
    op: str
    ratio: float
    element: tuple[int, ...]
    computed: float
    exact: float
    permitted: float
    guess: str = ""


class Growth(NamedTuple):
    """How far two traces are apart at one result.

    Parameters
    ----------
    name : str
        The result, such as ``h3/residual``.
    difference : float
        The largest absolute difference.
    rounding : float
        The largest absolute difference that rounding can be expected to cause.
    """

    name: str
    difference: float
    rounding: float


class LogitsFinding(NamedTuple):
    """How the logits differ.

    Parameters
    ----------
    largest : float
        The largest absolute difference.
    divergence : float
        The largest Kullback-Leibler divergence of the next token's distribution over the positions, in nats.
    first : int or None
        The first position at which the most likely next token differs.
    """

    largest: float
    divergence: float
    first: int | None


@dataclass(frozen=True)
class Comparison:
    """What a comparison of two models found.

    Parameters
    ----------
    a, b : str
        The two sides. The first is the reference, and the second is judged.
    tokens : list of int
        The token ids that both read.
    verdict : str
        One sentence: where the models part, or that rounding explains the difference.
    equal : bool
        Whether no difference was found that rounding does not explain.
    weights : list of WeightFinding or None
        The tensors that differ; None if the weights of one side are not known.
    ops : list of OpFinding
        The results of b that were judged, in the order of computation.
    growth : list of Growth
        The results that both have, in the order of computation.
    logits : LogitsFinding or None
        None if one side has no logits.
    missing : list of str
        The results that could not be judged, because the trace of b lacks them or one of their inputs.
    """

    a: str
    b: str
    tokens: list[int]
    verdict: str
    equal: bool
    weights: list[WeightFinding] | None
    ops: list[OpFinding]
    growth: list[Growth]
    logits: LogitsFinding | None
    missing: list[str]

    @property
    def culprit(self) -> OpFinding | None:
        """The first result beyond its bound."""
        return next((found for found in self.ops if not found.ratio <= 1), None)

    def as_json(self) -> dict[str, Any]:
        """Return the findings as dicts, lists, strings and numbers."""
        raise NotImplementedError
