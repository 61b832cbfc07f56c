"""A pytest plugin that runs a test on any backend, in each of its dtypes, on any of its devices.

    pytest --pyargs portable_gpt2.testing --backend mlx
    pytest --pyargs portable_gpt2.testing --backend torch --device cuda:0 --examples 500
    pytest --pyargs portable_gpt2.testing --backend mlx --level ops

A test that takes the fixture `backend` runs once on each backend. With `dtype`, it runs once in each floating dtype
that the backend has, and with `other_dtype`, once in each pair of them. With `form`, it runs an op by its kernel and by
its definition, both as they are and compiled, as far as the backend has these forms. `numerics` returns the errors that
the backend states. Other tests use the fixtures after ``pytest_plugins = ["portable_gpt2.testing.plugin"]`` in their
``conftest.py``.

Tests in files that are marked ``every_device`` also run on accelerators, where they are marked ``gpu``: on those that
``--device`` names, or else on every one that the frameworks report.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import portable_gpt2 as pg

from .. import ops
from ..backend import Backend
from ..numerics import Numerics, stated
from ..registry import known_backends
from . import claims, facts, own_process, strategies
from .conformance import LEVELS

DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = known_backends()
"""The names of all backends, installed or not."""

GIVEN: dict[str, Backend] = {}
"""Backends that `check` was given as objects, by name. They need not be registered."""


@contextlib.contextmanager
def given(backend: Backend) -> Iterator[None]:
    """Run the tests of its name on a backend that is an object, within a ``with`` block."""
    before = dict(GIVEN)
    GIVEN.update({backend.name: backend})
    try:
        yield
    finally:
        GIVEN.clear()
        GIVEN.update(before)


REQUIRED = os.environ.get("PORTABLE_GPT2_REQUIRE", "").split(",")
"""The names of the backends whose tests fail, and are not skipped, if the framework is not installed."""
_STARTED = time.monotonic()
_KIT = Path(__file__).resolve().parent

_LEVEL = pytest.StashKey[str | None]()

PROFILES = {
    "few": {"max_examples": 10, "derandomize": True},
    "fast": {"max_examples": 50, "derandomize": True},
    "thorough": {"max_examples": 10_000},
}
"""The settings of hypothesis, by the value of the environment variable HYPOTHESIS_PROFILE."""


def pytest_addoption(parser: Any) -> None:
    """Add the options."""
    group = parser.getgroup("portable_gpt2", "tests of backends of portable_gpt2")
    names = ",".join(BACKENDS)
    group.addoption("--backend", default="", help=f"run the tests of these backends (default: all, which are {names})")
    group.addoption("--device", default="", help="run the tests of accelerators on these devices, such as cuda:0,cpu:1")
    group.addoption("--level", choices=LEVELS, help="run the tests of every level up to this one, until a level fails")
    group.addoption("--examples", type=int, help="the number of examples for each property (default: 50)")
    group.addoption("--seconds", type=float, help="begin no test after this time")
    group.addoption("--record", help="a file that gets the results, and the largest error / bound, as JSON")


def pytest_configure(config: Any) -> None:
    """Register the marks, and check the options."""
    for line in (
        "gpu: needs an accelerator; runs on every one that the frameworks report, or on those of --device",
        "every_device(*backends): runs on accelerators as well, marked gpu, if it runs on every backend, or on these",
        "own_process: on an accelerator, runs in a process of its own, which it may spoil",
        "about(*names): checks these members of Backend or functions of its namespace; a report names them",
        "op(*names): is about these ops; runs in the form of a kernel only if the backend has a kernel for one of them",
    ):
        config.addinivalue_line("markers", line)
    for name in chosen(config):
        if name not in (*GIVEN, *pg.available_backends(), "none") and config.getoption("--backend"):
            raise pytest.UsageError(f"--backend: {_absence(name)}")
    _load_profile(config, os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def _load_profile(config: Any, name: str) -> None:
    """Load a profile of hypothesis until the run ends. Its name is not one that others may have registered."""
    if name not in PROFILES:
        raise pytest.UsageError(f"HYPOTHESIS_PROFILE is {name!r}; choose one of {', '.join(PROFILES)}")
    chosen: dict[str, Any] = {**PROFILES[name], "deadline": None, "report_multiple_bugs": False}
    if examples := config.getoption("--examples"):
        chosen["max_examples"] = examples
    config.add_cleanup(functools.partial(hypothesis.settings.load_profile, current_profile()))
    full_name = f"portable_gpt2, {chosen['max_examples']} examples, {name}"
    hypothesis.settings.register_profile(full_name, **chosen)
    hypothesis.settings.load_profile(full_name)


def current_profile() -> str:
    """Return the name of the current profile of hypothesis."""
    name: str = hypothesis.settings.get_current_profile_name()
    return name


def _absence(name: str) -> str:
    """Return the message of the exception that `get_backend` raises for a name."""
    try:
        pg.get_backend(name)
    except pg.BackendNotInstalled as error:
        return str(error)
    return f"{name} is not installed"


def chosen(config: Any) -> list[str]:
    """Return the names of the backends that `--backend` chooses."""
    return [name for name in config.getoption("--backend").split(",") if name] or BACKENDS


def load(name: str) -> Backend:
    """Return a backend by name, or skip the test.

    The test fails instead if the environment variable PORTABLE_GPT2_REQUIRE, a comma-separated list of backends, names
    this backend.
    """
    if name in GIVEN:
        return GIVEN[name]
    if name not in pg.available_backends():
        report: Any = pytest.fail if name in REQUIRED else pytest.skip
        report(f"backend {name} is not installed")
    return pg.get_backend(name)


def devices(names: list[str], wanted: str) -> list[tuple[str, str]]:
    """Return the pairs of a backend and a device, of some backends, that the tests of accelerators run on.

    Raises
    ------
    pytest.UsageError
        If none of the backends has a device that `wanted`, a comma-separated list, names.
    """
    has = {name: _known_devices(name) for name in names if name in GIVEN or name in pg.available_backends()}
    asked = [device for device in wanted.split(",") if device]
    if not asked:
        return [(name, device) for name, known in has.items() for device in known if not device.startswith("cpu")]
    if unknown := [device for device in asked if not any(device in known for known in has.values())]:
        here = "; ".join(f"{name} has {', '.join(known)}" for name, known in has.items())
        raise pytest.UsageError(f"--device: no framework has {', '.join(unknown)}; {here}")
    return [(name, device) for device in asked for name, known in has.items() if device in known]


def _known_devices(name: str) -> list[str]:
    """Return the devices of a backend; none if `check` was given one device, which all tests then use."""
    if name in GIVEN and GIVEN[name].default_device is not None:
        return []
    return list(load(name).devices())


@functools.cache
def refusal_of(backend: Backend, dtype: str) -> str | None:
    """Return why a backend does not compute in a dtype, or None if it does."""
    import numpy as np

    if dtype not in backend.dtypes:
        return f"{backend.name} has no {dtype}"
    try:
        backend.from_numpy(np.zeros(1), dtype)
    except TypeError as error:  # JAX has float64 only with JAX_ENABLE_X64=1
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    """Give a test its backends, and its dtypes if it takes the fixture `dtype`."""
    marks = list(metafunc.definition.iter_markers("parametrize"))
    is_chosen = any("backend" in mark.args[0] for mark in marks)
    if "backend" not in metafunc.fixturenames or is_chosen:
        return
    names = chosen(metafunc.config)
    every = metafunc.definition.get_closest_marker("every_device")
    params: list[Any] = [name for name in names if name in GIVEN or name in BACKENDS]
    if every is not None:
        places = devices(
            [name for name in every.args or params if name in params], metafunc.config.getoption("--device")
        )
        params += [pytest.param("-".join(place), marks=pytest.mark.gpu) for place in places]
    metafunc.parametrize("backend", params, indirect=True, scope="module")


def backend_param(item: Any) -> str | None:
    """Return the name of the backend that a test is parametrized with, without its device, or None."""
    param = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    return str(param).partition("-")[0] if param else None


def _has_what_it_needs(item: Any) -> bool:
    """Return whether the backend of a test has its dtypes and its form. The backend's framework is imported."""
    name, params = backend_param(item), getattr(getattr(item, "callspec", None), "params", {})
    dtypes = [params[key] for key in ("dtype", "other_dtype") if params.get(key) in DTYPES]
    form = params.get("form") if params.get("form") in claims.FORMS else None
    if name is None or not (dtypes or form) or (name not in GIVEN and name not in pg.available_backends()):
        return True
    if len(set(dtypes)) < len(dtypes):
        return False
    of = [name for mark in item.iter_markers("op") for name in mark.args] or ops.__all__
    return all(refusal_of(load(name), dtype) is None for dtype in dtypes) and (
        form is None or any(claims.has_form(form, getattr(ops, op), load(name)) for op in of)
    )


