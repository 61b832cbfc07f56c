"""cross_entropy: within a derived bound of the exact one, which is the mean over all targets."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("cross_entropy")]


@given(data=st.data())
def test_cross_entropy_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches a maximum that is not subtracted, another row's target, a sum for the mean, and sums in 16 bits."""
    OPERATIONS["cross_entropy"].check(backend, dtype, data)


def test_the_bound_of_cross_entropy_is_tight(backend, dtype, numerics):
    """Catches a bound that would admit anything, and compilers that change what is computed.

    Each call has one row with few logits: in a mean of many rows, the errors cancel, but their bounds add up.
    """
    random = np.random.default_rng(1)
    worst = dict.fromkeys(claims.FORMS, 0.0)
    for width in (1, 10, 60) * 8:
        logits = random.normal(0, width, (1, 6)).astype(bounds.host_dtype(dtype))
        targets = random.integers(0, 6, 1, np.int32)
        results = claims.results(pg.cross_entropy, backend, logits, targets, compiled=True)
        ratios = claims.assert_within(bounds.cross_entropy(logits, targets, numerics=numerics), results)
        worst = {form: max(ratio, worst[form]) for form, ratio in ratios.items()}
    claims.assert_tight(worst)


def test_cross_entropy_over_a_vocabulary_is_within_its_error_bound(backend):
    """Catches a fused kernel that fails on long rows, and logits so far apart that a probability is 0."""
    random = np.random.default_rng(3)
    for offset, width in [(0, 3), (1e4, 300), (-1e30, 1e29)]:
        logits = random.normal(offset, width, (2, 3, 5000)).astype(np.float32)
        targets = random.integers(0, 5000, (2, 3), np.int32)
        expected = bounds.cross_entropy(logits, targets, numerics=stated(backend, "float32"))
        claims.assert_within(expected, claims.results(pg.cross_entropy, backend, logits, targets))


@pytest.mark.parametrize("row", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3], ids=str)
def test_an_undefined_row_makes_the_mean_undefined(backend, dtype, row):
    """Catches a NaN that is lost among rows that are defined."""
    logits = np.asarray([[1, 2, 3], row], bounds.host_dtype(dtype))
    for form, computed in claims.results(pg.cross_entropy, backend, logits, np.zeros(2, np.int32)).items():
        assert np.isnan(computed), form


def test_an_impossible_target_costs_infinity(backend, dtype):
    """Catches a logarithm of 0 that becomes NaN, and logits of -inf that change the loss of another target."""
    logits = np.asarray([[1.0, -np.inf]], bounds.host_dtype(dtype))
    for target, loss in ((1, np.inf), (0, 0)):
        for form, computed in claims.results(pg.cross_entropy, backend, logits, np.full(1, target, np.int32)).items():
            assert computed == loss, form
