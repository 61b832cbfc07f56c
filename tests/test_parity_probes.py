"""Probes of transformers' and of KerasHub's GPT-2: every result that is reported is the one that the model computed."""

import dataclasses
import sys

import hypothesis
import numpy as np
import ported
import pytest
import truth

import portable_gpt2 as pg
from portable_gpt2.checkpoint.names import prefixed_name
from portable_gpt2.comparison.compare import compare, judged
from portable_gpt2.comparison.sides import open_side
from portable_gpt2.model import observed_names
from portable_gpt2.numerics import stated
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights, some_tokens

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

THOROUGH = hypothesis.settings.get_current_profile_name().endswith("thorough")
CONFIG = pg.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_vocab=101, n_ctx=16, n_inner=40, eos_token_id=None)
BY_LAYER = dataclasses.replace(CONFIG, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=0.02)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
TOKENS = some_tokens(CONFIG, 1, 12).astype(np.int64)
SCORES = {"h0/attn/scores", "h1/attn/scores"}
WEIGHTS = {"h0/attn/weights", "h1/attn/weights"}


def assert_right(trace, weights, config):
    """Check each result against plain NumPy in float64 and its op's bound, and the parameters to the bit."""
    truth.assert_near(trace, weights, config)
    assert trace.weights.keys() == weights.keys()
    for path, a in weights.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a, err_msg=path)
        assert trace.weights[path].shape == a.shape
    assert trace.config == config
    ops, missing = judged(trace, config, trace.weights)
    assert len(ops) + len(missing) == len(observed_names(config))
    assert {name for name in missing if name in trace.arrays} == set()
    assert [finding for finding in ops if not finding.ratio <= 1] == []
    assert trace.tokens.tolist() == TOKENS.tolist()


def hugging_face(config, attention="eager", kind="GPT2LMHeadModel", weights=None):
    entries = {**config.to_dict(), "architectures": None, "attn_implementation": attention}
    model = getattr(transformers, kind)(transformers.GPT2Config(**entries))
    weights = weights or random_weights(config)
    state = {prefixed_name(path): torch.from_numpy(a).float() for path, a in weights.items()}
    if kind == "GPT2Model":
        state = {name.removeprefix("transformer."): x for name, x in state.items()}
    elif config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_raises_no_alarm(attention):
    """Catches a bound that transformers exceeds in float32: its order of computation is not ours."""
    for config, weights, tokens in ported.right_models(60 if THOROUGH else 1):
        a = pg.GPT2(config, on_backend(pg.get_backend("numpy"), weights))
        b = hugging_face(config, attention, weights=weights)
        ported.assert_no_alarm(compare(a, b, tokens[0]), missing=("scores", "weights"))


