"""The errors that an adapter states: how they enter the bounds, how they are measured, and what they need."""

import contextlib
import math
import types

import numpy as np
import processes
import pytest

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.numerics import Numerics, bounds
from portable_gpt2.testing import claims, measure
from portable_gpt2.testing.operations import OPERATIONS

U = bounds.FORMATS["float32"].unit
SLOPE = Numerics(exp=(2.0, 1.25))


def x(*shape, width=20.0):
    return np.random.default_rng(list(shape)).normal(0, width, shape).astype(np.float32)


# The slope in the bounds


def test_the_slope_of_exp_is_in_the_bound_of_softmax():
    """Catches a slope that is left out, or that counts for the element or for the sum only: both call exp."""
    a = x(50, 9)
    d = (a.max(-1, keepdims=True) - a).astype(float)
    g = np.exp(-d) / np.exp(-d).sum(-1, keepdims=True)
    steep, flat = (bounds.softmax(a, numerics=each).error for each in (SLOPE, Numerics()))
    np.testing.assert_allclose(steep - flat, 1.25 * U * g * (d + (g * d).sum(-1, keepdims=True)), rtol=1e-6, atol=1e-20)


def test_the_slope_of_exp_is_in_the_bound_of_cross_entropy():
    """Catches a slope that is left out: the error of each term of the sum grows with its distance to the maximum."""
    a, targets = x(1, 9), np.zeros(1, int)
    d = (a.max(-1, keepdims=True) - a).astype(float)
    g = np.exp(-d) / np.exp(-d).sum(-1, keepdims=True)
    steep, flat = (bounds.cross_entropy(a, targets, numerics=each).error for each in (SLOPE, Numerics()))
    assert steep - flat == pytest.approx(1.25 * U * float((g * d).sum()), rel=1e-5)


def test_the_slope_of_exp_is_in_the_bound_of_attention():
    """Catches a slope that is left out. With the identity as values, attention is the softmax of the scores."""
    scores, keys = x(1, 6), np.eye(6, dtype=np.float32)
    error = [bounds.attention(scores, keys, keys, scale=1.0, numerics=each).error for each in (SLOPE, Numerics())]
    softmax = [bounds.softmax(scores, numerics=each).error for each in (SLOPE, Numerics())]
    seen = softmax[1] > 1e-30
    assert ((error[0] - error[1])[seen] >= (softmax[0] - softmax[1])[seen] * (1 - 1e-4)).all()


# Measurements


class Rough:
    """NumPy's adapter with other functions, for `measure`."""

    name, default_device, kernels, numerics = "rough", None, {}, {}
    compiles_per_shape = False

    def __init__(self, **functions):
        self.numpy = pg.get_backend("numpy")
        self.xp = types.SimpleNamespace(**{name: getattr(np, name) for name in measure.FUNCTIONS} | functions)
        self.from_numpy, self.to_numpy = self.numpy.from_numpy, self.numpy.to_numpy

    def device(self, a):
        return "cpu"


def in_float32(function):
    return lambda a: function(a.astype(np.float32)).astype(a.dtype)


def off_by(errors):
    """Return exp with a relative error of errors(abs(x)), in units of float32's u."""
    return lambda a: (np.exp(a.astype(float)) * (1 + errors(abs(a.astype(float))) * U)).astype(a.dtype)


@contextlib.contextmanager
def without_kernels(monkeypatch):
    """Leave out the ops, which compute with NumPy's own exp."""
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_in_kernels", lambda *args: [])
        yield


@pytest.mark.parametrize(("slope", "stated"), [(0.0, 0.0), (1.2, 1.25)])
def test_an_error_that_grows_is_stated_as_a_slope(slope, stated, monkeypatch):
    """Catches a constant of 100 u for an exp that is exact near 0, and a slope for an exp whose error is constant."""
    backend = Rough(exp=off_by(lambda size: 3 + slope * size))
    with without_kernels(monkeypatch):
        measured = measure.measure(backend, "float32", "exp", 5000)
        suggested = measured.suggest()
        assert 3 < suggested.exp[0] <= 6
        assert suggested.exp[1] == stated
        assert measured.holds(suggested)
        assert measure.line(backend).startswith(f'numerics = {{"cpu": {{"float32": Numerics(exp={suggested.exp}')
        with pytest.raises(AssertionError, match=r"stated is an error of \(2.0, 0.0\) u; measured: .* State in the"):
            measure.assert_stated(measured, Numerics())


