"""softmax: each result within a derived bound of the exact one, and what follows from being a distribution."""

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims, operations, strategies

pytestmark = pytest.mark.every_device


def bound(x, backend, *, axis=-1):
    return bounds.softmax(x, axis=axis, numerics=stated(backend, x.dtype.name))


@given(data=st.data())
def test_softmax_is_within_its_error_bound(backend, dtype, data):
    """Catches a maximum that is not subtracted, 16-bit sums, a wrong axis, and writing into the argument."""
    x, axis = data.draw(operations.arrays_and_axes(dtype))
    expected = bound(x, backend, axis=axis)
    for form, op in claims.forms(pg.softmax, backend).items():
        computed = claims.compute(op, backend, x, axis=axis)
        assert claims.assert_within(expected, computed, "softmax", backend, dtype, form) <= 1


def test_the_bound_of_softmax_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(1)
    widths = random.choice([1, 10, 60], (16, 1))
    for n in (64, 700):
        x = random.normal(0, widths, (16, n)).astype(bounds.host_dtype(dtype))
        for form, op in claims.forms(pg.softmax, backend, compiled=n == 64).items():
            computed = claims.compute(op, backend, x)
            ratio = claims.assert_within(bound(x, backend), computed, "softmax", backend, dtype, form)
            assert ratio >= 0.01, f"{form}: the bound is {1 / ratio:.0f} times the worst error"


@pytest.mark.parametrize("shape", [(9, 70, 150), (3000, 7), (400, 3, 90)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_of_many_numbers_is_within_its_error_bound(backend, shape, axis):
    """Catches blocks that overlap, are left out or are cut across the axis: adapters work through large arrays so."""
    if axis >= len(shape):
        axis = -2
    x = np.random.default_rng(3).normal(0, 10, shape).astype(np.float32)
    for name, given_x in {"contiguous": x, "transposed": np.ascontiguousarray(x.T).T}.items():
        computed = backend.to_numpy(pg.softmax(backend.from_numpy(given_x), axis=axis))
        assert bound(x, backend, axis=axis).ratio(computed) <= 1, name


@strategies.wide_dtypes
def test_exp_errs_by_no_more_than_is_stated(backend, dtype):
    """Catches a stated error of exp that does not hold: the bounds of softmax and attention rest on it.

    In a row of one 0 and numbers so small that their sum is lost next to 1, softmax is exp, and attention to a unit
    matrix of values is softmax: so the kernels' own exp is seen too.
    """
    unit, smallest, _ = bounds.FORMATS[dtype]
    n = 50_000 if dtype == "float32" else 2_000
    host = bounds.host_dtype(dtype)
    lowest, lost = np.log(4 * smallest), np.log(unit / n) - 1
    random = np.random.default_rng(2)
    anywhere = random.uniform(lowest, 0, n).astype(host)
    far = np.concatenate([[0], random.uniform(lowest, lost, 1000)]).astype(host)

    def error(computed, x):
        exponential = bounds.exponential(x)
        return float(np.max(bounds.distance(computed, exponential) / exponential.astype(np.float64))) / unit

    one, keys, values = np.ones((1, 1), host), far[:, None], np.eye(len(far), dtype=host)
    seen = {
        "exp": error(claims.compute(backend.xp.exp, backend, anywhere), anywhere),
        "softmax": error(claims.compute(pg.softmax, backend, far), far),
        "softmax over the first axis": error(claims.compute(pg.softmax, backend, keys, axis=0), keys),
        "attention": error(claims.compute(pg.attention, backend, one, keys, values, scale=1.0)[0], far),
    }
    largest, _ = stated(backend, dtype).exp
    claims.record("exp", backend, dtype, max(seen.values()) / largest)
    assert max(seen.values()) <= largest, f"{seen}, in units of u; stated is {largest}"


@strategies.fewer
@given(data=st.data())
def test_softmax_sums_to_1(backend, dtype, data):
    """Catches sums in too few bits, and division by another row's sum.

    Whatever exp's error is, the results are its values over their sum, of relative error n u by the additions and the
    division. Flushing costs 4s for each; 16 bits round each result once more.
    """
    x, axis = data.draw(operations.arrays_and_axes(dtype))
    n = x.shape[axis]
    unit, smallest, _ = bounds.FORMATS[bounds.computed_in(dtype)]
    stored = bounds.FORMATS[dtype]
    allowed = n * (unit + 4 * smallest)
    if dtype != bounds.computed_in(dtype):
        allowed += stored.unit * (1 + allowed) + n * stored.smallest
    for form, op in claims.forms(pg.softmax, backend).items():
        computed = claims.compute(op, backend, x, axis=axis).astype(np.longdouble)
        assert np.all((computed >= 0) & (computed <= 1 + unit)), f"{form}: not between 0 and 1"
        sums = computed.sum(axis=axis)
        assert np.all(abs(sums - 1) <= allowed) or not n, f"{form}: a row sums to {sums}, allowed is {allowed}"


@strategies.fewer
@given(data=st.data())
def test_softmax_of_a_permuted_row_is_permuted(backend, dtype, data):
    """Catches a result that depends on the place in the row by more than the order of summation can."""
    x = data.draw(strategies.arrays(data.draw(strategies.shapes(least=1)), dtype))
    order = np.asarray(data.draw(st.permutations(range(x.shape[-1]))), int)
    expected = bound(x[..., order], backend)
    for form, op in claims.forms(pg.softmax, backend).items():
        permuted = claims.compute(op, backend, x[..., order])
        straight = claims.compute(op, backend, x)[..., order]
        ratio = bounds.Bounded(bounds.exact(straight), 2 * expected.error).ratio(permuted)
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times twice the bound"


@strategies.fewer
@given(data=st.data())
def test_softmax_does_not_change_when_a_constant_is_added(backend, dtype, data):
    """Catches a subtraction of anything but the maximum. Integers up to 128 and their sums are exact in every dtype."""
    shape = data.draw(strategies.shapes(least=1))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    constant = data.draw(st.integers(-64, 64))
    x = random.integers(-64, 65, shape)
    host = bounds.host_dtype(dtype)
    expected = bound(x.astype(host), backend)
    for form, op in claims.forms(pg.softmax, backend).items():
        shifted = claims.compute(op, backend, (x + constant).astype(host))
        straight = claims.compute(op, backend, x.astype(host))
        ratio = bounds.Bounded(bounds.exact(straight), 2 * expected.error).ratio(shifted)
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times twice the bound"


UNDEFINED = {"NaN": [np.nan], "+inf": [np.inf], "both infinities": [np.inf, -np.inf], "NaN and -inf": [np.nan, -np.inf]}


def spoiled(random, shape, kinds, dtype):
    """Return rows of normal numbers, each spoiled in the way of its kind; "some -inf" alone leaves it defined."""
    x = random.normal(0, 3, shape)
    for row, kind in zip(x, kinds, strict=True):
        if kind == "only -inf":
            row[:] = -np.inf
        elif kind == "some -inf":
            row[random.permutation(len(row))[1 : 1 + random.integers(len(row))]] = -np.inf
        elif kind != "finite":
            places = random.permutation(len(row))
            for place, value in zip(places, UNDEFINED[kind], strict=False):
                row[place] = value
    return x.astype(bounds.host_dtype(dtype))


KINDS = ["finite", "some -inf", "only -inf", *UNDEFINED]


@strategies.fewer
@given(data=st.data())
def test_softmax_of_a_row_with_nan_or_inf_or_only_minus_inf_is_nan_as_a_whole(backend, dtype, data):
    """Catches zeros left in a row with a NaN, NaN that spreads to other rows, and -inf that does not become 0."""
    n = data.draw(strategies.lengths([1, 5, 17], least=1, most=20))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=4, max_size=4))
    axis = data.draw(st.sampled_from([-1, 0]))
    x = spoiled(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), (4, n), kinds, dtype)
    x = x if axis == -1 else np.ascontiguousarray(x.T)
    nan = np.broadcast_to(np.expand_dims([kind in {*UNDEFINED, "only -inf"} for kind in kinds], axis), x.shape)
    for form, op in claims.forms(pg.softmax, backend).items():
        computed = claims.compute(op, backend, x, axis=axis)
        assert np.array_equal(np.isnan(computed), nan), f"{form} of {x} is {computed}"
        assert claims.assert_within(bound(x, backend, axis=axis), computed, "softmax", backend, dtype, form) <= 1
        assert not np.any(computed[(x == -np.inf) & ~nan]), f"{form}: -inf became more than 0"


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("kind", [*UNDEFINED, "only -inf"])
def test_one_undefined_row_of_a_large_array_is_nan_as_a_whole(backend, kind, axis):
    """Catches a kernel for large arrays that leaves zeros in a row with a NaN, as oneDNN's does."""
    x = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    x[7] = -np.inf if kind == "only -inf" else x[7]
    x[7, 100 : 100 + len(UNDEFINED.get(kind, []))] = UNDEFINED.get(kind, [])
    x = x if axis == -1 else np.ascontiguousarray(x.T)
    computed = backend.to_numpy(pg.softmax(backend.from_numpy(x), axis=axis))
    rows = np.moveaxis(computed, axis, -1)
    assert np.isnan(rows[7]).all()
    assert np.isfinite(np.delete(rows, 7, axis=0)).all()


