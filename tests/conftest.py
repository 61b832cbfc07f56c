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
# Two devices where there is no accelerator, so that a leak to the default one can be seen.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import hypothesis
import pytest

import portable_gpt2 as pg

BACKENDS = ["numpy", "tensorflow", "jax", "torch", "array_api_strict"]
REQUIRED = os.environ.get("PORTABLE_GPT2_REQUIRE", "")
X64 = os.environ.get("JAX_ENABLE_X64") == "1"

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


def pytest_collection_modifyitems(config, items):
    """Keep jax in float64 to the process that has its switch, and everything else out of it."""

    def is_x64(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        return "x64" in item.keywords or (params.get("backend") == "jax" and params.get("dtype") == "float64")

    left = [item for item in items if is_x64(item) != X64]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_x64(item) == X64]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A backend; the test runs on every one of them."""
    return load(request.param)
