"""Kernels of PyTorch's adapter that another processor or an accelerator would choose, run on this CPU."""

import sys

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.cases import UNIT
from portable_gpt2.testing.ops import test_conv1d

pytestmark = pytest.mark.every_device("torch")
of_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)


def normal(random, shape, dtype, width=1.0):
    return random.normal(0, width, shape).astype(bounds.host_dtype(dtype))


@pytest.fixture
def adapter(torch):
    return sys.modules[type(pg.get_backend("torch")).__module__]


# Products


@of_torch
@pytest.mark.parametrize("shape", [(768, 1536), (1536, 384)], ids=["wide", "tall"])
@pytest.mark.parametrize("rows", [1, 3, 4, 32, 300])
def test_a_large_product_as_on_the_other_kind_of_processor_is_within_its_error_bound(
    backend, adapter, rows, shape, monkeypatch
):
    """Catches blocks of a weight that are combined wrongly. PyTorch's adapter splits it on some processors only."""
    monkeypatch.setattr(adapter, "_IS_BLOCKED", not adapter._IS_BLOCKED)
    for ratio in test_conv1d.ratios_of_large_products(backend, rows, shape).values():
        assert 0.01 <= ratio <= 1


@of_torch
@strategies.narrow_dtypes
@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_large_16_bit_product_is_within_its_error_bound(
    backend, adapter, dtype, multiplied, rows, torch, monkeypatch
):
    """Catches a sum in 16 bits, a bias that is added twice, and blocks of columns in the wrong order.

    The processor may multiply 16-bit matrices or not. In inference mode, in which a decode step runs, one row is
    multiplied as a sum of weighted rows.
    """
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


# Attention: one query takes another path on an accelerator


@pytest.fixture
def accelerated(adapter, monkeypatch):
    """Return attention as PyTorch computes it on an accelerator, here on a CPU."""

    def attention(*arrays, **options):
        with monkeypatch.context() as patch:
            patch.setattr(adapter, "_is_launched", lambda x: True)
            patch.setattr(adapter, "_has_weights", lambda y: True)
            return pg.attention(*arrays, **options)

    return attention


def judge(accelerated, backend, q, k, v, mask=None, *, causal=False, scale=None):
    expected = bounds.attention(q, k, v, mask, causal=causal, scale=scale, numerics=stated(backend, q.dtype.name))
    options = {"causal": causal, "scale": scale}
    results = claims.Results(pg.attention, backend, (q, k, v, mask), options)
    results.add("accelerated", accelerated)
    return claims.assert_within(expected, results)


def head(random, batch, queries, keys, d, dtype, width):
    """Return q, k and v of random numbers; the scores' standard deviation is the square of the width."""
    q, k = (normal(random, (*batch, n, d), dtype, width) for n in (queries, keys))
    return q, k, normal(random, (*batch, keys, d), dtype)


@of_torch
@pytest.mark.parametrize(("batch", "keys"), [((), 1), ((3,), 7), ((2, 3), 40)], ids=str)
def test_one_query_on_an_accelerator_is_within_its_error_bound(backend, dtype, batch, keys, accelerated):
    """Catches a scale, a mask or a leading axis that the small products for one query lose."""
    random = np.random.default_rng(keys)
    q, k, v = head(random, batch, 1, keys, 8, dtype, 2.0)
    for leading in {(), batch[:1], batch}:
        mask = random.random((*leading, *(1,) * (len(batch) - len(leading)), 1, keys)) < 0.5
        mask[..., 0] = True
        judge(accelerated, backend, q, k, v)
        judge(accelerated, backend, q, k, v, mask)
        judge(accelerated, backend, q, k, v, scale=0.3)
        judge(accelerated, backend, q, k, v, mask, scale=1.0, causal=True)
    mask[...] = False
    assert np.isnan(claims.compute(accelerated, backend, q, k, v, mask).astype(np.float32)).all()


@of_torch
@strategies.narrow_dtypes
@pytest.mark.parametrize("queries", [1, 3])
def test_in_16_bits_weights_are_rounded_at_most_once_on_an_accelerator(backend, dtype, queries, accelerated):
    """Catches exponentials and weights that are both rounded to 16 bits, and scores that are: see test_attention.py."""
    q, k, v = head(np.random.default_rng(11), (4000,), queries, 2, 1, dtype, 2.0)
    v[:, 0], v[:, 1] = 1 + abs(v[:, 0]), 0
    claims.assert_tight(judge(accelerated, backend, q, k, v), 0.1)


@of_torch
@pytest.mark.parametrize("queries", [1, 3])
def test_scores_may_exceed_the_range_of_float16_on_an_accelerator(backend, queries, accelerated):
    """Catches scores that overflow in 16 bits, though not in float32."""
    ratios = judge(accelerated, backend, *head(np.random.default_rng(12), (2, 3), queries, 5, 8, "float16", 200.0))
    assert max(ratios.values()) <= 1


# The embedding matrix is padded


@pytest.mark.parametrize("narrow", ["float32", "bfloat16"])
def test_padded_rows_of_the_table_reach_no_result(torch, adapter, monkeypatch, narrow):
    """Catches a padded column that wins the argmax, or counts in the sum of a softmax, and gradients of the padding.

    All logits are negative, and a padded column would be 0.
    """
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


def test_the_table_is_padded_for_many_rows_in_16_bits_on_an_accelerator(torch, adapter):
    """Catches a copy of the table for every token that is decoded, and slow products in training."""
    dtypes = pg.get_backend("torch").dtypes
    table = {name: torch.empty((50257, 8), dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    assert [adapter._padding(8192, table[name]) for name in ("bfloat16", "float16", "float32")] == [47, 47, 0]
    assert adapter._padding(8192, table["bfloat16"][:50240]) == adapter._padding(32, table["bfloat16"]) == 0
    assert adapter._padding(8192, torch.empty((50257, 8), dtype=torch.bfloat16)) == 0
    x = torch.empty((8, 1024, 8), dtype=torch.bfloat16, device="meta")
    assert pg.unembed(x, table["bfloat16"]).shape == (8, 1024, 50257)
