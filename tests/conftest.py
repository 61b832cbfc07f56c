"""Options and fixtures of all tests. A test that takes the fixture `backend` runs once on every backend.

The tests of a file that is marked ``every_device`` also run on every accelerator that the frameworks report, or on the
devices that ``--devices`` names. There the fixture is a backend that puts arrays on that device, and the test is marked
``gpu``: ``pytest -m gpu --devices=cpu:1`` runs them on the second CPU device of JAX and TensorFlow.

If a backend's framework is not installed, its tests are skipped. They fail instead if the environment variable
PORTABLE_GPT2_REQUIRE, a comma-separated list of backends or ``all``, names that backend.

JAX computes in float64 only in a process that was started with JAX_ENABLE_X64=1. This setting changes the default
dtypes of JAX, so it would change what the other tests of JAX check. Therefore a process with this setting runs only the
tests of JAX in float64 and those marked ``x64``, and a process without it runs all others.
"""

import os

# These variables must be set before a framework is imported. They request two threads per framework, no log messages,
# and one version of the array API standard.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("ARRAY_API_STRICT_API_VERSION", "2024.12")
# On an accelerator, no framework may reserve all of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# No test connects to the hub. Downloads are tested in processes of their own, with a local server.
os.environ["HF_HUB_OFFLINE"] = "1"
# JAX gets a second CPU device, so that a test can see an array that is made on the wrong device.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import checkout

checkout.refuse_a_stale_copy()

import importlib
import json
import pathlib
import time

import bounds
import frameworks
import hypothesis
import layouts
import processes
import pytest

import portable_gpt2 as pg

DTYPES = ["float32", "float64", "bfloat16", "float16"]
X64 = os.environ.get("JAX_ENABLE_X64") == "1"
STARTED = time.monotonic()


