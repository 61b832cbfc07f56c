"""Every layout of a checkpoint is the same model, whichever backend computes, or is refused by name."""

import json
import os
import subprocess
import sys

import frameworks
import layouts
import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint import convert, read_checkpoint
from portable_gpt2.params import flatten

SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_vocab": 24, "n_ctx": 8, "eos_token_id": None}
UNTIED = pg.GPT2Config(**SMALL, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function from a layout to its directory, with a tokenizer; a test may not change it."""
    found = {}

    def get(layout):
        if layout not in found:
            found[layout] = tmp_path_factory.mktemp("layout") / "it"
            layouts.WRITERS[layout][1](found[layout], tiny.CONFIG, tiny.weights())
            files = tmp_path_factory.mktemp("tokenizer")
            tiny.write_tokenizer(files)
            if layout == "OpenAI":
                layouts.write_openai_tokenizer(found[layout], files)
            else:
                tiny.write_tokenizer(found[layout])
        return found[layout]

    return get


def bits(model):
    return {path: pg.to_numpy(x).tobytes() for path, x in flatten(model.params)}


SAID = {
    "safetensors": "Hugging Face's layout, model.safetensors, float32",
    "safetensors in 3 files": "Hugging Face's layout, model.safetensors.index.json of 3 files, float32",
    "bin": "Hugging Face's layout, pytorch_model.bin, float32",
    "bin of old": "Hugging Face's layout, pytorch_model.bin, float32",
    "bin in 2 files": "Hugging Face's layout, pytorch_model.bin.index.json of 2 files, float32",
    "training state": "Hugging Face's layout, pytorch_model.bin, float32",
    "nanoGPT": "nanoGPT, ckpt.pt, float32",
    "OpenAI": "OpenAI's release, model.ckpt.index, float32",
}


@pytest.mark.filterwarnings("ignore:.*form of GELU")
def test_every_layout_is_the_same_model_on_every_backend(layout, written, backend):
    """Catches a tensor under another's name, a leading 1 that stays, a reader that works with its own backend only, and
    a tokenizer that is not found under its other names.
    """
    model = pg.GPT2.load(written(layout), backend=backend)
    assert model.config == tiny.CONFIG
    assert model.source == SAID[layout]
    assert bits(model) == {path: a.tobytes() for path, a in tiny.weights().items()}
    assert model.tokenizer.encode("To be") == pg.Tokenizer.load(written("safetensors")).encode("To be")


@pytest.mark.filterwarnings("ignore:.*form of GELU")
def test_what_is_converted_keeps_every_bit(layout, written, tmp_path):
    """Catches a tensor or a tokenizer that gets lost on the way from one layout to the other."""
    assert convert(written(layout), tmp_path / "it") == SAID[layout]
    assert sorted(os.listdir(tmp_path / "it")) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    found = read_checkpoint(tmp_path / "it")
    assert found.config == tiny.CONFIG
    assert {path: tensor.read().tobytes() for path, tensor in found.tensors.items()} == {
        path: a.tobytes() for path, a in tiny.weights().items()
    }


def test_16_bits_are_read_from_a_bin(torch, tmp_path):
    """Catches bfloat16, which NumPy does not know, and tied weights that are one piece of memory."""
    layouts.write_config(tmp_path, tiny.CONFIG)
    tensors = {n: torch.from_numpy(a).bfloat16() for n, a in layouts.hugging_face_names(tiny.weights()).items()}
    torch.save({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}, tmp_path / "pytorch_model.bin")
    found = read_checkpoint(tmp_path)
    for path, tensor in found.tensors.items():
        assert tensor.dtype == tensor.read().dtype.name == "bfloat16"
        np.testing.assert_array_equal(tensor.read(), tiny.weights()[path].astype(tensor.read().dtype))


# A table of the logits' own


def test_a_separate_lm_head_is_what_the_logits_are_made_with(backend, tmp_path):
    """Catches wte in its place, in the logits and in the decoder, and an lm_head that is lost when it is saved."""
    arrays = tiny.weights(UNTIED)
    layouts.write_safetensors(tmp_path / "it", UNTIED, arrays)
    model = pg.GPT2.load(tmp_path / "it", backend=backend)
    assert not model.config.tie_word_embeddings
    # The same through a tied model whose wte is the head; that of the one token is made up for by its position's.
    tokens, table = [[5]], {path: a for path, a in arrays.items() if path != "lm_head"}
    table["wte"], table["wpe"] = arrays["lm_head"], arrays["wpe"] + arrays["wte"][5] - arrays["lm_head"][5]
    tied = pg.GPT2(pg.GPT2Config(**SMALL), pg.params.nest(table))
    logits = pg.to_numpy(model.logits(tokens))
    np.testing.assert_allclose(logits, tied.logits(tokens), rtol=1e-4, atol=1e-5)
    assert next(model.stream_ids([5], max_new_tokens=1, temperature=0)) == logits[0, -1].argmax()
    model.save(tmp_path / "saved")
    assert bits(pg.GPT2.load(tmp_path / "saved", backend=backend)) == bits(model)


def test_a_separate_lm_head_that_is_missing_is_named(tmp_path):
    """Catches a table that is left at whatever it was initialised to, as transformers does with a warning."""
    layouts.write_safetensors(tmp_path / "it", UNTIED, tiny.weights(pg.GPT2Config(**SMALL)))
    with pytest.raises(pg.CheckpointError, match=r"lacks lm_head\.weight$"):
        read_checkpoint(tmp_path / "it")


# Layouts that are refused


def test_a_reader_that_is_not_installed_is_named_with_its_extra(written, tmp_path):
    """Catches an error of an import, and a checkpoint that is said to be broken where only its reader is missing."""
    hidden = """if True:
        import importlib.util, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name in ("torch", "tensorflow") else find_spec(name, *a)
        from portable_gpt2.cli import main
        sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))"""
    layouts.write_config(tmp_path / "bin", tiny.CONFIG)
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "hparams.json").write_text(
        json.dumps({"n_vocab": 384, "n_ctx": 64, "n_embd": 16, "n_head": 2, "n_layer": 2})
    )
    (tmp_path / "openai" / "model.ckpt.index").write_bytes(b"")
    for name, file, extra in (("bin", "pytorch_model.bin", "torch"), ("openai", "model.ckpt.index", "tensorflow")):
        command = [sys.executable, "-P", "-c", hidden, str(tmp_path / name), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert f"{tmp_path / name / file}: reading it takes {extra}, which is not installed: " in line
        assert f"pip install 'portable-gpt2[{extra}]'" in line
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_never_executed(torch, tmp_path):
    """Catches a file that runs a command when it is loaded."""
    layouts.write_config(tmp_path, tiny.CONFIG)
    command = f"touch {tmp_path / 'executed'}"
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.")
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
        read_checkpoint(tmp_path)

    class Command:
        def __reduce__(self):
            return os.system, (command,)

    for is_zip in (True, False):
        torch.save({"a": Command()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(
            pg.CheckpointError, match=r"pytorch_model\.bin: holds objects other than tensors \(posix\.system\)"
        ):
            read_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("what", [[1, 2], {"a": 1}, {"state_dict": {}}, {1: "torch"}])
def test_a_bin_of_anything_else_is_refused(torch, tmp_path, what):
    """Catches a training state that is taken for weights, and an AttributeError."""
    layouts.write_config(tmp_path, tiny.CONFIG)
    torch.save(what, tmp_path / "pytorch_model.bin")
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", None, 3]
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, name):
    """Catches a checkpoint that has files read which nobody meant to give it."""
    layouts.write_sharded_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    os.replace(tmp_path / "it" / "model-00001-of-00003.safetensors", tmp_path / "out.safetensors")
    index = tmp_path / "it" / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    for tensor, file in entries["weight_map"].items():
        entries["weight_map"][tensor] = name if "00001" in file else file
    index.write_text(json.dumps(entries))
    with pytest.raises(
        pg.CheckpointError, match=r"index\.json: .* is said to be in .*; expected the bare name of a file"
    ):
        read_checkpoint(tmp_path / "it")


def test_links_on_disk_are_followed(written, tmp_path):
    """Catches a rule against files elsewhere that refuses the hub's cache, which is made of links."""
    for file in written("safetensors in 3 files").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert len(read_checkpoint(tmp_path).tensors) == len(tiny.weights())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda index, first, last: index.pop(first), "00001-of-00003.safetensors: holds .*index.json does not say so"),
        (lambda index, first, last: index.update(x=index[first]), "00001.*: lacks x; .* says that it is there"),
        (lambda index, first, last: index.update({first: index[last]}), "0000[13]-.*: (holds|lacks) .*; model"),
        (lambda index, first, last: index.update({first: "none"}), "it.none: no such file; model.safetensors.index"),
        (lambda index, first, last: index.clear(), "index.json: weight_map is {}; expected an object"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, change, why):
    """Catches a tensor that is taken from whichever file comes last."""
    layouts.write_sharded_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    index = tmp_path / "it" / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    names = list(entries["weight_map"])
    change(entries["weight_map"], names[0], names[-1])
    index.write_text(json.dumps(entries))
    with pytest.raises(pg.CheckpointError, match=why):
        read_checkpoint(tmp_path / "it")


