"""Run an op on a backend, hold its result to a bound, and record the largest ratio of error to bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np

from ..numerics.bounds import FORMATS, Bounded, host_dtype


def place(backend: Any) -> str:
    """Return the name of a backend and of the device that it puts arrays on, if it was given one: ``jax-cuda:0``."""
    if backend.default_device is None:
        return str(backend.name)
    return f"{backend.name}-{next(n for n, device in backend.devices().items() if device == backend.default_device)}"


def compute(op: Callable[..., Any], backend: Any, *arrays: np.ndarray | None, **options: Any) -> np.ndarray:
    """Run an op on NumPy arrays through a backend, and check that the op does not change them."""
    given = [None if a is None else backend.from_numpy(a) for a in arrays]
    with np.errstate(all="ignore"):
        result = backend.to_numpy(op(*given, **options))
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
    assert ratio <= 1, f"{form} of {op}, {place(backend)}, {dtype}: the error is {ratio:.3g} times its bound"
    return ratio


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
