"""Ops on arrays of NumPy: ordinary numbers raise no floating-point flag, and so no warning."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing import claims, strategies


@strategies.wide_dtypes
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)
def test_gelu_of_ordinary_numbers_raises_no_floating_point_flag(backend, dtype):
    """Catches warnings that a user could do nothing about."""
    x = np.random.default_rng(4).normal(0, 1e6, (16, 32)).astype(dtype)
    for form in claims.forms(pg.gelu, backend).values():
        with np.errstate(all="raise", under="ignore"):
            computed = backend.to_numpy(form(backend.from_numpy(x)))
        assert np.isfinite(computed).all()
