"""Ops on arrays of NumPy: ordinary numbers raise no floating-point flag, and so no warning."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing import claims, strategies


def normal(shape, width=1.0, mean=0.0):
    return np.random.default_rng(list(shape)).normal(mean, width, shape)


HEAD = [normal((2, 5, 8), 10.0), normal((2, 5, 8), 10.0, 1.0), normal((2, 5, 7))]
ORDINARY = {
    "attention": [*HEAD, np.tri(5, dtype=np.bool_)],
    "conv1d": [normal((4, 33)), normal((33, 5)), normal((5,))],
    "gelu": [normal((16, 32), 1e6)],
    # A wide row, and rows with a mean and one large outlier, as in the residual stream.
    "layer_norm": [
        np.concatenate([normal((5, 33), width, mean * width) for width in (0.01, 1, 30) for mean in (0, 0.3, 4)])
        * np.where(np.arange(33) == 0, 20, 1),
        normal((33,), 0.3, 1.0),
        normal((33,), 0.3),
    ],
    "softmax": [normal((16, 32), 1e4)],
}


@strategies.wide_dtypes
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)
def test_an_op_on_ordinary_numbers_raises_no_floating_point_flag(backend, dtype, name):
    """Catches warnings that a user could do nothing about."""
    arrays = [a if a.dtype == np.bool_ else a.astype(dtype) for a in ORDINARY[name]]
    for form in claims.FORMS[:2]:
        with np.errstate(all="raise", under="ignore"):
            run = claims.in_form(form, getattr(pg, name), backend)
            computed = backend.to_numpy(run(*map(backend.from_numpy, arrays)))
        assert np.isfinite(computed).all()
