"""The logits of the whole model, against GPT-2 in plain NumPy (`plain_gpt2`).

The largest error is at most 4 times that of the plain formula in float32, scaled by the dtype's unit round-off.
"""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds
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


def form_of_model(backend, form, params, config, monkeypatch):
    """Return a function from tokens to logits: the model as a user calls it, with definitions only, or compiled."""
    if form == "definitions":
        monkeypatch.setattr(type(backend), "kernels", {})
    if form == "compiled":
        return backend.compile(lambda params, tokens: pg.gpt2(params, tokens, config)[0], params)
    return lambda tokens: pg.gpt2(params, tokens, config)[0]


def assert_near(logits, truth, allowed, name, backend, dtype):
    assert backend.dtype_names[logits.dtype] == dtype
    found = backend.to_numpy(logits).astype(np.float64)
    assert found.shape == truth.shape
    ratio = float(abs(found - truth).max() / allowed)
    claims.record(name, backend, dtype, ratio)
    assert ratio <= 1, f"the largest error is {ratio:.3g} times what is allowed"


@pytest.mark.parametrize("form", ["kernels", "definitions", "compiled"])
def test_logits_are_as_near_to_the_truth_as_a_plain_implementation_is(backend, dtype, form, monkeypatch):
    """Catches any mistake in the mathematics or in the wiring of the model: GELU by erf, another epsilon, a scale, a
    bias, q, k and v confused, a residual, ln_f or wpe left out, a mask one column off; in float64, a constant or an
    intermediate result of lower precision; in 16 bits, a mask or a score that overflows; if the function is compiled,
    ids of the first call that are used in the second.
    """
    flat = random_weights(PLAIN)
    logits_of = form_of_model(backend, form, on_backend(backend, flat, dtype), PLAIN, monkeypatch)
    for seed in (1, 2):
        tokens = some_tokens(PLAIN, seed=seed)
        truth, error = truth_and_error(flat, tokens, PLAIN)
        logits = logits_of(backend.from_numpy(tokens))
        assert_near(logits, truth, yardstick(error, dtype), "gpt2", backend, dtype)


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "as published"])
def test_logits_follow_the_configuration(backend, case, monkeypatch):
    """Catches an option of the configuration that is ignored, and shapes that only several heads have."""
    config = CONFIGS[case]
    flat, tokens = random_weights(config), some_tokens(config)
    truth, error = truth_and_error(flat, tokens, config)
    logits = form_of_model(backend, "compiled", on_backend(backend, flat), config, monkeypatch)(
        backend.from_numpy(tokens)
    )
    assert_near(logits, truth, yardstick(error, "float32"), "gpt2", backend, "float32")


def test_no_token_sees_later_tokens(backend):
    """Catches a mask that lets the future through: the logits before a token that changes stay the same to the bit,
    those from it on do not.
    """
    tokens = some_tokens(PLAIN)
    changed = tokens.copy()
    changed[:, 7] = (tokens[:, 7] + 1) % PLAIN.n_vocab
    params = on_backend(backend, random_weights(PLAIN))

    before, after = (backend.to_numpy(pg.gpt2(params, backend.from_numpy(t), PLAIN)[0]) for t in (tokens, changed))

    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(axis=-1).all()


def test_the_texts_of_a_batch_do_not_see_each_other(backend):
    """Catches batch and heads confused in a reshape: a text's logits stay the same to the bit when another changes."""
    tokens = some_tokens(PLAIN)
    changed = tokens.copy()
    changed[1] = some_tokens(PLAIN, batch=1, seed=9)
    params = on_backend(backend, random_weights(PLAIN))

    before, after = (backend.to_numpy(pg.gpt2(params, backend.from_numpy(t), PLAIN)[0]) for t in (tokens, changed))

    np.testing.assert_array_equal(before[0], after[0])
    assert (before[1] != after[1]).any()


@pytest.mark.parametrize("bad", [PLAIN.n_vocab, -1])
@pytest.mark.parametrize("form", ["kernels", "compiled"])
def test_an_id_out_of_range_is_refused_or_gives_nan(backend, form, bad, monkeypatch):
    """Catches an id that is clamped, that counts from the end, or that reads foreign memory: the logits are those of
    another text. The other text of the batch keeps its logits.
    """
    flat, tokens = random_weights(PLAIN), some_tokens(PLAIN)
    logits_of = form_of_model(backend, form, on_backend(backend, flat), PLAIN, monkeypatch)
    tokens[0, 5] = bad
    ids = backend.from_numpy(tokens)
    is_compiled = form == "compiled" and backend.compiles_per_shape
    if backend.peek(ids) is not None and not is_compiled:
        with pytest.raises(ValueError, match=rf"{bad}\b"):
            logits_of(ids)
        return
    logits = backend.to_numpy(logits_of(ids))
    truth, error = truth_and_error(flat, tokens[1:], PLAIN)
    assert np.isnan(logits[0, 5:]).all()
    assert abs(logits[1] - truth[0]).max() <= yardstick(error, "float32")


def test_more_tokens_than_the_model_has_positions_are_refused(backend):
    """Catches a silent clamp at n_ctx."""
    params = on_backend(backend, random_weights(PLAIN))
    with pytest.raises(ValueError, match="49 tokens were given; the model has n_ctx = 48"):
        pg.gpt2(params, backend.from_numpy(some_tokens(PLAIN, seq=49)), PLAIN)


def test_logits_of_every_length_are_as_near_to_the_truth(backend):
    """Catches padding that is seen or returned by `GPT2.logits`, which pads the ids if the backend compiles."""
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=61, n_ctx=70, eos_token_id=None)
    flat, tokens = random_weights(config), some_tokens(config)
    model = pg.GPT2(config, on_backend(backend, flat))
    for n in (1, 63, 64, 65, 70):
        truth, error = truth_and_error(flat, tokens[:, :n], config)
        assert_near(model.logits(tokens[:, :n]), truth, yardstick(error, "float32"), "GPT2.logits", backend, "float32")


INITIAL = pg.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_vocab=500, n_ctx=64, eos_token_id=None)


def test_the_same_seed_initialises_to_the_same_bits_everywhere(backend, dtype, monkeypatch):
    """Catches a conversion that rounds on the device, and a random stream that is the framework's own."""
    drawn, initial = {}, pg.params._initial
    monkeypatch.setattr(pg.params, "_initial", lambda path, *args: drawn.setdefault(path, initial(path, *args)))
    found = dict(pg.params.flatten(pg.init_params(INITIAL, seed=3, backend=backend, dtype=dtype)))
    assert list(found) == list(drawn) == list(pg.params.shapes(INITIAL))
    for path, x in found.items():
        expected, a = drawn[path].astype(bounds.host_dtype(dtype)), backend.to_numpy(x)
        assert backend.dtype_names[x.dtype] == dtype, path
        assert (a.dtype, a.shape) == (expected.dtype, pg.params.shapes(INITIAL)[path]), path
        assert a.tobytes() == expected.tobytes(), path
