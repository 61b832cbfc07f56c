"""Generated text: the tokens that plain NumPy gives, greedy and sampled, on either way to choose a token.

How a token is sampled from logits on the host does not depend on a backend. It is tested elsewhere.
"""

import threading

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.generation import decoder
from portable_gpt2.generation.decoder import Generation
from portable_gpt2.sampling import Sampling
from portable_gpt2.testing import claims
from portable_gpt2.testing.plain_gpt2 import (
    PASSAGE,
    PERPLEXITY,
    SHAKESPEARE,
    on_backend,
    plain_gpt2,
    plain_text,
    random_weights,
    truth_and_error,
    yardstick,
)

pytestmark = pytest.mark.every_device

# A backend that compiles grows its cache at 64 and 128. Neither they nor a power of 2 is at the end.
CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=24, n_vocab=61, n_ctx=150, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS = {
    "greedy": {"temperature": 0},
    "top_k and top_p": {"seed": 7, "top_k": 5, "top_p": 0.9},
    "all tokens": {"seed": 2**64 - 1, "top_k": None, "temperature": 1.7},
    "min_p": {"seed": 7, "top_k": 5, "top_p": 0.5, "min_p": 0.05, "temperature": 0.6},
    "repetition_penalty": {"seed": 7, "repetition_penalty": 1.3},
}


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.n_vocab, n).tolist()


@pytest.fixture(scope="module")
def traced():
    """The shapes of the tokens and of the cache at each call of the model's Python code."""
    calls, transformer = [], decoder.transformer

    def recorded(params, tokens, config, cache):
        backend = pg.backend_of(tokens)
        calls.append((backend.shape(tokens), backend.shape(cache.k[0])))
        return transformer(params, tokens, config, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "transformer", recorded)
        yield calls


@pytest.fixture(scope="module")
def model(backend, traced):
    """A model whose tokens the host chooses. What one test has compiled serves the next."""
    found = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))
    found._decoder.runs_ahead = False
    return found


def naive(prompt, n):
    """Continue a prompt by computing everything again at every token, in plain NumPy; return the ids and, of all
    choices, the smallest distance between the two best logits.
    """
    ids, margin = list(prompt), np.inf
    for _ in range(n):
        logits = plain_gpt2(WEIGHTS, np.asarray([ids]), CONFIG)[0, -1]
        second, first = np.sort(logits)[-2:]
        margin = min(margin, first - second)
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :], margin


@pytest.fixture(scope="module")
def longest():
    """The longest text that there can be, from one token on, chosen where no choice is closer than rounding."""
    ids, margin = naive([3], CONFIG.n_ctx - 1)
    _, error = truth_and_error(WEIGHTS, np.asarray([[3, *ids]]), CONFIG)
    assert margin > 2 * 4 * error, "two logits are too close for float32: choose other weights"
    assert len(set(ids)) > 15, "the text repeats itself: choose other weights"
    return ids


def expected_text(prompt, n, **options):
    """Return the text in plain NumPy, of which it is asserted that errors as large as a backend's do not change it."""
    text = plain_text(WEIGHTS, prompt, n, CONFIG, **options)
    _, error = truth_and_error(WEIGHTS, np.asarray([some_ids(150)]), CONFIG)
    for seed in range(3):
        random = np.random.default_rng(seed)
        noisy = plain_text(
            WEIGHTS, prompt, n, CONFIG, noise=lambda shape, r=random: 4 * error * r.uniform(-1, 1, shape), **options
        )
        assert noisy == text, "rounding errors change this text: choose another seed"
    return text


# Greedy, so that the text depends on the path alone: prefill, cached decode, growth of the cache


def test_greedy_generation_to_the_end_of_the_context_is_naive_argmax_decoding(backend, model, longest, traced):
    """Catches a position or a row of the cache that is off, in prefill, in decode, or where the cache has grown. The
    logits are within 4 times float32's error and the two best further apart, so that the tokens must be equal.

    Where functions are compiled, it also catches a shape, or an int, that differs from one token to the next: the
    model is then compiled again, although a function for these shapes exists.
    """
    before = len(traced)
    assert list(model.stream_ids([3], max_new_tokens=149, temperature=0)) == longest
    if backend.compiles_per_shape:
        assert len(set(traced)) == len(traced), "a function was compiled twice for the same shapes"
    elif not backend.runs_ahead(model.params["wte"]):  # a recorded step does not call the function again
        assert [tokens for tokens, _ in traced[before:]] == [(1, 1)] * 149


