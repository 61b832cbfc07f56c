"""Guesses at the cause of a wrong result: other definitions of an op, as tables.

A guess is accepted only if the other definition explains every element of the result within its own bound. So a guess
is never a mere resemblance. Two definitions that rounding cannot tell apart, such as eps = 1e-6 and eps = 1e-12 for a
large variance, are both named.

Each function of `GUESSES` yields pairs of a cause and an `Alternative`. Those of `LAST_GUESSES` permit more than one
definition, because they have a free parameter or describe an error only by its size. They are tried if no other guess
explains the result.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..config import GPT2Config
from ..host import StoredTensor, float_dtypes
from ..numerics import bounds
from ..numerics.bounds import FORMATS, Bounded
from .steps import (
    Alternative,
    Call,
    Results,
    Step,
    errors,
    evaluate,
    judge,
    merge_heads,
    narrowest,
    split_heads,
    within,
)


class Case(NamedTuple):
    """A result beyond its bound, and what is known about the model that computed it.

    Parameters
    ----------
    step : Step
        How the result should be computed.
    call : Call
        The call that should have computed it.
    computed : float array
        The result.
    result : function
        Returns another result of the same model by its name.
    weights : dict of StoredTensor
        The model's parameters by path.
    config : GPT2Config
        The model's shape and options.
    names : list of str
        The results before this one, in the order of computation.
    suspects : set of str
        The results before this one that are beyond their bounds.
    worst : tuple of int
        The element with the largest ratio of error and bound.
    """

    step: Step
    call: Call
    computed: np.ndarray
    result: Results
    weights: Mapping[str, StoredTensor]
    config: GPT2Config
    names: Sequence[str]
    suspects: set[str]
    worst: tuple[int, ...]

    @property
    def u(self) -> float:
        """The unit round-off of the arithmetic."""
        return FORMATS[bounds.computed_in(self.call.dtype)].unit

    def read(self, scope: str, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Return the parameters of another scope, with the names, the shapes and the dtype of these."""
        found = {}
        for name, a in like.items():
            tensor = self.weights.get(f"{scope}/{name}")
            if tensor is None or tensor.shape != a.shape:
                return None
            found[name] = tensor.read().astype(a.dtype, copy=False)
        return found


Guesses = Iterator[tuple[str, Alternative]]
Function = Callable[[Case], Guesses]


def by(call: Call, definition: Callable[[Call], Bounded] = evaluate) -> Alternative:
    """Return the alternative that a call, or a function of the call, defines."""
    return lambda rows, columns: definition(call.at(rows, columns))


def then(alternative: Alternative, change: Callable[[Bounded], Bounded]) -> Alternative:
    """Return an alternative whose result is changed."""
    return lambda rows, columns: change(alternative(rows, columns))


def size(x: np.ndarray) -> np.ndarray:
    """Return |x| in float64."""
    return np.asarray(abs(x)).astype(np.float64)


def times(factor: float, dtype: str) -> Callable[[Bounded], Bounded]:
    """Return the product of a result with a number, with two roundings more."""
    u = FORMATS[bounds.computed_in(dtype)].unit
    return lambda b: bounds.stored(b.value * factor, b.error * abs(factor) + 2 * u * size(b.value * factor), dtype)


def copied(x: np.ndarray) -> Bounded:
    """Return an array as an exact result."""
    return Bounded(bounds.exact(x), np.zeros(x.shape))


def rounded(x: np.ndarray, form: str) -> np.ndarray:
    """Return an array that is rounded to ``float16``, ``bfloat16`` or ``TF32`` (11 significant bits), in its dtype.

    Examples
    --------
    >>> rounded(np.asarray([1 + 2**-12, 1 + 2**-10], np.float32), "TF32").tolist()
    [1.0, 1.0009765625]
    """
    if form == "TF32":
        bits = x.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
        return nearest.astype(np.uint32).view(np.float32).astype(x.dtype)
    return x.astype(float_dtypes[form]).astype(x.dtype)


# Guesses that fit every op.


def follows(case: Case) -> Guesses:
    """Yield attention from the model's own scores or weights, where these are wrong already."""
    scores, weights = (f"{case.step.name.rpartition('/')[0]}/{name}" for name in ("scores", "weights"))
    if case.step.op == "attention_weights" and scores in case.suspects:
        x = case.call.but(op="softmax", inputs=(_cast(case, scores),), options={"mask": None})
        yield f"it follows from {scores}", by(x, lambda c: bounds.softmax(*c.inputs, numerics=c.numerics))
    if case.step.op == "attention" and weights in case.suspects and case.result(weights) is not None:
        w, v = _cast(case, weights), case.call.inputs[2]
        yield f"it follows from {weights}", lambda rows, columns: averaged(w[..., rows, :], v, case)


def _cast(case: Case, name: str) -> np.ndarray:
    found = case.result(name)
    assert found is not None
    return found.astype(float_dtypes[case.call.dtype], copy=False)


