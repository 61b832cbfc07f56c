"""gelu: each result within a derived bound of the exact one, in the tanh form that GPT-2 was trained with."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = [pytest.mark.every_device, pytest.mark.op("gelu")]


@given(data=st.data())
def test_gelu_is_within_its_error_bound_and_agrees_with_numpy(backend, dtype, data):
    """Catches the form by erf, a constant with too few digits, x^3 in 16 bits, and writing into the argument."""
    OPERATIONS["gelu"].check(backend, dtype, data)


def test_the_bound_of_gelu_is_tight(backend, dtype, numerics):
    """Catches a bound that would admit anything, and compilers that change what is computed."""
    random = np.random.default_rng(1)
    x = (random.choice([-1, 1], 2000) * 10 ** random.uniform(-6, 1.2, 2000)).astype(bounds.host_dtype(dtype))
    results = claims.results(pg.gelu, backend, x, compiled=True)
    claims.assert_tight(claims.assert_within(bounds.gelu(x, numerics=numerics), results))


def test_the_bound_of_gelu_tells_the_form_by_erf_apart(backend, dtype, numerics):
    """Catches a bound so wide that the other GELU, which differs by up to 5e-4, would pass."""
    x = np.linspace(-3, 3, 301).astype(bounds.host_dtype(dtype))
    by_erf = np.asarray([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float).tolist()])
    expected = bounds.gelu(x, numerics=numerics)
    assert expected.ratio(by_erf.astype(bounds.host_dtype(dtype))) > 1
    claims.assert_within(expected, claims.results(pg.gelu, backend, x))


@strategies.fewer
@given(data=st.data())
def test_gelu_of_x_less_gelu_of_minus_x_is_x(backend, dtype, numerics, data):
    """Catches a sign lost in x^3 or in tanh, which is odd: gelu(x) - gelu(-x) = x (1 + tanh z)/2 + x (1 - tanh z)/2."""
    x = data.draw(strategies.floats(data.draw(strategies.shapes()), dtype))
    error = bounds.gelu(x, numerics=numerics).error + bounds.gelu(-x, numerics=numerics).error
    one, other = (claims.results(pg.gelu, backend, a) for a in (x, -x))
    for form in one:
        ratio = bounds.Bounded(bounds.exact(x) + bounds.exact(other[form]), error).ratio(one[form])
        assert ratio <= 1, f"{form}: the difference is {ratio:.3g} times the sum of the bounds"


@strategies.fewer
@given(data=st.data())
def test_gelu_is_between_0_and_x_far_from_0_and_exact_farther_out(backend, dtype, data):
    """Catches an overflow of x^3 that becomes NaN, or a tanh that passes 1."""
    x = data.draw(strategies.floats(data.draw(strategies.shapes()), dtype))
    wide = x.astype(np.float64)
    u = bounds.FORMATS[dtype].unit
    for form, computed in claims.results(pg.gelu, backend, x).items():
        y = computed.astype(np.float64)
        assert np.isfinite(y).all(), f"{form}: {x} became {y}"
        assert np.all(y >= np.minimum(wide, 0) * (1 + 4 * u)), form
        assert np.all(y >= -0.17005), form  # the minimum, -0.170040751, is at -0.752461421
        assert np.all(y <= np.maximum(wide, 0) * (1 + 4 * u)), form
        assert np.array_equal(y[wide > 9], wide[wide > 9]), form
        assert np.all(y[wide < -9] == 0), form
