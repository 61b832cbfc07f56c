"""Checkpoints: read as they stand in the file, written whole or not at all, refused by the name of what is wrong."""

import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import portable_gpt2 as pg
from portable_gpt2 import checkpoint
from portable_gpt2.checkpoint import hugging_face_name, writing
from portable_gpt2.host import StoredTensor
from portable_gpt2.params import flatten, shapes

# One layer, one head, n_inner = n_embd = n_ctx: many matrices are square, so that a transposed one has the right shape.
CONFIG = pg.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_vocab=24, n_ctx=8, n_inner=8, eos_token_id=0)

NAMES = {  # as transformers' GPT2Model calls them
    "wpe": "wpe.weight",
    "wte": "wte.weight",
    "h0/attn/c_attn/w": "h.0.attn.c_attn.weight",
    "h0/attn/c_attn/b": "h.0.attn.c_attn.bias",
    "h0/attn/c_proj/w": "h.0.attn.c_proj.weight",
    "h0/attn/c_proj/b": "h.0.attn.c_proj.bias",
    "h0/mlp/c_fc/w": "h.0.mlp.c_fc.weight",
    "h0/mlp/c_fc/b": "h.0.mlp.c_fc.bias",
    "h0/mlp/c_proj/w": "h.0.mlp.c_proj.weight",
    "h0/mlp/c_proj/b": "h.0.mlp.c_proj.bias",
    "h0/ln_1/g": "h.0.ln_1.weight",
    "h0/ln_1/b": "h.0.ln_1.bias",
    "h0/ln_2/g": "h.0.ln_2.weight",
    "h0/ln_2/b": "h.0.ln_2.bias",
    "ln_f/g": "ln_f.weight",
    "ln_f/b": "ln_f.bias",
}

ENTRIES = {  # the least that config.json must say
    "model_type": "gpt2",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "n_inner": 8,
    "vocab_size": 24,
    "n_positions": 8,
    "eos_token_id": 0,
}

HOST_DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

WEIGHTS = tiny.weights(CONFIG)


def named(prefix="", dtype=np.float32):
    """Return the weights under Hugging Face's names."""
    return {f"{prefix}{NAMES[path]}": a.astype(dtype) for path, a in WEIGHTS.items()}


