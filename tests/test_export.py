"""Export to ONNX. ONNX Runtime computes with the files, and NumPy says what the results should be."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2 import export as exporting
from portable_gpt2.cli import main
from portable_gpt2.params import shapes
from portable_gpt2.sampling import Sampling, sample_with

pytestmark = pytest.mark.usefixtures("ndonnx")

CONFIGS = {
    "tied": tiny.CONFIG,
    "other": pg.GPT2Config(
        n_layer=3,
        n_head=3,
        n_embd=12,
        n_vocab=50,
        n_ctx=32,
        n_inner=20,
        eos_token_id=None,
        tie_word_embeddings=False,
        scale_attn_by_inverse_layer_idx=True,
        layer_norm_epsilon=1e-3,
    ),
}


def numpy_model(config=tiny.CONFIG, dtype="float32", seed=0):
    return tiny.model(pg.get_backend("numpy"), config, seed=seed, dtype=dtype)


def session_of(file):
    import onnx
    import onnxruntime

    onnx.checker.check_model(os.fspath(file), full_check=True)
    return onnxruntime.InferenceSession(os.fspath(file))


def exported(model, path, **options):
    model.export(path, **options)
    return session_of(path)


def tokens_of(batch, seq, config=tiny.CONFIG):
    return np.random.default_rng(seq).integers(config.n_vocab, size=(batch, seq))


def first_state(session, batch, capacity):
    """Return the inputs of a step but the tokens: zeros, with the shapes and dtypes that the file states."""
    sizes, dtypes = {"batch": batch, "capacity": capacity}, {"tensor(int64)": "int64", "tensor(float)": "float32"}
    _, *state = session.get_inputs()
    return {x.name: np.zeros([sizes.get(n, n) for n in x.shape], dtypes.get(x.type, "float16")) for x in state}


def step(session, tokens, state):
    """Return the logits after the last tokens, and the next state."""
    logits, *new = session.run(None, {"tokens": np.asarray(tokens, np.int64), **state})
    return logits, dict(zip(state, new, strict=True))


def error(computed, exact):
    return float(np.abs(np.asarray(computed, np.float64) - exact).max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_file_computes_logits_of_any_batch_and_length(config, tmp_path):
    """Catches a length that the file fixes, a mask or a scale of another layer, and an error above NumPy's own."""
    model, exact = numpy_model(config), numpy_model(config, "float64")
    session = exported(model, tmp_path / "gpt2.onnx")
    (output,) = session.get_outputs()
    assert output.shape == ["batch", "seq", config.n_vocab]
    for batch, seq in ((1, 1), (3, 7), (2, config.n_ctx)):
        tokens = tokens_of(batch, seq, config)
        (logits,) = session.run(None, {"tokens": tokens})
        truth = exact.logits(tokens)
        assert logits.shape == truth.shape
        assert error(logits, truth) <= 4 * error(model.logits(tokens), truth)


def test_the_shipped_model_is_as_exact_as_with_numpy(tmp_path):
    """Catches a wrong operator that the small weights of random models hide."""
    model, exact = (pg.GPT2.load("shakespeare", backend="numpy", dtype=dtype) for dtype in ("float32", "float64"))
    tokens = tokens_of(2, 100, model.config)
    (logits,) = exported(model, tmp_path / "gpt2.onnx").run(None, {"tokens": tokens})
    truth = exact.logits(tokens)
    assert error(logits, truth) <= 4 * error(model.logits(tokens), truth)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7, "top_p": 0.9, "temperature": 0.8}])
def test_a_loop_over_the_step_graph_writes_the_text_of_numpy(options, tmp_path):
    """Catches a cache that is written one row off, a mask that hides a key, and a position that is a constant."""
    model = pg.GPT2.load("shakespeare", backend="numpy")
    session = exported(model, tmp_path / "step.onnx", what="step")
    prompt = model.tokenizer.encode("To be, or not")
    tokens, unread, state = list(prompt), prompt, first_state(session, 1, 64)
    for _ in range(40):
        logits, state = step(session, [unread], state)
        tokens.append(sample_with(Sampling(**options), logits[0], len(tokens), tokens, 0))
        unread = tokens[-1:]
    assert int(state["position"]) == len(tokens) - 1
    assert tokens == prompt + list(model.stream_ids(prompt, max_new_tokens=40, **options))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_of_any_length_compute_the_logits_of_one_call(config, tmp_path):
    """Catches a step that is right for one token only, or for one batch, capacity or file."""
    session = exported(numpy_model(config), tmp_path / "step.onnx", what="step")
    whole, exact = exported(numpy_model(config), tmp_path / "gpt2.onnx"), numpy_model(config, "float64")
    for batch, capacity, ends in ((1, 9, (1, 2, 9)), (3, config.n_ctx, (5, 6, 20))):
        tokens, state, start = tokens_of(batch, capacity, config), first_state(session, batch, capacity), 0
        (logits,) = whole.run(None, {"tokens": tokens})
        truth = exact.logits(tokens)
        for end in ends:
            last, state = step(session, tokens[:, start:end], state)
            assert last.shape == (batch, config.n_vocab)
            assert error(last, truth[:, end - 1]) <= 4 * error(logits, truth)
            start = end