@pytest.mark.filterwarnings("ignore:.*form of GELU")
def test_weights_that_are_no_numbers_are_refused(layout, tmp_path):
    """Catches a model that gives NaN, or garbage after its tenth token."""
    arrays = {path: a.copy() for path, a in tiny.weights().items()}
    arrays["h1/mlp/c_fc/w"][-1, -1] = -np.inf
    layouts.WRITERS[layout][1](tmp_path / "it", tiny.CONFIG, arrays)
    with pytest.raises(pg.CheckpointError, match=r"it.\S+: \S+h.?1.mlp.c_fc.w\S* holds a NaN or an infinity"):
        pg.GPT2.load(tmp_path / "it", backend="numpy")


def test_weights_near_the_end_of_the_range_are_numbers():
    """Catches a test for infinity that takes the largest number for it, or that misses one, in any dtype."""
    from portable_gpt2.checkpoint.tensors import is_finite
    from portable_gpt2.host import float_dtypes

    for dtype in float_dtypes.values():
        bits = f"u{dtype.itemsize}"
        infinity = np.asarray(np.inf, dtype).view(bits)
        sign = np.asarray(1 << (8 * dtype.itemsize - 1), bits)
        tiny_, large = np.asarray(1, bits), infinity - np.asarray(1, bits)
        finite = np.stack([infinity * 0, sign, tiny_, tiny_ | sign, large, large | sign]).view(dtype)
        assert is_finite(finite)
        for no_number in (infinity, infinity | sign, infinity + 1, (infinity + 1) | sign, ~sign, ~(sign * 0)):
            assert not is_finite(np.append(finite, no_number.astype(bits).view(dtype)))


