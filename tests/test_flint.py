"""Ball arithmetic: each ball contains the exact result, of the operation, of the op and of the whole model."""

import math
import operator
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2 import testing
from portable_gpt2.testing import plain_gpt2

pytestmark = pytest.mark.usefixtures("flint")


@pytest.fixture(scope="module")
def backend(flint):
    return pg.get_backend("flint")


# Exact numbers


def exact(x):
    """Return the midpoint of a ball, or a float, as a fraction."""
    if isinstance(x, float):
        return Fraction(x)
    mantissa, exponent = map(int, x.mid().man_exp())
    return Fraction(mantissa) * Fraction(2) ** exponent


def interval(ball):
    """Return the end points of a ball as fractions."""
    middle, radius = exact(ball), exact(ball.rad())
    return middle - radius, middle + radius


def assert_encloses(array, expected, what):
    """Assert that the balls of an array contain fractions, or balls of a much higher precision."""
    values = array.values
    assert values.dtype == object
    assert values.shape == np.shape(expected)
    for ball, inside in zip(values.ravel(), np.ravel(expected), strict=True):
        lower, upper = interval(ball)
        low, high = (inside, inside) if isinstance(inside, Fraction) else interval(inside)
        assert lower <= low <= high <= upper, f"{what}: {ball} does not contain {inside}"


def each(f, *arrays):
    return np.asarray(np.frompyfunc(f, len(arrays), 1)(*arrays), object)


def fractions(a):
    return each(lambda x: Fraction(float(x)), a)


X = np.random.default_rng(0).standard_normal((3, 4)) * 2.0 ** np.arange(-6, 6).reshape(3, 4)
Y = np.random.default_rng(1).standard_normal((3, 4))
W = np.random.default_rng(2).standard_normal((4, 70))
RATIONAL = {  # with the exact result, in fractions
    "+": (lambda xp, x, y: x + y, operator.add),
    "-": (lambda xp, x, y: x - y, operator.sub),
    "x": (lambda xp, x, y: x * y, operator.mul),
    "/": (lambda xp, x, y: x / y, operator.truediv),
    "+ number": (lambda xp, x, y: x + 0.1, lambda x, y: x + Fraction(0.1)),
    "number -": (lambda xp, x, y: 0.1 - x, lambda x, y: Fraction(0.1) - x),
    "number x": (lambda xp, x, y: 0.1 * x, lambda x, y: Fraction(0.1) * x),
    "number /": (lambda xp, x, y: 0.1 / x, lambda x, y: Fraction(0.1) / x),
    "sum": (lambda xp, x, y: xp.sum(x, axis=-1), lambda x, y: x.sum(axis=-1)),
    "sum of all": (lambda xp, x, y: xp.sum(x, axis=(0, 1)), lambda x, y: x.sum()),
    "mean": (lambda xp, x, y: xp.mean(x, axis=-1, keepdims=True), lambda x, y: x.sum(axis=-1, keepdims=True) / 4),
    "cumulative_sum": (lambda xp, x, y: xp.cumulative_sum(x, axis=-1), lambda x, y: x.cumsum(axis=-1)),
    "matmul": (lambda xp, x, y: xp.matmul(x, xp.matrix_transpose(y)), lambda x, y: x @ y.T),
}
ELEMENTARY = {  # with the exact result, in 1000 bits
    "exp": lambda xp, x: xp.exp(x),
    "tanh": lambda xp, x: xp.tanh(x),
    "log": lambda xp, x: xp.log(x * x),
    "sqrt": lambda xp, x: xp.sqrt(x * x),
    "** -0.5": lambda xp, x: (x * x) ** -0.5,
    "max": lambda xp, x: xp.max(x * x, axis=-1),
}


def without_radii(array):
    """Return the midpoints of an array: the result of an adapter that forgets the error of the last operation."""
    return type(array)(each(lambda ball: ball.mid(), array.values), array.dtype)


def rational(name, backend, x, y):
    computed, true = RATIONAL[name]
    with backend.working_precision(24):
        found = computed(backend.xp, backend.from_numpy(x), backend.from_numpy(y))
    return found, true(fractions(x), fractions(y))