@pytest.mark.parametrize("what", ["logits", "step"])
def test_a_file_in_float16_has_half_the_size_and_the_error_of_its_weights(what, tmp_path):
    """Catches weights that stay in float32, and products that are summed in float16."""
    model, half = numpy_model(), numpy_model(dtype="float16")
    session = exported(model, tmp_path / "gpt2.onnx", what=what, dtype="float16")
    tokens = tokens_of(2, 40)
    truth = numpy_model(dtype="float64").logits(tokens)
    own = error(half.logits(tokens), truth)
    if what == "logits":
        (logits,) = session.run(None, {"tokens": tokens})
    else:
        truth = truth[:, -1]
        logits, _ = step(session, tokens, first_state(session, 2, 40))
    assert logits.dtype == np.float16
    assert error(logits, truth) <= 2 * own
    assert (tmp_path / "gpt2.onnx").stat().st_size < 2.5 * pg.params.count(tiny.CONFIG) + 40_000


def test_a_file_in_float64_computes_in_float64(tmp_path):
    """Catches an operator whose constants or attributes have float32, as Gelu and LayerNormalization have."""
    model, tokens = numpy_model(dtype="float64"), tokens_of(2, 40)
    (logits,) = exported(model, tmp_path / "gpt2.onnx").run(None, {"tokens": tokens})
    assert logits.dtype == np.float64
    assert error(logits, model.logits(tokens)) < 1e-12


@pytest.mark.parametrize("why", ["asked for", "large"])
def test_weights_can_be_in_a_file_of_their_own(why, tmp_path, monkeypatch):
    """Catches a wrong offset, a file that is not found from another directory, and one above the limit of ONNX."""
    import onnx

    if why == "large":
        monkeypatch.setattr(exporting, "LARGEST", 1000)
    model, file = numpy_model(), tmp_path / "model" / "gpt2.onnx"
    (tmp_path / "model").mkdir()
    model.export(file, external_data=why == "asked for")
    assert sorted(os.listdir(file.parent)) == ["gpt2.onnx", "gpt2.onnx.data"]
    assert file.stat().st_size < 50_000
    stored = onnx.load(file, load_external_data=False).graph.initializer
    offsets = [int(entry.value) for x in stored for entry in x.external_data if entry.key == "offset"]
    assert len(offsets) == len(shapes(tiny.CONFIG))
    assert not any(offset % 4096 for offset in offsets)  # so that the file can be mapped into memory
    (tmp_path / "model").rename(tmp_path / "moved")
    tokens = tokens_of(2, 9)
    (logits,) = session_of(tmp_path / "moved" / "gpt2.onnx").run(None, {"tokens": tokens})
    assert error(logits, model.logits(tokens)) < 1e-4


def test_the_file_has_the_names_of_the_parameters_and_the_configuration(tmp_path):
    """Catches names that nobody can match to a checkpoint, values of another parameter, and a file without metadata."""
    import onnx
    from onnx import numpy_helper

    numpy_model().export(tmp_path / "gpt2.onnx")
    model = onnx.load(tmp_path / "gpt2.onnx")
    stored = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    assert list(shapes(tiny.CONFIG)) == [name for name in stored if name in shapes(tiny.CONFIG)]
    for path, a in tiny.weights().items():
        np.testing.assert_array_equal(stored[path], a)
    assert model.producer_name == "portable_gpt2"
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert pg.GPT2Config.from_dict(json.loads(properties["config"])) == tiny.CONFIG


def test_ids_and_positions_out_of_range_give_nan(tmp_path):
    """Catches an id that wraps around, and a text that outgrows the cache and continues with wrong keys."""
    model = numpy_model()
    tokens = np.asarray([[1, 2], [1, -1], [1, 384]])
    (logits,) = exported(model, tmp_path / "gpt2.onnx").run(None, {"tokens": tokens})
    assert np.isnan(logits[:, -1]).all(axis=-1).tolist() == [False, True, True]
    assert np.isfinite(logits[0]).all()
    session = exported(model, tmp_path / "step.onnx", what="step")
    _, state = step(session, tokens_of(1, 4), first_state(session, 1, 5))
    logits, _ = step(session, tokens_of(1, 2), state)
    assert np.isnan(logits).all()


def test_the_backend_of_the_model_does_not_matter(tmp_path, ndonnx):
    """Catches a graph that depends on the model's backend, and a model of ndonnx that cannot be exported."""
    tokens = tokens_of(1, 5)
    model = tiny.model(pg.get_backend("ndonnx"))
    numpy_model().export(tmp_path / "numpy.onnx")
    model.export(tmp_path / "ndonnx.onnx")
    assert (tmp_path / "numpy.onnx").read_bytes() == (tmp_path / "ndonnx.onnx").read_bytes()
    assert error(pg.to_numpy(model.logits(tokens)), numpy_model().logits(tokens)) < 1e-4


