"""The reproducible mode: every backend computes the same bits, whatever the batch, the cache and the padding.

tests/test_exact.py compares the elements that the host computes with exact arithmetic, and tests/test_float64.py the
bounds. Here, every element that the mode computes on a backend is compared with the one that the host computes.
"""

import contextlib
import functools
import inspect
import math
import typing
from fractions import Fraction
from pathlib import Path

import midpoints
import numpy as np
import pytest
from processes import run

import portable_gpt2 as pg
from portable_gpt2.checkpoint import SHIPPED
from portable_gpt2.cli import main
from portable_gpt2.correct_rounding import exact, mode
from portable_gpt2.fingerprint import hash_of_logits
from portable_gpt2.registry import registered
from portable_gpt2.testing.plain_gpt2 import CONFIGS, PASSAGE, on_backend, random_weights, some_tokens

NOT_FOR = ("flint",)  # the mode refuses a backend whose arrays enclose exact results
pytestmark = pytest.mark.every_device

TINY = 2.0**-126
SPECIAL = np.asarray([0, -0.0, 2.0**-149, -(2.0**-130), TINY, -TINY, 3e38, np.inf, -np.inf, np.nan], np.float32)


def f32(*shape, seed=0, spread=1.0):
    return np.asarray(spread * np.random.default_rng(seed).standard_normal(shape), np.float32)


def masked(*shape):
    mask = np.random.default_rng(5).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def large_and_small(*shape):
    """Return numbers of many magnitudes, whose sums cancel."""
    random = np.random.default_rng(3)
    return np.asarray(random.standard_normal(shape) * 2.0 ** random.integers(-60, 60, shape), np.float32)


def with_special(x):
    """Return a copy in which some elements are special numbers."""
    x = x.copy()
    x.reshape(-1)[:: max(1, x.size // 10)][: len(SPECIAL)] = SPECIAL[: len(x.reshape(-1)[:: max(1, x.size // 10)])]
    return x


Q, K, V = f32(2, 3, 4, 8, seed=1), f32(2, 3, 6, 8, seed=2, spread=3), f32(2, 3, 6, 8, seed=3)
CASES = {
    "conv1d": ("conv1d", (f32(3, 5, 64), f32(64, 48, seed=1), f32(48, seed=2)), {}),
    "conv1d that cancels": ("conv1d", (large_and_small(6, 40), large_and_small(40, 5), f32(5)), {}),
    "conv1d of special numbers": ("conv1d", (with_special(f32(6, 40)), f32(40, 5), with_special(f32(5))), {}),
    "conv1d of OpenAI's shape": ("conv1d", (f32(3, 7), f32(1, 7, 5), f32(5)), {}),
    "unembed": ("unembed", (f32(4, 32), f32(100, 32, seed=1)), {}),
    "unembed of special numbers": ("unembed", (f32(4, 32), with_special(f32(30, 32, seed=1))), {}),
    "softmax": ("softmax", (f32(7, 50, spread=9),), {}),
    "softmax of another axis": ("softmax", (f32(7, 5, 3),), {"axis": 0}),
    "softmax of special numbers": ("softmax", (with_special(f32(20, 4)),), {}),
    "softmax with results near 2**-126": (
        "softmax",
        (np.linspace(-90, 0, 400, dtype=np.float32)[:, None] * [1, 0],),
        {},
    ),
    "gelu": ("gelu", (np.linspace(-15, 15, 997, dtype=np.float32),), {}),
    "gelu of special numbers": ("gelu", (np.concatenate([SPECIAL, large_and_small(50)]),), {}),
    "layer_norm": ("layer_norm", (f32(9, 32) + 100, f32(32, seed=1), f32(32, seed=2)), {}),
    "layer_norm without eps": ("layer_norm", (f32(9, 3), f32(3, seed=1), f32(3, seed=2)), {"eps": 0.0}),
    "layer_norm of equal numbers": ("layer_norm", (np.full((2, 7), 0.1, np.float32), f32(7), f32(7)), {"eps": 0.0}),
    "layer_norm of special numbers": ("layer_norm", (with_special(f32(20, 4)), f32(4, seed=1), f32(4, seed=2)), {}),
    "attention": ("attention", (Q, K, V), {}),
    "attention with a mask": ("attention", (Q, K, V, masked(2, 1, 4, 6)), {"causal": True}),
    "attention with a scale": ("attention", (Q, K, V), {"scale": 0.3}),
    "attention of equal scores": ("attention", (0 * Q, K, V), {}),
    "attention of special numbers": ("attention", (Q, K, with_special(V), masked(4, 6)), {}),
    "attention to special keys": ("attention", (Q, with_special(K), V, masked(4, 6)), {}),
    "attention_scores": ("attention_scores", (Q, K, masked(4, 6)), {"scale": 0.3}),
    "attention_weights": ("attention_weights", (Q, K, masked(4, 6)), {"causal": True}),
    "cross_entropy": ("cross_entropy", (f32(5, 30, spread=5), np.asarray([3, 1, 4, 1, 5], np.int32)), {}),
}


def everywhere(shape):
    """Return the indices of all elements, as `numpy.nonzero` does."""
    return tuple(index.reshape(-1) for index in np.indices(shape))


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def computed(backend, name, args, options):
    arrays = [backend.from_numpy(np.asarray(x, np.float32) if x.dtype.kind == "f" else x) for x in args]
    with pg.reproducible():
        return backend.to_numpy(getattr(pg, name)(*arrays, **options))


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_that_of_the_host(backend, case):
    """Catches a bound that is too small, a zero with a sign, a flushed number, and NaN in the wrong place."""
    name, args, options = CASES[case]
    args = [np.asarray(x, np.float32) if x.dtype.kind == "f" else x for x in args]
    found = computed(backend, name, args, options)
    names = inspect.signature(getattr(pg, name)).parameters
    given = dict(zip(names, args, strict=False))
    expected = getattr(exact, name)(**given, **options, at=everywhere(found.shape))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found).reshape(-1), bits(expected))


