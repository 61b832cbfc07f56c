"""GGUF files: those of llama.cpp's own package are read, it reads those that are written, and damage is refused.

The package gguf belongs to llama.cpp, and only these tests use it.
"""

import dataclasses
import json
import os
import struct
import subprocess
import sys
import tracemalloc

import gguf
import layouts
import numpy as np
import pytest
import tiny
import tokenizers
from damage import cut, flip, insert, overwrite, remove, replace
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.checkpoint import convert, gguf_files, read_checkpoint
from portable_gpt2.cli import main
from portable_gpt2.comparison.weights import differences
from portable_gpt2.params import flatten, shapes

CONFIG = dataclasses.replace(tiny.CONFIG, n_embd=32)  # Q8_0 has blocks of 32
TEXT = "To be, or not to be: être 存在 🙂"


def tensors_of(config, arrays, kind=Kind.F32):
    """Yield the name, the data and the type of each tensor, as llama.cpp's converter stores them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for path, a in arrays.items():
        [name] = layouts.hugging_face_names({path: a})
        own = kind if a.ndim > 1 and path != "wpe" else Kind.F32
        data = np.ascontiguousarray(a.T) if path.endswith("/w") else a
        yield names.get_name(name, (".weight", ".bias")), gguf.quantize(data, own), own


def write(file, config, arrays, kind=Kind.F32, *, tokenizer="in the vocabulary", edit=lambda writer: None):
    """Write a file with the gguf package. `edit` may change the writer before it writes."""
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if tokenizer is not None:
        entries = json.loads(tiny.byte_level_bpe(tokenizer))
        vocab = entries["model"]["vocab"] | {token["content"]: token["id"] for token in entries["added_tokens"]}
        special = {token["id"] for token in entries["added_tokens"]}
        tokens = [*sorted(vocab, key=vocab.get), *(f"[PAD{i}]" for i in range(len(vocab), config.n_vocab))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if i in special else 1 if i < len(vocab) else 5 for i in range(len(tokens))])
        writer.add_token_merges([" ".join(pair) for pair in entries["model"]["merges"]])
        for end in config.ends:
            writer.add_eos_token_id(end)
    for name, data, own in tensors_of(config, arrays, kind):
        writer.add_tensor(name, data, raw_dtype=own)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arrays_of(source):
    return {path: tensor.read() for path, tensor in read_checkpoint(source).tensors.items()}


def bits(arrays):
    return {path: (a.dtype.name, a.shape, a.tobytes()) for path, a in arrays.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory in Hugging Face's layout, with a tokenizer."""
    directory = tmp_path_factory.mktemp("gguf") / "it"
    layouts.write_safetensors(directory, CONFIG, tiny.weights(CONFIG))
    tiny.write_tokenizer(directory)
    return directory


# Reading


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_files_of_the_gguf_package_are_read(kind, tmp_path):
    """Catches a weight that is not transposed, a name that is taken for another, and a scale that is applied twice."""
    arrays = tiny.weights(CONFIG)
    write(tmp_path / "m.gguf", CONFIG, arrays, kind, edit=edited(split__count=0))  # not one of several files
    found = read_checkpoint(tmp_path / "m.gguf")
    names = {Kind.F16: "float16 and float32", Kind.BF16: "bfloat16 and float32"}
    assert found.source == f"GGUF, m.gguf, {names.get(kind, 'float32')}"
    assert found.config == CONFIG
    dequantized = {name: gguf.dequantize(data, own) for name, data, own in tensors_of(CONFIG, arrays, kind)}
    for (path, tensor), a in zip(found.tensors.items(), dequantized.values(), strict=True):
        values = tensor.read()
        assert (tensor.dtype, tensor.shape) == (values.dtype.name, values.shape)
        np.testing.assert_array_equal(values.astype(np.float32), a.T if path.endswith("/w") else a)
        np.testing.assert_array_equal(tensor.part((slice(3, 9),)), values[3:9])


