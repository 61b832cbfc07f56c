"""Intermediate arrays: each is observed under its name, and observing changes no result."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights, truth_and_error

SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 24, "n_vocab": 61, "n_ctx": 40, "eos_token_id": None}
CONFIG = pg.GPT2Config(**SHAPE, scale_attn_by_inverse_layer_idx=True)  # the weights show which layer's scale they have
WEIGHTS = random_weights(CONFIG)
IDS = np.random.default_rng(0).integers(0, 61, 17).tolist()


@pytest.fixture(scope="module")
def model(backend):
    return pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))


@pytest.fixture(scope="module")
def truth():
    """The trace in float64, on NumPy."""
    double = pg.GPT2(CONFIG, on_backend(pg.get_backend("numpy"), WEIGHTS, "float64"))
    return double.trace(IDS)


def test_names_are_scope_paths_in_the_order_of_computation(model):
    """Catches a layer that is not observed, or under another's name."""
    layers = [name for i in range(3) for name in (f"h{i}/attn/weights", f"h{i}/residual")]
    found = model.trace(IDS)
    assert list(found) == ["embedding", *layers, "ln_f", "logits"]
    shapes = {name: model.backend.shape(x) for name, x in found.items()}
    assert all(pg.backend_of(x) is model.backend for x in found.values())
    assert shapes["h2/attn/weights"] == (1, 2, 17, 17)
    assert shapes["embedding"] == shapes["h1/residual"] == shapes["ln_f"] == (1, 17, 24)
    assert shapes["logits"] == (1, 17, 61)


def test_a_trace_is_equal_on_every_backend(model, truth):
    """Catches a stream that is observed too early or too late, and weights that are not those of their layer."""
    logits, error = truth_and_error(WEIGHTS, np.asarray([IDS]), CONFIG)
    np.testing.assert_allclose(truth["logits"], logits, rtol=0, atol=1e-9)
    for name, x in model.trace(IDS).items():
        # No array of the way errs more than the logits, the last of it, where nothing is larger than they are.
        scale = max(1, abs(truth[name]).max() / abs(logits).max())
        assert abs(model.backend.to_numpy(x) - truth[name]).max() <= 4 * error * scale, name


def test_the_stream_is_what_the_layers_add_up_to(truth):
    """Catches names that are exchanged: the trace is taken apart, and put together by the ops."""
    tree = pg.params.nest(WEIGHTS)
    x = truth["embedding"]
    np.testing.assert_array_equal(x[0], WEIGHTS["wte"][IDS] + WEIGHTS["wpe"][:17])
    for i in range(3):
        block, heads = tree[f"h{i}"], {}
        h = pg.layer_norm(x, **block["ln_1"])
        v = np.split(pg.conv1d(h, **block["attn"]["c_attn"]), 3, axis=-1)[2].reshape(1, 17, 2, 12)
        heads = np.einsum("bhqk,bkhd->bqhd", truth[f"h{i}/attn/weights"], v).reshape(1, 17, 24)
        x = x + pg.conv1d(heads, **block["attn"]["c_proj"])
        x = x + pg.model.mlp(pg.layer_norm(x, **block["ln_2"]), **block["mlp"])
        np.testing.assert_allclose(truth[f"h{i}/residual"], x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(truth["ln_f"], pg.layer_norm(x, **tree["ln_f"]), rtol=0, atol=1e-10)


def test_weights_are_shares_of_what_comes_before(model):
    """Catches scores instead of weights, and a mask that leaks."""
    for i in range(3):
        weights = model.backend.to_numpy(model.trace(IDS)[f"h{i}/attn/weights"])
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert (weights >= 0).all()
        assert (np.triu(weights, 1) == 0).all()


def test_observing_changes_nothing(model):
    """Catches a model that computes otherwise when it is looked at."""
    backend = model.backend
    tokens = backend.from_numpy(np.asarray([IDS], np.int32))
    plain, _ = pg.gpt2(model.params, tokens, CONFIG)
    observed, _ = pg.gpt2(model.params, tokens, CONFIG, observe=lambda name, x: None)
    np.testing.assert_array_equal(backend.to_numpy(plain), backend.to_numpy(observed))


def test_attention_weights_are_computed_only_for_an_observer(model, monkeypatch):
    """Catches scores that are computed twice in every forward pass."""
    computed = []
    weights = pg.model.attention_weights
    monkeypatch.setattr(
        pg.model, "attention_weights", lambda *x, **options: computed.append(0) or weights(*x, **options)
    )
    tokens = model.backend.from_numpy(np.asarray([IDS], np.int32))
    pg.gpt2(model.params, tokens, CONFIG)
    assert not computed
    pg.gpt2(model.params, tokens, CONFIG, observe=lambda name, x: None)
    assert len(computed) == CONFIG.n_layer


def test_a_compiled_model_can_be_observed(model, truth):
    """Catches a hook that works on arrays alone: a compiled function returns the tracers that it observed."""

    def weights(params, tokens):
        found = {}
        pg.gpt2(params, tokens, CONFIG, observe=found.__setitem__)
        return found["h1/attn/weights"]

    step = model.backend.compile(weights, model.params)
    found = model.backend.to_numpy(step(model.backend.from_numpy(np.asarray([IDS], np.int32))))
    np.testing.assert_allclose(found, truth["h1/attn/weights"], atol=1e-4)


def test_what_cannot_be_traced_is_refused(model):
    """Catches a text that is longer than the model reads, and one without a tokenizer."""
    with pytest.raises(ValueError, match="41 tokens were given; the model has n_ctx = 40 positions"):
        model.trace([1] * 41)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.trace("To be")
    with pytest.raises(ValueError, match="no dimension may be 0"):
        model.trace([])
