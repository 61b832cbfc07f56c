"""Check a backend in this process, and report what failed and why."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..backend import Backend
from ..registry import get_backend, registered
from .report import Ratio, Report, Skipped

LEVELS = ("contract", "constants", "ops", "model", "training")
"""The directories of the tests, in order: each level is the condition of the next."""

_KIT = Path(__file__).parent
_LEFT_OUT = ["terminal", "cacheprovider", "faulthandler", "logging", "warnings"]
_LEFT_OUT += ["unraisableexception", "threadexception"]  # these collect all garbage five times
_MODULES = f"{__package__}."

Progress = Callable[[str, int, int], None]


class Interrupted(KeyboardInterrupt):
    """The user ended a check before its last test. `report` has the results of the tests that ran."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.stopped)
        self.report = report


def check(
    backend: str | Backend,
    *,
    level: str = "training",
    device: str | None = None,
    only: str = "",
    examples: int | None = None,
    max_failures: int | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check that a backend keeps every promise on which the portable code relies.

    The tests are those of ``pytest --pyargs portable_gpt2.testing``, level by level. Each level is the condition of the
    next: after the first level with a failure, no further level runs.

    Parameters
    ----------
    backend : str or Backend
        The name of a backend that is installed, or a backend itself, which needs no entry point.
    level : str
        The last level that runs: ``contract`` (single functions and members of `Backend`), ``constants`` (the errors of
        exp, tanh and log), ``ops`` (every op, within the derived bound of its error), ``model`` (logits and texts), or
        ``training`` (gradients, losses, and runs that are resumed).
    device : str, optional
        The device to check; unless given, the default device, and the properties of the ops on each accelerator.
    only : str
        Run only the tests whose name, file or level contains this text; ``or``, ``and`` and ``not`` combine texts, as
        in the option ``-k`` of pytest.
    examples : int, optional
        The number of examples for each property; 50 unless given.
    max_failures : int, optional
        The number of failures after which the run ends; unless given, all tests of a level run.
    expected_failures : mapping from str to str, optional
        The reasons of failures that are known, by the name of the test, with or without its parameters in brackets. A
        test that is expected to fail and passes counts as a failure.
    progress : callable, optional
        A function that is called after each test with the level, the number of tests so far, and the number of tests.

    Returns
    -------
    Report
        What passed, what failed and why, and the largest errors. Its `ok` is False if a test failed.

    Raises
    ------
    ValueError
        If there is no such level or device, or if an expected failure names a test that does not exist.
    ImportError
        If the backend is not installed, or if pytest, hypothesis or python-flint is missing (extra ``testing``).
    Interrupted
        If Ctrl-C ends the check, or `progress` raises a KeyboardInterrupt. The exception has the report so far.

    Examples
    --------
    >>> from portable_gpt2 import testing
    >>> report = testing.check("numpy", level="contract")
    >>> report.ok, [level.name for level in report.levels]
    (True, ['contract'])
    """
    _require("pytest", "hypothesis", "flint")
    if level not in LEVELS:
        raise ValueError(f"there is no level {level!r}; the levels are {', '.join(LEVELS)}")
    found = get_backend(backend, device)
    with registered(found), _temporary_hypothesis_directory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = ["-k", only] if only else []
        options += [f"--examples={examples}"] if examples else []
        options += [f"--maxfail={max_failures}"] if max_failures else []
        return _run(found, level, options, dict(expected_failures or {}), progress or (lambda *_: None))


def _run(backend: Backend, level: str, options: list[str], expected: dict[str, str], progress: Progress) -> Report:
    """Run pytest in this process, independently of the configuration and the working directory of the caller."""
    import pytest

    from . import claims, plugin
    from .observer import Observer

    names = LEVELS[: LEVELS.index(level) + 1]
    observer = Observer(backend, expected, progress)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        room = enter(tempfile.TemporaryDirectory())
        empty = Path(room, "pytest.ini")
        empty.write_text("[pytest]\n")
        args = [f"--config-file={empty}", f"--rootdir={room}", "--noconftest", "--import-mode=importlib"]
        args += ["--capture=sys", *(f"-pno:{name}" for name in _LEFT_OUT)]
        args += [f"--backend={backend.name}", f"--level={level}", *options]
        # With expected failures, the tests of all levels are collected, so that an unknown name can be told.
        directories = [_KIT / name for name in (LEVELS if expected else names)]
        args += [str(directory) for directory in directories if directory.is_dir()]
        enter(_environment(PYTEST_ADDOPTS=None, PYTEST_PLUGINS=None, HYPOTHESIS_PROFILE=None))
        enter(_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"))
        enter(_test_modules_aside())
        enter(plugin.given(backend))
        ratios = enter(claims.recording())
        status = pytest.main(args, plugins=[plugin, observer])
        observer.raise_problems(status)
        failures = tuple(observer.explained())
        found = tuple(Ratio(*key, ratio) for key, ratio in sorted(ratios.items()))
    ran = tuple(observer.levels[name] for name in names if name in observer.levels)
    left = names[names.index(ran[-1].name) + 1 :] if ran else ()
    stopped = f"Level {ran[-1].name} failed, so {_listed(left)} did not run." if left and failures else ""
    if observer.is_interrupted:
        stopped = f"The check was interrupted after {observer.progress()}."
    skipped = tuple(Skipped(reason, n) for reason, n in observer.skipped.most_common())
    devices = tuple(observer.devices)
    report = Report(backend.name, devices, ran, failures, found, skipped, stopped, observer.is_interrupted)
    if report.interrupted:
        raise Interrupted(report)
    return report


def _listed(names: tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _require(*modules: str) -> None:
    """Check that the packages of the extra are installed."""
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        raise ImportError(f"checking a backend needs {', '.join(missing)}: pip install 'portable-gpt2[testing]'")


@contextlib.contextmanager
def _temporary_hypothesis_directory() -> Iterator[None]:
    """Keep the caller's directory of hypothesis, which writes to a temporary one here. The plugin keeps its profile."""
    from hypothesis import configuration

    directory = getattr(configuration, "__hypothesis_home_directory", None)
    with tempfile.TemporaryDirectory() as room:
        configuration.set_hypothesis_home_dir(room)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(directory)


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables, or remove those whose value is None, within a ``with`` block."""
    before = {name: os.environ.get(name) for name in values}

    def put(name: str, value: str | None) -> None:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    try:
        for name, value in values.items():
            put(name, value)
        yield
    finally:
        for name, value in before.items():
            put(name, value)


@contextlib.contextmanager
def _test_modules_aside() -> Iterator[None]:
    """Import the test files again, because hypothesis reads its settings when a test is defined; then forget them."""
    is_test = re.compile(rf"{re.escape(_MODULES)}\w+\.test_\w+")

    def take() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if is_test.fullmatch(name)}

    before = take()
    try:
        yield
    finally:
        for name in take():
            package, _, module = name.rpartition(".")
            vars(sys.modules[package]).pop(module, None)
        sys.modules.update(before)
