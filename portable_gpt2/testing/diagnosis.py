"""Find the likely cause of a failure: a table of rules over what passes and what fails.

The first rule that knows a cause names it. The rules read an `Evidence`, which has the facts of the failed test and
makes experiments when a rule asks for them: the same call in all forms and in another dtype, the errors of exp, tanh
and log, and each function of the namespace that the definition of the op calls, compared with NumPy's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import numpy as np

import portable_gpt2 as pg

from ..backend import Backend
from ..numerics import bounds, stated
from . import claims, measure
from .facts import Call, Facts
from .operations import OPERATIONS

_FLOAT32_IN_FLOAT64 = (1e6, 1e10)
"""The errors of float32 in units of float64's round-off, 2^29 = 5e8, and some room for a small or large number."""


class Result(NamedTuple):
    """A test that ran: its name, its parameters, the members of `Backend` that it is about, and whether it passed."""

    test: str
    params: dict[str, Any]
    about: frozenset[str]
    passed: bool

    @property
    def function(self) -> str:
        """The name without the parameters."""
        return self.test.partition("[")[0]


class Evidence:
    """The facts of a failure and the results of all tests, and experiments, which are made at most once.

    The result of the test that failed is the last one of `results` at the time when the evidence is created.
    """

    def __init__(
        self,
        backend: Backend,
        results: list[Result],
        *,
        dtype: str = "",
        facts: Facts | None = None,
        call: Call | None = None,
        error: BaseException | None = None,
        message: str = "",
    ) -> None:
        self.backend, self.results, self.result = backend, results, results[-1]
        self.dtype, self.facts, self.call, self.error, self.message = dtype, facts, call, error, message

    def differs_by(self, name: str) -> set[bool]:
        """Return whether the same test passed or failed with another value of one parameter only."""
        mine = {**self.result.params, name: None}
        return {
            each.passed
            for each in self.results
            if each.function == self.result.function
            and each.params.get(name) != self.result.params.get(name)
            and {**each.params, name: None} == mine
        }

    @property
    def level(self) -> str:
        """The level of the test."""
        return self.result.test.partition("/")[0]

    @functools.cached_property
    def suspects(self) -> frozenset[str]:
        """The members of `Backend` that the test is about, without those that have tests of their own, which pass."""
        passed: dict[str, bool] = {}
        for each in self.results:
            if len(each.about) == 1:
                (name,) = each.about
                passed[name] = passed.get(name, True) and each.passed
        return frozenset(name for name in self.result.about if not passed.get(name)) or self.result.about

    @functools.cached_property
    def op(self) -> str:
        """The name of the op that was called last, or an empty text."""
        if self.call is None:
            return ""
        function = self.call.function
        asked = [function, getattr(function, "__wrapped__", function), getattr(function, "func", function)]
        ops = {name: getattr(pg, name) for name in OPERATIONS}
        return next((name for name, op in ops.items() if op in asked or op.reference in asked), "")

    def ratios(self, dtype: str | None = None) -> dict[str, float]:
        """Return the ratio of the error to the bound for each form of the op, in the dtype of the call or in another.

        A form that raises an exception, or whose result has another shape or dtype, has the ratio inf.
        """
        if not self.op or self.call is None:
            return {}
        arrays = self.call.arrays
        if dtype is not None:
            host = bounds.host_dtype(dtype)
            arrays = tuple(a.astype(host) if a is not None and _is_float(a) else a for a in arrays)
        else:
            dtype = next(a.dtype.name for a in arrays if a is not None and _is_float(a))
        bound = OPERATIONS[self.op].bounded(stated(self.backend, dtype), arrays, self.call.options)
        found = {}
        for form in claims.FORMS:
            if claims.has_form(form, getattr(pg, self.op), self.backend):
                y = self._run(form, arrays)
                is_right = y is not None and y.dtype == bounds.host_dtype(dtype) and y.shape == bound.error.shape
                found[form] = bound.ratio(y) if y is not None and is_right else math.inf
        return found

    def _run(self, form: str, arrays: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
        """Return the result of the op in a form, or None if it raises an exception."""
        assert self.call is not None
        function = claims.in_form(form, getattr(pg, self.op), self.backend, **self.call.options)
        try:
            return claims.compute(function, self.backend, *(a if a is None else a.copy() for a in arrays))
        except Exception:  # of the framework, or an argument that was changed
            return None

    @functools.cached_property
    def computed(self) -> dict[str, np.ndarray]:
        """The results of the op in the call's dtype by the kernel and by the definition, as far as there are any."""
        if not self.op or self.call is None:
            return {}
        found = {form: self._run(form, self.call.arrays) for form in ("kernel", "definition")}
        return {form: y for form, y in found.items() if y is not None}

    @functools.cached_property
    def forms(self) -> dict[str, float]:
        """The ratios of all forms of the call."""
        return self.ratios()

    @functools.cached_property
    def wider(self) -> dict[str, float]:
        """The ratios of all forms of the call in float32."""
        return self.ratios("float32")

    def fails(self, *forms: str) -> bool:
        """Return whether all of these forms fail. A form that the backend does not have does not fail."""
        return all(not self.forms.get(form, 0) <= 1 for form in forms)

    def passes(self, *forms: str) -> bool:
        """Return whether the call is one of an op, and none of these forms fails."""
        return bool(self.forms) and all(self.forms.get(form, 0) <= 1 for form in forms)

    @functools.cached_property
    def units(self) -> float:
        """The error of the element in units of the round-off of its magnitude, or 0 if it is not known."""
        if (
            self.facts is None
            or not self.facts.exact
            or self.facts.computed is None
            or self.dtype not in bounds.FORMATS
        ):
            return 0.0
        error = abs(self.facts.computed - self.facts.exact) / abs(self.facts.exact)
        return error / bounds.FORMATS[self.dtype].unit

    @property
    def is_beyond_float32(self) -> bool:
        """Whether float64 lost an element that float32 cannot hold: it became 0 or infinite, and is neither."""
        found = self.facts
        if found is None or not found.exact or found.computed is None:
            return False
        is_tiny, is_huge = abs(found.exact) < 1e-37, abs(found.exact) > 1e38
        return (is_tiny and found.computed == 0) or (is_huge and not math.isfinite(found.computed))

    def measured(self, name: str) -> measure.Measured | None:
        """Return the errors of exp, tanh or log if they are larger than the adapter states; else None."""
        dtype = bounds.computed_in(self.dtype or "float32")
        # Fewer points than in the tests of the functions show which function an op fails by.
        points = None if self.level == "constants" else 4000 if dtype == "float32" else 200
        found = _measured(self.backend, dtype, name, points)
        return None if found.ratio(stated(self.backend, dtype)) <= 1 else found

    @functools.cached_property
    def deviation(self) -> str:
        """The first function of the namespace, in the definition of the op, whose result is not NumPy's; or empty."""
        if not self.op or self.call is None:
            return ""
        return deviation(self.backend, getattr(pg, self.op).reference, self.call)


def _is_float(a: np.ndarray) -> bool:
    return a.dtype.name in bounds.FORMATS


@functools.lru_cache(maxsize=64)
def _measured(backend: Backend, dtype: str, name: str, points: int | None) -> measure.Measured:
    return measure.measure(backend, dtype, name, points)


@functools.lru_cache(maxsize=8)
def _line(backend: Backend) -> str:
    return measure.line(backend)


# Each function of the namespace, compared with NumPy's

_LINEAR = ("matmul", "mean", "sum")
_COMPARED = (
    *_LINEAR,
    *("max", "sqrt", "where", "take", "take_along_axis", "reshape", "matrix_transpose", "astype", "exp", "tanh", "log"),
)


class _Watched:
    """A namespace that compares the results of its functions with those of NumPy in float64."""

    def __init__(self, backend: Backend) -> None:
        self._xp, self._backend, self._found = backend.xp, backend, ""

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._xp, name)
        if name not in _COMPARED:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not self._found and (why := self._difference(name, result, args, kwargs)):
                self._found = why
            return result

        return call

    def _host(self, x: Any) -> Any:
        return self._backend.to_numpy(x) if isinstance(x, self._backend.array_types) else x

    def _difference(self, name: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        given = [self._host(x) for x in args]
        if name == "astype":
            given = given[:1]
        wide = [a.astype(np.float64) if isinstance(a, np.ndarray) and _is_float(a) else a for a in given]
        plain = {key: value for key, value in kwargs.items() if key in ("axis", "keepdims")}
        numpy_one: Any = (lambda x: x) if name == "astype" else getattr(np, name)
        said = f"xp.{name}({_shapes(given)}{''.join(f', {k}={v}' for k, v in plain.items())})"
        with np.errstate(all="ignore"):
            expected = np.asarray(numpy_one(*wide, **plain))
            size = np.asarray(numpy_one(*map(abs, wide), **plain)) if name in _LINEAR else abs(expected)
            computed = np.asarray(self._host(result))
            if computed.shape != expected.shape:
                return f"{said} has shape {list(computed.shape)}, expected {list(expected.shape)}"
            format = bounds.FORMATS.get(computed.dtype.name)
            room = 1e3 * (format.unit * size + format.smallest) if format else 0.0
            same = (computed == expected) | ((computed != computed) & np.isnan(expected))
            wrong = ~same & ~(abs(computed.astype(np.float64) - expected) <= room)
        if not wrong.any():
            return ""
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        at = f"element {list(index)} of {said}" if index else said
        return f"{at} is {float(computed[index])!r}, expected {float(expected[index])!r}"


def _shapes(given: list[Any]) -> str:
    """Return the arguments of a call, with the dtype and shape of an array."""
    return ", ".join(f"{a.dtype.name} {list(a.shape)}" if isinstance(a, np.ndarray) else repr(a) for a in given)


def deviation(backend: Backend, function: Callable[..., Any], call: Call) -> str:
    """Return which function of the namespace is wrong when a function is called; empty if none is."""
    watched = _Watched(backend)
    given = [None if a is None else backend.from_numpy(a) for a in call.arrays]
    owner = pg.backend_of(next(x for x in given if x is not None))
    with _replaced(owner, "xp", watched), contextlib.suppress(Exception), np.errstate(all="ignore"):
        function(*given, **call.options)
    return watched._found


@contextlib.contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Hide an attribute of a class by one of the object, within a ``with`` block."""
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)


# The rules, the most specific first. Each returns a diagnosis, or None.


def _not_deterministic(found: Evidence) -> str | None:
    if isinstance(found.error, hypothesis.errors.Flaky):
        return (
            "the same input gave another result the second time. Look for memory that is written to after it was "
            "returned, such as a donated buffer or a shared array."
        )
    return None


def _absent(found: Evidence) -> str | None:
    """Name a function that the namespace does not have."""
    error = found.error
    if isinstance(error, AttributeError) and error.obj is found.backend.xp:
        return (
            f"the namespace has no {error.name}. The docstring of Backend.xp lists the functions that `xp` must have."
        )
    return None


def _float64_in_float32(found: Evidence) -> str | None:
    low, high = _FLOAT32_IN_FLOAT64
    if found.dtype != "float64" or not (low <= found.units <= high or found.is_beyond_float32):
        return None
    guilty = [name for name in measure.FUNCTIONS if (errors := found.measured(name)) and errors.largest >= low]
    if found.fails("kernel") and found.passes("definition"):
        guilty = [f"your kernel {found.op}"]
    names = ", ".join(guilty) or "something"
    return f"float64 errs by about {min(found.units, 2.0**29):.0e} u: {names} is computed in float32."


def _kernel_in_16_bits(found: Evidence) -> str | None:
    is_narrow = found.dtype in ("bfloat16", "float16")
    if is_narrow and found.fails("kernel") and found.passes("definition") and found.wider.get("kernel", math.inf) <= 1:
        return (
            f"your kernel {found.op} rounds to {found.dtype} more than once. Compute in float32 and round the result, "
            "or return NotImplemented for this dtype."
        )
    return None


def _kernel_of_nan(found: Evidence) -> str | None:
    """Name the kernel if it has NaNs at other places than the definition has."""
    places = {form: np.isnan(y.astype(np.float64)) for form, y in found.computed.items()}
    if not {"kernel", "definition"} <= places.keys():
        return None
    kernel, definition = places["kernel"], places["definition"]
    if kernel.shape == definition.shape and np.array_equal(kernel, definition):
        return None
    return (
        f"your kernel {found.op} and the definition are NaN at different places. A result of the kernel is NaN exactly "
        "where that of the definition is."
    )


def _kernel(found: Evidence) -> str | None:
    if found.fails("kernel") and found.passes("definition"):
        return f"the definition of {found.op} passes and the kernel fails: look at your kernel {found.op}."
    return None


def _compiled(found: Evidence) -> str | None:
    if found.passes("kernel", "definition") and any(
        not ratio <= 1 for form, ratio in found.forms.items() if form.startswith("compiled")
    ):
        return f"{found.op} passes, and fails only if it is compiled: look at Backend.compile."
    return None


def _elementary(found: Evidence) -> str | None:
    """Name exp, tanh or log if it errs by more than is stated, and if no form of the op passes that calls it."""
    asked = [name for name in measure.FUNCTIONS if name in found.result.about]
    if not asked and not found.fails("definition"):
        return None
    measured = next(filter(None, map(found.measured, asked or measure.FUNCTIONS)), None)
    if measured is None:
        return None
    name, numerics = measured.function, stated(found.backend, measured.dtype)
    try:
        suggested = measured.suggest(numerics)
    except ValueError as error:
        return f"{error}."
    grows = ", growing with |x|" if name == "exp" and suggested.exp[1] else ""
    return (
        f"{name} errs by up to {measured.largest:.3g} u in {measured.dtype}{grows}. If your framework computes {name} "
        f"in this way, state in the adapter: {_line(found.backend)}."
    )


def _namespace(found: Evidence) -> str | None:
    if found.deviation:
        return f"the definition of {found.op} fails because a function of the namespace does: {found.deviation}."
    return None


def _of_the_namespace(found: Evidence) -> str | None:
    """Name the functions that every expression with a wrong value calls (testing/contract/test_namespace.py)."""
    wrong = [line for line in found.message.splitlines() if re.match(r".* (is|raised|has shape) ", line)]
    called = [set(re.findall(r"xp\.(\w+)\(", line.partition(" is ")[0])) for line in wrong]
    if "namespace" not in found.result.test or not called or not all(called):
        return None
    common = set.intersection(*called) or set.union(*called)
    names = " and ".join(f"xp.{name}" for name in sorted(common))
    return f"look at {names}, which every expression with a wrong value calls. The first one: {wrong[0]}."


def _device(found: Evidence) -> str | None:
    _, _, device = str(found.result.params.get("backend", "")).partition("-")
    if device and found.differs_by("backend") == {True}:
        return f"the result is right on the default device and wrong on {device}: a device is dropped on the way."
    return None


def _changed_argument(found: Evidence) -> str | None:
    if "changed its argument" in found.message:
        return f"{found.op or 'the function'} writes into the memory of its argument: look at your kernel {found.op}."
    return None


def _only_compiled(found: Evidence) -> str | None:
    """Name `compile` if a test fails in its compiled form, and passes as it is."""
    for name, value in found.result.params.items():
        is_compiled = (value is True and "compiled" in name) or "compiled" in str(getattr(value, "__name__", value))
        if is_compiled and True in found.differs_by(name):
            return "the same test passes without compilation: look at Backend.compile."
    return None


def _only_the_kernel(found: Evidence) -> str | None:
    """Name the kernel if a test fails with the kernel, and passes with the definition."""
    if "kernel" in str(found.result.params.get("form", "")) and found.differs_by("form") == {True}:
        return f"the same test passes with the definition: look at your kernel {found.op}".rstrip() + "."
    return None


def _model(found: Evidence) -> str | None:
    """Say which part of the model fails, from the files of the tests that fail."""
    if found.level != "model" or found.result.about:
        return None
    failed = {each.test.partition("::")[0] for each in found.results if not each.passed}
    ran = {each.test.partition("::")[0] for each in found.results}
    if "model/test_logits.py" in failed:
        return (
            "each op passes alone, and the logits of the model are wrong: look for a kernel that is wrong for the "
            "shapes or the memory layouts of the model, and at Backend.split."
        )
    if "model/test_cache.py" in failed:
        return "a single pass is right and a cached one is not: look at Backend.write and at Backend.compile."
    if "model/test_logits.py" in ran:
        return (
            "the logits of `gpt2` are right, and those of the class GPT2 are not: look at Backend.relayout, which only "
            "GPT2 calls, and at Backend.compile, Backend.top_k and Backend.fetch."
        )
    return None


def _member(found: Evidence) -> str | None:
    """Name the members of Backend that a test is about, with the first sentence of what they promise."""
    parts = []
    for name in sorted(found.suspects):
        doc = inspect.getdoc(getattr(Backend, name, None)) or ""
        promise = " ".join(doc.partition("\n\n")[0].split())
        parts.append(f"Backend.{name} ({promise})" if promise else f"Backend.{name}")
    return f"look at {' and at '.join(parts)}" if parts else None


RULES: tuple[Callable[[Evidence], str | None], ...] = (
    _not_deterministic,
    _absent,
    _device,
    _changed_argument,
    _of_the_namespace,
    _float64_in_float32,
    _kernel_in_16_bits,
    _kernel,
    _kernel_of_nan,
    _compiled,
    _elementary,
    _namespace,
    _only_compiled,
    _only_the_kernel,
    _model,
    _member,
)


def diagnose(found: Evidence) -> str:
    """Return the likely cause of a failure, or an empty text."""
    for rule in RULES:
        with contextlib.suppress(Exception):  # a broken backend may break an experiment, too
            if cause := rule(found):
                return cause
    return ""