def elementary(name, backend, x):
    results = []
    for bits in (24, 1000):
        with backend.working_precision(bits):
            results.append(ELEMENTARY[name](backend.xp, backend.from_numpy(x)))
    return results[0], results[1].values


@pytest.mark.parametrize("name", [*RATIONAL, *ELEMENTARY])
def test_a_ball_contains_the_exact_result(backend, name):
    """Catches a rounding error that is not added to the radius. Without its radius, each result fails this test."""
    found, true = rational(name, backend, X, Y) if name in RATIONAL else elementary(name, backend, X)
    assert_encloses(found, true, name)
    with pytest.raises(AssertionError, match="does not contain"):
        assert_encloses(without_radii(found), true, name)


some = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
pairs = st.lists(st.tuples(some, some), min_size=4, max_size=4).map(np.asarray)


@given(pairs)
def test_balls_contain_the_exact_results_of_any_numbers(backend, numbers):
    """Catches an operation that is right for some signs, magnitudes or zeros only."""
    x, y = numbers.T[:, None]
    for name in RATIONAL:
        if not (name == "/" and 0 in y) and not (name == "number /" and 0 in x):
            assert_encloses(*rational(name, backend, x, y), name)
    nonzero = np.where(x == 0, 1.0, x / 1e4)
    for name in ELEMENTARY:
        assert_encloses(*elementary(name, backend, nonzero), name)


@pytest.mark.parametrize("name", RATIONAL)
def test_operations_on_balls_contain_the_results_of_all_their_elements(backend, flint, name):
    """Catches a radius of an argument that is dropped: the end points are elements of a ball."""
    computed, true = RATIONAL[name]
    x, y = (backend.from_numpy(a) for a in (np.asarray([[2.0, -3.0, 0.5, 1.0]]), np.asarray([[1.5, 7.0, -4.0, 3.0]])))
    wide = [type(a)(each(lambda x: flint.arb(x, 0.125), a.values), a.dtype) for a in (x, y)]
    found = computed(backend.xp, *wide)
    ends = [each(interval, a.values) for a in wide]
    for i in (0, 1):
        for j in (0, 1):
            given = [each(lambda e, k=k: e[k], a) for a, k in zip(ends, (i, j), strict=True)]
            assert_encloses(found, true(*given), name)


def test_the_largest_of_balls_that_overlap_is_enclosed(backend, flint):
    """Catches a maximum that is the ball with the largest midpoint."""
    x = backend.from_numpy(np.asarray([[1.0, 1.25, -2.0]]))
    wide = type(x)(each(lambda x, r: flint.arb(x, r), x.values, np.asarray([[0.75, 0.25, 0.5]])), x.dtype)
    [found] = backend.xp.max(wide, axis=-1).values  # of [0.25, 1.75], [1, 1.5] and [-2.5, -1.5]
    lower, upper = interval(found)
    assert lower <= 1
    assert upper >= Fraction(1.75)
    assert upper - lower < Fraction(0.751)


def test_products_of_every_size_are_enclosed(backend):
    """Catches a block of columns that is left out or repeated, and an error in one of FLINT's algorithms."""
    rng = np.random.default_rng(3)
    for n, k, m in ((1, 1, 1), (2, 5, 3), (1, 300, 900), (64, 64, 64), (9, 70, 5000), (3, 2**18 + 1, 2)):
        x, w = (rng.integers(-99, 99, shape).astype(np.float64) for shape in ((n, k), (k, m)))
        found = backend.xp.matmul(backend.from_numpy(x), backend.from_numpy(w))
        assert np.array_equal(backend.to_numpy(found), x @ w)
    x, w = (backend.from_numpy(np.zeros(shape)) for shape in ((2, 0), (0, 3)))
    assert np.array_equal(backend.to_numpy(backend.xp.matmul(x, w)), np.zeros((2, 3)))


