"""What a comparison finds: differences of weights, ops beyond their bounds, and the growth of the difference."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..strict_json import finite


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
    judged, elements : int
        The number of elements that were judged, and of all elements. In float64 a selection is judged. An element is
        not judged if there is no bound for it, because an input is not finite or a sum may overflow.
    """

    name: str
    op: str
    ratio: float
    element: tuple[int, ...]
    computed: float
    exact: float
    permitted: float
    guess: str = ""
    judged: int = 0
    elements: int = 0

    @property
    def within(self) -> bool:
        """Whether the error is within its bound. A ratio of NaN is not."""
        return bool(self.ratio <= 1)


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

    Two models may have vocabularies of different sizes: nanoGPT pads 50,257 rows to 50,304. Then differences and
    divergences are those of the token ids that both have, and the most likely next token is one of all ids of its side.

    Parameters
    ----------
    largest : float
        The largest absolute difference.
    divergence : float
        The largest Kullback-Leibler divergence of the next token's distribution over the positions, in nats. If the
        vocabularies differ, it is that of the distributions under the condition that both models have the next token:
        the softmax of the logits that both have.
    first : int or None
        The first position at which the most likely next token differs.
    greedy : pair of int, optional
        The most likely next tokens of a and of b at this position.
    common : int, optional
        The number of token ids that both have, from 0 on, if the vocabularies differ.
    outside : int
        The number of positions at which the most likely next token of one side is an id that the other does not have.
    """

    largest: float
    divergence: float
    first: int | None
    greedy: tuple[int, int] | None = None
    common: int | None = None
    outside: int = 0


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
        A sentence: where the models part, or that rounding explains the difference.
    equal : bool
        Whether rounding explains all differences, as far as is known. This is false if the vocabularies differ in size,
        and if it is not known whether rounding explains a difference.
    weights : list of WeightFinding or None
        The tensors that differ; None if the weights of one side are not known.
    ops : list of OpFinding
        The results of b that were judged, in the order of computation.
    growth : list of Growth
        The results that both have, in the order of computation.
    logits : LogitsFinding or None
        None if one side has no logits.
    missing : list of str
        The results that could not be judged: the trace of b lacks them or one of their inputs, their weights are not
        known, or no element has a bound.
    notes : list of str
        Sentences that say what the comparison does not cover, or what was assumed.
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
    notes: list[str] = field(default_factory=list)

    @property
    def culprit(self) -> OpFinding | None:
        """The first result beyond its bound."""
        return next((found for found in self.ops if not found.within), None)

    def as_json(self) -> dict[str, Any]:
        """Return the findings as dicts, lists, strings and numbers.

        The keys are the fields. ``culprit`` is added, the name of the first result beyond its bound or None, and
        ``within`` for each op. A number that is NaN or infinite is None, because JSON has neither.

        Returns
        -------
        dict

        Examples
        --------
        >>> from portable_gpt2.comparison.findings import Comparison, OpFinding
        >>> op = OpFinding("h0/ln_1", "layer_norm", float("inf"), (0, 1, 2), 0.5, 0.25, 0.0)
        >>> found = Comparison("a", "b", [1, 2], "h0/ln_1 is wrong.", False, None, [op], [], None, []).as_json()
        >>> found["culprit"], found["ops"][0]["ratio"], found["ops"][0]["within"]
        ('h0/ln_1', None, False)
        """
        found: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        found["weights"] = None if self.weights is None else [each._asdict() for each in self.weights]
        found["ops"] = [each._asdict() | {"within": each.within} for each in self.ops]
        found["growth"] = [each._asdict() for each in self.growth]
        found["logits"] = None if self.logits is None else self.logits._asdict()
        found["culprit"] = None if self.culprit is None else self.culprit.name
        json: dict[str, Any] = finite(found)
        return json

    def __str__(self) -> str:
        from .report import report

        return report(self)
