"""softmax: each result within a derived bound of the exact one, and what follows from being a distribution."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims, operations, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("softmax")]


@given(data=st.data())
def test_softmax_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches a maximum that is not subtracted, 16-bit sums, a wrong axis, and writing into the argument."""
    OPERATIONS["softmax"].check(backend, dtype, data)


def test_the_bound_of_softmax_is_tight(backend, dtype, numerics):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(1)
    widths = random.choice([1, 10, 60], (16, 1))
    for n in (64, 700):
        x = random.normal(0, widths, (16, n)).astype(bounds.host_dtype(dtype))
        results = claims.results(pg.softmax, backend, x, compiled=n == 64)
        claims.assert_tight(claims.assert_within(bounds.softmax(x, numerics=numerics), results))


@pytest.mark.parametrize("shape", [(9, 70, 150), (3000, 7), (400, 3, 90)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_of_many_numbers_is_within_its_error_bound(backend, shape, axis):
    """Catches blocks of a large array that overlap, are left out or are split along the axis."""
    if axis >= len(shape):
        axis = -2
    x = np.random.default_rng(3).normal(0, 10, shape).astype(np.float32)
    expected = bounds.softmax(x, axis=axis, numerics=stated(backend, "float32"))
    for name, given_x in {"contiguous": x, "transposed": np.ascontiguousarray(x.T).T}.items():
        computed = backend.to_numpy(pg.softmax(backend.from_numpy(given_x), axis=axis))
        assert expected.ratio(computed) <= 1, name


@strategies.fewer
@given(data=st.data())
def test_softmax_sums_to_1(backend, dtype, data):
    """Catches sums in too few bits, and division by another row's sum.

    Whatever the error of exp is, each result is one of its values divided by their sum, and the additions and the
    division have a relative error of n u together. Flushing costs 4s for each; 16 bits round each result once more.
    """
    x, axis = data.draw(operations.arrays_and_axes(dtype))
    n = x.shape[axis]
    unit, smallest, _ = bounds.FORMATS[bounds.computed_in(dtype)]
    stored = bounds.FORMATS[dtype]
    allowed = n * (unit + 4 * smallest)
    if dtype != bounds.computed_in(dtype):
        allowed += stored.unit * (1 + allowed) + n * stored.smallest
    for form, result in claims.results(pg.softmax, backend, x, axis=axis).items():
        computed = result.astype(np.longdouble)
        assert np.all((computed >= 0) & (computed <= 1 + unit)), f"{form}: not between 0 and 1"
        sums = computed.sum(axis=axis)
        assert np.all(abs(sums - 1) <= allowed) or not n, f"{form}: a row sums to {sums}, allowed is {allowed}"


@strategies.fewer
@given(data=st.data())
def test_softmax_of_a_permuted_row_is_permuted(backend, dtype, numerics, data):
    """Catches a result that depends on the place in the row by more than the order of summation can."""
    x = data.draw(strategies.arrays(data.draw(strategies.shapes(least=1)), dtype))
    order = np.asarray(data.draw(st.permutations(range(x.shape[-1]))), int)
    error = 2 * bounds.softmax(x[..., order], numerics=numerics).error
    straight, permuted = (claims.results(pg.softmax, backend, a) for a in (x, x[..., order]))
    claims.assert_agree({form: y[..., order] for form, y in straight.items()}, permuted, error, "twice the bound")


@strategies.fewer
@given(data=st.data())
def test_softmax_does_not_change_when_a_constant_is_added(backend, dtype, numerics, data):
    """Catches a subtraction of anything but the maximum. Integers up to 128 and their sums are exact in every dtype."""
    shape = data.draw(strategies.shapes(least=1))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    constant = data.draw(st.integers(-64, 64))
    x = random.integers(-64, 65, shape)
    host = bounds.host_dtype(dtype)
    error = 2 * bounds.softmax(x.astype(host), numerics=numerics).error
    straight, shifted = (claims.results(pg.softmax, backend, a.astype(host)) for a in (x, x + constant))
    claims.assert_agree(straight, shifted, error, "twice the bound")


UNDEFINED = {"NaN": [np.nan], "+inf": [np.inf], "both infinities": [np.inf, -np.inf], "NaN and -inf": [np.nan, -np.inf]}
KINDS = ["finite", "some -inf", "only -inf", *UNDEFINED]


def spoiled(random, shape, kinds, dtype):
    """Return rows of normal numbers, each changed in the way of its kind. A row of the kind "some -inf" is defined."""
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


@strategies.fewer
@given(data=st.data())
def test_softmax_of_a_row_with_nan_or_inf_or_only_minus_inf_is_nan_as_a_whole(backend, dtype, numerics, data):
    """Catches zeros left in a row with a NaN, NaN that spreads to other rows, and -inf that does not become 0."""
    n = data.draw(strategies.lengths([1, 5, 17], least=1, most=20))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=4, max_size=4))
    axis = data.draw(st.sampled_from([-1, 0]))
    x = spoiled(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), (4, n), kinds, dtype)
    x = x if axis == -1 else np.ascontiguousarray(x.T)
    nan = np.broadcast_to(np.expand_dims([kind in {*UNDEFINED, "only -inf"} for kind in kinds], axis), x.shape)
    results = claims.results(pg.softmax, backend, x, axis=axis)
    for form, computed in results.items():
        assert np.array_equal(np.isnan(computed), nan), f"{form} of {x} is {computed}"
        assert not np.any(computed[(x == -np.inf) & ~nan]), f"{form}: -inf became more than 0"
    claims.assert_within(bounds.softmax(x, axis=axis, numerics=numerics), results)


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


def test_compiled_softmax_keeps_the_rule_for_nan(backend, dtype, form):
    """Catches a compiler that removes the operations that spread a NaN over its row."""
    kinds = KINDS * 3
    x = spoiled(np.random.default_rng(3), (len(kinds), 9), kinds, dtype)
    nan = [kind in {*UNDEFINED, "only -inf"} for kind in kinds]
    computed = claims.compute(form(pg.softmax), backend, x)
    assert np.array_equal(np.isnan(computed).all(axis=-1), nan), "a row that should be NaN is not"
    assert np.array_equal(np.isnan(computed).any(axis=-1), nan), "a row that should not be NaN is"