def test_the_working_precision_ends_with_its_block(backend, flint):
    """Catches a precision that stays, and one that changes the setting of FLINT that the user has."""
    third = lambda: backend.enclosure(backend.from_numpy(np.ones(1)) / 3).radius[0]  # noqa: E731
    flint.ctx.prec = of_user = 77
    before = third()
    with backend.working_precision(64):
        assert 2.0**-70 < third() < 2.0**-60
        with backend.working_precision(1024):
            assert third() < 2.0**-1000
        assert 2.0**-70 < third() < 2.0**-60
    assert third() == before < 2.0**-250
    assert backend.enclosure(-(backend.from_numpy(np.ones(1)) / 3)).radius[0] <= 2 * before
    assert flint.ctx.prec == of_user
    flint.ctx.default()
    for bad in (1, 0, -5, 2.5, None, "64", 2**40):
        with pytest.raises(ValueError, match="working precision"), backend.working_precision(bad):
            pass


# To the host


def assert_nearest(y, x):
    """Assert that a number of a floating dtype is one of those that are nearest to a fraction."""
    if np.isinf(y):
        limits = np.finfo(y.dtype)
        assert abs(x) >= Fraction(float(limits.max)) + Fraction(float(limits.max - np.nextafter(limits.max, 0))) / 2
        return
    distance = abs(Fraction(float(y)) - x)
    for other in (np.nextafter(y, -np.inf, dtype=y.dtype), np.nextafter(y, np.inf, dtype=y.dtype)):
        if np.isfinite(other):
            assert distance <= abs(Fraction(float(other)) - x)