def write(directory, tensors=None, **entries):
    """Write a checkpoint as another program would; an entry of None is left out of config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in (ENTRIES | entries).items() if v is not None}))
    save_file(named() if tensors is None else tensors, directory / "model.safetensors")
    return directory


def write_raw(directory, header, data):
    """Write model.safetensors from its header, in whatever state, and its bytes."""
    write(directory)
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return directory


def read_checkpoint(directory):
    """Return the configuration and all tensors, read."""
    found = checkpoint.read_checkpoint(directory)
    return found.config, {path: tensor.read() for path, tensor in found.tensors.items()}


def write_checkpoint(directory, config, arrays, *more, **options):
    """Write arrays that are in memory."""
    tensors = {path: StoredTensor(a.shape, a.dtype.name, lambda a=a: a) for path, a in arrays.items()}
    checkpoint.write_checkpoint(directory, config, tensors, *more, **options)


def assert_holds_the_weights(tensors, dtype=np.float32):
    assert list(tensors) == list(WEIGHTS)
    for path, a in WEIGHTS.items():
        assert tensors[path].dtype == dtype
        np.testing.assert_array_equal(tensors[path], a.astype(dtype), err_msg=path)


# Reading


def test_every_parameter_has_hugging_face_s_name():
    """Catches a name that only our own writer and reader agree on."""
    assert {path: hugging_face_name(path) for path in shapes(CONFIG)} == NAMES
    assert hugging_face_name("h47/mlp/c_proj/w") == "h.47.mlp.c_proj.weight"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_tensors_are_read_as_they_stand_in_the_file(tmp_path, prefix):
    """Catches weights read transposed (most are square here), swapped, or found under one prefix only."""
    config, tensors = read_checkpoint(write(tmp_path / "it", named(prefix)))
    assert config == CONFIG
    assert_holds_the_weights(tensors)


@pytest.mark.parametrize("dtype", HOST_DTYPES.values())
def test_tensors_keep_the_dtype_of_the_file(tmp_path, dtype):
    """Catches 16-bit files that are misread, or widened where they need not be."""
    _, tensors = read_checkpoint(write(tmp_path / "it", named(dtype=dtype)))
    assert_holds_the_weights(tensors, dtype)


@pytest.mark.parametrize("shift", range(8))
def test_tensors_may_start_anywhere_in_the_file(tmp_path, shift):
    """Catches unaligned arrays, which some frameworks refuse and others read slowly or wrongly."""
    header, data = {}, b""
    for name, a in named().items():
        header[name] = {"dtype": "F32", "shape": a.shape, "data_offsets": [len(data), len(data) + a.nbytes]}
        data += a.tobytes()
    text = json.dumps(header).encode()
    _, tensors = read_checkpoint(write_raw(tmp_path / "it", text + b" " * (-len(text) % 8 + shift), data))
    assert_holds_the_weights(tensors)
    assert all(a.flags.aligned for a in tensors.values())


def test_tensors_are_read_one_by_one_into_memory_of_their_own(tmp_path):
    """Catches a loader that needs the memory twice, or takes the time to read what is not used."""
    tensors = checkpoint.read_checkpoint(write(tmp_path / "it")).tensors
    arrays = [tensor.read() for tensor in tensors.values()]
    for a in arrays:
        while isinstance(a, np.ndarray) and a.base is not None:
            a = a.base
        assert isinstance(a, np.ndarray)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    """Catches a SIGBUS, which ends the process: a mapped file that is truncated has no pages any more."""
    file = write(tmp_path / "it") / "model.safetensors"
    tensors = checkpoint.read_checkpoint(tmp_path / "it").tensors
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(pg.CheckpointError, match=r"model.safetensors: .*: EOFError: the file ends 8 bytes too early"):
        [tensor.read() for tensor in tensors.values()]


def test_what_is_written_to_a_tensor_does_not_reach_the_file(tmp_path):
    """Catches a training step that spoils the checkpoint it started from."""
    directory = write(tmp_path / "it")
    before = (directory / "model.safetensors").read_bytes()
    _, tensors = read_checkpoint(directory)
    for a in tensors.values():
        a[...] = 0
    assert (directory / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32, np.float16])
def test_the_buffers_of_masks_are_dropped(tmp_path, prefix, dtype):
    """Catches files of transformers before 4.31, which hold them, being refused; the hub's gpt2 is one."""
    masks = {
        f"{prefix}h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), dtype)),
        f"{prefix}h.0.attn.masked_bias": np.asarray(-1e4).astype(dtype),
    }
    _, tensors = read_checkpoint(write(tmp_path / "it", named(prefix) | masks))
    assert_holds_the_weights(tensors)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_lm_head_that_is_wte_is_dropped(tmp_path, prefix, dtype):
    """Catches files that hold the tied weights twice being refused."""
    tensors = named(prefix, dtype)
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].copy()
    assert_holds_the_weights(read_checkpoint(write(tmp_path / "it", tensors))[1], dtype)


@pytest.mark.parametrize("change", [lambda w: w + (np.arange(24) == 23)[:, None], lambda w: w[:-1], lambda w: w.T])
def test_an_lm_head_that_is_not_wte_is_refused(tmp_path, change):
    """Catches an untied model giving the logits of another one."""
    head = np.ascontiguousarray(change(WEIGHTS["wte"])).astype(np.float32)
    with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: lm_head\.weight differs from wte\.weight"):
        read_checkpoint(write(tmp_path / "it", named("transformer.") | {"lm_head.weight": head}))


# What config.json says

HUB = """{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
  "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
  "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
  "summary_type": "cls_index", "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257
}"""


def test_the_published_config_json_is_read():
    """Catches the one file that most people have being refused."""
    assert pg.GPT2Config.from_dict(json.loads(HUB)) == pg.GPT2Config.published("gpt2") == pg.GPT2Config()


