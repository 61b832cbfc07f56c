"""layer_norm: each result within a derived bound of the exact one, and what follows from mean 0, variance 1."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, operations, strategies

pytestmark = pytest.mark.every_device


def normal(random, shape, dtype):
    """Return rows of several widths and means, as the residual stream has them, a wide one and one large outlier."""
    widths = random.choice([0.01, 1, 30], (*shape[:-1], 1))
    x = random.normal(random.choice([0, 0.3, 4], (*shape[:-1], 1)) * widths, widths, shape)
    x[..., 0] *= 20
    return x.astype(bounds.host_dtype(dtype))


def arguments(random, shape, dtype):
    g, b = (random.normal(mean, 0.3, shape[-1:]).astype(bounds.host_dtype(dtype)) for mean in (1, 0))
    return normal(random, shape, dtype), g, b


@given(data=st.data())
def test_layer_norm_is_within_its_error_bound(backend, dtype, data):
    """Catches an eps of 1e-3, a variance in one pass or over n - 1, sums in 16 bits, and writing into the argument."""
    x, g, b = data.draw(operations.layers(dtype))
    eps = data.draw(operations.EPS)
    expected = bounds.layer_norm(x, g, b, eps=eps)
    for form, op in claims.forms(pg.layer_norm, backend).items():
        computed = claims.compute(op, backend, x, g, b, eps=eps)
        assert claims.assert_within(expected, computed, "layer_norm", backend, dtype, form) <= 1


def test_the_bound_of_layer_norm_is_tight(backend, dtype):
    """Catches a bound that would admit anything, and compilers that change what is computed; eps is the default."""
    random = np.random.default_rng(1)
    x, g, b = arguments(random, (40, 12), dtype)
    expected = bounds.layer_norm(x, g, b)
    for form, op in claims.forms(pg.layer_norm, backend, compiled=True).items():
        ratio = claims.assert_within(expected, claims.compute(op, backend, x, g, b), "layer_norm", backend, dtype, form)
        assert ratio >= 0.01, f"{form}: the bound is {1 / ratio:.0f} times the worst error"


def test_layer_norm_of_random_numbers_errs_as_random_errors_add_up(backend, dtype):
    """Catches sums in too few bits at GPT-2's width, where the worst case, which grows as n, is loose."""
    x, g, b = arguments(np.random.default_rng(2), (3 if dtype == "float64" else 30, 768), dtype)
    expected = bounds.layer_norm(x, g, b, gamma=bounds.gamma_at_random)
    for form, op in claims.forms(pg.layer_norm, backend).items():
        ratio = expected.ratio(claims.compute(op, backend, x, g, b))
        assert 0.01 <= ratio <= 1, f"{form}: the error is {ratio:.3g} times what random errors add up to"


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
    for form, op in claims.forms(pg.layer_norm, backend).items():
        straight, shifted = (claims.compute(op, backend, a.astype(host), g, b) for a in (x, x + constant))
        ratio = bounds.Bounded(bounds.exact(straight), error).ratio(shifted)
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times the sum of the bounds"


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
    for form, op in claims.forms(pg.layer_norm, backend).items():
        y = claims.compute(op, backend, x, g, b).astype(np.longdouble)
        judged = np.isfinite(error).all(axis=-1)
        off = abs(y.mean(axis=-1))[judged] - error.mean(axis=-1)[judged]
        assert np.all(off <= 1e-15), f"{form}: the mean is {off.max(initial=0)} beyond the bound"
        # mean((N + e)^2) - mean(N^2) = mean(e (2N + e)), and |N| <= |y| + |e|
        allowed = (error * (2 * abs(y) + 3 * error)).mean(axis=-1)[judged]
        off = abs((y * y).mean(axis=-1) - variance / (variance + 1e-5))[judged] - allowed
        assert np.all(off <= 1e-15), f"{form}: the variance is {off.max(initial=0)} beyond the bound"


def test_layer_norm_of_one_number_is_the_bias(backend, dtype):
    """Catches a variance over n - 1, which is 0/0 here."""
    host = bounds.host_dtype(dtype)
    x, g, b = np.linspace(-9, 9, 7, dtype=np.float32).astype(host)[:, None], np.full(1, 3, host), np.full(1, 0.25, host)
    for form, op in claims.forms(pg.layer_norm, backend).items():
        assert np.array_equal(claims.compute(op, backend, x, g, b), np.full((7, 1), 0.25, host)), form


@strategies.wide_dtypes
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)
def test_layer_norm_of_ordinary_numbers_raises_no_floating_point_flag(backend, dtype):
    """Catches warnings that a user could do nothing about."""
    layer = arguments(np.random.default_rng(4), (16, 33), dtype)
    for form in claims.forms(pg.layer_norm, backend).values():
        with np.errstate(all="raise", under="ignore"):
            computed = backend.to_numpy(form(*map(backend.from_numpy, layer)))
        assert np.isfinite(computed).all()


@pytest.mark.parametrize("eps", [-1e-5, np.nan, np.inf])
def test_an_eps_that_is_none_is_refused(backend, dtype, eps):
    """Catches the root of a negative number, and rows that become NaN or the bias without a word."""
    layer = [backend.from_numpy(a) for a in arguments(np.random.default_rng(5), (3, 8), dtype)]
    for op in (pg.layer_norm, pg.layer_norm.reference):
        with pytest.raises(ValueError, match=r"layer_norm: eps is .*; expected a finite number of at least 0"):
            op(*layer, eps=eps)


def test_an_eps_of_zero_is_taken(backend):
    """Catches a check that is too strict: numbers that are not all equal have a variance of their own."""
    layer = arguments(np.random.default_rng(6), (3, 8), "float32")
    expected = bounds.layer_norm(*layer, eps=0.0)
    for form, op in claims.forms(pg.layer_norm, backend, compiled=True, eps=0.0).items():
        assert expected.ratio(claims.compute(op, backend, *layer, eps=0.0)) <= 1, form


@pytest.mark.parametrize("n", [2, 4, 768])
def test_layer_norm_of_the_largest_numbers_of_its_range(backend, dtype, n):
    """Catches a range in the docstring that an algorithm does not have: |x| below sqrt(largest / n) / 2.

    The range is that of the dtype in which it is computed; a 16-bit format may end before that.
    """
    host = bounds.host_dtype(dtype)
    largest = float(bounds.FORMATS[bounds.computed_in(dtype)].largest)
    edge = min(float(bounds.FORMATS[dtype].largest), 0.499 * (largest / n) ** 0.5)
    signs = np.where(np.arange(2 * n).reshape(2, n) % 2, -1, 1) * np.asarray([[1], [0.5]])
    x = (edge * signs).astype(host)
    g, b = np.ones(n, host), np.zeros(n, host)
    expected = bounds.layer_norm(x, g, b)
    assert np.isfinite(expected.error).all()
    for form, op in claims.forms(pg.layer_norm, backend, compiled=True).items():
        y = claims.compute(op, backend, x, g, b)
        assert claims.assert_within(expected, y, "layer_norm", backend, dtype, form) <= 1