def pytest_addoption(parser):
    names = ",".join([*frameworks.BACKENDS, "none"])
    backends = "run the tests of these backends; none stands for the tests that do not belong to one backend"
    parser.addoption("--backends", default=names, help=f"{backends} (default: {names})")
    devices = "run the tests of accelerators on these devices, such as cuda:0,cpu:1; by default on every accelerator"
    parser.addoption("--devices", default="", help=devices)
    parser.addoption("--record", help="a file that gets the results, and the largest error / bound, as JSON")
    parser.addoption("--seconds", type=float, help="begin no test after this time")
    parser.addoption("--no-skips", action="store_true", help="count a skipped test as a failure")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() > STARTED + seconds:
        item.session.shouldstop = f"{seconds:g} seconds are over (--seconds)"


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (file := session.config.getoption("--record")):
        passed, *broken = (reporter.stats.get(kind, []) for kind in ("passed", "failed", "error"))
        failed = [report.nodeid for reports in broken for report in reports]
        results = {
            "passed": len(passed),
            "failed": failed,
            "not_run": session.testscollected - len(passed) - len(failed),
        }
        pathlib.Path(file).write_text(json.dumps({**results, "ratios": bounds.recorded()}))
    if reporter is None:  # a worker of pytest-xdist sends its records to the main process
        session.config.workeroutput["bounds"] = bounds.recorded()
    elif session.config.getoption("--no-skips") and reporter.stats.get("skipped"):
        reporter.write_line("\nSkipped tests are failures here (--no-skips).", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for ratio in getattr(node, "workeroutput", {}).get("bounds", []):
        bounds.keep(*ratio)


hypothesis.settings.register_profile("few", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fast", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_configure(config):
    chosen = config.getoption("--backends").split(",")
    if {"tensorflow", "none"} & set(chosen) and "tensorflow" in pg.available_backends():
        import tensorflow as tf  # takes seconds; the CPU can be split only before the first tensor

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # otherwise a GPU multiplies float32 in TF32


def backend_param(item):
    """Return the name of the backend that a test is parametrized with, without its device, or None."""
    param = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    return param and param.partition("-")[0]


def backend_of(item):
    """Return the name of the backend that a test needs, or ``none`` if the test needs none or several."""
    named = {backend_param(item), *(frameworks.FIXTURES.get(name) for name in item.fixturenames)} - {None}
    return named.pop() if len(named) == 1 else "none"


def computes_in(backend, dtype):
    """Return whether a backend has a dtype; True if the backend is not installed, or if a test has no such parameters.

    This imports the backend's framework, so it must be called only for tests that will run.
    """
    if backend not in pg.available_backends() or dtype not in DTYPES:
        return True
    return dtype in pg.get_backend(backend).dtypes


def pytest_collection_modifyitems(config, items):
    """Deselect the tests that this process does not run.

    They are the tests of backends that --backends does not name, of dtypes that a backend does not have, and those for
    the other setting of JAX_ENABLE_X64.
    """
    backends = config.getoption("--backends").split(",")

    def is_run(item):
        backend = backend_param(item)
        dtype = getattr(getattr(item, "callspec", None), "params", {}).get("dtype")
        is_x64 = "x64" in item.keywords or (backend, dtype) == ("jax", "float64")
        return is_x64 == X64 and backend_of(item) in backends and computes_in(backend, dtype)

    left = [item for item in items if not is_run(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_run(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Run a test that is marked every_device on the devices, too; the mark may name the backends."""
    marker = metafunc.definition.get_closest_marker("every_device")
    is_chosen = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if marker is None or is_chosen or "backend" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names = list(marker.args) or frameworks.BACKENDS
    places = [place for place in frameworks.places(option("--backends"), option("--devices")) if place[0] in names]
    if places or marker.args:  # otherwise the parameters are those of the fixture, and the tests have their usual names
        params = [*names, *(pytest.param("-".join(place), marks=pytest.mark.gpu) for place in places)]
        each = pytest.mark.parametrize("backend", params, indirect=True, scope="module")
        metafunc.definition.add_marker(each)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """On an accelerator, run a test that is marked own_process in another process.

    After a failed assertion of a kernel on CUDA, such as an index out of range, all later calls of the process fail.
    """
    if not {"own_process", "gpu"} <= set(pyfuncitem.keywords) or processes.IS_OWN:
        return None
    test, option = pyfuncitem.nodeid.partition("[")[0], pyfuncitem.config.getoption
    options = f"--backends={option('--backends')}", f"--devices={option('--devices')}"
    failed, said = processes.run_test(test, *options, directory=pyfuncitem.config.rootpath)
    assert failed is not None, f"the process died: {said}"
    assert pyfuncitem.nodeid not in failed, said
    return True


@pytest.fixture(params=frameworks.BACKENDS, scope="module")
def backend(request):
    """A backend; the test runs once on each. If the parameter names a device, the backend puts arrays there."""
    name, _, device = request.param.partition("-")
    found = frameworks.load(name)
    if not device:
        yield found
        return
    with frameworks.by_default(found, device):
        yield pg.get_backend(name, device)


@pytest.fixture(params=DTYPES, scope="module")
def dtype(request):
    """A floating dtype by name; the test runs once in each that the backend has."""
    return request.param


def framework(name, backend):
    """Make the fixture that gives a framework's module to a test of that framework alone."""

    @pytest.fixture(scope="module", name=name)
    def module():
        frameworks.load(backend)
        return importlib.import_module(backend)

    return module


# A fixture for each framework: `tf`, `jax`, `torch`, and that of any backend that is added.
globals().update({name: framework(name, backend) for name, backend in frameworks.FIXTURES.items()})


@pytest.fixture(params=layouts.WRITERS, scope="module")
def layout(request):
    """The name of a checkpoint layout. The test runs once with each layout that an installed framework can write."""
    if backend := layouts.WRITERS[request.param][0]:
        frameworks.load(backend)
    return request.param


def pytest_terminal_summary(terminalreporter):
    if lines := bounds.table():
        terminalreporter.section("largest error / bound")
        terminalreporter.write("\n".join([*lines, ""]))
