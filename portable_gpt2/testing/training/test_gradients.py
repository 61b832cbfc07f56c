"""Gradients: the hand-written ones on every backend, and the framework's own, against complex steps in float64.

A function that is analytic has, for a step h so small that its square vanishes, f(x + ih) = f(x) + ih f'(x): its
imaginary part is the derivative without a difference being taken, exact to rounding.

On a backend that compiles, the functions are compiled, as they are in training. Without that, each operation would be
compiled for itself, which takes several times as long.
"""

import functools
import inspect

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.params import flatten, nest
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.cases import UNIT, assert_agrees
from portable_gpt2.testing.plain_gpt2 import on_backend, plain_gpt2, random_weights

pytestmark = pytest.mark.every_device

STEP = 1e-30
CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=12, n_vocab=23, n_ctx=9, eos_token_id=None)
CONFIGS = {
    "as published": CONFIG,  # the embedding matrix has two gradients, which are added
    # Each option that changes the computation has another value than in the published models.
    "every option": pg.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=12,
        n_vocab=23,
        n_ctx=9,
        n_inner=7,
        layer_norm_epsilon=0.1,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        eos_token_id=None,
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 23, (3, 10)).astype(np.int32)
MASK = np.tril(np.ones((3, 4), np.bool_), 1)
BAND = np.triu(np.ones((3, 3), np.bool_), -1)  # each query sees the key before its own, but none before that


def on_device_of(x, a):
    """Return a NumPy array as an array of the backend of x, on the device of x."""
    backend = pg.backend_of(x)
    return backend.from_numpy(a, device=backend.placement(x))


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# The ops in plain NumPy, of complex numbers: nothing compares but by their real parts.


