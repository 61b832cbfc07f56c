"""The correctly rounded elements of each op: on and next to midpoints, and against fractions and FLINT's balls."""

import functools
import math
from fractions import Fraction

import flint
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import midpoints
import numpy as np
import oracle
import pytest
from hypothesis import assume, given

from portable_gpt2.correct_rounding import exact, rounding
from portable_gpt2.correct_rounding.balls import Ball, DoubleDouble
from portable_gpt2.correct_rounding.intervals import Decimals, Interval, exact_dot

F = np.float32


def every(*shape):
    """Return the indices of all elements of a result, as np.nonzero does; () for a number."""
    return np.nonzero(np.ones(shape)) if shape else ()


def assert_equal(found, expected, what=""):
    expected = np.asarray(expected, F).ravel()
    assert found.dtype == F
    assert found.tobytes() == expected.tobytes(), f"{what}: {found} should be {expected}"


# Midpoints


@pytest.mark.parametrize("op", exact.__all__)
def test_ties_and_neighbours_of_midpoints(op):
    """Catches a tie that does not go to even, and numbers that are put on the wrong side of a midpoint."""
    cases = [case for case in midpoints.cases() if case.op == op]
    assert cases
    for case in cases:
        found = getattr(exact, op)(**case.arguments, at=every(*case.expected.shape))
        assert_equal(found, case.expected, case.name)


def test_arguments_whose_results_are_nearest_to_midpoints():
    """Catches an error of gelu, of an exponential or of a logarithm above 2^-30 units in the last place of float32."""
    x = np.asarray(midpoints.found(midpoints.GELU), F)
    assert_equal(exact.gelu(x, every(len(x))), [oracle.gelu(float(each)) for each in x])
    for x in midpoints.found(midpoints.SIGMOID):
        row, expected = np.asarray([0, x], F), [oracle.softmax([0, x], j) for j in (0, 1)]
        assert_equal(exact.softmax(row, every(2)), expected, x)
        assert_equal(exact.attention_weights(np.ones((1, 1), F), row[:, None], every(1, 2), scale=1.0), expected, x)
        v = np.asarray([[0], [1]], F)
        assert_equal(exact.attention(np.ones((1, 1), F), row[:, None], v, every(1, 1), scale=1.0), expected[1:], x)
    for x in midpoints.found(midpoints.SOFTPLUS):
        found = exact.cross_entropy(np.asarray([[x, 0]], F), np.asarray([1]))
        assert_equal(found, oracle.cross_entropy([[x, 0.0]], [1]), x)


@pytest.mark.parametrize(
    ("pairs", "evaluate"),
    [
        (midpoints.GELU, oracle.gelu),
        (midpoints.SIGMOID, lambda x: oracle.softmax([0, x], 1)),
        (midpoints.SOFTPLUS, lambda x: oracle.cross_entropy([[x, 0.0]], [1])),
    ],
)
def test_the_searched_arguments_are_next_to_midpoints(pairs, evaluate):
    """Catches a table of arguments that are far from midpoints: the oracle must not decide them with 30 bits."""
    for x in midpoints.found(pairs):
        assert evaluate(x) is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oracle, "FEWEST", 30)
            patch.setattr(oracle, "MOST", 30)
            assert evaluate(x) is None


# Random arguments. Fractions with small numerators make ties likely; other numbers have all magnitudes.

SIMPLE = st.integers(-48, 48).map(lambda n: n / 16)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)  # subnormal numbers, too
MODERATE = st.floats(-8, 8, width=32)


def floats(*shape):
    """Return a strategy for float32 arrays."""
    return st.one_of([hnp.arrays(F, shape, elements=elements) for elements in (SIMPLE, MODERATE, SIMPLE | ANY)])


def clean(a):
    """Return a float32 array with 0 in the places of subnormal numbers."""
    return np.where(abs(a) < 2.0**-126, F(0), a)