HONOURED = [  # entries, and what they make of CONFIG
    ({"layer_norm_epsilon": 0.1}, {"layer_norm_epsilon": 0.1}),
    ({"scale_attn_weights": False}, {"scale_attn_weights": False}),
    ({"n_layer": 2, "scale_attn_by_inverse_layer_idx": True}, {"n_layer": 2, "scale_attn_by_inverse_layer_idx": True}),
    ({"n_inner": 12}, {"n_inner": 12}),
    ({"n_inner": None}, {"n_inner": None}),
    ({"n_head": 4}, {"n_head": 4}),
    ({"n_head": None, "num_attention_heads": 2}, {"n_head": 2}),
    ({"n_layer": None, "num_hidden_layers": 2}, {"n_layer": 2}),
    ({"n_embd": None, "hidden_size": 4}, {"n_embd": 4}),
    ({"n_positions": 16}, {"n_ctx": 16}),
    ({"n_positions": None, "n_ctx": 16}, {"n_ctx": 16}),
    ({"n_positions": None, "max_position_embeddings": 16}, {"n_ctx": 16}),
    ({"eos_token_id": 23}, {"eos_token_id": 23}),
    ({"eos_token_id": [5, 7]}, {"eos_token_id": (5, 7)}),
    ({"eos_token_id": [5, 50256]}, {"eos_token_id": 5}),
    ({"bos_token_id": 5}, {"bos_token_id": 5}),
    ({"pad_token_id": 3}, {"pad_token_id": 3}),
    ({"eos_token_id": 50256}, {"eos_token_id": None}),  # what a small vocabulary has left of the default
]


@pytest.mark.parametrize(("entries", "fields"), HONOURED)
def test_an_entry_that_changes_the_mathematics_is_honoured(tmp_path, entries, fields):
    """Catches an entry that is read and forgotten: the logits of that model differ from those of the default."""
    config = pg.GPT2Config(**{**vars(CONFIG), **fields})
    weights = tiny.weights(config)
    directory = write(tmp_path / "it", {hugging_face_name(path): a for path, a in weights.items()}, **entries)
    model = pg.GPT2.load(directory, backend="numpy")
    assert model.config == config
    expected, _ = pg.gpt2(pg.params.nest(weights), np.asarray([[3, 1, 2]]), config)
    np.testing.assert_allclose(model.logits([[3, 1, 2]]), expected, rtol=1e-5, atol=1e-6)
    if fields.keys() & {"layer_norm_epsilon", "scale_attn_weights", "n_head"}:  # the weights fit the default too
        default, _ = pg.gpt2(pg.params.nest(weights), np.asarray([[3, 1, 2]]), CONFIG)
        assert abs(default - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu_pytorch_tanh"),  # the tanh form of GELU by its other names
        ("activation_function", "gelu_fast"),
        ("reorder_and_upcast_attn", True),  # it changes float16 only, where attention is in float32 here in any case
        ("reorder_and_upcast_attn", False),
        ("add_cross_attention", False),
        ("tie_word_embeddings", True),
        ("n_ctx", 8),
        ("hidden_size", 8),
        ("pruned_heads", {}),
        ("architectures", ["GPT2Model"]),
        ("resid_pdrop", 0.5),
        ("attn_pdrop", 0.5),
        ("embd_pdrop", 0.5),
        ("summary_type", "cls_index"),
        ("task_specific_params", {"text-generation": {"do_sample": True, "temperature": 2.0}}),
        ("torch_dtype", "float16"),
        ("transformers_version", "5.23.0"),
        ("use_cache", False),
        ("pad_token_id", 50257),  # [PAD] was added, and the model was not resized
        ("bos_token_id", 0),
        ("id2label", {"0": "LABEL_0"}),
        ("an_entry_of_next_year", [1, 2]),
    ],
)
def test_an_entry_that_changes_nothing_is_accepted(tmp_path, name, value):
    """Catches a checkpoint that is refused for what describes it, its training, or another task."""
    assert read_checkpoint(write(tmp_path / "it", **{name: value}))[0] == CONFIG


