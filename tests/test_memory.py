"""What loading takes: the weights as they end up, the framework, and little more, whatever they are read from."""

from pathlib import Path

import layouts
import numpy as np
import processes
import pytest

import portable_gpt2 as pg
from portable_gpt2.params import count, shapes
from portable_gpt2.testing import plugin

CONFIG = pg.GPT2Config(n_layer=12, n_head=8, n_embd=512, n_vocab=32_000, n_ctx=1024, eos_token_id=None)
SMALL = pg.GPT2Config(n_layer=1, n_head=1, n_embd=64, n_vocab=20_000, n_ctx=8, eos_token_id=None)
LIMIT = 1.15

MEASURE = """
import sys
from pathlib import Path
import portable_gpt2 as pg
from portable_gpt2.params import flatten

small, large, backend, dtype = sys.argv[1:]

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

models = [pg.GPT2.load(small, backend=backend, dtype=dtype)]  # the frameworks that read and compute are there now
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
models.append(pg.GPT2.load(large, backend=backend, dtype=dtype))
print(kilobytes("VmHWM") - before)
"""

CASES = [  # backend, layout, the file's dtype, the model's
    ("numpy", "safetensors", "float32", "bfloat16"),
    ("torch", "bin", "float32", "float32"),
    ("tensorflow", "OpenAI", "float32", "float32"),
    ("jax", "bin", "float32", "float32"),
    ("jax", "safetensors", "float32", "float32"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function from a layout and a dtype to the directories of a small and a large model."""
    found = {}

    def get(layout, dtype):
        if (layout, dtype) not in found:
            found[layout, dtype] = []
            for config in (SMALL, CONFIG):
                arrays = {path: np.full(shape, 0.01, dtype) for path, shape in shapes(config).items()}
                found[layout, dtype].append(str(tmp_path_factory.mktemp("model")))
                layouts.WRITERS[layout][1](Path(found[layout, dtype][-1]), config, arrays)
        return found[layout, dtype]

    return get


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say what the peak was")
@pytest.mark.parametrize(("name", "layout", "stored", "dtype"), CASES)
def test_loading_takes_little_more_than_the_weights(name, layout, stored, dtype, written, capsys):
    """Catches weights that are in memory twice: as the file's and the framework's, in two dtypes, in two layouts."""
    for backend in (name, layouts.WRITERS[layout][0]):
        if backend:
            plugin.load(backend)
    code = "import sys; sys.argv[1:] = " + repr([*written(layout, stored), name, dtype]) + MEASURE
    peak = 1024 * int(processes.run(code).splitlines()[-1])
    weights = count(CONFIG) * (4 if dtype == "float32" else 2)
    with capsys.disabled():
        print(f"\n{name}, {layout}, {stored} as {dtype}: peak {peak / 1e6:.0f} MB, {peak / weights:.2f} of the weights")
    assert peak <= LIMIT * weights