@given(floats(2, 5), floats(5, 3), floats(3))
def test_conv1d_and_unembed_are_correctly_rounded(x, w, b):
    """Catches a wrong bound of the sum, a tie that does not go to even, a bias that is left out."""
    at, (x, w, b) = every(2, 3), map(clean, (x, w, b))
    assert_equal(exact.conv1d(x, w, b, at), [oracle.dot(x[i], w[:, j], b[j]) for i, j in np.transpose(at)])
    assert_equal(exact.unembed(x, w.T, at), [oracle.dot(x[i], w[:, j]) for i, j in np.transpose(at)])


@given(floats(2, 4), st.sampled_from([-1, 0]))
def test_softmax_is_correctly_rounded(x, axis):
    """Catches the wrong axis, and a wrong bound of an exponential, a sum or a quotient."""
    at, rows = every(2, 4), clean(x if axis == -1 else x.T)
    expected = [oracle.softmax(rows[(i, j)[axis - 1]].tolist(), (i, j)[axis]) for i, j in np.transpose(at)]
    assert_equal(exact.softmax(x, at, axis=axis), expected)


@given(floats(6))
def test_gelu_is_correctly_rounded(x):
    """Catches a wrong constant, and a wrong bound for either sign."""
    assert_equal(exact.gelu(x, every(6)), [oracle.gelu(float(each)) for each in clean(x)])


@given(floats(2, 5), floats(5), floats(5), st.sampled_from([1e-5, 1.0, 1e-300]))
def test_layer_norm_is_correctly_rounded(x, g, b, eps):
    """Catches a wrong bound of the variance, and a comparison of squares that ignores a sign."""
    at, (x, g, b) = every(2, 5), map(clean, (x, g, b))
    expected = [oracle.layer_norm(x[i], g[j], b[j], j, eps) for i, j in np.transpose(at)]
    assert_equal(exact.layer_norm(x, g, b, at, eps=eps), expected)


@given(floats(2, 4), st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_cross_entropy_is_correctly_rounded(logits, targets):
    """Catches a wrong bound of a logarithm or of the mean."""
    expected = oracle.cross_entropy(clean(logits).tolist(), targets)
    assume(expected is not None)  # the oracle needs more than 32,768 bits for a midpoint and exp(-30000), for instance
    assert_equal(exact.cross_entropy(logits, np.asarray(targets)), expected)


SCALES = st.sampled_from([None, 0.0, -0.25, 0.3]) | st.floats(-30, 30)
MASKS = hnp.arrays(np.bool_, (1, 2, 4)).filter(lambda mask: mask[..., 0].all())


@given(floats(2, 2, 3), floats(2, 4, 3), floats(2, 4, 2), st.none() | MASKS, st.booleans(), SCALES)
def test_attention_is_correctly_rounded(q, k, v, mask, causal, scale):
    """Catches a wrong bound, scale or mask, a causal mask that begins with another key, and wrong groups of keys."""
    options = {"mask": mask, "causal": causal, "scale": scale}
    seen = np.ones((2, 2, 4), bool) if mask is None else np.broadcast_to(mask, (2, 2, 4)).copy()
    if causal:
        seen &= np.tri(2, 4, 2, dtype=bool)
    factor = 3**-0.5 if scale is None else scale
    scores, weights, results = [], [], []
    for n, i in np.ndindex(2, 2):
        visible = np.flatnonzero(seen[n, i])
        query, keys, values = clean(q[n, i]), clean(k[n, visible]), clean(v[n, visible])
        products = [sum(map(Fraction, np.multiply(query, key, dtype=float))) for key in keys]
        each = dict(zip(visible, products, strict=True))
        scores += [oracle.rounded(each[j] * Fraction(factor)) if j in each else -math.inf for j in range(4)]
        place = {j: index for index, j in enumerate(visible)}
        weights += [oracle.softmax(products, place[j], factor) if j in place else 0 for j in range(4)]
        results += [oracle.attention(query, keys, column, factor) for column in values.T]
    assume(None not in results)  # see above
    assert_equal(exact.attention_scores(q, k, every(2, 2, 4), **options), scores)
    assert_equal(exact.attention_weights(q, k, every(2, 2, 4), **options), weights)
    assert_equal(exact.attention(q, k, v, every(2, 2, 2), **options), results)


def test_the_first_stage_decides_random_elements(monkeypatch):
    """Catches a bound that is too large: the second stage takes a hundred times longer."""
    digits = []

    def second_stage(n):
        digits.append(n)
        raise AssertionError("the first stage left an element undecided")  # now, because the second stage is slow

    monkeypatch.setattr(exact, "Decimals", second_stage)
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(F)

    x, w, b = normal(8, 3072), normal(3072, 50), normal(50)
    exact.conv1d(x, w, b, every(8, 50))
    exact.gelu(x, every(8, 3072))
    exact.layer_norm(x[:, :768], x[0, :768], x[1, :768], every(8, 768))
    exact.softmax(8 * x, every(8, 3072))
    q, k, v = normal(2, 9, 64), normal(2, 300, 64), normal(2, 300, 64)
    exact.attention(q, k, v, every(2, 9, 64), causal=True)
    exact.attention_weights(q, k, every(2, 9, 300))
    exact.attention_scores(q, k, every(2, 9, 300), scale=0.3)
    exact.cross_entropy(x, random.integers(0, 3072, 8))
    assert digits == [], "the first stage left an element undecided"


# NaN, infinities, subnormal numbers and zeros

SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 2.0, 0.5])