def test_midpoints_are_decided(backend):
    """Catches an element that is decided by its float64 value although it lies on a midpoint, or next to one."""
    cases = [*midpoints.cases()]
    if backend.compiles_per_shape:  # each case has a shape of its own
        cases = cases[::45]
    for case in cases:
        arrays = {key: x for key, x in case.arguments.items() if isinstance(x, np.ndarray)}
        given = {
            key: backend.from_numpy(np.asarray(x, _NARROW.get(x.dtype.kind, x.dtype))) for key, x in arrays.items()
        }
        with pg.reproducible():
            found = backend.to_numpy(getattr(pg, case.op)(**{**case.arguments, **given}))
        np.testing.assert_array_equal(bits(found), bits(np.reshape(case.expected, found.shape)), err_msg=case.name)


_NARROW = {"f": np.float32, "i": np.int32}


@pytest.fixture(scope="module")
def plain():
    """Weights, and their logits in the mode on NumPy, of a text that was read at once."""
    config = CONFIGS["every option"]
    weights = random_weights(config)
    tokens = some_tokens(config, seq=9)
    return config, weights, tokens, logits_of(pg.get_backend("numpy"), config, weights, tokens)


def model_of(backend, config, weights, **options):
    return pg.GPT2(config, on_backend(backend, weights, "float32"), reproducible=True, **options)


def logits_of(backend, config, weights, tokens):
    return backend.to_numpy(model_of(backend, config, weights).logits(tokens))


def test_logits_have_the_same_bits_as_on_numpy(backend, plain):
    """Catches an op or a sum that is left to the framework. In plain float32, most of the logits differ."""
    config, weights, tokens, expected = plain
    np.testing.assert_array_equal(bits(logits_of(backend, config, weights, tokens)), bits(expected))


def test_a_batch_changes_nothing(backend, plain):
    config, weights, tokens, expected = plain
    model = model_of(backend, config, weights)
    for row, alone in zip(tokens, expected, strict=True):
        np.testing.assert_array_equal(bits(backend.to_numpy(model.logits([row[:5]]))[0]), bits(alone[:5]))


