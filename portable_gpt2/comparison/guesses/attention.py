"""Guesses about attention. A variant changes the scores, the softmax or the product with v, so it fits three ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np

from ...host import float_dtypes
from ...numerics import bounds
from ...numerics.bounds import Bounded
from ..steps import Alternative, Call, evaluate, judge
from .arithmetic import Computed, computed, exp, tanh, where
from .case import FORMS, Case, Guesses, by, once, rounded, unit


def softmax(s: Computed, axis: int = -1) -> Computed:
    """Return softmax over an axis."""
    e = exp(s - s.max(axis))
    return e / e.sum(axis)


def variant(
    case: Case,
    *,
    scores: Callable[[Computed, np.ndarray], Computed] = lambda s, seen: where(seen, s, -np.inf),
    weights: Callable[[Computed], Computed] = softmax,
    mix: Callable[[Computed, Computed], Computed] = lambda w, v: w @ v,
    whole: bool = False,
) -> Alternative:
    """Return attention with other steps, up to the result of the case.

    Parameters
    ----------
    case : Case
        The scores, the weights or their product with v.
    scores : function
        Returns the scores, given scale q k^T of all queries and keys, and which keys a query sees.
    weights, mix : function
        The softmax, and the product with v.
    whole : bool
        Whether all queries are needed at once.
    """

    def definition(call: Call) -> Bounded:
        q, k = (_in_float32(x) for x in call.inputs[:2])
        given = bounds.attention_scores(q, k, scale=call.options["scale"])
        found = scores(case.given(given.value, given.error), call.options["mask"])
        if call.op != "attention_scores":
            found = weights(found)
        if call.op == "attention":
            found = mix(found, case.given(call.inputs[2]))
        return found.bounded(call.dtype)

    return once(lambda: definition(case.call)) if whole else by(case.call, definition)


def _in_float32(x: np.ndarray) -> np.ndarray:
    """Return an array of 16 bits in float32, because an op rounds its result to 16 bits and not its scores."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def follows(case: Case) -> Guesses:
    """Yield attention from the model's own scores or weights, where these are wrong already."""
    name = case.beside({"attention_weights": "scores", "attention": "weights"}.get(case.step.op, ""))
    own = case.result(name) if name in case.suspects else None
    if own is None:
        return
    own = own.astype(float_dtypes[case.call.dtype], copy=False)
    if case.step.op == "attention":
        yield f"it follows from {name}", averaged(case, own)
    else:
        call = case.call.but(op="softmax", inputs=(own,), options={"mask": None})
        yield f"it follows from {name}", by(call, lambda c: bounds.softmax(*c.inputs, numerics=c.numerics))


def averaged(case: Case, w: np.ndarray) -> Alternative:
    """Return the product of known weights and v."""
    values = case.given(case.call.inputs[2])
    return lambda rows, columns: (case.given(w[..., rows, :]) @ values).bounded(case.call.dtype)


def scale(case: Case) -> Guesses:
    """Yield another scale of the scores."""
    used, c, i = case.call.options["scale"], case.config, case.step.layer
    d = c.head_size
    for cause, value in {
        "the scores are not scaled": 1.0,
        "the scale is not divided by the layer's number": c.attention_scale(0),
        "the scale is divided by the layer's number": d**-0.5 / (i + 1),
        "the scale is divided by the layer's number, counted from 1 too late": d**-0.5 / (i + 2),
        "the scale is divided by the layer's number, counted from 0": d**-0.5 / max(i, 1),
        "the scale is 1/d, not 1/sqrt(d)": 1 / d,
        "the scale is 1/sqrt(d)": d**-0.5,
        "the scale is 1/sqrt(n_embd), not 1/sqrt(d)": c.n_embd**-0.5,
        "the scale is 1/sqrt(n_head), not 1/sqrt(d)": c.n_head**-0.5,
        "the scale is d^(-1/4): it is applied to only one of q and k": d**-0.25,
        "the scale is sqrt(d), not 1/sqrt(d)": d**0.5,
        "the scale is applied twice": used * used,
    }.items():
        if not math.isclose(value, used, rel_tol=1e-6):
            yield cause, case.but(options={"scale": value})


