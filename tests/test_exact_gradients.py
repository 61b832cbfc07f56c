"""Gradients and the optimizer in the reproducible mode: against FLINT's balls and fractions, and over backends.

A test of one gradient compares all elements with its definition in `portable_gpt2.gradients`, computed with balls.
"""

import contextlib
import math
from fractions import Fraction

import gradient_oracle
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import rough
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.correct_rounding import exact_gradients, float64, float64_gradients, mode
from portable_gpt2.correct_rounding.balls import DoubleDouble
from portable_gpt2.correct_rounding.intervals import exact_dot
from portable_gpt2.numerics import Numerics, stated
from portable_gpt2.registry import registered

pytestmark = pytest.mark.usefixtures("flint")


# Fractions make ties likely; the others have all magnitudes, and subnormal numbers among them.
SIMPLE = st.integers(-48, 48).map(lambda n: n / 16)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


def floats(*shape):
    """Return a strategy for float32 arrays: of simple fractions, of moderate numbers, or of any numbers."""
    kinds = (SIMPLE, st.floats(-8, 8, width=32), SIMPLE | ANY)
    return st.one_of([hnp.arrays(np.float32, shape, elements=elements) for elements in kinds])


def clean(a):
    return np.where(abs(a) < 2.0**-126, 0, a)


def every(*shape):
    return np.nonzero(np.ones(shape))


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def ids(n, *shape):
    return st.lists(st.integers(0, n - 1), min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda found: np.asarray(found, np.int32).reshape(shape)
    )


MASK = np.asarray([[True, False, True, False], [True, True, False, True], [False, True, False, False]])
CASES = {  # arguments, of strategies for hypothesis; options
    "add_backward": ([floats(3, 2, 2)], {"n_axes": 2}),
    "conv1d_backward": ([floats(2, 2, 3), floats(3, 2), floats(2, 2, 2)], {}),
    "unembed_backward": ([floats(3, 2), floats(4, 2), floats(3, 4)], {}),
    "embed_backward": ([ids(4, 2, 3), floats(2, 3, 2)], {"n_vocab": 4}),
    "gelu_backward": ([floats(6), floats(6)], {}),
    "layer_norm_backward": ([floats(2, 4), floats(4), floats(2, 4)], {"eps": 1e-5}),
    "softmax_backward": ([floats(2, 3), floats(2, 3)], {"axis": 0}),
    "attention_backward": (
        [floats(2, 3, 2), floats(2, 3, 2), floats(2, 3, 1), floats(2, 3, 1)],
        {"causal": True, "scale": 0.7},
    ),
    "attention_backward with a mask": (
        [floats(3, 2), floats(4, 2), floats(4, 1), floats(3, 1), st.just(MASK)],
        {"scale": 0.5},
    ),
    "cross_entropy_backward": ([floats(3, 4), ids(4, 3)], {"factor": 1 / 3}),
}


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_a_gradient_is_correctly_rounded(case, data):
    """Catches a wrong bound of the evaluation in float64, and a wrong formula or tie in the exact one."""
    strategies, options = CASES[case]
    name = case.partition(" ")[0]
    arrays = [data.draw(each) for each in strategies]
    arrays = [clean(a) if a.dtype == np.float32 else a for a in arrays]
    expected = gradient_oracle.correct(name, arrays, options)
    with pg.reproducible(), np.errstate(all="ignore"):
        found = getattr(gradients, name)(*arrays, **options)
    at = {key: every(*a.shape) for key, a in expected.items()}
    exactly = getattr(exact_gradients, name)(*arrays, **options, at=at)
    for key, a in expected.items():
        assert found[key].dtype == np.float32
        assert found[key].tobytes() == a.tobytes(), f"{key}: {found[key]} should be {a}"
        assert np.asarray(exactly[key]).tobytes() == a.tobytes(), f"{key}, exactly: {exactly[key]} should be {a}"


