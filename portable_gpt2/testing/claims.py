"""Run an op on a backend in each of its forms, hold the results to a bound, and record the largest error / bound.

A form is a way to run an op: by the backend's kernel, or by the definition in `portable_gpt2.ops`; and either of them
as it is, or compiled by the backend. A failed claim has its facts, for the report of `portable_gpt2.testing.check`: see
`facts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis
import numpy as np

from ..numerics.bounds import FORMATS, Bounded, distance, exact, host_dtype, quotient
from . import facts
from .report import Ratio, ratio_table

FORMS = ("kernel", "definition", "compiled kernel", "compiled definition")


def place(backend: Any) -> str:
    """Return the name of a backend and of the device that it puts arrays on, if it was given one: ``jax-cuda:0``."""
    if backend.default_device is None:
        return str(backend.name)
    return f"{backend.name}-{next(n for n, device in backend.devices().items() if device == backend.default_device)}"


# Forms of an op


def has_form(form: str, op: Any, backend: Any) -> bool:
    """Return whether a backend can run an op in a form: it has a kernel for the op, and it compiles."""
    is_kernel, is_compiled = form.endswith("kernel"), form.startswith("compiled")
    return (not is_kernel or op.__name__ in backend.kernels) and (not is_compiled or backend.compiles_per_shape)


def in_form(form: str, op: Any, backend: Any, **options: Any) -> Callable[..., Any]:
    """Return a function of arrays that runs an op in a form, with the options that are given here."""
    # If there is no kernel, a call of the op runs the definition.
    function = op.reference if form.endswith("definition") and op.__name__ in backend.kernels else op
    if form.startswith("compiled"):
        return _compiled(function, backend, tuple(options.items()))
    return functools.partial(function, **options) if options else function


@functools.cache
def _compiled(function: Callable[..., Any], backend: Any, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Compile an op or its definition with some options, once: another call with the same shapes then takes no time."""
    with_options = functools.partial(function, **dict(options)) if options else function
    compiled = backend.compile(lambda arrays: with_options(*arrays))
    call = functools.wraps(function)(lambda *arrays, **_: compiled(arrays))
    call.__wrapped__ = with_options  # a script that repeats the call needs the options
    return call


def compute(function: Callable[..., Any], backend: Any, *arrays: np.ndarray | None, **options: Any) -> np.ndarray:
    """Run a function on NumPy arrays through a backend, and check that the function does not change them."""
    call = facts.Call(function, backend, arrays, options)
    facts.keep(call)
    before = [None if a is None else a.tobytes() for a in arrays]  # the backend may share the memory
    given = [None if a is None else backend.from_numpy(a) for a in arrays]
    with np.errstate(all="ignore"):
        result = backend.to_numpy(function(*given, **options))
    facts.keep(dataclasses.replace(call, result=result))
    for bits, x in zip(before, given, strict=True):
        assert bits is None or backend.to_numpy(x).tobytes() == bits, "the function changed its argument"
    found: np.ndarray = result
    return found