@pytest.mark.parametrize("function", measure.FUNCTIONS)
def test_a_float64_that_is_computed_in_float32_is_refused(function, monkeypatch):
    """Catches a suggestion to state 1e9 u, which every result would meet."""
    backend = Rough(**{function: in_float32(getattr(np, function))})
    with without_kernels(monkeypatch):
        measured = measure.measure(backend, "float64", function)
        for call in (measured.suggest, lambda: measure.assert_stated(measured, Numerics())):
            with pytest.raises(
                (ValueError, AssertionError), match=r"computed in float32\. This is a failure of precision"
            ):
                call()
        assert "float64" not in measure.line(backend)


def test_a_stated_error_that_is_too_large_is_refused(monkeypatch):
    """Catches a constant, or a slope, that is 100 times what is seen, and so would admit anything."""
    backend = pg.get_backend("numpy")
    measured = measure.measure(backend, "float32", "exp", 5000)
    assert measured.holds(Numerics(exp=(4.0, 0.0)))
    for loose in (Numerics(exp=(400.0, 0.0)), Numerics(exp=(4.0, 20.0))):
        with pytest.raises(AssertionError, match="times the largest error seen"):
            measure.assert_stated(measured, loose)


# python-flint is optional


def test_bounds_need_python_flint_only_for_float64():
    """Catches a bound in float32 that imports flint, and a message that does not say which extra has it."""
    code = """
    import sys

    sys.modules["flint"] = sys.modules["hypothesis"] = sys.modules["pytest"] = None
    import numpy as np
    from portable_gpt2.numerics import Numerics, bounds

    print(bounds.softmax(np.ones(3, np.float32), numerics=Numerics()).value.dtype)
    try:
        bounds.softmax(np.ones(3), numerics=Numerics())
    except ImportError as error:
        print(error)
    """
    said = processes.run(code).splitlines()
    assert said == ["float64", "the bounds for float64 need python-flint: pip install 'portable-gpt2[testing]'"]


@pytest.mark.parametrize("error", [-1.0, math.nan, math.inf])
def test_an_error_that_is_not_a_size_is_refused(error):
    """Catches a bound that is negative or NaN, which no result meets, or every result."""
    for given in ({"exp": (error, 0.0)}, {"exp": (2.0, error)}, {"tanh": error}, {"log": error}):
        with pytest.raises(ValueError, match="negative, infinite or NaN"):
            Numerics(**given)


# The claims


def test_a_failed_claim_shows_every_form():
    """Catches a failure that does not say whether the definition passes, which tells a kernel from a function."""
    a = x(3, 4)
    results = claims.results(pg.softmax, pg.get_backend("numpy"), a)
    results["kernel"] = results["kernel"] * np.float32(1.01)
    with pytest.raises(
        AssertionError, match=r"kernel of softmax, numpy, float32: .*; definition passes, with 0\."
    ) as e:
        claims.assert_within(bounds.softmax(a, numerics=Numerics(exp=(3.6, 0.0))), results)
    assert e.value.facts.form == "kernel"
    assert e.value.facts.ratios.keys() == {"kernel", "definition"}


def test_every_op_has_a_bound_and_is_compared_with_numpy():
    """Catches an op that is added and not tested on the backends."""
    assert {operation.op for operation in OPERATIONS.values()} == {getattr(ops, name) for name in ops.__all__}


def test_recorded_ratios_are_floats():
    """Catches NumPy's float64, which a worker of pytest-xdist cannot send: it crashes, and another takes its place."""
    with claims.recording():
        claims.keep("an op", "a place", "float32", np.float64(0.5))
        assert [(*key, type(ratio)) for *key, ratio in claims.recorded()] == [("an op", "a place", "float32", float)]