def other_input(case: Case) -> Guesses:
    """Yield an input that is another result, such as the residual stream instead of its layer_norm."""
    for i, expected in enumerate(case.call.inputs):
        seen = set()
        for name in reversed(case.names[-20:]):
            x = case.result(name)
            if name in case.step.inputs[i : i + 1] or x is None or x.shape != expected.shape or name in seen:
                continue
            seen.add(name)
            if np.array_equal(x, expected):
                continue
            inputs = [*case.call.inputs]
            inputs[i] = x
            cast = narrowest(inputs, case.call.dtype)
            if cast[0].dtype == expected.dtype:
                yield f"it reads {name} instead of {case.step.inputs[i]}", by(case.call.but(inputs=tuple(cast)))


def sign(case: Case) -> Guesses:
    """Yield the opposite sign."""
    yield "its sign is reversed", then(by(case.call), lambda b: Bounded(-b.value, b.error))


def position(case: Case) -> Guesses:
    """Yield another position's result."""
    seq = case.computed.shape[-2]
    for shift in (1, -1):
        moved = (np.arange(seq) - shift) % seq

        def alternative(rows: np.ndarray, columns: np.ndarray, moved: np.ndarray = moved) -> Bounded:
            return evaluate(case.call.at(moved[rows], columns))

        if seq > 1 and not case.step.op.startswith("attention"):
            yield f"its positions are shifted by {shift}", alternative


def _stored_as(form: str, b: Bounded) -> Bounded:
    """Return a result that is rounded to 16 bits, or to the 11 significant bits of TF32."""
    if form in FORMATS:
        return bounds.stored(b.value, b.error, form)
    return Bounded(b.value, 2.0**-11 * size(b.value) + (1 + 2.0**-11) * b.error)


def result_rounded(case: Case) -> Guesses:
    """Yield a result that is stored in fewer bits."""
    if case.call.dtype != "float32":
        return
    for form in ("float16", "bfloat16", "TF32"):
        with np.errstate(over="ignore"):
            same = np.array_equal(rounded(case.computed, form), case.computed, equal_nan=True)
        if same:
            yield f"its result is rounded to {form}", then(by(case.call), functools.partial(_stored_as, form))


def dropout(case: Case) -> Guesses:
    """Yield dropout: zeros, and all other elements divided by 1 - p."""
    rows = np.arange(case.computed.shape[-2])[-3:]
    columns = np.arange(case.computed.shape[-1])
    exact = evaluate(case.call.at(rows, columns)).value.astype(np.float64)
    part = within(case.computed, rows, columns).astype(np.float64)
    usual = np.isfinite(exact) & (abs(exact) > 1e-4 * np.abs(exact[np.isfinite(exact)]).max(initial=0))
    kept = usual & (part != 0)
    if kept.sum() < 10 or (dropped := 1 - kept.sum() / usual.sum()) < 0.01:
        return
    p = round(1 - float(np.median(exact[kept] / part[kept])), 3)
    if not 0 < p < 1 or abs(p - dropped) > 0.02 + 5 * math.sqrt(p * (1 - p) / usual.sum()):
        return

    def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        found = times(1 / (1 - p), case.call.dtype)(evaluate(case.call.at(rows, columns)))
        zero = within(case.computed, rows, columns) == 0
        return Bounded(np.where(zero, 0 * found.value, found.value), found.error)

    yield f"dropout is active, with p = {p:g}", alternative


def factor(case: Case) -> Guesses:
    """Yield a constant factor, which is estimated."""
    rows, columns = np.arange(case.computed.shape[-2])[:3], np.arange(case.computed.shape[-1])
    exact = evaluate(case.call.at(rows, columns)).value.astype(np.float64)
    part = within(case.computed, rows, columns)
    usual = np.isfinite(exact) & np.isfinite(part)
    x, y = exact[usual], part[usual].astype(np.float64)
    total = float(x @ x)
    c = float(x @ y) / total if total else math.nan
    if math.isfinite(c) and c and abs(c - 1) > 1e-6:
        yield f"its result is multiplied by {c:.4g}", then(by(case.call), times(c, case.call.dtype))


def constant(case: Case) -> Guesses:
    """Yield a result that holds only zeros."""
    if not case.computed.any():
        yield "its result is 0", lambda rows, columns: copied(within(case.computed, rows, columns))


