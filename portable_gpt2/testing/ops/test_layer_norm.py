"""layer_norm: each result within a derived bound of the exact one, and what follows from mean 0, variance 1."""

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("layer_norm")]


def normal(random, shape, dtype):
    """Return rows of several widths and means, each with one large outlier, as in the residual stream."""
    widths = random.choice([0.01, 1, 30], (*shape[:-1], 1))
    x = random.normal(random.choice([0, 0.3, 4], (*shape[:-1], 1)) * widths, widths, shape)
    x[..., 0] *= 20
    return x.astype(bounds.host_dtype(dtype))


def arguments(random, shape, dtype):
    """Return x, g and b."""
    g, b = (random.normal(mean, 0.3, shape[-1:]).astype(bounds.host_dtype(dtype)) for mean in (1, 0))
    return normal(random, shape, dtype), g, b


@given(data=st.data())
def test_layer_norm_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches an eps of 1e-3, a variance in one pass or over n - 1, sums in 16 bits, and writing into the argument."""
    OPERATIONS["layer_norm"].check(backend, dtype, data)


def test_the_bound_of_layer_norm_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed; eps is the default."""
    layer = arguments(np.random.default_rng(1), (40, 12), dtype)
    results = claims.results(pg.layer_norm, backend, *layer, compiled=True)
    claims.assert_tight(claims.assert_within(bounds.layer_norm(*layer), results))


def test_layer_norm_of_random_numbers_errs_as_random_errors_add_up(backend, dtype):
    """Catches sums in too few bits at GPT-2's width, where the worst case, which grows as n, is loose."""
    layer = arguments(np.random.default_rng(2), (3 if dtype == "float64" else 30, 768), dtype)
    expected = bounds.layer_norm(*layer, gamma=bounds.gamma_at_random)
    for form, computed in claims.results(pg.layer_norm, backend, *layer).items():
        ratio = expected.ratio(computed)
        assert 0.01 <= ratio <= 1, f"{form}: the error is {ratio:.3g} times the bound for random errors"


@strategies.fewer
@given(data=st.data())
def test_layer_norm_does_not_change_when_a_constant_is_added(backend, dtype, data):
    """Catches a mean that is not subtracted. Integers up to 128 and their sums are exact in every dtype."""
    shape = data.draw(strategies.shapes(least=1))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x, constant = random.integers(-64, 65, shape), data.draw(st.integers(-64, 64))
    host = bounds.host_dtype(dtype)
    g, b = np.ones(shape[-1:], host), np.zeros(shape[-1:], host)
    error = sum(bounds.layer_norm(a.astype(host), g, b).error for a in (x, x + constant))
    claims.assert_agree(
        *(claims.results(pg.layer_norm, backend, a.astype(host), g, b) for a in (x, x + constant)), error
    )


@strategies.fewer
@given(data=st.data())
def test_layer_norm_without_gain_and_bias_has_mean_0_and_variance_up_to_1(backend, dtype, data):
    """Catches a mean or a variance over another axis. Each may be off by as much as the results' own bounds allow."""
    shape = data.draw(strategies.shapes(least=1).filter(lambda shape: shape[-1] > 0))
    largest = bounds.FORMATS[bounds.computed_in(dtype)].largest ** 0.5 / 16
    x = data.draw(strategies.arrays(shape, dtype, largest=largest))
    g, b = np.ones(shape[-1:], x.dtype), np.zeros(shape[-1:], x.dtype)
    error = bounds.layer_norm(x, g, b).error
    variance = x.astype(np.longdouble).var(axis=-1)
    judged = np.isfinite(error).all(axis=-1)
    for form, computed in claims.results(pg.layer_norm, backend, x, g, b).items():
        y = computed.astype(np.longdouble)
        off = abs(y.mean(axis=-1))[judged] - error.mean(axis=-1)[judged]
        assert np.all(off <= 1e-15), f"{form}: the mean is {off.max(initial=0)} beyond the bound"
        # mean((N + e)^2) - mean(N^2) = mean(e (2N + e)), and |N| <= |y| + |e|
        allowed = (error * (2 * abs(y) + 3 * error)).mean(axis=-1)[judged]
        off = abs((y * y).mean(axis=-1) - variance / (variance + 1e-5))[judged] - allowed
        assert np.all(off <= 1e-15), f"{form}: the variance is {off.max(initial=0)} beyond the bound"