@pytest.mark.parametrize("special", ["in the vocabulary", "added", "none"])
def test_the_tokenizer_is_in_the_file(special, checkpoint, tmp_path):
    """Catches a merge that is out of order, and a special token that is ordinary text, or that is not found at all."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG), tokenizer=special)
    found = read_checkpoint(tmp_path / "m.gguf").tokenizer
    expected = pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe(special)))
    text = f"{TEXT}<|endoftext|>\n"
    assert found.special_tokens == expected.special_tokens
    for allow in (False, [*expected.special_tokens]):
        assert found.encode(text, allow_special=allow) == expected.encode(text, allow_special=allow)
    assert found.decode(found.encode(text)) == text


def test_a_padded_vocabulary_and_a_file_without_a_tokenizer(tmp_path):
    """Catches a token that is only there to fill the vocabulary, and an error where there is no tokenizer."""
    config = dataclasses.replace(CONFIG, n_vocab=400)
    write(tmp_path / "m.gguf", config, tiny.weights(config))
    found = read_checkpoint(tmp_path / "m.gguf")
    assert (found.tokenizer.n_vocab, found.config.n_vocab) == (384, 400)
    write(tmp_path / "m.gguf", config, tiny.weights(config), tokenizer=None)
    assert read_checkpoint(tmp_path / "m.gguf").tokenizer is None


def test_it_runs_as_the_same_model(checkpoint, backend, tmp_path):
    """Catches a reader that works with its own backend only, and a file that is not found in its directory."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG))
    expected = pg.GPT2.load(checkpoint, backend=backend)
    for source in (tmp_path, tmp_path / "m.gguf", str(tmp_path / "m.gguf")):
        model = pg.GPT2.load(source, backend=backend)
        assert model.config == expected.config
        for (path, x), (_, y) in zip(flatten(model.params), flatten(expected.params), strict=True):
            assert pg.to_numpy(x).tobytes() == pg.to_numpy(y).tobytes(), path
    assert model.generate(TEXT, max_new_tokens=5, seed=1) == expected.generate(TEXT, max_new_tokens=5, seed=1)


