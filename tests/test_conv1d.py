"""conv1d: each result within a derived bound of the exact one, and equal to the convolution that it is named after."""

import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, operations, strategies

pytestmark = pytest.mark.every_device


def normal(random, shape, dtype):
    return random.normal(0, 1, shape).astype(bounds.host_dtype(dtype))


@given(data=st.data())
def test_conv1d_is_within_its_error_bound(backend, dtype, data):
    """Catches a forgotten bias, a transposed weight, 16-bit or TF32 products, and writing into the argument."""
    x, w, b = data.draw(operations.linear_layers(dtype))
    expected = bounds.linear(x, w, b)
    for form, op in claims.forms(pg.conv1d, backend).items():
        computed = claims.compute(op, backend, x, w, b)
        assert claims.assert_within(expected, computed, "conv1d", backend, dtype, form) <= 1


def test_the_bound_of_conv1d_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(1)
    x, w, b = normal(random, (40, 12), dtype), normal(random, (12, 20), dtype), normal(random, (20,), dtype)
    expected = bounds.linear(x, w, b)
    for form, op in claims.forms(pg.conv1d, backend, compiled=True).items():
        ratio = claims.assert_within(expected, claims.compute(op, backend, x, w, b), "conv1d", backend, dtype, form)
        assert ratio >= 0.01, f"{form}: the bound is {1 / ratio:.0f} times the worst error"


@pytest.mark.parametrize("depth", [1, 64, 768, 3072])
def test_conv1d_of_random_numbers_errs_as_random_errors_add_up(backend, dtype, depth):
    """Catches sums in too few bits at depths where the worst case, which grows as K and not as sqrt(K), is loose."""
    random = np.random.default_rng(depth)
    rows, columns = (2, 3) if dtype == "float64" else (16, 24)
    x, w = normal(random, (rows, depth), dtype), normal(random, (depth, columns), dtype)
    b = normal(random, (columns,), dtype)
    expected = bounds.linear_at_random(x, w, b)
    for form, op in claims.forms(pg.conv1d, backend).items():
        ratio = expected.ratio(claims.compute(op, backend, x, w, b))
        assert 0.01 <= ratio <= 1, f"{form}: the error is {ratio:.3g} times 4 sqrt(K + 1) u Q"


def processors(backend, monkeypatch):
    """Yield once, and for PyTorch a second time as on the other kind of processor.

    PyTorch processes a large weight in blocks on some processors.
    """
    yield
    if backend.name == "torch":
        adapter = sys.modules["portable_gpt2_backends.torch"]
        monkeypatch.setattr(adapter, "_IS_BLOCKED", not adapter._IS_BLOCKED)
        yield