def specials(*shape):
    return hnp.arrays(F, shape, elements=SPECIAL | SIMPLE)


def assert_near(found, expected):
    """Check NaN, infinities and zeros, which must be equal, and other numbers, which must be near."""
    expected = np.asarray(expected, np.float64).ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert not np.signbit(found[found == 0]).any()
    assert set(found[np.isnan(found)].view(np.int32).tolist()) <= {0x7FC00000}


def quiet(test):
    """Let a test compute with NaN and infinities without warnings."""

    @functools.wraps(test)
    def call(*args, **kwargs):
        with np.errstate(all="ignore"):
            test(*args, **kwargs)

    return call


def wide(a):
    return clean(a).astype(np.float64)


@given(specials(2, 3), specials(3, 2), specials(2))
@quiet
def test_linear_layers_with_special_values(x, w, b):
    """Catches an infinity times 0 that is not NaN, and a subnormal number that is not 0."""
    product = (wide(x)[:, :, None] * wide(w)).sum(axis=1)
    assert_near(exact.conv1d(x, w[None], b, every(2, 2)), product + wide(b))
    assert_near(exact.unembed(x, w.T, every(2, 2)), product)


def plain_softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@given(specials(3, 2))
@quiet
def test_functions_with_special_values(x):
    """Catches a row with NaN or inf that is not NaN, and a number that is NaN although its row is defined."""
    assert_near(exact.softmax(x, every(3, 2)), plain_softmax(wide(x)))
    assert_near(exact.softmax(x, every(3, 2), axis=0), plain_softmax(wide(x).T).T)
    y = wide(x)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))
    assert_near(exact.gelu(x, every(3, 2)), 0.5 * y * (1 + tanh))
    m = y.max(axis=-1)
    losses = np.log(np.exp(y - m[:, None]).sum(axis=-1)) - (y[:, 0] - m)
    assert_near(exact.cross_entropy(x, np.zeros(3, int)), losses.mean())


@given(specials(2, 3), specials(3), specials(3), st.sampled_from([0.0, 1.0]))
@quiet
def test_layer_norm_with_special_values(x, g, b, eps):
    """Catches 0 / 0 that is not NaN, and 0 times an infinite gain."""
    # The mean of equal numbers, and a deviation that is 0, are exact in integers.
    y = wide(x) * 48
    deviation = 3 * y - y.sum(axis=-1, keepdims=True)
    variance = (3 * (y * y).sum(axis=-1) - y.sum(axis=-1) ** 2)[:, None]
    norm = np.where(np.isfinite(deviation), deviation, np.nan) / np.sqrt(variance + eps * (3 * 48) ** 2)
    assert_near(exact.layer_norm(x, g, b, every(2, 3), eps=eps), norm * wide(g) + wide(b))