def in_16_bits(case: Case) -> Guesses:
    """Yield the op with 16-bit arithmetic in each of its steps, if this explains the size of the errors.

    In a product, each of K roundings is relative to a partial sum, as in `bounds.linear_at_random`.
    """
    forms = ("float16", "bfloat16")
    with np.errstate(over="ignore"):
        shows = [form for form in forms[::-1] if np.array_equal(rounded(case.computed, form), case.computed)]
    for form in shows or forms:
        if case.call.dtype not in ("float32", form):
            continue
        u = FORMATS[form].unit
        wide = case.call.but(
            inputs=tuple(x if x.dtype.kind in "iu" else x.astype(np.float32) for x in case.call.inputs),
            params={name: a.astype(np.float32) for name, a in case.call.params.items()},
        )

        def loose(c: Call, u: float = u, form: str = form) -> Bounded:
            found = evaluate(c)
            error = found.error * (u / 2.0**-24)
            if c.op in ("conv1d", "unembed"):
                x, w = c.inputs[0], c.params["w"] if c.op == "conv1d" else c.params["w"].T
                x = merge_heads(x) if x.ndim == 4 else x
                squares = x.astype(np.float64) ** 2 @ w.astype(np.float64) ** 2 + found.value**2
                error = bounds.gamma_at_random(x.shape[-1] + 1, u) * np.sqrt(squares)
            return bounds.stored(found.value, error, form)

        alternative = by(wide, loose)
        part = alternative(np.asarray([case.computed.shape[-2] - 1]), np.arange(case.computed.shape[-1]))
        usual = np.isfinite(part.value) & np.isfinite(part.error)
        informative = usual.any() and np.median(part.error[usual]) <= 0.3 * np.sqrt((part.value[usual] ** 2).mean())
        if informative and _is_spread(case, alternative) and judge(case.call, case.computed, alternative).ratio <= 1:
            yield f"its errors are those of {form} arithmetic", alternative
            return


def _is_spread(case: Case, alternative: Alternative) -> bool:
    """Return whether half of the errors reach 0.3% of their bounds, and they are not proportional to the result."""
    rows, columns = (np.arange(n) for n in case.computed.shape[-2:])
    expected, part = alternative(rows[-4:], columns), within(case.computed, rows[-4:], columns)
    ratios = bounds.quotient(errors(part, expected), expected.error)
    usual = np.isfinite(part) & np.isfinite(expected.value) & (expected.error > 0)
    value = expected.value[usual]
    error = part[usual].astype(np.float64) - value
    is_proportional = abs(error @ value) > 0.5 * np.sqrt((error @ error) * (value @ value))
    return bool(usual.any() and np.median(ratios[usual]) >= 0.003 and not is_proportional)


# Guesses for one op.


def eps(case: Case) -> Guesses:
    """Yield another eps of layer_norm."""
    used = case.call.options["eps"]
    for value in (1e-3, 1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-7, 0.0):
        if value != used:
            yield f"eps is {value:g}, not {used:g}", by(case.call.but(options={"eps": value}))


def eps_outside(case: Case) -> Guesses:
    """Yield an eps that is added to the standard deviation, which has n or n - 1 in its denominator."""
    used, n = case.call.options["eps"], case.call.inputs[0].shape[-1]
    for value, ddof in itertools.product(dict.fromkeys((used, 1e-6, 1e-5)), (0, 1)):

        def definition(c: Call, value: float = value, ddof: int = ddof) -> Bounded:
            x = bounds.exact(c.inputs[0]).astype(np.float64)
            std = x.std(axis=-1, keepdims=True) * math.sqrt(n / (n - ddof))
            return _normalised(c, ((std + value) ** 2) * ((n - ddof) / n) - std**2 * ((n - ddof) / n), ddof)

        denominator = " of n - 1" if ddof else ""
        if ddof < n:
            yield (
                f"eps = {value:g} is added to the standard deviation{denominator}, not to the variance",
                by(case.call, definition),
            )


def variance(case: Case) -> Guesses:
    """Yield a variance with n - 1 in its denominator."""
    n, used = case.call.inputs[0].shape[-1], case.call.options["eps"]
    if n > 1:
        yield "the variance is divided by n - 1", by(case.call, lambda c: _normalised(c, used * (n - 1) / n, 1))


def _normalised(call: Call, eps: np.ndarray | float, ddof: int) -> Bounded:
    """Return g d / sqrt(n / (n - ddof) (mean(d^2) + eps)) + b, where eps may differ from row to row."""
    (x,), n = call.inputs, call.inputs[0].shape[-1]
    c = math.sqrt((n - ddof) / n)
    zero = np.zeros_like(call.params["b"])
    plain = bounds.layer_norm(x, call.params["g"], zero, eps=eps, gamma=bounds.gamma_probable)
    b = bounds.exact(call.params["b"])
    y = plain.value * c + b
    u = FORMATS[bounds.computed_in(call.dtype)].unit
    return bounds.stored(y, plain.error * (1 + 8 * u) + 2 * u * (size(plain.value) + size(y)), call.dtype)


def without_mean(case: Case) -> Guesses:
    """Yield root mean square normalisation."""

    def definition(c: Call) -> Bounded:
        (x,), n = c.inputs, c.inputs[0].shape[-1]
        wide, g, b = (bounds.exact(a) for a in (x, c.params["g"], c.params["b"]))
        r = np.sqrt(((wide * wide).sum(axis=-1, keepdims=True) / n + c.options["eps"]).astype(np.float64))
        y = g * wide / r + b
        u = FORMATS[bounds.computed_in(c.dtype)].unit
        error = (bounds.gamma_probable(n + 4, u) / 2 + 5 * u) * size(g * wide / r) + u * size(y)
        return bounds.stored(y, error, c.dtype)

    yield "the mean is not subtracted", by(case.call, definition)


