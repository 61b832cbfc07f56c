"""Scores: the windows, sums and bytes, and what is refused. `portable_gpt2.testing.model` tests log-probabilities."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2.score import Score, from_logits, score_tokens, windows
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights

CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=24, n_vocab=61, n_ctx=40, eos_token_id=60)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def model(backend):
    return pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.n_vocab - 1, n).tolist()


@given(st.integers(0, 300), st.integers(2, 50), st.data())
def test_windows_score_each_token_once_and_with_as_much_before_it_as_is_promised(n, n_ctx, data):
    """Catches a token that is scored twice or never, outside its window, or with less context than promised."""
    stride = data.draw(st.integers(1, n_ctx - 1))
    scored = []
    for start, first, end in windows(n, n_ctx, stride):
        assert 0 <= start < first < end <= n
        assert end - start <= n_ctx
        assert start == 0 or first - start >= n_ctx - stride
        scored += range(first, end)
    assert scored == list(range(1, n))


def test_progress_is_that_of_the_windows(model):
    """Catches a bar that stands still, and one that counts tokens as windows."""
    seen = []

    def progress(items):
        for item in items:
            yield item
            seen.append(item)

    model.score_ids(some_ids(100), progress=progress)
    assert seen == [[(0, *window)] for window in windows(100, CONFIG.n_ctx, CONFIG.n_ctx // 2)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_windows_are_scored_at_once_as_one_by_one(at_once):
    """Catches scores of another window or text, and a group that is too large or is left out."""
    rng = np.random.default_rng(at_once)
    texts = [rng.integers(0, 7, n).tolist() for n in (0, 1, 9, 2, 30)]
    sizes, by_window = [], from_logits(lambda window: np.outer(np.cumsum(window), np.arange(7)) % 5.0)

    def scorer(group, alternatives):
        sizes.append(len(group))
        return by_window(group, alternatives)

    found = score_tokens(scorer, texts, 8, 3, 2, at_once=at_once)
    n_windows = sum(len(list(windows(len(tokens), 8, 3))) for tokens in texts)
    whole, rest = divmod(n_windows, at_once)
    assert sizes == [at_once] * whole + [rest] * (rest > 0)
    for tokens, scored in zip(texts, found, strict=True):
        log_probs, ranks, ids, values = (np.full_like(x, -1) for x in scored)
        for start, first, end in windows(len(tokens), 8, 3):
            (part,) = by_window([(tokens[start:end], first - start)], 2)
            for whole, each in zip((log_probs, ranks, ids, values), part, strict=True):
                whole[first:end] = each
        for whole, each in zip((log_probs, ranks, ids, values), scored, strict=True):
            np.testing.assert_array_equal(whole[1:], each[1:])


def test_bytes_are_those_of_the_tokens_that_are_scored(backend, tmp_path):
    """Catches characters that are counted for bytes, and the first token's bytes."""
    tiny.write_tokenizer(tmp_path)
    tokenizer = pg.Tokenizer.load(tmp_path)
    model = tiny.model(backend, tokenizer=tokenizer)
    text = "To be, 存在 🙂"
    first = len(tokenizer.token_bytes(tokenizer.encode(text)[0]))
    plain, whole = model.score(text), model.score(text, bos=True)
    assert whole.n_bytes == len(text.encode()) == plain.n_bytes + first
    assert whole.byte_perplexity == pytest.approx(math.exp(-whole.total / len(text.encode())))
    both = model.score([text, "To be"])
    assert [score.total for score in both] == [plain.total, model.score("To be").total]


def test_sums_are_accumulated_in_float64_and_exactly():
    """Catches a sum in the order of the text, which loses small terms next to large ones."""
    score = Score([0] * 4, np.asarray([math.nan, -1e16, -1.0, -1.0]), 3)
    assert score.total == -1e16 - 2


def test_a_perplexity_beyond_all_numbers_is_infinite():
    """Catches an OverflowError for a text that the model finds impossible."""
    assert Score([0, 0], np.asarray([math.nan, -1e4]), 1).perplexity == math.inf


@pytest.mark.parametrize("stride", [0, 40, -1, 1.5, True])
def test_a_stride_that_makes_no_sense_is_refused(model, stride):
    """Catches windows that do not move, or that leave a token without context."""
    with pytest.raises(ValueError, match=r"stride is .*; expected an int from 1 to 39 .the largest is n_ctx - 1."):
        model.score_ids(some_ids(5), stride=stride)


def test_an_empty_text_has_no_score(model):
    """Catches a division by no tokens."""
    score = model.score_ids([])
    assert (score.n_tokens, score.total, score.n_bytes) == (0, 0, 0)
    assert math.isnan(score.perplexity)


@pytest.mark.parametrize("empty", [[], (), range(0), np.asarray([]), np.asarray([], np.int64)], ids=repr)
def test_no_tokens_have_an_empty_score_in_whatever_form_they_come(model, empty):
    """Catches an empty list of ids that is refused because NumPy makes a float array of it."""
    for bos in (False, True):
        score = model.score_ids(empty, bos=bos)
        assert (score.tokens, score.log_probs.shape, score.n_tokens, score.n_bytes) == ([], (0,), 0, 0)