@given(specials(2, 2), specials(3, 2), specials(3, 2), hnp.arrays(np.bool_, (2, 3)), st.sampled_from([-0.5, 0.0, 1.0]))
@quiet
def test_attention_with_special_values(q, k, v, mask, scale):
    """Catches a hidden key that matters, and a visible NaN, infinity or row without scores that does not."""
    scores = (wide(q)[:, None] * wide(k)).sum(axis=-1) * scale
    scores = np.where(mask, scores, -np.inf)
    weights = plain_softmax(scores)
    results = (weights[..., None] * np.where(mask[..., None], wide(v), 0)).sum(axis=1)
    options = {"mask": mask, "scale": scale}
    assert_near(exact.attention_scores(q, k, every(2, 3), **options), scores)
    assert_near(exact.attention_weights(q, k, every(2, 3), **options), weights)
    assert_near(exact.attention(q, k, v, every(2, 2), **options), results)


def test_targets_that_are_out_of_range_or_missing():
    """Catches an index that is taken modulo the length."""
    logits = np.zeros((2, 3), F)
    for targets in ([0, 3], [-1, 0]):
        assert_near(exact.cross_entropy(logits, np.asarray(targets)), [np.nan])
    assert_near(exact.cross_entropy(logits[:0], np.zeros(0, int)), [np.nan])
    assert_near(exact.cross_entropy(logits, np.asarray([0, 2], np.uint8)), [math.log(3)])


def test_no_elements_and_no_leading_axes():
    """Catches a function that needs an element, a term or a leading axis."""
    none, one = np.zeros(0, int), np.ones(1, F)
    assert exact.conv1d(np.ones((2, 3), F), np.ones((3, 4), F), np.ones(4, F), (none, none)).shape == (0,)
    assert exact.softmax(np.ones((2, 3), F), (none, none)).shape == (0,)
    assert exact.attention(np.ones((2, 3), F), np.ones((2, 3), F), np.ones((2, 3), F), (none, none)).shape == (0,)
    assert_equal(exact.conv1d(np.ones(0, F), np.ones((0, 1), F), one, every(1)), [1])
    assert_equal(exact.layer_norm(np.asarray([1, -1], F), np.ones(2, F), np.ones(2, F), every(2), eps=3.0), [1.5, 0.5])
    assert_equal(exact.layer_norm(np.full(3, 0.1, F), np.ones(3, F), np.ones(3, F), every(3), eps=0.0), [np.nan] * 3)
    assert_equal(exact.gelu(np.asarray(2, F), ()), [oracle.gelu(2.0)])
    keys = np.ones((3, 0), F)
    assert_equal(exact.attention_weights(keys, keys, every(3, 3)), np.full((3, 3), F(1) / F(3)))


def test_arguments_are_not_changed_and_need_not_be_contiguous():
    """Catches subnormal numbers that are replaced in the caller's array, and a weight that is copied."""
    random = np.random.default_rng(0)
    x, w, b = (np.full(shape, 1e-40, F) for shape in ((6,), (6, 4), (4,)))
    w[:] = np.asfortranarray(random.standard_normal((6, 4)))
    for array in (x, w, b):
        array.flags.writeable = False
    assert_equal(exact.conv1d(x, w, b, every(4)), np.zeros(4))
    assert_equal(exact.unembed(x, w.T, every(4)), np.zeros(4))
    assert_equal(exact.softmax(x, every(6)), np.full(6, F(1) / F(6)))
    assert_equal(exact.layer_norm(x, x, x, every(6)), np.zeros(6))
    assert_equal(exact.attention(x[None], x[None], x[None], every(1, 6)), np.zeros(6))
    assert_equal(exact.cross_entropy(x, np.asarray(0)), oracle.cross_entropy([[0.0] * 6], [0]))


