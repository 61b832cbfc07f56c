"""Names as people's programs write them: wrapped models, training states, nanoGPT's checkpoints."""

import json

import layouts
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import save_file

import portable_gpt2 as pg
from portable_gpt2.checkpoint import convert, read_checkpoint
from portable_gpt2.checkpoint.names import prefix_of

UNTIED = pg.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_vocab=24, n_ctx=8, eos_token_id=None, tie_word_embeddings=False)


def write(directory, tensors, config=tiny.CONFIG):
    layouts.write_config(directory, config)
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, directory / "model.safetensors")
    return directory


def assert_is_tiny(found, config=tiny.CONFIG):
    expected = tiny.weights(config)
    assert list(found.tensors) == list(expected)
    for path, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[path], err_msg=path)


# Prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_module.",
        "_orig_mod.",
        "base_model.",
        "model.",
        "base_model.model.",
        "_orig_mod.module.",
        "module._orig_mod.model.",
        "net.",
        "student.backbone.0.",
        "h.",
        "transformer.",
    ],
)
@pytest.mark.parametrize("inner", ["", "transformer."])
@pytest.mark.parametrize("config", [tiny.CONFIG, UNTIED], ids=["tied", "untied"])
def test_a_prefix_that_all_names_share_is_left_out(tmp_path, prefix, inner, config):
    """Catches a wrapper's name that is not in a list of known ones, and an lm_head that is looked for without it."""
    arrays = tiny.weights(config)
    tensors = {
        prefix + name: a for name, a in layouts.hugging_face_names(arrays, inner).items() if name != "lm_head.weight"
    }
    masks = {f"{prefix}{inner}h.0.attn.bias": np.ones((1, 1, 8, 8), bool)}
    outer = (prefix + inner).removesuffix("transformer.")
    head = {f"{outer}lm_head.weight": arrays["wte"] if config.tie_word_embeddings else arrays["lm_head"]}
    assert_is_tiny(read_checkpoint(write(tmp_path / "it", tensors | masks | head, config)), config)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrapper_in_the_middle_of_names_is_left_out(tmp_path, wrapper):
    """Catches blocks that were compiled, sharded or checkpointed one by one."""
    names = layouts.hugging_face_names(tiny.weights())
    tensors = {f"{wrapper}.{name.replace('.h.0.', f'.h.0.{wrapper}.')}": a for name, a in names.items()}
    assert_is_tiny(read_checkpoint(write(tmp_path / "it", tensors)))


def test_two_names_of_one_parameter_are_refused(tmp_path):
    """Catches a wrapped model and the plain one in one file, of which the last wins."""
    names = layouts.hugging_face_names(tiny.weights())
    tensors = names | {"_orig_mod.transformer.wte.weight": tiny.weights()["wte"] + 1}
    with pytest.raises(pg.CheckpointError, match=r"holds _orig_mod\.t\S+ and transformer\.wte\.weight, which are two"):
        read_checkpoint(write(tmp_path / "it", tensors))


def test_a_prefix_that_some_names_lack_is_refused(tmp_path):
    """Catches a model that is put together from two."""
    names = layouts.hugging_face_names(tiny.weights(), "")
    tensors = {f"module.{name}" if name.startswith("h.1") else name: a for name, a in names.items()}
    with pytest.raises(pg.CheckpointError, match=r"lacks .* and 9 more tensors; holds .* and 9 more tensors instead$"):
        read_checkpoint(write(tmp_path / "it", tensors))
    head = {"lm_head.weight": tiny.weights()["wte"]} | {f"module.{name}": a for name, a in names.items()}
    with pytest.raises(pg.CheckpointError, match=r"holds lm_head\.weight, which a GPT-2 of this config\.json does not"):
        read_checkpoint(write(tmp_path / "it", head))


