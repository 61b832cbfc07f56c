"""conv1d is the convolution of width 1 that it is named after: that of each framework."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, strategies

pytestmark = pytest.mark.every_device


def convolve_in_tensorflow(x, w, b):
    import tensorflow as tf

    return tf.nn.conv1d(x, w, stride=1, padding="VALID") + b


def convolve_in_jax(x, w, b):
    import jax

    layout = ("NWC", "WIO", "NWC")
    highest = jax.lax.Precision.HIGHEST  # a GPU convolves float32 in TF32 by default
    return jax.lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layout, precision=highest) + b


def convolve_in_torch(x, w, b):
    import torch

    return torch.nn.functional.conv1d(x.mT, w.permute(2, 1, 0), b).mT


CONVOLUTIONS = {"tensorflow": convolve_in_tensorflow, "jax": convolve_in_jax, "torch": convolve_in_torch}


@strategies.wide_dtypes
@pytest.mark.parametrize("backend", list(CONVOLUTIONS), indirect=True)
def test_conv1d_is_a_convolution_of_width_1(backend, dtype):
    """Catches a layer that is not what OpenAI named it after: each framework's own convolution, in channels last."""
    random = np.random.default_rng(4)
    for positions, nx, nf in ((1, 1, 1), (7, 24, 36)):
        x, w, b = (random.normal(0, 1, shape).astype(dtype) for shape in ((2, positions, nx), (1, nx, nf), (nf,)))
        convolved = claims.compute(CONVOLUTIONS[backend.name], backend, x, w, b)
        results = claims.results(pg.conv1d, backend, x, w, b)
        claims.assert_agree(dict.fromkeys(results, convolved), results, 2 * bounds.linear(x, w, b).error)