LARGER = {  # arrays that are large enough for the roundings to add up
    "add_backward": ([normal(40, 2, 9) ** 9], {"n_axes": 1}),
    "conv1d_backward": ([normal(30, 8), normal(8, 9), normal(30, 9) ** 9], {}),
    "unembed_backward": ([normal(30, 8), normal(9, 8), normal(30, 9)], {}),
    "embed_backward": ([np.arange(60, dtype=np.int32) % 3, normal(60, 8) ** 9], {"n_vocab": 3}),
    "gelu_backward": ([4 * normal(300), normal(300, seed=1)], {}),
    "layer_norm_backward": ([normal(9, 12), normal(12), normal(9, 12, seed=1) ** 9], {"eps": 1e-5}),
    "softmax_backward": ([4 * normal(20, 12), normal(20, 12, seed=1)], {"axis": -1}),
    "attention_backward": (
        [2 * normal(2, 9, 4), 2 * normal(2, 9, 4, seed=1), normal(2, 9, 5), normal(2, 9, 5, seed=1)],
        {"causal": True, "scale": 0.5},
    ),
    # The rows have a large common part, so that nearly all of the error is that of the mean, the scores or dy v.
    "layer_norm_backward with a large mean": (
        [3000 + normal(9, 12), normal(12), normal(9, 12, seed=1)],
        {"eps": 1e-5},
    ),
    # Elements at the mean of a row: the error of the mean is multiplied by the covariance.
    "layer_norm_backward of elements at the mean": (
        [
            3000 + 100 * normal(40, 1) + np.tile(np.asarray([-1, 0, 1 + 2.0**-10], np.float32), 4),
            np.ones(12, np.float32),
            np.tile(np.asarray([-1, 0.5, 1], np.float32), (40, 4)),
        ],
        {"eps": 1e-5},
    ),
    # The covariance is 0, so only its own error is left.
    "layer_norm_backward of equal gradients": (
        [3000 + normal(40, 12), np.ones(12, np.float32), np.ones((40, 12), np.float32)],
        {"eps": 1e-5},
    ),
    # The derivative has a zero, next to which terms cancel, and is nearly 0 for large negative numbers.
    "gelu_backward next to its zero": (
        [np.float32([*(-0.75179154 + 2.0**-22 * np.arange(-20, 20)), -14, -30]), np.ones(42, np.float32)],
        {},
    ),
    # The sum over rows has more roundings than a row.
    "layer_norm_backward of many rows": (
        [np.tile(np.asarray([[-1, 1]], np.float32), (400, 1)), normal(2), np.full((400, 2), 0.1, np.float32)],
        {"eps": 1e-5},
    ),
    "attention_backward with large scores": (
        [normal(2, 9, 4), 3000 + normal(2, 9, 4, seed=1), normal(2, 9, 5), normal(2, 9, 5, seed=1)],
        {"scale": 0.5},
    ),
    "attention_backward with large values": (
        [normal(2, 9, 4), normal(2, 9, 4, seed=1), 3000 + normal(2, 9, 5), normal(2, 9, 5, seed=1)],
        {"scale": 0.5},
    ),
    # The last bit of the sum is lost.
    "add_backward of 54 bits": ([np.asarray([[1], [2.0**-30 + 2.0**-53]], np.float32)], {"n_axes": 1}),
    # Each of the small numbers is lost.
    "add_backward of one large number": ([np.asarray([[1], *59 * [[2.0**-54]]], np.float32)], {"n_axes": 1}),
    "embed_backward of one large number": (
        [np.zeros(60, np.int32), np.asarray([[1], *59 * [[2.0**-54]]], np.float32)],
        {"n_vocab": 1},
    ),
    "cross_entropy_backward with likely targets": (
        [4 * normal(12, 12) + 30 * np.eye(12, dtype=np.float32), np.arange(12, dtype=np.int32)],
        {"factor": 0.05},
    ),
    "cross_entropy_backward of tokens whose weight is 0 in float64": (
        [np.asarray([[0, -740, 3, -300]], np.float32), np.zeros(1, np.int32)],
        {"factor": 0.05},
    ),
    "cross_entropy_backward": ([4 * normal(20, 12), np.arange(20, dtype=np.int32) % 12], {"factor": 0.05}),
}