@pytest.mark.parametrize("n", [2, 63, 64, 65, 127, 128, 129, 148, 149])
def test_prompts_of_every_length_continue_alike(model, longest, n):
    """Catches padding that is seen or counted, and a cache that is too small by one, at and next to the padded sizes:
    the text may be cut into prompt and continuation anywhere.
    """
    prompt = [3, *longest[: n - 1]]
    count = min(3, CONFIG.n_ctx - n)
    assert list(model.stream_ids(prompt, max_new_tokens=count, temperature=0)) == longest[n - 1 : n - 1 + count]


def test_logits_while_generating_are_as_near_to_the_truth_as_a_plain_implementation_is(model, backend, monkeypatch):
    """Catches errors that a greedy choice forgives: the logits that each token would be drawn from, along a text that
    is fixed beforehand.
    """
    text = some_ids(150, seed=4)
    truth, error = truth_and_error(WEIGHTS, np.asarray([text]), CONFIG)
    rows = []

    def dictate(options, logits, position, seen, index):
        rows.append(logits)
        return text[position]

    monkeypatch.setattr(decoder, "sample_with", dictate)
    assert list(model.stream_ids(text[:50], max_new_tokens=100)) == text[50:]

    ratio = float(abs(np.stack(rows) - truth[0, 49:-1]).max()) / yardstick(error, "float32")
    claims.record("generate", backend, "float32", ratio)
    assert ratio <= 1


def test_a_text_may_be_read_in_pieces(model, backend):
    """Catches padding that is written beyond the cache's end, or that a framework moves forward over earlier rows."""
    text = some_ids(66, seed=5)
    truth, error = truth_and_error(WEIGHTS, np.asarray([text]), CONFIG)
    cache, start = pg.new_cache(model.params, CONFIG, capacity=66), 0
    for n in (30, 34, 2):
        logits, cache = model._decoder.read([text[start : start + n]], cache)
        start += n
        assert abs(logits - truth[0, start - 1]).max() <= yardstick(error, "float32")
    assert cache.position == 66


# Where a text ends


def test_a_generation_that_exactly_fits_runs_and_one_token_more_is_refused(model):
    """Catches a bound that is off by one: prompt and continuation fill n_ctx together."""
    assert len(list(model.stream_ids(some_ids(147), max_new_tokens=3))) == 3
    assert list(model.stream_ids(some_ids(150), max_new_tokens=0)) == []
    with pytest.raises(ValueError, match=r"147 tokens and max_new_tokens = 4 do not fit .* give at most 3"):
        model.stream_ids(some_ids(147), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"shorten the prompt"):
        model.stream_ids(some_ids(151), max_new_tokens=0)


def test_ids_stop_before_a_token_that_is_named(model, longest):
    """Catches a stop that is yielded, that is looked for in the prompt, or that is not heeded."""
    stop = next(token for token in longest[5:] if token not in longest[:5])
    expected = longest[: longest.index(stop)]
    for given in (stop, [stop], {stop}, (np.int64(stop),)):
        assert list(model.stream_ids([3], max_new_tokens=149, temperature=0, stop=given)) == expected
    after = longest.index(stop) + 1
    prompt = [3, *longest[:after]]  # holds the stop
    found = list(model.stream_ids(prompt, max_new_tokens=1, temperature=0, stop=stop))
    assert found == [t for t in longest[after : after + 1] if t != stop]


def test_no_more_is_computed_than_is_asked_for(model, monkeypatch):
    """Catches a step for a token that nobody reads, and a stream that computes before it is read."""
    steps = []
    read = decoder.Decoder.read
    monkeypatch.setattr(decoder.Decoder, "read", lambda self, *args: steps.append(0) or read(self, *args))
    stream = model.stream_ids([1, 2], max_new_tokens=3)
    assert steps == []
    next(stream)
    assert len(steps) == 1
    assert len(list(stream)) == 2
    assert len(steps) == 3


# Sampled texts are those of the host's sampling from plain NumPy's logits


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_seed_gives_the_same_text_on_every_backend(model, name):
    """Catches logits of another token, and a position of the random stream that is off by one."""
    expected = expected_text([3, 4, 5], 30, **OPTIONS[name])
    assert list(model.stream_ids([3, 4, 5], max_new_tokens=30, **OPTIONS[name])) == expected
    assert len(set(expected)) > 3


