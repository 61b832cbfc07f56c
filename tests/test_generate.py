"""Generation, greedy so that only the path matters: prefill, cached decode, growth of the cache, stops, streams.

How a token is drawn from logits, and how ids become text, is tested in test_sampling.py and test_gpt2.py.
"""

import re

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.generation import decoder
from portable_gpt2.testing import claims
from portable_gpt2.testing.plain_gpt2 import on_backend, plain_gpt2, random_weights, truth_and_error

pytestmark = pytest.mark.every_device

# More positions than 64 and 128, where a backend that compiles grows its cache, and no power of 2 at the end.
CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=24, n_vocab=61, n_ctx=150, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def model(backend):
    """A model on every backend, once: what one test has compiled serves the next."""
    return pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))


def some_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.n_vocab, n).tolist()


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


def test_greedy_generation_to_the_end_of_the_context_is_naive_argmax_decoding(model, longest):
    """Catches a position or a row of the cache that is off, in prefill, in decode, or where the cache has grown. The
    logits are within 4 times float32's error and the two best further apart, so that the tokens must be equal.
    """
    assert list(model.stream_ids([3], max_new_tokens=149, temperature=0)) == longest


@pytest.mark.parametrize("n", [2, 63, 64, 65, 127, 128, 129, 148, 149])
def test_prompts_of_every_length_continue_alike(model, longest, n):
    """Catches padding that is seen or counted, and a cache that is too small by one, at and next to the padded sizes:
    the text may be cut into prompt and continuation anywhere.
    """
    prompt = [3, *longest[: n - 1]]
    count = min(3, CONFIG.n_ctx - n)
    assert list(model.stream_ids(prompt, max_new_tokens=count, temperature=0)) == longest[n - 1 : n - 1 + count]


def test_logits_of_every_length_are_as_near_to_the_truth_as_a_plain_implementation_is(model, backend):
    """Catches padding that is seen or returned by `GPT2.logits`."""
    tokens = np.asarray([some_ids(150, seed=1), some_ids(150, seed=2)])
    truth, error = truth_and_error(WEIGHTS, tokens, CONFIG)
    for n in (1, 63, 64, 65, 128, 129, 150):
        logits = pg.to_numpy(model.logits(tokens[:, :n]))
        assert logits.shape == (2, n, CONFIG.n_vocab)
        assert abs(logits - truth[:, :n]).max() <= 4 * error, n


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

    ratio = float(abs(np.stack(rows) - truth[0, 49:-1]).max()) / (4 * error)
    claims.record("generate", backend, "float32", ratio)
    assert ratio <= 1


def test_a_text_may_be_read_in_pieces(model, backend):
    """Catches padding that is written beyond the cache's end, where JAX would move it forward over earlier rows."""
    text = some_ids(66, seed=5)
    truth, error = truth_and_error(WEIGHTS, np.asarray([text]), CONFIG)
    cache, start = pg.new_cache(model.params, CONFIG, capacity=66), 0
    for n in (30, 34, 2):
        logits, cache = model._decoder.read([text[start : start + n]], cache)
        start += n
        assert abs(logits - truth[0, start - 1]).max() <= 4 * error
    assert cache.position == 66


def test_a_full_length_generation_compiles_once_for_each_size_of_the_cache(backend, monkeypatch):
    """Catches a shape, or a Python int, that differs from one token to the next: where functions are compiled, the
    model is traced for the prompt and for caches of 64, 128 and 150 tokens, and then never again.
    """
    traces = []

    def traced(params, tokens, *args):
        traces.append(backend.shape(tokens))
        return transformer(params, tokens, *args)

    transformer = decoder.transformer
    monkeypatch.setattr(decoder, "transformer", traced)
    model = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))

    list(model.stream_ids([3, 4, 5], max_new_tokens=147))
    if backend.compiles_per_shape:
        assert traces == [(1, 64), (1, 1), (1, 1), (1, 1)]
        list(model.stream_ids([6] * 17, max_new_tokens=133))
        assert len(traces) == 4
    else:
        assert traces == [(1, 3)] + [(1, 1)] * 146


def test_few_compilations_serve_every_length(backend, monkeypatch):
    """Catches a compilation for each length of a prompt: on a context of 1024, a generation of its whole length takes
    at most 7, and prompts from 1 to 1000 tokens at most 6 more (every 13th length, and those next to a power of 2).
    """
    if not backend.compiles_per_shape:
        assert backend.compile(pg.gpt2, 1).func is pg.gpt2  # nothing is compiled: there is nothing to count
        return
    traces = []

    def traced(params, tokens, *args):
        traces.append(backend.shape(tokens))
        return transformer(params, tokens, *args)

    transformer = decoder.transformer
    monkeypatch.setattr(decoder, "transformer", traced)
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_vocab=7, n_ctx=1024, eos_token_id=None)
    model = pg.GPT2(config, on_backend(backend, random_weights(config)))

    list(model.stream_ids([1, 2, 3], max_new_tokens=1021))
    assert 1 < len(traces) <= 7
    full = len(traces)
    for n in sorted({*range(1, 1001, 13), *(2**k + i for k in range(6, 10) for i in (-1, 0, 1)), 1000}):
        list(model.stream_ids([1] * n, max_new_tokens=1))
    assert len(traces) - full <= 6


def test_a_compiled_step_needs_no_room_for_a_second_cache(jax):
    """Catches a cache that is copied to be written: XLA does so where the copy is fused with what reads it."""
    backend = pg.get_backend("jax")
    config = pg.GPT2Config(n_layer=3, n_head=2, n_embd=32, n_vocab=61, n_ctx=1024, eos_token_id=None)
    model = pg.GPT2(config, on_backend(backend, random_weights(config)))
    cache = pg.new_cache(model.params, config)
    step = model._decoder._step
    ids = jax.numpy.asarray([[1]]), jax.numpy.asarray([0])
    memory = step.func.lower(*step.args, *ids, cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k[0].nbytes


def test_compiled_attention_over_a_written_cache_copies_no_buffer(tf):
    """Catches a buffer that is copied to be written, as XLA does where it fuses that with what reads."""
    backend = pg.get_backend("tensorflow")
    buffers = [tf.Variable(tf.zeros((1, 2, 64, 16))) for _ in range(2)]
    given = tf.ones((1, 2, 1, 16)), tf.constant(3)

    def step(x, start):
        return pg.attention(x, *(backend.write(buffer, 2 * x, start)[...] for buffer in buffers))

    compiled = tf.function(step, jit_compile=True, autograph=False)
    _, entry = compiled.experimental_get_compiler_ir(*given)(stage="optimized_hlo").split("\nENTRY")
    makers = set(re.findall(r"= f32\[(?:1,)?2,64,16\]\S* ([\w-]+)\(", entry))
    assert makers
    assert makers <= {"parameter", "get-tuple-element", "bitcast"}


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


def test_no_more_is_computed_than_is_asked_for(backend, monkeypatch):
    """Catches a stream that runs ahead of its reader, and a step for a token that nobody draws from."""
    model = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))
    steps = []
    read = decoder.Decoder.read
    monkeypatch.setattr(decoder.Decoder, "read", lambda self, *args: steps.append(0) or read(self, *args))
    stream = model.stream_ids([1, 2], max_new_tokens=3)
    assert steps == []
    next(stream)
    assert len(steps) == 1
    assert len(list(stream)) == 2
    assert len(steps) == 3