# The two arithmetics

OPERATIONS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "sqrt": lambda a, b: (a * a).sqrt(),
    "exp": lambda a, b: a.exp(),
    "log": lambda a, b: (a * a).log(),
}
N = 500


def operands(radius, exponent=0):
    """Return random numbers as pairs of float64 numbers, their radii, and numbers in these balls as balls of FLINT."""
    random = np.random.default_rng(0)
    high = random.standard_normal(N) * 2.0 ** (random.integers(-3, 6, N) + exponent)
    low = high * 2.0**-54 * random.uniform(-1, 1, N)
    error = abs(high) * radius
    sides = random.integers(-1, 2, N)
    inside = [
        Fraction(a) + Fraction(b) + Fraction(c) * int(d) for a, b, c, d in zip(high, low, error, sides, strict=True)
    ]
    return high, low, error, [oracle.exact_arb(each) for each in inside]


def distances(name, x, y, low, high):
    """Return the distances of exact results to the middles of intervals, and the radii of the intervals, in order."""
    for x, y, a, b in zip(x, y, low, high, strict=True):  # noqa: B020
        middle = oracle.exact_arb((Fraction(a) + Fraction(b)) / 2)
        yield (
            float(abs(OPERATIONS[name](x, y) - middle).upper()),
            float(Fraction(b) - Fraction(a)) / 2,
            float(abs(middle)),
        )


@pytest.fixture
def bits():
    """Let FLINT compute with 600 bits."""
    before, flint.ctx.prec = flint.ctx.prec, 600
    yield
    flint.ctx.prec = before


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("name", OPERATIONS)
def test_balls_contain_the_exact_results_and_are_small(name):
    """Catches a bound that is 2^10 times too small or that ignores an operand's error, and one that is too large."""
    for radius in (0.0, 2.0**-90, 2.0**-70, 2.0**-3):
        *parts, inside = operands(radius)
        x = Ball(*parts)
        measured = measure(name, OPERATIONS[name](x, x[::-1]), inside, inside[::-1])
        assert all(distance <= allowed for distance, allowed, _ in measured)
        assert max(distance / allowed for distance, allowed, _ in measured) > 2.0**-9
        if not radius and name not in ("add", "subtract", "log"):  # they cancel
            assert all(allowed < 2.0**-80 * max(size, 2.0**-10) for _, allowed, size in measured)


def measure(name, found, x, y):
    """Return the `distances` of exact results to the balls that are found, for the finite ones."""
    known = np.flatnonzero(np.isfinite(found.error))
    assert len(known) > 20
    middles = [Fraction(found.high[i]) + Fraction(found.low[i]) for i in known]
    ends = ([m + sign * Fraction(found.error[i]) for m, i in zip(middles, known, strict=True)] for sign in (-1, 1))
    return list(distances(name, [x[i] for i in known], [y[i] for i in known], *ends))


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize(("name", "exponents"), [("multiply", (-520, -520)), ("divide", (-900, 200))])
def test_balls_contain_results_that_underflow(name, exponents):
    """Catches a bound that becomes 0 because it is below all float64 numbers."""
    x, y = (operands(0.0, each) for each in exponents)
    found = OPERATIONS[name](Ball(*x[:3]), Ball(*y[:3]))
    for *inside, high, low, error in zip(x[3], y[3], found.high, found.low, found.error, strict=True):
        middle = oracle.exact_arb(Fraction(high) + Fraction(low))
        assert abs(OPERATIONS[name](*inside) - middle) <= oracle.exact_arb(Fraction(error))


