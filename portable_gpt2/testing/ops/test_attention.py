"""attention: each result within a derived bound of the exact one, and what follows from averaging the values."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims, operations, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("attention")]


def normal(random, shape, dtype, width=1.0):
    return random.normal(0, width, shape).astype(bounds.host_dtype(dtype))


def head(random, batch, queries, keys, d, dtype, width=1.0):
    """Return q, k and v of random numbers; the scores' standard deviation is the square of the width."""
    q, k = (normal(random, (*batch, n, d), dtype, width) for n in (queries, keys))
    return q, k, normal(random, (*batch, keys, d), dtype)


def judge(backend, q, k, v, mask=None, *, compiled=False, **options):
    """Assert that attention is within its bound in each form. Return the largest error / bound of each form."""
    expected = bounds.attention(q, k, v, mask, **options, numerics=stated(backend, q.dtype.name))
    results = claims.results(pg.attention, backend, q, k, v, mask, compiled=compiled, **options)
    return claims.assert_within(expected, results)


@given(data=st.data())
def test_attention_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches a missing scale, a mask that leaks, weights rounded twice, and writing into the argument."""
    OPERATIONS["attention"].check(backend, dtype, data)


@given(data=st.data())
def test_attention_scores_are_within_their_error_bound_and_agree_with_numpy(backend, dtype, data):
    """Catches a hidden score that is not -inf, and a scale that is forgotten."""
    OPERATIONS["attention_scores"].check(backend, dtype, data)


@given(data=st.data())
def test_attention_weights_are_within_their_error_bound_and_agree_with_numpy(backend, dtype, data):
    """Catches weights of hidden keys that are not 0, a missing scale, and a softmax in 16 bits."""
    OPERATIONS["attention_weights"].check(backend, dtype, data)


def test_the_bound_of_attention_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed; the scale is 1/sqrt(d)."""
    q, k, v = head(np.random.default_rng(1), (2, 3), 6, 10, 8, dtype)
    mask = np.arange(10) <= np.arange(6)[:, None] + 4
    least = 0.01 if dtype == bounds.computed_in(dtype) else 0.1
    claims.assert_tight(judge(backend, q, k, v, mask, compiled=True), least)


@strategies.narrow_dtypes
@pytest.mark.parametrize("queries", [1, 3])
def test_in_16_bits_weights_are_rounded_at_most_once(backend, dtype, queries):
    """Catches exponentials and weights that are both rounded to 16 bits, and scores that are.

    There are two keys. The value of the second is 0, so the errors of the two weights cannot compensate each other.
    """
    q, k, v = head(np.random.default_rng(11), (4000,), queries, 2, 1, dtype, width=2.0)
    v[:, 0], v[:, 1] = 1 + abs(v[:, 0]), 0
    claims.assert_tight(judge(backend, q, k, v), 0.1)


@pytest.mark.parametrize("dtype", ["float16"], scope="module")
@pytest.mark.parametrize("queries", [1, 3])
def test_scores_may_exceed_the_range_of_float16(backend, dtype, queries):
    """Catches scores that overflow in 16 bits, though not in float32."""
    q, k, v = head(np.random.default_rng(12), (2, 3), queries, 5, 8, dtype, width=200.0)
    assert (abs(np.matmul(*map(np.float32, (q, k.swapaxes(-1, -2))))).max(axis=-1) > 2e5).any()
    judge(backend, q, k, v)


def test_attention_to_a_thousand_keys_is_within_its_error_bound(backend, dtype):
    """Catches a fused kernel that fails when it processes the keys in several blocks."""
    queries, keys = (2, 600) if dtype == "float64" else (40, 1024)
    q, k, v = head(np.random.default_rng(2), (1, 2), queries, keys, 8, dtype, width=2.0)
    judge(backend, q, k, v, np.arange(keys) <= np.arange(queries)[:, None] + keys - queries)


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_with_huge_scores_is_within_its_error_bound(backend, dtype, queries):
    """Catches a compiler that rounds the scaled score before it takes the maximum, and not before the exponential."""
    random = np.random.default_rng(7)
    q, k = (normal(random, (n, 8), dtype, 100.0 if dtype == "float16" else 1e9) for n in (queries, 4))
    judge(backend, q, k, normal(random, (4, 2), dtype), scale=0.3)


