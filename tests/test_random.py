"""The random stream gives the bits that it has always given: for weights, for training windows and for tokens.

A seed that somebody has written down names a model, a run or a text. The expected values are literal numbers, or are
computed here from NumPy's Philox with Python's own arithmetic.
"""

import hashlib
import math
import types

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import random
from portable_gpt2.checks import seed as check_seed
from portable_gpt2.sampling import Sampling
from portable_gpt2.training import batch

CONFIG = pg.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_vocab=3, n_ctx=2, eos_token_id=None)
LARGEST = 2**64 - 1


def philox(n, seed, stream, place=0):
    """Return words of NumPy's generator."""
    key = np.asarray([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=[0, place, 0, 0]).random_raw(n).tolist()


def uniform(word):
    return ((word >> 12) + 0.5) / 2**52


@pytest.mark.parametrize(
    ("seed", "path", "entries", "values"),
    [
        (0, "wte", [0, 1, -1], [-0.02368406020104885, -0.021995676681399345, 0.008541876450181007]),
        (0, "wpe", [0, -1], [-0.005624884739518166, 0.022039467468857765]),
        (0, "h0/attn/c_attn/w", [0, -1], [0.013453635387122631, -0.006577927153557539]),
        (LARGEST, "wte", [0, 1, -1], [0.008960699662566185, -0.07072955369949341, 0.0318889357149601]),
        (LARGEST, "wpe", [0, -1], [0.011680376715958118, 0.00802645180374384]),
        (LARGEST, "h0/attn/c_attn/w", [0, -1], [-0.016104817390441895, -0.022272976115345955]),
    ],
)
def test_initial_weights_are_pinned(seed, path, entries, values):
    """Catches another key, another transform, another scale, and a seed that passes through float64."""
    params = dict(pg.params.flatten(pg.init_params(CONFIG, seed=seed, backend="numpy")))
    found = params[path].ravel()[entries]
    np.testing.assert_array_equal(found, np.asarray(values, np.float32))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_normal_variates_are_box_and_mullers(n):
    """Catches words that are used in another order, and the last variate of an odd number left out."""
    path, seed = "h3/mlp/c_fc/w", 2**63 + 11
    stream = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    half = (n + 1) // 2
    u = [uniform(word) for word in philox(2 * half, seed, stream)]
    pairs = list(zip(u[:half], u[half:], strict=True))
    expected = [math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b) for a, b in pairs]
    expected += [math.sqrt(-2 * math.log(a)) * math.sin(2 * math.pi * b) for a, b in pairs]
    np.testing.assert_allclose(random.normal(path, (n,), seed), expected[:n], rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(random.normal(path, (n, 1), seed)[:, 0], random.normal(path, (n,), seed))


def test_initial_weights_do_not_depend_on_the_last_bits_of_functions(monkeypatch):
    """Catches a weight that is the platform's, and a wrong sine, scale or sign among those that 50 digits decide."""
    expected = random.normal("wte", (3001,), 5, 0.02).astype(np.float32)
    noise = 2.0**-26 * np.random.default_rng(0).uniform(-1, 1, 1501)
    rough = types.SimpleNamespace(**vars(np))
    rough.log = lambda x: np.log(x) * (1 + noise)
    rough.cos, rough.sin = (lambda x, f=f: f(x) + noise for f in (np.cos, np.sin))
    monkeypatch.setattr(random, "np", rough)
    monkeypatch.setattr(random, "_ERROR", 0.0)
    assert (random.normal("wte", (3001,), 5, 0.02).astype(np.float32) != expected).mean() > 0.1
    monkeypatch.setattr(random, "_ERROR", 2.0**-25)
    np.testing.assert_array_equal(random.normal("wte", (3001,), 5, 0.02).astype(np.float32), expected)


@pytest.mark.parametrize(
    ("seed", "index", "starts"),
    [
        (0, 0, [786055, 364227, 487954]),
        (0, 1, [121110, 996034, 263833]),
        (7, 0, [327790, 648772, 486239]),
        (7, 2**40, [605903, 202679, 104509]),
        (LARGEST, 3, [800779, 546519, 364554]),
    ],
)
def test_training_windows_are_pinned(seed, index, starts):
    """Catches another counter: a run that is resumed would train on other windows than one that is not."""
    found = batch(np.arange(10**6), index, batch_size=3, length=2, seed=seed)
    assert found.tolist() == [[start, start + 1] for start in starts]
    stream = sum(ord(c) << 8 * i for i, c in enumerate("windows"))
    assert starts == [word % (10**6 - 1) for word in philox(3, seed, stream, index)]


@pytest.mark.parametrize(
    ("seed", "index", "position", "variates"),
    [
        (0, 0, 0, None),
        (7, 0, 5, [0.14473012404901697, -0.506421599008802, 1.6930146854586936]),
        (LARGEST, 3, 1023, [0.8607480205366514, 0.07947319295203821, -0.7211373493568196]),
        (2**63, LARGEST, 2**63 - 1, None),
    ],
)
def test_gumbel_variates_are_pinned(seed, index, position, variates):
    """Catches a seed and an index that are swapped, another counter, and a word that is not the entry's own."""
    expected = [-math.log(-math.log(uniform(word))) for word in philox(9, seed, index, position)]
    found = random.gumbel(np.arange(3), 9, position, seed, index)
    np.testing.assert_allclose(found, expected[:3], rtol=1e-12, atol=1e-15)
    if variates is not None:
        np.testing.assert_allclose(found, variates, rtol=1e-12)
    np.testing.assert_allclose(
        random.gumbel(np.asarray([4, 8]), 9, position, seed, index), [expected[4], expected[8]], rtol=1e-12, atol=1e-15
    )


def test_a_uniform_number_is_strictly_between_0_and_1():
    """Catches an infinite variate, which a word of only zeros or only ones would give."""
    least, largest = random.uniform(np.asarray([0, LARGEST], np.uint64))
    assert (least, largest) == (2.0**-53, 1 - 2.0**-53)
    assert random.uniform(np.asarray([0xFFF, 0x1000], np.uint64)).tolist() == [2.0**-53, 3 * 2.0**-53]


def test_a_seed_that_nobody_gave_has_32_bits(monkeypatch):
    """Catches a seed that is too long to be typed again, and two places that choose seeds from different ranges."""
    asked = []
    monkeypatch.setattr(random.secrets, "randbits", lambda n: asked.append(n) or 12345)
    assert (random.new_seed(), Sampling().seed, Sampling(seed=None).seed) == (12345,) * 3
    assert asked == [32] * 3


@pytest.mark.parametrize("value", [0, 1, 2**32, 2**63, LARGEST])
def test_a_seed_is_any_unsigned_integer_of_64_bits(value):
    """Catches a range that is narrower in one place than in another."""
    assert check_seed("seed", value) == Sampling(seed=value).seed == pg.training.Recipe(seed=value).seed == value
    for wrong in (-1 - value, LARGEST + 1 + value):
        for refuse in (
            lambda x: check_seed("seed", x),
            lambda x: Sampling(seed=x),
            lambda x: pg.training.Recipe(seed=x),
        ):
            with pytest.raises(ValueError, match=r"^seed is .*; expected an int from 0 to 2\*\*64 - 1$"):
                refuse(wrong)