def test_the_other_files_of_its_directory_are_not_read(tmp_path):
    """Catches a file of llama.cpp's that cannot be loaded because another model's config.json is next to it."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_checkpoint(tmp_path / "m.gguf").config == CONFIG
    assert read_checkpoint(tmp_path).config == CONFIG
    write(tmp_path / "n.gguf", CONFIG, tiny.weights(CONFIG))
    assert read_checkpoint(tmp_path / "n.gguf").config == CONFIG
    with pytest.raises(pg.CheckpointError, match=r"holds m\.gguf and n\.gguf; keep the one that is meant"):
        read_checkpoint(tmp_path)
    layouts.write_safetensors(tmp_path, dataclasses.replace(CONFIG, n_head=4), tiny.weights(CONFIG))
    assert read_checkpoint(tmp_path, tokenizer=None).config.n_head == 4


def test_an_output_matrix_of_its_own_and_one_that_is_a_copy(tmp_path):
    """Catches logits that are computed with wte, and a copy that counts as a parameter, as older converters wrote."""
    arrays = tiny.weights(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    write(tmp_path / "m.gguf", CONFIG, arrays)
    found = read_checkpoint(tmp_path / "m.gguf")
    assert not found.config.tie_word_embeddings
    assert bits(arrays_of(tmp_path / "m.gguf")) == bits(arrays)
    arrays["lm_head"] = arrays["wte"]
    write(tmp_path / "m.gguf", CONFIG, arrays)
    found = read_checkpoint(tmp_path / "m.gguf")
    assert found.config == CONFIG
    assert "lm_head" not in found.tensors


def test_it_is_a_side_of_a_comparison(tmp_path):
    """Catches weights that cannot be compared, and the name of the wrong quantization."""
    arrays = tiny.weights(CONFIG)
    layouts.write_safetensors(tmp_path / "it", CONFIG, arrays)
    for kind, said in (
        (Kind.F32, None),
        (Kind.BF16, "rounded through bfloat16"),
        (Kind.Q8_0, "rounded through Q8_0 of GGUF"),
    ):
        write(tmp_path / "m.gguf", CONFIG, arrays, kind)
        a, b = read_checkpoint(tmp_path / "it"), read_checkpoint(tmp_path / "m.gguf")
        found = {finding.path: finding.kind for finding in differences(a.tensors, b.tensors, a.config, b.config)}
        matrices = [path for path, x in arrays.items() if x.ndim > 1 and path != "wpe"]
        assert found == ({} if said is None else dict.fromkeys(matrices, said))


# Writing


@pytest.mark.parametrize(("dtype", "kind"), [(None, 0), ("float32", 0), ("float16", 1), ("bfloat16", 30)])
def test_llama_cpp_reads_the_names_shapes_and_types_that_it_expects(dtype, kind, checkpoint, tmp_path):
    """Catches a file that only this package reads."""
    file = tmp_path / "out" / "m.gguf"
    convert(checkpoint, file, dtype=dtype)
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    expected = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 128}
    expected |= {"attention.head_count": 2, "attention.layer_norm_epsilon": np.float32(1e-5), "vocab_size": 384}
    assert {name: values[f"gpt2.{name}"] for name in expected} == expected
    vocab = json.loads((checkpoint / "vocab.json").read_text())
    assert values["tokenizer.ggml.tokens"] == sorted(vocab, key=vocab.get)
    assert values["tokenizer.ggml.token_type"] == [3, *[1] * 383]
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.bos_token_id"]) == (0, 0)
    d = CONFIG.n_embd
    ours = {"token_embd.weight": (d, 384), "position_embd.weight": (d, 64)}
    ours |= {f"output_norm.{end}": (d,) for end in ("weight", "bias")}
    for i in range(2):
        shapes_ = {"attn_qkv": (d, 3 * d), "attn_output": (d, d), "ffn_up": (d, 4 * d), "ffn_down": (4 * d, d)}
        ours |= {f"blk.{i}.{name}.weight": shape for name, shape in shapes_.items()}
        ours |= {f"blk.{i}.{name}.bias": shape[1:] for name, shape in shapes_.items()}
        ours |= {f"blk.{i}.{name}.{end}": (d,) for name in ("attn_norm", "ffn_norm") for end in ("weight", "bias")}
    assert {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors} == ours
    for tensor in reader.tensors:
        is_matrix = len(tensor.shape) > 1 and tensor.name != "position_embd.weight"
        assert tensor.tensor_type == (kind if is_matrix else 0), tensor.name
        assert tensor.data_offset % 32 == 0
    stored = {
        name: gguf.dequantize(data, own) for name, data, own in tensors_of(CONFIG, tiny.weights(CONFIG), Kind(kind))
    }
    for tensor in reader.tensors:
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), stored[tensor.name])


configs = st.builds(
    lambda n_head, n_vocab, **sizes: pg.GPT2Config(
        n_layer=1, n_head=n_head, n_embd=n_head * 4, n_vocab=n_vocab, n_ctx=8, **sizes
    ),
    n_head=st.integers(1, 3),
    n_vocab=st.integers(24, 40),
    n_inner=st.sampled_from([None, 5, 64]),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-6, 1e-12, 0.1, 1 / 3]).map(np.float32).map(str).map(float),
    eos_token_id=st.sampled_from([None, 0, 23]),
    bos_token_id=st.sampled_from([None, 1]),
    pad_token_id=st.sampled_from([None, 2]),
    tie_word_embeddings=st.booleans(),
)


@given(config=configs, seed=st.integers(0, 99))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=max(10, settings.default.max_examples // 10),  # each example waits for the disk
)
def test_every_bit_returns_from_a_round_trip(config, seed, tmp_path):
    """Catches an entry of the configuration, or a tensor, that is lost or changed."""
    layouts.write_safetensors(tmp_path / "it", config, tiny.weights(config, seed))
    convert(tmp_path / "it", tmp_path / "m.gguf", force=True)
    convert(tmp_path / "m.gguf", tmp_path / "back", force=True)
    for source in ("m.gguf", "back"):
        assert bits(arrays_of(tmp_path / source)) == bits(tiny.weights(config, seed))
        found = read_checkpoint(tmp_path / source).config
        # A file without bos_token_id has none, and GPT-2 starts with the end of text.
        assert found == (config if config.eos_token_id is not None else dataclasses.replace(found, eos_token_id=None))
        assert found.start == config.start


def test_the_text_of_the_shipped_model_is_the_same(tmp_path):
    """Catches a token, a merge or a weight that changes on the way through the two formats."""
    assert main(["convert", "shakespeare", str(tmp_path / "s.gguf")]) == 0
    assert main(["convert", str(tmp_path / "s.gguf"), str(tmp_path / "back")]) == 0
    options = {"max_new_tokens": 40, "seed": 3}
    expected = pg.GPT2.load("shakespeare", backend="numpy").generate("To be", **options)
    for source in ("s.gguf", "back"):
        assert pg.GPT2.load(tmp_path / source, backend="numpy").generate("To be", **options) == expected


def test_special_and_other_added_tokens_return(checkpoint, tmp_path):
    """Catches an added token that becomes ordinary, and an id that the model lacks."""
    layouts.write_safetensors(tmp_path / "it", CONFIG, tiny.weights(CONFIG))
    entries = json.loads(tiny.byte_level_bpe("added"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entries["added_tokens"] += [
        {"id": 384 + i, "content": content, "special": special, **flags}
        for i, (content, special) in enumerate([("<user>", True), ("<b>", False)])
    ]
    (tmp_path / "it" / "tokenizer.json").write_text(json.dumps(entries))
    before = read_checkpoint(tmp_path / "it").tokenizer
    config = dataclasses.replace(CONFIG, n_vocab=390)
    layouts.write_safetensors(tmp_path / "wide", config, tiny.weights(config))
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(entries))
    text = f"<b>{TEXT}<user><|endoftext|>"
    convert(tmp_path / "wide", tmp_path / "m.gguf")
    after = read_checkpoint(tmp_path / "m.gguf").tokenizer
    assert after.special_tokens == before.special_tokens == {"<|endoftext|>": 383, "<user>": 384}
    for allow in (False, True):
        assert after.encode(text, allow_special=allow) == before.encode(text, allow_special=allow)
    convert(tmp_path / "it", tmp_path / "narrow.gguf")  # the model has no row for the two
    assert read_checkpoint(tmp_path / "narrow.gguf").tokenizer.special_tokens == {"<|endoftext|>": 383}


def test_it_takes_no_other_package(checkpoint, tmp_path):
    """Catches an import of a framework, or of the gguf package, which a user need not have."""
    code = "import sys; from portable_gpt2.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    for source, target in ((checkpoint, "m.gguf"), (tmp_path / "m.gguf", "back")):
        command = [sys.executable, "-P", "-c", code, "convert", str(source), str(tmp_path / target)]
        modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert not {"gguf", "torch", "jax", "tensorflow"} & set(modules)


@pytest.mark.parametrize(
    ("entries", "args", "why"),
    [
        ({}, ["--dtype", "float64"], "no floating dtype 'float64'; choose one of float32, float16, bfloat16"),
        ({"scale_attn_weights": False}, [], "scale_attn_weights is False: llama.cpp's GPT-2 does not compute this"),
        ({"scale_attn_by_inverse_layer_idx": True}, [], "scale_attn_by_inverse_layer_idx is True: llama.cpp's GPT-2"),
        ({}, ["--dtype", "float16"], "wte holds values beyond the range of float16"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(entries, args, why, tmp_path, capsys):
    """Catches a file that llama.cpp would compute with another scale, and half a file that is left."""
    arrays = tiny.weights(CONFIG)
    arrays["wte"][3, 3] = 1e6
    layouts.write_safetensors(tmp_path / "it", dataclasses.replace(CONFIG, **entries), arrays)
    assert main(["convert", str(tmp_path / "it"), str(tmp_path / "m.gguf"), *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert why in line
    assert os.listdir(tmp_path) == ["it"]


def test_a_file_that_exists_is_replaced_by_force_alone(checkpoint, tmp_path, capsys):
    """Catches a model that is lost, and one that is lost because it is its own source."""
    file = tmp_path / "m.gguf"
    convert(checkpoint, file)
    before = file.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"m\.gguf: exists already; give a new name, or replace this file by force"
    ):
        convert(checkpoint, file, dtype="float16")
    assert file.read_bytes() == before
    convert(file, file, dtype="float16", force=True)
    assert arrays_of(file)["wte"].dtype == np.float16
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(OSError, match=r"d\.gguf: is a directory; expected a regular file"):
        convert(checkpoint, tmp_path / "d.gguf", force=True)
    assert sorted(os.listdir(tmp_path)) == ["d.gguf", "m.gguf"]


def test_several_ends_of_text_are_one_there(tmp_path):
    """Catches an id that is dropped without a word."""
    layouts.write_safetensors(tmp_path / "it", dataclasses.replace(CONFIG, eos_token_id=(4, 5)), tiny.weights(CONFIG))
    with pytest.warns(UserWarning, match=r"a GGUF file has one end of text: 4 is kept, and \[5\] is not"):
        convert(tmp_path / "it", tmp_path / "m.gguf")
    assert read_checkpoint(tmp_path / "m.gguf").config.eos_token_id == 4


# Files that are refused


def edited(**values):
    """Return a function that overwrites values of a writer; None removes one. Dots are double underscores."""

    def edit(writer):
        for name, value in values.items():
            key = name.replace("__", ".")
            if value is None:
                del writer.kv_data[0][key]
            else:
                kind = gguf.GGUFValueType.get_type(value)
                writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind)

    return edit


REFUSED = {
    "general.architecture is 'llama'; expected 'gpt2'": edited(general__architecture="llama"),
    "general.architecture is None; expected 'gpt2'": edited(general__architecture=None),
    "gpt2.block_count is None; expected a whole number": edited(gpt2__block_count=None),
    "gpt2.block_count is 'x'; expected a whole number": edited(gpt2__block_count="x"),
    "holds 28 tensors; header says n_layer = 1000000": edited(gpt2__block_count=1_000_000),
    "holds blk.1.attn_qkv.weight, blk.1.attn_qkv.bias, blk.1.attn_output.weight and 9 more": edited(
        gpt2__block_count=1
    ),
    "n_embd is 32, which n_head = 5 does not divide": edited(gpt2__attention__head_count=5),
    "it has 1 heads of keys; GPT-2 has one for each": edited(gpt2__attention__head_count_kv=1),
    "position_embd.weight has shape [64, 32]; header requires [65, 32]": edited(gpt2__context_length=65),
    "blk.0.ffn_up.weight has shape [128, 32]; header requires [100, 32]": edited(gpt2__feed_forward_length=100),
    "gpt2.attention.layer_norm_epsilon is None; expected a number": edited(gpt2__attention__layer_norm_epsilon=None),
    "it is one of 3 files; merge them with `llama-gguf-split --merge`": edited(split__count=3),
    "it is one of 'x' files": edited(split__count="x"),
    "gpt2.attention.layer_norm_epsilon is 'x'; expected a number": edited(gpt2__attention__layer_norm_epsilon="x"),
    "layer_norm_epsilon is inf; expected a number": lambda writer: writer.add_key_value(
        "gpt2.attention.layer_norm_epsilon", 1e300, gguf.GGUFValueType.FLOAT64
    ),
    "general.alignment is 33; expected a power of two": edited(general__alignment=33),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("error")
def test_a_file_of_another_model_is_refused_with_the_entry(why, tmp_path):
    """Catches a model that is loaded in a shape that is not its own, and the words of a parser."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG), edit=REFUSED[why])
    with pytest.raises(pg.CheckpointError) as error:
        read_checkpoint(tmp_path / "m.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: {why}")