@pytest.mark.parametrize("offset", [0, 40])
@pytest.mark.parametrize("kind", ["causal", "padded", "scattered"])
def test_attention_of_many_queries_is_within_its_error_bound(backend, offset, kind):
    """Catches blocks of queries of which one skips a key that one of its queries sees."""
    random = np.random.default_rng(offset)
    queries, keys = 150, 150 + offset
    q, k, v = head(random, (2, 2), queries, keys, 8, "float32")
    mask = np.arange(keys) <= np.arange(queries)[:, None] + offset
    if kind == "padded":  # the first text has 30 tokens of padding in front, each of which sees itself
        shown = np.arange(keys) >= np.asarray([30, 0])[:, None, None, None]
        mask = (mask & shown) | (np.arange(keys) == np.arange(queries)[:, None])
    if kind == "scattered":
        mask = mask & ((random.random((queries, keys)) < 0.1) | (np.arange(keys) == np.arange(queries)[:, None]))
    judge(backend, q, k, v, mask)


@pytest.mark.parametrize("op", [pg.attention_scores, pg.attention_weights, pg.attention])
def test_a_query_sees_all_keys_unless_it_is_causal(backend, op):
    """Catches a default that hides the keys after a query."""
    q, k, v = head(np.random.default_rng(9), (2,), 3, 3, 4, "float32")
    arrays = (q, k, v) if op is pg.attention else (q, k)
    expected = claims.results(op, backend, *arrays, causal=False)
    for form, y in claims.results(op, backend, *arrays).items():
        np.testing.assert_allclose(y, expected[form], rtol=1e-5, atol=1e-6, err_msg=form)


@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (2, 5), (1, 4)])
def test_a_causal_query_sees_its_own_key_and_those_before_it(backend, queries, keys):
    """Catches a mask that is one off, and a cache, with more keys than queries, for which the mask is left out."""
    judge(backend, *head(np.random.default_rng(8), (2,), queries, keys, 4, "float32"), causal=True)


@strategies.fewer
@given(data=st.data())
def test_masked_keys_have_no_influence(backend, dtype, numerics, data):
    """Catches a mask that is an added number, from which enough can be added back.

    The bound of attention counts no masked key, however large. So it is the same after these keys and values change.
    """
    q, k, v, mask, scale = data.draw(operations.heads(dtype, masked=True))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    unseen = ~np.broadcast_to(mask, (*q.shape[:-1], k.shape[-2])).any(axis=-2)[..., None]
    other_k = np.where(unseen, normal(random, k.shape, dtype, 100), k)
    other_v = np.where(unseen, normal(random, v.shape, dtype, 1e4), v)
    pairs = ((k, v), (other_k, other_v))
    error = sum(bounds.attention(q, *pair, mask, scale=scale, numerics=numerics).error for pair in pairs)
    claims.assert_agree(*(claims.results(pg.attention, backend, q, *pair, mask, scale=scale) for pair in pairs), error)


