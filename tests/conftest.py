"""Options and fixtures of all tests, next to those of `portable_gpt2.testing.plugin`.

If a backend's framework is not installed, its tests are skipped. They fail instead if the environment variable
PORTABLE_GPT2_REQUIRE, a comma-separated list of backends, names that backend. ``none`` stands for the tests that do not
belong to one backend: ``--backend=numpy,none``.

JAX computes in float64 only in a process that was started with JAX_ENABLE_X64=1. This setting changes the default
dtypes of JAX, so it would change what the other tests of JAX check. Therefore a process with this setting runs only the
tests of JAX in float64 and those marked ``x64``, and a process without it runs all others.
"""

import os

# These variables must be set before a framework is imported. They request two threads per framework, which do not spin
# while they wait for each other, no log messages, and one version of the array API standard.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would spin: a test took six times as long
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

import frameworks
import layouts
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing import plugin

pytest_plugins = ["portable_gpt2.testing.plugin"]

X64 = os.environ.get("JAX_ENABLE_X64") == "1"


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="count a skipped test as a failure")
    parser.addoption("--full-notebooks", action="store_true", help="run the notebooks at full size, on every backend")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.config.getoption("--no-skips") and reporter.stats.get("skipped"):
        reporter.write_line("\nSkipped tests are failures here (--no-skips).", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config):
    chosen, distributes = plugin.chosen(config), getattr(config.option, "numprocesses", None)  # to workers, which test
    if {"tensorflow", "none"} & set(chosen) and "tensorflow" in pg.available_backends() and not distributes:
        import tensorflow as tf  # takes seconds; the CPU can be split only before the first tensor

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # otherwise a GPU multiplies float32 in TF32


def backend_of(item):
    """Return the name of the backend that a test needs, or ``none`` if the test needs none or several."""
    named = {plugin.backend_param(item), *(frameworks.FIXTURES.get(name) for name in item.fixturenames)} - {None}
    return named.pop() if len(named) == 1 else "none"


def pytest_collection_modifyitems(config, items):
    """Deselect tests of other backends, and those for the other setting of JAX_ENABLE_X64."""
    backends = [*plugin.chosen(config), *([] if config.getoption("--backend") else ["none"])]

    def is_run(item):
        dtype = getattr(getattr(item, "callspec", None), "params", {}).get("dtype")
        if plugin.backend_param(item) in getattr(item.module, "NOT_FOR", ()):
            return False
        is_x64 = "x64" in item.keywords or (plugin.backend_param(item), dtype) == ("jax", "float64")
        return is_x64 == X64 and backend_of(item) in backends

    plugin.deselect(config, items, is_run)


def framework(name, backend):
    """Make the fixture that gives a framework's module to a test of that framework alone."""

    @pytest.fixture(scope="module", name=name)
    def module():
        plugin.load(backend)
        return importlib.import_module(backend)

    return module


# A fixture for each framework: `tf`, `jax`, `torch`, and that of any backend that is added.
globals().update({name: framework(name, backend) for name, backend in frameworks.FIXTURES.items()})


@pytest.fixture(params=layouts.WRITERS, scope="module")
def layout(request):
    """The name of a checkpoint layout. The test runs once with each layout that an installed framework can write."""
    if backend := layouts.WRITERS[request.param][0]:
        plugin.load(backend)
    return request.param