def test_lengths_that_are_unknown_are_copied_computed_or_follow_from_the_others(tmp_path, ndonnx):
    """Catches a reshape that copies a length from the wrong axis; the model's own reshapes need only copies."""
    backend = pg.get_backend("ndonnx")

    def fn(tensors, inputs):
        x, reshape = inputs["x"], backend.xp.reshape
        m, n, d = backend.shape(x)
        return {
            "merged": reshape(x, (m * n, d)),
            "swapped": reshape(x, (n, m, d)),
            "split": reshape(x, (m, n, d // 2, 2)),
        }

    shapes = {"merged": ("rows", 4), "swapped": ("n", "m", 4), "split": ("m", "n", 2, 2)}
    with (tmp_path / "shapes.onnx").open("wb") as file:
        backend.write_graph(fn, {}, {"x": ("float32", ("m", "n", 4))}, shapes, file)
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    found = session_of(tmp_path / "shapes.onnx").run(None, {"x": x})
    for computed, shape in zip(found, ((15, 4), (5, 3, 4), (3, 5, 2, 2)), strict=True):
        np.testing.assert_array_equal(computed, x.reshape(shape))


# Errors


def test_an_existing_file_is_replaced_only_by_force(tmp_path):
    """Catches a file that is overwritten, or half of a pair."""
    model, file = numpy_model(), tmp_path / "gpt2.onnx"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"gpt2\.onnx: exists already; .* force"):
        model.export(file)
    assert file.read_text() == "mine"
    model.export(file, force=True)
    session_of(file)
    file.unlink()
    (tmp_path / "gpt2.onnx.data").write_text("mine")
    with pytest.raises(FileExistsError, match=r"gpt2\.onnx\.data: exists already"):
        model.export(file, external_data=True)
    assert os.listdir(tmp_path) == ["gpt2.onnx.data"]
    model.export(file, external_data=True, force=True)
    session_of(file)


@pytest.mark.parametrize("external_data", [False, True])
def test_a_weight_that_cannot_be_written_leaves_no_file(external_data, tmp_path):
    """Catches a file that ends in the middle, and one that replaces a good one."""
    weights = {**tiny.weights(), "ln_f/b": np.full(16, 1e6, np.float32)}
    model = pg.GPT2(tiny.CONFIG, pg.params.nest(weights))
    options = {"dtype": "float16", "external_data": external_data}
    with pytest.raises(ValueError, match=r"ln_f/b holds values beyond the range of float16"):
        model.export(tmp_path / "new.onnx", **options)
    assert os.listdir(tmp_path) == []


def test_an_old_graph_is_never_next_to_new_weights(tmp_path, monkeypatch):
    """Catches two renamings after which, if the second one fails, a graph reads the weights of another model."""
    numpy_model().export(tmp_path / "gpt2.onnx", external_data=True)

    def replace(draft, target, rename=Path.replace):
        if target.name == "gpt2.onnx":
            raise OSError("the power failed")
        return rename(draft, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="the power failed"):
        numpy_model(seed=1).export(tmp_path / "gpt2.onnx", external_data=True, force=True)
    assert os.listdir(tmp_path) == ["gpt2.onnx.data"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2.bin", {}, r"gpt2\.bin: the format .* suffix of its name; expected \.onnx"),
        ("gpt2", {}, r"gpt2: the format .* suffix of its name; expected \.onnx"),
        ("gpt2.onnx", {"what": "loss"}, r"what is 'loss'; expected 'logits' or 'step'"),
        ("gpt2.onnx", {"dtype": "bfloat16"}, r"no floating dtype 'bfloat16'; choose one of float32"),
        ("gpt2.onnx", {"external_data": "no"}, r"external_data is 'no'; expected true or false"),
        ("gpt2.onnx", {"force": 2}, r"force is 2; expected true or false"),
    ],
)
def test_wrong_arguments_are_explained(name, options, message, tmp_path):
    """Catches an error from the inside of a framework, and a file that remains after it."""
    with pytest.raises(ValueError, match=message):
        numpy_model().export(tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_not_one_is_named(tmp_path):
    """Catches an error without the path."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"gpt2\.onnx: its parent .*file is not a directory"):
        numpy_model().export(tmp_path / "file" / "gpt2.onnx")


def test_without_the_framework_the_error_says_what_to_install(tmp_path, monkeypatch):
    """Catches a ModuleNotFoundError that names a package nobody has heard of."""
    monkeypatch.setattr(exporting, "available_backends", lambda: ["numpy"])
    with pytest.raises(pg.BackendNotInstalled, match=r"pip install 'portable-gpt2\[onnx\]'"):
        numpy_model().export(tmp_path / "gpt2.onnx")


def test_the_command_exports_a_checkpoint(tmp_path, capsys):
    """Catches an option that is not passed on, and a message on stdout."""
    numpy_model().save(tmp_path / "model")
    file = tmp_path / "gpt2.onnx"
    args = ["export", str(tmp_path / "model"), str(file), "--what", "step", "--dtype", "float16", "--external-data"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{file} and {file}.data: from ")
    session = session_of(file)
    assert [x.name for x in session.get_inputs()][:3] == ["tokens", "position", "h0/attn/k"]
    assert session.get_inputs()[2].type == "tensor(float16)"
    assert main(args) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
