"""The log-probabilities of a text, against the same formula in plain NumPy."""

import math

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.plain_gpt2 import on_backend, plain_gpt2, random_weights, truth_and_error, yardstick

pytestmark = pytest.mark.every_device

CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=24, n_vocab=61, n_ctx=40, eos_token_id=60)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def model(backend):
    return pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.n_vocab - 1, n).tolist()


def log_probs_of(logits, ids):
    """Return the log-probability of each of the ids after the first, from the logits [seq, n_vocab] in float64."""
    rows = logits[np.arange(len(ids) - 1)] - logits[: len(ids) - 1].max(-1, keepdims=True)
    return rows[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(rows).sum(-1))


def naive(ids, stride):
    """Score each token after the last window's first that has room for it, one by one."""
    found, start = [math.nan], 0
    for i in range(1, len(ids)):
        while i >= start + CONFIG.n_ctx:
            start += stride
        window = ids[start : i + 1]
        found.append(log_probs_of(plain_gpt2(WEIGHTS, np.asarray([window]), CONFIG)[0], window)[-1])
    return np.asarray(found)


@pytest.mark.parametrize("n", [1, 2, 40, 41, 100])
@pytest.mark.parametrize("stride", [None, 1, 39])
def test_each_token_is_scored_given_those_before_it(model, n, stride):
    """Catches an off-by-one between logits and tokens, a window that scores too much or too little, and a float32 sum.

    A log-probability is off by at most twice the logits' error, which is at most 4 times plain float32's.
    """
    ids = some_ids(n)
    score = model.score_ids(ids, stride=stride)
    _, error = truth_and_error(WEIGHTS, np.asarray([some_ids(40)]), CONFIG)
    truth, allowed = naive(ids, 20 if stride is None else stride), 2 * yardstick(error, "float32")
    assert score.tokens == ids
    assert math.isnan(score.log_probs[0])
    assert score.n_tokens == n - 1
    assert score.log_probs.dtype == np.float64
    assert (abs(score.log_probs - truth)[1:] <= allowed).all()
    assert score.total == pytest.approx(np.nansum(score.log_probs), abs=1e-12)
    if n > 1:
        assert score.perplexity == pytest.approx(math.exp(-np.nanmean(truth)), rel=allowed)
    else:
        assert math.isnan(score.perplexity)


def test_bos_scores_the_first_token_too(model):
    """Catches a text that is scored as if <|endoftext|> were a part of it."""
    ids = some_ids(30)
    score = model.score_ids(ids, bos=True)
    expected = model.score_ids([60, *ids])
    assert score.tokens == ids
    np.testing.assert_array_equal(score.log_probs, expected.log_probs[1:])
    assert score.n_tokens == 30


def test_logits_that_overflow_have_no_score(backend):
    """Catches a token that counts as one without a log-probability because its logits are NaN."""
    weights = {path: a.copy() for path, a in WEIGHTS.items()}
    weights["ln_f/g"][:] = 1e30
    weights["wte"] *= 1e10
    model = pg.GPT2(CONFIG, on_backend(backend, weights))
    with pytest.raises(ValueError, match="the logits hold a NaN or an infinity"), np.errstate(all="ignore"):
        model.score_ids(some_ids(5))
