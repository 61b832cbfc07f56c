"""Intermediate arrays: each is observed under its name, and observing changes no result."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.plain_gpt2 import on_backend, plain_gpt2, random_weights, truth_and_error, yardstick

pytestmark = pytest.mark.every_device

# With a scale for each layer, the weights show which layer they belong to.
CONFIG = pg.GPT2Config(
    n_layer=3, n_head=2, n_embd=24, n_vocab=61, n_ctx=40, scale_attn_by_inverse_layer_idx=True, eos_token_id=None
)
WEIGHTS = random_weights(CONFIG)
IDS = np.random.default_rng(0).integers(0, 61, 17).tolist()


@pytest.fixture(scope="module")
def model(backend):
    return pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))


@pytest.fixture(scope="module")
def truth():
    """The intermediate arrays of plain NumPy in float64, by name."""
    found = {}
    plain_gpt2(WEIGHTS, np.asarray([IDS]), CONFIG, found.__setitem__)
    return found


def test_names_are_scope_paths_in_the_order_of_computation(model, truth):
    """Catches a layer that is not observed, or under another's name."""
    found = model.trace(IDS)
    assert list(found) == list(truth) == pg.model.observed_names(CONFIG)
    assert all(pg.backend_of(x) is pg.backend_of(model.params["wte"]) for x in found.values())
    assert {name: model.backend.shape(x) for name, x in found.items()} == {name: x.shape for name, x in truth.items()}


def test_a_trace_is_that_of_a_plain_implementation(model, truth):
    """Catches a stream that is observed too early or too late, weights that are not those of their layer, and scores
    instead of weights.
    """
    _, error = truth_and_error(WEIGHTS, np.asarray([IDS]), CONFIG)
    for name, x in model.trace(IDS).items():
        # No array before the logits errs more than the logits, unless it has larger elements.
        expected, found = truth[name], model.backend.to_numpy(x)
        if name.endswith("scores"):  # hidden scores
            assert (found[expected == -np.inf] == -np.inf).all()
            expected, found = (np.where(truth[name] == -np.inf, 0, a) for a in (expected, found))
        scale = max(1, abs(expected).max() / abs(truth["logits"]).max())
        assert abs(found - expected).max() <= yardstick(error, "float32") * scale, name
        if name.endswith("weights"):
            np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
            assert (found >= 0).all()
            assert (np.triu(found, 1) == 0).all()


def test_observing_changes_nothing(model, backend):
    """Catches a model that computes otherwise when it is looked at."""
    tokens = backend.from_numpy(np.asarray([IDS], np.int32))
    plain, _ = pg.gpt2(model.params, tokens, CONFIG)
    observed, _ = pg.gpt2(model.params, tokens, CONFIG, observe=lambda name, x: None)
    np.testing.assert_array_equal(backend.to_numpy(plain), backend.to_numpy(observed))


def test_the_observed_weights_of_a_padded_text_are_those_that_it_has_alone(model, backend):
    """Catches scores and weights that are observed without the mask of the cache."""
    text, observed, alone = IDS[:3], {}, {}
    _, error = truth_and_error(WEIGHTS, np.asarray([text]), CONFIG)
    plain_gpt2(WEIGHTS, np.asarray([text]), CONFIG, alone.__setitem__)
    tokens = backend.from_numpy(np.asarray([[0, 0, *text], IDS[:5]], np.int32))
    cache = pg.new_cache(model.params, CONFIG, batch=2, padding=[2, 0])
    pg.gpt2(model.params, tokens, CONFIG, cache, observe=observed.__setitem__)
    for i in range(CONFIG.n_layer):
        scores, weights = (backend.to_numpy(observed[f"h{i}/attn/{name}"])[0, :, 2:] for name in ("scores", "weights"))
        assert (scores[..., :2] == -np.inf).all()
        assert abs(weights[..., 2:] - alone[f"h{i}/attn/weights"]).max() <= yardstick(error, "float32")


def test_attention_weights_are_computed_only_for_an_observer(model, backend, monkeypatch):
    """Catches scores that are computed twice in every forward pass."""
    computed = []
    weights = pg.model.attention_weights
    monkeypatch.setattr(
        pg.model, "attention_weights", lambda *x, **options: computed.append(0) or weights(*x, **options)
    )
    tokens = backend.from_numpy(np.asarray([IDS], np.int32))
    pg.gpt2(model.params, tokens, CONFIG)
    assert not computed
    pg.gpt2(model.params, tokens, CONFIG, observe=lambda name, x: None)
    assert len(computed) == CONFIG.n_layer


def test_only_the_chosen_results_are_kept(model):
    """Catches patterns that choose other names, another order, and names that are kept from an earlier call."""
    assert list(model.trace(IDS, names=["logits", "h?/mlp/gelu"])) == [*(f"h{i}/mlp/gelu" for i in range(3)), "logits"]
    assert list(model.trace(IDS, names=["h1/*/residual"])) == ["h1/attn/residual"]