TOKENIZERS = {
    "tokenizer.ggml.model is 'llama'; expected 'gpt2'": edited(tokenizer__ggml__model="llama"),
    "tokenizer.ggml.pre is 'llama-bpe'; expected 'gpt-2'": edited(tokenizer__ggml__pre="llama-bpe"),
    "tokenizer.ggml says that something is added to each text": edited(tokenizer__ggml__add_bos_token=True),
    "tokenizer.ggml.merges is None; expected an array of strings": edited(tokenizer__ggml__merges=None),
    "tokenizer.ggml.tokens is [1, 2]; expected an array of strings": edited(tokenizer__ggml__tokens=[1, 2]),
    "tokenizer.ggml.token_type does not have one item": edited(tokenizer__ggml__token_type=[1, 2]),
    "tokenizer.ggml.tokens has 'a' twice, as 0 and 2": edited(
        tokenizer__ggml__tokens=["a", "b", "a"], tokenizer__ggml__token_type=[1, 1, 1]
    ),
    "model.merges[0]": edited(tokenizer__ggml__merges=["no merge"]),
}


@pytest.mark.parametrize("why", TOKENIZERS)
def test_a_tokenizer_that_is_not_gpt_2s_is_refused_and_the_weights_are_not(why, tmp_path):
    """Catches other ids for a text, and weights that cannot be used because of a tokenizer."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG), edit=TOKENIZERS[why])
    with pytest.raises(pg.checkpoint.TokenizerError) as error:
        read_checkpoint(tmp_path / "m.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: {why}")
    assert read_checkpoint(tmp_path / "m.gguf", tokenizer=None).config == CONFIG
    with pytest.warns(UserWarning, match="the file has no tokenizer"):
        convert(tmp_path / "m.gguf", tmp_path / "out.gguf")
    assert read_checkpoint(tmp_path / "out.gguf").tokenizer is None


def test_another_quantization_is_named(tmp_path):
    """Catches a block format that is read as another one."""
    write(tmp_path / "m.gguf", CONFIG, tiny.weights(CONFIG), Kind.Q4_0)
    why = r"m\.gguf: token_embd\.weight is of type Q4_0; tensors of F32, F16, Q8_0, BF16 can be read"
    with pytest.raises(pg.CheckpointError, match=why):
        read_checkpoint(tmp_path / "m.gguf")


def test_a_file_under_the_name_of_another_format_is_told_its_own(checkpoint, tmp_path):
    """Catches "header too large" for a file that is whole."""
    convert(checkpoint, tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(pg.CheckpointError, match=r"is a GGUF file, of llama\.cpp; give it a name that ends in \.gguf$"):
        read_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "m.gguf").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(pg.CheckpointError, match=r"m\.gguf: is not a GGUF file: it begins with b"):
        read_checkpoint(tmp_path / "m.gguf")
    for version, why in ((1, "its version is 1; expected"), (3 << 24, "the file is for big-endian machines; expected")):
        (tmp_path / "m.gguf").write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        with pytest.raises(pg.CheckpointError, match=f"{why} a little-endian file of version 2 or 3"):
            read_checkpoint(tmp_path / "m.gguf")


SMALL = pg.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_vocab=24, n_ctx=8, eos_token_id=None)
UNDETERMINED = ("n_head", "layer_norm_epsilon", "eos_token_id", "bos_token_id", "pad_token_id")


class Content(bytes):
    """The bytes of a file, which hypothesis need not print."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The contents of whole files of several types, and the length of their header."""
    file, found = tmp_path_factory.mktemp("wholes") / "m.gguf", []
    for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0):
        write(file, SMALL, tiny.weights(SMALL), kind, tokenizer=None)
        found.append((Content(file.read_bytes()), gguf.GGUFReader(file).data_offset))
    return found


