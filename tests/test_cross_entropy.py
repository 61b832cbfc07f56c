"""cross_entropy: within a derived bound of the exact one, which is the mean over all targets, whatever they are."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims, operations, strategies

pytestmark = pytest.mark.every_device


def bound(logits, targets, backend):
    return bounds.cross_entropy(logits, targets, numerics=stated(backend, logits.dtype.name))


@given(data=st.data())
def test_cross_entropy_is_within_its_error_bound(backend, dtype, data):
    """Catches a maximum that is not subtracted, another row's target, a sum for the mean, and sums in 16 bits."""
    logits, targets = data.draw(operations.logits_and_targets(dtype, strategies.integer_dtypes(backend)))
    expected = bound(logits, targets, backend)
    for form, op in claims.forms(pg.cross_entropy, backend).items():
        computed = claims.compute(op, backend, logits, targets)
        assert claims.assert_within(expected, computed, "cross_entropy", backend, dtype, form) <= 1


def test_the_bound_of_cross_entropy_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed.

    One row at a time, of few logits: the errors of many cancel, which a bound does not know.
    """
    random = np.random.default_rng(1)
    given = [
        (random.normal(0, width, (1, 6)).astype(bounds.host_dtype(dtype)), random.integers(0, 6, 1, np.int32))
        for width in (1, 10, 60) * 8
    ]
    for form, op in claims.forms(pg.cross_entropy, backend, compiled=True).items():
        worst = max(
            claims.assert_within(
                bound(*each, backend), claims.compute(op, backend, *each), "cross_entropy", backend, dtype, form
            )
            for each in given
        )
        assert worst >= 0.01, f"{form}: the bound is {1 / worst:.0f} times the worst error"


@strategies.wide_dtypes
def test_log_errs_by_no_more_than_is_stated(backend, dtype):
    """Catches a stated error of log that does not hold: the bound of cross_entropy rests on it."""
    random = np.random.default_rng(2)
    n = 50_000 if dtype == "float32" else 2_000
    least = np.log10(bounds.FORMATS[dtype].unit)
    x = np.concatenate([1 + 10 ** random.uniform(least, 0, n), 10 ** random.uniform(0, 6, n)]).astype(dtype)
    x = x[x > 1]
    log = bounds.logarithm(x)
    error = bounds.distance(claims.compute(backend.xp.log, backend, x), log) / log.astype(np.float64)
    seen, largest = float(np.max(error)) / bounds.FORMATS[dtype].unit, stated(backend, dtype).log
    claims.record("log", backend, dtype, seen / largest)
    assert seen <= largest, f"seen {seen:.2f}, in units of u; stated is {largest}"


def test_cross_entropy_over_a_vocabulary_is_within_its_error_bound(backend):
    """Catches a fused kernel that goes wrong on long rows, and logits so far apart that a probability is 0."""
    random = np.random.default_rng(3)
    for offset, width in [(0, 3), (1e4, 300), (-1e30, 1e29)]:
        logits = random.normal(offset, width, (2, 3, 5000)).astype(np.float32)
        targets = random.integers(0, 5000, (2, 3), np.int32)
        for form, op in claims.forms(pg.cross_entropy, backend).items():
            ratio = bound(logits, targets, backend).ratio(claims.compute(op, backend, logits, targets))
            assert ratio <= 1, f"{form}, about {offset}: the error is {ratio:.3g} times its bound"


@pytest.mark.own_process
@pytest.mark.parametrize("kind", ["int16", "int32"])
@pytest.mark.parametrize("target", [-100, -7, 6])
def test_a_target_that_is_none_is_not_passed_over(backend, dtype, target, kind):
    """Catches -100, which torch leaves out of the mean, and an id that is taken modulo the vocabulary's length."""
    logits = np.random.default_rng(4).normal(0, 1, (3, 6)).astype(bounds.host_dtype(dtype))
    for form, op in claims.forms(pg.cross_entropy, backend).items():
        assert np.isfinite(claims.compute(op, backend, logits, np.asarray([1, 5, 2], kind))), form
        try:
            computed = op(backend.from_numpy(logits), backend.from_numpy(np.asarray([1, target, 2], kind)))
        except Exception:  # an index out of range, whatever the framework calls it
            continue
        assert np.isnan(backend.to_numpy(computed)), f"{form} makes {computed} of a target of {target}"


@pytest.mark.parametrize("row", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3], ids=str)
def test_an_undefined_row_makes_the_mean_undefined(backend, dtype, row):
    """Catches a NaN that is lost among rows that are defined."""
    logits = np.asarray([[1, 2, 3], row], bounds.host_dtype(dtype))
    for form, op in claims.forms(pg.cross_entropy, backend).items():
        assert np.isnan(claims.compute(op, backend, logits, np.zeros(2, np.int32))), form


def test_an_impossible_target_costs_infinity(backend, dtype):
    """Catches a logarithm of 0 that becomes NaN, and logits of -inf that change the loss of another target."""
    logits = np.asarray([[1.0, -np.inf]], bounds.host_dtype(dtype))
    for form, op in claims.forms(pg.cross_entropy, backend).items():
        assert claims.compute(op, backend, logits, np.ones(1, np.int32)) == np.inf, form
        assert claims.compute(op, backend, logits, np.zeros(1, np.int32)) == 0, form