@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("name", OPERATIONS)
def test_intervals_contain_the_exact_results_and_are_small(name):
    """Catches an end that is rounded to the wrong side, and a product or a quotient of the wrong ends."""
    for radius in (0.0, 2.0**-90):
        number, parts = Decimals(40).number, operands(radius)
        middle, error = number(parts[0]) + number(parts[1]), number(parts[2])
        x = Interval((middle - error).lower, (middle + error).upper, middle.arithmetic)
        found = OPERATIONS[name](x, x[::-1])
        measured = list(distances(name, parts[3], parts[3][::-1], found.lower, found.upper))
        assert all(distance <= allowed * (1 + 1e-12) + 1e-300 for distance, allowed, _ in measured)
        if not radius and name not in ("add", "subtract"):
            assert all(allowed < 1e-36 * max(size, 1e-3) for _, allowed, size in measured)


def test_bounds_are_on_both_sides_of_the_ball():
    """Catches an end without the error, and a division by an interval with 0 that has an end."""
    tie = 1 + 2.0**-24
    for low, error, expected in (
        (2.0**-90, 2.0**-89, [1, 1 + 2.0**-23]),
        (-(2.0**-90), 2.0**-89, [1, 1 + 2.0**-23]),
        (2.0**-80, 2.0**-90, [1 + 2.0**-23] * 2),
        (-(2.0**-80), 2.0**-90, [1, 1]),
        (0.0, 0.0, [1, 1]),
    ):
        ends = Ball(*(np.asarray([x]) for x in (tie, low, error))).bounds()
        assert [float(rounding.nearest(end)[0]) for end in ends] == expected
    # The exact ends are 2^-113 beyond a tie that goes to the other side; low - error, rounded, is the tie.
    low, error = 2.0**-60 * (1 - 2.0**-53), 2.0**-52 + 2.0**-60
    for sign in (1, -1):
        ends = Ball(*(np.asarray([x]) for x in (sign * (1 + 3 * 2.0**-24 + 2.0**-52), sign * low, error))).bounds()
        assert len({float(rounding.nearest(end)[0]) for end in ends}) == 2
    one, number = Decimals(40).number([1.0]), Decimals(40).number
    around_0 = Interval(number([-1.0]).lower, one.upper, one.arithmetic)
    for divisor in (around_0, number([0.0]), Interval(number([0.0]).lower, one.upper, one.arithmetic)):
        assert [end[0] for end in (one / divisor).bounds()] == [-math.inf, math.inf]


@given(hnp.arrays(np.float64, (3, 7), elements=MODERATE), hnp.arrays(np.float64, (3, 7), elements=MODERATE))
def test_sums_contain_the_exact_sums(x, y):
    """Catches a wrong bound of a dot product or of a sum of balls, and terms that are left out."""
    x, y = x.astype(F), y.astype(F)
    expected = [
        sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(*rows, strict=True))
        for rows in zip(x, y, strict=True)
    ]
    assert [Fraction(each) for each in exact_dot(x, y)] == expected
    products = DoubleDouble().number(x.astype(float)) * DoubleDouble().number(y.astype(float))
    for found in (DoubleDouble().dot(x, y), products.sum()):
        for i, each in enumerate(expected):
            error = abs(Fraction(found.high[i]) + Fraction(found.low[i]) - each)
            assert error <= Fraction(found.error[i]) <= Fraction(2) ** -85 * 500


def test_the_ends_of_a_sum_of_intervals_are_rounded_outwards():
    """Catches an end of a sum that is rounded to the wrong side."""
    number = Decimals(40).number
    total = (number([1.0] * 7) / number([3.0] * 7)).sum()
    assert Fraction(total.lower.item()) < Fraction(7, 3) < Fraction(total.upper.item())