REFUSED = [  # entry, its value, what the message says besides
    ("activation_function", "gelu", "tanh form"),
    ("activation_function", "relu", "tanh form"),
    ("activation_function", ["gelu_new"], "tanh form"),
    ("add_cross_attention", True, "decoder-only"),
    ("tie_word_embeddings", 0, "expected true or false"),
    ("reorder_and_upcast_attn", "yes", "true or false"),
    ("pruned_heads", {"0": [1]}, "not supported"),
    ("quantization_config", {"bits": 4}, "not supported"),
    ("is_encoder_decoder", True, "decoder"),
    ("model_type", "llama", "expected 'gpt2'"),
    ("model_type", 3, "expected 'gpt2'"),
    ("n_layer", "1", "expected an int of at least 1"),
    ("n_layer", 0, "expected an int of at least 1"),
    ("n_layer", -1, "expected an int of at least 1"),
    ("n_layer", 1.0, "expected an int of at least 1"),
    ("n_layer", True, "expected an int of at least 1"),
    ("n_layer", [1], "expected an int of at least 1"),
    ("n_head", 3, "does not divide"),
    ("n_head", "1", "expected an int of at least 1"),
    ("n_embd", {}, "expected an int of at least 1"),
    ("n_inner", 8.0, "expected an int of at least 1"),
    ("n_inner", 0, "expected an int of at least 1"),
    ("layer_norm_epsilon", "1e-5", "expected a number"),
    ("layer_norm_epsilon", -1e-5, "expected a number"),
    ("layer_norm_epsilon", math.nan, "expected a number"),
    ("layer_norm_epsilon", math.inf, "expected a number"),
    ("layer_norm_epsilon", True, "expected a number"),
    ("scale_attn_weights", 1, "expected true or false"),
    ("scale_attn_weights", "false", "expected true or false"),
    ("scale_attn_by_inverse_layer_idx", "true", "expected true or false"),
    ("eos_token_id", "0", "expected an int from 0 to 23 (an id of the vocabulary)"),
    ("eos_token_id", False, "expected an int from 0 to 23 (an id of the vocabulary)"),
    ("eos_token_id", 1.0, "expected an int from 0 to 23 (an id of the vocabulary)"),
]


@pytest.mark.parametrize(("name", "value", "why"), REFUSED)
def test_an_entry_that_means_another_model_or_nothing_is_refused_by_name(tmp_path, name, value, why):
    """Catches an entry that is ignored, and a TypeError or KeyError from one of the wrong type."""
    with pytest.raises(pg.CheckpointError) as caught:
        read_checkpoint(write(tmp_path / "it", **{name: value}))
    message = str(caught.value)
    assert f"config.json: {name} is {value!r}" in message or f"config.json: n_embd is 8, which {name} = 3" in message
    assert why in message


@pytest.mark.parametrize("value", ["24", 24.0, True, None, [24], -1])
def test_sizes_by_hugging_face_s_names_are_checked_too(tmp_path, value):
    """Catches vocab_size and n_positions, which go by other names here, being taken as they come."""
    for entry, ours in (("vocab_size", "n_vocab"), ("n_positions", "n_ctx")):
        directory = write(tmp_path / "it", eos_token_id=[])
        (directory / "config.json").write_text(json.dumps({**ENTRIES, "eos_token_id": None, entry: value}))
        with pytest.raises(pg.CheckpointError, match=f"config.json: {ours} is .*expected an int of at least 1"):
            read_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", 16),
        ("n_ctx", "8"),
        ("n_ctx", math.nan),
        ("max_position_embeddings", 16),
        ("hidden_size", 16),
        ("num_attention_heads", 2),
        ("num_hidden_layers", 2),
    ],
)
def test_two_names_of_one_number_may_not_contradict_each_other(tmp_path, name, value):
    """Catches a choice between the two that nobody is told of."""
    with pytest.raises(pg.CheckpointError, match=rf"config\.json: n_\w+ is \d+ and {name} is .*; they must be equal"):
        read_checkpoint(write(tmp_path / "it", **{name: value}))


@given(st.data())
def test_a_config_survives_its_own_json(data):
    """Catches an entry that is written under another name than it is read."""
    n_head, n_vocab = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 10**6))
    ids = st.integers(0, n_vocab - 1)
    config = pg.GPT2Config(
        n_layer=data.draw(st.integers(1, 100)),
        n_head=n_head,
        n_embd=n_head * data.draw(st.integers(1, 64)),
        n_vocab=n_vocab,
        n_ctx=data.draw(st.integers(1, 4096)),
        n_inner=data.draw(st.none() | st.integers(1, 4096)),
        layer_norm_epsilon=data.draw(st.floats(0, 1)),
        scale_attn_weights=data.draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=data.draw(st.booleans()),
        eos_token_id=data.draw(st.none() | ids | st.lists(ids).map(tuple)),
        bos_token_id=data.draw(st.none() | ids),
        pad_token_id=data.draw(st.none() | ids),
    )
    assert pg.GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Files that are refused


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is an empty file"),
        (b"{", "Expecting property name"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'"gpt2"', "expected a JSON object"),
        (b'{"n_layer": 1,}', "config.json: "),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_malformed_config_json_is_refused(tmp_path, text, why):
    """Catches a JSONDecodeError, a UnicodeDecodeError or a RecursionError that names no file."""
    directory = write(tmp_path / "it")
    (directory / "config.json").write_bytes(text)
    with pytest.raises(pg.CheckpointError, match=r"it.config\.json: ") as caught:
        read_checkpoint(directory)
    assert why in str(caught.value)