@strategies.fewer
@given(data=st.data())
def test_results_are_between_the_values_that_are_seen(backend, dtype, numerics, data):
    """Catches weights that do not sum to 1, and values of keys that are not seen.

    Whatever the scores are, the weights are nonnegative and sum to 1 within gamma(n), and their product with the values
    adds gamma(n + 1): the result is within gamma(2n + 1) max |v| of the hull, and s for each of n weights and products.
    In 16 bits, the weights and the result may each be rounded once.
    """
    q, k, v, mask, scale = data.draw(operations.heads(dtype))
    n = k.shape[-2]
    seen = np.broadcast_to(True if mask is None else mask, (*q.shape[:-1], n))[..., None]
    wide = v.astype(np.float64)[..., None, :, :]
    unit, smallest, _ = bounds.FORMATS[bounds.computed_in(dtype)]
    magnitude = np.max(np.where(seen, abs(wide), 0), axis=-2)
    margin = bounds.gamma(2 * n + 1, unit) * magnitude + n * smallest * (4 * magnitude + 2)
    if dtype != bounds.computed_in(dtype):
        stored = bounds.FORMATS[dtype]
        margin += 2 * stored.unit * (magnitude + margin) + stored.smallest * (1 + n * magnitude)
    low = np.min(np.where(seen, wide, np.inf), axis=-2) - margin
    high = np.max(np.where(seen, wide, -np.inf), axis=-2) + margin
    promised = np.isfinite(bounds.attention(q, k, v, mask, scale=scale, numerics=numerics).error)
    for form, computed in claims.results(pg.attention, backend, q, k, v, mask, scale=scale).items():
        y = computed.astype(np.float64)
        assert np.all(((low <= y) & (y <= high))[promised]), f"{form}: {y} is not between {low} and {high}"


@strategies.fewer
@given(data=st.data())
def test_the_order_of_the_keys_does_not_matter(backend, dtype, numerics, data):
    """Catches a mask that is applied to other keys than it names."""
    q, k, v, mask, scale = data.draw(operations.heads(dtype))
    order = np.asarray(data.draw(st.permutations(range(k.shape[-2]))), int)
    other = q, k[..., order, :], v[..., order, :], None if mask is None else mask[..., order]
    error = 2 * bounds.attention(q, k, v, mask, scale=scale, numerics=numerics).error
    both = (claims.results(pg.attention, backend, *arrays, scale=scale) for arrays in ((q, k, v, mask), other))
    claims.assert_agree(*both, error, "twice the bound")


def test_a_query_that_sees_one_key_gives_it_all_its_weight(backend, dtype):
    """Catches a mask one column off, and weights of masked keys that are small but not 0.

    With a unit matrix of values the result is the weights. The weight that should be 1 may differ from 1 by the bound,
    because exp(0) is not quite 1 in oneDNN on some processors. The other weights are exactly 0.
    """
    random = np.random.default_rng(3)
    q, k, _ = head(random, (2,), 7, 7, 8, dtype, width=3.0)
    v = np.broadcast_to(np.eye(7, dtype=k.dtype), (2, 7, 7)).copy()
    mask = np.eye(7, dtype=bool)[random.permutation(7)]
    results = claims.results(pg.attention, backend, q, k, v, mask)
    for form, weights in results.items():
        assert not weights[:, ~mask].any(), form
    claims.assert_within(bounds.attention(q, k, v, mask, numerics=stated(backend, dtype)), results)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (2, 3)], ids=str)
def test_the_leading_axes_of_a_mask_broadcast(backend, leading):
    """Catches a kernel that takes a mask's leading axes for something else."""
    random = np.random.default_rng(4)
    q, k, v = head(random, (2, 3), 4, 5, 8, "float32")
    mask = random.random((*leading, 4, 5)) < 0.5
    mask[..., 0] = True
    judge(backend, q, k, v, mask)


def test_a_mask_of_floats_is_refused_for_one_query_too(backend):
    """Catches a kernel for one query that reads a mask of zeros, meant to be added, as a mask that hides every key."""
    q, k = backend.from_numpy(np.ones((2, 1, 4), np.float32)), backend.from_numpy(np.ones((2, 3, 4), np.float32))
    mask = backend.from_numpy(np.zeros((1, 3), np.float32))
    with pytest.raises(TypeError, match=r"mask has dtype .*; expected bool"):
        pg.attention(q, k, k, mask)


# Masked keys, scores that overflow, and empty arrays. The arrays have the four axes of the model: a fused kernel may
# take no others.


