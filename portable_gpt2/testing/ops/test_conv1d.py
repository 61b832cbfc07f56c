"""conv1d: each result within a derived bound of the exact one, with any number of leading axes."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("conv1d")]


def normal(random, shape, dtype):
    return random.normal(0, 1, shape).astype(bounds.host_dtype(dtype))


@given(data=st.data())
def test_conv1d_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches a forgotten bias, a transposed weight, 16-bit or TF32 products, and writing into the argument."""
    OPERATIONS["conv1d"].check(backend, dtype, data)


def test_the_bound_of_conv1d_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(1)
    layer = normal(random, (40, 12), dtype), normal(random, (12, 20), dtype), normal(random, (20,), dtype)
    results = claims.results(pg.conv1d, backend, *layer, compiled=True)
    claims.assert_tight(claims.assert_within(bounds.linear(*layer), results))


@pytest.mark.parametrize("depth", [1, 64, 768, 3072])
def test_conv1d_of_random_numbers_errs_as_random_errors_add_up(backend, dtype, depth):
    """Catches sums in too few bits at depths where the worst case, which grows as K and not as sqrt(K), is loose."""
    random = np.random.default_rng(depth)
    rows, columns = (2, 3) if dtype == "float64" else (16, 24)
    layer = [normal(random, shape, dtype) for shape in ((rows, depth), (depth, columns), (columns,))]
    expected = bounds.linear_at_random(*layer)
    for form, computed in claims.results(pg.conv1d, backend, *layer).items():
        ratio = expected.ratio(computed)
        assert 0.01 <= ratio <= 1, f"{form}: the error is {ratio:.3g} times 4 sqrt(K + 1) u Q"


def ratios_of_large_products(backend, rows, shape):
    """Return error / bound of conv1d, and of unembed with the same matrix, by the op's name; check equal bits twice.

    The matrices have the memory layout of a model's.
    """
    random = np.random.default_rng(rows)
    x, w, b = (normal(random, each, "float32") for each in ((rows, shape[0]), shape, shape[1:]))
    row, bias = backend.from_numpy(x), backend.from_numpy(b)
    weight = backend.relayout("h0/mlp/c_proj/w", backend.from_numpy(w))
    table = backend.relayout("wte", backend.from_numpy(w.T.copy()))
    ratios = {}
    for op, arrays, added in ((pg.conv1d, (row, weight, bias), b), (pg.unembed, (row, table), np.zeros_like(b))):
        first, second = (backend.to_numpy(op(*arrays)) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        ratios[op.__name__] = bounds.linear_at_random(x, w, added).ratio(first)
    return ratios


@pytest.mark.parametrize("shape", [(768, 1536), (1536, 384)], ids=["wide", "tall"])
@pytest.mark.parametrize("rows", [1, 3, 4, 32, 300])
def test_a_product_with_a_large_weight_is_within_its_error_bound(backend, rows, shape):
    """Catches blocks of a weight that are combined wrongly, and a second call that gives other bits than the first.

    Adapters split the weight for small batches. The product for the logits is tested together with conv1d.
    """
    for name, ratio in ratios_of_large_products(backend, rows, shape).items():
        assert 0.01 <= ratio <= 1, f"{name}: the error is {ratio:.3g} times 4 sqrt(K + 1) u Q"


def test_a_weight_with_a_leading_1_gives_the_same_bits(backend, dtype):
    """Catches a second path for the shape that OpenAI's checkpoints have."""
    random = np.random.default_rng(2)
    x, w, b = normal(random, (3, 7, 33), dtype), normal(random, (33, 9), dtype), normal(random, (9,), dtype)
    plain, leading = (claims.results(pg.conv1d, backend, x, weight, b) for weight in (w, w[None]))
    for form in plain:
        assert plain[form].tobytes() == leading[form].tobytes(), form


@pytest.mark.parametrize("batch", [(), (1,), (6,), (3, 2), (1, 3, 2), (2, 1, 3, 1)], ids=str)
def test_leading_axes_are_rows(backend, batch):
    """Catches leading axes, zero or more, that are mixed up or lost."""
    random = np.random.default_rng(3)
    x, w, b = (normal(random, shape, "float32") for shape in ((*batch, 5), (5, 3), (3,)))
    results, rows = (claims.results(pg.conv1d, backend, each, w, b) for each in (x, x.reshape(-1, 5)))
    for form, computed in results.items():
        assert computed.shape == (*batch, 3), form
        assert computed.tobytes() == rows[form].tobytes(), form