def test_layer_norm_of_numbers_far_from_0_is_within_its_error_bound(backend, dtype):
    """Catches a variance in one pass, mean(x^2) - mean(x)^2, whose error is that of the squares."""
    host = bounds.host_dtype(dtype)
    x = np.random.default_rng(7).normal(300, 1, (20, 12)).astype(host)
    g, b = np.ones(12, host), np.zeros(12, host)
    claims.assert_within(bounds.layer_norm(x, g, b), claims.results(pg.layer_norm, backend, x, g, b))


def test_layer_norm_of_one_number_is_the_bias(backend, dtype):
    """Catches a variance over n - 1, which is 0/0 here."""
    host = bounds.host_dtype(dtype)
    x, g, b = np.linspace(-9, 9, 7, dtype=np.float32).astype(host)[:, None], np.full(1, 3, host), np.full(1, 0.25, host)
    for form, computed in claims.results(pg.layer_norm, backend, x, g, b).items():
        assert np.array_equal(computed, np.full((7, 1), 0.25, host)), form


def test_layer_norm_of_empty_rows_is_empty_and_gives_no_warning(backend):
    """Catches a mean of no numbers."""
    arrays = [backend.from_numpy(np.zeros(shape, np.float32)) for shape in ((3, 0), (0,), (0,))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for op in (pg.layer_norm, pg.layer_norm.reference):
            assert tuple(backend.shape(op(*arrays))) == (3, 0)


@pytest.mark.parametrize("eps", [-1e-5, np.nan, np.inf])
def test_an_eps_that_is_negative_or_not_finite_is_refused(backend, dtype, eps):
    """Catches the root of a negative number, and rows that become NaN or the bias without an error."""
    layer = [backend.from_numpy(a) for a in arguments(np.random.default_rng(5), (3, 8), dtype)]
    for op in (pg.layer_norm, pg.layer_norm.reference):
        with pytest.raises(ValueError, match=r"layer_norm: eps is .*; expected a finite number of at least 0"):
            op(*layer, eps=eps)


def test_an_eps_of_zero_is_accepted(backend):
    """Catches a check that is too strict: the variance of numbers that are not all equal is not 0."""
    layer = arguments(np.random.default_rng(6), (3, 8), "float32")
    results = claims.results(pg.layer_norm, backend, *layer, compiled=True, eps=0.0)
    claims.assert_within(bounds.layer_norm(*layer, eps=0.0), results)


@pytest.mark.parametrize("n", [2, 4, 768])
def test_layer_norm_of_the_largest_numbers_of_its_range(backend, dtype, n):
    """Catches a range in the docstring that an algorithm does not have: |x| below sqrt(largest / n) / 2.

    The range is that of the dtype in which layer_norm computes. The range of a 16-bit format may be smaller.
    """
    host = bounds.host_dtype(dtype)
    largest = float(bounds.FORMATS[bounds.computed_in(dtype)].largest)
    edge = min(float(bounds.FORMATS[dtype].largest), 0.499 * (largest / n) ** 0.5)
    signs = np.where(np.arange(2 * n).reshape(2, n) % 2, -1, 1) * np.asarray([[1], [0.5]])
    x = (edge * signs).astype(host)
    g, b = np.ones(n, host), np.zeros(n, host)
    expected = bounds.layer_norm(x, g, b)
    assert np.isfinite(expected.error).all()
    claims.assert_within(expected, claims.results(pg.layer_norm, backend, x, g, b, compiled=True))
