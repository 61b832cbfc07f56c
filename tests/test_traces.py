"""Traces: files that `Trace.save` or another program has written, refused files, and the sides of a comparison."""

import dataclasses
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from damage import cut, edit_header, flip, insert, overwrite, remove, replace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.cli import main
from portable_gpt2.comparison import trace as traces_module
from portable_gpt2.comparison.sides import Side, open_side, trace_model, traces
from portable_gpt2.files import already_exists
from portable_gpt2.host import float_dtypes
from portable_gpt2.model import observed_names
from portable_gpt2.numerics import Numerics, stated

CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_vocab=24, n_ctx=8, eos_token_id=(3, 4), n_inner=12)
TOKENS = np.asarray([[5, 3, 3]])
SUFFIXES = [".npz", ".safetensors"]


def traced(dtype="float32", backend="numpy"):
    return trace_model(tiny.model(pg.get_backend(backend), CONFIG, dtype=dtype), TOKENS, name="it")


def small(**changes):
    """Return the arrays of a trace of one layer, some of them changed; None leaves one out."""
    arrays = {
        "h0/ln_1": np.zeros((1, 3, 8), np.float32),
        "h0/attn/c_attn": np.zeros((1, 3, 24), np.float32),
        "h0/attn/q": np.zeros((1, 2, 3, 4), np.float32),
        "h0/attn/weights": np.zeros((1, 2, 3, 3), np.float32),
        "logits": np.zeros((1, 3, 24), np.float32),
    }
    arrays |= {name.replace("__", "/"): x for name, x in changes.items()}
    return {name: x for name, x in arrays.items() if x is not None}


def assert_equal(found, expected, widened=False):
    assert (found.source, found.dtype, found.config) == (expected.source, expected.dtype, expected.config)
    assert found.numerics == expected.numerics
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert list(found.arrays) == list(expected.arrays)
    for name, x in expected.arrays.items():
        x = x.astype(np.float32) if widened else x
        assert found.arrays[name].dtype == x.dtype
        assert found.arrays[name].tobytes() == np.ascontiguousarray(x).tobytes(), name