def test_what_is_not_there_is_named(tmp_path):
    """Catches a FileNotFoundError, and a message that does not say what a checkpoint holds."""
    directory = tmp_path / "it"
    with pytest.raises(pg.CheckpointError, match=r"it: no such directory; give one that holds config\.json and model"):
        read_checkpoint(directory)
    write(directory)
    with pytest.raises(pg.CheckpointError, match=r"config\.json: is not a directory, and weights are read from files"):
        read_checkpoint(directory / "config.json")
    (directory / "model.safetensors").unlink()
    with pytest.raises(pg.CheckpointError, match=r"it.model\.safetensors: no such file; weights are read from model"):
        read_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(pg.CheckpointError, match=r"it.config\.json: no such file; a checkpoint holds config\.json and"):
        read_checkpoint(directory)
    (directory / "config.json").mkdir()
    with pytest.raises(pg.CheckpointError, match=r"it.config\.json: "):
        read_checkpoint(directory)


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["pytorch_model-00001-of-00001.bin"],
        ["tf_model.h5"],
        ["flax_model.msgpack"],
    ],
)
def test_weights_in_another_form_are_refused_and_listed(tmp_path, files):
    """Catches a user who has weights, and is told only that there are none."""
    directory = write(tmp_path / "it")
    (directory / "model.safetensors").unlink()
    for name in files:
        (directory / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: no such file \(there are ") as caught:
        read_checkpoint(directory)
    assert ", ".join(files) in str(caught.value)
    assert re.search(r"read from model\.safetensors, .*pytorch_model\.bin", str(caught.value))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint's directory and the bytes of its weights; a test may spoil the file."""
    directory = write(tmp_path_factory.mktemp("whole") / "it", named("transformer."))
    return directory, (directory / "model.safetensors").read_bytes()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_refused(whole, data):
    """Catches a download that broke off, wherever it did, loading as far as it goes."""
    directory, content = whole
    header = int.from_bytes(content[:8], "little")
    cut = data.draw(
        st.sampled_from([0, 1, 7, 8, 9, header, header + 7, header + 8, len(content) - 1])
        | st.integers(0, len(content) - 1)
    )
    (directory / "model.safetensors").write_bytes(content[:cut])
    with pytest.raises(pg.CheckpointError, match=r"it.model\.safetensors: (not a whole safetensors file|is an empty)"):
        read_checkpoint(directory)


def test_a_file_with_something_behind_it_is_refused(whole):
    """Catches two downloads in one file."""
    directory, content = whole
    (directory / "model.safetensors").write_bytes(content + b"\0" * 4)
    with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        read_checkpoint(directory)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_with_a_flipped_bit_is_refused_or_means_the_same(whole, data):
    """Catches any other exception, and tensors of the wrong place, shape or dtype."""
    directory, content = whole
    header = int.from_bytes(content[:8], "little")
    place, bit = data.draw(st.integers(0, header + 7)), data.draw(st.integers(0, 7))
    spoilt = bytearray(content)
    spoilt[place] ^= 1 << bit
    (directory / "model.safetensors").write_bytes(spoilt)
    try:
        _, tensors = read_checkpoint(directory)
    except pg.CheckpointError as error:
        assert "model.safetensors: " in str(error)  # noqa: PT017 - only if there is one
    else:
        assert_holds_the_weights(tensors)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_of_anything_is_refused(whole, header):
    """Catches an exception that is not a CheckpointError, from whatever stands in the file."""
    directory, content = whole
    assume(header.strip() != b"{}")
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8:])
    with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: "):
        read_checkpoint(directory)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_a_file_without_tensors_is_refused(tmp_path, header):
    """Catches an empty file that counts as a model, or one whose data no map can hold."""
    with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: holds 0 tensors; config\.json says n_layer = 1"):
        read_checkpoint(write_raw(tmp_path / "it", header, b""))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("path", WEIGHTS)