def mask(case: Case) -> Guesses:
    """Yield another mask: one that is known from mistakes, or the one that the model's scores or weights show."""
    n = case.computed.shape[-2]
    right = np.tri(n, dtype=np.bool_)
    found: dict[str, np.ndarray] = {
        "there is no mask": np.ones((n, n), np.bool_),
        "the mask is off by one: a query sees the key after its own": np.tri(n, k=1, dtype=np.bool_),
        "the mask is off by one: a query does not see its own key": np.tri(n, k=-1, dtype=np.bool_),
        "the mask is transposed: a query sees the keys after its own": right.T,
    }
    for name, hidden in (("scores", -np.inf), ("weights", 0.0)):
        shown = case.computed if case.step.name.endswith(name) else case.result(case.beside(name))
        if shown is not None and not np.isnan(shown).any():
            seen: np.ndarray = np.any(shown > hidden, axis=(0, 1))
            if not any(np.array_equal(seen, other) for other in (right, *found.values())):
                found[_described(seen, right)] = seen
            break
    for cause, other in found.items():
        if n > 1:
            yield cause, case.but(options={"mask": other})


def _described(seen: np.ndarray, right: np.ndarray) -> str:
    """Describe another mask."""
    n = len(seen)
    hidden, shown = right & ~seen, seen & ~right
    width = int(seen[-1].sum())
    if np.array_equal(seen, right & ~np.tri(n, k=-width, dtype=np.bool_)):
        return f"a query sees only its own key and the {width - 1} before it"
    for keys, rest, words in (
        (hidden, shown, "no later query sees"),
        (shown, hidden, "every query sees"),
    ):
        at = np.flatnonzero(keys.any(axis=0))
        others = ~np.eye(n, dtype=np.bool_) & (right if keys is hidden else ~right)
        if len(at) and not rest.any() and at[-1] - at[0] + 1 == len(at) and keys[:, at].sum() >= others[:, at].sum():
            first = 0 if keys is shown and at[0] == 1 else at[0]  # every query sees key 0 in any case
            return f"the mask is another one: {words} the keys {first} to {at[-1]}"
    i, j = np.argwhere(hidden | shown)[0]
    verb = "does not see" if hidden[i, j] else "sees"
    more = np.count_nonzero(hidden | shown) - 1
    return f"the mask is another one: query {i} {verb} key {j}, and {more:,} other pairs differ"


def hidden(case: Case) -> Guesses:
    """Yield hidden scores that are a finite number, or to which one is added."""
    n = case.computed.shape[-2]
    visible = np.tri(n, dtype=np.bool_)
    if n < 2:
        return
    values = {-1e4, -1e3, -100.0, -50.0, -30.0, -20.0, -10.0, -5.0, -1.0, 0.0}
    scores = case.computed if case.step.op == "attention_scores" else case.result(case.beside("scores"))
    if scores is not None:
        values |= {float(x) for x in np.unique(scores[..., ~visible])[:4] if np.isfinite(x)}
    for x in sorted(values):
        yield f"hidden scores are {x:g}, not -inf", variant(case, scores=partial(_hidden_as, x=x))
        yield f"{x:g} is added to hidden scores, not -inf", variant(case, scores=partial(_hidden_plus, x=x))


def _hidden_as(s: Computed, seen: np.ndarray, x: float) -> Computed:
    return where(seen, s, x)


def _hidden_plus(s: Computed, seen: np.ndarray, x: float) -> Computed:
    return where(seen, s, s + x)


def _capped(s: Computed, seen: np.ndarray, c: float) -> Computed:
    return where(seen, c * tanh(s / c), -np.inf)


def roles(case: Case) -> Guesses:
    """Yield q, k and v in other roles."""
    n = len(case.call.inputs)
    for p in itertools.product(range(n), repeat=n):
        if p != tuple(range(n)):
            used = ", ".join("qkv"[i] for i in p)
            yield f"its inputs are {used}", case.but(inputs=tuple(case.call.inputs[i] for i in p))