# Files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", float_dtypes)
def test_what_is_saved_is_loaded(tmp_path, suffix, dtype):
    """Catches a bit, a name, a dtype, an entry of the configuration or an error of exp that is lost on the way."""
    trace = dataclasses.replace(traced(dtype), numerics=Numerics(exp=(2.5, 0.75), tanh=3, log=4))
    trace.save(tmp_path / f"it{suffix}")
    found = pg.Trace.load(tmp_path / f"it{suffix}")
    assert_equal(found, trace, widened=(suffix, dtype) == (".npz", "bfloat16"))
    assert os.listdir(tmp_path) == [f"it{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_if_asked_for(tmp_path, suffix, dtype):
    """Catches a parameter that is lost, under another name or in other bits, and a file that has them unasked."""
    trace = traced(dtype)
    trace.save(tmp_path / f"with{suffix}", weights=True)
    trace.save(tmp_path / f"without{suffix}")
    assert pg.Trace.load(tmp_path / f"without{suffix}").weights == {}
    found = pg.Trace.load(tmp_path / f"with{suffix}")
    assert_equal(found, trace, widened=(suffix, dtype) == (".npz", "bfloat16"))
    assert set(found.weights) == set(trace.weights)
    for path, tensor in trace.weights.items():
        assert found.weights[path].shape == tensor.shape
        np.testing.assert_array_equal(found.weights[path].read(), tensor.read().astype(found.weights[path].dtype))
    with pytest.raises(ValueError, match=r"the weights of it .* are not known, so that they cannot be written"):
        dataclasses.replace(trace, weights={}).save(tmp_path / f"no{suffix}", weights=True)
    assert not (tmp_path / f"no{suffix}").exists()


def test_traces_with_weights_are_compared_op_by_op(tmp_path):
    """Catches weights in a file that a comparison does not use."""
    traced().save(tmp_path / "a.npz", weights=True)
    traced(backend="numpy").save(tmp_path / "b.safetensors")
    for a, b in (("a.npz", "b.safetensors"), ("b.safetensors", "a.npz")):
        found = pg.compare(tmp_path / a, tmp_path / b)
        assert found.equal
        assert found.missing == []
        assert [note[:34] for note in found.notes] == ["The logits are equal to the last b"]
        assert len(found.ops) == len(observed_names(CONFIG))


PARAMS = [
    ({"h0/ln1/g": np.zeros(8)}, r"no parameter is called 'h0/ln1/g' \(the nearest name is h0/ln_1/g\)"),
    ({"ln_1/g": np.zeros(8)}, "no parameter is called 'ln_1/g'"),
    ({"h0/wte": np.zeros((24, 8))}, "no parameter is called 'h0/wte'"),
    (
        {"h0/attn/c_attn/w": np.zeros((24, 8))},
        r"w has shape \[24, 8\]; expected \[n_embd, 3 n_embd\]: n_embd would be 24",
    ),
    (
        {"h0/mlp/c_fc/b": np.zeros((1, 8))},
        r"params/h0/mlp/c_fc/b has shape \[1, 8\]; expected \[n_hidden\]; no dimension",
    ),
    (
        {"h0/mlp/c_fc/b": np.zeros(8), "h1/mlp/c_fc/b": np.zeros(9)},
        "n_hidden would be 9, and is 8 in params/h0/mlp/c_fc/b",
    ),
    (
        {"ln_f/g": np.zeros(8, np.int64)},
        "params/ln_f/g has dtype int64; expected float64, float32, float16 or bfloat16",
    ),
]


@pytest.mark.parametrize(("params", "why"), PARAMS, ids=[why[:30] for _, why in PARAMS])
def test_parameters_in_a_file_that_do_not_fit_are_refused(tmp_path, params, why):
    """Catches a transposed weight or a misspelt name, which would silently not be used."""
    np.savez(tmp_path / "it.npz", tokens=TOKENS, **small(), **{f"params/{name}": x for name, x in params.items()})
    with pytest.raises(ValueError, match=why):
        pg.Trace.load(tmp_path / "it.npz")


def test_parameters_may_be_written_by_hand(tmp_path):
    """Catches parameters in another byte order or dtype, and a vocabulary that is larger than the logits."""
    params = {"params/wte": np.arange(240, dtype=">f4").reshape(30, 8), "params/ln_f/g": np.ones(8, np.float16)}
    np.savez(tmp_path / "it.npz", tokens=TOKENS, **small(), **params)
    trace = pg.Trace.load(tmp_path / "it.npz")
    assert {path: (x.shape, x.dtype) for path, x in trace.weights.items()} == {
        "wte": ((30, 8), "float32"),
        "ln_f/g": ((8,), "float16"),
    }
    np.testing.assert_array_equal(trace.weights["wte"].read(), params["params/wte"])
    given = pg.Trace("it", TOKENS, small(), weights={"wte": np.arange(240, dtype=">f4").reshape(30, 8)})
    np.testing.assert_array_equal(given.weights["wte"].read(), params["params/wte"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_trace_is_the_same_file(tmp_path, suffix):
    """Catches the time of day in a file."""
    for name in ("a", "b"):
        traced().save(tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_every_result_has_its_axes_and_its_place():
    """Catches a result of the model that a trace does not know, and another order than that of computation."""
    trace = traced()
    assert list(trace.arrays) == observed_names(CONFIG)
    shuffled = pg.Trace("it", TOKENS, dict(sorted(trace.arrays.items())))
    assert list(shuffled.arrays) == observed_names(CONFIG)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, None])
@pytest.mark.parametrize("prefix", ["", "model/"])
def test_a_file_that_was_written_by_hand_is_loaded(tmp_path, save, prefix):
    """Catches a file that only our own program can write: no metadata, no batch axis, OpenAI's scope, other dtypes."""
    arrays = {f"{prefix}h1/ln_1": np.ones((3, 8), np.float16), f"{prefix}logits": np.full((1, 3, 24), 2.0)}
    arrays[f"{prefix}h0/attn/q"] = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = tmp_path / ("port.npz" if save else "port.safetensors")
    tokens = TOKENS[0].astype(np.int32)
    if save is None:
        safetensors.numpy.save_file({"tokens": tokens, **arrays}, file, metadata={"format": "np"})
    else:
        save(file, tokens=tokens, **arrays)
    trace = pg.Trace.load(file)
    assert (trace.source, trace.dtype, trace.config) == (file.name, "float32", None)
    assert trace.tokens.tolist() == TOKENS.tolist()
    shapes = {name: (x.shape, x.dtype.name) for name, x in trace.arrays.items()}
    assert shapes == {
        "h0/attn/q": ((1, 2, 3, 4), "float32"),
        "h1/ln_1": ((1, 3, 8), "float16"),
        "logits": ((1, 3, 24), "float64"),
    }
    np.testing.assert_array_equal(trace.arrays["h0/attn/q"].ravel(), np.arange(24))


def test_metadata_may_be_written_by_hand(tmp_path):
    """Catches a dtype, a source or a configuration that is ignored."""
    config = np.bytes_(json.dumps(CONFIG.to_dict()).encode())
    np.savez(tmp_path / "a.npz", tokens=TOKENS, dtype="bfloat16", source=["mine"], config=config, **small())
    trace = pg.Trace.load(tmp_path / "a.npz")
    assert (trace.dtype, trace.source, trace.config) == ("bfloat16", "mine", CONFIG)


def test_the_dtype_of_the_computation_follows_from_the_results():
    """Catches results of bfloat16 that NumPy stores in float32 and that are judged as float32, and a model in float32
    that is judged as float64 because one of its results became float64.
    """
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    scores = np.full((2, 3, 3), np.finfo(np.float32).min)
    bfloat16 = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for arrays, dtype in [
        ({"ln_f": x}, "float32"),
        ({"ln_f": x.astype(np.float64)}, "float32"),
        ({"ln_f": x.astype(np.float64) / 3}, "float64"),
        ({"ln_f": x, "logits": x.astype(np.float64) / 3}, "float32"),
        ({"ln_f": bfloat16, "h0/attn/scores": scores}, "bfloat16"),
        ({"ln_f": bfloat16, "embedding": x}, "float32"),
        ({"ln_f": x.astype(np.float16).astype(np.float32)}, "float16"),
        ({"ln_f": bfloat16[:, :8]}, "float32"),  # a few numbers of few digits prove nothing
        ({"ln_f": x.astype(np.float16), "embedding": bfloat16.astype(ml_dtypes.bfloat16)}, "bfloat16"),
    ]:
        assert pg.Trace("it", TOKENS, arrays).dtype == dtype
    assert pg.Trace("it", TOKENS, {"ln_f": bfloat16}, "float32").dtype == "float32"


def test_other_byte_orders_and_numpy_s_bfloat16_are_read(tmp_path):
    """Catches values that are read with their bytes swapped, and bfloat16, which NumPy stores without its name."""
    x = np.asarray([[1.5, -2.0, 3.0, 0.25] * 2] * 3)
    np.savez(tmp_path / "a.npz", tokens=TOKENS, ln_f=x.astype(">f4"), embedding=x.astype(ml_dtypes.bfloat16))
    trace = pg.Trace.load(tmp_path / "a.npz")
    assert trace.arrays["ln_f"].dtype == np.float32
    assert trace.arrays["embedding"].dtype == ml_dtypes.bfloat16
    for name in ("ln_f", "embedding"):
        np.testing.assert_array_equal(trace.arrays[name][0].astype(float), x)


@pytest.mark.filterwarnings("error")
def test_a_file_of_python_2_is_read(tmp_path):
    """Catches a warning, or a refusal: the programs that run OpenAI's code may be as old as that code."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 8L), }".ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + np.ones(24, "<f4").tobytes()
    np.savez(tmp_path / "a.npz", tokens=TOKENS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("model/ln_f.npy", array)
    assert pg.Trace.load(tmp_path / "a.npz").arrays["ln_f"].tolist() == [[[1.0] * 8] * 3]


def test_nan_and_infinity_are_kept(tmp_path):
    """Catches a trace of a model that overflows, which is what somebody wants to compare, and scores of hidden keys."""
    x = np.asarray([[np.nan, np.inf, -np.inf] + [0.0] * 5] * 3, np.float32)
    pg.Trace("it", TOKENS, {"ln_f": x}).save(tmp_path / "a.npz")
    np.testing.assert_array_equal(pg.Trace.load(tmp_path / "a.npz").arrays["ln_f"][0], x)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_only_by_force_and_only_by_a_whole_one(tmp_path, suffix, monkeypatch):
    """Catches a trace that is lost because the next one has its name, or cannot be written to the end."""
    file = tmp_path / f"it{suffix}"
    traced().save(file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="exists already; give a new name, or replace this file by force"):
        traced().save(file)

    def fails(file, arrays, texts):
        file.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setitem(traces_module._FORMATS, suffix, (None, fails))
        with pytest.raises(OSError, match="no space left"):
            traced().save(file, force=True)
    assert file.read_bytes() == before
    traced("float64").save(file, force=True)
    assert pg.Trace.load(file).dtype == "float64"
    assert os.listdir(tmp_path) == [file.name]


# What is refused

REFUSED = [
    ({"h0/ln1": np.zeros((3, 8))}, r"no result is called 'h0/ln1' \(the nearest name is h0/ln_1\)$"),
    ({"transformer.h.1.mlp.c_fc": np.zeros((3, 8))}, r"the nearest name is h1/mlp/c_fc\)"),
    ({"h0/embedding": np.zeros((3, 8))}, "no result is called 'h0/embedding'"),
    ({f"x{i}": np.zeros((3, 8)) for i in range(5)}, "no result is called 'x0' .*, and 2 more$"),
    ({"model/logits": np.zeros((3, 24))}, "logits and model/logits are two names of one result"),
    ({"h0/ln_1": np.zeros((3, 8), np.int64)}, "h0/ln_1 has dtype int64; expected float64, float32, float16 or bfloat"),
    ({"h0/ln_1": np.zeros((3, 8), complex)}, "h0/ln_1 has dtype complex128; expected"),
    ({"h0/ln_1": np.zeros((3, 8), object)}, "h0/ln_1 has dtype object; expected"),
    (
        {"h0/ln_1": np.zeros((4, 8))},
        r"h0/ln_1 has shape \[4, 8\]; expected \[1, seq, n_embd\]: seq would be 4, and is 3 i",
    ),
    ({"h0/ln_1": np.zeros((2, 3, 8))}, r"h0/ln_1 has shape \[2, 3, 8\]; expected \[1, seq, n_embd\]; no dimension"),
    ({"h0/ln_1": np.zeros(8)}, r"h0/ln_1 has shape \[8\]; expected"),
    ({"ln_f": np.zeros((3, 0)), "h0/ln_1": None}, r"ln_f has shape \[3, 0\]; expected .*; no dimension may be 0"),
    ({"ln_f": np.zeros((3, 9))}, r"ln_f has shape \[3, 9\]; .*: n_embd would be 9, and is 8 in h0/ln_1"),
    ({"h0/attn/c_attn": np.zeros((3, 25))}, r"c_attn has shape \[3, 25\]; .*: n_embd would be 8.333333333, and is 8"),
    ({"h0/attn/k": np.zeros((4, 3, 4))}, "h0/attn/k has shape .*: n_head would be 4, and is 2 in h0/attn/q"),
    ({"h0/attn/attention": np.zeros((2, 3, 5))}, "attention has .*: head_size would be 5, and is 4 in h0/attn/q"),
    ({"h0/attn/q": np.zeros((2, 3, 8))}, "q has shape .*: n_embd would be 16, and is 8 in h0/ln_1"),
    ({"h0/attn/scores": np.zeros((2, 4, 3))}, "scores has shape .*: seq would be 4, and is 3 in tokens"),
    (
        {"h0/mlp/c_fc": np.zeros((3, 7)), "h0/mlp/gelu": np.zeros((3, 6))},
        "n_hidden would be 6, and is 7 in h0/mlp/c_fc",
    ),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=[why[:40] for _, why in REFUSED])
def test_results_that_do_not_fit_are_refused(tmp_path, changes, why):
    """Catches a misspelt name, which would silently compare nothing, and arrays of another text or another model."""
    arrays = {**small(), **changes}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    with pytest.raises((ValueError, TypeError), match=why):
        pg.Trace("it", TOKENS, arrays)
    if any(x.dtype == object for x in arrays.values()):
        return
    np.savez(tmp_path / "it.npz", tokens=TOKENS, **arrays)
    with pytest.raises(ValueError, match=why) as error:
        pg.Trace.load(tmp_path / "it.npz")
    assert str(error.value).startswith(f"{tmp_path / 'it.npz'}: ")


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (np.zeros((2, 3), np.int64), r"tokens have shape \[2, 3\]; expected those of one text, int \[1, seq\]"),
        (np.zeros((1, 0), np.int64), r"tokens have shape \[1, 0\]; expected"),
        (np.zeros((1, 1, 3), np.int64), r"tokens have shape \[1, 1, 3\]; expected int"),
        ([1, -2, 3], "tokens: token id -2 is not in the vocabulary"),
        ([1, 2.5, 3], "tokens hold 2.5; expected integers"),
        (np.zeros(3), "tokens have dtype float64; expected integers"),
        ("abc", "tokens are of type str; expected int"),
        ([1, 2, 24], "tokens: token id 24 is not in the vocabulary, which has ids 0 to 23"),
        ([1] * 9, "9 tokens were given; the model has n_ctx = 8 positions"),
    ],
)
def test_tokens_that_are_no_text_are_refused(tokens, why):
    """Catches a batch, of which only the first text would be compared, and ids that the model cannot have read."""
    with pytest.raises((ValueError, TypeError), match=why):
        pg.Trace("it", tokens, {"ln_f": np.zeros((3, 8))}, config=CONFIG)


def test_results_that_contradict_the_configuration_are_refused():
    """Catches a trace of another model."""
    for arrays, why in [
        ({"h2/ln_1": np.zeros((3, 8))}, "h2/ln_1 is a result of layer 2; the configuration has 2, from 0"),
        ({"logits": np.zeros((3, 8))}, "n_vocab would be 8, and is 24 in the configuration"),
        ({"h1/mlp/c_fc": np.zeros((3, 32))}, "n_hidden would be 32, and is 12 in the configuration"),
        ({}, "there are no results; expected arrays such as h0/ln_1 and logits"),
    ]:
        with pytest.raises(ValueError, match=why):
            pg.Trace("it", TOKENS, arrays, config=CONFIG)
    with pytest.raises(ValueError, match="dtype is 'float8'; expected float64, float32, float16 or bfloat16"):
        pg.Trace("it", TOKENS, small(), "float8")


class Bomb:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    """Catches allow_pickle, which lets a file run any program."""
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", tokens=TOKENS, **{"h0/ln_1": np.asarray([Bomb()], object)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npz: 'h0/ln_1': Object arrays cannot be loaded"):
        pg.Trace.load("a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("b.npz", "b.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: not a whole"):
            pg.Trace.load(name)
    assert not os.path.exists("unpickled")


def test_files_that_are_no_traces_are_refused(tmp_path, monkeypatch):
    """Catches a traceback, and a message that does not say what a trace is."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("directory.npz")
    np.savez("no-tokens.npz", **small())
    np.savez("no-results.npz", tokens=TOKENS)
    np.savez("two.npz", tokens=TOKENS, dtype=["float32", "float64"], **small())
    np.savez("dtype.npz", tokens=TOKENS, dtype="float8", **small())
    np.savez("config.npz", tokens=TOKENS, config='{"n_layer": 0}', **small())
    np.savez("no-json.npz", tokens=TOKENS, config="n_layer=2", **small())
    np.savez("list.npz", tokens=TOKENS, numerics="[1]", **small())
    np.savez("numerics.npz", tokens=TOKENS, numerics='{"exp": [1, -1], "tanh": 2, "log": 2}', **small())
    np.savez("lacks.npz", tokens=TOKENS, numerics='{"exp": [1, 1], "tanh": 2}', **small())
    np.savez("twice.npz", tokens=TOKENS)
    with zipfile.ZipFile("twice.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("tokens.npy", zipfile.ZipFile("twice.npz").read("tokens.npy"))
    np.savez("longer.npz", tokens=TOKENS)
    with zipfile.ZipFile("longer.npz", "a") as archive:
        archive.writestr("ln_f.npy", zipfile.ZipFile("longer.npz").read("tokens.npy") + b"x")
    np.savez("header.npz", tokens=TOKENS, ln_f=np.zeros(3, [(f"field {i}", "f4") for i in range(1000)]))
    safetensors.numpy.save_file({"tokens": TOKENS, "ln_f": np.zeros((3, 8), np.int64)}, "int.safetensors")
    safetensors.numpy.save_file({"tokens": TOKENS.astype(np.float32), **small()}, "float.safetensors")
    for name, why in {
        "nowhere.npz": "no such file",
        "directory.npz": "is a directory; expected a regular file",
        "it.pt": "the format of a trace follows from the suffix of its name; expected .npz or .safetensors",
        "no-tokens.npz": r"holds no tokens; expected them as an int array \[1, seq\]",
        "no-results.npz": "there are no results",
        "two.npz": r"'dtype': has dtype <U7 and shape \[2\]; expected one string",
        "dtype.npz": "dtype is 'float8'; expected float64",
        "config.npz": "config: n_layer is 0; expected an int of at least 1",
        "no-json.npz": "config: Expecting value",
        "list.npz": r"numerics is '\[1\]'; expected a JSON object",
        "numerics.npz": "numerics: exp is -1; expected a number of at least 0",
        "lacks.npz": "numerics is .*; expected exp, tanh, log, and two numbers for exp",
        "twice.npz": "'tokens': is there twice",
        "header.npz": r"'ln_f': Header info length \(\d+\) is large and may not be safe",  # a message of three lines
        "longer.npz": "'ln_f': has more bytes than its shape says",
        "int.safetensors": "ln_f has dtype I64; expected float64, float32, float16 or bfloat16",
        "float.safetensors": "tokens have dtype float32; expected integers",
    }.items():
        with pytest.raises((ValueError, OSError), match=why) as error:
            pg.Trace.load(name)
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The contents of a small trace's file, by its suffix."""
    room, weights = tmp_path_factory.mktemp("whole"), {"ln_f/g": np.ones(8, np.float32)}
    trace = pg.Trace("it", TOKENS, small(), config=CONFIG, weights=weights)
    for suffix in SUFFIXES:
        trace.save(room / f"it{suffix}", weights=True)
    return {suffix: (room / f"it{suffix}").read_bytes() for suffix in SUFFIXES}


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("error")
def test_a_damaged_trace_is_refused_in_one_line_or_only_its_values_changed(suffix, whole, tmp_path, data):
    """Catches any error but a ValueError or an OSError, more than one line, and arrays of a wrong shape or dtype."""
    draw, file = data.draw, tmp_path / f"it{suffix}"
    changes = [cut, flip, flip, overwrite, insert, remove, replace] + [edit_header] * 4 * (suffix == ".safetensors")
    file.write_bytes(draw(st.sampled_from(changes))(draw, whole[suffix]))
    try:
        trace = pg.Trace.load(file)
    except (ValueError, OSError) as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017 - only if there is one
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert trace.tokens.shape == (1, trace.arrays["logits"].shape[1]) if "logits" in trace.arrays else True
    assert trace.arrays.keys() <= set(observed_names(CONFIG))
    assert all(x.dtype in float_dtypes.values() for x in trace.arrays.values())


# Sides


def test_a_model_is_traced_on_every_backend(backend):
    """Catches a result that is missing or of another backend, and errors of exp that are not those of the adapter."""
    model = tiny.model(backend, CONFIG)
    trace = trace_model(model, TOKENS, name="it")
    assert trace.source == f"it on {backend.name}, {model.device}, float32"
    assert (trace.dtype, trace.config) == ("float32", CONFIG)
    assert trace.numerics == stated(backend, "float32", model.device.partition(":")[0])
    assert trace.tokens.tolist() == TOKENS.tolist()
    expected = model.trace(TOKENS[0])
    assert list(trace.arrays) == list(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(trace.arrays[name], pg.to_numpy(x), err_msg=name)
    weights = tiny.weights(CONFIG)
    assert trace.weights.keys() == weights.keys()
    for path, a in weights.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a)
    assert list(trace_model(model, TOKENS, ["*/q", "logits"]).arrays) == ["h0/attn/q", "h1/attn/q", "logits"]


def test_a_trace_of_an_unknown_framework_has_the_largest_stated_errors(backend):
    """Catches a false alarm for a file that a framework with a less accurate tanh has written."""
    trace = pg.Trace("a port", np.asarray([1]), {"logits": np.zeros((1, 5), np.float32)})
    for of_kind in backend.numerics.values():
        for found in of_kind.values():
            assert max(found.tanh, found.log) <= min(trace.numerics.tanh, trace.numerics.log)
            assert all(c <= largest for c, largest in zip(found.exp, trace.numerics.exp, strict=True))


def test_arrays_of_a_backend_may_be_given(backend):
    """Catches a port whose author must know how to bring its arrays to NumPy."""
    trace = pg.Trace("mine", TOKENS, {"ln_f": backend.from_numpy(np.full((3, 8), 2.5), "float32")})
    assert type(trace.arrays["ln_f"]) is np.ndarray
    assert (trace.arrays["ln_f"] == 2.5).all()
    assert trace.dtype == "float32"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    room = tmp_path_factory.mktemp("room")
    tiny.write_tokenizer(room)
    tiny.model(pg.get_backend("numpy"), tokenizer=pg.Tokenizer.load(room)).save(room / "it")
    return room / "it"


def test_everything_that_can_be_a_side_is_traced(checkpoint, tmp_path):
    """Catches a kind of side that is not recognised, and two sides that do not read the same tokens."""
    model = pg.GPT2.load(checkpoint)
    trace = trace_model(model, np.asarray([model.tokenizer.encode("To be")]), name="it")
    trace.save(tmp_path / "it.npz")
    trace.save(tmp_path / "it.safetensors")
    sides = [checkpoint, str(checkpoint), model, trace, tmp_path / "it.npz", str(tmp_path / "it.safetensors")]
    for side in [*sides, checkpoint / "model.safetensors", Side("mine", lambda tokens, progress: trace)]:
        first, second = traces(open_side(model), open_side(side), "To be")
        assert first.tokens.tolist() == second.tokens.tolist() == trace.tokens.tolist()
        np.testing.assert_array_equal(first.arrays["logits"], second.arrays["logits"])
    float64 = open_side(checkpoint, backend="numpy", dtype="float64", device="cpu").run(trace.tokens)
    assert (float64.dtype, float64.source) == ("float64", "it on numpy, cpu, float64")
    assert float64.arrays["logits"].dtype == np.float64


def test_the_tokens_are_those_of_the_text_or_of_a_trace(checkpoint):
    """Catches two models that read different texts, and a trace that is compared with another text's."""
    model = open_side(checkpoint)
    trace = open_side(model.run(np.asarray([[5, 6, 7]])))
    for pair in [(model, trace), (trace, model), (trace, trace)]:
        for text in (None, [5, 6, 7], np.asarray([5, 6, 7])):
            assert [found.tokens.tolist() for found in traces(*pair, text)] == [[[5, 6, 7]]] * 2
        with pytest.raises(
            ValueError, match="is a trace of the tokens 5, 6, 7, and the text has the tokens 5, 6; leav"
        ):
            traces(*pair, [5, 6])
    nameless = open_side(tiny.model(pg.get_backend("numpy")))
    with pytest.raises(ValueError, match="no text is given; give a text or token ids"):
        traces(model, nameless)
    assert traces(nameless, model, "To be")[0].tokens.tolist() == traces(model, nameless, "To be")[1].tokens.tolist()
    with pytest.raises(ValueError, match="the text is a str, and neither side has a tokenizer; give token ids"):
        traces(nameless, nameless, "To be")
    ids = traces(model, nameless, "<|endoftext|>", allow_special=True)[0].tokens
    assert ids.tolist() == [[0]]


def test_what_is_no_side_is_refused(checkpoint):
    """Catches an option that is ignored, and an object that is called to see what it does."""
    for name in ("backend", "device", "dtype"):
        with pytest.raises(ValueError, match=rf"{name} is given for <GPT2 of .*; only a checkpoint is loaded with one"):
            open_side(pg.GPT2.load(checkpoint), **{name: "float64"})
    with pytest.raises(TypeError, match="5 is not a model that can be traced; expected one of PyTorch's modules"):
        open_side(5)
    with pytest.raises(pg.CheckpointError, match="nowhere-at-all: no such directory"):
        open_side("./nowhere-at-all")


# The command


def run(capsys, *args):
    capsys.readouterr()
    try:
        status = main(["trace", *map(str, args)])
    except SystemExit as exit_:
        status = exit_.code
    return status, *capsys.readouterr()


def without_bar(err):
    """Return the messages after a command's progress bar, which appears if the command takes longer than a second."""
    return err.rpartition("\r")[2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_trace_writes_what_the_model_computes(checkpoint, tmp_path, capsys, suffix, backend):
    """Catches an option that does not reach the model, and a file that is not the trace of this text."""
    file, model = tmp_path / f"it{suffix}", pg.GPT2.load(checkpoint, backend=backend)
    args = ["To be", "--model", checkpoint, "--backend", backend.name, "-o", file]
    n = len(model.tokenizer.encode("To be"))
    status, out, err = run(capsys, *args)
    assert (status, out, without_bar(err)) == (0, "", f"wrote {file}: 33 results for {n} tokens\n")
    trace = pg.Trace.load(file)
    assert trace.source == f"it on {backend.name}, {model.device}, float32"
    for name, x in model.trace("To be").items():
        np.testing.assert_array_equal(trace.arrays[name], pg.to_numpy(x), err_msg=name)
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err == f"portable-gpt2: {already_exists(file)}\n"
    status, _, err = run(capsys, *args, "--force", "--weights")
    assert set(pg.Trace.load(file).weights) == {path for path, _ in pg.params.flatten(model.params)}
    status, _, err = run(capsys, *args, "--force", "--names", "logits", "*/attn/?", "--allow-special")
    assert (status, without_bar(err)) == (0, f"wrote {file}: 7 results for {n} tokens\n")
    assert list(pg.Trace.load(file).arrays) == [*(f"h{i}/attn/{each}" for i in (0, 1) for each in "qkv"), "logits"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["-o", "it.npy", "--model", "nowhere-at-all"], "it.npy: the format of a trace follows from the suffix of"),
        (["-o", "there.npz", "--model", "nowhere-at-all"], "there.npz: exists already"),  # before the model is loaded
        (["-o", "it.npz", "--names", "h9/ln_1"], "no result is called 'h9/ln_1'; the names are embedding, h0/ln_1"),
        (["-o", "it.npz", "--names"], "argument --names: expected at least one argument"),
        (["-o", "it.npz", "--dtype", "int8"], "has no floating dtype 'int8'"),
        ([], "the following arguments are required: -o/--output"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_one_line(checkpoint, tmp_path, capsys, monkeypatch, args, why):
    """Catches a mistake that is found after the model was loaded, and a file that is left half written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_text("mine")
    model = [] if "--model" in args else ["--model", checkpoint]
    status, out, err = run(capsys, "To be", *model, *args)
    assert (status, out) == (2, "")
    assert why in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["there.npz"]