def test_compiled_softmax_keeps_the_rule_for_nan(backend, dtype):
    """Catches a compiler that simplifies away what spreads a NaN over its row."""
    kinds = KINDS * 3
    x = spoiled(np.random.default_rng(3), (len(kinds), 9), kinds, dtype)
    nan = [kind in {*UNDEFINED, "only -inf"} for kind in kinds]
    forms = claims.forms(pg.softmax, backend, compiled=True)
    if backend.name == "tensorflow":
        import tensorflow as tf

        # Grappler leaves small graphs alone, so there is more in this one.
        forms["graph"] = tf.function(lambda x: functools.reduce(tf.maximum, [pg.softmax(x + i) for i in range(6)]))
    for form, op in forms.items():
        computed = claims.compute(op, backend, x)
        assert np.array_equal(np.isnan(computed).all(axis=-1), nan), f"{form}: a row that should be NaN is not"
        assert np.array_equal(np.isnan(computed).any(axis=-1), nan), f"{form}: a row that should not be NaN is"


@strategies.wide_dtypes
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)
def test_softmax_of_ordinary_numbers_raises_no_floating_point_flag(backend, dtype):
    """Catches warnings that a user could do nothing about."""
    x = np.random.default_rng(5).normal(0, 1e4, (16, 32)).astype(dtype)
    for form in claims.forms(pg.softmax, backend).values():
        with np.errstate(all="raise", under="ignore"):
            computed = backend.to_numpy(form(backend.from_numpy(x)))
        assert np.isfinite(computed).all()