@pytest.mark.parametrize(("pieces", "padding"), [((1,) * 9, [2, 0]), ((3,) * 3, None)])
def test_a_cache_changes_nothing(backend, plain, pieces, padding):
    """Catches a mask, a position or a padded key that changes the last bit of a sum."""
    config, weights, tokens, expected = plain
    params = on_backend(backend, weights, "float32")
    if padding is not None:
        tokens = tokens.copy()
        tokens[0, 2:], tokens[0, :2] = tokens[0, :-2].copy(), 0
    cache = pg.new_cache(params, config, batch=2, capacity=12, padding=padding)
    compile = mode.compiler(backend, params)
    step = compile(lambda params, tokens, cache: pg.gpt2(params, tokens, config, cache), params, donate=("cache",))
    found, start = [], 0
    for n in pieces:
        logits, cache = step(backend.from_numpy(np.asarray(tokens[:, start : start + n], np.int32)), cache)
        start += n
        cache = cache._replace(position=start)
        found.append(backend.to_numpy(logits))
    found = np.concatenate(found, axis=1)
    np.testing.assert_array_equal(bits(found[1]), bits(expected[1]))
    if padding is None:
        np.testing.assert_array_equal(bits(found[0]), bits(expected[0]))
    else:
        np.testing.assert_array_equal(bits(found[0, 2:]), bits(expected[0, :-2]))


def test_texts_scores_and_traces_are_those_of_numpy(backend):
    """Catches a step of generation, of scores or of traces that does not run in the mode."""
    mine, numpys = (pg.GPT2.load("shakespeare", backend=each, reproducible=True) for each in (backend, "numpy"))
    # On a backend that compiles for each shape, the prompt has the shape of the text that is scored and traced below.
    prompts = ["To be"] if backend.compiles_per_shape else ["To be", "ROMEO.\nBut soft, what light", "x"]
    options = {"max_new_tokens": 6, "seed": 7}
    together = [each.text for each in mine.complete(prompts, **options)]
    assert together == [numpys.generate(prompt, **options) for prompt in prompts]
    ids = mine.tokenizer.encode(PASSAGE)[:64]
    score, expected = mine.score_ids(ids), numpys.score_ids(ids)
    np.testing.assert_array_equal(score.log_probs, expected.log_probs)
    np.testing.assert_array_equal(score.log_probs, np.float32(score.log_probs))
    plain = pg.GPT2.load("shakespeare", backend="numpy", dtype="float64").score_ids(ids)
    np.testing.assert_allclose(score.log_probs, plain.log_probs, atol=1e-4)
    found = pg.compare(numpys, mine, ids)
    assert found.notes[-1].startswith("The logits are equal to the last bit. Their fingerprint is ")
    assert {each.difference for each in found.growth} == {0}
    traced, expected = (each.trace(ids) for each in (mine, numpys))
    for name, x in traced.items():
        np.testing.assert_array_equal(bits(backend.to_numpy(x)), bits(expected[name]), err_msg=name)


def test_float64_alone_would_not_do(backend):
    """Catches a mode that rounds float64 results without looking at their errors.

    1 + 2^-24 lies in the middle between two float32 numbers, and 2^-60 decides. Float64 cannot hold the sum of the
    three numbers.
    """
    x, w, b = np.asarray([[1, 2.0**-24, 2.0**-60]], np.float32), np.ones((3, 2), np.float32), np.zeros(2, np.float32)
    assert np.float32((x.astype(np.float64) @ w)[0, 0]) == 1
    w[:, 1] = -1
    found = computed(backend, "conv1d", (x, w, b), {})
    np.testing.assert_array_equal(found, np.asarray([[1 + 2.0**-23, -1 - 2.0**-23]], np.float32))


def test_the_default_scale_is_a_quotient():
    """Catches d ** -0.5, whose last bit the platform's library chooses: a midpoint lies between the two scores."""
    scale, power = 1 / math.sqrt(3), 3**-0.5
    assert scale != power
    rest, q = Fraction(1 + 2.0**-24) / ((Fraction(scale) + Fraction(power)) / 2), []
    for _ in range(3):
        q.append(np.float32(rest))
        rest -= Fraction(float(q[-1]))
    with pg.reproducible():
        found = pg.attention_scores(np.asarray([q]), np.ones((1, 3), np.float32))
    assert found == (1 if scale < power else 1 + 2.0**-23)