def gain_and_bias(case: Case) -> Guesses:
    """Yield a gain or a bias that is missing, or a gain that is stored as its difference to 1."""
    g, b = case.call.params["g"], case.call.params["b"]
    one, zero = np.ones_like(g), np.zeros_like(b)
    for cause, params in {
        "the gain is missing": {"g": one},
        "the bias is missing": {"b": zero},
        "gain and bias are missing": {"g": one, "b": zero},
        "gain and bias are exchanged": {"g": b, "b": g},
    }.items():
        yield cause, by(case.call.but(params=params))
    yield "the gain is 1 + g", by(case.call.but(params={"g": (1 + g.astype(np.float64)).astype(g.dtype)}))


def other_scope(case: Case) -> Guesses:
    """Yield the parameters of another layer, or of the other layer_norm."""
    layers = sorted(range(case.config.n_layer), key=lambda i: abs(i - case.step.layer))
    if case.step.op == "layer_norm":
        scopes = [f"h{i}/{name}" for i in layers for name in ("ln_1", "ln_2")] + ["ln_f"]
    else:
        rest = case.step.scope.partition("/")[2]
        scopes = [f"h{i}/{rest}" for i in layers]
    for scope in scopes:
        params = None if scope == case.step.scope else case.read(scope, case.call.params)
        if params is not None and not all(np.array_equal(a, params[name]) for name, a in case.call.params.items()):
            yield f"it uses the parameters of {scope}", by(case.call.but(params=params))
            for name, a in params.items():
                yield f"it uses {scope}/{name}", by(case.call.but(params={name: a}))


def skipped(case: Case) -> Guesses:
    """Yield a result that is a copy of an input."""
    for name, x in zip(case.step.inputs, case.call.inputs, strict=True):
        if x.shape == case.computed.shape:
            yield f"its result is {name}", lambda rows, columns, x=x: copied(within(x, rows, columns))  # type: ignore[misc]


def transposed(case: Case) -> Guesses:
    """Yield a weight that is read as its transpose."""
    w = case.call.params["w"]
    yield "the weight is transposed", by(case.call.but(params={"w": w.reshape(w.shape[::-1]).T}))
    yield "the weight has the opposite sign", by(case.call.but(params={"w": -w}))


def bias(case: Case) -> Guesses:
    """Yield a bias that is missing or added twice."""
    yield "the bias is missing", by(case.call.but(params={"b": None}))
    yield "the bias is added twice", by(case.call.but(params={"b": 2 * case.call.params["b"]}))


