"""The targets of the benchmark, in one table."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import NamedTuple


class Bound(NamedTuple):
    """The largest permitted value of a row.

    It is the row's reference multiplied by `times`, plus `plus`, which is in the row's unit.
    """

    group: str
    row: str  # a pattern for `fnmatch`
    backends: str
    times: float = 0.0
    plus: float = 0.0

    def __str__(self) -> str:
        times = f"{self.times:.3g} x" if self.times else ""
        return " + ".join(filter(None, [times, f"{self.plus:g}" if self.plus else ""]))


ALL = "numpy jax torch tensorflow"

BOUNDS = (
    # Decode: rows of the shapes 124M and 355M
    Bound("decode", "* against the limit", "numpy jax", 1.25),
    Bound("decode", "* against the limit", "torch tensorflow", 1.5),
    Bound("decode", "124M against transformers", "numpy torch", 1 / 1.5),
    Bound("decode", "124M against KerasHub", "jax torch tensorflow", 1 / 1.5),
    Bound("decode", "sampling against greedy", ALL, 1.0, plus=1.0),  # milliseconds
    # Decode at later positions, and compilations
    Bound("decode", "position 1000 against position 10", ALL, 1.3),
    Bound("compilations", "a full-length generation", "jax tensorflow", plus=7),
    Bound("compilations", "prompts of 1 to 1000 tokens, after it", "jax tensorflow", plus=6),
    # Prefill and batches
    Bound("prefill", "512 tokens against all matrix products", "numpy", 1.4),
    Bound("prefill", "512 tokens against all matrix products", "jax torch tensorflow", 1.15),
    Bound("batches", "batch *", ALL, 1.3),
    # Ops, in microseconds. For NumPy, the framework's own softmax is SciPy's.
    Bound("ops", "softmax 12x1024x1024", "numpy", 0.8),
    Bound("ops", "softmax *", "numpy", 0.6),
    Bound("ops", "softmax *", "jax torch tensorflow", 1.05, plus=0.5),
    Bound("ops", "conv1d *", ALL, 1.05, plus=0.5),
    Bound("ops", "the definition under jit, *", "jax torch tensorflow", 1.05, plus=0.5),
    # Memory and start
    Bound("memory", "peak of a generation", ALL, 1.1),
    Bound("start", "load and first forward pass", "numpy", plus=1.0),  # seconds
    Bound("start", "the generate command *", "numpy", plus=0.6),
    Bound("start", "import beyond NumPy", "numpy", plus=0.15),  # the limit that the design sets
)


def find(group: str, row: str, backend: str) -> Bound | None:
    """Return the first entry of the table that matches a row, or None if there is none."""
    for bound in BOUNDS:
        if bound.group == group and backend in bound.backends.split() and fnmatch(row, bound.row):
            return bound
    return None
