"""Kernels of JAX's adapter that it has for CUDA, run on a CPU."""

import sys

import numpy as np
import pytest

from portable_gpt2.numerics import bounds


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_one_row_as_on_cuda_is_within_its_error_bound(backend, dtype):
    """Catches a sum over the wrong axis, and products that are rounded to 16 bits before they are summed."""
    adapter = sys.modules[type(backend).__module__]
    random = np.random.default_rng(5)
    x, w = (random.normal(0, 1, shape).astype(bounds.host_dtype(dtype)) for shape in ((1, 96), (96, 200)))
    row = backend.from_numpy(x)
    layer = adapter._row_times_on_gpu(row, backend.from_numpy(w))
    logits = adapter._times_row_on_gpu(row, backend.from_numpy(w.T.copy()))[None]
    for y in (layer, logits):
        computed = backend.to_numpy(y.astype(row.dtype))
        assert 0.01 <= bounds.linear_at_random(x, w, np.zeros(200, x.dtype)).ratio(computed) <= 1