def order(case: Case) -> Guesses:
    """q, k and v in another order, or interleaved by head."""
    n = case.computed.shape[-1]
    if n % 3 or not case.step.name.endswith("c_attn"):
        return
    heads = case.config.n_head
    index = np.arange(n).reshape(3, heads, n // 3 // heads)
    found = {
        f"the order is {', '.join('qkv'[i] for i in p)}, not q, k, v": index[list(p)]
        for p in itertools.permutations(range(3))
        if p != (0, 1, 2)
    }
    found["q, k and v are interleaved: each head has its q, its k and its v"] = index.transpose(1, 0, 2)
    found["q, k and v are interleaved element by element"] = index.transpose(1, 2, 0)
    for cause, columns in found.items():
        at = columns.reshape(-1)
        yield cause, by(case.call.but(params={name: a[..., at] for name, a in case.call.params.items()}))


def merging(case: Case) -> Guesses:
    """Yield heads that are merged without moving the sequence in front of them."""
    (x,) = case.call.inputs
    if x.ndim == 4:
        wrong = np.ascontiguousarray(x).reshape(x.shape[0], x.shape[2], -1)
        yield "the heads are merged without a transposition", by(case.call.but(inputs=(wrong,)))
        reverse = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(x.shape[0], x.shape[2], -1)
        yield "the heads are merged in the wrong order of axes", by(case.call.but(inputs=(reverse,)))


def inputs_rounded(case: Case) -> Guesses:
    """Yield factors of a product that are rounded to fewer bits: TF32, bfloat16, float16."""
    if case.call.dtype != "float32":
        return
    call = case.call
    for form in ("TF32", "bfloat16", "float16"):
        with np.errstate(over="ignore"):
            inputs = tuple(rounded(x, form) for x in call.inputs)
            params = {name: rounded(a, form) for name, a in call.params.items() if name == "w"}
        if call.op != "attention":
            if params:
                yield f"the weight is rounded to {form}", by(call.but(params=params))
            yield f"the factors are rounded to {form}", by(call.but(inputs=inputs, params=params))
        else:
            u = 2.0**-11 if form == "TF32" else FORMATS[form].unit
            wide = call.but(inputs=inputs)
            yield f"the factors are rounded to {form}", by(wide, lambda c, u=u: _weights_rounded(c, u))  # type: ignore[misc]
            kept = (call.inputs[0], *inputs[1:])
            yield f"k and v are rounded to {form}, as in a cache", by(call.but(inputs=kept))


def weights_rounded(case: Case) -> Guesses:
    """Yield attention with rounded weights: its own weights if they are known, or else the exact ones."""
    weights = case.result(f"{case.step.name.rpartition('/')[0]}/weights")
    if case.call.dtype != "float32" or case.step.op != "attention":
        return
    v = case.call.inputs[2]
    for form in ("float16", "bfloat16"):
        alternative = by(case.call, lambda c, u=FORMATS[form].unit: _weights_rounded(c, u))  # type: ignore[misc]
        if weights is not None:
            w = rounded(weights.astype(np.float32), form)
            yield (
                f"the weights are rounded to {form}",
                lambda rows, columns, w=w: averaged(w[..., rows, :], v, case),  # type: ignore[misc]
            )
        elif judge(case.call, case.computed, alternative).ratio >= 0.03:
            yield f"the weights are rounded to {form}", alternative


def averaged(w: np.ndarray, v: np.ndarray, case: Case) -> Bounded:
    """Return the product of weights and values."""
    a, b = bounds.exact(w), bounds.exact(v)
    return bounds.stored(a @ b, bounds.gamma(v.shape[-2] + 1, case.u) * (size(a) @ size(b)), case.call.dtype)


def _weights_rounded(call: Call, u: float) -> Bounded:
    """Return attention whose weights have one more rounding, of a relative error of at most u."""
    found = evaluate(call)
    q, k, v = call.inputs
    seen = call.options["mask"]
    seen = seen | ~seen.any(axis=-1, keepdims=True)
    w = bounds.attention_weights(q, k, seen, scale=call.options["scale"], numerics=call.numerics)
    return Bounded(found.value, found.error + (u * (size(w.value) + w.error) + 2.0**-25) @ size(bounds.exact(v)))


def heads(case: Case) -> Guesses:
    """Yield heads that are split in another way, and another part of c_attn."""
    c, part, n_head = case.call.inputs[0], case.call.options["part"], case.config.n_head
    _, seq, n = c.shape
    d = n // 3 // n_head
    for other in {0, 1, 2} - {part}:
        yield f"it holds the columns of {'qkv'[other]}", by(case.call.but(options={"part": other}))
    mine = np.split(c, 3, axis=-1)[part]
    found = {
        "the heads are split element by element": mine.reshape(1, seq, d, n_head).transpose(0, 3, 1, 2),
        "the heads are split without a transposition": np.ascontiguousarray(mine).reshape(1, n_head, seq, d),
        "q, k and v are interleaved: each head has its q, its k and its v": c.reshape(1, seq, n_head, 3, d)[
            :, :, :, part
        ].transpose(0, 2, 1, 3),
        "q, k and v are interleaved element by element": c.reshape(1, seq, n_head, d, 3)[..., part].transpose(
            0, 2, 1, 3
        ),
        "the heads are in reverse order": mine.reshape(1, seq, n_head, d)[:, :, ::-1].transpose(0, 2, 1, 3),
    }
    for cause, x in found.items():
        yield cause, lambda rows, columns, x=x: copied(within(x, rows, columns))  # type: ignore[misc]


def split_changed(case: Case) -> Guesses:
    """Yield a part that is scaled early, rounded (a cache in 16 bits), or shifted by a position."""
    c, part, n_head = case.call.inputs[0], case.call.options["part"], case.config.n_head
    mine = np.split(c, 3, axis=-1)[part]
    x = split_heads(mine, n_head)
    if part < 2:
        scale = case.config.attention_scale(case.step.layer)
        for value, name in ((scale, "scale"), (math.sqrt(scale), "square root of the scale")):
            yield f"it is multiplied by the {name} of the scores", then(by(case.call), times(value, case.call.dtype))
    if case.call.dtype == "float32":
        for form in ("float16", "bfloat16", "TF32"):
            with np.errstate(over="ignore"):
                low = rounded(x, form)
            note = ", as in a cache" if part else ""
            yield f"it is rounded to {form}{note}", lambda rows, columns, a=low: copied(within(a, rows, columns))  # type: ignore[misc]
    for shift in (1, -1):
        moved = np.roll(x, shift, axis=-2)
        moved[..., :shift, :] = 0 if shift > 0 else moved[..., :shift, :]
        moved[..., shift:, :] = 0 if shift < 0 else moved[..., shift:, :]
        yield f"its positions are shifted by {shift}", lambda rows, columns, a=moved: copied(within(a, rows, columns))  # type: ignore[misc]


def scale(case: Case) -> Guesses:
    """Yield another scale of the scores."""
    used, c, i = case.call.options["scale"], case.config, case.step.layer
    d = c.head_size
    plain = c.attention_scale(0)
    values = {
        "the scores are not scaled": 1.0,
        "the scale is not divided by the layer's number": plain,
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
    }
    for cause, value in values.items():
        if not math.isclose(value, used, rel_tol=1e-6):
            yield cause, by(case.call.but(options={"scale": value}))


def mask(case: Case) -> Guesses:
    """Yield another mask."""
    n = case.computed.shape[-2]
    for cause, seen in {
        "there is no mask": np.ones((n, n), np.bool_),
        "the mask is off by one: a query sees the key after its own": np.tri(n, k=1, dtype=np.bool_),
        "the mask is off by one: a query does not see its own key": np.tri(n, k=-1, dtype=np.bool_),
        "the mask is transposed: a query sees the keys after its own": np.tri(n, dtype=np.bool_).T,
    }.items():
        if n > 1:
            yield cause, by(case.call.but(options={"mask": seen}))


def hidden(case: Case) -> Guesses:
    """Yield hidden scores that are a finite number, or to which one is added."""
    n = case.computed.shape[-2]
    seen = np.tri(n, dtype=np.bool_)
    if n < 2:
        return
    values = {-1e4, -1e3, -100.0, -50.0, -30.0, -20.0, -10.0, -5.0, -1.0, 0.0}
    name = f"{case.step.name.rpartition('/')[0]}/scores"
    scores = case.computed if case.step.op == "attention_scores" else case.result(name)
    if scores is not None:
        values |= {float(x) for x in np.unique(scores[..., ~seen])[:4] if np.isfinite(x)}
    open_mask = case.call.but(options={"mask": np.ones((n, n), np.bool_)})
    for value, adds in itertools.product(sorted(values), (False, True)):

        def definition(rows: np.ndarray, columns: np.ndarray, value: float = value, adds: bool = adds) -> Bounded:
            return _with_hidden(open_mask.at(rows), ~seen[rows], value, adds)

        verb = f"{value:g} is added to hidden scores" if adds else f"hidden scores are {value:g}"
        yield f"{verb}, not -inf", definition


def _with_hidden(call: Call, hidden: np.ndarray, value: float, adds: bool) -> Bounded:
    """Return scores, weights or attention with finite hidden scores. The bound is that of the call without a mask."""
    q, k, *rest = call.inputs
    scores = bounds.attention_scores(q, k, scale=call.options["scale"])
    exact = scores.value.astype(np.float64)
    exact = np.where(hidden, exact + value if adds else value, exact)
    u = FORMATS[bounds.computed_in(call.dtype)].unit
    if call.op == "attention_scores":
        added = scores.error + u * abs(exact)
        return bounds.stored(exact, np.where(hidden & (not adds), u * abs(exact), added), call.dtype)
    e = np.exp(exact - exact.max(axis=-1, keepdims=True))
    weights = e / e.sum(axis=-1, keepdims=True)
    f = np.where(hidden, u * abs(exact) + scores.error * adds, scores.error)
    n = weights.shape[-1]
    relative = f + (weights * f).sum(axis=-1, keepdims=True) + u * (2 * n + 2 * sum(call.numerics.exp) + 30)
    W = weights * relative + 1e-37
    if call.op == "attention_weights":
        return bounds.stored(weights, W, call.dtype)
    v = bounds.exact(rest[0]).astype(np.float64)
    error = W @ abs(v) + bounds.gamma(n + 1, u) * ((weights + W) @ abs(v))
    return bounds.stored(weights @ v, error, call.dtype)


def roles(case: Case) -> Guesses:
    """q, k and v in other roles."""
    for p in itertools.permutations(range(len(case.call.inputs))):
        if p != tuple(range(len(p))):
            used = ", ".join("qkv"[i] for i in p)
            yield f"its inputs are {used}", by(case.call.but(inputs=tuple(case.call.inputs[i] for i in p)))


def over_queries(case: Case) -> Guesses:
    """Yield a softmax over the queries instead of the keys."""
    if case.step.op == "attention_scores":
        return
    call = case.call
    q, k, *v = call.inputs
    scores = bounds.attention_scores(q, k, call.options["mask"], scale=call.options["scale"])
    exact = scores.value.astype(np.float64)
    e = np.exp(exact - exact.max(axis=-2, keepdims=True))
    weights = e / e.sum(axis=-2, keepdims=True)
    f = 2 * np.where(np.isfinite(exact), scores.error, 0).max(axis=-2, keepdims=True)
    W = weights * (f + case.u * (2 * weights.shape[-2] + 2 * sum(call.numerics.exp) + 4 * abs(e.min() + 30))) + 1e-37

    def definition(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        w, error = weights[..., rows, :], W[..., rows, :]
        if case.step.op == "attention_weights":
            return bounds.stored(w, error, call.dtype)
        values = bounds.exact(v[0]).astype(np.float64)
        gamma = bounds.gamma(w.shape[-1] + 1, case.u)
        return bounds.stored(w @ values, error @ abs(values) + gamma * (w @ abs(values)), call.dtype)

    yield "softmax is over the queries, not over the keys", definition


def activation(case: Case) -> Guesses:
    """Yield another activation function."""
    u, c = case.u, case.call.numerics

    def erf_form(call: Call) -> Bounded:
        x = bounds.exact(call.inputs[0]).astype(np.float64)
        z = x / math.sqrt(2)
        erf = np.vectorize(math.erf, otypes=[np.float64])(z)
        derivative = 2 / math.sqrt(math.pi) * np.exp(-(z**2))
        half = np.where(x < 0, x / 2 * np.vectorize(math.erfc, otypes=[np.float64])(-z), x / 2 * (1 + erf))
        error = u * abs(x) / 2 * (3 * abs(z) * derivative + max(c.tanh, 4) * abs(erf)) + 3 * u * abs(half)
        return bounds.stored(half, error, call.dtype)

    def sigmoid_form(slope: float) -> Callable[[Call], Bounded]:
        def definition(call: Call) -> Bounded:
            x = bounds.exact(call.inputs[0]).astype(np.float64)
            with np.errstate(over="ignore"):
                y = x / (1 + np.exp(-slope * x))
            growth = 2 * abs(slope * x) + c.exp[0] + c.exp[1] * abs(slope * x) + 4
            return bounds.stored(y, u * abs(y) * growth + 1e-37, call.dtype)

        return definition

    def relu(call: Call) -> Bounded:
        return copied(np.maximum(call.inputs[0], 0))

    def squared_relu(call: Call) -> Bounded:
        x = bounds.exact(np.maximum(call.inputs[0], 0))
        return bounds.stored(x * x, 2 * u * size(x * x), call.dtype)

    def tanh(call: Call) -> Bounded:
        y = np.tanh(bounds.exact(call.inputs[0]).astype(np.float64))
        return bounds.stored(y, (c.tanh + 2) * u * abs(y), call.dtype)

    for cause, definition in {
        "GELU is the erf form, not the tanh form": erf_form,
        "the activation is ReLU": relu,
        "the activation is SiLU": sigmoid_form(1.0),
        "GELU is x sigmoid(1.702 x)": sigmoid_form(1.702),
        "the activation is tanh": tanh,
        "the activation is the square of ReLU": squared_relu,
    }.items():
        yield cause, by(case.call, definition)


def addition(case: Case) -> Guesses:
    """Yield a residual connection that is missing, subtracted or added twice."""
    stream, branch = case.call.inputs
    for cause, x in (("the residual connection is missing", branch), ("the branch is missing", stream)):
        yield cause, lambda rows, columns, x=x: copied(within(x, rows, columns))  # type: ignore[misc]
    yield "the branch is subtracted, not added", by(case.call.but(inputs=(stream, -branch)))
    yield "the branch is added twice", by(case.call.but(inputs=(stream, 2 * branch)))
    yield "the residual stream is added twice", by(case.call.but(inputs=(2 * stream, branch)))


def embeddings(case: Case) -> Guesses:
    """Yield other positions, other token ids, or an embedding that is scaled or missing."""
    call = case.call
    ids, positions = call.inputs
    wte, wpe = call.params["wte"], call.params["wpe"]
    zero = np.zeros_like
    yield "the positions are not added", by(call.but(params={"wpe": zero(wpe)}))
    yield "the token embedding is not added", by(call.but(params={"wte": zero(wte)}))
    computed = case.computed[0].astype(np.float64)
    if not np.isfinite(computed).all():
        return
    found = _nearest(computed - wte[ids[0, :, 0]].astype(np.float64), wpe)
    if not np.array_equal(found, positions[0, :, 0]):
        yield _shift("positions", found - positions[0, :, 0], found), by(call.but(inputs=(ids, found[None, :, None])))
    found = _nearest(computed - wpe[positions[0, :, 0]].astype(np.float64), wte)
    if not np.array_equal(found, ids[0, :, 0]):
        yield _shift("token ids", found - ids[0, :, 0], found), by(call.but(inputs=(found[None, :, None], positions)))
    for value, name in ((math.sqrt(case.config.n_embd), "sqrt(n_embd)"), (case.config.n_embd**-0.5, "1/sqrt(n_embd)")):
        rows = wte[ids[..., 0]].astype(np.float64) * value

        def definition(at: np.ndarray, columns: np.ndarray, rows: np.ndarray = rows) -> Bounded:
            a, b = rows[:, at], bounds.exact(wpe[positions[:, at, 0]]).astype(np.float64)
            return bounds.stored(a + b, case.u * (2 * abs(a) + abs(a + b)), call.dtype)

        yield f"the token embedding is multiplied by {name}", definition


def _nearest(rows: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the index of the row of a table that is nearest to each row."""
    best, index = np.full(len(rows), np.inf), np.zeros(len(rows), np.int64)
    for start in range(0, len(table), 8192):
        block = table[start : start + 8192].astype(np.float64)
        distance = (block * block).sum(axis=1) - 2 * rows @ block.T
        nearest = distance.argmin(axis=1)
        smaller = distance[np.arange(len(rows)), nearest] < best
        index[smaller], best[smaller] = start + nearest[smaller], distance.min(axis=1)[smaller]
    return index


def _shift(what: str, difference: np.ndarray, found: np.ndarray) -> str:
    if len({*difference.tolist()}) == 1:
        return f"the {what} are off by {difference[0]:+d}"
    shown = ", ".join(str(i) for i in found[:6].tolist())
    return f"the {what} are {shown}{', ...' if len(found) > 6 else ''}"


def head(case: Case) -> Guesses:
    """Yield another matrix for the logits, logits in another order or of another scale, and probabilities."""
    call = case.call
    w = call.params["w"]
    for path, name in (("wte", "the head is wte, not lm_head"), ("lm_head", "the head is lm_head, not wte")):
        if path in case.weights and case.weights[path].shape == w.shape:
            other = case.weights[path].read().astype(w.dtype, copy=False)
            if not np.array_equal(other, w):
                yield name, by(call.but(params={"w": other}))
    for shift in (1, -1):
        yield f"the token ids are off by {shift:+d}", by(call.but(params={"w": np.roll(w, shift, axis=0)}))
    for value, name in ((case.config.n_embd**-0.5, "1/sqrt(n_embd)"),):
        yield f"the logits are multiplied by {name}", then(by(call), times(value, call.dtype))
    largest = float(case.computed[0, -1].max())
    if largest <= 1e-6:

        def normalised(rows: np.ndarray, columns: np.ndarray) -> Bounded:
            y = evaluate(call.at(rows))
            top = y.value.max(axis=-1, keepdims=True)
            total = top + np.log(np.exp((y.value - top).astype(np.float64)).sum(axis=-1, keepdims=True))
            error = y.error + y.error.max(axis=-1, keepdims=True) + case.u * (4 * size(y.value - total) + 100)
            return Bounded((y.value - total)[..., columns], error[..., columns])

        yield "the results are log-probabilities, not logits", normalised


_ANY = (follows, sign, skipped, result_rounded, dropout, other_input, position, constant)
_ATTENTION = (scale, mask, hidden, roles, over_queries, inputs_rounded, weights_rounded)
GUESSES: dict[str, tuple[Function, ...]] = {
    "embedding": (embeddings, result_rounded, dropout, sign, position, constant),
    "layer_norm": (eps, eps_outside, variance, gain_and_bias, other_scope, without_mean, *_ANY),
    "conv1d": (transposed, bias, order, merging, other_scope, inputs_rounded, *_ANY),
    "split": (heads, split_changed, *_ANY),
    "attention_scores": (*_ATTENTION, *_ANY),
    "attention_weights": (follows, *_ATTENTION, *_ANY),
    "attention": (follows, *_ATTENTION, *_ANY),
    "add": (addition, *_ANY),
    "gelu": (activation, *_ANY),
    "unembed": (head, inputs_rounded, *_ANY),
}
"""For each op, functions that yield other definitions, the likely ones first."""
LAST_GUESSES: tuple[Function, ...] = (factor, in_16_bits)
"""Functions that yield definitions with a free parameter."""


BY_SIZE = (result_rounded, weights_rounded, in_16_bits)
"""Functions that yield the same exact result with a larger bound. All others must explain the worst element better."""


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
        One or two causes, joined by "or"; empty if no guess explains the result.
    functions : list of functions
        The functions that yielded them.
    """
    rows, columns = _slice(case)
    part = within(case.computed, rows, columns)
    place = (*case.worst[:-2], rows.tolist().index(case.worst[-2]), columns.tolist().index(case.worst[-1]))

    def accepts(alternative: Alternative, function: Function) -> bool:
        """Return whether an alternative explains a part of the result, then the worst element, then all of it."""
        expected = alternative(rows, columns)
        error = errors(part, expected)
        return bool(
            bounds.quotient(error, expected.error).max() <= 1
            and (function in BY_SIZE or error[place] <= usual[place] / 2)
            and judge(case.call, case.computed, alternative).ratio <= 1
        )

    with np.errstate(all="ignore"):
        usual = errors(part, evaluate(case.call.at(rows, columns)))
        functions = list(dict.fromkeys(GUESSES[case.step.op]))
        known = [f for f in (*functions, *LAST_GUESSES) if f in first]
        others = [[f for f in functions if f not in known], *([f] for f in LAST_GUESSES)]
        for group in [known] if only_first else [known, *others]:
            accepted = [
                (cause, function)
                for function in group
                for cause, alternative in function(case)
                if accepts(alternative, function)
            ]
            if accepted:
                causes = dict(accepted[:2])
                return " or ".join(causes), list(causes.values())
    return "", []


def _slice(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return a few positions and columns, on which a guess is tried first: those of the worst element, and others."""
    seq, width = case.computed.shape[-2:]
    rows = np.unique([case.worst[-2], seq - 1, seq // 2])
    columns = np.arange(width)
    if case.step.op in ("conv1d", "unembed") and width > 64:
        columns = np.unique([case.worst[-1], *np.linspace(0, width - 1, 48).astype(int)])
    return rows, columns