def far(queries, keys, dtype):
    """Return q and k whose products overflow to -inf, [1, 1, queries, 4] and [1, 1, keys, 4]."""
    root = bounds.FORMATS[bounds.computed_in(dtype)].largest ** 0.5
    root = min(float(bounds.FORMATS[dtype].largest) / 2, float(root) * 2)
    host = bounds.host_dtype(dtype)
    return np.full((1, 1, queries, 4), root, host), np.full((1, 1, keys, 4), -root, host)


FOUR = np.asarray([[[[1.0], [2.0], [3.0], [1000.0]]]], np.float32)  # the values of four keys, the last one hidden


@pytest.mark.parametrize("queries", [1, 3])
def test_a_hidden_key_has_no_weight_though_every_visible_score_overflows(backend, queries):
    """Catches a hidden score that is the smallest finite number, and so above a visible one of -inf."""
    q, k = far(queries, 4, "float32")
    k[..., 3, :] = 0  # hidden: its score is 0
    mask = np.broadcast_to(np.asarray([True, True, True, False]), (queries, 4)).copy()
    for form, y in claims.results(pg.attention, backend, q, k, FOUR, mask, compiled=True).items():
        assert np.isnan(y).all(), f"{form}: {y}"
    for form, w in claims.results(pg.attention_weights, backend, q, k, mask, compiled=True).items():
        assert np.isnan(w).all(), f"{form}: {w}"


@pytest.mark.parametrize("queries", [1, 3])
def test_without_a_mask_a_row_of_overflowed_scores_is_nan(backend, queries):
    """Catches a fused kernel that makes it 0, where the softmax of a row of -inf is NaN."""
    q, k = far(queries, 2, "float32")
    for form, y in claims.results(
        pg.attention, backend, q, k, np.ones((1, 1, 2, 3), np.float32), compiled=True
    ).items():
        assert np.isnan(y).all(), form


@pytest.mark.parametrize("queries", [1, 3])
def test_one_visible_score_that_is_finite_takes_all_the_weight(backend, queries):
    """Catches a row that becomes NaN, or depends on hidden keys, because some of its scores overflow to -inf."""
    q, k = far(queries, 4, "float32")
    k[..., 1, :], k[..., 3, :] = 0, 1e-9
    mask = np.broadcast_to(np.asarray([True, True, True, False]), (queries, 4)).copy()
    for form, y in claims.results(pg.attention, backend, q, k, FOUR, mask, compiled=True).items():
        assert (y == 2).all(), form
    for form, w in claims.results(pg.attention_weights, backend, q, k, mask, compiled=True).items():
        assert (w == [0, 1, 0, 0]).all(), form


def test_a_row_that_sees_no_key_is_nan_and_leaves_the_others(backend, dtype):
    """Catches the mean of keys that are all hidden."""
    q, k, v = head(np.random.default_rng(6), (1, 2), 3, 4, 8, dtype)
    mask = np.ones((3, 4), np.bool_)
    mask[1] = False
    for op, arrays in ((pg.attention, (q, k, v, mask)), (pg.attention_weights, (q, k, mask))):
        for form, y in claims.results(op, backend, *arrays).items():
            assert np.isnan(y[..., 1, :].astype(np.float32)).all(), f"{form} of {op.__name__}: {y}"
            assert np.isfinite(y[..., [0, 2], :].astype(np.float32)).all(), f"{form} of {op.__name__}: {y}"


def test_values_that_are_zero_stay_so(backend, dtype):
    """Catches a result of 0 that is taken for a row without weights."""
    q, k, v = head(np.random.default_rng(7), (2,), 3, 4, 8, dtype)
    mask = np.arange(4) <= np.arange(3)[:, None]
    for form, y in claims.results(pg.attention, backend, q, k, 0 * v, mask).items():
        assert (y == 0).all(), form
    v[..., 0] = 0
    judge(backend, q, k, v, mask)


