"""The guess that an op computes in 16 bits: its own formula, in an arithmetic with larger rounding errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...numerics import bounds
from ...numerics.bounds import FORMATS, Bounded
from ..steps import Alternative, Call, errors, within
from . import activations, attention, layer_norms, products
from .arithmetic import Computed
from .case import Case, Guesses, by, rounded

_FORMULAS: dict[str, tuple[Callable[[Call, float], Computed], ...]] = {
    "layer_norm": (layer_norms.in_arithmetic,),
    "conv1d": (products.in_arithmetic,),
    "unembed": (products.in_arithmetic,),
    "attention_scores": (attention.in_arithmetic,),
    "attention_weights": (attention.softmax_in_arithmetic, attention.in_arithmetic),
    "attention": (attention.softmax_in_arithmetic, attention.in_arithmetic),
    "gelu": (activations.in_arithmetic,),
}


def in_16_bits(case: Case) -> Guesses:
    """Yield the op with 16-bit arithmetic in each of its steps, if this explains the size of the errors."""
    form = _form(case)
    if form is None:
        return
    for formula in _FORMULAS.get(case.step.op, ()):

        def definition(call: Call, formula: Callable[[Call, float], Computed] = formula, form: str = form) -> Bounded:
            return formula(call, FORMATS[form].unit).bounded(form)

        alternative = by(case.call, definition)
        if _is_informative(alternative(case.last_rows[-1:], case.columns)) and _is_spread(case, alternative):
            yield f"its errors are those of {form} arithmetic", alternative


def _is_informative(expected: Bounded) -> bool:
    """Return whether half of the bounds are below 30% of the size of the result."""
    usual = np.isfinite(expected.value) & np.isfinite(expected.error)
    value, error = expected.value[usual], expected.error[usual]
    return bool(usual.any() and np.median(error) <= 0.3 * np.sqrt((value**2).mean()))


def _form(case: Case) -> str | None:
    """Return the 16-bit format that the result is stored in, or that it was stored in before a bias was added."""
    if case.call.dtype != "float32":
        return case.call.dtype if case.call.dtype != "float64" else None
    bias = case.call.params.get("b", np.zeros(1)).astype(np.float64)
    wide = case.computed.astype(np.float64)
    for y, permitted in ((wide, 0.0), (wide - bias, case.u * (abs(wide - bias) + abs(bias)))):
        for form in ("bfloat16", "float16"):
            if (abs(rounded(y, form) - y) <= permitted).all():
                return form
    return None


def _is_spread(case: Case, alternative: Alternative) -> bool:
    """Return whether half of the errors reach 0.3% of their bounds.

    In a model of 16 bits, whose results always have the form of 16 bits, they must not be proportional to the result.
    """
    expected = alternative(case.last_rows, case.columns)
    part = within(case.computed, case.last_rows, case.columns)
    ratios = bounds.quotient(errors(part, expected), expected.error)
    usual = np.isfinite(part) & np.isfinite(expected.value) & (expected.error > 0)
    value = expected.value[usual]
    error = part[usual].astype(np.float64) - value
    is_proportional = abs(error @ value) > 0.5 * np.sqrt((error @ error) * (value @ value))
    is_known = case.call.dtype == "float32"
    return bool(usual.any() and np.median(ratios[usual]) >= 0.003 and (is_known or not is_proportional))
