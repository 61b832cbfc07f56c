"""The backends that tests run on. They are found by their entry points; no test lists them.

A backend of another package is tested as soon as that package is installed, or is on the import path together with its
metadata, as tests/third_party is.
"""

import contextlib
import importlib.metadata

from portable_gpt2.registry import ENTRY_POINTS, available_backends
from portable_gpt2.testing.plugin import BACKENDS, REQUIRED
from portable_gpt2.testing.plugin import load as load

_OURS = importlib.metadata.entry_points(group=ENTRY_POINTS)
OURS = [name for name in BACKENDS if _OURS[name].value.startswith("portable_gpt2_backends.")]
"""The backends whose adapters belong to this project."""

FRAMEWORKS = [name for name in OURS if name != "numpy"]
"""The backends of this project whose framework is an extra of the package."""

HERE = [name for name in OURS if name in available_backends() or name in REQUIRED]
"""The backends of this project that are installed, or have to be."""

FIXTURES = {"tf" if name == "tensorflow" else name: name for name in FRAMEWORKS}
"""The names of backends, by the name of the fixture that returns the framework's module."""


def by_default(backend, device):
    """Return a context in which TensorFlow, which does not follow its inputs, computes on a device."""
    if backend.name != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.device(backend.resolve_device(device))