def test_a_tensor_that_is_missing_is_named(tmp_path, prefix, path):
    """Catches a parameter that is left at whatever it was initialised to."""
    tensors = named(prefix)
    del tensors[prefix + NAMES[path]]
    with pytest.raises(pg.CheckpointError) as caught:
        read_checkpoint(write(tmp_path / "it", tensors))
    assert str(caught.value).endswith(f"model.safetensors: lacks {prefix}{NAMES[path]}")


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name", ["h.1.ln_1.weight", "h.0.attn.c_attn.lora", "h.0.mlp.bias", "score.weight"])
def test_a_tensor_too_many_is_named(tmp_path, prefix, name):
    """Catches a deeper model that is cut, an adapter that is ignored, or a classifier that is taken for a GPT-2."""
    tensors = named(prefix) | {prefix + name: np.zeros(3, np.float32), "lm_head.bias": np.zeros(3, np.float32)}
    with pytest.raises(
        pg.CheckpointError, match=r"model\.safetensors: holds .*, which a GPT-2 of this config\.json"
    ) as caught:
        read_checkpoint(write(tmp_path / "it", tensors))
    assert prefix + name in str(caught.value)
    assert "lm_head.bias" in str(caught.value)


def test_a_file_that_holds_two_models_is_refused(tmp_path):
    """Catches a choice between two sets of weights that nobody is told of."""
    with pytest.raises(pg.CheckpointError, match=r"holds .*, which a GPT-2 .*does not have"):
        read_checkpoint(write(tmp_path / "it", named() | named("transformer.")))


def test_a_file_that_mixes_prefixes_is_refused(tmp_path):
    """Catches half of a model that is taken from the one and half from the other."""
    tensors = named()
    tensors["transformer.ln_f.weight"] = tensors.pop("ln_f.weight")
    with pytest.raises(pg.CheckpointError, match=r"lacks ln_f\.weight; holds transformer\.ln_f\.weight instead$"):
        read_checkpoint(write(tmp_path / "it", tensors))


@pytest.mark.parametrize("path", WEIGHTS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, path):
    """Catches a matrix in nn.Linear's layout, and a vector that would be broadcast."""
    a = WEIGHTS[path]
    other = np.zeros([*a.shape, 1] if a.ndim == 1 or a.shape[0] == a.shape[1] else a.shape[::-1], np.float32)
    with pytest.raises(pg.CheckpointError) as caught:
        read_checkpoint(write(tmp_path / "it", named() | {NAMES[path]: other}))
    expected = f"{NAMES[path]} has shape {list(other.shape)}; config.json requires {list(a.shape)}"
    assert str(caught.value).endswith(f"model.safetensors: {expected}")


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int32, "I32"), (np.uint8, "U8"), (np.bool_, "BOOL"), (np.int64, "I64")]
)
def test_a_tensor_of_another_dtype_is_named(tmp_path, dtype, name):
    """Catches quantized weights that are read as if they were the weights."""
    with pytest.raises(pg.CheckpointError, match=rf"safetensors: wte\.weight is of dtype {name}; expected float64"):
        read_checkpoint(write(tmp_path / "it", named() | {"wte.weight": WEIGHTS["wte"].astype(dtype)}))


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path):
    """Catches a config.json with a digit too many making a list of a billion names first."""
    with pytest.raises(pg.CheckpointError, match=r"holds 16 tensors; config\.json says n_layer = 1000000000000"):
        read_checkpoint(write(tmp_path / "it", n_layer=10**12))


def test_what_cannot_be_loaded_is_refused_on_every_backend(tmp_path, backend):
    """Catches a GPT2 half loaded: the whole file is checked before the first tensor goes to the framework."""
    tensors = named()
    tensors["ln_f.bias"] = np.zeros(9, np.float32)
    given = []
    with pytest.raises(pg.CheckpointError, match=r"ln_f\.bias has shape \[9\]; config\.json requires \[8\]"):
        pg.GPT2.load(
            write(tmp_path / "it", tensors), backend=backend, progress=lambda names: given.append(names) or names
        )
    assert not given


# Writing


