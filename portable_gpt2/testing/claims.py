"""Run an op on a backend, hold its result to a bound, and record the largest ratio of error to bound.

A failed claim has its facts, for the report of `portable_gpt2.testing.check`: see `facts`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np

from ..numerics.bounds import FORMATS, Bounded, distance, host_dtype, quotient
from . import facts


def place(backend: Any) -> str:
    """Return the name of a backend and of the device that it puts arrays on, if it was given one: ``jax-cuda:0``."""
    if backend.default_device is None:
        return str(backend.name)
    return f"{backend.name}-{next(n for n, device in backend.devices().items() if device == backend.default_device)}"


def compute(op: Callable[..., Any], backend: Any, *arrays: np.ndarray | None, **options: Any) -> np.ndarray:
    """Run an op on NumPy arrays through a backend, and check that the op does not change them."""
    call = facts.Call(op, backend, arrays, options)
    facts.keep(call)
    given = [None if a is None else backend.from_numpy(a) for a in arrays]
    with np.errstate(all="ignore"):
        result = backend.to_numpy(op(*given, **options))
    facts.keep(dataclasses.replace(call, result=result))
    for a, x in zip(arrays, given, strict=True):
        assert a is None or backend.to_numpy(x).tobytes() == a.tobytes(), f"{op.__name__} changed its argument"
    found: np.ndarray = result
    return found


def forms(op: Any, backend: Any, *, compiled: bool = False, **options: Any) -> dict[str, Callable[..., Any]]:
    """Return the ways to run an op, by name: its kernel, its definition, and both compiled if the backend compiles."""
    found = {"kernel": op, "reference": op.reference}
    if compiled and backend.compiles_per_shape:
        for name, form in list(found.items()):
            found[f"compiled {name}"] = _compiled(form, backend, options)
    return found


def _compiled(form: Callable[..., Any], backend: Any, options: dict[str, Any]) -> Callable[..., Any]:
    function = backend.compile(lambda arrays: form(*arrays, **options))

    @functools.wraps(form)
    def call(*arrays: Any, **_: Any) -> Any:
        return function(arrays)

    return call


def assert_within(bounded: Bounded, computed: np.ndarray, op: str, backend: Any, dtype: str, form: str) -> float:
    """Assert that a result is within its bound. Record error / bound, which hypothesis tries to maximise."""
    assert computed.dtype == host_dtype(dtype), f"{form} of {op} returned {computed.dtype} for {dtype}"
    ratio = bounded.ratio(computed)
    record(op, backend, dtype, ratio)
    if hypothesis.currently_in_test_context():
        hypothesis.target(min(ratio, 1e9), label=form)
    if not ratio <= 1:
        error = distance(computed, bounded.value)
        index = _worst(quotient(error, bounded.error))
        x, exact, allowed = (float(a[index]) for a in (computed, bounded.value, bounded.error))
        raise facts.ClaimError(
            f"{form} of {op}, {place(backend)}, {dtype}: the error is {ratio:.3g} times its bound",
            facts.Facts(op, form, dtype, ratio, index, x, exact, allowed, _call_of(computed)),
        )
    return ratio


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


# The largest ratios so far, for the table at the end of a run.

_WORST: dict[tuple[str, str, str], float] = {}


def recorded() -> list[tuple[str, str, str, float]]:
    """Return the ratios that this process recorded, so that another process can record them."""
    return [(*key, ratio) for key, ratio in _WORST.items()]


def record(op: str, backend: Any, dtype: str, ratio: float) -> None:
    """Keep the largest ratio of error to bound, for an op on a backend and its device in a dtype."""
    keep(op, place(backend), dtype, ratio)


def keep(op: str, where: str, dtype: str, ratio: float) -> None:
    """Keep a ratio that another process recorded, if it is the largest."""
    key = (op, where, dtype)
    _WORST[key] = max(ratio, _WORST.get(key, 0.0))


def table() -> list[str]:
    """Return the largest recorded ratios of error to bound as a table, with one line for each op and backend."""
    rows = list(dict.fromkeys((op, backend) for op, backend, _ in sorted(_WORST)))
    head = f"{'op':<19}{'backend':<18}" + "".join(f"{dtype:>10}" for dtype in FORMATS)
    cells = [[_WORST.get((*row, dtype)) for dtype in FORMATS] for row in rows]
    lines = [
        f"{op:<19}{backend:<18}" + "".join(f"{'' if cell is None else format(cell, '.3g'):>10}" for cell in line)
        for (op, backend), line in zip(rows, cells, strict=True)
    ]
    return [head, *lines] if lines else []