def deselect(config: Any, items: list[Any], is_run: Callable[[Any], bool]) -> None:
    """Deselect the tests for which a function returns False."""
    left = [item for item in items if not is_run(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def level_of(item: Any) -> str | None:
    """Return the level of a test, or None if the test is not one of the package."""
    return _level_of(item.path)


@functools.cache
def _level_of(path: Path) -> str | None:
    directory = path.resolve().parent
    return directory.name if directory.parent == _KIT else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect the tests of backends that `--backend` does not choose, and of dtypes that a backend does not have.

    With ``--level``, only tests up to that level are left, in the order of the levels.
    """
    names = {None, *chosen(config)}
    deselect(config, items, lambda item: backend_param(item) in names and _has_what_it_needs(item))
    if last := config.getoption("--level"):
        wanted = LEVELS[: LEVELS.index(last) + 1]
        deselect(config, items, lambda item: level_of(item) in wanted)
        items.sort(key=lambda item: wanted.index(level_of(item)))


def pytest_sessionfinish(session: Any) -> None:
    """Write the file of `--record`. A worker of pytest-xdist sends its ratios to the main process."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ratios"] = claims.recorded()
    elif reporter is not None and (file := session.config.getoption("--record")):
        passed, *broken = (reporter.stats.get(kind, []) for kind in ("passed", "failed", "error"))
        failed = [report.nodeid for reports in broken for report in reports]
        results = {
            "passed": len(passed),
            "failed": failed,
            "not_run": session.testscollected - len(passed) - len(failed),
        }
        Path(file).write_text(json.dumps({**results, "ratios": claims.recorded()}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Keep the ratios of a worker of pytest-xdist."""
    for ratio in getattr(node, "workeroutput", {}).get("ratios", []):
        claims.keep(*ratio)


def pytest_runtest_setup(item: Any) -> None:
    """Forget the last call of the test before, and say on which backend the next one runs."""
    facts.forget()
    name = backend_param(item)
    is_here = name in GIVEN or name in pg.available_backends()
    strategies.compile_per_shape(load(name) if name and is_here else None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: Any) -> bool | None:
    """Stop the run after the time of `--seconds`, and with `--level` before the level after one that failed."""
    session, seconds = item.session, item.config.getoption("--seconds")
    before = session.stash.get(_LEVEL, None)
    session.stash[_LEVEL] = level_of(item)
    if item.config.getoption("--level") and session.testsfailed and level_of(item) != before:
        session.shouldfail = f"level {before} failed, so the levels after it are not run"
        return True  # this test is not run
    if seconds is not None and time.monotonic() > _STARTED + seconds:
        session.shouldstop = f"{seconds:g} seconds are over (--seconds)"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """On an accelerator, run a test that is marked own_process in another process.

    A backend that was given as an object is not known there, so its tests run in this process.
    """
    keywords, name = set(pyfuncitem.keywords), backend_param(pyfuncitem)
    if not {"own_process", "gpu"} <= keywords or own_process.IS_OWN or name in GIVEN:
        return None
    test, option = f"{pyfuncitem.path}::{pyfuncitem.originalname}", pyfuncitem.config.getoption
    options = [f"--backend={option('--backend')}", f"--device={option('--device')}"]
    if pyfuncitem.config.inipath:  # the file is not searched for in the directory of an installed test
        options += ["-c", str(pyfuncitem.config.inipath), f"--rootdir={pyfuncitem.config.rootpath}"]
    failed, said = own_process.run_test(test, *options, directory=pyfuncitem.config.rootpath)
    assert failed is not None, f"the process died: {said}"
    assert pyfuncitem.name not in [other.rpartition("::")[2] for other in failed], said
    return True


@pytest.fixture(scope="module")
def backend(request: Any) -> Backend:
    """Return a backend; the test runs once on each. If the parameter names a device, it puts arrays there."""
    name, _, device = request.param.partition("-")
    found = load(name)
    return pg.get_backend(found, device) if device else found


@pytest.fixture(params=DTYPES, scope="module")
def dtype(request: Any) -> str:
    """Return a floating dtype by name; the test runs once in each that the backend has."""
    name: str = request.param
    return name


@pytest.fixture(params=DTYPES, scope="module")
def other_dtype(request: Any) -> str:
    """Return a floating dtype other than `dtype` by name; the test runs once in each that the backend has."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def numerics(backend: Backend, dtype: str) -> Numerics:
    """Return the errors of exp, tanh and log that the backend states for the dtype on its device."""
    return stated(backend, dtype)


@pytest.fixture(params=claims.FORMS, scope="module")
def form(request: Any, backend: Backend) -> Callable[..., Callable[..., Any]]:
    """Return a function that takes an op and its options, and returns a function of arrays: the op in one form.

    The forms are those of `claims`. A form that the backend does not have, for an op of the mark ``op``, is left out.
    """
    return functools.partial(_in_form, request.param, backend)


def _in_form(form: str, backend: Backend, op: Any, **options: Any) -> Callable[..., Any]:
    return claims.in_form(form, op, backend, **options)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the largest ratios of error to bound."""
    if lines := claims.table():
        terminalreporter.section("largest error / bound")
        terminalreporter.write("\n".join([*lines, ""]))
