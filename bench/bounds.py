"""The targets of the benchmark, in one table.

A target that was met is set to the value reached plus 10%, so that a loss of speed shows. Where values of two
processors are known, the worse one counts. A target that is missed stays as it was set.
"""

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
        plus = f"{self.plus:.3g}" if self.plus or not self.times else ""
        return " + ".join(filter(None, [times, plus]))


ALL = "numpy jax torch tensorflow"

BOUNDS = (
    # Decode: rows of the shapes 124M and 355M
    Bound("decode", "* against the limit", "numpy jax", 1.25),
    Bound("decode", "* against the limit", "torch tensorflow", 1.5),
    Bound("decode", "124M against transformers", "numpy torch", 1 / 1.5),
    Bound("decode", "124M against KerasHub", "torch", 0.3),
    Bound("decode", "124M against KerasHub", "tensorflow", 0.656),
    Bound("decode", "124M against KerasHub", "jax", 1 / 1.5),
    Bound("decode", "sampling against greedy", ALL, 1.0, plus=1.0),  # milliseconds
    # Decode at later positions, and compilations
    Bound("decode", "position 1000 against position 10", ALL, 1.3),
    Bound("compilations", "a full-length generation", "jax tensorflow", plus=5),
    Bound("compilations", "prompts of 1 to 1000 tokens, after it", "jax tensorflow", plus=5),
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
    Bound("start", "load and first forward pass", "numpy", plus=0.63),  # seconds
    Bound("start", "the generate command *", "numpy", plus=0.6),
    Bound("start", "import beyond NumPy", "numpy", plus=0.002),
    # On a device, whichever it is (`gpu`)
    Bound("device checks", "bytes of text that differ from NumPy's", ALL, plus=0),
    Bound("device checks", "tests that fail", ALL, plus=0),
    Bound("device checks", "error / bound: *", ALL, plus=1),
    Bound("device checks", "largest error of *", ALL, 1.0),
    Bound("device checks", "bfloat16 losses of 50 steps against float32's", ALL, 4.0),  # transformers' own error
    # On one H100, 124M
    Bound("device speed", "float32 greedy, batch 1", "torch", plus=0.45),  # milliseconds
    Bound("device speed", "bfloat16 greedy, batch 1", "torch", plus=0.35),
    Bound("device speed", "float32 greedy, batch 1", "jax", plus=0.60),
    Bound("device speed", "bfloat16 greedy, batch 1", "jax", plus=0.50),
    Bound("device speed", "* sampled, batch 1", "jax torch", 1.0, plus=0.1),
    Bound("device speed", "* greedy, batch 32", "jax torch", 1.3),
    Bound("device speed", "bfloat16 training, 8 x 1024", "torch", plus=8 * 1024 / 150),  # 150,000 tokens/s
    Bound("device speed", "bfloat16 training, 32 x 1024", "torch", plus=32 * 1024 / 250),
    Bound("device speed", "float32 training, * x 1024", "torch", 1.0),  # against transformers
    Bound("device speed", "* training, * x 1024", "jax", 1.15),  # against PyTorch
    Bound("device speed", "* training, 8 x 1024: first step", "jax", plus=20),  # seconds
)


def find(group: str, row: str, backend: str) -> Bound | None:
    """Return the first entry of the table that matches a row, or None if there is none."""
    for bound in BOUNDS:
        if bound.group == group and backend in bound.backends.split() and fnmatch(row, bound.row):
            return bound
    return None