def test_a_window_slides_past_the_context(model):
    """Catches a window that slides at another place, tokens that are lost or doubled there, and positions of the random
    stream that begin again with the window.
    """
    prompt, options = some_ids(140, seed=6), OPTIONS["top_k and top_p"]
    expected = expected_text(prompt, 40, **options)
    assert list(model.stream_ids(prompt, max_new_tokens=40, sliding=True, **options)) == expected


def texts(model, prompts, n, *, ends=(), **options):
    """Return the new tokens of a batch, whose texts end at the tokens in `ends`. Each text has a seed of its own."""
    batch = [Generation(list(p), Sampling(**{**options, "seed": 3 + i}), i) for i, p in enumerate(prompts)]
    for generation in model._decoder.stream(batch, n, ends):
        generation.finished = generation.tokens[-1] in ends
    return [generation.tokens[len(prompt) :] for generation, prompt in zip(batch, prompts, strict=True)]


@pytest.mark.parametrize("name", ["greedy", "top_k and top_p"])
def test_the_texts_of_a_batch_are_those_of_each_prompt_alone(model, name):
    """Catches padding that is seen, positions that count it, rows that are mixed up, samples that depend on the batch,
    and a text that ends the others.
    """
    options = OPTIONS[name]
    whole = [expected_text(p, 20, **{**options, "seed": 3 + i, "index": i}) for i, p in enumerate(PROMPTS)]
    assert texts(model, PROMPTS, 20, **options) == whole
    end = whole[0][7]
    ended = [text[: text.index(end) + 1] if end in text else text for text in whole]
    assert len({len(text) for text in ended}) > 1
    assert texts(model, PROMPTS, 20, ends=[end], **options) == ended


def test_threads_do_not_disturb_one_another(model):
    """Catches a state that two generations share, such as a buffer of the backend."""
    expected = {i: list(model.stream_ids([i, 5], max_new_tokens=20, seed=i)) for i in range(4)}
    found = {}

    def generate(i):
        found[i] = list(model.stream_ids([i, 5], max_new_tokens=20, seed=i))

    threads = [threading.Thread(target=generate, args=(i,)) for i in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_two_streams_may_be_read_in_turn(model):
    """Catches a cache that belongs to the model and not to the text."""
    options = {"max_new_tokens": 12, "seed": 7}
    expected = [list(model.stream_ids(ids, **options)) for ids in ([1, 2, 3], [9])]
    pairs = zip(model.stream_ids([1, 2, 3], **options), model.stream_ids([9], **options), strict=True)
    assert [list(ids) for ids in zip(*pairs, strict=True)] == expected


def test_weights_that_hold_a_nan_do_not_give_a_token(backend):
    """Catches argmax over NaN, which is whatever comes first: text from a broken model looks like text."""
    model = pg.GPT2(CONFIG, on_backend(backend, {**WEIGHTS, "ln_f/b": np.full(24, np.nan)}))
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="the logits hold a NaN"):
            next(model.stream_ids([1, 2], max_new_tokens=3, temperature=temperature))


# The model that ships with the package. Where the device chooses tokens by default, it does so here.


@pytest.fixture(scope="module")
def shipped(backend):
    return pg.GPT2.load("shakespeare", backend=backend)


@pytest.mark.parametrize(("prompt", "options", "text"), SHAKESPEARE, ids=["sampled", "greedy", "top_p"])
def test_the_shipped_model_writes_the_same_text_on_every_backend(shipped, prompt, options, text):
    """Catches mistakes that a small model does not show, and weights or a tokenizer that are read wrongly."""
    assert shipped.generate(prompt, **options) == text


def test_the_shipped_model_completes_each_prompt_of_a_batch_as_it_does_alone(shipped):
    """Catches texts that depend on the batch, and padding that is seen: the prompts have different lengths."""
    _, options, text = SHAKESPEARE[0]
    assert shipped.generate([prompt for prompt, *_ in SHAKESPEARE[1:]], **options)[0] == text


def test_the_shipped_models_perplexity_is_one_number(shipped):
    """Catches errors of the logits that no choice of a token shows."""
    assert shipped.score(PASSAGE).perplexity == pytest.approx(PERPLEXITY, rel=1e-5)