def spoil_number(draw, content):
    """Replace four or eight bytes by a number that a program might believe."""
    start, code = draw(st.integers(0, len(content) - 8)), draw(st.sampled_from("IQ"))
    top = 2 ** (32 if code == "I" else 64) - 1
    number = draw(
        st.sampled_from([0, 1, 2, 3, 4, 8, 9, 30, 32, 2**31, top, top // 2 + 1, top - 7]) | st.integers(0, top)
    )
    return (
        content[:start] + struct.pack(f"<{code}", number % (top + 1)) + content[start + struct.calcsize(f"<{code}") :]
    )


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_refused_or_only_its_values_changed(wholes, tmp_path, data):
    """Catches any exception but CheckpointError, a crash, a hang, and memory that is allocated for a damaged count."""
    draw, file = data.draw, tmp_path / "m.gguf"
    content, n_header = draw(st.sampled_from(wholes))
    change = draw(st.sampled_from([cut, flip, overwrite, insert, remove, replace, *[spoil_number] * 6]))
    if draw(st.integers(0, 4)):
        file.write_bytes(change(draw, content[:n_header]) + content[n_header:])
    else:
        file.write_bytes(change(draw, content))
    try:
        found = read_checkpoint(file)
        arrays = {path: tensor.read() for path, tensor in found.tensors.items()}
    except pg.CheckpointError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017 - only if there is one
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 400 + len(str(file))  # noqa: PT017
        return
    same = {field: getattr(SMALL, field) for field in UNDETERMINED}
    assert dataclasses.replace(found.config, **same) == SMALL
    assert {path: a.shape for path, a in arrays.items()} == shapes(SMALL)
    assert all(np.isfinite(a).all() for a in arrays.values())


def test_a_count_that_is_not_true_takes_no_time(tmp_path):
    """Catches a loop over 2^63 items that are not there, as in the package's own reader."""
    strings = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 2**63)
    numbers = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 0, 2**63)
    nested = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 9, 2**63)
    text = struct.pack("<Q", 2**63)
    file = tmp_path / "m.gguf"
    for body in (strings, numbers, nested, text, b""):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + body + bytes(100))
        with pytest.raises(pg.CheckpointError, match=r"m\.gguf: "):
            read_checkpoint(file)