class Results(dict[str, np.ndarray]):
    """The results of one call of an op, by form."""

    def __init__(self, op: Any, backend: Any, arrays: tuple[np.ndarray | None, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.backend, self.arrays, self.options = op, backend, arrays, options
        self.dtype: str = next(a.dtype.name for a in arrays if a is not None and a.dtype.name in FORMATS)
        self.calls: dict[str, facts.Call] = {}

    def add(self, form: str, function: Callable[..., Any]) -> None:
        """Call a function, and keep its result as that of a form."""
        try:
            self[form] = compute(function, self.backend, *self.arrays, **self.options)
        except AssertionError as error:
            raise AssertionError(f"{form} of {self.op.__name__}: {error}") from None
        if (call := facts.last_call()) is not None:
            self.calls[form] = call


def results(op: Any, backend: Any, *arrays: np.ndarray | None, compiled: bool = False, **options: Any) -> Results:
    """Run an op on NumPy arrays in each form that the backend has; in compiled forms only if `compiled` is true."""
    found = Results(op, backend, arrays, options)
    for form in FORMS:
        if form.startswith("compiled") and has_form(form, op, backend) and compiled:
            found.add(form, in_form(form, op, backend, **options))
        elif not form.startswith("compiled") and has_form(form, op, backend):
            found.add(form, in_form(form, op, backend))  # `compute` passes the options, so that a script can show them
    return found


# Claims about results


def assert_within(bounded: Bounded, results: Results) -> dict[str, float]:
    """Assert that the result of each form is within its bound. Return the largest error / bound of each form.

    The ratios are recorded, and hypothesis tries to maximise them. The error's message has the ratio of every form, and
    the worst element of the worst form.
    """
    op, dtype = results.op.__name__, results.dtype
    ratios = {}
    for form, computed in results.items():
        assert computed.dtype == host_dtype(dtype), f"{form} of {op} returned {computed.dtype} for {dtype}"
        ratios[form] = bounded.ratio(computed)
        record(op, results.backend, dtype, ratios[form])
        if hypothesis.currently_in_test_context():
            hypothesis.target(min(ratios[form], 1e9), label=form)
    worst = max(ratios, key=lambda form: ratios[form])
    if not ratios[worst] <= 1:
        raise _out_of_bounds(bounded, results, ratios, worst)
    return ratios


def _out_of_bounds(bounded: Bounded, results: Results, ratios: Mapping[str, float], form: str) -> facts.ClaimError:
    """Return the error of a claim that fails, at least in `form`."""
    op, computed = results.op.__name__, results[form]
    index = _worst(quotient(distance(computed, bounded.value), bounded.error))
    x, true, allowed = (float(a[index]) for a in (computed, bounded.value, bounded.error))
    others = "".join(
        f"; {other} {'fails' if ratio > 1 else 'passes'}, with {ratio:.3g} times"
        for other, ratio in ratios.items()
        if other != form
    )
    return facts.ClaimError(
        f"{form} of {op}, {place(results.backend)}, {results.dtype}: the error is {ratios[form]:.3g} times its bound: "
        f"element {list(index)} is {x!r}, exactly {true!r}, with an error of up to {allowed:.3g}{others}",
        facts.Facts(
            op, form, results.dtype, ratios[form], index, x, true, allowed, results.calls.get(form), dict(ratios)
        ),
    )


def assert_same(computed: np.ndarray, expected: np.ndarray, what: str, dtype: str = "", form: str = "") -> None:
    """Assert that two arrays have the same shape, dtype and bits; NaNs are equal. `what` names the function."""
    assert computed.shape == expected.shape, f"{what} has shape {computed.shape}, expected {expected.shape}"
    assert computed.dtype == expected.dtype, f"{what} has dtype {computed.dtype}, expected {expected.dtype}"
    differs = (computed != expected) & ~((computed != computed) & (expected != expected))
    if differs.any():
        index = _worst(differs)
        x, y = (each[index] for each in (computed, expected))
        found = facts.Facts(what, form, dtype, None, index, float(x), float(y), 0.0, _call_of(computed))
        raise facts.ClaimError(f"{what}: element {list(index)} is {x}, expected {y}", found)


def _worst(badness: np.ndarray) -> tuple[int, ...]:
    """Return the index of the largest element."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(badness)), badness.shape))


def _call_of(computed: np.ndarray) -> facts.Call | None:
    """Return the last call, if an array is its result."""
    call = facts.last_call()
    return call if call is not None and call.result is computed else None


def assert_tight(ratios: dict[str, float], least: float = 0.01) -> None:
    """Assert that the largest error / bound of each form is at least 1/100, so that the bound means something."""
    for form, ratio in ratios.items():
        assert ratio >= least, f"{form}: the bound is {1 / ratio if ratio else np.inf:.0f} times the worst error"


def assert_agree(one: Any, other: Any, error: np.ndarray, said: str = "the sum of the bounds") -> None:
    """Assert that two results, by form, differ by at most a sum of two bounds. `said` names it in the message."""
    for form in one:
        with np.errstate(invalid="ignore"):
            ratio = Bounded(exact(one[form]), error).ratio(other[form])
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times {said}"


# The largest ratios so far, for the table at the end of a run.

_WORST: dict[tuple[str, str, str], float] = {}


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple[str, str, str], float]]:
    """Keep the ratios of a ``with`` block apart, and return them by op, place and dtype."""
    before = dict(_WORST)
    _WORST.clear()
    try:
        yield _WORST
    finally:
        _WORST.clear()
        _WORST.update(before)


def recorded() -> list[tuple[str, str, str, float]]:
    """Return the ratios that this process recorded, so that another process can record them."""
    return [(*key, ratio) for key, ratio in _WORST.items()]


def record(op: str, backend: Any, dtype: str, ratio: float) -> None:
    """Keep the largest ratio of error to bound, for an op on a backend and its device in a dtype."""
    keep(op, place(backend), dtype, ratio)


def keep(op: str, where: str, dtype: str, ratio: float) -> None:
    """Keep a ratio that another process recorded, if it is the largest.

    It is kept as a float, because a worker of pytest-xdist cannot send NumPy's float64, and crashes at its end.
    """
    key = (op, where, dtype)
    _WORST[key] = max(float(ratio), _WORST.get(key, 0.0))


def table() -> list[str]:
    """Return the largest recorded ratios of error to bound as a table, with one line for each op and backend."""
    return ratio_table(Ratio(*each) for each in recorded())