def plain_softmax(x, axis=-1):
    e = np.exp(x - x.real.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def plain_layer_norm(x, g, b, eps):
    z = x - x.mean(-1, keepdims=True)
    return g * z / np.sqrt((z * z).mean(-1, keepdims=True) + eps) + b


def plain_attention(q, k, v, mask, scale):
    scores = q @ np.swapaxes(k, -1, -2) * scale
    return plain_softmax(np.where(mask, scores, -1e30)) @ v


def plain_cross_entropy(logits, targets):
    p = plain_softmax(logits)
    return -np.log(np.take_along_axis(p, targets[..., None].astype(np.int64), -1)).mean()


IDS = np.asarray([[1, 5, 1], [0, 2, 5]], np.int32)
OPS = {  # the op in plain NumPy; its differentiable arrays; the op, and its gradients by argument
    "conv1d": (
        lambda x, w, b: x @ w + b,
        [normal(2, 3, 5), normal(5, 4), normal(4)],
        pg.conv1d,
        lambda x, w, b, dy: gradients.conv1d(x, w, b)[1](dy),
    ),
    "conv1d of width 1": (
        lambda x, w, b: x @ w[0] + b,
        [normal(2, 3, 5), normal(1, 5, 4), normal(4)],
        pg.conv1d,
        lambda x, w, b, dy: gradients.conv1d(x, w, b)[1](dy),
    ),
    "softmax": (plain_softmax, [normal(2, 3, 5)], pg.softmax, lambda x, dy: gradients.softmax(x)[1](dy)),
    "softmax over another axis": (
        lambda x: plain_softmax(x, 1),
        [normal(2, 3, 5)],
        lambda x: pg.softmax(x, axis=1),
        lambda x, dy: gradients.softmax(x, axis=1)[1](dy),
    ),
    "gelu": (
        lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        [2 * normal(3, 7)],
        pg.gelu,
        lambda x, dy: gradients.gelu(x)[1](dy),
    ),
    "layer_norm": (
        lambda x, g, b: plain_layer_norm(x, g, b, 0.1),
        [normal(2, 3, 5), normal(5), normal(5, seed=1)],
        lambda x, g, b: pg.layer_norm(x, g, b, eps=0.1),
        lambda x, g, b, dy: gradients.layer_norm(x, g, b, eps=0.1)[1](dy),
    ),
    "attention": (
        lambda q, k, v: plain_attention(q, k, v, np.True_, 5**-0.5),
        [normal(2, 3, 5), normal(2, 4, 5), normal(2, 4, 6)],
        pg.attention,
        lambda q, k, v, dy: gradients.attention(q, k, v)[1](dy),
    ),
    **{
        f"attention of {n} elements per head": (
            lambda q, k, v: plain_attention(q, k, v, np.True_, 1.0),
            [normal(2, 3, n), normal(2, 4, n), normal(2, 4, 6)],
            pg.attention,
            lambda q, k, v, dy: gradients.attention(q, k, v)[1](dy),
        )
        for n in (0, 1)
    },
    "attention with a mask and a scale": (
        lambda q, k, v: plain_attention(q, k, v, MASK, 0.7),
        [normal(2, 3, 5), normal(2, 4, 5), normal(2, 4, 6)],
        lambda q, k, v: pg.attention(q, k, v, on_device_of(q, MASK), scale=0.7),
        lambda q, k, v, dy: gradients.attention(q, k, v, on_device_of(q, MASK), scale=0.7)[1](dy),
    ),
    "causal attention with a mask": (
        lambda q, k, v: plain_attention(q, k, v, np.tri(3, dtype=np.bool_) & BAND, 0.7),
        [normal(2, 3, 5), normal(2, 3, 5, seed=1), normal(2, 3, 6)],
        lambda q, k, v: pg.attention(q, k, v, on_device_of(q, BAND), causal=True, scale=0.7),
        lambda q, k, v, dy: gradients.attention(q, k, v, on_device_of(q, BAND), causal=True, scale=0.7)[1](dy),
    ),
    **{
        # The rule for as many queries as keys must compare these two lengths: in each of the two cases in which they
        # differ, other lengths are equal.
        f"causal attention of {m} queries to {n} keys": (
            lambda q, k, v, m=m, n=n: plain_attention(q, k, v, np.tri(m, n, n - m, dtype=np.bool_), 0.7),
            [normal(batch, m, d), normal(batch, n, d, seed=1), normal(batch, n, 6)],
            lambda q, k, v: pg.attention(q, k, v, causal=True, scale=0.7),
            lambda q, k, v, dy: gradients.attention(q, k, v, causal=True, scale=0.7)[1](dy),
        )
        for batch, m, n, d in ((2, 1, 1, 5), (2, 2, 2, 5), (2, 7, 7, 5), (3, 3, 5, 3), (2, 1, 2, 5), (2, 1, 2, 2))
    },
    "embed": (
        lambda w: w[IDS],
        [normal(6, 5)],
        lambda w: pg.embed(on_device_of(w, IDS), w),
        lambda w, dy: gradients.embed(on_device_of(w, IDS), w)[1](dy),
    ),
    "unembed": (
        lambda x, w: x @ w.T,
        [normal(2, 3, 5), normal(6, 5)],
        pg.unembed,
        lambda x, w, dy: gradients.unembed(x, w)[1](dy),
    ),
    "cross_entropy": (
        lambda logits: plain_cross_entropy(logits, IDS),
        [3 * normal(2, 3, 6)],
        lambda logits: pg.cross_entropy(logits, on_device_of(logits, IDS)),
        lambda logits, dy: gradients.cross_entropy(logits, on_device_of(logits, IDS))[1](dy),
    ),
}


def complex_steps(f, arrays, cotangent):
    """Return the gradient of sum(cotangent * f) by each of some arrays, entry by entry."""
    found = []
    for n, a in enumerate(arrays):
        gradient = np.empty(a.shape)
        for i in np.ndindex(a.shape):
            moved = [x.astype(complex) for x in arrays]
            moved[n][i] += STEP * 1j
            gradient[i] = (cotangent * f(*moved)).sum().imag / STEP
        found.append(gradient)
    return found


def cotangent_of(f, arrays):
    return normal(*np.shape(f(*arrays)), seed=9)


def compiled(backend, function):
    """Return a function that is compiled if the backend compiles."""
    return backend.compile(function) if backend.compiles_per_shape else function


OPTIONS = {  # arrays and options of a rule; no option has its default
    "softmax": ([normal(2, 3, 5)], {"axis": 1}),
    "layer_norm": ([normal(2, 3, 5), normal(5), normal(5, seed=1)], {"eps": 0.5}),
    "attention": ([normal(2, 3, 5), normal(2, 4, 5), normal(2, 4, 6)], {"causal": True, "scale": 0.3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_rule_passes_its_options_to_the_op(backend, name):
    """Catches an option that only the gradient follows, or that neither follows."""
    arrays, options = OPTIONS[name]
    given = [backend.from_numpy(a, "float32") for a in arrays]
    found, _ = getattr(gradients, name)(*given, **options)
    expected = getattr(pg, name)(*given, **options)
    assert_agrees(backend.to_numpy(found), backend.to_numpy(expected), "float32")
    assert abs(backend.to_numpy(getattr(pg, name)(*given)) - backend.to_numpy(expected)).max() > 0.01


@strategies.wide_dtypes
@pytest.mark.parametrize("name", OPS)
def test_the_gradient_of_an_op_is_that_of_complex_steps(backend, dtype, name):
    """Catches a term that is dropped, a sum over the wrong axis, a scale or a maximum forgotten, in the hand-written
    gradients, and a kernel that the framework differentiates into something else.
    """
    plain, arrays, op, hand = OPS[name]
    cotangent = cotangent_of(plain, arrays)
    expected = complex_steps(plain, arrays, cotangent)
    given = [backend.from_numpy(a, dtype) for a in arrays]
    dy = backend.from_numpy(np.asarray(cotangent), dtype)
    by_name = compiled(backend, hand)(*given, dy)
    found = {"by hand": [by_name[name] for name in list(inspect.signature(hand).parameters)[: len(given)]]}

    def pulled(leaves, dy):
        return backend.xp.sum(op(*leaves) * dy)

    if (own := backend.value_and_grad(pulled)) is not NotImplemented:
        found["the framework's own"] = compiled(backend, lambda leaves, dy: own(leaves, dy))(given, dy)[1]
    for way, gradient in found.items():
        assert len(gradient) == len(arrays), way
        for got, truth in zip(gradient, expected, strict=True):
            assert_agrees(backend.to_numpy(got), truth, dtype)


# The whole model


def plain_loss(weights, config):
    return plain_cross_entropy(plain_gpt2(weights, TOKENS[:, :-1], config), TOKENS[:, 1:])


def slopes(weights, config, directions, dtype, step):
    """Return the derivatives of the loss along some directions, each in one parameter, by complex steps."""
    given = {path: a.astype(dtype) for path, a in weights.items()}
    moved = ({**given, path: (given[path] + 1j * step * a).astype(dtype)} for path, a in directions)
    return np.asarray([float(plain_loss(each, config).imag) / step for each in moved])


def by_hand(params, tokens, config):
    value, backward = gradients.loss(params, tokens, config)
    return value, backward()


def arrays_of(backend, tree):
    return {path: backend.to_numpy(x).astype(np.float64) for path, x in flatten(tree)}


@functools.cache
def truth_and_yardstick(case):
    """Return directions in each parameter, the slopes of the loss along them, and the largest error of plain float32.

    A direction is a random one, or a single entry.
    """
    random, config = np.random.default_rng(1), CONFIGS[case]
    weights, directions = random_weights(config), []
    for path, a in weights.items():
        for n in range(19):  # of fewer, the largest error of plain float32 is a matter of luck
            direction = np.zeros(a.shape)
            if n < 3:
                direction[tuple(int(random.integers(size)) for size in a.shape)] = 1
            else:
                direction = random.standard_normal(a.shape)
                direction /= np.linalg.norm(direction)
            directions.append((path, direction))
    truth = slopes(weights, config, directions, np.complex128, STEP)
    single = slopes(weights, config, directions, np.complex64, 2.0**-40)
    return directions, truth, abs(single - truth).max()


def assert_is_the_gradient(backend, found, case, way):
    """Assert that a loss and its gradient err at most four times as much as plain NumPy in float32."""
    directions, truth, error = truth_and_yardstick(case)
    value, tree = found
    got, weights = arrays_of(backend, tree), random_weights(CONFIGS[case])
    assert {path: a.shape for path, a in got.items()} == {path: a.shape for path, a in weights.items()}, way
    expected = plain_loss(weights, CONFIGS[case])
    assert float(backend.to_numpy(value)) == pytest.approx(expected, rel=64 * UNIT["float32"]), way
    errors = np.asarray([np.vdot(got[path], direction) for path, direction in directions]) - truth
    worst = int(np.argmax(abs(errors)))
    ratio = float(abs(errors[worst]) / (4 * error))
    claims.record("gradient", backend, "float32", ratio)
    assert ratio <= 1, f"{way}, {directions[worst][0]}: the error is {ratio:.3g} times what is allowed"


@pytest.mark.parametrize("case", CONFIGS)
def test_gradients_of_the_loss_agree_on_every_backend(backend, case):
    """Catches a gradient that skips a layer, or passes one twice; a framework that differentiates a kernel, a mask or
    the tied embedding otherwise; and rows of the embedding's gradient that are overwritten where they should be added.
    """
    config = CONFIGS[case]
    given = on_backend(backend, random_weights(config)), backend.from_numpy(TOKENS)
    by_hand_of = backend.compile(lambda params, tokens: by_hand(params, tokens, config))
    assert_is_the_gradient(backend, by_hand_of(*given), case, "by hand, compiled")
    own = backend.value_and_grad(lambda params, tokens: pg.loss(params, tokens, config))
    if own is not NotImplemented:
        own_of = backend.compile(lambda params, tokens: own(params, tokens))
        assert_is_the_gradient(backend, own_of(*given), case, "the framework's own, compiled")


def test_gradients_need_not_be_compiled(backend):
    """Catches a rule or a kernel whose gradient is another one outside of a compiled function."""
    given = on_backend(backend, random_weights(CONFIG)), backend.from_numpy(TOKENS)
    assert_is_the_gradient(backend, by_hand(*given, CONFIG), "as published", "by hand")
    own = backend.value_and_grad(lambda params, tokens: pg.loss(params, tokens, CONFIG))
    if own is not NotImplemented:
        assert_is_the_gradient(backend, own(*given), "as published", "the framework's own")


def test_the_rules_take_ids_of_any_integer_dtype(backend):
    """Catches ids that are compared, or added up by, in a dtype that the framework lacks."""
    logits, w = (backend.from_numpy(a, "float32") for a in (normal(2, 3, 6), normal(6, 5)))

    def both(ids):
        values, rows = gradients.cross_entropy(logits, ids), gradients.embed(ids, w)
        return values[0], values[1](), rows[0], rows[1](rows[0])

    def found(dtype):
        loss, dlogits, rows, dw = compiled(backend, both)(backend.from_numpy(IDS.astype(dtype)))
        return [backend.to_numpy(x) for x in (loss, dlogits["logits"], rows, dw["w"])]

    expected = found("int32")
    for dtype in strategies.integer_dtypes(backend):
        for x, y in zip(found(dtype), expected, strict=True):
            # A kernel may not take a dtype, and the definition then gives other last bits.
            assert_agrees(x, y.astype(np.float64), "float32")


@pytest.mark.about("index_add")
def test_a_row_that_is_read_twice_gets_both_gradients(backend):
    """Catches an assignment instead of a sum; the other rows stay unchanged."""
    x, rows = normal(5, 3), normal(4, 3)
    indices = np.asarray([1, 4, 1, 1], np.int32)
    expected = x.copy()
    np.add.at(expected, indices, rows)
    added = backend.index_add(
        backend.from_numpy(x.copy(), "float32"), backend.from_numpy(indices), backend.from_numpy(rows, "float32")
    )
    assert_agrees(backend.to_numpy(added), expected, "float32")


# The loss


def test_the_loss_is_computed_in_float32_at_least(backend, dtype):
    """Catches a loss that is rounded to eight bits: it would not move for hundreds of steps."""
    params, tokens = on_backend(backend, random_weights(CONFIG), dtype), backend.from_numpy(TOKENS)

    def both(params, tokens):
        return pg.loss(params, tokens, CONFIG), pg.gpt2(params, tokens[:, :-1], CONFIG)[0]

    value, logits = compiled(backend, both)(params, tokens)
    value = backend.to_numpy(value)
    expected = plain_cross_entropy(backend.to_numpy(logits).astype(np.float64), TOKENS[:, 1:])
    wide = "float64" if dtype == "float64" else "float32"
    assert value.dtype == wide
    assert float(value) == pytest.approx(expected, rel=64 * UNIT[wide])


def test_the_loss_predicts_each_token_from_those_before_it(backend):
    """Catches targets that are off by one: a model that knows what comes next has no loss."""
    n = 7
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=2 * n, n_vocab=n, n_ctx=6, eos_token_id=None)
    zero = {path: np.zeros(shape) for path, shape in pg.params.shapes(config).items()}
    eye = np.eye(n)
    untied = pg.GPT2Config(**{**vars(config), "tie_word_embeddings": False})
    zero |= {"wte": np.hstack([eye, -eye]), "ln_f/g": np.full(2 * n, 50.0)}
    zero["lm_head"] = np.hstack([np.roll(eye, 1, axis=0), -np.roll(eye, 1, axis=0)])  # after i comes i + 1
    params = nest({path: backend.from_numpy(a, "float32") for path, a in zero.items()})
    cycle = np.asarray([[0, 1, 2, 3, 4, 5, 6], [5, 6, 0, 1, 2, 3, 4]], np.int32)
    loss = compiled(backend, lambda params, tokens: pg.loss(params, tokens, untied))
    assert float(backend.to_numpy(loss(params, backend.from_numpy(cycle)))) < 1e-6
    assert float(backend.to_numpy(loss(params, backend.from_numpy(cycle[:, ::-1].copy())))) > 10
