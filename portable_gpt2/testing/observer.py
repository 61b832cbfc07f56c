"""A plugin of pytest that collects, during one run, what the report of a backend needs."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..backend import Backend
from . import facts, plugin, scripts
from .conformance import LEVELS
from .diagnosis import Evidence, Result, diagnose
from .report import Failure, Level

_MOST = 100
"""Diagnoses per report. A backend that is broken everywhere needs no more of them, and each takes a moment."""
_OF_FACTS = ("ratio", "index", "computed", "exact", "allowed")
_IN_EVERY_TEST = {"put", "to_numpy", "device", "dtype", "shape"}


class Observer:
    """What happened in a run: the levels, the failures with their facts, and the reasons of tests that did not run."""

    def __init__(self, backend: Backend, expected: dict[str, str], progress: Callable[[str, int, int], None]) -> None:
        self.levels: dict[str, Level] = {}
        self.skipped: Counter[str] = Counter()
        self.devices: dict[str, None] = {}
        self.is_interrupted = False
        self._backend, self._expected, self._progress = backend, expected, progress
        self._failures: list[tuple[Failure, Evidence, Any]] = []
        self._problems: list[BaseException] = []
        self._level_of: dict[str, str] = {}
        self._results: list[Result] = []
        self._done: set[str] = set()

    # What pytest reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Mark the expected failures."""
        unknown = set(self._expected)
        for item in items:
            for name in {item.originalname, item.name, _name(item)} & set(self._expected):
                unknown.discard(name)
                item.add_marker(pytest.mark.xfail(reason=self._expected[name], strict=True))
        if unknown:
            known = {item.originalname for item in items}
            close = [each for name in unknown for each in difflib.get_close_matches(name.partition("[")[0], known, 1)]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            names = ", ".join(sorted(unknown))
            self._problems.append(ValueError(f"expected_failures: there is no test {names}{hint}"))
            items.clear()

    def pytest_deselected(self, items: list[Any]) -> None:
        """Keep the reasons why a backend does not compute in a dtype."""
        for item in items:
            dtype = _dtype(item)
            if dtype and (reason := plugin.refusal_of(self._backend, dtype)):
                self.skipped[reason] += 1

    def pytest_collection_finish(self, session: Any) -> None:
        """Note the level of each test."""
        self._level_of = {item.nodeid: plugin.level_of(item) or "" for item in session.items}

    def pytest_collectreport(self, report: Any) -> None:
        """Keep an error in a test file, which is a mistake of this package or of an imported framework."""
        if report.failed:
            self._problems.append(RuntimeError(f"{report.nodeid} cannot be imported: {report.longreprtext[-2000:]}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Keep the facts of a failure, as long as the exception and the last call are known."""
        report = yield
        if report.failed or call.when == "call":
            self._results.append(Result(_name(item), _params(item), _members(item), not report.failed))
        if report.failed:
            self._failures.append(self._failure(item, call.excinfo and call.excinfo.value, report))
        if call.when == "call" and "backend" in item.funcargs:
            self.devices[_device(item.funcargs["backend"])] = None
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, and its time."""
        name = self._level_of.get(report.nodeid, "")
        level = self.levels.get(name, Level(name))
        counts = {"seconds": level.seconds + report.duration}
        if report.failed:
            counts["failed"] = level.failed + 1
        elif report.skipped and hasattr(report, "wasxfail"):
            counts["expected"] = level.expected + 1
        elif report.skipped:
            counts["skipped"] = level.skipped + 1
            self.skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            counts["passed"] = level.passed + 1
        self.levels[name] = replace(level, **counts)
        if report.when == "teardown":
            self._done.add(report.nodeid)
            self._progress(name, len(self._done), len(self._level_of))

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        """Note an interruption by the user. After an error in a file, pytest interrupts itself by a subclass."""
        self.is_interrupted = excinfo.type is KeyboardInterrupt

    def pytest_internalerror(self, excinfo: Any) -> None:
        """Keep an error of pytest or of this plugin."""
        self._problems.append(excinfo.value)

    # After the run

    def progress(self) -> str:
        """Return how many of the tests ran."""
        return f"{len(self._done)} of {len(self._level_of)} tests"

    def raise_problems(self, status: int) -> None:
        """Raise the first exception that is not the failure of a test."""
        if self._problems:
            raise self._problems[0]
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not self.is_interrupted:
            raise RuntimeError(f"pytest ended with {status!r}")

    def explained(self) -> Iterator[Failure]:
        """Yield the failures, with a script and a diagnosis."""
        # A function of the namespace that is wrong makes other tests fail, so its own tests come first.
        self._failures.sort(key=lambda each: (LEVELS.index(each[0].level), "namespace" not in each[0].test))
        for i, (failure, evidence, test_script) in enumerate(self._failures):
            script = test_script
            call = evidence.call
            if call is not None and (evidence.facts is not None or not test_script):
                with contextlib.suppress(Exception):  # a broken backend may fail in another way here
                    script = scripts.script(*scripts.smaller(call, evidence.facts)) or test_script
            yield replace(failure, script=script, diagnosis=diagnose(evidence) if i < _MOST else "")

    def _failure(self, item: Any, error: BaseException | None, report: Any) -> tuple[Failure, Evidence, str]:
        backend = item.funcargs.get("backend", self._backend)
        dtype = _dtype(item)
        known = getattr(_first(error), "facts", None)
        call = (known and known.call) or facts.last_call(backend)
        level = plugin.level_of(item) or ""
        evidence = Evidence(
            backend, self._results, dtype=dtype, facts=known, call=call, error=error, message=_message(error, report)
        )
        failure = Failure(
            test=_name(item),
            level=level,
            backend=backend.name,
            device=_device(backend),
            dtype=dtype,
            op=known.op if known else evidence.op,
            form=known.form if known else _form(item),
            catches=(inspect.getdoc(item.obj) or "").partition("\n\n")[0],
            message=_message(error, report),
            **(
                {key: getattr(known, key) for key in ("ratio", "index", "computed", "exact", "allowed")}
                if known
                else {}
            ),
        )
        return failure, evidence, "" if hasattr(item.obj, "hypothesis") else scripts.of_test(item, backend)


def _params(item: Any) -> dict[str, Any]:
    """Return the parameters of a test by name."""
    found: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def _members(item: Any) -> frozenset[str]:
    """Return the members of Backend that a test of the contract is about: those that it names, or else those it uses.

    A test names them by the mark ``about``.
    """
    if marked := frozenset(name for mark in item.iter_markers("about") for name in mark.args):
        return marked
    if plugin.level_of(item) != LEVELS[0]:
        return frozenset()
    members = {name for name, member in vars(Backend).items() if callable(member) and not name.startswith("_")}
    function = item.function
    key = function.__module__, function.__qualname__
    if key not in _USED:  # to find the source of a function takes milliseconds
        _USED[key] = _called(function, set())
    names = {"put" if name == "from_numpy" else name for name in _USED[key] & members}
    return frozenset(names - _IN_EVERY_TEST or names - {"shape"})


_USED: dict[tuple[str, str], set[str]] = {}
"""The attributes of ``backend`` that a test uses, by its module and its name."""


def _called(function: Any, seen: set[Any]) -> set[str]:
    """Return the attributes of ``backend`` that a function uses, or a function of its module that it calls."""
    seen.add(function)
    found = set(re.findall(r"\bbackend\.(\w+)", inspect.getsource(function)))
    for name in function.__code__.co_names:
        other = function.__globals__.get(name)
        if inspect.isfunction(other) and other.__module__ == function.__module__ and other not in seen:
            found |= _called(other, seen)
    return found


def _form(item: Any) -> str:
    """Return the parameter `form` of a test, or an empty text."""
    found = _params(item).get("form", "")
    return found if isinstance(found, str) else str(getattr(found, "__name__", ""))


def _dtype(item: Any) -> str:
    """Return the floating dtype of a test, or an empty text."""
    found = _params(item).get("dtype")
    return found if isinstance(found, str) and found in plugin.DTYPES else ""


def _name(item: Any) -> str:
    """Return the name of a test: its directory, its file, its function and its parameters."""
    return f"{item.path.parent.name}/{item.path.name}::{item.name}"


def _device(backend: Backend) -> str:
    try:
        return backend.device(backend.from_numpy(np.zeros(1, np.float32)))
    except Exception:  # of a backend that cannot even do this, which the tests report
        return "?"


def _first(error: BaseException | None) -> BaseException | None:
    """Return the first exception of a group that is not itself a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _message(error: BaseException | None, report: Any) -> str:
    """Return the text of an exception, with its class and its place unless a test made an assertion."""
    if error is None:
        return str(report.longreprtext)
    if isinstance(error, AssertionError):
        said = str(error).partition("\nassert ")[0]  # an assertion with a message needs no explanation
        return _assertion(error) if said.startswith("assert ") else said or "the assertion failed"
    where, frame = "", error.__traceback__
    while frame is not None:
        where, frame = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}", frame.tb_next
    return f"{type(error).__name__}: {error} ({where})"


_FUNCTION = re.compile(r"<(?:function|built-in function|bound method) ([\w.]+)[^>]*>+")
_ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-f]+")


def _assertion(error: AssertionError) -> str:
    """Return the condition that is not true, as the test has it, and the values that pytest found in it.

    The lines of pytest that only say where a function is from are left out.
    """
    first, *others = str(error).removeprefix("assert ").splitlines()
    values = [re.sub(r"^ \+ +(where|and) +", "", line) for line in others if line.startswith(" +")]
    where = [each for each in values if "(" in each.partition(" = ")[2] and not _FUNCTION.match(each)]
    told = [_ADDRESS.sub("", _FUNCTION.sub(r"\1", line.replace("\\n", " "))) for line in (where or [first])]
    return "\n".join(filter(None, [_condition(error), *told]))


def _condition(error: AssertionError) -> str:
    """Return the source of the condition of an assertion that failed."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    tree = ast.parse(Path(frame.f_code.co_filename).read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return next((ast.unparse(each.test) for each in found if each.lineno <= line <= (each.end_lineno or 0)), "")