def test_other_names_are_shown_next_to_those_that_were_expected(tmp_path):
    """Catches a user who is told what is missing and not what is there."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(30)]
    with pytest.raises(pg.CheckpointError) as caught:
        read_checkpoint(write(tmp_path / "it", {name: np.zeros(3, np.float32) for name in names}))
    message = str(caught.value)
    assert "model.safetensors: lacks wpe.weight, wte.weight, h.0.attn.c_attn.weight and 25 more tensors" in message
    assert "; holds model.layers.0.self_attn.q_proj.weight, " in message
    assert message.endswith("and 27 more tensors instead")


def test_the_prefix_is_that_of_most_names():
    """Catches one stray tensor that decides how all the others are read, and a slow search."""
    names = [f"a.h.{i}.ln_1.weight" for i in range(20_000)]
    assert prefix_of([*names, "b.c.wpe.weight"]) == "a."
    assert prefix_of(["x." * 20_000]) is None
    assert prefix_of(["lm_head.weight", "my_wpe.weight", "score.weight"]) is None
    assert prefix_of([]) is None


# Training states


@pytest.fixture
def save(torch, tmp_path):
    """Return a function that saves an object as a file of PyTorch in a directory of its own."""

    def save(state, name="pytorch_model.bin", config=tiny.CONFIG, **options):
        directory = tmp_path / "it"
        directory.mkdir(exist_ok=True)
        if config is not None:
            layouts.write_config(directory, config)
        torch.save(state, directory / name, **options)
        return directory

    return save


@pytest.fixture
def tensors(torch):
    """The tiny model under Hugging Face's names."""
    return {name: torch.from_numpy(a.copy()) for name, a in layouts.hugging_face_names(tiny.weights()).items()}


@pytest.mark.parametrize("key", ["model", "state_dict", "module", "model_state_dict"])
def test_the_model_of_a_training_state_is_read(save, tensors, torch, key):
    """Catches a trainer's own name for the weights, and an optimizer's tensors that are taken for them."""
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    rng = {"cpu": torch.zeros(5, dtype=torch.uint8)}
    state = {key: {f"module.{n}": x for n, x in tensors.items()}, "optimizer": moments, "epoch": 3, "rng": rng}
    assert_is_tiny(read_checkpoint(save(state | {"best": torch.tensor(1.5), "args": {"lr": 0.1, "tags": ["a", None]}})))


def test_two_models_in_a_training_state_are_refused(save, tensors):
    """Catches a moving average that is taken for the model, or the other way round."""
    with pytest.raises(
        pg.CheckpointError, match=r"holds several models, 'model' and 'ema'; save the one that is meant"
    ):
        read_checkpoint(save({"model": tensors, "ema": tensors}))


@pytest.mark.parametrize("state", [{"step": 3}, {"model": {}}, {"model": {"wpe.weight": 1}}, [1], 5, "text", None])
def test_a_training_state_without_a_model_is_refused_by_name(save, tensors, state):
    """Catches an AttributeError, and a number that is taken for a tensor."""
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: holds "):
        read_checkpoint(save(state))
    with pytest.raises(
        pg.CheckpointError, match=r"pytorch_model\.bin: holds 'step', of type int; expected names and t"
    ):
        read_checkpoint(save(tensors | {"step": 3}))


# nanoGPT


NANO = pg.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_vocab=50304, n_ctx=32)
GELU = pytest.mark.filterwarnings("ignore:.*form of GELU")


@GELU
@pytest.mark.parametrize("prefix", ["_orig_mod.", "", "module._orig_mod."])
def test_nanogpt_s_checkpoint_is_read(save, torch, backend, prefix):
    """Catches weights that stay transposed, which nobody sees where they are square, and a file that is not found."""
    arrays = tiny.weights(NANO)
    directory = save(layouts.nanogpt(NANO, arrays, prefix=prefix), "ckpt.pt", config=None)
    for source in (directory, directory / "ckpt.pt"):
        model = pg.GPT2.load(source, backend=backend)
        assert model.config == NANO
        assert model.source == "nanoGPT, ckpt.pt, float32"
    for path, x in pg.params.flatten(model.params):
        np.testing.assert_array_equal(pg.to_numpy(x), arrays[path], err_msg=path)