def test_embedded_rows_have_no_subnormal_numbers(backend):
    """Catches rows that are copied as they are."""
    with pg.reproducible():
        found = pg.embed(backend.from_numpy(np.arange(10, dtype=np.int32)), backend.from_numpy(SPECIAL[:, None]))
    expected = np.asarray([0, 0, 0, 0, TINY, -TINY, 3e38, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(bits(backend.to_numpy(found)[:, 0]), bits(expected))


def test_subnormal_arguments_count_as_0(backend):
    """Catches a subnormal number that NumPy multiplies, and XLA takes for 0."""
    x, w, b = np.asarray([[TINY / 16, TINY]]), np.asarray([[2.0**20, 0], [0, 2.0**20]]), np.zeros(2)
    with pg.reproducible():
        found = pg.conv1d(*(backend.from_numpy(each, "float32") for each in (x, w, b)))
    np.testing.assert_array_equal(backend.to_numpy(found), [[0, TINY * 2.0**20]])


def test_residual_sums_have_no_subnormal_numbers(backend):
    """Catches a subnormal number that NumPy adds, and XLA takes for 0, and NaN of other bits."""
    x, y = [1.5 * TINY, 1, -1, TINY, np.inf], [-TINY, -1, 2.0**-23, TINY / 2, -np.inf]
    with pg.reproducible():
        found = backend.to_numpy(pg.ops.add(*(backend.from_numpy(np.asarray(each, np.float32)) for each in (x, y))))
    np.testing.assert_array_equal(bits(found), bits(np.asarray([0, 0, -1 + 2.0**-23, TINY, np.nan], np.float32)))


SETTINGS = [
    {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OMP_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Nehalem", "ONEDNN_MAX_CPU_ISA": "SSE41"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["Haswell", "Nehalem"])
def test_kernels_and_threads_change_nothing(backend, settings):
    """Catches a bound that holds only for the kernels that this processor chooses, and a card without fingerprints."""
    if backend.device(backend.from_numpy(np.zeros(1, np.float32))) != "cpu":
        pytest.skip("the settings are for CPUs")
    if backend.compiles_per_shape and settings == SETTINGS[1]:
        pytest.skip("compiling takes long, and the other settings are tested")
    threads = settings["OMP_NUM_THREADS"]
    settings |= {"OPENBLAS_NUM_THREADS": threads, "MKL_ENABLE_INSTRUCTIONS": "AVX2" if threads == "1" else "SSE4_2"}
    code = f"""
        import portable_gpt2 as pg
        print(pg.GPT2.load("shakespeare", backend={backend.name!r}, reproducible=True).fingerprint())
    """
    third_party = Path(__file__).parent / "third_party"  # has the metadata of another backend
    assert run(code, path=[third_party], **settings).strip() == str(numpys_fingerprint())
    card = (SHIPPED / "shakespeare" / "MODEL_CARD.md").read_text("utf-8")
    assert all(each in card for each in numpys_fingerprint()[:2])


@functools.cache
def numpys_fingerprint():
    return pg.GPT2.load("shakespeare", backend="numpy").fingerprint()


def test_a_fingerprint_depends_on_weights_and_tokens(backend):
    config = CONFIGS["every option"]
    weights = random_weights(config)
    model = model_of(backend, config, weights)
    found = model.fingerprint()
    assert found.tokens == [i % config.n_vocab for i in range(min(32, config.n_ctx))]
    assert found == model_of(pg.get_backend("numpy"), config, weights).fingerprint()
    assert found == pg.GPT2(config, on_backend(backend, weights, "float32")).fingerprint(found.tokens)
    other = model.fingerprint(found.tokens[::-1])
    assert (other.logits != found.logits, other.weights) == (True, found.weights)
    path = "h0/mlp/c_fc/b"
    changed = model_of(backend, config, {**weights, path: weights[path] + 1}).fingerprint()
    assert changed.logits != found.logits
    assert changed.weights != found.weights


def test_all_nan_have_the_same_hash():
    logits = np.full((1, 2), np.nan, np.float32)
    assert hash_of_logits([1], -logits) == hash_of_logits([1], logits) != hash_of_logits([1], np.ones_like(logits))


def test_the_mode_ends_with_its_block(backend):
    """Catches a mode that stays on after the block, or after an exception in it."""
    x = backend.from_numpy(f32(64, 64))
    before = backend.to_numpy(pg.softmax(x))
    with contextlib.suppress(RuntimeError), pg.reproducible():
        raise RuntimeError
    np.testing.assert_array_equal(bits(backend.to_numpy(pg.softmax(x))), bits(before))


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("layer_norm", (f32(2, 3), f32(3), f32(3)), {"eps": -1.0}, "eps is -1.0"),
        ("softmax", (f32(2, 3),), {"axis": 2}, "axis is 2"),
        ("attention", (Q, K[..., :2, :], V[..., :2, :]), {"causal": True}, "4 queries and only 2 keys"),
        ("attention_scores", (Q, K), {"scale": np.inf}, "scale is inf"),
        ("conv1d", (f32(2, 3), f32(4, 5), f32(5)), {}, "w has shape"),
        ("embed", (np.asarray([7], np.int32), f32(7, 2)), {}, "expected 0 to 6"),
        ("cross_entropy", (f32(1, 3), np.asarray([3], np.int32)), {}, "expected 0 to 2"),
    ],
)
def test_wrong_arguments_are_refused_as_they_are_outside_of_the_mode(backend, name, args, options, message):
    if name in ("embed", "cross_entropy") and backend.peek(backend.from_numpy(np.zeros(1, np.int32))) is None:
        pytest.skip("an accelerator's ids are not read")
    with pytest.raises(ValueError, match=message):
        computed(backend, name, args, options)


def test_other_dtypes_are_refused(backend):
    config = CONFIGS["every option"]
    narrow = next(name for name in ("bfloat16", "float16", "float64") if name in backend.dtypes)
    x = backend.from_numpy(f32(2), narrow)
    with pytest.raises(ValueError, match=f"gelu: x: dtype is {narrow}; the reproducible mode takes"), pg.reproducible():
        pg.gelu(x)
    with pytest.raises(ValueError, match=f"dtype is {narrow}; the reproducible mode takes"):
        pg.GPT2(config, on_backend(backend, random_weights(config), narrow), reproducible=True)
    with pytest.raises(ValueError, match=f"dtype is {narrow}; the reproducible mode takes"):
        pg.GPT2.load("shakespeare", backend=backend, dtype=narrow, reproducible=True)


def test_a_backend_without_float64_is_refused(numpy_backend):
    """Catches a backend, or a device, on which float64 does not exist or is narrowed without an error."""

    class Narrow(type(numpy_backend)):
        name, array_types = "narrow", (Mine,)
        refusal = staticmethod(lambda x: None)

        def put(self, a, device):
            return np.asarray(a, np.float32).view(Mine) if a.dtype == np.float64 else np.asarray(a).view(Mine)

    class Single(Narrow):
        dtypes: typing.ClassVar = {"float32": np.dtype(np.float32)}

    for backend in (Narrow(), Single()):
        message = "computes in float64, which narrow does not have; choose another backend or device"
        with registered(backend):
            with pytest.raises(TypeError, match=f"gelu: x: the reproducible mode {message}"), pg.reproducible():
                pg.gelu(backend.from_numpy(f32(2)))
            with pytest.raises(TypeError, match=message):
                pg.GPT2.load("shakespeare", backend=backend, reproducible=True)


class Mine(np.ndarray):
    """The arrays of a backend that has no float64."""


@pytest.fixture
def numpy_backend():
    return pg.get_backend("numpy")


def test_enclosures_are_refused():
    flint = pytest.importorskip("portable_gpt2_backends.flint").FlintBackend()
    with registered(flint), pytest.raises(TypeError, match="float64, which flint does not have"), pg.reproducible():
        pg.gelu(flint.from_numpy(f32(2)))


def test_a_traced_function_is_refused(jax):
    with pytest.raises(TypeError, match="call the function without compiling it"), pg.reproducible():
        jax.jit(pg.gelu)(np.ones(2, np.float32))


def test_commands_have_the_mode(capsys):
    """Catches an option that is not passed on."""
    assert main(["fingerprint", "--backend", "numpy"]) == 0
    logits, weights, _ = numpys_fingerprint()
    assert capsys.readouterr().out == f"logits  {logits}\nweights {weights}\n"
    assert main(["fingerprint", "--backend", "numpy", "--json"]) == 0
    assert f'"logits": "{logits}"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fingerprint", "--dtype", "float64"])
    for command in (["generate", "To"], ["attend", "To", "-o", "no.png"], ["trace", "To", "-o", "no.npz"]):
        assert main([*command, "--reproducible", "--dtype", "float64"]) == 2
        assert "dtype is float64; the reproducible mode takes and returns float32" in capsys.readouterr().err