@pytest.mark.parametrize("case", LARGER)
def test_a_bound_holds_and_is_within_1000_times_the_error(case):
    """Catches a term that a bound leaves out, and a bound so large that everything would be computed twice."""
    arrays, options = LARGER[case]
    name = case.partition(" ")[0]
    wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
    numerics = stated(pg.get_backend("numpy"), "float64", "cpu")
    found = getattr(float64_gradients, name)(*wide, **options, numerics=numerics)
    for key, pairs in gradient_oracle.intervals(name, arrays, options).items():
        value, error = (np.broadcast_to(x, pairs.shape) for x in found[key])
        errors = np.asarray(
            [
                float(max(abs(Fraction(v) - low), abs(Fraction(v) - high)))
                for v, (low, high) in zip(value.ravel().tolist(), pairs.ravel(), strict=True)
            ]
        )
        assert np.isfinite(error).all()
        assert (errors <= error.ravel()).all(), key
        if " " not in case:  # the other cases are about a single term of the bound
            assert (1000 * errors > error.ravel())[error.ravel() > 0].any(), key


# The bounds in an arithmetic that errs as much as it may, in the worst directions: see tests/test_float64.py.

N = 120
PRECISE, ROUGH_EXP = Numerics(exp=(0.0, 0.0), log=0.0), Numerics(exp=(1e3, 0.0), log=0.0)
FEW = np.asarray([[1, *(N - 1) * [2.0**-24]]], np.float32)  # each sum of its squares is rounded to about 1
ONE = np.ones((1, 1), np.float32)


def column(*numbers):
    return np.asarray(numbers, np.float32)[:, None]


def unit(i):
    return np.eye(1, N, i, dtype=np.float32)