@GELU
def test_nanogpt_s_model_without_biases_has_biases_of_zero(save, torch):
    """Catches a model that is refused for what it does without, and biases of anything else."""
    arrays = {path: a * (not path.endswith("/b")) for path, a in tiny.weights(NANO).items()}
    found = read_checkpoint(save(layouts.nanogpt(NANO, arrays, bias=False), "ckpt.pt", config=None))
    for path, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), arrays[path], err_msg=path)


@GELU
def test_one_bias_that_is_missing_is_named(save, torch):
    """Catches a bias that was lost and becomes 0."""
    state = layouts.nanogpt(NANO, tiny.weights(NANO))
    del state["model"]["_orig_mod.transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(pg.CheckpointError, match=r"lacks transformer\.h\.1\.attn\.c_attn\.bias$"):
        read_checkpoint(save(state, "ckpt.pt", config=None))


def forward(state, tokens, approximate):
    """Compute logits from nanoGPT's state as its model.py does, with one form of GELU."""
    import torch.nn.functional as F

    args = state["model_args"]
    p = {name.removeprefix("_orig_mod."): x.double() for name, x in state["model"].items()}

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (args["n_embd"],), p[f"{name}.weight"], p.get(f"{name}.bias"), 1e-5)

    b, t = tokens.shape
    x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:t]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(args["n_embd"], dim=2)
        q, k, v = (y.view(b, t, args["n_head"], -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + linear(y, f"{h}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=approximate)
        x = x + linear(y, f"{h}.mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), p["lm_head.weight"]).numpy()


@GELU
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_s_logits_are_ours_but_for_the_form_of_gelu(save, torch, backend, bias):
    """Catches a model that loads and computes something else: the forward pass of nanoGPT's own model.py."""
    state = layouts.nanogpt(NANO, tiny.weights(NANO), bias=bias)
    tokens = np.random.default_rng(0).integers(0, NANO.n_vocab, (2, NANO.n_ctx))
    model = pg.GPT2.load(save(state, "ckpt.pt", config=None), backend=backend)
    logits = pg.to_numpy(model.logits(tokens))
    scale = abs(logits).max()
    assert abs(logits - forward(state, torch.from_numpy(tokens), "tanh")).max() < 1e-5 * scale
    assert 1e-5 * scale < abs(logits - forward(state, torch.from_numpy(tokens), "none")).max() < 1e-2 * scale


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_a_shape_that_no_file_says_is_asked_for(save, torch, name):
    """Catches advice to give nanoGPT's ckpt.pt to somebody who gave one."""
    state = {"model": layouts.nanogpt(NANO, tiny.weights(NANO))["model"]}
    with pytest.raises(
        pg.CheckpointError,
        match=rf"config\.json: no such file, and {name} does not describe the model's shape, as the",
    ):
        read_checkpoint(save(state, name, config=None))


def test_the_form_of_gelu_is_warned_of(save, torch):
    """Catches a model whose logits differ from its own program's, and a user who is not told why."""
    directory = save(layouts.nanogpt(NANO, tiny.weights(NANO)), "ckpt.pt", config=None)
    with pytest.warns(UserWarning, match=r"ckpt\.pt: does not say which form of GELU it was trained with"):
        read_checkpoint(directory)


@GELU
def test_nanogpt_s_checkpoint_is_converted_for_transformers(save, torch, tmp_path):
    """Catches a conversion that only we read."""
    state = layouts.nanogpt(NANO, tiny.weights(NANO), bias=False)
    convert(save(state, "ckpt.pt", config=None), tmp_path / "out")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, NANO.n_vocab, (2, NANO.n_ctx)))
    with torch.no_grad():
        logits = theirs.double().eval()(tokens).logits.numpy()
    np.testing.assert_allclose(logits, forward(state, tokens, "tanh"), rtol=1e-4, atol=1e-4 * abs(logits).max())
    assert read_checkpoint(tmp_path / "out").config == NANO  # GPT-2's <|endoftext|> among its ids


@GELU
def test_nanogpt_s_padded_vocabulary_goes_with_a_smaller_tokenizer(save, torch):
    """Catches ids beyond the tokenizer's that cannot be decoded, and an end that is not the tokenizer's."""
    directory = save(layouts.nanogpt(NANO, tiny.weights(NANO)), "ckpt.pt", config=None)
    tiny.write_tokenizer(directory)
    model = pg.GPT2.load(directory, backend="numpy")
    assert model.config.eos_token_id == model.tokenizer.end_of_text == 0
    assert isinstance(model.generate("To be", max_new_tokens=20, seed=1), str)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n_head": None}, "n_head is missing; expected n_layer, n_head"),
        ({"n_head": 3}, "n_embd is 16, which n_head = 3 does not divide"),
        ({"n_layer": "2"}, "n_layer is '2'; expected an int of at least 1"),
        ({"use_rmsnorm": True}, "use_rmsnorm is True, which is not an entry of nanoGPT's model"),
        ({"n_kv_head": 1}, "n_kv_head is 1, which is not"),
    ],
)
def test_model_args_that_are_not_nanogpt_s_are_refused_by_name(save, torch, change, why):
    """Catches another architecture under nanoGPT's names, and an entry that is guessed."""
    state = layouts.nanogpt(NANO, tiny.weights(NANO))
    args = state["model_args"] | change
    state["model_args"] = {name: value for name, value in args.items() if value is not None}
    with pytest.raises(pg.CheckpointError, match=rf"ckpt\.pt: model_args: {why}"):
        read_checkpoint(save(state, "ckpt.pt", config=None))
    state["model_args"] = [1]
    with pytest.raises(pg.CheckpointError, match=r"ckpt\.pt: model_args: expected a dict; got list"):
        read_checkpoint(save(state, "ckpt.pt", config=None))


