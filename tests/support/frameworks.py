"""The backends that tests run on. They are found by their entry points; no test lists them.

A backend of another package is tested as soon as that package is installed, or is on the import path together with its
metadata, as tests/third_party is.
"""

import contextlib
import functools
import importlib.metadata
import os

import pytest

import portable_gpt2 as pg
from portable_gpt2.registry import ENTRY_POINTS, known_backends

BACKENDS = sorted(known_backends(), key=lambda name: (name != "numpy", name))
"""The names of all backends, installed or not, NumPy first."""

_OURS = importlib.metadata.entry_points(group=ENTRY_POINTS)
OURS = [name for name in BACKENDS if _OURS[name].value.startswith("portable_gpt2_backends.")]
"""The backends whose adapters belong to this project."""

FRAMEWORKS = [name for name in OURS if name != "numpy"]
"""The backends of this project whose framework is an extra of the package."""

FIXTURES = {"tf" if name == "tensorflow" else name: name for name in FRAMEWORKS}
"""The names of backends, by the name of the fixture that returns the framework's module."""

_REQUIRED = os.environ.get("PORTABLE_GPT2_REQUIRE", "")


def load(name):
    """Return a backend by name, or skip the test; fail if PORTABLE_GPT2_REQUIRE names the backend and it is missing."""
    if name not in pg.available_backends():
        required = BACKENDS if _REQUIRED == "all" else _REQUIRED.split(",")
        report = pytest.fail if name in required else pytest.skip
        report(f"backend {name} is not installed")
    return pg.get_backend(name)


@functools.cache
def places(names, devices=""):
    """Return the pairs of a backend and a device, of some backends, that the tests of accelerators run on.

    They are the devices that `devices` names, or else all accelerators that the frameworks report.

    Raises
    ------
    pytest.UsageError
        If none of the backends has a device that `devices` names.
    """
    has = {name: list(pg.get_backend(name).devices()) for name in pg.available_backends() if name in names.split(",")}
    wanted = [device for device in devices.split(",") if device]
    if not wanted:
        return [(name, device) for name in OURS for device in has.get(name, ()) if not device.startswith("cpu")]
    if unknown := [device for device in wanted if not any(device in known for known in has.values())]:
        known = "; ".join(f"{name} has {', '.join(known)}" for name, known in has.items())
        raise pytest.UsageError(f"--devices: no framework has {', '.join(unknown)}; {known}")
    return [(name, device) for device in wanted for name, known in has.items() if device in known]


def by_default(backend, device):
    """Return a context in which TensorFlow, which does not follow its inputs, computes on a device."""
    if backend.name != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.device(backend.resolve_device(device))