SPREAD = np.asarray([[1, -1, *(N // 2 - 1) * [2.0**-20, -(2.0**-20)]]], np.float32)
ONES = np.ones(N, np.float32)
ATTAINED = {
    # name: (function, arrays, options, numerics, directions of the errors, result, least ratio)
    "a weight": (
        "softmax_backward",
        [np.asarray([[-5, 0]], np.float32), np.asarray([[1, 0]], np.float32)],
        {"axis": -1},
        ROUGH_EXP,
        {"exp": ("at", 0)},
        "x",
        0.4,
    ),
    "the mean of weights": (
        "softmax_backward",
        [np.zeros((1, 3), np.float32), np.asarray([[1, -1, 0]], np.float32)],
        {"axis": -1},
        ROUGH_EXP,
        {"exp": ("at", 0)},
        "x",
        0.3,
    ),
    "the scores of other keys": (
        "attention_backward",
        [8 * FEW, np.concatenate([0 * FEW, FEW]), column(1, -1), ONE],
        {"scale": 0.9},
        PRECISE,
        {"matmul": 1, "*": 1},
        "v",
        0.3,
    ),
    "the score of a key with a small weight": (
        "attention_backward",
        [8 * FEW, np.concatenate([FEW, 0 * FEW]), column(1, -1), ONE],
        {"scale": -0.9},
        PRECISE,
        {"matmul": 1, "*": 1},
        "v",
        0.3,
    ),
    "dy v of a key with a small weight": (
        "attention_backward",
        [ONE, column(-5, 0), np.concatenate([FEW, 0 * FEW]), FEW],
        {"scale": 1.0},
        PRECISE,
        {"matmul": 1},
        "k",
        0.5,
    ),
    "dy v of a key with a large weight": (
        "attention_backward",
        [ONE, column(5, 0), np.concatenate([FEW, 0 * FEW]), FEW],
        {"scale": 1.0},
        PRECISE,
        {"matmul": 1},
        "k",
        0.3,
    ),
    "the scale": (
        "attention_backward",
        [ONE, column(1.25, 0), np.concatenate([FEW, 0 * FEW]), FEW],
        {"scale": 4.0},
        PRECISE,
        {"matmul": 1},
        "k",
        0.3,
    ),
    "the sum over queries": (
        "attention_backward",
        [FEW.T, ONE, ONE, FEW.T**2],
        {"scale": 1.0},
        PRECISE,
        {"matmul": 1},
        "v",
        0.6,
    ),
    "the root of the variance": (
        "layer_norm_backward",
        [SPREAD, ONES, unit(2)],
        {"eps": 1e-9},
        PRECISE,
        {"sum": 1},
        "x",
        0.2,
    ),
    "the mean of dz": (
        "layer_norm_backward",
        [unit(0) - unit(1), ONES, np.roll(FEW**2, 2)],
        {"eps": 1e-9},
        PRECISE,
        {"sum": 1},
        "x",
        0.3,
    ),
    "a normalised element": (
        "layer_norm_backward",
        [unit(0), ONES, unit(0)],
        {"eps": 1e-9},
        PRECISE,
        {"sum": 1},
        "g",
        0.3,
    ),
}


@pytest.mark.parametrize("case", ATTAINED)
def test_a_bound_is_attained(monkeypatch, case):
    """Catches a term that a bound leaves out, if the other terms are larger in ordinary arithmetic."""
    name, arrays, options, numerics, directions, key, least = ATTAINED[case]
    for module in (float64, float64_gradients):
        monkeypatch.setattr(module, "_UNIT", rough.UNIT * (1 + 2.0**-17))
    expected, largest = gradient_oracle.intervals(name, arrays, options)[key], 0.0
    with registered(rough.RoughBackend()) as backend, np.errstate(all="ignore"):
        for turn in (1, -1):
            turned = {kind: turn * way if isinstance(way, int) else way for kind, way in directions.items()}
            monkeypatch.setattr(rough, "SIGNS", [rough.Signs(numerics, 0, **turned)])
            given = [backend.from_numpy(a.astype(np.float64)) for a in arrays]
            value, error = map(
                backend.to_numpy, getattr(float64_gradients, name)(*given, **options, numerics=numerics)[key]
            )
            for v, e, (low, high) in zip(
                value.ravel(), np.broadcast_to(error, value.shape).ravel(), expected.ravel(), strict=True
            ):
                distance = max(abs(Fraction(v) - low), abs(Fraction(v) - high))
                assert distance <= Fraction(e)
                largest = max(largest, float(distance / Fraction(e)) if e else 0.0)
    assert largest >= least


HALF = 2.0**-24


def test_ties_of_gradients_go_to_even():
    """Catches an exact formula that never ends at a tie, or rounds it away from zero."""
    one = np.ones((2, 1), np.float32)
    equal = np.zeros((2, 2), np.float32)
    dy = np.asarray([[1], [1 + 2 * HALF]], np.float32)
    with pg.reproducible():
        by_v = gradients.attention_backward(equal, equal, one, dy, scale=0.5)["v"]
        assert by_v.tolist() == [[1], [1]]  # the mean is 1 + 2^-24
        by_x = gradients.softmax_backward(equal, np.asarray([[0, -4 * (1 + HALF * 2)], [0, 0]], np.float32))["x"]
        assert by_x[0].tolist() == [1 + 2 * HALF, -1 - 2 * HALF]
        x = np.asarray([[-1, 1], [-1, 1]], np.float32)  # the normalised rows, if eps is 0
        of_g = gradients.layer_norm_backward(
            x, np.ones(2, np.float32), np.asarray([[0, 1], [0, HALF]], np.float32), eps=0.0
        )
        assert of_g["g"].tolist() == [0, 1]
        of_gelu = gradients.gelu_backward(np.zeros(1, np.float32), np.full(1, 2.0**-125 - 2.0**-149, np.float32))["x"]
        assert of_gelu.tolist() == [2.0**-126]
        logits = np.zeros((1, 2), np.float32)
        for factor, even in ((1 + HALF, 1), (1 + 3 * HALF, 1 + 4 * HALF)):
            of_logits = gradients.cross_entropy_backward(logits, np.zeros(1, np.int32), factor=2 * factor)["logits"]
            assert of_logits.tolist() == [[-even, even]]


def test_the_gradient_of_layer_norm_on_and_next_to_a_tie():
    """Catches an exact comparison that ignores a sign, or takes a number 2^-144 from a tie for a tie."""
    # The variance is 16, and the root of 16 + 9 is 5. dz is orthogonal to the row, so the gradient is (dz - mean) / 5.
    x, part = np.asarray([4, -4] * 3, np.float32), 1 + 2.0**-12
    tie, up = part * part - HALF, part * part + HALF
    for tiny, expected in ((0.0, (tie, -tie)), (2.0**-40, (tie, -up)), (-(2.0**-40), (up, -tie))):
        g = np.asarray([part] * 4 + [2.0**-100] * 2, np.float32)
        dy = np.asarray([5 * part] * 2 + [-5 * part] * 2 + [tiny] * 2, np.float32)
        with pg.reproducible():
            found = gradients.layer_norm_backward(x, g, dy, eps=9.0)["x"]
        assert found[1:3].tolist() == [*expected]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
def test_products_of_slices_are_enclosed(n):
    """Catches slices with too many bits for exact sums, a missing slice, and a rest that is not counted."""
    largest = np.full((1, n), 1 - HALF, np.float32)
    wide = np.asarray([[1 - HALF, *[2.0**-36 * (1 - HALF)] * (n - 1)]], np.float32)
    wider = np.asarray([[1, *[2.0**-100 * (1 - HALF)] * (n - 1)]], np.float32)
    cases = [(largest, largest), (normal(2, n), normal(3, n)), (wide, largest), (wider, 1 / wider), (1 / wider, wider)]
    for i, (a, b) in enumerate(cases):
        found, exactly = exact_gradients._matmul(DoubleDouble(), a, b), exact_dot(a[:, None], b)
        for index in np.ndindex(exactly.shape):
            distance = abs(Fraction(found.high[index]) + Fraction(found.low[index]) - Fraction(exactly[index]))
            assert distance <= Fraction(found.error[index])
            assert i > 2 or found.error[index] < 2.0**-90 * n


def test_the_sum_of_all_elements_has_no_axes():
    """Catches an exact formula that needs the index of an element."""
    dy = np.asarray([1, HALF, 2.0**-60], np.float32)
    with pg.reproducible():
        found = gradients.add_backward(dy, n_axes=1)["y"]
    assert (found.shape, float(found)) == ((), 1 + 2 * HALF)
    assert float64_gradients.add_backward(np.asarray([1, HALF]), n_axes=1, numerics=None)["y"].error == 0  # a tie


def test_scores_that_overflow_in_float64():
    """Catches an exact formula that never ends, because it subtracts a score that is far from the largest."""
    q, k, v, dy = (np.full((2, 2), x, np.float32) for x in (1e38, 1e38, 1, 1))
    k[1], v[1] = 1, 3
    with pg.reproducible(), np.errstate(all="ignore"):
        found = gradients.attention_backward(q, k, v, dy, scale=-1e300)
    assert [found[name].tolist() for name in "qkv"] == [[[0, 0]] * 2, [[0, 0]] * 2, [[0, 0], [2, 2]]]


def test_a_weight_of_1_less_10_to_minus_87_is_not_1():
    """Catches a tie that is assumed after a small number of digits."""
    q, k, dy = np.ones((2, 1), np.float32), column(0, -200), column(1 + 2 * HALF, HALF)
    with pg.reproducible():
        found = gradients.attention_backward(q, k, k, dy, scale=1.0)["v"]
    assert found[0] == 1 + 2 * HALF  # a tie would go to 1 + 4 * HALF


def test_a_row_of_equal_elements_without_eps():
    """Catches an exact formula that never ends, and sums that leave out what is not defined."""
    x, g, dy = np.asarray([[1, 1, 1], [1, 2, 4]], np.float32), np.ones(3, np.float32), np.ones((2, 3), np.float32)
    with pg.reproducible(), np.errstate(all="ignore"):
        found = gradients.layer_norm_backward(x, g, dy, eps=0.0)
    assert np.isnan(found["x"]).all(axis=-1).tolist() == [True, False]
    assert np.isnan(found["g"]).all()
    assert found["b"].tolist() == [2, 2, 2]


def test_subnormal_arguments_of_formulas_count_as_0():
    """Catches an exact formula that reads them."""
    tiny, one, at = np.full(1, 2.0**-127, np.float32), np.ones(1, np.float32), every(1)
    large = np.full(4, 2.0**20)
    assert exact_gradients.moments(tiny, tiny, tiny, large, at={"m": at, "v": at}) == {"m": 0, "v": 0}
    assert exact_gradients.adamw(tiny, tiny, one, large, at={"p": at})["p"] == 0
    assert exact_gradients.norm([tiny], 1) == 0
    x, g = np.asarray([2.0**-127, 0], np.float32), np.ones(2, np.float32)
    found = exact_gradients.layer_norm_backward(
        x, g, x * 0 + g, eps=1e-80, at={"x": every(2), "g": every(2), "b": every(2)}
    )
    assert found["g"].tolist() == [0, 0]


def test_the_last_exponential_decides_next_to_a_tie():
    """Catches an exact formula that computes with ever more digits: the result is a midpoint less exp(-1e30)."""
    logits = np.asarray([[0, -1e30]], np.float32)
    with pg.reproducible():
        found = gradients.cross_entropy_backward(logits, np.ones(1, np.int32), factor=1 + 3 * HALF)["logits"]
    assert found.tolist() == [[1 + 2 * HALF, -1 - 2 * HALF]]


def test_errors_above_those_that_are_proved_are_infinite():
    """Catches a bound that is used although the products of its errors are not negligible."""
    row, large, one = np.full((1, 3), 1e30), np.full((1, 1), 1e10), np.ones((1, 1))
    args = large, np.concatenate([large, large]), np.asarray([[0.0], [1]]), one
    with np.errstate(all="ignore"):
        x = float64_gradients.layer_norm_backward(row, np.ones(3), np.ones((1, 3)), numerics=PRECISE)["x"]
        found = float64_gradients.attention_backward(*args, scale=1.0, numerics=PRECISE)
    assert not any(np.isfinite(each.error).any() for each in (x, *found.values()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_is_nan_as_a_whole_if_an_argument_is_not_finite(value):
    """Catches results that depend on the framework's arithmetic with infinities."""
    for case, (arrays, options) in LARGER.items():
        arrays, name = [a.copy() for a in arrays], case.partition(" ")[0]
        arrays[-1 if arrays[-1].dtype == np.float32 else 0].ravel()[-1] = value
        with pg.reproducible(), np.errstate(all="ignore"):
            found = getattr(gradients, name)(*arrays, **options)
        assert all(np.isnan(a).all() for a in found.values()), name


def test_a_query_that_sees_no_key_makes_its_gradient_nan():
    """Catches an exact formula that never ends, because no precision decides NaN."""
    q, k, v, dy = normal(3, 2), normal(4, 2), normal(4, 2, seed=1), normal(3, 2, seed=1)
    mask = MASK.copy()
    mask[1] = False
    with pg.reproducible():
        found = gradients.attention_backward(q, k, v, dy, mask, scale=0.5)
    assert np.isnan(found["q"]).any(axis=-1).tolist() == [False, True, False]
    assert np.isnan(found["k"]).all()
    assert np.isnan(found["v"]).all()
    with pg.reproducible():
        found = gradients.cross_entropy_backward(normal(2, 3), np.zeros(2, np.int32), factor=math.nan)
    assert np.isnan(found["logits"]).all()


# The optimizer


CONSTANTS = st.floats(2.0**-40, 2.0**40) | st.integers(-8, 8).map(lambda n: 2.0**n)


@given(floats(4), floats(4), floats(4), st.tuples(*4 * [CONSTANTS]))
def test_moments_are_correctly_rounded(g, m, v, constants):
    """Catches a wrong bound, the wrong constant, and a tie that does not go to even."""
    g, m, v = clean(g), clean(m), abs(clean(v))
    b1, a1, b2, a2 = map(Fraction, constants)
    expected = {
        "m": [oracle.rounded(b1 * x + a1 * y) for x, y in zip(oracle.fractions(m), oracle.fractions(g), strict=True)],
        "v": [
            oracle.rounded(b2 * x + a2 * y * y) for x, y in zip(oracle.fractions(v), oracle.fractions(g), strict=True)
        ],
    }
    with np.errstate(all="ignore"):
        found = mode.Interpreter().formula("moments", {"g": g, "m": m, "v": v}, constants=constants)
        arrays = (g, m, v, np.asarray(constants))
        exactly = exact_gradients.moments(*arrays, at={"m": every(4), "v": every(4)})
    for key, a in expected.items():
        assert found[key].tobytes() == exactly[key].tobytes() == np.asarray(a, np.float32).tobytes(), key


def step(p, m, v, constants):
    """Return c p - a m / (sqrt(b v) + eps), rounded."""
    c, a, b, eps = map(Fraction, constants)
    p, m, v = (Fraction(float(x)) for x in (p, m, v))
    if not v and not eps:
        return oracle.rounded(c * p - a * m)
    if not v or not m:
        return oracle.rounded(c * p - (a * m / eps if m else 0))
    exact = oracle.exact_arb
    return oracle.decided(lambda: exact(c * p) - exact(a * m) / (exact(b * v).sqrt() + exact(eps)))


@given(floats(4), floats(4), floats(4), st.tuples(*3 * [CONSTANTS], CONSTANTS | st.just(0.0)))
def test_a_step_is_correctly_rounded(p, m, v, constants):
    """Catches a wrong bound, and a comparison of squares that ignores a sign. Ties with a square root are left out."""
    p, m, v = clean(p), clean(m), abs(clean(v))
    with np.errstate(all="ignore"):
        found = mode.Interpreter().formula("adamw", {"p": p, "m": m, "v": v}, constants=constants)["p"]
        exactly = exact_gradients.adamw(p, m, v, np.asarray(constants), at={"p": every(4)})["p"]
    assert found.tobytes() == exactly.tobytes()
    for i, each in enumerate(found):
        expected = step(p[i], m[i], v[i], constants)
        assert expected is None or each == expected


def test_the_bounds_of_the_optimizer_hold():
    """Catches a term that a bound leaves out: the terms of a sum cancel, or one of them is 0."""
    m, v = normal(200).astype(np.float64), normal(200, seed=1).astype(np.float64) ** 2
    v, c = v.astype(np.float32).astype(np.float64), (0.9, 0.1, 0.99, 0.01)
    found = float64_gradients.moments(-9 * m, m, v, c, numerics=PRECISE)
    b1, a1, b2, a2 = map(Fraction, c)
    pairs = [(Fraction(x), Fraction(y)) for x, y in zip(m, v, strict=True)]
    assert_within(found["m"], [b1 * x - 9 * a1 * x for x, _ in pairs])
    assert_within(found["v"], [b2 * y + 81 * a2 * x * x for x, y in pairs])
    c = (0.999, 0.01, 1.7, 1e-8)
    p = np.where(np.arange(200) % 2, 0, 0.01 * m / np.sqrt(1.7 * v)).astype(np.float32).astype(np.float64)
    c0, a, b, eps = map(Fraction, c)
    roots = [Fraction(math.isqrt(math.floor(b * y * 2**600)), 2**300) for _, y in pairs]
    exactly = [c0 * Fraction(x) - a * y / (root + eps) for x, (y, _), root in zip(p, pairs, roots, strict=True)]
    assert_within(float64_gradients.adamw(p, m, v, c, numerics=PRECISE)["p"], exactly)


def assert_within(evaluation, exactly):
    """Check the bounds of the errors, and that one of the errors is above a hundredth of its bound."""
    errors = [abs(Fraction(x) - y) / Fraction(e) for x, e, y in zip(*evaluation, exactly, strict=True)]
    assert 0.01 < max(errors) <= 1


def test_ties_of_a_step_go_to_even():
    """Catches a comparison of squares that is wrong at equality: the square roots are rational."""
    p, m, v = (
        np.asarray(a, np.float32) for a in ([1, 1, -1, 1], [HALF, -HALF, HALF, -3 * HALF], [0.25, 0.25, 0.25, 1])
    )
    constants = (1.0, 1.0, 1.0, 0.5)
    expected = [1 - HALF, 1, -1, 1 + 2 * HALF]
    exactly = exact_gradients.adamw(p, m, v, np.asarray(constants), at={"p": every(4)})["p"]
    found = mode.Interpreter().formula("adamw", {"p": p, "m": m, "v": v}, constants=constants)["p"]
    assert exactly.tolist() == found.tolist() == expected
    arrays = {"p": p[:1], "m": -p[:1], "v": 0 * v[:1]}  # the denominator is 0
    assert mode.Interpreter().formula("adamw", arrays, constants=(1 + HALF - 2.0**-52, 2.0**-52, 1.0, 0.0))["p"] == 1
    assert float64_gradients.adamw(**arrays, constants=(1.0, 1.0, 1.0, 0.0), numerics=PRECISE)["p"].error < 1e-14


def test_what_is_next_to_a_tie_is_not_rounded_as_a_tie():
    """Catches a bound that leaves out the roundings in float64: the results are 2^-77 below midpoints."""
    odd, less = np.full(1, 1 + 2 * HALF, np.float32), 1 - 2.0**-53
    arrays = {"g": np.full(1, HALF, np.float32), "m": odd, "v": odd * 0}
    assert mode.Interpreter().formula("moments", arrays, constants=(1.0, less, 1.0, 1.0))["m"] == odd
    arrays = {"g": np.full(1, HALF**0.5, np.float32), "m": odd, "v": odd}
    assert mode.Interpreter().formula("moments", arrays, constants=(1.0, 1.0, 1.0, less))["v"] == odd
    arrays = {"p": odd, "m": np.full(1, -HALF, np.float32), "v": np.ones(1, np.float32)}
    assert mode.Interpreter().formula("adamw", arrays, constants=(1.0, less, 1.0, 0.0))["p"] == odd


def test_what_is_2_to_minus_140_from_a_tie_is_not_a_tie():
    """Catches an exact comparison that takes a number that 40 digits do not separate from a midpoint for a midpoint."""
    one = np.ones(1, np.float32)
    for low, sign in ((1.0, 1), (1 + 2 * HALF, -1)):  # the even neighbours are 1 and 1 + 2^-22
        middle, expected = low + HALF, low + 2 * HALF if sign > 0 else low
        m = mode.Interpreter().formula(
            "moments", {"g": one, "m": one, "v": one}, constants=(middle, sign * 2.0**-140, 1, 1)
        )
        assert m["m"] == expected
        arrays = {"p": one, "m": -sign * one, "v": one}
        assert mode.Interpreter().formula("adamw", arrays, constants=(middle, 2.0**-140, 1.0, 0.5))["p"] == expected
    v = mode.Interpreter().formula("moments", {"g": one, "m": one, "v": one}, constants=(1, 1, 1 + HALF, 2.0**-140))[
        "v"
    ]
    assert v == 1 + 2 * HALF
    a = 1 + 2.0**-22  # 5 a is a tie, and 5 + 2^-20 even
    for more, expected in ((0.0, 5 + 2.0**-20), (2.0**-80, 5 + 3 * 2.0**-21)):
        assert mode.Interpreter().norm([np.asarray([3 * a, 4 * a, more], np.float32)], 1) == expected


@given(floats(5), floats(2, 3), st.integers(1, 7))
def test_the_norm_is_correctly_rounded(a, b, n):
    """Catches a sum of squares in float32, and an average that is rounded a second time."""
    a, b = clean(a), clean(b)
    total = sum(Fraction(float(x)) ** 2 for x in (*a, *b.ravel()))
    found = mode.Interpreter().norm([a, b], n)
    assert found == exact_gradients.norm([a, b], n)
    assert found == float(np.float32(found))
    with contextlib.suppress(OverflowError, ValueError):  # the square of the result is within half a unit of the sum
        low, high = (Fraction(float(np.nextafter(np.float32(found), np.float32(end)))) for end in (0, np.inf))
        middle = Fraction(found)
        if found >= 2.0**-125:
            assert ((low + middle) / 2 * n) ** 2 <= total <= ((high + middle) / 2 * n) ** 2


def test_the_norm_of_a_tie_and_of_numbers_that_are_not_finite():
    """Catches a tie that does not go to even, and a norm that ignores NaN."""
    assert mode.Interpreter().norm([np.asarray([1 + 2 * HALF], np.float32)], 2) == 0.5 + HALF
    tie = np.asarray([3 * (1 + 2 * HALF)], np.float32)
    assert mode.Interpreter().norm([tie * 0], 1) == 0
    for value in (np.nan, np.inf):
        assert math.isnan(mode.Interpreter().norm([np.asarray([1, value], np.float32)], 1))
