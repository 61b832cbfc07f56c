"""embed and unembed: rows to the bit, and logits within a derived bound of the exact ones."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, operations, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = pytest.mark.every_device


def normal(random, shape, dtype):
    return random.normal(0, 1, shape).astype(bounds.host_dtype(dtype))


@given(data=st.data())
def test_embed_returns_the_rows_of_the_table_to_the_bit(backend, dtype, data):
    """Catches rows of a neighbour, arithmetic on rows that should only be copied, and writing into the argument."""
    ids, w = data.draw(operations.rows(dtype, strategies.integer_dtypes(backend)))
    expected = np.asarray(w)[ids]
    for form, computed in claims.results(pg.embed, backend, ids, w).items():
        assert computed.dtype == w.dtype, form
        assert computed.shape == expected.shape, form
        assert computed.tobytes() == expected.tobytes(), f"{form}: {computed} is not {expected}"


@pytest.mark.op("embed")
def test_compiled_embed_returns_the_same_bits(backend, dtype, form):
    """Catches a compiler that gathers by a product with ones and zeros."""
    random = np.random.default_rng(1)
    w, ids = normal(random, (50, 8), dtype), random.integers(0, 50, (3, 4)).astype(np.int32)
    assert claims.compute(form(pg.embed), backend, ids, w).tobytes() == w[ids].tobytes()


@given(data=st.data())
def test_unembed_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches a table that is not transposed, 16-bit or TF32 products, and writing into the argument."""
    OPERATIONS["unembed"].check(backend, dtype, data)


def test_the_bound_of_unembed_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(2)
    x, w = normal(random, (30, 12), dtype), normal(random, (40, 12), dtype)
    results = claims.results(pg.unembed, backend, x, w, compiled=True)
    claims.assert_tight(claims.assert_within(bounds.linear(x, w.T), results))


def test_a_table_in_another_memory_layout_means_the_same(backend, dtype):
    """Catches a layout that `relayout` returns and an op misreads: the rows are equal, and logits within the bound."""
    random = np.random.default_rng(3)
    x, w, ids = normal(random, (4, 24), dtype), normal(random, (70, 24), dtype), np.asarray([[69, 0], [7, 7]], np.int32)
    table = backend.relayout("wte", backend.from_numpy(w))
    logits = claims.Results(pg.unembed, backend, (x, w), {})
    for form in claims.FORMS[:2]:
        if claims.has_form(form, pg.embed, backend):
            rows = claims.in_form(form, pg.embed, backend)(backend.from_numpy(ids), table)
            assert backend.to_numpy(rows).tobytes() == w[ids].tobytes(), form
        if claims.has_form(form, pg.unembed, backend):
            y = claims.in_form(form, pg.unembed, backend)(backend.from_numpy(x), table)
            logits[form] = backend.to_numpy(y)
    claims.assert_within(bounds.linear(x, w.T), logits)


def test_unembed_is_conv1d_with_the_table_transposed(backend, dtype):
    """Catches a scale or a bias that slipped into the logits."""
    random = np.random.default_rng(4)
    x, w = normal(random, (2, 3, 16), dtype), normal(random, (9, 16), dtype)
    b = np.zeros(9, w.dtype)
    layer = claims.compute(pg.conv1d, backend, x, np.ascontiguousarray(w.T), b)
    error = bounds.linear(x, w.T).error + bounds.linear(x, w.T, b).error
    logits = claims.results(pg.unembed, backend, x, w)
    claims.assert_agree(dict.fromkeys(logits, layer), logits, error)
