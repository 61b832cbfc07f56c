"""The cache of keys and values: the logits of texts that are read in pieces, in a growing cache, and with padding.

The compiled step is the one that generation runs: its cache is donated, and the position is another int in each call.
"""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing import claims
from portable_gpt2.testing.plain_gpt2 import (
    CONFIGS,
    PLAIN,
    on_backend,
    random_weights,
    some_tokens,
    truth_and_error,
    yardstick,
)

pytestmark = pytest.mark.every_device

each_form = pytest.mark.parametrize("form", ["eager", "compiled"])


def step_of(backend, form, params, config):
    """Return a function from tokens and a cache to logits and the cache."""

    def step(params, tokens, cache):
        return pg.gpt2(params, tokens, config, cache)

    if form == "compiled":
        return backend.compile(step, params, donate=("cache",))
    return lambda tokens, cache: step(params, tokens, cache)


def read(backend, step, tokens, cache, pieces):
    """Read tokens in pieces of some lengths. Return all logits, on the host, and the cache."""
    logits, start = [], 0
    for n in pieces:
        found, cache = step(backend.from_numpy(tokens[:, start : start + n]), cache)
        start += n
        cache = cache._replace(position=start)  # the position that a compiled step returns is an array
        logits.append(backend.to_numpy(found).astype(np.float64))
    return np.concatenate(logits, axis=1), cache


def assert_cached_logits_are_near(backend, dtype, form, pieces):
    config = CONFIGS["every option"]
    flat, tokens = random_weights(config), some_tokens(config, seq=9)
    truth, error = truth_and_error(flat, tokens, config)
    params = on_backend(backend, flat, dtype)
    cache = pg.new_cache(params, config, batch=2, capacity=9)
    logits, _ = read(backend, step_of(backend, form, params, config), tokens, cache, pieces)
    ratio = float(abs(logits - truth).max() / yardstick(error, dtype))
    claims.record("gpt2 cached", backend, dtype, ratio)
    assert ratio <= 1


@pytest.mark.about("write", "compile")
def test_cached_logits_are_as_near_to_the_truth_as_uncached_ones(backend, dtype):
    """Catches a position that is off by one, or that is fixed when the step is compiled; rows that are written in the
    wrong place, or into memory that is no longer the cache's; and keys that are masked or missing.
    """
    assert_cached_logits_are_near(backend, dtype, "compiled", (3, 1, 1, 1, 3))


@pytest.mark.about("write")
def test_a_step_need_not_be_compiled(backend):
    """Catches the same where a framework runs each operation by itself: attention then reads only the rows so far."""
    assert_cached_logits_are_near(backend, "float32", "eager", (4, 1, 4))


@pytest.mark.about("zeros", "write")
def test_a_grown_cache_holds_what_it_held(backend):
    """Catches rows lost or moved when the buffers are copied into longer ones."""
    flat, tokens = random_weights(PLAIN), some_tokens(PLAIN, seq=9)
    truth, error = truth_and_error(flat, tokens, PLAIN)
    params = on_backend(backend, flat)
    step = step_of(backend, "compiled", params, PLAIN)

    _, cache = read(backend, step, tokens, pg.new_cache(params, PLAIN, batch=2, capacity=5), [5])
    logits, cache = step(backend.from_numpy(tokens[:, 5:]), pg.grow_cache(cache, 9))

    assert int(cache.position) == 9
    assert backend.shape(cache.v[1]) == (2, 4, 9, 8)
    assert abs(backend.to_numpy(logits) - truth[:, 5:]).max() <= yardstick(error, "float32")


@each_form
def test_padded_texts_have_the_logits_that_each_has_alone(backend, form):
    """Catches padding that is seen or counted as a position: texts of 9, 4 and 1 tokens, padded on the left, and three
    more tokens of each.
    """
    flat, tokens, lengths = random_weights(PLAIN), some_tokens(PLAIN, batch=3, seq=12), (9, 4, 1)
    params = on_backend(backend, flat)
    padding = [9 - n for n in lengths]
    cache = pg.new_cache(params, PLAIN, batch=3, capacity=12, padding=padding)
    pieces = (9, 1, 1, 1) if form == "compiled" else (9, 3)
    logits, _ = read(backend, step_of(backend, form, params, PLAIN), tokens, cache, pieces)
    for i, n in enumerate(padding):
        truth, error = truth_and_error(flat, tokens[i : i + 1, n:], PLAIN)
        assert abs(logits[i, n:] - truth[0]).max() <= yardstick(error, "float32"), f"text {i}"


def test_new_cache_is_empty_and_of_the_parameters_kind(backend, dtype):
    """Catches another capacity, dtype or number of layers than the model's."""
    params = on_backend(backend, random_weights(PLAIN), dtype)
    cache = pg.new_cache(params, PLAIN, batch=3)
    assert (cache.position, cache.padding) == (0, None)
    assert len(cache.k) == len(cache.v) == 2
    for buffer in (*cache.k, *cache.v):
        assert backend.shape(buffer) == (3, 4, 48, 8)
        assert backend.dtype_names[buffer.dtype] == dtype
        assert backend.device(buffer) == backend.device(params["wte"])
        assert not backend.to_numpy(buffer).astype(np.float32).any()


@each_form
def test_a_token_beyond_the_room_of_the_cache_is_refused_or_gives_nan(backend, form):
    """Catches a position that is clamped, so that the last row is written over, and the logits of another text."""
    params = on_backend(backend, random_weights(PLAIN))
    step, cache = step_of(backend, form, params, PLAIN), pg.new_cache(params, PLAIN, capacity=2)
    token = backend.from_numpy(np.asarray([[7]], np.int32))
    for position in range(2):
        logits, cache = step(token, cache._replace(position=position))
        assert np.isfinite(backend.to_numpy(logits)).all()
    # A compiled function does not know the position, nor does a recorded one.
    if form == "compiled" and (backend.compiles_per_shape or backend.runs_ahead(params["wte"])):
        logits, _ = step(token, cache._replace(position=2))
        assert np.isnan(backend.to_numpy(logits)).all()
    else:
        with pytest.raises(ValueError, match="1 tokens were given at position 2; the cache has room for 2"):
            step(token, cache._replace(position=2))