def test_weights_without_columns_are_equal(backend, dtype):
    """Catches 1/sqrt(0). A score is an empty sum, whatever the scale."""
    host = bounds.host_dtype(dtype)
    q, k, v = np.ones((2, 3, 0), host), np.ones((2, 4, 0), host), np.broadcast_to(np.arange(4), (2, 4)).astype(host)
    mask = np.broadcast_to(np.arange(4) < 2, (3, 4)).copy()
    for scale in (None, 0.5):
        for form, y in claims.results(pg.attention, backend, q, k, v[..., None].copy(), scale=scale).items():
            assert (y == 1.5).all(), f"{form}: {y}"
        for form, w in claims.results(pg.attention_weights, backend, q, k, mask, scale=scale).items():
            assert (w == [0.5, 0.5, 0, 0]).all(), f"{form}: {w}"


@pytest.mark.parametrize("queries", [1, 3])
def test_a_scale_of_zero_makes_the_weights_equal(backend, queries):
    """Catches a scale of 0 that is taken for one that was not given."""
    q, k, v = head(np.random.default_rng(8), (1, 2), queries, 4, 8, "float32")
    for y in claims.results(pg.attention, backend, q, k, v, compiled=True, scale=0.0).values():
        np.testing.assert_allclose(y, np.broadcast_to(v.mean(-2, keepdims=True), y.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_refused(backend, queries, scale):
    """Catches rows of NaN whose cause no message names."""
    q, k, v = map(backend.from_numpy, head(np.random.default_rng(9), (2,), queries, 4, 8, "float32"))
    for op in (pg.attention, pg.attention.reference):
        with pytest.raises(ValueError, match=f"attention: scale is {scale}; expected a finite number"):
            op(q, k, v, scale=scale)
    with pytest.raises(ValueError, match=f"attention: scale is {scale}"):
        pg.attention_weights(q, k, scale=scale)


def test_queries_without_keys_are_refused(backend, dtype):
    """Catches a mean of no values that is 0. Without queries there is no error, and the result is empty."""
    host = bounds.host_dtype(dtype)
    q, none = backend.from_numpy(np.ones((2, 3, 4), host)), backend.from_numpy(np.ones((2, 0, 4), host))
    for op in (pg.attention, pg.attention.reference):
        with pytest.raises(ValueError, match="attention: there are no keys"):
            op(q, none, none)
        assert tuple(backend.shape(op(none, q, q))) == (2, 0, 4)
        assert tuple(backend.shape(op(none, none, none))) == (2, 0, 4)


def test_gradients_give_a_hidden_key_nothing(backend):
    """Catches NaN from 0 * inf in the gradient, and a gradient of a hidden key or value, where its score is large."""
    q, k, v = head(np.random.default_rng(10), (2,), 3, 4, 8, "float32")
    k[:, 3], v[:, 3] = 1e18, 1e18
    mask = backend.from_numpy(np.broadcast_to(np.arange(4) < 3, (3, 4)).copy())
    given_arrays = [backend.from_numpy(a) for a in (q, k, v)]
    dy = backend.from_numpy(np.ones((2, 3, 8), np.float32))
    by_hand = gradients.attention(*given_arrays, mask)[1](dy)
    found = {"hand-written": [by_hand[name] for name in "qkv"]}
    for form, op in {"own": pg.attention, "own, definition": pg.attention.reference}.items():
        own = backend.value_and_grad(lambda leaves, op=op: backend.xp.sum(op(*leaves, mask)))
        if own is not NotImplemented:
            found[form] = own(given_arrays)[1]
    for way, (dq, dk, dv) in found.items():
        assert np.isfinite(backend.to_numpy(dq)).all(), way
        for gradient in (dk, dv):
            assert np.isfinite(backend.to_numpy(gradient)).all(), way
            assert (backend.to_numpy(gradient)[:, 3] == 0).all(), way