def renamed(content, old, new):
    """Give a value or a tensor another name."""
    old, new = (struct.pack("<Q", len(name)) + name.encode() for name in (old, new))
    assert old in content
    return content.replace(old, new)


def moved(content, name, by):
    """Move the place that the header gives for a tensor with one axis."""
    at = content.index(name.encode()) + len(name) + 4 + 8 + 4
    [offset] = struct.unpack("<Q", content[at : at + 8])
    return content[:at] + struct.pack("<Q", offset + by) + content[at + 8 :]


def shaped(content, name, length):
    """Change the length that the header gives for a tensor with one axis."""
    at = content.index(name.encode()) + len(name) + 4
    return content[:at] + struct.pack("<Q", length) + content[at + 8 :]


HEADERS = {
    "two values have the name 'gpt2.block_count'": lambda c: renamed(c, "gpt2.context_length", "gpt2.block_count"),
    "two tensors have the name 'output_norm.bias'": lambda c: renamed(c, "blk.0.ffn_up.bias", "output_norm.bias"),
    "output_norm.bias is said to begin at byte": lambda c: moved(c, "output_norm.bias", 32),
    "output_norm.weight is said to begin at byte": lambda c: moved(c, "output_norm.weight", -32),
    "'a\\x1b[31m\\nbias' is said to begin at byte": lambda c: moved(
        renamed(c, "output_norm.bias", "a\x1b[31m\nbias"), "a\x1b[31m\nbias", 32
    ),
    "output_norm.bias has shape [0]; no dimension may be 0": lambda c: shaped(c, "output_norm.bias", 0),
    "the file has": lambda c: c[:-40],
    "the file ends within its header": lambda c: c[:200],
}


