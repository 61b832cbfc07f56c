"""embed and unembed: rows to the bit, and logits within a derived bound of the exact ones."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, operations, strategies
from portable_gpt2.testing.cases import UNIT

pytestmark = pytest.mark.every_device


def normal(random, shape, dtype):
    return random.normal(0, 1, shape).astype(bounds.host_dtype(dtype))


@given(data=st.data())
def test_embed_returns_the_rows_of_the_table_to_the_bit(backend, dtype, data):
    """Catches rows of a neighbour, arithmetic on what need only be copied, and writing into the argument."""
    ids, w = data.draw(operations.rows(dtype, strategies.integer_dtypes(backend)))
    expected = np.asarray(w)[ids]
    for form, op in claims.forms(pg.embed, backend).items():
        computed = claims.compute(op, backend, ids, w)
        assert computed.dtype == w.dtype, form
        assert computed.shape == expected.shape, form
        assert computed.tobytes() == expected.tobytes(), f"{form}: {computed} is not {expected}"


def test_compiled_embed_returns_the_same_bits(backend, dtype):
    """Catches a compiler that gathers by a product with ones and zeros."""
    random = np.random.default_rng(1)
    w, ids = normal(random, (50, 8), dtype), random.integers(0, 50, (3, 4)).astype(np.int32)
    for form, op in claims.forms(pg.embed, backend, compiled=True).items():
        assert claims.compute(op, backend, ids, w).tobytes() == w[ids].tobytes(), form


@given(data=st.data())
def test_unembed_is_within_its_error_bound(backend, dtype, data):
    """Catches a table that is not transposed, 16-bit or TF32 products, and writing into the argument."""
    x, w = data.draw(operations.products_with_a_table(dtype))
    expected = bounds.linear(x, w.T)
    for form, op in claims.forms(pg.unembed, backend).items():
        computed = claims.compute(op, backend, x, w)
        assert claims.assert_within(expected, computed, "unembed", backend, dtype, form) <= 1


def test_the_bound_of_unembed_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(2)
    x, w = normal(random, (30, 12), dtype), normal(random, (40, 12), dtype)
    expected = bounds.linear(x, w.T)
    for form, op in claims.forms(pg.unembed, backend, compiled=True).items():
        ratio = claims.assert_within(expected, claims.compute(op, backend, x, w), "unembed", backend, dtype, form)
        assert ratio >= 0.01, f"{form}: the bound is {1 / ratio:.0f} times the worst error"


def test_a_table_that_was_prepared_means_the_same(backend, dtype):
    """Catches a layout that `relayout` likes and an op does not: the rows are the same, the logits within the bound."""
    random = np.random.default_rng(3)
    x, w, ids = normal(random, (4, 24), dtype), normal(random, (70, 24), dtype), np.asarray([[69, 0], [7, 7]], np.int32)
    table = backend.relayout("wte", backend.from_numpy(w))
    for form, op in claims.forms(pg.embed, backend).items():
        assert backend.to_numpy(op(backend.from_numpy(ids), table)).tobytes() == w[ids].tobytes(), form
    for form, op in claims.forms(pg.unembed, backend).items():
        computed = backend.to_numpy(op(backend.from_numpy(x), table))
        assert claims.assert_within(bounds.linear(x, w.T), computed, "unembed", backend, dtype, form) <= 1


def test_unembed_is_conv1d_with_the_table_transposed(backend, dtype):
    """Catches a scale or a bias that slipped into the logits."""
    random = np.random.default_rng(4)
    x, w = normal(random, (2, 3, 16), dtype), normal(random, (9, 16), dtype)
    b = np.zeros(9, w.dtype)
    layer = claims.compute(pg.conv1d, backend, x, np.ascontiguousarray(w.T), b)
    error = bounds.linear(x, w.T).error + bounds.linear(x, w.T, b).error
    for form, op in claims.forms(pg.unembed, backend).items():
        ratio = bounds.Bounded(bounds.exact(layer), error).ratio(claims.compute(op, backend, x, w))
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times the sum of the bounds"


@pytest.mark.parametrize("narrow", ["float32", "bfloat16"])
def test_padded_rows_of_the_table_reach_no_result(torch, monkeypatch, narrow):
    """Catches a padded column that wins the argmax, or counts in the sum of a softmax, and gradients of the padding.

    All logits are negative, and a padded column would be 0.
    """
    import portable_gpt2_backends.torch as adapter

    random = np.random.default_rng(4)
    w, x = normal(random, (70, 24), narrow), abs(normal(random, (2, 5, 24), narrow))
    w, x, targets = (torch.from_numpy(a.astype(np.float32)) for a in (-abs(w), x, random.integers(0, 70, (2, 5))))
    dtype = pg.get_backend("torch").dtype(narrow)
    w, x, targets = w.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), targets.long()

    def results(padding):
        monkeypatch.setattr(adapter, "_padding", lambda n, w: padding)
        logits = pg.unembed(x, w)
        value = pg.cross_entropy(logits.float(), targets)
        return logits.detach(), value.detach(), *torch.autograd.grad(value, (x, w))

    expected, found = results(0), results(58)
    assert adapter._padding(10, w) == 58
    assert torch.equal(found[0].argmax(-1), expected[0].argmax(-1))
    assert (found[0] < 0).all()
    u = UNIT[narrow]
    for y, true in zip(found, expected, strict=True):
        torch.testing.assert_close(y, true, rtol=8 * u, atol=8 * u * float(true.abs().max()))


def test_the_table_is_padded_for_many_rows_in_16_bits_on_an_accelerator(torch):
    """Catches a copy of the table for every token that is decoded, and slow products in training."""
    from portable_gpt2_backends.torch import _padding

    dtypes = pg.get_backend("torch").dtypes
    table = {name: torch.empty((50257, 8), dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    assert [_padding(8192, table[name]) for name in ("bfloat16", "float16", "float32")] == [47, 47, 0]
    assert _padding(8192, table["bfloat16"][:50240]) == _padding(32, table["bfloat16"]) == 0
    assert _padding(8192, torch.empty((50257, 8), dtype=torch.bfloat16)) == 0
    x = torch.empty((8, 1024, 8), dtype=torch.bfloat16, device="meta")
    assert pg.unembed(x, table["bfloat16"]).shape == (8, 1024, 50257)
