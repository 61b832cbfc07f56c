"""The benchmark compares portable_gpt2 with other libraries in one run: ``python -m bench --help``.

- `__main__` runs all measurements. Each framework computes in a process of its own (`worker`).
- Two sides of a comparison are measured in turn (`clock`).
- `model` calls portable_gpt2, `frameworks` calls the bare frameworks, and `peers` calls other libraries.
- A figure is a `rows.Row`. `bounds` has the targets, and `report` and `plots` write the results.
- `mesh_model` computes what a mesh of devices costs on paper, and `mesh_compiled` compares that with programs.
- `gpu` checks and measures one accelerator in a single call: ``python -m bench.gpu --help``.

The installed package is measured, not the checkout that this package is run from.
"""

import sys
from pathlib import Path

_ROOM = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _ROOM]