numbers = st.tuples(st.integers(-(2**130), 2**130), st.integers(-1250, 1000)) | st.tuples(
    st.integers(2**52, 2**53).map(lambda i: i * 2**60 + 2**59)
    | st.integers(2**23, 2**24).map(lambda i: i * 2**90 + 2**89),
    st.integers(-1180, 100),
)
"""Mantissas and exponents: any, and those in the middle of two numbers of float64 or float32."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(st.lists(numbers, min_size=1, max_size=5), st.sampled_from([-1, 0, 1]))
def test_midpoints_are_rounded_to_the_nearest_number(flint, backend, dtype, given, nudge):
    """Catches truncation, rounding twice (first to float64), and a subnormal result that is wrong by a bit."""
    given = [(mantissa + nudge, exponent) for mantissa, exponent in given]
    with_precision = backend.from_numpy(np.zeros(len(given)), dtype)
    balls = np.empty(len(given), object)
    balls[:] = [flint.arb(pair) for pair in given]
    found = backend.to_numpy(type(with_precision)(balls, with_precision.dtype))
    assert found.dtype == dtype
    for y, (mantissa, exponent) in zip(found, given, strict=True):
        assert_nearest(y, Fraction(mantissa) * Fraction(2) ** exponent)


@given(st.lists(st.tuples(numbers, st.tuples(st.integers(0, 2**20), st.integers(-1250, 900))), min_size=1, max_size=5))
def test_bounds_are_rounded_outwards_and_radii_up(flint, backend, given):
    """Catches a bound that excludes a part of a ball, and one that is needlessly far away."""
    balls = np.empty(len(given), object)
    balls[:] = [flint.arb(middle, flint.arb(radius)) for middle, radius in given]
    like = backend.from_numpy(np.zeros(1))
    found = backend.enclosure(type(like)(balls, like.dtype))
    for ball, lower, upper, radius in zip(balls, *found, strict=True):
        low, high = interval(ball)
        assert lower == -np.inf or Fraction(lower) <= low
        assert upper == np.inf or Fraction(upper) >= high
        assert radius == np.inf or Fraction(radius) >= exact(ball.rad())
        size = max(abs(low), abs(high))
        if size < Fraction(2) ** 1000:
            slack = max(size * Fraction(2) ** -50, Fraction(2) ** -1072)
            assert Fraction(upper) - Fraction(lower) <= (high - low) + slack


def test_special_values_come_to_the_host(backend, flint):
    """Catches a NaN that becomes a number, and an infinity that has bounds."""
    like = backend.from_numpy(np.zeros(4))
    balls = np.empty(4, object)
    balls[:] = [flint.arb("nan"), flint.arb("inf"), flint.arb("-inf"), flint.arb(1, math.inf)]
    array = type(like)(balls, like.dtype)
    assert np.array_equal(backend.to_numpy(array), [np.nan, np.inf, -np.inf, np.nan], equal_nan=True)
    found = backend.enclosure(array)
    assert found.lower.tolist() == [-np.inf, np.inf, -np.inf, -np.inf]
    assert found.upper.tolist() == [np.inf, np.inf, -np.inf, np.inf]
    assert found.radius.tolist() == [np.inf, 0, 0, np.inf]


def test_arrays_from_the_host_are_exact_and_share_memory(backend):
    """Catches parameters that are converted to balls when they are loaded, which would take 20 times the memory."""
    a = np.asarray([0.1, -0.0, 1e-310])
    x = backend.from_numpy(a)
    assert np.shares_memory(backend.to_numpy(x), a)
    found = backend.enclosure(x)
    assert np.array_equal(found.lower, a)
    assert np.array_equal(found.upper, a)
    assert not found.radius.any()


def test_no_label_rounds(backend):
    """Catches a dtype that is more than a label: a number that is rounded to float32 in an array or a cache."""
    third = 1 / 3
    x = backend.from_numpy(np.asarray([[third]]))
    narrow = backend.xp.astype(x, backend.xp.float32)
    cache = backend.write(backend.zeros((2, 1), like=narrow), narrow, 1)
    cache = backend.write(cache, backend.zeros((1, 1), like=narrow), 0)
    chosen = backend.xp.where(backend.from_numpy(np.asarray([[True]])), third, narrow)
    joined = backend.xp.concat([backend.zeros((1, 1), like=narrow), narrow], axis=0)
    for y in (narrow, cache[1:, :], chosen, joined[1:, :]):
        assert y.dtype == backend.dtype("float32")
        assert backend.to_numpy(backend.xp.astype(y, backend.xp.float64)) == third
        assert backend.to_numpy(y) == np.float32(third)
    big = backend.from_numpy(np.asarray([2**53 + 1, -(2**63), 7]))
    assert backend.xp.astype(big, backend.xp.float64).values.tolist() == [2**53 + 1, -(2**63), 7]


def test_sixteen_bits_are_refused(backend):
    """Catches float16 that would stand for a number of 16 bits and be computed with in 256."""
    with pytest.raises(TypeError, match="no arrays of float16; its floating dtypes are float32 and float64"):
        backend.from_numpy(np.ones(2, np.float16))


# What is not decided, and what is not finite


def test_a_comparison_of_balls_that_overlap_is_an_error(backend):
    """Catches a branch that is taken because of a midpoint."""
    x = backend.from_numpy(np.asarray([1.0, 2.0])) / 3
    assert backend.to_numpy(x < 0.5).tolist() == [True, False]
    assert backend.to_numpy(x != 0.5).tolist() == [True, True]
    assert backend.to_numpy(x > -math.inf).all()
    for compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        with pytest.raises(ArithmeticError, match="not decided for 2 of 2 elements"):
            compare(x, x)
    for call in (lambda: bool(x[0]), lambda: int(x[0]), lambda: backend.top_k(x, 1)):
        with pytest.raises(TypeError, match="takes exact numbers"):
            call()


def test_a_hidden_score_has_the_weight_0_exactly(backend):
    """Catches a weight of [0 +/- something], and a row that becomes NaN because one of its scores is -inf."""
    q = backend.from_numpy(np.random.default_rng(0).standard_normal((4, 3)))
    k = backend.from_numpy(np.random.default_rng(1).standard_normal((4, 3)))
    weights = pg.attention_weights(q / 3, k / 7, causal=True)
    found = backend.enclosure(weights)
    hidden = ~np.tri(4, dtype=bool)
    assert not found.lower[hidden].any()
    assert not found.upper[hidden].any()
    assert (found.radius[hidden] == 0).all()
    assert (found.lower[~hidden] > 0).all()
    assert np.isfinite(found.upper).all()
    assert found.radius.max() < 2.0**-240


def test_a_row_that_is_not_finite_is_nan(backend):
    """Catches an infinite ball that is taken for a number."""
    rows = np.asarray([[1, 2, np.nan], [1, np.inf, 2], [-np.inf] * 3, [1, -np.inf, 2], [-np.inf, -np.inf, 5]])
    x = backend.from_numpy(rows)
    for array in (x, backend.xp.where(x == 1.0, x / 1, x), x + 0):
        found = backend.to_numpy(pg.softmax(array))
        assert np.isnan(found[:3]).all()
        assert found[3, 1] == 0
        assert np.isfinite(found[3]).all()
        assert found[4].tolist() == [0, 0, 1]


def test_what_is_not_defined_is_unknown(backend):
    """Catches 1 / 0, the root of a negative number, and a quotient by a ball that contains 0, with a finite ball."""
    one = backend.from_numpy(np.asarray([1.0]))
    third = one / 3
    around_zero = third - third
    for y in (one / 0, one / around_zero, backend.xp.sqrt(-one), backend.xp.log(-one), backend.xp.log(around_zero)):
        assert backend.enclosure(y).radius[0] == np.inf


# The whole model


@pytest.fixture(scope="module", params=list(plain_gpt2.CONFIGS))
def small(request, backend):
    """A small model: its configuration, its parameters on the backend and in NumPy, and token ids."""
    config = plain_gpt2.CONFIGS[request.param]
    flat = plain_gpt2.random_weights(config)
    return config, plain_gpt2.on_backend(backend, flat, "float64"), flat, plain_gpt2.some_tokens(config, 2, 5)


def test_the_enclosures_of_a_model_contain_those_of_double_the_precision(backend, small):
    """Catches an op of which the radius is too small anywhere in the model."""
    config, params, _, tokens = small
    logits = []
    for bits in (100, 200):
        with backend.working_precision(bits):
            logits.append(pg.gpt2(params, backend.from_numpy(tokens), config)[0])
    coarse, fine = logits
    assert_encloses(coarse, fine.values, "logits")
    radii = [backend.enclosure(x).radius.max() for x in logits]
    assert radii[1] < 2.0**-90 * radii[0] < 2.0**-90


def test_two_witnesses_agree(backend, small):
    """Catches an error in the plain model, in the portable model, or in ball arithmetic: the other one would differ.

    The plain model in float64 may err as much as in float32, scaled by the ratio of the unit round-offs, times 4.
    """
    config, params, flat, tokens = small
    truth, error = plain_gpt2.truth_and_error(flat, tokens, config)
    found = backend.enclosure(pg.gpt2(params, backend.from_numpy(tokens), config)[0])
    allowed = plain_gpt2.yardstick(error, "float64")
    assert allowed < 1e-12
    assert (found.lower - allowed <= truth).all()
    assert (truth <= found.upper + allowed).all()
    assert not (truth == (found.lower + found.upper) / 2).all()


def test_the_cache_encloses_the_same_logits(backend, small):
    """Catches keys that are rounded in the cache: the radii would not contain the logits of a pass without a cache."""
    config, params, _, tokens = small
    given = backend.from_numpy(tokens)
    with backend.working_precision(512):
        fine, _ = pg.gpt2(params, given, config)
    cache = pg.new_cache(params, config, batch=2, capacity=5)
    found = []
    for part in (given[:, :3], given[:, 3:4], given[:, 4:]):
        logits, cache = pg.gpt2(params, part, config, cache)
        found.append(logits)
    assert_encloses(backend.xp.concat(found, axis=1), fine.values, "logits with a cache")


# The kit


ROUNDS_ONCE = {
    "test_layer_norm_of_random_numbers_errs_as_random_errors_add_up[flint-float64]": "its error is one rounding, which "
    "is less than a hundredth of the errors that add up in floating-point arithmetic",
}


def test_the_kit_accepts_ball_arithmetic():
    """Catches a function that portable code calls and that is missing or wrong for some shape, dtype or layout."""
    only = "contract or gelu or layer_norm or embed or cross_entropy"
    report = testing.check("flint", level="ops", only=only, examples=5, expected_failures=ROUNDS_ONCE)
    assert report.ok, str(report)
