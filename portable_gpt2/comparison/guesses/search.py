"""The search for a definition that explains a result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...numerics import bounds
from ..steps import Alternative, errors, evaluate, judge, within
from . import activations, attention, everywhere, layer_norms, precision, products, stepwise
from .case import Case, Function

_OF_OP: dict[str, tuple[Function, ...]] = {
    "embedding": products.OF_EMBEDDING,
    "layer_norm": layer_norms.FUNCTIONS,
    "conv1d": products.OF_CONV1D,
    "split": products.OF_SPLIT,
    **dict.fromkeys(
        ("attention_scores", "attention_weights", "attention"), (*attention.FUNCTIONS, stepwise.scores_rounded)
    ),
    "add": products.OF_ADD,
    "gelu": (*activations.FUNCTIONS, stepwise.gelu_rounded),
    "unembed": products.OF_UNEMBED,
}
GUESSES = {op: (*functions, *everywhere.FUNCTIONS) for op, functions in _OF_OP.items()}
"""For each op, functions that yield other definitions, the likely ones first."""

_LAST: dict[str, tuple[Function, ...]] = {
    "embedding": (products.sums_scaled,),
    "add": (products.sums_scaled,),
    "conv1d": (products.weight_scaled,),
    "layer_norm": (layer_norms.one_pass,),
}
LAST_GUESSES: dict[str, tuple[Function, ...]] = {
    op: (*_LAST.get(op, ()), *everywhere.LAST, precision.in_16_bits) for op in GUESSES
}
"""For each op, functions whose definitions have a free parameter, or describe an error only by its size. Each is tried
if no function before it explains the result."""

BY_SIZE = (everywhere.result_rounded, attention.weights_rounded, layer_norms.one_pass, precision.in_16_bits)
"""Functions that yield the same exact result with a larger bound. All others must have smaller errors.

The error must be at most half at the worst element and in its row, or a quarter in total, because a single element may
lie near the middle of two 16-bit numbers.
"""


def explain(case: Case, first: Sequence[Function] = (), *, only_first: bool = False) -> tuple[str, list[Function]]:
    """Return the definitions that explain a result that is beyond its bound.

    Parameters
    ----------
    case : Case
        The result.
    first : functions
        The functions that explained the same op in another layer. If one of them explains this result too, no others
        are tried.
    only_first : bool
        Whether no others are tried in any case.

    Returns
    -------
    cause : str
        One or two causes, joined by "or". If no guess explains the result, where it is wrong: at one head, say. The
        text is empty if it is wrong in many places.
    functions : list of functions
        The functions that yielded the causes.
    """
    rows, columns = _slice(case)
    part = within(case.computed, rows, columns)
    place = (*case.worst[:-2], rows.tolist().index(case.worst[-2]), columns.tolist().index(case.worst[-1]))

    def size(error: np.ndarray) -> float:
        """Return the norm of the errors in the row of the worst element, which in 16 bits tells nothing."""
        return float(np.linalg.norm(error[place[:-1]])) if case.call.dtype in ("float32", "float64") else 0.0

    def accepts(alternative: Alternative, function: Function) -> bool:
        """Return whether an alternative explains a part of the result, then the worst element, then all of it."""
        expected = alternative(rows, columns)
        error = errors(part, expected)
        is_half = error[place] <= usual[place] / 2 and size(error) <= size(usual) / 2
        is_better = is_half or error.sum() <= usual.sum() / 4 < math.inf
        is_judged = np.isfinite(expected.error).mean() >= 0.25  # a NaN of another definition permits any number
        return bool(
            is_judged
            and bounds.quotient(error, expected.error).max() <= 1
            and (function in BY_SIZE or is_better)
            and judge(case.call, case.computed, alternative).ratio <= 1
        )

    with np.errstate(all="ignore"):
        usual = errors(part, evaluate(case.call.at(rows, columns)))
        functions, last = GUESSES[case.step.op], LAST_GUESSES[case.step.op]
        known = [f for f in (*functions, *last) if f in first]
        others = [f for f in functions if f not in known]
        groups: list[Sequence[Function]] = [known, [attention.follows], others]
        groups += [[f] for f in last]
        for group in groups[:1] if only_first else groups:
            accepted = [
                (cause, function)
                for function in group
                for cause, alternative in function(case)
                if accepts(alternative, function)
            ]
            if accepted:
                causes = dict(accepted[:2])
                return " or ".join(causes), list(causes.values())
        return "" if only_first else everywhere.place(case), []


def _slice(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return a few positions and columns, on which a guess is tried first: those of the worst element, and others."""
    seq, width = case.computed.shape[-2:]
    rows = np.unique([case.worst[-2], seq - 1, seq // 2])
    columns = np.arange(width)
    if case.step.op in ("conv1d", "unembed") and width > 64:
        columns = np.unique([case.worst[-1], *np.linspace(0, width - 1, 48).astype(int)])
    return rows, columns