@pytest.mark.parametrize("shape", [(768, 1536), (1536, 384)], ids=["wide", "tall"])
@pytest.mark.parametrize("rows", [1, 3, 4, 32, 300])
def test_a_product_with_a_large_weight_is_within_its_error_bound(backend, rows, shape, monkeypatch):
    """Catches blocks of a weight that are combined wrongly, and a second call that gives other bits than the first.

    Adapters split the weight for small batches. The product for the logits is tested together with conv1d. The matrices
    have the memory layout of a model's.
    """
    random = np.random.default_rng(rows)
    x, w, b = (normal(random, each, "float32") for each in ((rows, shape[0]), shape, shape[1:]))
    layer, logits = bounds.linear_at_random(x, w, b), bounds.linear_at_random(x, w, np.zeros_like(b))
    rows, bias = backend.from_numpy(x), backend.from_numpy(b)
    for _ in processors(backend, monkeypatch):
        weight = backend.relayout("h0/mlp/c_proj/w", backend.from_numpy(w))
        table = backend.relayout("wte", backend.from_numpy(w.T.copy()))
        for product, op, arrays in ((layer, pg.conv1d, (rows, weight, bias)), (logits, pg.unembed, (rows, table))):
            first, second = (backend.to_numpy(op(*arrays)) for _ in range(2))
            assert first.tobytes() == second.tobytes()
            ratio = product.ratio(first)
            assert 0.01 <= ratio <= 1, f"{op.__name__}: the error is {ratio:.3g} times 4 sqrt(K + 1) u Q"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_a_large_16_bit_product_is_within_its_error_bound(backend, dtype, multiplied, rows, torch, monkeypatch):
    """Catches a sum in 16 bits, a bias that is added twice, and blocks of columns in the wrong order.

    The processor may multiply 16-bit matrices or not. In inference mode, in which a decode step runs, one row is
    multiplied as a sum of weighted rows.
    """
    adapter = sys.modules[type(backend).__module__]
    monkeypatch.setattr(adapter, "_MULTIPLIED", dict.fromkeys(adapter._MULTIPLIED, multiplied))
    random = np.random.default_rng(rows)
    x, w, b = (normal(random, shape, dtype) for shape in ((rows, 384), (384, 1536), (1536,)))
    weight, bias = backend.relayout("h0/mlp/c_fc/w", backend.from_numpy(w)), backend.from_numpy(b)
    table = backend.relayout("wte", backend.from_numpy(w.T.copy()))
    row = backend.from_numpy(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            logits, y = pg.unembed(row, table), pg.conv1d(row, weight, bias)
            if adapter._HAS_FBGEMM and torch.is_inference_mode_enabled():
                assert rows > 1 or adapter._sum_of_rows(row, weight) is not None
                assert rows > 1 or adapter._sum_of_rows(row, table.mT) is not None
        assert bounds.linear(x, w, b).ratio(backend.to_numpy(y)) <= 1
        assert bounds.linear(x, w).ratio(backend.to_numpy(logits)) <= 1


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_one_row_as_on_cuda_is_within_its_error_bound(backend, dtype):
    """Catches a sum over the wrong axis, and products that are rounded to 16 bits before they are summed.

    JAX has other forms of these products for CUDA. Here they run on the CPU.
    """
    adapter = sys.modules[type(backend).__module__]
    random = np.random.default_rng(5)
    x, w = normal(random, (1, 96), dtype), normal(random, (96, 200), dtype)
    row = backend.from_numpy(x)
    layer = adapter._row_times_on_gpu(row, backend.from_numpy(w))
    logits = adapter._times_row_on_gpu(row, backend.from_numpy(w.T.copy()))[None]
    for y in (layer, logits):
        computed = backend.to_numpy(y.astype(row.dtype))
        assert 0.01 <= bounds.linear_at_random(x, w, np.zeros(200, x.dtype)).ratio(computed) <= 1


def test_a_weight_with_a_leading_1_gives_the_same_bits(backend, dtype):
    """Catches a second path for the shape that OpenAI's checkpoints have."""
    random = np.random.default_rng(2)
    x, w, b = normal(random, (3, 7, 33), dtype), normal(random, (33, 9), dtype), normal(random, (9,), dtype)
    for form, op in claims.forms(pg.conv1d, backend).items():
        plain, leading = claims.compute(op, backend, x, w, b), claims.compute(op, backend, x, w[None], b)
        assert plain.tobytes() == leading.tobytes(), form


@pytest.mark.parametrize("batch", [(), (1,), (6,), (3, 2), (1, 3, 2), (2, 1, 3, 1)], ids=str)
def test_leading_axes_are_rows(backend, batch):
    """Catches leading axes, zero or more, that are mixed up or lost."""
    random = np.random.default_rng(3)
    x, w, b = (normal(random, shape, "float32") for shape in ((*batch, 5), (5, 3), (3,)))
    for form, op in claims.forms(pg.conv1d, backend).items():
        result = claims.compute(op, backend, x, w, b)
        assert result.shape == (*batch, 3), form
        assert result.tobytes() == claims.compute(op, backend, x.reshape(-1, 5), w, b).tobytes(), form


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", list(CONVOLUTIONS), indirect=True)
def test_conv1d_is_a_convolution_of_width_1(backend, dtype):
    """Catches a layer that is not what OpenAI named it after: each framework's own convolution, in channels last."""
    random = np.random.default_rng(4)
    for positions, nx, nf in ((1, 1, 1), (7, 24, 36)):
        x, w, b = (normal(random, shape, dtype) for shape in ((2, positions, nx), (1, nx, nf), (nf,)))
        convolved = claims.compute(CONVOLUTIONS[backend.name], backend, x, w, b)
        twice = bounds.Bounded(bounds.exact(convolved), 2 * bounds.linear(x, w, b).error)
        for form, op in claims.forms(pg.conv1d, backend).items():
            ratio = twice.ratio(claims.compute(op, backend, x, w, b))
            assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times the sum of the bounds"


@strategies.wide_dtypes
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)
def test_conv1d_of_ordinary_numbers_raises_no_floating_point_flag(backend, dtype):
    """Catches warnings that a user could do nothing about."""
    random = np.random.default_rng(6)
    layer = [normal(random, shape, dtype) for shape in ((4, 33), (33, 5), (5,))]
    for form in claims.forms(pg.conv1d, backend).values():
        with np.errstate(all="raise", under="ignore"):
            computed = backend.to_numpy(form(*map(backend.from_numpy, layer)))
        assert np.isfinite(computed).all()