@pytest.mark.parametrize("config", [CONFIG, BY_LAYER, UNTIED], ids=["plain", "by layer", "untied"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_gpt2_is_traced(config, attention):
    """Catches a result under another's name, and weights that are those of another kernel than the one that ran."""
    trace = open_side(hugging_face(config, attention)).run(TOKENS)
    unseen = SCORES if attention == "eager" else SCORES | WEIGHTS
    assert list(trace.arrays) == [name for name in observed_names(config) if name not in unseen]
    assert_right(trace, random_weights(config), config)
    assert trace.source == "transformers's GPT2LMHeadModel on torch, cpu, float32"
    assert trace.numerics == stated(pg.get_backend("torch"), "float32")


EACH_STEP = "each elementary step of GELU is rounded to bfloat16"


def guesses(trace):
    """Return the cause of each op beyond its bound; those of attention that follow from the weights are left out."""
    found = [op for op in judged(trace, trace.config, trace.weights)[0] if not op.within]
    return {op.name.partition("/")[2]: op.guess for op in found if "it follows from" not in op.guess}


def test_the_roundings_of_transformers_in_bfloat16_are_named():
    """Catches an op that rounds more often than it has to, and is called wrong without the reason."""
    model = hugging_face(CONFIG).to(torch.bfloat16)
    cause = "the scores are rounded to bfloat16 before and after the scale"
    assert guesses(open_side(model).run(TOKENS)) == {"attn/weights": cause, "mlp/gelu": EACH_STEP}


def test_a_model_without_a_head_is_traced():
    """Catches names that are expected to have a prefix, and logits that nobody computed."""
    trace = open_side(hugging_face(CONFIG, kind="GPT2Model")).run(TOKENS)
    assert list(trace.arrays) == [name for name in observed_names(CONFIG) if name not in {*SCORES, "logits"}]
    assert_right(trace, random_weights(CONFIG), CONFIG)


def test_another_form_of_gelu_is_traced_and_not_refused():
    """Catches a model that cannot be compared because it differs from GPT-2, which is what a comparison is to show."""
    model = hugging_face(CONFIG)
    expected = open_side(model).run(TOKENS)
    model.config.activation_function = "gelu"
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU().eval()
    found = open_side(model).run(TOKENS)
    assert found.config == expected.config
    assert np.array_equal(found.arrays["h0/mlp/c_fc"], expected.arrays["h0/mlp/c_fc"])
    assert not np.array_equal(found.arrays["h0/mlp/gelu"], expected.arrays["h0/mlp/gelu"])


def test_transformers_own_hooks_are_left_alone():
    """Catches hooks of the model that are removed with ours: transformers records its own outputs by hooks."""
    model = hugging_face(CONFIG)
    ids = torch.from_numpy(TOKENS)
    before = model(ids, output_attentions=True, output_hidden_states=True)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    trace = open_side(model).run(TOKENS)
    after = model(ids, output_attentions=True, output_hidden_states=True)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    for i in range(2):
        np.testing.assert_array_equal(trace.arrays[f"h{i}/attn/weights"], before.attentions[i].detach().numpy())
        assert torch.equal(before.attentions[i], after.attentions[i])
    np.testing.assert_array_equal(trace.arrays["h0/residual"], before.hidden_states[1].detach().numpy())


def test_a_model_in_training_mode_is_refused():
    """Catches results with dropout in them: transformers' models have 0.1 unless told otherwise."""
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel is in training mode, in which dropout changes the results; c"
    ):
        open_side(hugging_face(CONFIG).train()).run(TOKENS)


# KerasHub


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip("keras_hub")


def keras_gpt2(keras_hub, dropout=0.1, dtype="float32", config=CONFIG, weights=None):
    """Return KerasHub's model of random weights."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=config.n_vocab,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        hidden_dim=config.n_embd,
        intermediate_dim=config.n_hidden,
        max_sequence_length=config.n_ctx,
        dropout=dropout,
        dtype=dtype,
    )
    weights, d = weights or random_weights(config), config.head_size
    backbone.token_embedding.set_weights([weights["wte"]])
    backbone.position_embedding.set_weights([weights["wpe"]])
    for i, layer in enumerate(backbone.transformer_layers):
        p = {path.removeprefix(f"h{i}/"): a for path, a in weights.items() if path.startswith(f"h{i}/")}
        attention = layer._self_attention_layer
        for part, w, b in zip(
            (attention.query_dense, attention.key_dense, attention.value_dense),
            np.split(p["attn/c_attn/w"], 3, axis=-1),
            np.split(p["attn/c_attn/b"], 3),
            strict=True,
        ):
            part.set_weights([w.reshape(-1, config.n_head, d), b.reshape(config.n_head, d)])
        attention.output_dense.set_weights([p["attn/c_proj/w"].reshape(config.n_head, d, -1), p["attn/c_proj/b"]])
        layer._self_attention_layer_norm.set_weights([p["ln_1/g"], p["ln_1/b"]])
        layer._feedforward_layer_norm.set_weights([p["ln_2/g"], p["ln_2/b"]])
        layer._feedforward_intermediate_dense.set_weights([p["mlp/c_fc/w"], p["mlp/c_fc/b"]])
        layer._feedforward_output_dense.set_weights([p["mlp/c_proj/w"], p["mlp/c_proj/b"]])
    backbone.layer_norm.set_weights([weights["ln_f/g"], weights["ln_f/b"]])
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_keras_hub_s_gpt2_is_traced(keras_hub, dropout):
    """Catches a result under another's name, heads in another order, and dropout where the model has none."""
    model = keras_gpt2(keras_hub, dropout)
    trace = open_side(model).run(TOKENS)
    unseen = SCORES if dropout else SCORES | WEIGHTS
    assert list(trace.arrays) == [name for name in observed_names(CONFIG) if name not in unseen]
    assert_right(trace, random_weights(CONFIG), CONFIG)
    logits = model({"token_ids": TOKENS.astype(np.int32), "padding_mask": np.ones((1, 12), np.int32)})
    np.testing.assert_array_equal(trace.arrays["logits"], pg.to_numpy(logits))
    if dropout:
        backbone = open_side(model.backbone).run(TOKENS)
        assert list(backbone.arrays) == [name for name in trace.arrays if name != "logits"]
        for name, x in backbone.arrays.items():
            np.testing.assert_array_equal(x, trace.arrays[name], err_msg=name)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis 3")
def test_keras_hub_raises_no_alarm(keras_hub, dropout):
    """Catches a bound that KerasHub exceeds in float32."""
    for config, weights, tokens in ported.right_models(30 if THOROUGH else 1, options=False):
        a = pg.GPT2(config, on_backend(pg.get_backend("numpy"), weights))
        b = keras_gpt2(keras_hub, dropout, config=config, weights=weights)
        ported.assert_no_alarm(compare(a, b, tokens[0]), missing=("scores", "weights"))


def test_what_keras_sublayers_do_not_reproduce_is_left_out(keras_hub, monkeypatch):
    """Catches results of a layer that computes something else than its sublayers in their usual order."""
    model = keras_gpt2(keras_hub)
    layer = model.backbone.transformer_layers[1]
    call = type(layer).call
    monkeypatch.setattr(type(layer), "call", lambda self, x, **kwargs: call(self, x, **kwargs) + (self is layer) * x)
    found = open_side(model.backbone).run(TOKENS).arrays
    assert [name for name in found if name.startswith("h1")] == ["h1/residual"]
    assert "h0/mlp/c_fc" in found


# What KerasHub rounds to bfloat16 depends on the backend of Keras, and on its kernels if the model has no dropout.
SCALED = "the scaled q and the scores are rounded to bfloat16"
IN_BFLOAT16 = {
    ("tensorflow", 0.1): {"attn/weights": SCALED, "mlp/gelu": EACH_STEP},
    ("tensorflow", 0.0): {
        "attn/attention": "the scores are rounded to bfloat16 before the scale",
        "mlp/gelu": EACH_STEP,
    },
    ("jax", 0.1): {"attn/weights": f"{SCALED}, and so is each step of softmax", "mlp/gelu": EACH_STEP},
    ("jax", 0.0): {"mlp/gelu": EACH_STEP},
    ("torch", 0.1): {"attn/weights": SCALED},
    ("torch", 0.0): {},
}


def rounds_once():
    """Return whether TensorFlow rounds a product of bfloat16 matrices once, which depends on the processor."""
    import tensorflow as tf

    a, b = (tf.cast(np.random.default_rng(i).standard_normal((32, 32)), tf.bfloat16) for i in range(2))
    exact = tf.cast(a, tf.float64) @ tf.cast(b, tf.float64)
    return bool(tf.reduce_all(abs(tf.cast(a @ b, tf.float64) - exact) <= 2**-8.9 * abs(exact) + 1e-4))


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_keras_hub_in_bfloat16_is_traced_and_explained(keras_hub, dropout):
    """Catches arrays of bfloat16 that NumPy cannot take, a dtype that is not that of the computation, and a kernel of
    TensorFlow that is called wrong without the reason.
    """
    trace = open_side(keras_gpt2(keras_hub, dropout, dtype="bfloat16")).run(TOKENS)
    engine = sys.modules["keras"].backend.backend()
    if engine == "tensorflow" and not rounds_once():
        assert {"attn/c_attn", "mlp/c_fc"} <= guesses(trace).keys()
    else:
        assert guesses(trace) == IN_BFLOAT16[engine, dropout]
    assert trace.dtype == "bfloat16"
    assert {x.dtype.name for x in trace.arrays.values()} == {"bfloat16"}
    assert trace.weights["h0/attn/c_attn/w"].read().dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("token", "n", "why"), [(2**32, 3, "is not in the vocabulary"), (1, 17, "n_ctx = 16 positions")]
)
def test_tokens_that_keras_hub_cannot_read_are_refused(keras_hub, token, n, why):
    """Catches an id that wraps around to another one, and a framework's own words for a text that is too long."""
    with pytest.raises(ValueError, match=why):
        open_side(keras_gpt2(keras_hub)).run(np.full((1, n), token))


def test_names_of_modules_are_not_for_keras_hub(keras_hub):
    """Catches an argument that is ignored."""
    with pytest.raises(ValueError, match="GPT2CausalLM has names and a configuration of its own; leave names and conf"):
        pg.probe(keras_gpt2(keras_hub), {"x": "logits"})
