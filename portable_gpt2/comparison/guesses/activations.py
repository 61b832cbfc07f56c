"""Guesses about the activation function."""

from __future__ import annotations

import math

from ..steps import Call
from .arithmetic import Computed, clip, computed, erf, exp, log, tanh, where
from .case import Case, Guesses


def gelu(x: Computed, slope: float = math.sqrt(2 / math.pi), cubic: float = 0.044715) -> Computed:
    """Return GELU in the tanh form."""
    return x / 2 * (1 + tanh(slope * (x + cubic * x * x * x)))


def softplus(x: Computed) -> Computed:
    """Return log(1 + exp(x))."""
    return where(x.value > 20, x, log(1 + exp(clip(x, -math.inf, 20))))


OTHERS = {
    "GELU is the erf form, not the tanh form": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    "GELU is x sigmoid(1.702 x)": lambda x: x / (1 + exp(-1.702 * x)),
    "the activation is ReLU": lambda x: clip(x, 0, math.inf),
    "the activation is the square of ReLU": lambda x: clip(x, 0, math.inf) * clip(x, 0, math.inf),
    "the activation is SiLU": lambda x: x / (1 + exp(-x)),
    "the activation is tanh": tanh,
    "the activation is the sigmoid": lambda x: 1 / (1 + exp(-x)),
    "the activation is leaky ReLU with the slope 0.01": lambda x: where(x.value < 0, 0.01 * x, x),
    "the activation is ELU": lambda x: where(x.value < 0, exp(clip(x, -math.inf, 0)) - 1, x),
    "the activation is softplus": softplus,
    "the activation is Mish": lambda x: x * tanh(softplus(x)),
    "the activation is hard swish": lambda x: x * clip(x + 3, 0, 6) / 6,
    "GELU is applied twice": lambda x: gelu(gelu(x)),
    "the cubic term is missing": lambda x: gelu(x, cubic=0),
    "the cubic term is a square": lambda x: x / 2 * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x))),
    "the factor sqrt(2/pi) is missing": lambda x: gelu(x, slope=1),
    "the factor is sqrt(pi/2), not sqrt(2/pi)": lambda x: gelu(x, slope=math.sqrt(math.pi / 2)),
}
_SLOPES = (0.8, 0.798, 0.7979, 0.79788)
_CUBICS = (0.0447, 0.04472, 0.044, 0.045, 0.0044715, 0.44715, 0.47715)


def activation(case: Case) -> Guesses:
    """Yield another activation function, or other constants."""
    for cause, f in OTHERS.items():
        yield cause, case.formula(f)
    for slope in _SLOPES:
        yield f"the factor is {slope:g}, not sqrt(2/pi)", case.formula(lambda x, slope=slope: gelu(x, slope=slope))
    for cubic in _CUBICS:
        yield (
            f"the cubic term has the factor {cubic:g}, not 0.044715",
            case.formula(lambda x, cubic=cubic: gelu(x, cubic=cubic)),
        )


def in_arithmetic(call: Call, u: float) -> Computed:
    """Return GELU in an arithmetic with the unit round-off u."""
    return gelu(computed(call.inputs[0], u))


FUNCTIONS = (activation,)