@pytest.mark.parametrize("why", HEADERS)
def test_a_header_that_contradicts_itself_or_the_file_is_refused_before_a_tensor_is_read(why, wholes, tmp_path):
    """Catches weights that are read from another tensor's place, and a download that is called whole."""
    (tmp_path / "m.gguf").write_bytes(HEADERS[why](bytes(wholes[0][0])))
    with pytest.raises(pg.CheckpointError) as error:
        read_checkpoint(tmp_path / "m.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: {why}")


def test_a_long_name_or_array_is_shortened(tmp_path):
    """Catches a message of a megabyte, and memory that is a hundred times that of the file."""
    text = lambda content: struct.pack("<Q", len(content)) + content  # noqa: E731
    array = text(b"general.architecture") + struct.pack("<IIQ", 9, 0, 10**6) + bytes(10**6)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    tracemalloc.start()
    with pytest.raises(
        pg.CheckpointError, match=r"architecture is \[0, 0, .*\.\.\. \(1,000,000 items\); expected 'gpt2'"
    ):
        read_checkpoint(tmp_path / "m.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    write(tmp_path / "m.gguf", SMALL, tiny.weights(SMALL), tokenizer=None)
    content = renamed((tmp_path / "m.gguf").read_bytes(), "blk.0.ffn_up.bias", "x" * (17 + 32 * 30_000))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(pg.CheckpointError, match=r"lacks blk\.0\.ffn_up\.bias; holds 'xxx.* \(960019 char") as error:
        read_checkpoint(tmp_path / "m.gguf")
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_a_message_does_not_control_the_terminal(tmp_path, capsys, monkeypatch):
    """Catches a file that changes what the terminal shows: escape codes in the names of its tensors, or in its own."""
    monkeypatch.chdir(tmp_path)
    arrays = tiny.weights(SMALL)
    for name in ("m.gguf", "\x1b[31m.gguf"):
        write(tmp_path / name, SMALL, arrays, Kind.Q4_0, tokenizer=None)
        content = (tmp_path / name).read_bytes().replace(b"token_embd.weight", b"token_embd.\x1b[31mt")
        (tmp_path / name).write_bytes(content)
        assert main(["convert", name, "out"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "'token_embd.\\x1b[31mt' is of type Q4_0" in line
        assert "\x1b" not in line


def test_a_header_has_a_limit(wholes, tmp_path, monkeypatch):
    """Catches memory for a header of any size."""
    (tmp_path / "m.gguf").write_bytes(wholes[0][0])
    monkeypatch.setattr(gguf_files, "LARGEST_TEXT", 300)
    with pytest.raises(pg.CheckpointError, match=r"m\.gguf: the header has more than 300 bytes"):
        read_checkpoint(tmp_path / "m.gguf")


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    """Catches a NaN in a scale of Q8_0, which makes 32 weights NaN."""
    write(tmp_path / "m.gguf", SMALL, tiny.weights(SMALL), Kind.Q8_0, tokenizer=None)
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    [place] = [t.data_offset for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"]
    content[place : place + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    found = read_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(pg.CheckpointError, match=r"m\.gguf: blk\.0\.ffn_up\.weight holds a NaN or an infinity"):
        found.tensors["h0/mlp/c_fc/w"].read()


# nanoGPT


@pytest.mark.filterwarnings("ignore:.*form of GELU")
def test_nanogpt_is_a_side_with_its_conventions_named(torch, tmp_path):
    """Catches a model without biases, with a padded vocabulary, that is only called different."""
    config = dataclasses.replace(CONFIG, n_vocab=390)
    arrays = tiny.weights(CONFIG)
    padded = arrays | {"wte": np.concatenate([arrays["wte"], np.zeros((6, 32), np.float32)])}
    (tmp_path / "nano").mkdir()
    torch.save(layouts.nanogpt(config, padded, bias=False), tmp_path / "nano" / "ckpt.pt")
    layouts.write_safetensors(tmp_path / "it", CONFIG, arrays)
    a, b = read_checkpoint(tmp_path / "it"), read_checkpoint(tmp_path / "nano" / "ckpt.pt")
    found = {finding.path: finding.kind for finding in differences(a.tensors, b.tensors, a.config, b.config)}
    biases = [path for path in arrays if path.endswith("/b")]
    assert found == {"wte": "6 rows added at the end, all 0", **dict.fromkeys(biases, "all 0 in b")}