def test_long_sums_are_within_their_bounds():
    """Catches a bound of a sum that is 2^10 times too small, and errors of terms that are ignored."""
    random = np.random.default_rng(0)

    def worst(balls, terms):
        exact_sums = [sum(map(Fraction, row)) for row in terms]
        for middle, rest, error, each in zip(balls.high, balls.low, balls.error, exact_sums, strict=True):
            distance = abs(Fraction(middle) + Fraction(rest) - each)
            assert distance <= Fraction(error)
            yield float(distance / Fraction(error))

    ratios = {"sum": [], "terms": [], "dot": []}
    for rows, n in ((50, 2), (50, 3), (50, 5), (10, 256), (4, 600)):
        high = random.standard_normal((rows, n)) * 2.0 ** random.integers(-80, 1, (rows, n))
        low, zero = high * 2.0**-54 * random.uniform(-1, 1, (rows, n)), np.zeros((rows, n))
        ratios["sum"] += worst(Ball(high, low, zero).sum(), np.concatenate([high, low], axis=1))
        error = abs(high) * 2.0**-80
        ratios["terms"] += worst(Ball(high, low, error).sum(), np.concatenate([high, low, error], axis=1))
        x, w = high.astype(F), (low / high * 2.0**54).astype(F)
        ratios["dot"] += worst(DoubleDouble().dot(x, w), np.multiply(x, w, dtype=float))
    assert max(ratios["sum"]) > 2.0**-9
    assert max(ratios["terms"]) > 0.9  # the errors of the terms add up
    assert max(ratios["dot"]) > 2.0**-9


def test_exponentials_of_large_arguments():
    """Catches a result that is 0 exactly, or that is wrong without being known to be."""
    for x in (-1e300, -700.0, -600.5):
        found = DoubleDouble().number([x]).exp()
        assert 0 < found.high + found.error < 2.0**-800
        assert found.high + found.error > math.exp(x)
        assert 0 < Decimals(40).number([x]).exp().upper[0] < 2.0**-800
    for x in (601.0, 1e300, math.nan):
        found = DoubleDouble().number([x]).exp()
        assert not np.isfinite(found.high + found.error)


def test_functions_of_balls_about_which_nothing_is_known():
    """Catches bounds of series that are used outside of the range in which they hold."""
    for found in (
        Ball(*np.asarray([-700.0, 0, 500])).exp(),
        Ball(*np.asarray([1.0, 0, 0.99])).log(),
        Ball(*np.asarray([1.0, 0, 1])) / Ball(*np.asarray([1.0, 0, 1])),
    ):
        assert not found.error <= 1e300
    found = Ball(*np.asarray([1.0, 0, 0.4])).log()
    assert found.high - found.error < math.log(0.6)  # without the third power of 0.4, it would not be


@given(st.floats(allow_nan=False, allow_infinity=False) | ANY, st.sampled_from([-1.0, 0.0, 1.0]))
def test_rounding_of_float64_numbers(x, side):
    """Catches two roundings in the same direction, and wrong thresholds of overflow and of 0."""
    tiny = Fraction(5e-324) / 2
    expected = oracle.rounded(Fraction(x) + tiny * int(side))
    assert_equal(rounding.nearest(rounding.to_odd(np.asarray([x]), np.asarray([side]))), expected)


BITS = st.integers(-0x7F7FFFFF, 0x7F7FFFFF)


@given(BITS | st.sampled_from([0, 1, -1, 0x7F7FFFFF, -0x7F7FFFFF, 0x00800000, -0x00800000]))
def test_thresholds_are_between_adjacent_results(bits):
    """Catches a threshold at 0 or at infinity that is not where the results change."""
    a = F(math.copysign(float(np.int32(abs(bits)).view(F)), bits))
    a = F(0) if abs(a) < 2.0**-126 else a
    with np.errstate(over="ignore"):
        b = np.nextafter(a, F(math.inf)) if a else F(2.0**-126)
    b = F(0) if 0 < -b < 2.0**-126 else b
    assert rounding.adjacent(np.asarray([a]), np.asarray([b])).all()
    assert not rounding.adjacent(np.asarray([b]), np.asarray([a])).any()
    middle = np.float64(rounding.threshold(a, b))
    steps = np.asarray([np.nextafter(middle, -math.inf), np.nextafter(middle, math.inf)])
    assert rounding.nearest(steps).tolist() == [a, b]