def formulas(case: Case) -> Guesses:
    """Yield other scores and another softmax."""
    n_head, op = case.config.n_head, case.step.op
    for c in (10.0, 15.0, 20.0, 30.0, 50.0):
        yield f"the scores are capped: they are {c:g} tanh(s / {c:g})", variant(case, scores=partial(_capped, c=c))
    slopes = 2.0 ** (-8 * (np.arange(n_head) + 1) / n_head)
    n = case.computed.shape[-2]
    distances = slopes[:, None, None] * (np.arange(n) - np.arange(n)[:, None])
    yield (
        "a multiple of the distance is added to the scores (ALiBi)",
        variant(case, scores=lambda s, seen: where(seen, s + distances, -np.inf), whole=True),
    )
    if op == "attention_scores":
        return
    yield "softmax is over the queries, not over the keys", variant(case, weights=lambda s: softmax(s, -2), whole=True)
    yield "softmax is over the heads, not over the keys", variant(case, weights=lambda s: softmax(s, -3))
    yield (
        "1 is added to the denominator of softmax",
        variant(case, weights=lambda s: exp(s - s.max()) / (exp(s - s.max()).sum() + exp(-s.max()))),
    )
    yield "the exponentials are not divided by their sum", variant(case, weights=lambda s: exp(s - s.max()))
    yield "the exponentials are not divided by their sum", variant(case, weights=exp)
    visible = case.call.options["mask"]
    yield (
        "the weights are masked after the softmax, so that they do not sum to 1",
        variant(case, scores=lambda s, seen: s, weights=lambda s: where(visible, softmax(s), 0.0), whole=True),
    )
    if op == "attention":
        yield "the weights are transposed", variant(case, mix=lambda w, v: w.mT @ v, whole=True)


def inputs_rounded(case: Case) -> Guesses:
    """Yield q, k and v in fewer bits."""
    call = case.call
    for form in FORMS if call.dtype == "float32" else ():
        inputs = tuple(rounded(x, form) for x in call.inputs)
        if call.op != "attention":
            yield f"the factors are rounded to {form}", case.but(inputs=inputs)
            continue
        yield f"the factors are rounded to {form}", _weights_rounded(call.but(inputs=inputs), form)
        yield f"k and v are rounded to {form}, as in a cache", case.but(inputs=(call.inputs[0], *inputs[1:]))


def weights_rounded(case: Case) -> Guesses:
    """Yield attention with rounded weights: its own weights if they are known, or else the exact ones."""
    if case.call.dtype != "float32" or case.step.op != "attention":
        return
    weights = case.result(case.beside("weights"))
    for form in FORMS[:2]:
        if weights is not None:
            yield f"the weights are rounded to {form}", averaged(case, rounded(weights.astype(np.float32), form))
        elif judge(case.call, case.computed, alternative := _weights_rounded(case.call, form)).ratio >= 0.03:
            yield f"the weights are rounded to {form}", alternative


def _weights_rounded(call: Call, form: str) -> Alternative:
    """Return attention whose weights have one more rounding."""
    u = unit(form)

    def definition(call: Call) -> Bounded:
        found = evaluate(call)
        q, k, v = call.inputs
        seen = call.options["mask"]
        seen = seen | ~seen.any(axis=-1, keepdims=True)
        w = bounds.attention_weights(q, k, seen, scale=call.options["scale"], numerics=call.numerics)
        size = abs(bounds.exact(v)).astype(np.float64)
        return Bounded(found.value, found.error + (u * (w.value.astype(np.float64) + w.error) + 2.0**-25) @ size)

    return by(call, definition)


def in_arithmetic(call: Call, u: float) -> Computed:
    """Return the scores, the weights or attention in an arithmetic with the unit round-off u."""
    q, k = (computed(x, u) for x in call.inputs[:2])
    s = where(call.options["mask"], q @ k.mT * call.options["scale"], -np.inf)
    return s if call.op == "attention_scores" else _from_scores(call, s)


def softmax_in_arithmetic(call: Call, u: float) -> Computed:
    """Return the weights or attention with precise scores, and all else with the unit round-off u."""
    q, k = (_in_float32(x) for x in call.inputs[:2])
    scores = bounds.attention_scores(q, k, call.options["mask"], scale=call.options["scale"])
    return _from_scores(call, computed(scores.value, u, scores.error))


def _from_scores(call: Call, s: Computed) -> Computed:
    return softmax(s) if call.op == "attention_weights" else softmax(s) @ computed(call.inputs[2], s.u)


FUNCTIONS = (scale, mask, hidden, roles, formulas, inputs_rounded, weights_rounded)
