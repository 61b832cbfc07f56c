"""Guesses about layer_norm."""

from __future__ import annotations

import itertools

import numpy as np

from ..steps import Call
from .arithmetic import Computed, computed, sqrt
from .case import FORMS, Case, Guesses, rounded


def normalised(
    x: Computed, *, eps: float = 0.0, outside: float = 0.0, ddof: int = 0, axis: int = -1, centred: bool = True
) -> Computed:
    """Return x, or x minus its mean, divided by a standard deviation with n - ddof in its denominator."""
    d = x - x.mean(axis) if centred else x
    variance = (d * d).sum(axis) / (x.value.shape[axis] - ddof)
    return d / (sqrt(variance + eps) + outside if outside else sqrt(variance + eps))


def eps(case: Case) -> Guesses:
    """Yield another eps."""
    used = case.call.options["eps"]
    for value in (1e-3, 1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-7, 0.0):
        if value != used:
            yield f"eps is {value:g}, not {used:g}", case.but(options={"eps": value})


def forms(case: Case) -> Guesses:
    """Yield other formulas."""
    eps, n = case.call.options["eps"], case.computed.shape[-1]
    for cause, f in {
        "the mean is not subtracted": lambda x, g, b: normalised(x, eps=eps, centred=False) * g + b,
        "neither the mean is subtracted nor the bias added, as in RMSNorm": (
            lambda x, g, b: normalised(x, eps=eps, centred=False) * g
        ),
        "it is not divided by the standard deviation": lambda x, g, b: (x - x.mean()) * g + b,
        "it is applied twice": lambda x, g, b: normalised(normalised(x, eps=eps) * g + b, eps=eps) * g + b,
    }.items():
        yield cause, case.formula(f)
    yield (
        "it normalises over the positions, not over the channels",
        case.formula(lambda x, g, b: normalised(x, eps=eps, axis=-2) * g + b, whole=True),
    )
    if n > 1:
        yield "the variance is divided by n - 1", case.formula(lambda x, g, b: normalised(x, eps=eps, ddof=1) * g + b)
    for value, ddof in itertools.product(dict.fromkeys((eps, 1e-6, 1e-5)), range(min(n, 2))):
        yield (
            f"eps = {value:g} is added to the standard deviation{' of n - 1' * ddof}, not to the variance",
            case.formula(lambda x, g, b, eps=value, ddof=ddof: normalised(x, outside=eps, ddof=ddof) * g + b),
        )


def one_pass(case: Case) -> Guesses:
    """Yield a variance that is computed as a difference of larger numbers."""
    eps, x = case.call.options["eps"], case.call.inputs[0][0, case.worst[-2]].astype(np.float64)
    if x.mean() ** 2 < x.var():
        return

    def formula(x: Computed, g: Computed, b: Computed) -> Computed:
        variance = (x * x).mean() - x.mean() * x.mean()
        return (x - x.mean()) / sqrt(variance + eps) * g + b

    yield "the variance is computed as mean(x^2) - mean(x)^2, which cancels", case.formula(formula)


def gain_and_bias(case: Case) -> Guesses:
    """Yield a gain or a bias that is missing, exchanged or rounded, or a gain that is stored as its difference to 1."""
    g, b = case.call.params["g"], case.call.params["b"]
    one, zero = np.ones_like(g), np.zeros_like(b)
    for cause, params in {
        "the gain is missing": {"g": one},
        "the bias is missing": {"b": zero},
        "gain and bias are missing": {"g": one, "b": zero},
        "gain and bias are exchanged": {"g": b, "b": g},
        "the gain is 1 + g": {"g": (1 + g.astype(np.float64)).astype(g.dtype)},
    }.items():
        yield cause, case.but(params=params)
    for form in FORMS:
        yield f"its parameters are rounded to {form}", case.but(params={"g": rounded(g, form), "b": rounded(b, form)})


def in_arithmetic(call: Call, u: float) -> Computed:
    """Return layer_norm in an arithmetic with the unit round-off u."""
    x, g, b = (computed(each, u) for each in (*call.inputs, call.params["g"], call.params["b"]))
    return normalised(x, eps=call.options["eps"]) * g + b


FUNCTIONS = (eps, forms, gain_and_bias)
