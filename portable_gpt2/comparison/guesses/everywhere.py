"""Guesses that fit every op."""

from __future__ import annotations

import math

import numpy as np

from ...numerics import bounds
from ...numerics.bounds import Bounded
from ..steps import errors, evaluate, judge, narrowest, steps, within
from .arithmetic import Computed, clip, tanh
from .case import FORMS, FORMS_OF_8_BITS, Case, Guesses, rounded, smallest, unit


def simple(case: Case) -> Guesses:
    """Yield the opposite sign, zeros, and a function of the right result."""
    yield "its sign is reversed", case.then(lambda y: -y)
    if not case.computed.any():
        yield "its result is 0", case.copy(case.computed)


def limited(case: Case) -> Guesses:
    """Yield results between two limits: clipped, or capped softly by tanh."""
    for c in (10.0, 15.0, 20.0, 30.0, 50.0):
        yield f"its result is capped: it is {c:g} tanh(y / {c:g})", case.then(lambda y, c=c: c * tanh(y / c))  # type: ignore[misc]
    finite = case.computed[np.isfinite(case.computed)].astype(np.float64)
    limit = abs(finite).max(initial=0.0)
    if limit and np.count_nonzero(abs(finite) == limit) > 1:
        yield f"its result is clipped to ±{limit:g}", case.then(lambda y: clip(y, -limit, limit))


def another_result(case: Case) -> Guesses:
    """Yield a copy of another result, and an input that is another result, such as the stream before layer_norm."""
    names = [step.name for step in steps(case.config)]
    at = names.index(case.step.name)
    near = [name for name in (*names[:at][::-1][:20], *names[at + 1 : at + 16])]
    known = {name: x for name in near if (x := case.result(name)) is not None}
    for name, x in known.items():
        if names.index(name) < at and x.shape == case.computed.shape:
            yield f"its result is {name}", case.copy(x)
    for i, right in enumerate(case.call.inputs) if case.step.op != "embedding" else ():
        for name, x in known.items():
            if name == case.step.inputs[i] or x.shape != right.shape or np.array_equal(x, right):
                continue
            inputs = [*case.call.inputs]
            inputs[i] = x
            cast = narrowest(inputs, case.call.dtype)
            if cast[0].dtype == right.dtype:
                yield f"it reads {name} instead of {case.step.inputs[i]}", case.but(inputs=tuple(cast))


def position(case: Case) -> Guesses:
    """Yield the result of another position, cyclically or with zeros at the end that is free."""
    seq = case.computed.shape[-2]
    for shift in (1, -1) if seq > 1 and not case.step.op.startswith("attention") else ():
        source = np.arange(seq) - shift

        def alternative(rows: np.ndarray, columns: np.ndarray, source: np.ndarray = source) -> Bounded:
            return evaluate(case.call.at(source[rows] % seq, columns))

        def with_zeros(rows: np.ndarray, columns: np.ndarray, source: np.ndarray = source) -> Bounded:
            inside = ((source[rows] >= 0) & (source[rows] < seq))[:, None]
            found = evaluate(case.call.at(source[rows] % seq, columns))
            return Bounded(np.where(inside, found.value, 0 * found.value), np.where(inside, found.error, 0))

        yield f"its positions are shifted by {shift}", alternative
        yield f"its positions are shifted by {shift}", with_zeros


def result_rounded(case: Case) -> Guesses:
    """Yield a result that is stored in fewer bits, or with few decimals."""
    forms = {"float32": (*FORMS, *FORMS_OF_8_BITS), "float64": ("float32",)}
    for form in forms.get(case.call.dtype, ()):
        if np.array_equal(rounded(case.computed, form), case.computed, equal_nan=True):

            def in_form(y: Computed, form: str = form) -> Computed:
                u, tiny = unit(form), smallest(form) / 2
                return Computed(y.value, u * abs(y.value) + (1 + u) * y.error + tiny, y.u)

            yield f"its result is rounded to {form}", case.then(in_form)
    if case.call.dtype != "float32":
        return
    finite = case.computed[np.isfinite(case.computed)].astype(np.float64)
    for step, name in _STEPS.items():
        multiple = finite / step
        distance = abs(multiple - np.rint(multiple))
        if 2 < abs(multiple).max(initial=0.0) < 2**20 and (distance <= 2 * case.u * abs(multiple)).all():

            def on_grid(y: Computed, step: float = step) -> Computed:
                return Computed(y.value, step / 2 + y.error + y.u * abs(y.value), y.u)

            yield f"its result is rounded to {name}", case.then(on_grid)


_STEPS = {10.0**-i: f"{i} decimals" for i in range(1, 8)} | {2.0**-i: f"multiples of 1/{2**i}" for i in range(1, 17)}


