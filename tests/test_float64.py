"""The ops in float64: their errors never exceed their bounds, the bounds are attained, and special values are exact."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import rough
from hypothesis import given

from portable_gpt2.correct_rounding import float64
from portable_gpt2.numerics import Numerics, stated
from portable_gpt2.registry import get_backend, known_backends, registered

pytest.importorskip("flint", reason="the exact results are computed with python-flint")

import balls_of_ops as exact

NAMES = (
    "conv1d",
    "unembed",
    "softmax",
    "gelu",
    "layer_norm",
    "attention_scores",
    "attention_weights",
    "attention",
    "cross_entropy",
)
each_op = pytest.mark.parametrize("name", NAMES)


# Arguments


def representable(a):
    """Return float32 numbers in float64, with 0 instead of subnormal numbers."""
    a = np.clip(a, -3.4e38, 3.4e38).astype(np.float32)
    return np.where(abs(a) < 2.0**-126, 0, a).astype(np.float64)


def _powers(random, shape):
    return random.choice([-1, 1], shape) * 10 ** random.uniform(-38, 38, shape)


def _cancelling(random, shape):
    x = random.normal(0, 10 ** random.uniform(-10, 10), shape)
    half = shape[-1] // 2
    x[..., half : 2 * half] = -x[..., :half]
    return x + random.normal(0, 1e-9, shape)


def _first(random, shape):
    x = random.uniform(0, 1e-6, shape)
    x[..., 0] = random.uniform(1, 1e5)
    return x


REGIMES = {
    "ordinary": lambda random, shape: random.normal(0, 1, shape),
    "scaled": lambda random, shape: random.normal(0, 10 ** random.uniform(-3, 3), shape),
    "shifted": lambda random, shape: random.normal(10 ** random.uniform(-3, 3), 1, shape),
    "all magnitudes": _powers,
    "cancelling": _cancelling,
    "constant": lambda random, shape: np.full(shape, random.normal()),
    "nearly constant": lambda random, shape: 0.1 + random.integers(-3, 4, shape) * 2.0**-26,
    "few values": lambda random, shape: random.integers(-2, 3, shape),
    "zeros": lambda random, shape: np.zeros(shape),
    "the first is the largest": _first,
    "the largest": lambda random, shape: random.choice([-1, 1], shape) * 3.4e38,
    "the smallest": lambda random, shape: random.choice([-1, 1], shape) * 1.18e-38,
}


def of_regimes(random, regimes):
    """Return a function of a shape, which returns an array of one of the regimes."""
    return lambda *shape: representable(REGIMES[random.choice(regimes)](random, shape))


def arguments(name, random, array, n):
    """Return the arguments of an op, with sums of n terms, and its options."""
    if name == "conv1d":
        return (array(2, n), array(n, 3), array(3)), {}
    if name == "unembed":
        return (array(2, n), array(3, n)), {}
    if name == "softmax":
        axis = int(random.choice([0, 1, -1]))
        return (np.moveaxis(array(3, n), 1, axis),), {"axis": axis}
    if name == "gelu":
        return (array(3, n),), {}
    if name == "layer_norm":
        return (array(3, n), array(n), array(n)), {"eps": float(random.choice([1e-5, 1e-12, 0.0, 1.0]))}
    if name == "cross_entropy":
        return (array(3, n), random.integers(0, n, 3)), {}
    q, k, v = array(2, 3, 5), array(2, n, 5), array(2, n, 2)
    mask = random.random((random.integers(1, 3), 3, n)) < 0.7
    mask[..., 0] = True
    options = {"scale": random.choice([None, 0.1, -3.0, 0.0, 1e-300])}
    if n >= 3 and random.random() < 0.5:
        options["causal"] = True
    given = (q, k, v) if name == "attention" else (q, k)
    return (*given, mask) if random.random() < 0.5 else given, options


# Claims


def evaluate(name, args, options, numerics):
    return tuple(getattr(float64, name)(*args, **options, numerics=numerics))


def compiled(backend, calls):
    """Compile several evaluations, pairs of a name and options, as one function of a list of their arguments."""
    numerics = stated(backend, "float64")

    def fn(given):
        return [evaluate(name, args, options, numerics) for (name, options), args in zip(calls, given, strict=True)]

    return backend.compile(fn)


def put(backend, args):
    return [backend.from_numpy(np.asarray(x)) for x in args]


def on_host(backend, value, error):
    """Return the value and the error on the host, after checks of what every evaluation promises."""
    value, error = backend.to_numpy(value), backend.to_numpy(error)
    assert value.dtype == error.dtype == np.float64
    assert value.shape == np.broadcast_shapes(value.shape, error.shape)
    assert not np.isnan(error).any(), "an error is NaN"
    assert (error >= 0).all(), "an error is negative"
    return value, np.broadcast_to(error, value.shape)


def compute(backend, name, args, options, numerics):
    with np.errstate(all="ignore"):
        return on_host(backend, *evaluate(name, put(backend, args), options, numerics))


def balls(name, args, options):
    """Return the exact results as balls."""
    with exact.precise():
        return np.asarray(getattr(exact, name)(*args, **options), object)


def ratios(value, error, results):
    """Return |value - exact result| / error for the elements whose error is finite and not 0; check the others."""
    found = []
    with exact.precise():
        for v, e, y in zip(value.ravel().tolist(), error.ravel().tolist(), results.ravel(), strict=True):
            if e == 0:
                assert y == v, f"the error is 0, but {v} is not the exact result {y}"
            elif e < math.inf:
                found.append(float((abs(y - exact.arb(v)) / exact.arb(e)).upper()))
                assert found[-1] <= 1, f"{v} differs from {y} by more than {e}"
    return found


SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False) | st.floats(-8, 8, width=32)


@each_op
@pytest.mark.parametrize("backend", ["numpy"], indirect=True, scope="module")
@given(data=st.data())
def test_no_error_exceeds_its_bound(name, backend, data):
    """Catches a rounding that a bound does not count, a constant that is too small, and an overflow."""
    random = np.random.default_rng(data.draw(SEEDS))
    regimes = data.draw(st.lists(st.sampled_from(sorted(REGIMES)), min_size=1, max_size=3))
    array = of_regimes(random, regimes)
    if data.draw(st.integers(0, 3)) == 0:
        array = lambda *shape: representable(data.draw(hnp.arrays(np.float32, shape, elements=NUMBERS)))  # noqa: E731
    args, options = arguments(name, random, array, data.draw(st.integers(1, 50)))
    value, error = compute(backend, name, args, options, stated(backend, "float64"))
    found = ratios(value, error, balls(name, args, options))
    largest = max(found, default=0.0)
    hypothesis.target(largest, label=name)
    assert largest <= 1


@functools.cache
def zoo():
    """Return calls of every op with arguments from every regime, and their exact results."""
    found = []
    for i, regime in enumerate(sorted(REGIMES)):
        array = of_regimes(np.random.default_rng(i), [regime])
        # The seed of the options is one with which attention is causal and has a mask.
        calls = [(name, *arguments(name, np.random.default_rng(3), array, 17)) for name in NAMES]
        found.append([(*call, balls(*call)) for call in calls])
    return found


in_float64 = pytest.mark.parametrize("dtype", ["float64"])  # tests of JAX in float64 need a process of their own
on_every_backend = pytest.mark.parametrize(
    "backend", [name for name in known_backends() if name != "flint"], indirect=True, scope="module"
)  # balls need no bounds


@pytest.fixture(scope="module")
def fn(backend):
    """The evaluations of all ops as one compiled function of a list of the arguments of each op."""
    return compiled(backend, [(name, options) for name, _, options, _ in zoo()[0]])


@in_float64
@on_every_backend
def test_every_backend_keeps_the_bounds(backend, dtype, fn):
    """Catches a function that a framework computes differently, and an operation that a compiler reorders."""
    found = {name: [] for name in NAMES}
    with backend.permit_64_bits(), np.errstate(all="ignore"):
        for calls in zoo():
            evaluations = fn([put(backend, args) for _, args, _, _ in calls])
            for (name, _, _, results), evaluation in zip(calls, evaluations, strict=True):
                found[name] += ratios(*on_host(backend, *evaluation), results)
    assert min(map(max, found.values())) > 1e-3, "no error of an op is above a thousandth of its bound"


def poisoned(args, bad, which):
    """Return arguments of which one array has a NaN or an infinity at a random place."""
    args = [x.copy() for x in args]
    floats = [x for x in args if x.dtype == np.float64]
    x = floats[which % len(floats)]
    x[tuple(np.random.default_rng(which).integers(0, n) for n in x.shape)] = bad
    return args


@in_float64
@on_every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_every_backend_decides_the_same_special_values(bad, backend, dtype, fn):
    """Catches a NaN or an infinity that is lost: a framework may leave a result undecided, but not decide otherwise."""
    numpy = get_backend("numpy")
    calls = zoo()[sorted(REGIMES).index("ordinary")]
    with backend.permit_64_bits(), np.errstate(all="ignore"):
        for which in range(3):
            given = [poisoned(args, bad, which) for _, args, _, _ in calls]
            for (name, _, options, _), args, evaluation in zip(
                calls, given, fn([put(backend, args) for args in given]), strict=True
            ):
                value, error = on_host(backend, *evaluation)
                expected, error_of_numpy = compute(numpy, name, args, options, stated(numpy, dtype))
                decided = np.isfinite(error + error_of_numpy)
                if name in ("conv1d", "unembed"):
                    decided |= ~np.isfinite(expected)
                np.testing.assert_allclose(value[decided], expected[decided], rtol=1e-8, err_msg=name)


# Special values: expected results, where undecided results are marked

INF, NAN = math.inf, math.nan
UNDECIDED = 7.0  # no expected result has this value
W = np.asarray([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]])
SPECIAL = {
    "NaN in x": ("conv1d", ([[NAN, 0], [1, 0]], W, np.zeros(3)), {}, [[NAN] * 3, [1, 0, 2]]),
    "NaN in w": ("conv1d", ([[0.0, 0], [1, 0]], W * [1, 1, NAN], np.zeros(3)), {}, [[0, 0, NAN], [1, 0, NAN]]),
    "NaN in b": ("conv1d", ([[0.0, 0], [1, 0]], W, np.asarray([0, NAN, 0])), {}, [[0, NAN, 0], [1, NAN, 2]]),
    "inf in x": ("conv1d", ([[INF, 0.0]], W, np.zeros(3)), {}, [[INF, NAN, INF]]),
    "inf in w": ("unembed", ([[0.0, 0.0], [1.0, 1.0]], [[INF, 1.0], [INF, -INF]]), {}, [[NAN, NAN], [INF, NAN]]),
    "inf in b": ("conv1d", ([[1.0, 1.0]], W, np.asarray([INF, 0, -INF])), {}, [[INF, 0, -INF]]),
    "softmax": (
        "softmax",
        ([[0.0, NAN, 1], [0, INF, 1], [-INF] * 3, [3, -INF, 3], [NAN, -INF, INF], [-1e38, 3e38, -INF]],),
        {},
        [[NAN] * 3, [NAN] * 3, [NAN] * 3, [0.5, 0, 0.5], [NAN] * 3, [0, 1, 0]],
    ),
    "gelu": ("gelu", ([INF, -INF, NAN, -1e30, 3e38, 0.0, -300.0],), {}, [INF, NAN, NAN, 0, 3e38, 0, 0]),
    "layer_norm": (
        "layer_norm",
        ([[0, NAN, 1], [0, INF, 1], [1, -INF, 0], [0, 0, 0], [1e30] * 3, [INF, -INF, 1]], np.ones(3), [0.0, 2.0, 3.0]),
        {},
        [[NAN] * 3, [NAN] * 3, [NAN] * 3, [0, 2, 3], [UNDECIDED] * 3, [NAN] * 3],
    ),
    "gain": (
        "layer_norm",
        ([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [NAN, INF, 1.0], [0.0, 0.0, INF]),
        {},
        [[UNDECIDED] * 3, [UNDECIDED] * 3],
    ),
    "eps is 0": ("layer_norm", (np.zeros((1, 2)), np.ones(2), np.ones(2)), {"eps": 0.0}, [[UNDECIDED] * 2]),
    "scores": (
        "attention_scores",
        ([[1.0, 1], [NAN, 0]], [[1.0, 2], [NAN, 1], [INF, 1]], [[True, True, True], [False, True, True]]),
        {"scale": 1.0},
        [[3, NAN, UNDECIDED], [-INF, NAN, NAN]],
    ),
    "a scale of 0": ("attention_scores", ([[1.0, INF]], [[1.0, 2]]), {"scale": 0.0}, [[NAN]]),
    "a hidden key": (
        "attention_weights",
        ([[1.0, 1], [NAN, 0]], [[1.0, 2], [1.0, 2], [0.0, 0.0]], [[True, True, False], [True, False, True]]),
        {"scale": 1.0},
        [[0.5, 0.5, 0], [NAN] * 3],
    ),
    "no visible key": ("attention_weights", ([[1.0]], [[1.0]], np.asarray([[False]])), {}, [[UNDECIDED]]),
    "NaN in a query": ("attention", ([[1.0], [NAN]], [[1.0], [1.0]], [[1.0, 2], [3, 4]]), {}, [[2, 3], [NAN, NAN]]),
    "NaN in a value": ("attention", ([[1.0]], [[1.0], [1.0]], [[1.0, NAN], [1.0, 1]]), {}, [[1, UNDECIDED]]),
    "inf in a value": ("attention", ([[1.0]], [[1.0], [1.0]], [[1.0], [INF]]), {}, [[UNDECIDED]]),
    "uncertain weights": ("attention_weights", ([[1e10]], [[1e10], [1e10]]), {}, [[UNDECIDED] * 2]),
    "uncertain scores": ("attention", ([[1e10]], [[1e10], [1e10]], [[1.0], [1.0]]), {}, [[UNDECIDED]]),
    "scores that overflow": ("attention", ([[1e38]], [[1e38], [1.0]], [[1.0], [1.0]]), {"scale": 1e300}, [[UNDECIDED]]),
    "a large scale and q = 0": ("attention_scores", ([[0.0]], [[1.0]]), {"scale": 1e308}, [[0]]),
    "NaN in logits": ("cross_entropy", ([[0, NAN], [0, 0]], np.asarray([0, 0])), {}, NAN),
    "inf in logits": ("cross_entropy", ([[0, INF], [0, 0]], np.asarray([0, 0])), {}, NAN),
    "-inf at the target": ("cross_entropy", ([[0, -INF]], np.asarray([1])), {}, UNDECIDED),
    "-inf elsewhere": ("cross_entropy", ([[3, -INF, 3]], np.asarray([0])), {}, math.log(2)),
}


on_the_host = pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True, scope="module")


@on_the_host
def test_special_values(backend):
    """Catches a NaN or an infinity that is lost or spreads, and an element that is decided although it is not known."""
    with backend.permit_64_bits(), np.errstate(all="ignore"):
        fn = compiled(backend, [(name, options) for name, _, options, _ in SPECIAL.values()])
        evaluations = fn([put(backend, map(of_special, args)) for _, args, _, _ in SPECIAL.values()])
        for (case, (name, _, _, expected)), evaluation in zip(SPECIAL.items(), evaluations, strict=True):
            value, error = on_host(backend, *evaluation)
            expected = np.broadcast_to(expected, value.shape)
            if name in ("conv1d", "unembed"):  # a value that is not finite is exact, although the error is infinite
                error = np.where(np.isinf(error) & ~np.isfinite(value), 0, error)
            np.testing.assert_array_equal(np.isinf(error), expected == UNDECIDED, case)
            is_exact, is_near = error == 0, (error > 0) & (error < INF)
            np.testing.assert_array_equal(is_exact[np.isnan(expected)], True, case)
            np.testing.assert_array_equal(value[is_exact], expected[is_exact], case)
            np.testing.assert_allclose(value[is_near], expected[is_near], rtol=1e-14, atol=1e-50, err_msg=case)
            assert (error[is_near] <= 1e-12 * abs(value[is_near]) + 1e-50).all(), case


@in_float64
@on_every_backend
def test_a_target_out_of_range_makes_the_mean_nan_or_is_refused(backend, dtype):
    """Catches a target that counts as another one if a compiled function cannot refuse it."""
    with backend.permit_64_bits(), np.errstate(all="ignore"):
        logits, targets = put(backend, [np.zeros((2, 3)), np.asarray([0, 3])])
        fn = compiled(backend, [("cross_entropy", {})])
        try:
            ((value, error),) = fn([[logits, targets]])
        except ValueError:
            assert backend.peek(targets) is not None
        else:
            value, error = on_host(backend, value, error)
            assert np.isnan(value)
            assert error == 0


def of_special(x):
    """Return floats as float64, and leave masks and targets as they are."""
    x = np.asarray(x)
    return x if x.dtype.kind in "bi" else x.astype(np.float64)


@on_the_host
@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 3e38])
def test_a_hidden_key_or_value_changes_no_decided_result(hidden, backend):
    """Catches a hidden NaN that makes a result NaN with the error 0, or a hidden infinity that makes a weight 0."""
    q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = np.asarray([[True, True, False]] * 2)
    with backend.permit_64_bits(), np.errstate(all="ignore"):
        fn = compiled(backend, [("attention", {}), ("attention_weights", {})])
        for in_k, in_v in ((1.0, hidden), (hidden, 1.0)):
            args = put(backend, [q, np.vstack([k[:2], [[in_k]]]), np.vstack([v[:2], [[in_v, in_v]]]), mask])
            for evaluation, expected in zip(
                fn([args, [*args[:2], args[3]]]), ([[2, 3]] * 2, [[0.5, 0.5, 0]] * 2), strict=True
            ):
                value, error = on_host(backend, *evaluation)
                known = error < INF
                np.testing.assert_allclose(value[known], np.asarray(expected)[known], rtol=1e-14)


# The bounds are attained in an arithmetic that errs as much as it may, in the worst directions


def largest_ratio(monkeypatch, name, args, options, numerics, **directions):
    """Return the largest ratio of an error to its bound in `rough` arithmetic."""
    monkeypatch.setattr(float64, "_UNIT", rough.UNIT * (1 + 2.0**-17))
    results, found = balls(name, args, options), []
    with registered(rough.RoughBackend()) as backend:
        for turn in (1, -1):
            turned = {kind: turn * way if isinstance(way, int) else way for kind, way in directions.items()}
            for seed in range(2):
                monkeypatch.setattr(rough, "SIGNS", [rough.Signs(numerics, seed, **turned)])
                value, error = compute(backend, name, args, options, numerics)
                found += ratios(value, error, results)
    return max(found)


def first(n, *, then):
    """Return a row whose first element is 1, and whose others are so small that each sum is rounded to about 1."""
    return np.asarray([[1.0, *[then] * (n - 1)]])


PRECISE = Numerics(exp=(0.0, 0.0), log=0.0)
N = 120
FEW = first(N, then=2.0**-24)
MANY = first(9000, then=2.0**-24)
ALONE = np.ones((1, 1))
TAIL = np.asarray([[0.0, *[-24.0] * (N - 1)]])
NEAR = np.asarray([[0.001], *[[0.0]] * (N - 1)])
ATTAINED = {
    # name: (op, arguments, options, numerics, directions of the errors, least ratio)
    "additions in conv1d": ("conv1d", (FEW, FEW.T, np.zeros(1)), {}, PRECISE, {"matmul": 1}, 0.9),
    "additions of products in conv1d": ("conv1d", (MANY, MANY.T, np.zeros(1)), {}, PRECISE, {"matmul": 1, "+": 1}, 0.9),
    "the bias": ("conv1d", (2.0**-20 * ALONE, 2.0**-20 * ALONE, np.ones(1)), {}, PRECISE, {"+": 1}, 0.3),
    "additions in unembed": ("unembed", (FEW, FEW), {}, PRECISE, {"matmul": 1}, 0.9),
    "additions in softmax": ("softmax", (TAIL,), {}, PRECISE, {"sum": 1, "/": -1}, 0.5),
    "exp in softmax": ("softmax", (np.asarray([[0.0, -5.0]]),), {}, Numerics(exp=(1e3, 0.0)), {"exp": ("at", 1)}, 0.9),
    "the slope in softmax": (
        "softmax",
        (np.asarray([[0.0, -80.0]]),),
        {},
        Numerics(exp=(0.0, 50.0)),
        {"exp": ("at", 1)},
        0.6,
    ),
    "the difference in softmax": ("softmax", (np.asarray([[1e-6, -80.0]]),), {}, PRECISE, {"-": 1, "exp": 1}, 0.5),
    "the argument in gelu": ("gelu", (np.asarray([-9.0, -9.3]),), {}, PRECISE, {"*": 1, "+": 1}, 0.5),
    "exp in gelu": ("gelu", (np.asarray([-9.0, -2.0]),), {}, Numerics(exp=(1e4, 0.0)), {"exp": 1}, 0.9),
    "the slope in gelu": ("gelu", (np.asarray([-9.3]),), {}, Numerics(exp=(0.0, 50.0)), {"exp": 1}, 0.7),
    "the mean": (
        "layer_norm",
        (np.where(np.arange(N)[None] % 10, 1.0, 0.001), np.ones(N), np.zeros(N)),
        {"eps": 0.0},
        PRECISE,
        {"sum": 1},
        0.25,
    ),
    "the mean of elements that cancel": (
        "layer_norm",
        (np.asarray([[0.001, *[1.1] * (N // 2), *[-1.1] * (N // 2)]]), np.ones(N + 1), np.zeros(N + 1)),
        {"eps": 0.0},
        PRECISE,
        {"sum": 1},
        0.2,
    ),
    "the variance": (
        "layer_norm",
        (np.asarray([[1.0, -1.0, *[2.0**-20, -(2.0**-20)] * (N // 2)]]), np.ones(N + 2), np.zeros(N + 2)),
        {"eps": 0.0},
        PRECISE,
        {"sum": 1},
        0.4,
    ),
    "the last sum of layer_norm": (
        "layer_norm",
        (np.asarray([[1.0, 2.0]]), np.full(2, 1e-4), np.ones(2)),
        {},
        PRECISE,
        {"+": 1},
        0.3,
    ),
    "scores": ("attention_scores", (FEW, FEW), {"scale": 0.3}, PRECISE, {"*": 1, "matmul": 1}, 0.9),
    "scores in the weights": (
        "attention_weights",
        (8 * FEW, np.concatenate([FEW * 0.1, FEW])),
        {"scale": 0.9},
        PRECISE,
        {"matmul": ("at", 0), "*": 1},
        0.4,
    ),
    "additions in the weights": (
        "attention_weights",
        (ALONE, np.eye(600, 1) / 8),
        {},
        PRECISE,
        {"sum": 1, "/": -1},
        0.3,
    ),
    "exp in the weights": (
        "attention_weights",
        (ALONE, np.asarray([[0.0], [-5.0]])),
        {},
        Numerics(exp=(1e3, 0.0)),
        {"exp": ("at", 1)},
        0.9,
    ),
    "the slope in the weights": (
        "attention_weights",
        (ALONE, np.asarray([[0.0], [-80.0]])),
        {},
        Numerics(exp=(0.0, 50.0)),
        {"exp": ("at", 1)},
        0.6,
    ),
    "scores in attention": (
        "attention",
        (8 * FEW, np.concatenate([FEW, FEW]), np.asarray([[1.0], [-1.0]])),
        {"scale": 0.9},
        PRECISE,
        {"matmul": ("at", 0), "*": 1},
        0.4,
    ),
    "additions in attention": (
        "attention",
        (ALONE, NEAR, np.ones((N, 1))),
        {},
        PRECISE,
        {"sum": -1, "matmul": 1, "/": 1},
        0.3,
    ),
    "exp in attention": (
        "attention",
        (ALONE, np.zeros((2, 1)), np.asarray([[-1.0], [1.0]])),
        {},
        Numerics(exp=(1e4, 0.0)),
        {"exp": ("at", 1)},
        0.4,
    ),
    "the slope in attention": (
        "attention",
        (ALONE, np.asarray([[0.0], *[[-math.log(N)]] * N]), np.asarray([[0.0], *[[1.0]] * N])),
        {},
        Numerics(exp=(0.0, 100.0)),
        {"exp": 1},
        0.03,
    ),
    "additions in cross_entropy": ("cross_entropy", (TAIL, np.zeros(1, int)), {}, PRECISE, {"sum": 1}, 0.8),
    "exp in cross_entropy": (
        "cross_entropy",
        (np.zeros((1, 2)), np.zeros(1, int)),
        {},
        Numerics(exp=(1e4, 0.0), log=0.0),
        {"exp": 1},
        0.9,
    ),
    "log": (
        "cross_entropy",
        (np.zeros((1, 50)), np.zeros(1, int)),
        {},
        Numerics(exp=(0.0, 0.0), log=1e3),
        {"log": 1},
        0.8,
    ),
    "the mean of the losses": (
        "cross_entropy",
        (np.asarray([[0.0, -1e5], *[[0.0, -1.0]] * N]), np.ones(N + 1, int)),
        {},
        PRECISE,
        {"sum": 1, "-": 1, "+": 1},
        0.9,
    ),
}


@pytest.mark.parametrize("case", ATTAINED)
def test_a_bound_is_attained(monkeypatch, case):
    """Catches a bound that is too small, or larger than the errors that may occur: each term of a bound has a case."""
    name, args, options, numerics, directions, least = ATTAINED[case]
    args = [x if x.dtype == int and name == "cross_entropy" else representable(x) for x in args]
    assert largest_ratio(monkeypatch, name, args, options, numerics, **directions) >= least