def test_a_checkpoint_survives_a_round_trip_to_the_bit(tmp_path, backend, dtype):
    """Catches a value that changes, a layout of a backend's own that is saved as such, and a dtype that does."""
    model = tiny.model(backend, dtype=dtype)
    model.save(tmp_path / "it")
    config, tensors = read_checkpoint(tmp_path / "it")
    assert config == model.config
    assert list(tensors) == list(tiny.weights())
    for path, a in tiny.weights().items():
        assert tensors[path].dtype == HOST_DTYPES[dtype]
        np.testing.assert_array_equal(tensors[path], a.astype(HOST_DTYPES[dtype]), err_msg=path)
    again = pg.GPT2.load(tmp_path / "it", backend=backend, dtype=dtype)
    for path, x in flatten(again.params):
        assert x.dtype == backend.dtype(dtype)
        np.testing.assert_array_equal(pg.to_numpy(x), tensors[path], err_msg=path)


def test_what_one_backend_saves_every_other_loads(tmp_path, backend):
    """Catches a file that only the backend that wrote it can read."""
    tiny.model(backend, seed=3).save(tmp_path / "it")
    expected = tiny.model(pg.get_backend("numpy"), seed=3).logits([[1, 2, 3]])
    np.testing.assert_array_equal(pg.GPT2.load(tmp_path / "it", backend="numpy").logits([[1, 2, 3]]), expected)


def test_names_in_the_file_are_those_that_transformers_expects(tmp_path):
    """Catches a checkpoint that we read and nobody else."""
    write_checkpoint(tmp_path / "it", CONFIG, WEIGHTS)
    content = (tmp_path / "it" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}  # without it, transformers refuses the file
    assert set(header) == {f"transformer.{name}" for name in NAMES.values()}
    entries = json.loads((tmp_path / "it" / "config.json").read_text())
    assert (
        entries.items() >= {**ENTRIES, "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}.items()
    )


@pytest.mark.parametrize("there", ["a file in it", "a file", "a directory in it"])
def test_save_refuses_what_exists(tmp_path, there):
    """Catches a checkpoint that is overwritten, or mixed with another."""
    directory = tmp_path / "it"
    if there == "a file":
        directory.write_text("mine")
    else:
        (directory / "mine").mkdir(parents=True) if there == "a directory in it" else directory.mkdir()
        (directory / "mine2").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    why = "and is not a directory; give a new one" if there == "a file" else "; give a new directory"
    with pytest.raises(FileExistsError, match=f"it: exists already ?{why}"):
        tiny.model(pg.get_backend("numpy")).save(directory)
    assert sorted(tmp_path.rglob("*")) == before


def test_save_takes_an_empty_directory_and_makes_those_above(tmp_path):
    """Catches a directory that somebody made for the purpose being refused."""
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "new" / "newer", str(tmp_path / "text")):
        write_checkpoint(directory, CONFIG, WEIGHTS)
        assert read_checkpoint(directory)[0] == CONFIG
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_what_is_saved_has_the_permissions_that_the_user_asked_for(tmp_path):
    """Catches a checkpoint that only its writer can read, as temporary directories are."""
    mask = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "it", CONFIG, WEIGHTS)
    finally:
        os.umask(mask)
    assert (tmp_path / "it").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("where", ["the weights", "the tokenizer"])
def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, failure, exists, where):
    """Catches half a checkpoint under the name of a whole one, or a temporary one that is left next to it."""
    directory = tmp_path / "it"
    if exists:
        directory.mkdir()

    write_safetensors = writing.write_safetensors

    def fail(*args, **kwargs):
        if where == "the weights":
            write_safetensors(*args, **kwargs)
        raise failure

    if where == "the weights":
        monkeypatch.setattr(writing, "write_safetensors", fail)
    with pytest.raises(type(failure)):
        write_checkpoint(directory, CONFIG, WEIGHTS, SimpleNamespace(save=fail) if where == "the tokenizer" else None)
    assert list(tmp_path.rglob("*")) == ([directory] if exists else [])


def test_a_model_lives_on_when_its_files_are_gone(tmp_path, backend):
    """Catches a model that reads its weights from the file later, by name."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    model = pg.GPT2.load(tmp_path / "it", backend=backend)
    shutil.rmtree(tmp_path / "it")
    model.save(tmp_path / "again")
    for path, a in read_checkpoint(tmp_path / "again")[1].items():
        np.testing.assert_array_equal(a, tiny.weights()[path])