def dropout(case: Case) -> Guesses:
    """Yield dropout: zeros, and all other elements divided by 1 - p."""
    rows = case.last_rows[-3:]
    exact = evaluate(case.call.at(rows)).value.astype(np.float64)
    part = within(case.computed, rows, case.columns).astype(np.float64)
    usual = np.isfinite(exact) & (abs(exact) > 1e-4 * np.abs(exact[np.isfinite(exact)]).max(initial=0))
    kept = usual & (part != 0)
    if kept.sum() < 10 or (dropped := 1 - kept.sum() / usual.sum()) < 0.01:
        return
    p = round(1 - float(np.median(exact[kept] / part[kept])), 3)
    if not 0 < p < 1 or abs(p - dropped) > 0.02 + 5 * math.sqrt(p * (1 - p) / usual.sum()):
        return
    kept_ones = case.then(lambda y: y * (1 / (1 - p)))

    def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        found = kept_ones(rows, columns)
        zero = within(case.computed, rows, columns) == 0
        return Bounded(np.where(zero, 0 * found.value, found.value), found.error)

    yield f"dropout is active, with p = {p:g}", alternative


def other_scope(case: Case) -> Guesses:
    """Yield the parameters of another layer, or of the other layer_norm."""
    if not case.step.scope:
        return
    layers = sorted(range(case.config.n_layer), key=lambda i: abs(i - case.step.layer))
    if case.step.op == "layer_norm":
        scopes = [f"h{i}/{name}" for i in layers for name in ("ln_1", "ln_2")] + ["ln_f"]
    else:
        rest = case.step.scope.partition("/")[2]
        scopes = [f"h{i}/{rest}" for i in layers]
    for scope in scopes:
        params = None if scope == case.step.scope else case.read(scope, case.call.params)
        if params is not None and not all(np.array_equal(a, params[name]) for name, a in case.call.params.items()):
            yield f"it uses the parameters of {scope}", case.but(params=params)
            for name, a in params.items():
                yield f"it uses {scope}/{name}", case.but(params={name: a})


def not_finite(case: Case) -> Guesses:
    """Yield NaN and infinity where the exact result is finite, if the other elements are right."""
    bad = ~np.isfinite(case.computed)
    n = np.count_nonzero(bad)
    if not n or n == bad.size:
        return

    def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        found = evaluate(case.call.at(rows, columns))
        unknown = within(bad, rows, columns) & np.isfinite(found.value.astype(np.float64))
        return Bounded(found.value, np.where(unknown, np.inf, found.error))

    infinite = np.count_nonzero(np.isinf(case.computed))
    what = "NaN" if not infinite else "infinite" if infinite == n else "NaN or infinite"
    yield f"{n:,} of its {bad.size:,} elements are {what}, and the others are right", alternative


def factor(case: Case) -> Guesses:
    """Yield a constant factor, which is estimated."""
    rows = case.last_rows
    exact = evaluate(case.call.at(rows)).value.astype(np.float64)
    part = within(case.computed, rows, case.columns)
    usual = np.isfinite(exact) & np.isfinite(part)
    x, y = exact[usual], part[usual].astype(np.float64)
    total = float(x @ x)
    c = float(x @ y) / total if total else math.nan
    if math.isfinite(c) and c and abs(c - 1) > 1e-6:
        yield f"its result is multiplied by {c:.4g}", case.then(lambda y: y * c)


def offset(case: Case) -> Guesses:
    """Yield a vector that is added at every position, which is estimated."""
    rows = case.last_rows
    if case.computed.shape[-2] < 8:
        return
    right = evaluate(case.call.at(rows))
    vector = (within(case.computed, rows, case.columns).astype(np.float64) - right.value).mean(axis=-2, keepdims=True)
    error = right.error.max(axis=-2, keepdims=True)
    if not np.isfinite(size := abs(vector).astype(np.float64)).all() or not (size > 2 * error).any():
        return

    def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        found = evaluate(case.call.at(rows, columns))
        value = found.value + vector[..., columns]
        return Bounded(value, found.error + error[..., columns] + case.u * abs(value).astype(np.float64))

    yield "the same vector is added at every position, as by another bias", alternative


def place(case: Case) -> str:
    """Return where a result is wrong, if it is right at most of its heads, positions or columns; or an empty string."""
    rows, columns = np.arange(case.computed.shape[-2]), case.columns
    if case.call.dtype == "float64" or not judge(case.call, case.computed).ratio > 100:
        return ""  # near the bound, chance decides which elements are beyond it
    beyond = np.zeros(case.computed.shape, np.bool_)
    for start in range(0, len(columns), 8192):
        part = columns[start : start + 8192]
        expected = evaluate(case.call.at(rows, part))
        beyond[..., part] = bounds.quotient(errors(within(case.computed, rows, part), expected), expected.error) > 1
    axes = {"position": case.computed.ndim - 2, "column": case.computed.ndim - 1}
    if case.computed.ndim == 4:
        axes = {"head": 1, **({"query": 2, "key": 3} if case.step.name.endswith(("scores", "weights")) else axes)}
    for name, axis in axes.items():
        wrong = np.flatnonzero(beyond.any(axis=tuple({*range(beyond.ndim)} - {axis})))
        n = int(beyond.shape[axis])
        if len(wrong) == 1 < n:
            return f"only {name} {wrong[0]} of {n} is wrong"
        if 0 < 2 * len(wrong) <= n and wrong[-1] - wrong[0] + 1 == len(wrong):
            return f"only {name}s {wrong[0]} to {wrong[-1]} of {n} are wrong"
    return ""


FUNCTIONS = (other_scope, simple, result_rounded, dropout, another_result, position, limited)
LAST = (factor, offset, not_finite)

__all__ = ["FUNCTIONS", "LAST", "place", "result_rounded"]