def test_two_checkpoints_in_one_directory_are_refused(tmp_path):
    """Catches a choice between the two that nobody is told of."""
    (tmp_path / "hparams.json").write_text('{"n_vocab": 384, "n_ctx": 64, "n_embd": 16, "n_head": 2, "n_layer": 2}')
    for step in (10, 20):
        (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"")
    with pytest.raises(
        pg.CheckpointError, match=r"holds model\.ckpt-10\.index and model\.ckpt-20\.index; keep the one"
    ):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n_vocab": None}, "n_vocab is missing; expected n_ctx, n_embd"),
        ({"n_inner": 3}, "n_inner is not known; expected n_ctx, n_embd"),
        ({"n_layer": "2"}, "n_layer is '2'; expected an int of at least 1"),
    ],
)
def test_hparams_that_are_none_are_refused(tmp_path, change, why):
    """Catches an entry of OpenAI's configuration that is ignored, or guessed."""
    entries = {"n_vocab": 384, "n_ctx": 64, "n_embd": 16, "n_head": 2, "n_layer": 2} | change
    (tmp_path / "hparams.json").write_text(json.dumps({name: n for name, n in entries.items() if n is not None}))
    with pytest.raises(pg.CheckpointError, match=rf"hparams\.json: {why}"):
        read_checkpoint(tmp_path)


def test_the_formats_are_told_without_importing_a_framework():
    """Catches a list of files that is made by importing their readers."""
    code = "import sys; from portable_gpt2.checkpoint.formats import formats; print(formats()); print(*sys.modules)"
    told, modules = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True
    ).stdout.splitlines()
    assert "pytorch_model.bin" in told
    assert not set(frameworks.FRAMEWORKS) & set(modules.split())
