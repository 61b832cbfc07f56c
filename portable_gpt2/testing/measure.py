"""Measure the errors of exp, tanh and log on a backend, and suggest the errors that its adapter should state."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..numerics import Numerics, bounds, stated
from . import claims

FUNCTIONS = ("exp", "tanh", "log")

_EXACT = {"exp": bounds.exponential, "tanh": bounds.hyperbolic_tangent, "log": bounds.logarithm}
_LEAST = 2.0  # the default of `Numerics`, in units of u: nothing less is suggested
_MARGIN = 1.2  # other points may err by more: NumPy's exp by 3.14 u in 50,000 points, and by 3.57 u in all of float32
_IMPRECISE = 2.0**13  # in units of u: an error that leaves less than half of the bits of float32


class Sample(NamedTuple):
    """The errors of one function, or of an op that calls it, at some points."""

    where: str
    """The function of the namespace, or the op whose kernel calls the function."""
    x: np.ndarray
    """The points [n], in float64."""
    error: np.ndarray
    """The relative errors [n] in units of u."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The errors of exp, tanh or log on a backend, in units of u.

    Parameters
    ----------
    backend : Backend
        The backend, on whose device the errors were measured.
    dtype : str
        The dtype: float32, or float64. The 16-bit dtypes are computed in float32.
    function : str
        The function: exp, tanh or log.
    samples : list of Sample
        The errors of the function of the namespace; for exp, also of softmax and attention.
    """

    backend: Any
    dtype: str
    function: str
    samples: list[Sample]

    @property
    def largest(self) -> float:
        """The largest error."""
        return max(float(sample.error.max()) for sample in self.samples)

    def ratio(self, numerics: Numerics) -> float:
        """Return the largest ratio of an error to the stated one."""
        return max(float(np.max(sample.error / self._allowed(sample.x, numerics))) for sample in self.samples)

    def least_ratio(self, numerics: Numerics) -> float:
        """Return the largest ratio of an error to the stated one, of the points at which more than half is stated.

        If the stated error is a constant, this is `ratio`. If it grows with abs(x), these are the points far from 0.
        """
        allowed = [self._allowed(sample.x, numerics) for sample in self.samples]
        most = max(float(a.max()) for a in allowed)
        far = zip(self.samples, allowed, strict=True)
        return max(float(np.max((sample.error / a)[2 * a >= most], initial=0)) for sample, a in far)

    def _allowed(self, x: np.ndarray, numerics: Numerics) -> np.ndarray:
        c0, c1 = numerics.exp if self.function == "exp" else (getattr(numerics, self.function), 0.0)
        allowed: np.ndarray = c0 + c1 * abs(x)
        return allowed

    def holds(self, numerics: Numerics) -> bool:
        """Return whether every error is at most the stated one, and the largest more than a hundredth of it."""
        return self.ratio(numerics) <= 1 and self.least_ratio(numerics) >= 0.01

    def suggest(self, stated: Numerics | None = None) -> Numerics:
        """Return errors to state, rounded up: those of `stated`, with that of this function replaced.

        The error of exp is a constant, unless the measured error grows with abs(x).

        Raises
        ------
        ValueError
            If the function is computed in a lower precision than its dtype, such as float64 in float32. No error can
            be stated then, because the results do not have the precision of the dtype.
        """
        if self.largest > _IMPRECISE:
            # In float32, exp(-200) is 0 and log(1 + 1e-9) is log(1). Elsewhere the error shows the precision.
            at = [sample.x >= 2 if self.function == "log" else abs(sample.x) <= 1 for sample in self.samples]
            near = max(float(np.max(s.error[chosen], initial=0)) for s, chosen in zip(self.samples, at, strict=True))
            said = (
                f"{self.function} of {self.dtype} errs by {near or self.largest:.2g} u on {claims.place(self.backend)}"
            )
            computed = "float32" if self.dtype == "float64" and near > 2**24 else "a lower precision"
            raise ValueError(
                f"{said}, with u of {self.dtype}: it is computed in {computed}. This is a failure of precision, and "
                f"not an error that an adapter may state. Compute it in {self.dtype}, or remove {self.dtype} from the "
                "adapter's dtypes"
            )
        found: Any = self._exp() if self.function == "exp" else _up(self.largest)
        return dataclasses.replace(stated or Numerics(), **{self.function: found})

    def _exp(self) -> tuple[float, float]:
        if not any(map(_grows, self.samples)):
            return _up(self.largest), 0.0
        x, error = (np.concatenate(each) for each in ([s.x for s in self.samples], [s.error for s in self.samples]))
        c0 = _up(float(np.max(error[abs(x) <= 1], initial=0)))
        slope = float(np.max((error - c0)[abs(x) > 1] / abs(x[abs(x) > 1])))
        return c0, math.ceil(4 * slope) / 4


def _up(error: float) -> float:
    """Return an error with a margin, rounded up to a multiple of 1/2."""
    return max(_LEAST, math.ceil(2 * _MARGIN * error) / 2)


def _grows(sample: Sample) -> bool:
    """Return whether the errors far from 0 are clearly larger than those near 0."""
    size = abs(sample.x)
    near, far = np.quantile(size, [0.25, 0.75])
    return float(sample.error[size >= far].max()) > 1.5 * max(1.0, float(sample.error[size <= near].max()))


def _entry(entry: tuple[str, Numerics]) -> str:
    """Return the code of an entry of `Backend.numerics`, without the errors that are the default."""
    dtype, numerics = entry
    given = {f.name: getattr(numerics, f.name) for f in dataclasses.fields(numerics)}
    changed = ", ".join(f"{name}={value}" for name, value in given.items() if value != getattr(Numerics(), name))
    return f'"{dtype}": Numerics({changed})'


def _points(function: str, dtype: str, n: int) -> np.ndarray:
    """Return points at which the result is a normal number: for exp, negative ones, and a number of positive ones.

    softmax needs exp of negative numbers only, and gelu in the reproducible mode that of positive ones, too.
    """
    random = np.random.default_rng(2)
    unit, smallest, _ = bounds.FORMATS[dtype]
    if function == "exp":
        lowest = np.log(4 * smallest)
        x = np.concatenate([random.uniform(lowest, 0, n), -(10 ** random.uniform(-6, 0, n // 5))])
        x = np.concatenate([x, random.uniform(0, -lowest, n // 5)])
    elif function == "tanh":
        x = np.concatenate([random.uniform(-20, 20, n), 10 ** random.uniform(-6, 0, n)])
    else:
        x = np.concatenate([1 + 10 ** random.uniform(np.log10(unit), 0, n), 10 ** random.uniform(0, 6, n)])
    x = x.astype(dtype)
    found: np.ndarray = x[x != 1]  # log(1) is 0, which has no relative error
    return found


def measure(backend: Any, dtype: str, function: str, points: int | None = None) -> Measured:
    """Measure the error of a function on the device of a backend.

    The exp inside kernels is measured through softmax and attention. In a row of one 0 and numbers so small that their
    sum is lost next to 1, softmax is exp. With the identity matrix as the values, attention is softmax.

    Parameters
    ----------
    backend : Backend
        The backend.
    dtype : str
        The dtype: float32 or float64.
    function : str
        The function: exp, tanh or log.
    points : int, optional
        The number of points; by default 50,000 in float32, and 2,000 in float64.

    Returns
    -------
    Measured

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> from portable_gpt2.testing.measure import measure
    >>> measured = measure(pg.get_backend("numpy"), "float32", "exp")
    >>> bool(2 < measured.largest < 3.6)
    True
    >>> measured.suggest()
    Numerics(exp=(4.0, 0.0), tanh=2.0, log=2.0)
    """
    n = points or (50_000 if dtype == "float32" else 2_000)
    samples = [_sample(function, _points(function, dtype, n), getattr(backend.xp, function), function, backend)]
    if function == "exp":
        samples += _in_kernels(backend, dtype, n)
    return Measured(backend, dtype, function, samples)


def _in_kernels(backend: Any, dtype: str, n: int) -> Iterator[Sample]:
    """Yield the errors of the exp inside softmax, over the last and over the first axis, and inside attention."""
    unit, smallest, _ = bounds.FORMATS[dtype]
    lowest, lost = np.log(4 * smallest), np.log(unit / n) - 1
    row = np.concatenate([[0], np.random.default_rng(3).uniform(lowest, lost, 1000)]).astype(dtype)
    yield _sample("softmax", row, ops.softmax, "exp", backend)
    yield _sample("softmax over the first axis", row[:, None], ops.softmax, "exp", backend, axis=0)
    one, identity = np.ones((1, 1), dtype), np.eye(len(row), dtype=dtype)
    computed = claims.compute(ops.attention, backend, one, row[:, None], identity, scale=1.0)
    yield Sample("attention", row.astype(np.float64), _errors(computed[0], row, "exp"))


def _sample(where: str, x: np.ndarray, compute: Any, function: str, backend: Any, **options: Any) -> Sample:
    computed = claims.compute(compute, backend, x, **options)
    return Sample(where, x.astype(np.float64).reshape(-1), _errors(computed, x, function).reshape(-1))


def _errors(computed: np.ndarray, x: np.ndarray, function: str) -> np.ndarray:
    """Return relative errors in units of u."""
    exact = _EXACT[function](x)
    unit = bounds.FORMATS[x.dtype.name].unit
    error: np.ndarray = bounds.distance(computed, exact) / abs(exact).astype(np.float64) / unit
    return error


def line(backend: Any) -> str:
    """Return the line for an adapter that states the errors of all functions on the device of a backend.

    Statements that hold are kept, and so are those about other kinds of devices. A function that lacks the precision of
    its dtype is left out.
    """
    kind = backend.device(backend.from_numpy(np.zeros(1, np.float32))).partition(":")[0]
    found = {each: dict(of_dtype) for each, of_dtype in backend.numerics.items()}
    for dtype in ("float32", "float64"):
        numerics = stated(backend, dtype)
        with contextlib.suppress(TypeError, ValueError):  # the backend has no float64, or it has not its precision
            backend.from_numpy(np.zeros(1), dtype)
            for measured in (measure(backend, dtype, function) for function in FUNCTIONS):
                numerics = numerics if measured.holds(numerics) else measured.suggest(numerics)
            if numerics != stated(backend, dtype):
                found.setdefault(kind, {})[dtype] = numerics
    kinds = (f'"{each}": {{{", ".join(map(_entry, of_dtype.items()))}}}' for each, of_dtype in found.items())
    return f"numerics = {{{', '.join(kinds)}}}"


def assert_stated(measured: Measured, numerics: Numerics) -> None:
    """Assert that errors are at most those that are stated, and that more than a hundredth of them was seen.

    The message says what was measured and has the line to paste into the adapter, or says that the dtype's precision is
    missing.
    """
    claims.record(measured.function, measured.backend, measured.dtype, measured.ratio(numerics))
    if measured.holds(numerics):
        return
    try:
        measured.suggest(numerics)
        said = f"State in the adapter: {line(measured.backend)}"
    except ValueError as error:
        said = str(error)
    seen = ", ".join(f"{float(sample.error.max()):.3g} u in {sample.where}" for sample in measured.samples)
    least = measured.least_ratio(numerics)
    loose = f", which is {1 / least if least else math.inf:.0f} times the largest error seen" if least < 0.01 else ""
    raise AssertionError(
        f"{measured.function}, {claims.place(measured.backend)}, {measured.dtype}: stated is an error of "
        f"{getattr(numerics, measured.function)} u{loose}; measured: {seen}. {said}"
    )