@GELU
def test_config_json_may_not_contradict_model_args(save, torch):
    """Catches a number of heads that no shape shows."""
    config = {**NANO.to_dict(), "n_head": 4}
    directory = save(layouts.nanogpt(NANO, tiny.weights(NANO)), "ckpt.pt", config=NANO)
    assert read_checkpoint(directory).config == NANO
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(pg.CheckpointError, match=r"model_args make n_head 2; config\.json makes it 4"):
        read_checkpoint(directory)


@GELU
def test_only_the_state_of_nanogpt_is_read_transposed(save, torch):
    """Catches square matrices that are transposed because one that is not square looks so."""
    state = layouts.nanogpt(NANO, tiny.weights(NANO))
    with pytest.raises(
        pg.CheckpointError, match=r"c_attn\.weight has shape \[48, 16\]; config\.json requires \[16, 48\]"
    ):
        read_checkpoint(save(state["model"], config=NANO))


def test_a_file_that_holds_no_configuration_needs_one(save, tensors):
    """Catches a KeyError, and a message that does not say what a directory holds."""
    with pytest.raises(
        pg.CheckpointError, match=r"config\.json: no such file, and ckpt\.pt does not describe the model's shape"
    ):
        read_checkpoint(save({"model": tensors}, "ckpt.pt", config=None))


def test_a_file_of_weights_may_be_named(save, tensors, tmp_path):
    """Catches a file that is refused where its directory is not, and another one in it that is read."""
    directory = save(tensors)
    write(directory, {name: a + 1 for name, a in layouts.hugging_face_names(tiny.weights()).items()})
    assert_is_tiny(read_checkpoint(directory / "pytorch_model.bin"))
    found = read_checkpoint(directory / "model.safetensors")
    np.testing.assert_array_equal(found.tensors["wpe"].read(), tiny.weights()["wpe"] + 1)
