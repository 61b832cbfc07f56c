"""Every test that takes the fixture `backend` runs on every backend.

A backend whose framework is not installed is reported as skipped; with PORTABLE_GPT2_REQUIRE (a comma-separated list of
backends, or ``all``) in the environment, a backend that is named there and missing is a failure.

JAX computes in float64 only in a process that was started with its x64 switch, and then its other tests would mean
something else: the parametrisation ``jax`` x ``float64`` runs where JAX_ENABLE_X64=1, and nothing else runs there.
"""

import os

# Two threads a framework, and no chatter: set before any framework is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("ARRAY_API_STRICT_API_VERSION", "2024.12")
# On an accelerator, none of them takes all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# No test asks the hub; one that is to ask a stand-in of it says so to a process of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two devices where there is no accelerator, so that a leak to the default one can be seen.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import bounds
import hypothesis
import layouts
import pytest

import portable_gpt2 as pg

BACKENDS = ["numpy", "tensorflow", "jax", "torch", "array_api_strict"]
FRAMEWORKS = {"tf": "tensorflow", "jax": "jax", "torch": "torch"}  # the backend of each fixture that is a framework
DTYPES = ["float32", "float64", "bfloat16", "float16"]
LACKING = {("array_api_strict", "bfloat16"), ("array_api_strict", "float16")}  # the standard does not know them
REQUIRED = os.environ.get("PORTABLE_GPT2_REQUIRE", "")
X64 = os.environ.get("JAX_ENABLE_X64") == "1"


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="take a test that is skipped for a failure")
    parser.addoption("--backends", default=",".join([*BACKENDS, "none"]), help="whose tests to run, none's among them")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several workers of pytest-xdist
        session.config.workeroutput["bounds"] = bounds.recorded()
    elif session.config.getoption("--no-skips") and reporter.stats.get("skipped"):
        reporter.write_line("\nSkipped tests are failures here (--no-skips).", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for ratio in getattr(node, "workeroutput", {}).get("bounds", []):
        bounds.record(*ratio)


hypothesis.settings.register_profile("fast", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def load(name):
    """Return the backend of that name, or skip; a missing backend that this run requires is a failure."""
    if name not in pg.available_backends():
        required = BACKENDS if REQUIRED == "all" else REQUIRED.split(",")
        report = pytest.fail if name in required else pytest.skip
        report(f"backend {name} is not installed")
    return pg.get_backend(name)


def pytest_configure(config):
    if "tensorflow" in pg.available_backends():
        import tensorflow as tf  # its CPU can be split only before it has made a tensor

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        tf.config.experimental.enable_tensor_float_32_execution(False)  # float32 on a GPU is meant to be float32


def whose_is(item):
    """Return the one backend that a test is of, by its parameter or by a fixture; where it is of several, none."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    named = {params.get("backend"), *(FRAMEWORKS.get(name) for name in item.fixturenames)} - {None}
    return named.pop() if len(named) == 1 else "none"


def pytest_collection_modifyitems(config, items):
    """Keep jax in float64 to the process that has its switch, and everything else out of it.

    What a backend has no dtype for is left out too, and what is of other backends than --backends names.
    """
    backends = config.getoption("--backends").split(",")

    def is_run(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        choice = params.get("backend"), params.get("dtype")
        is_x64 = "x64" in item.keywords or choice == ("jax", "float64")
        return is_x64 == X64 and choice not in LACKING and whose_is(item) in backends

    left = [item for item in items if not is_run(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_run(item)]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    """A backend; the test runs on every one of them."""
    return load(request.param)


@pytest.fixture(params=DTYPES, scope="module")
def dtype(request):
    """A floating dtype by name; the test runs in every one that the backend has."""
    return request.param


@pytest.fixture(scope="module")
def tf():
    """TensorFlow itself, for a test that is of it alone."""
    load("tensorflow")
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def jax():
    """JAX itself, for a test that is of it alone."""
    load("jax")
    return pytest.importorskip("jax")


@pytest.fixture(scope="module")
def torch():
    """PyTorch itself, for a test that is of it alone."""
    load("torch")
    return pytest.importorskip("torch")


@pytest.fixture(params=layouts.WRITERS, scope="module")
def layout(request):
    """A layout of checkpoints by name; the test runs on every one that the frameworks here can write."""
    if fixture := layouts.WRITERS[request.param][0]:
        request.getfixturevalue(fixture)
    return request.param


def pytest_terminal_summary(terminalreporter):
    if lines := bounds.table():
        terminalreporter.section("worst error, in units of its bound")
        terminalreporter.write("\n".join([*lines, ""]))
