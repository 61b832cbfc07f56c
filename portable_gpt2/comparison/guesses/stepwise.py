"""Guesses about 16-bit roundings within GELU and attention, which programs without a kernel have after each operation.

The results are enclosed by intervals. A rounding to 16 bits is exact, and an elementary function before it may have the
error that a framework states for float32. So an interval has one number, except where that error decides a rounding.
With these definitions, the guesses explain results of transformers and KerasHub in bfloat16 to the last bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from ...host import float_dtypes
from ...numerics import bounds
from ...numerics.bounds import FORMATS, Bounded
from ..steps import Call
from .case import Case, Guesses, by

_U = FORMATS["float32"].unit


class Interval(NamedTuple):
    """Lower and upper bounds of the elements of an array, in float64."""

    low: np.ndarray
    high: np.ndarray

    def plus(self, x: np.ndarray | float) -> Interval:
        """Return the sum with numbers."""
        return Interval(self.low + x, self.high + x)

    def times(self, x: np.ndarray | float) -> Interval:
        """Return the product with numbers."""
        a, b = self.low * x, self.high * x
        return Interval(np.minimum(a, b), np.maximum(a, b))

    def wider(self, relative: np.ndarray | float) -> Interval:
        """Return the interval after an error that is relative to the result."""
        return Interval(self.low - relative * abs(self.low), self.high + relative * abs(self.high))

    def rounded(self, form: str) -> Interval:
        """Return the interval of the numbers after they were rounded to 16 bits."""
        return Interval(*(_rounded(x, form) for x in self))

    def bounded(self, form: str) -> Bounded:
        """Return the middle and half of the width, to which the error of a flushed subnormal number is added."""
        flushed = FORMATS["bfloat16"].smallest if form == "bfloat16" else 2.0**-24
        return Bounded((self.low + self.high) / 2, (self.high - self.low) / 2 + flushed)


def _point(x: np.ndarray) -> Interval:
    return Interval(x, x)


def _rounded(x: np.ndarray | float, form: str) -> np.ndarray:
    return np.asarray(x, np.float32).astype(float_dtypes[form]).astype(np.float64)


def gelu(call: Call, form: str, *, cubes_at_once: bool, rounds_constants: bool) -> Bounded:
    """Return x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) with a rounding after each of its operations.

    Parameters
    ----------
    call : Call
        The call of gelu.
    form : str
        ``bfloat16`` or ``float16``.
    cubes_at_once : bool
        Whether x^3 is rounded once, as by a function for powers, or x x is rounded before it is multiplied by x.
    rounds_constants : bool
        Whether sqrt(2/pi) and 0.044715 are rounded, too.
    """
    x = call.inputs[0].astype(np.float64)
    root, factor = math.sqrt(2 / math.pi), 0.044715
    if rounds_constants:
        root, factor = (float(_rounded(c, form)) for c in (root, factor))
    if cubes_at_once:
        cube = _point(x**3).wider(4 * _U).rounded(form)
    else:
        cube = _point(_rounded(x * x, form) * x).rounded(form)
    z = cube.times(factor).rounded(form).plus(x).rounded(form).times(root).rounded(form)
    t = Interval(np.tanh(z.low), np.tanh(z.high)).wider(call.numerics.tanh * _U).rounded(form)
    return t.plus(1).rounded(form).times(_rounded(x / 2, form)).rounded(form).bounded(form)


class Scores(NamedTuple):
    """Where scores are rounded to 16 bits.

    Parameters
    ----------
    scales_q : bool
        Whether q is multiplied by the scale, and rounded, before it is multiplied by k.
    before, after : bool
        Whether the scores are rounded before and after they are multiplied by the scale.
    rounds_scale : bool
        Whether the scale is rounded, too.
    """

    scales_q: bool = False
    before: bool = False
    after: bool = False
    rounds_scale: bool = False


def attention(call: Call, form: str, rounding: Scores, *, rounds_softmax: bool) -> Bounded:
    """Return scores, attention weights or attention from scores that are rounded to 16 bits.

    Parameters
    ----------
    call : Call
        The call of attention_scores, attention_weights or attention.
    form : str
        ``bfloat16`` or ``float16``.
    rounding : Scores
        Where the scores are rounded.
    rounds_softmax : bool
        Whether the difference to the maximum, its exponential and the sum are rounded, too.
    """
    seen = call.options["mask"]
    scores = _scores(call, form, rounding)
    scores = Interval(*(np.where(seen, x, -np.inf) for x in scores))
    if call.op == "attention_scores":
        stored = scores.rounded(form)
        found = Interval(*(np.where(seen, x, 0) for x in stored)).bounded(form)
        return Bounded(np.where(seen, found.value, -np.inf), np.where(seen, found.error, 0))
    weights = _softmax(scores, call, form if rounds_softmax else "")
    if call.op == "attention_weights":
        found = (weights.rounded(form) if call.dtype == form else weights).bounded(form)
        return Bounded(found.value, np.where(seen, found.error, 0))
    # A softmax in 16 bits rounds its result, and attention in 16 bits may round it.
    w, error = (weights.rounded(form) if rounds_softmax else weights).bounded(form)
    unit = FORMATS[form].unit if call.dtype == form and not rounds_softmax else 0.0
    v, n = call.inputs[2].astype(np.float64), seen.shape[-1]
    error = (error + unit * w) @ abs(v) + bounds.gamma(n + 1, _U) * (w @ abs(v))
    return bounds.stored(w @ v, error, call.dtype)


def _scores(call: Call, form: str, rounding: Scores) -> Interval:
    q, k = (x.astype(np.float32) for x in call.inputs[:2])
    scale = float(_rounded(call.options["scale"], form)) if rounding.rounds_scale else call.options["scale"]
    if rounding.scales_q:
        q = _rounded(q * np.float32(scale), form).astype(np.float32)
        scale = 1.0
    exact = bounds.attention_scores(q, k, scale=1.0)
    found = Interval(exact.value - exact.error, exact.value + exact.error)
    found = (found.rounded(form) if rounding.before else found).times(scale).wider(2 * _U)
    return found.rounded(form) if rounding.after else found


def _softmax(scores: Interval, call: Call, form: str) -> Interval:
    """Return the softmax of scores, with roundings to 16 bits in between unless the form is empty."""

    def step(x: Interval) -> Interval:
        return x.rounded(form) if form else x

    c0, c1 = call.numerics.exp
    largest = Interval(*(x.max(axis=-1, keepdims=True) for x in scores))
    d = step(Interval(scores.low - largest.high, scores.high - largest.low))
    relative = _U * ((1 + c1) * np.where(np.isfinite(d.low), abs(d.low), 0) + c0 + 1)
    e = step(Interval(np.exp(d.low), np.exp(d.high)).wider(relative))
    n = scores.low.shape[-1]
    total = step(Interval(*(x.sum(axis=-1, keepdims=True) for x in e)).wider(n * _U))
    return Interval(e.low / total.high, e.high / total.low).wider(2 * _U)


# Guesses

_OF_SCORES = {
    "the scores are rounded to {} before the scale": (Scores(before=True),),
    "the scores are rounded to {} before and after the scale": (Scores(before=True, after=True),),
    "the scaled scores are rounded to {}": (Scores(after=True),),
    "the scaled q and the scores are rounded to {}": (
        Scores(scales_q=True, before=True),
        Scores(scales_q=True, before=True, rounds_scale=True),
    ),
}
_FORMS = ("bfloat16", "float16")


def scores_rounded(case: Case) -> Guesses:
    """Yield scores that are rounded to 16 bits, and a softmax of which each step is rounded."""
    op = case.step.op
    if op == "attention" and case.beside("weights") in case.suspects:
        return  # attention follows from the weights, whose guess is this one
    for form in _FORMS if case.call.dtype == "float32" else (case.call.dtype,):
        for (cause, places), rounds_softmax in itertools.product(_OF_SCORES.items(), (False, True)):
            for rounding in places if form in _FORMS and not (rounds_softmax and op == "attention_scores") else ():
                steps = ", and so is each step of softmax" if rounds_softmax else ""
                definition = functools.partial(attention, form=form, rounding=rounding, rounds_softmax=rounds_softmax)
                yield cause.format(form) + steps, by(case.call, definition)


def gelu_rounded(case: Case) -> Guesses:
    """Yield GELU of which each elementary step is rounded to 16 bits, in the forms that frameworks have."""
    for form in _FORMS if case.call.dtype == "float32" else (case.call.dtype,):
        for cubes_at_once, rounds_constants in itertools.product((False, True), repeat=2) if form in _FORMS else ():
            definition = functools.partial(
                gelu, form=form, cubes_at_once=cubes_at_once, rounds_constants=rounds_constants
            )
            yield f"each elementary step of GELU is rounded to {form}", by(case.call, definition)
