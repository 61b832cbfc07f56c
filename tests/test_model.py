"""The model: its valid and invalid arguments, its parameters, and how frameworks transform it.

`portable_gpt2.testing.model` tests its results, with the same yardstick: a backend's largest error is at most 4 times
that of the plain formula in float32.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import frameworks
import numpy as np
import pytest
from safetensors.numpy import save_file

import portable_gpt2 as pg
from portable_gpt2.testing import claims
from portable_gpt2.testing.plain_gpt2 import (
    CONFIGS,
    PLAIN,
    on_backend,
    plain_gpt2,
    random_weights,
    some_tokens,
    truth_and_error,
)

pytestmark = pytest.mark.every_device


def params_and_tokens(backend, config, tokens, dtype="float32"):
    """Return random weights and tokens on a backend; every op on them lives on that backend's default device."""
    return on_backend(backend, random_weights(config), dtype), backend.from_numpy(tokens)


def largest_error(logits, truth):
    return float(abs(pg.to_numpy(logits).astype(np.float64) - truth).max())


# From a file


def test_a_checkpoint_loads_into_the_model_that_its_names_say(backend, tmp_path):
    """Catches a tensor read under another's name, a square matrix transposed, an entry of config.json ignored: the
    file is written here name by name, not by `save`.
    """
    config = pg.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_vocab=41, n_ctx=20, n_inner=24, layer_norm_epsilon=0.01, eos_token_id=None
    )
    flat = random_weights(config)
    tensors = {"wte.weight": flat["wte"], "wpe.weight": flat["wpe"]}
    tensors |= {"ln_f.weight": flat["ln_f/g"], "ln_f.bias": flat["ln_f/b"]}
    for i in range(2):
        for scope in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            name = f"h.{i}.{scope.replace('/', '.')}"
            tensors |= {f"{name}.weight": flat[f"h{i}/{scope}/w"], f"{name}.bias": flat[f"h{i}/{scope}/b"]}
        for scope in ("ln_1", "ln_2"):
            name = f"h.{i}.{scope}"
            tensors |= {f"{name}.weight": flat[f"h{i}/{scope}/g"], f"{name}.bias": flat[f"h{i}/{scope}/b"]}
    save_file({name: a.astype(np.float32) for name, a in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 41, "n_positions": 20, '
        '"n_inner": 24, "layer_norm_epsilon": 0.01}'
    )
    tokens = some_tokens(config)
    truth, error = truth_and_error(flat, tokens, config)

    model = pg.GPT2.load(tmp_path, backend=backend)

    ratio = largest_error(model.logits(tokens), truth) / (4 * error)
    claims.record("GPT2.logits", backend, "float32", ratio)
    assert ratio <= 1


# The cache


def test_a_position_of_numpy_becomes_an_int(backend):
    """Catches a narrow integer that wraps around later, or that a compiler takes for an array."""
    params, ids = params_and_tokens(backend, PLAIN, some_tokens(PLAIN, seq=1))
    cache = pg.new_cache(params, PLAIN, batch=2)
    _, cache = pg.gpt2(params, ids, PLAIN, cache._replace(position=np.int8(0)))
    assert (type(cache.position), cache.position) == (int, 1)


def test_a_cache_without_a_position_is_empty(backend):
    """Catches defaults that skip a row, or hide keys as padding."""
    params, ids = params_and_tokens(backend, PLAIN, some_tokens(PLAIN, seq=2))
    cache = pg.KVCache(*pg.new_cache(params, PLAIN, batch=2)[:2])
    assert (cache.position, cache.padding) == (0, None)
    logits, cache = pg.gpt2(params, ids, PLAIN, cache)
    assert cache.position == 2
    assert largest_error(logits, pg.to_numpy(pg.gpt2(params, ids, PLAIN)[0])) < 1e-5


# Frameworks that compile have an array for a position when they trace. Here it is an array in an eager call.
in_eager_calls = pytest.mark.parametrize("backend", ["numpy", "array_api_strict"], indirect=True)


@in_eager_calls
@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_a_position_may_be_an_array(backend, padding):
    """Catches rows beyond the last token that attention sees, and a row or a position that is counted from elsewhere:
    no shape may depend on the position, so attention reads all rows of the cache.
    """
    flat, tokens = random_weights(PLAIN), some_tokens(PLAIN, seq=9)
    params = on_backend(backend, flat)
    cache, found = a_cache(params, batch=2, capacity=12, padding=padding), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        assert start == int(cache.position)
        cache = cache._replace(position=backend.from_numpy(np.asarray(start, np.int32)))
        logits, cache = pg.gpt2(params, backend.from_numpy(tokens[:, start:stop]), PLAIN, cache)
        found.append(pg.to_numpy(logits))
    for i, n in enumerate(padding or [0, 0]):
        truth, error = truth_and_error(flat, tokens[i : i + 1, n:], PLAIN)
        assert abs(np.concatenate(found, axis=1)[i, n:] - truth[0]).max() <= 4 * error


@in_eager_calls
@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_at_a_position_that_is_not_read_tokens_have_room_or_nan(backend, padding, monkeypatch):
    """Catches a row that is written over, and logits of another text, where the values of arrays are not known."""
    monkeypatch.setattr(backend, "peek", lambda x: None)
    params, ids = params_and_tokens(backend, PLAIN, some_tokens(PLAIN, seq=2))
    for position, fits in ((0, True), (10, True), (11, False), (-1, False), (-2, False), (12, False)):
        at = backend.from_numpy(np.asarray(position, np.int32))
        cache = a_cache(params, batch=2, capacity=12, padding=padding)._replace(position=at)
        logits = pg.to_numpy(pg.gpt2(params, ids, PLAIN, cache)[0])
        assert (np.isfinite(logits) if fits else np.isnan(logits)).all(), position


def test_without_a_cache_none_is_returned(backend):
    """Catches another value, which a caller that tests for None would take for a cache."""
    params, ids = params_and_tokens(backend, PLAIN, some_tokens(PLAIN, seq=2))
    assert pg.gpt2(params, ids, PLAIN)[1] is None


@pytest.mark.parametrize("capacity", [0, -1, 49])
def test_a_cache_that_the_model_cannot_fill_is_refused(backend, capacity):
    """Catches positions beyond wpe, which JAX would clamp."""
    params = on_backend(backend, random_weights(PLAIN))
    with pytest.raises(ValueError, match=rf"capacity is {capacity}; expected an int from 1 to 48 \(n_ctx\)"):
        pg.new_cache(params, PLAIN, capacity=capacity)


# What does not fit


def a_cache(params, **options):
    return pg.new_cache(params, PLAIN, **options)


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


CACHES = {  # a function that spoils a cache, the error, its message
    "of more texts": (lambda p, c: a_cache(p, batch=2), ValueError, r"\[2, 4, 48, 8\]; .* = \[1, 4, 48, 8\]"),
    "longer than the model": (lambda p, c: pg.grow_cache(c, 96), ValueError, "room for 96 tokens.*n_ctx = 48"),
    "without a layer": (
        lambda p, c: c._replace(k=c.k[:1], v=c.v[:1]),
        ValueError,
        "the cache has 1 arrays for k and 1 arrays for v; expected a cache from new_cache for 2 layers",
    ),
    "with one layer more": (
        lambda p, c: c._replace(k=(*c.k, c.k[0]), v=(*c.v, c.v[0])),
        ValueError,
        "3 arrays for k and 3 arrays for v; expected a cache from new_cache for 2 layers",
    ),
    "without a layer's values": (lambda p, c: c._replace(v=c.v[:1]), ValueError, "2 arrays for k and 1 arrays for v"),
    "without keys": (lambda p, c: c._replace(k=None), ValueError, "has None for k and 2 arrays for v"),
    "without a position": (lambda p, c: c._replace(position=None), TypeError, "position is None; expected an int"),
    "empty": (lambda p, c: c._replace(k=(), v=()), ValueError, "a cache from new_cache for 2 layers"),
    "a list": (lambda p, c: [c], TypeError, "cache is "),
    "a plain tuple": (lambda p, c: tuple(c), TypeError, "cache is "),
    "with None in it": (lambda p, c: c._replace(v=(c.v[0], None)), TypeError, "the cache: .*NoneType"),
    "before its start": (lambda p, c: c._replace(position=-1), ValueError, "position is -1"),
    "at a float": (lambda p, c: c._replace(position=1.0), TypeError, "position is 1.0; expected an int"),
    "at True": (lambda p, c: c._replace(position=True), ValueError, "position is True"),
    "with a vector in it": (
        lambda p, c: c._replace(k=(c.k[0], c.k[1][0, 0, 0, :])),
        ValueError,
        r"the cache of layer 1 has shape \[8\]",
    ),
    "whose first array is a vector": (
        lambda p, c: c._replace(k=(c.k[0][0, 0, 0, :], c.k[1])),
        ValueError,
        r"the cache of layer 0 has shape \[8\]",
    ),
    "with a matrix in it": (
        lambda p, c: c._replace(v=(c.v[0], c.v[1][:, :, 0, 0])),
        ValueError,
        r"the cache of layer 1 has shape \[1, 4\]",
    ),
    "at several positions": (
        lambda p, c: c._replace(position=p["ln_f"]["g"]),
        ValueError,
        r"position has shape \[32\]",
    ),
    "at an array of a float": (
        lambda p, c: c._replace(position=p["ln_f"]["g"][0, ...]),
        TypeError,
        "position has dtype",
    ),
    "with a list for its padding": (
        lambda p, c: c._replace(padding=[0]),
        TypeError,
        r"padding is \[0\]; expected an array",
    ),
    "with a number for its padding": (
        lambda p, c: c._replace(padding=0),
        TypeError,
        "padding is 0; expected an array",
    ),
    "that is full": (lambda p, c: c._replace(position=np.int8(48)), ValueError, "1 tokens were given at position 48"),
    "that is full, by an array": (
        lambda p, c: c._replace(position=pg.backend_of(p["wte"]).from_numpy(np.asarray(48, np.int32))),
        ValueError,
        "1 tokens were given at position 48",
    ),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_that_does_not_fit_is_refused(backend, case):
    """Catches a cache that a framework broadcasts over two texts (TensorFlow), positions beyond wpe, whose logits are
    NaN (JAX), and a KeyError from within the model.
    """
    params, ids = params_and_tokens(backend, PLAIN, np.asarray([[7]], np.int32))
    make, error, message = CACHES[case]
    cache = make(params, a_cache(params))
    if case.endswith("by an array") and pg.backend_of(ids).peek(cache.position) is None:
        return  # the position is not known, and the logits become NaN
    with pytest.raises(error, match=message) as caught:
        pg.gpt2(params, ids, PLAIN, cache)
    assert type(caught.value) is error


def test_a_cache_of_another_kind_of_model_is_refused(backend):
    """Catches a cache whose heads, dtype or framework are those of another model: NumPy would convert it."""
    params, ids = params_and_tokens(backend, PLAIN, np.asarray([[7]], np.int32))
    heads = pg.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_vocab=101, n_ctx=48, eos_token_id=None)
    with pytest.raises(ValueError, match=r"shape \[1, 2, 48, 16\]; .* = \[1, 4, 48, 8\]"):
        pg.gpt2(params, ids, PLAIN, pg.new_cache(params, heads))
    two = a_cache(params, batch=2, padding=[0, 3])
    with pytest.raises(ValueError, match=r"padding has shape \[2\]; 1 texts"):
        pg.gpt2(params, ids, PLAIN, a_cache(params)._replace(padding=two.padding))
    if "float16" in backend.dtypes:
        with pytest.raises(TypeError, match=r"dtype .*float16.*; the parameters have .*float32"):
            pg.gpt2(params, ids, PLAIN, a_cache(on_backend(backend, random_weights(PLAIN), "float16")))
    for other in map(pg.get_backend, pg.available_backends()):
        if other.name != backend.name:
            with pytest.raises(TypeError, match=f"the cache is of {other.name} and tokens are of {backend.name}"):
                pg.gpt2(params, ids, PLAIN, a_cache(on_backend(other, random_weights(PLAIN))))


BAD_CACHES = [
    ({"batch": -1}, ValueError, "batch is -1; expected an int of at least 1"),
    ({"batch": 0}, ValueError, "batch is 0; expected an int of at least 1"),
    ({"batch": 10**9}, ValueError, "a cache of 1,000,000,000 texts of 48 tokens would take {:,.1f} GiB of memory"),
    ({"padding": [0, 1]}, ValueError, r"padding is \[0, 1\]; expected 1 ints"),
    ({"padding": [1.7]}, ValueError, "padding is 1.7; expected an int from 0 to 47"),
    ({"padding": [48]}, ValueError, "padding is 48; expected an int from 0 to 47"),
    ({"padding": [10**400]}, ValueError, "padding is 1000.*; expected an int from 0 to 47"),
    ({"padding": 3}, TypeError, "padding is 3; expected an int for each text, in a list"),
    ({"padding": iter(int, 1)}, ValueError, "padding has more than 1,048,576 items"),
]


N_BYTES = 4 * 2 * 2 * 48 * 32  # of the cache of one text in float32: keys and values, layers, positions, columns

# The memory of the host does not limit what lives on an accelerator, so these two tests run on the host alone.
on_the_host = pytest.mark.parametrize("backend", frameworks.BACKENDS, indirect=True)


@pytest.mark.parametrize(("options", "error", "message"), BAD_CACHES, ids=[str(o)[:40] for o, *_ in BAD_CACHES])
@on_the_host
def test_a_cache_that_cannot_be_made_is_refused(backend, options, error, message):
    """Catches sizes that the framework refuses in words of its own, or that take all of the memory."""
    params = on_backend(backend, random_weights(PLAIN))
    with pytest.raises(error, match=message.format(N_BYTES * 10**9 / 2**30)):
        a_cache(params, **options)


def test_the_smallest_cache_holds_one_token(backend):
    """Catches a least size of 2, for the layers as well, and padding that may not leave room for one token alone."""
    config = pg.GPT2Config(**{**vars(PLAIN), "n_layer": 1})
    params, ids = params_and_tokens(backend, config, np.asarray([[7]], np.int32))
    logits, cache = pg.gpt2(params, ids, config, pg.new_cache(params, config, batch=1, capacity=1))
    assert (backend.shape(logits), cache.position) == ((1, 1, 101), 1)
    padding = pg.new_cache(params, config, capacity=8, padding=[7]).padding
    assert (backend.to_numpy(padding).tolist(), backend.device(padding)) == ([7], backend.device(params["wte"]))


def test_a_cache_is_made_for_the_parameters_of_its_model(backend):
    """Catches a cache for parameters that are not those of the configuration."""
    params = on_backend(backend, random_weights(PLAIN))
    with pytest.raises(ValueError, match="hold h2/attn"):
        pg.new_cache({**params, "h2": params["h1"]}, PLAIN)


@on_the_host
def test_a_cache_does_not_shrink_nor_grow_beyond_the_memory(backend):
    """Catches a cache that is cut, and loses keys, and the framework's own exception for what does not fit."""
    cache = a_cache(on_backend(backend, random_weights(PLAIN)), capacity=8)
    with pytest.raises(ValueError, match=r"capacity is 7; expected an int of at least 8 \(the cache has room for 8"):
        pg.grow_cache(cache, 7)
    two = a_cache(on_backend(backend, random_weights(PLAIN)), batch=2, capacity=8)
    size = 2 * N_BYTES / 48 * 10**15 / 2**30
    with pytest.raises(
        ValueError, match=f"a cache of 1,000,000,000,000,000 tokens would take {size:,.1f} GiB of memory"
    ):
        pg.grow_cache(two, 10**15)
    with pytest.raises(ValueError, match=r"has 0 arrays for k and 0 arrays for v; expected a cache from new_cache$"):
        pg.grow_cache(pg.KVCache((), ()), 7)


GROWN = {  # a function that spoils the k and v of the first layer
    "a vector": (lambda k, v: (k, v[0, 0, 0, :]), ValueError, r"buffers of shapes \[1, 4, 48, 8\] and \[8\]"),
    "a scalar": (lambda k, v: (k[0, 0, 0, 0, ...], v), ValueError, r"buffers of shapes \[\] and"),
    "one shorter": (lambda k, v: (k, v[:, :, :9, :]), ValueError, r"and \[1, 4, 9, 8\]"),
    "a number": (lambda k, v: (k, 1), TypeError, "^the cache: expected an array"),
}


@pytest.mark.parametrize("case", GROWN)
def test_a_cache_is_looked_at_before_it_grows(backend, case):
    """Catches an error of Python's or the framework's about axes, and a buffer that is filled up with zeros."""
    cache = a_cache(on_backend(backend, random_weights(PLAIN)))
    make, error, message = GROWN[case]
    k, v = make(cache.k[0], cache.v[0])
    with pytest.raises(error, match=message):
        pg.grow_cache(cache._replace(k=(k, cache.k[1]), v=(v, cache.v[1])), 96)
    with pytest.raises(TypeError, match="cache is None; expected a cache from new_cache"):
        pg.grow_cache(None, 96)
    other = pg.get_backend("array_api_strict" if backend.name == "numpy" else "numpy")
    stranger = a_cache(on_backend(other, random_weights(PLAIN)))
    with pytest.raises(TypeError, match=rf"^the cache has arrays of {backend.name} and of {other.name}; make a new"):
        pg.grow_cache(cache._replace(k=(cache.k[0], stranger.k[1])), 96)


TOKENS = {
    "one axis": ([1, 2], r"shape \[2\]; expected int \[batch, seq\]"),
    "no axis": (1, r"shape \[\]; expected int \[batch, seq\]"),
    "three axes": ([[[1, 2]]], r"shape \[1, 1, 2\]; expected int \[batch, seq\]"),
    "no token": (np.zeros((1, 0)), r"shape \[1, 0\].* no dimension may be 0"),
    "no text": (np.zeros((0, 3)), r"shape \[0, 3\].* no dimension may be 0"),
    "one token": ([[1]], "a window has one token, and nothing to predict"),
    "too long": ([[1] * 50], "49 tokens were given; the model has n_ctx = 48 positions"),
}


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("loss", [pg.loss, pg.gradients.loss], ids=["loss", "hand-written gradient"])
def test_tokens_that_have_no_loss_are_refused(backend, loss, case):
    """Catches the framework's own error about an axis, and a window beyond wpe, whose loss is NaN on JAX."""
    ids, message = TOKENS[case]
    params, ids = params_and_tokens(backend, PLAIN, np.asarray(ids, np.int32))
    with pytest.raises(ValueError, match=message):
        loss(params, ids, PLAIN)


PARAMS = {  # a function that spoils the parameters, the error, its message
    "none": (lambda p, i: {}, ValueError, "the parameters are 0 arrays; config has 2 layers"),
    "not a dict": (lambda p, i: None, TypeError, "params is None; expected a dict"),
    "without a part": (lambda p, i: {**p, "h1": without(p["h1"], "mlp")}, ValueError, "lack h1/mlp/c_fc/b"),
    "with a layer more": (lambda p, i: {**p, "h2": p["h1"]}, ValueError, "hold h2/attn"),
    "with a table more": (lambda p, i: {**p, "lm_head": p["wte"]}, ValueError, "hold lm_head"),
    "with None": (lambda p, i: {**p, "h1": {**p["h1"], "ln_1": {"g": None, "b": None}}}, TypeError, "h1/ln_1/g: "),
    "with ints": (lambda p, i: {**p, "ln_f": {"g": i, "b": i}}, TypeError, "ln_f/. has dtype .*int32"),
    "with a longer wpe": (lambda p, i: {**p, "wpe": p["wte"]}, ValueError, r"wpe has shape \[101, 32\]"),
}


@pytest.mark.parametrize("case", PARAMS)
@pytest.mark.parametrize("function", [pg.gpt2, pg.loss, pg.gradients.loss], ids=["gpt2", "loss", "gradients.loss"])
def test_parameters_of_another_model_are_refused(backend, function, case):
    """Catches a KeyError from within the model, a layer that is left out, and a framework's own error."""
    make, error, message = PARAMS[case]
    params, ids = params_and_tokens(backend, PLAIN, np.asarray([[7, 8]], np.int32))
    with pytest.raises(error, match=message) as caught:
        function(make(params, ids[0, ...]), ids, PLAIN)
    assert type(caught.value) is error
    with pytest.raises(TypeError, match="config is None; expected a GPT2Config"):
        function(params, ids, None)


@pytest.mark.parametrize("name", CONFIGS)
def test_not_every_parameter_is_looked_at_in_every_step(backend, name, monkeypatch):
    """Catches a count of the parameters that is wrong for valid ones: each step would then check all their shapes."""
    params, ids = params_and_tokens(backend, CONFIGS[name], some_tokens(CONFIGS[name], seq=2))
    looked_at = []
    monkeypatch.setattr(pg.model, "check_params", lambda *x: looked_at.append(x))
    pg.gpt2(params, ids, CONFIGS[name])
    assert not looked_at


@pytest.mark.parametrize("backend", ["array_api_strict"], indirect=True)  # it has devices, and refuses two at once
def test_arrays_on_different_devices_are_refused_by_name(backend):
    """Catches the framework's own error, which does not say which of the arrays is elsewhere."""
    config = CONFIGS["one head, unscaled"]
    here, there = (on_backend(backend, random_weights(config), device=name) for name in ("cpu", "device1"))
    ids = backend.from_numpy(some_tokens(config, batch=1, seq=3), device="device1")
    with pytest.raises(ValueError, match="different devices: params on cpu, tokens on device1; put them on one"):
        pg.gpt2(here, ids, config)
    with pytest.raises(ValueError, match="devices: params on device1, tokens on device1, cache on cpu; put them on"):
        pg.gpt2(there, ids, config, pg.new_cache(here, config))
    logits, _ = pg.gpt2(there, ids, config, pg.new_cache(there, config))
    assert backend.device(logits) == "device1"


def test_a_model_of_two_frameworks_or_dtypes_is_refused(backend):
    """Catches leaves that only some layer refuses, long after the model was made."""
    config, params = PLAIN, on_backend(backend, random_weights(PLAIN))
    stranger = pg.get_backend("numpy" if backend.name != "numpy" else pg.available_backends()[0])
    if stranger is not backend:
        mixed = {**params, "wpe": on_backend(stranger, random_weights(config))["wpe"]}
        with pytest.raises(TypeError, match=r"wpe .*; give arrays of one framework"):
            pg.GPT2(config, mixed)
    other = "float16" if "float16" in backend.dtypes else "float64"
    mixed = {**params, "wpe": on_backend(backend, random_weights(config), other)["wpe"]}
    with pytest.raises(TypeError, match=r"dtype .* convert one of them"):
        pg.GPT2(config, mixed)
    with pytest.raises(TypeError, match="tokenizer is 'gpt2'; expected a Tokenizer"):
        pg.GPT2(config, params, "gpt2")


def test_a_compiled_step_beyond_the_room_of_its_cache_is_nan(jax):
    """Catches keys that are written over earlier ones where the position is traced, and the logits of another text."""
    backend = pg.get_backend("jax")
    params = on_backend(backend, random_weights(PLAIN))
    step = jax.jit(lambda tokens, cache: pg.gpt2(params, tokens, PLAIN, cache))
    cache, without_number = a_cache(params, capacity=3), []
    for token in range(5):
        logits, cache = step(backend.from_numpy(np.asarray([[token]], np.int32)), cache)
        without_number.append(bool(np.isnan(pg.to_numpy(logits)).all()))
    assert without_number == [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="room for 96 tokens"):
        step(backend.from_numpy(np.asarray([[1]], np.int32)), pg.grow_cache(a_cache(params), 96))


SIZES = [
    ({"n_embd": 10**9, "n_head": 1}, "a model of .* parameters in float32 would take .* GiB of memory"),
    ({"n_layer": 10**9, "n_embd": 8, "n_head": 1}, "a model of .* would take .* GiB of memory"),
    ({"n_vocab": 10**12, "eos_token_id": None}, "would take .* GiB of memory"),
    ({"n_ctx": 10**15}, "would take .* GiB of memory"),
]


@pytest.mark.parametrize(("sizes", "message"), SIZES)
def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(sizes, message):
    """Catches a MemoryError, and a loop over 10^9 layers."""
    config = pg.GPT2Config(**sizes)
    assert pg.params.count(config) > 10**11
    with pytest.raises(ValueError, match=message):
        pg.init_params(config, backend="numpy")
    with pytest.raises(ValueError, match=r"layers|lack"):
        pg.GPT2(config, {"wpe": np.zeros((1, 1))})
    with pytest.raises(ValueError, match=r"values of c/w, of shape \[1000000000, 1000000000\], would take"):
        pg.init_conv1d("c", 10**9, 10**9, backend="numpy")


def test_attention_scale_follows_the_configuration():
    """Catches the two switches confused, or the layer counted from 1."""
    switched = {
        (first, second): pg.GPT2Config(scale_attn_weights=first, scale_attn_by_inverse_layer_idx=second)
        for first in (True, False)
        for second in (True, False)
    }
    assert [switched[True, False].attention_scale(i) for i in range(3)] == [1 / 8] * 3  # the head size is 64
    assert [switched[False, False].attention_scale(i) for i in range(3)] == [1.0] * 3
    assert [switched[True, True].attention_scale(i) for i in range(3)] == [1 / 8, 1 / 16, 1 / 24]
    assert [switched[False, True].attention_scale(i) for i in range(3)] == [1, 1 / 2, 1 / 3]


# The parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(name, parameters):
    """Catches a parameter too many, one missing, or a wrong size."""
    config = pg.GPT2Config.published(name)
    assert pg.params.count(config) == parameters
    assert (config.n_ctx, config.n_vocab, config.head_size) == (1024, 50257, 64)


def test_nest_undoes_flatten():
    """Catches a path that is cut or joined in the wrong place."""
    flat = random_weights(PLAIN)
    assert list(pg.params.flatten(pg.params.nest(flat))) == list(flat.items())
    assert set(pg.params.nest(flat)["h1"]["attn"]) == {"c_attn", "c_proj"}


INITIAL = pg.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_vocab=500, n_ctx=64, eos_token_id=None)


def test_initial_values_are_those_of_every_release():
    """Catches a change of the random stream: a seed names the same model from one release to the next."""
    params = pg.init_params(INITIAL, seed=7, backend="numpy")
    assert params["wte"][0, :3].tolist() == WTE_OF_SEED_7
    assert params["h1"]["mlp"]["c_proj"]["w"][-1, :3].tolist() == C_PROJ_OF_SEED_7


WTE_OF_SEED_7 = [0.006465276703238487, -0.004039030522108078, 0.022698024287819862]
C_PROJ_OF_SEED_7 = [-0.0023413854651153088, 0.010263457894325256, 0.010073518380522728]


def test_initial_values_are_drawn_as_openai_drew_them():
    """Catches a wrong standard deviation, a distribution that is not normal (a uniform one has another fourth moment,
    truncation no tail), and numbers that depend on each other. Each statistic is within 5 of its standard errors.
    """
    for path, a in pg.params.flatten(pg.init_params(INITIAL, seed=1, backend="numpy", dtype="float64")):
        leaf = path.rpartition("/")[2]
        if leaf in ("b", "g"):
            assert (a == (leaf == "g")).all(), path
            continue
        x, n = a.ravel() / (0.01 if leaf == "wpe" else 0.02), a.size
        assert abs(x.mean()) < 5 / math.sqrt(n), path
        assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / n), path
        assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n), path
        assert abs((x > 3).mean() - 0.00135) < 5 * math.sqrt(0.00135 / n), path
        for y in (x[n // 2 :], x[1:]):  # the other half of Box and Muller's transform; the neighbour
            assert abs((x[: y.size] * y).mean()) < 5 / math.sqrt(y.size), path


def test_every_parameter_is_drawn_from_a_stream_of_its_own():
    """Catches two parameters, or two seeds, with the same numbers, and values that depend on what else there is."""
    one = dict(pg.params.flatten(pg.init_params(INITIAL, seed=0, backend="numpy")))
    other = dict(pg.params.flatten(pg.init_params(INITIAL, seed=1, backend="numpy")))
    drawn = [path for path in one if path.rpartition("/")[2] not in ("b", "g")]
    firsts = {flat[path].flat[0] for flat in (one, other) for path in drawn}
    assert len(firsts) == 2 * len(drawn) == 20

    deeper = pg.GPT2Config(n_layer=3, n_head=4, n_embd=64, n_vocab=600, n_ctx=64, eos_token_id=None)
    deep = dict(pg.params.flatten(pg.init_params(deeper, seed=0, backend="numpy")))
    for path in one.keys() - {"wte"}:
        np.testing.assert_array_equal(deep[path], one[path])


def test_names_of_models_and_of_parameters_are_checked():
    """Catches a KeyError for a model that was not published, and a scope that has no random numbers of its own."""
    with pytest.raises(ValueError, match="no GPT-2 named 'gpt3' was published; choose one of 124M, gpt2, "):
        pg.GPT2Config.published("gpt3")
    with pytest.raises(TypeError, match="scope is 3; expected a path, such as 'h3/attn/c_attn'"):
        pg.init_conv1d(3, 5, 3, backend="numpy")


def test_init_conv1d_draws_what_init_params_does(backend):
    """Catches a layer that is initialised alone, in the portable way, to other values than within the model."""
    layer = pg.init_conv1d("h1/mlp/c_fc", 64, 256, seed=5, backend=backend)
    model = pg.init_params(INITIAL, seed=5, backend="numpy")["h1"]["mlp"]["c_fc"]
    np.testing.assert_array_equal(pg.to_numpy(layer["w"]), model["w"])
    np.testing.assert_array_equal(pg.to_numpy(layer["b"]), model["b"])


# Under the frameworks' own transformations


def jax_gradients(params, ids, cotangent):
    import jax

    def loss(params):
        return (pg.gpt2(params, ids, PLAIN)[0] * cotangent).sum()

    return jax.jit(jax.grad(loss))(params)


def torch_gradients(params, ids, cotangent):
    flat = {path: x.requires_grad_() for path, x in pg.params.flatten(params)}
    (pg.gpt2(pg.params.nest(flat), ids, PLAIN)[0] * cotangent).sum().backward()
    return pg.params.nest({path: x.grad for path, x in flat.items()})


def tensorflow_gradients(params, ids, cotangent):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(params)
        loss = tf.reduce_sum(pg.gpt2(params, ids, PLAIN)[0] * cotangent)
    return tf.nest.map_structure(tf.convert_to_tensor, tape.gradient(loss, params))  # wte's rows are sparse


GRADIENTS = {"jax": jax_gradients, "torch": torch_gradients, "tensorflow": tensorflow_gradients}


def plain_slope(flat, direction, tokens, cotangent, dtype, step):
    """Return the derivative along a direction, by a complex step: as exact as the arithmetic, with no difference."""
    shifted = {path: (a + 1j * step * direction.get(path, 0)).astype(dtype) for path, a in flat.items()}
    return float((plain_gpt2(shifted, tokens, PLAIN) * cotangent).sum().imag) / step


@pytest.mark.parametrize("backend", GRADIENTS, indirect=True)
def test_gradients_are_as_near_to_the_truth_as_those_of_a_plain_implementation(backend):
    """Catches an op that stops the gradient, a parameter that none reaches, and a kernel with a gradient of another
    function. The slopes along random directions in each parameter are compared with those of `plain_gpt2`.
    """
    rng = np.random.default_rng(0)
    tokens, flat = some_tokens(PLAIN, seq=9), random_weights(PLAIN)
    cotangent = rng.standard_normal((2, 9, PLAIN.n_vocab)).astype(np.float32)
    params, ids = params_and_tokens(backend, PLAIN, tokens)

    gradients = dict(pg.params.flatten(GRADIENTS[backend.name](params, ids, backend.from_numpy(cotangent))))

    errors, yardsticks = {}, {}
    for path, a in [*flat.items()] * 16:  # of fewer directions, the worst is a matter of luck
        direction = rng.standard_normal(a.shape)
        direction /= np.linalg.norm(direction)
        truth = plain_slope(flat, {path: direction}, tokens, cotangent, np.complex128, 1e-30)
        plain = plain_slope(flat, {path: direction}, tokens, cotangent, np.complex64, 2.0**-40)
        slope = np.vdot(pg.to_numpy(gradients[path]).astype(np.float64), direction)
        errors[path] = max(errors.get(path, 0), abs(slope - truth))
        yardsticks[path] = max(yardsticks.get(path, 0), abs(plain - truth))
    ratio = max(errors.values()) / (4 * max(yardsticks.values()))
    claims.record("gpt2 slope", backend, "float32", ratio)
    assert ratio <= 1, max(errors, key=errors.get)


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_runs_under_jax_jit_with_a_static_configuration(backend):
    """Catches a configuration that is not hashable as a static argument, and a branch on a traced value.

    The model runs with and without a cache, whose position is then traced.
    """
    import jax

    tokens = some_tokens(PLAIN, seq=10)
    truth, error = truth_and_error(random_weights(PLAIN), tokens, PLAIN)
    params, ids = params_and_tokens(backend, PLAIN, tokens)
    step = jax.jit(pg.gpt2, static_argnames="config", donate_argnames="cache")

    assert largest_error(step(params, ids, config=PLAIN)[0], truth) <= 4 * error
    cache = pg.new_cache(params, PLAIN, batch=2, capacity=12)
    first, cache = step(params, ids[:, :6], config=PLAIN, cache=cache)
    second, cache = step(params, ids[:, 6:], config=PLAIN, cache=cache)
    assert largest_error(first, truth[:, :6]) <= 4 * error
    assert largest_error(second, truth[:, 6:]) <= 4 * error
    assert int(cache.position) == 10


@pytest.mark.parametrize("backend", ["tensorflow"], indirect=True)
@pytest.mark.parametrize("xla", [False, True])
def test_runs_in_tf_function_with_unknown_batch_and_length(backend, xla):
    """Catches a reshape to None, and a Python branch on a symbolic length; one trace serves every shape."""
    import tensorflow as tf

    flat = random_weights(PLAIN)
    params = on_backend(backend, flat)
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)], jit_compile=xla, autograph=False)
    def logits(ids):
        traces.append(ids.shape)
        return pg.gpt2(params, ids, PLAIN)[0]

    for batch, seq in ((2, 10), (1, 1), (3, 48)):
        tokens = some_tokens(PLAIN, batch=batch, seq=seq)
        truth, error = truth_and_error(flat, tokens, PLAIN)
        assert largest_error(logits(tf.constant(tokens)), truth) <= 4 * error
    assert len(traces) == 1


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_torch_compile_takes_the_model_as_one_graph(backend):
    """Catches a graph break (in the look-up of a backend, in the checks of an op, in the cache) and a graph for each
    length or position: torch makes one for the first and one for all others.
    """
    import torch

    tokens = some_tokens(PLAIN, seq=10)
    truth, error = truth_and_error(random_weights(PLAIN), tokens, PLAIN)
    params, ids = params_and_tokens(backend, PLAIN, tokens)
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(pg.gpt2, fullgraph=True, backend=count)

    for seq in (10, 7, 4):
        logits, _ = compiled(params, ids[:, :seq].contiguous(), PLAIN)
        assert largest_error(logits, truth[:, :seq]) <= 4 * error
    assert len(graphs) == 2

    cache = pg.new_cache(params, PLAIN, batch=2, capacity=10)
    for start in range(10):
        logits, cache = compiled(params, ids[:, start : start + 1].contiguous(), PLAIN, cache)
        assert largest_error(logits, truth[:, start : start + 1]) <= 4 * error
    assert len(graphs) <= 2 + 3  # torch always makes one for 0, and may for 1


HOOKED = """
import sys
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook("portable_gpt2", "beartype.beartype"):
    import portable_gpt2 as pg
    from portable_gpt2.model import split_heads

import numpy as np

config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
for name in pg.available_backends():
    model = pg.GPT2(config, pg.init_params(config, backend=name))
    params, ids = model.params, model.backend.from_numpy(np.asarray([[1, 2], [3, 4]], np.int32))
    pg.gpt2(params, ids, config)
    pg.gpt2(params, ids, config, pg.grow_cache(pg.new_cache(params, config, batch=2, capacity=1), 2))
    model.logits([[1, 2, 3]])
    list(model.stream_ids([1, 2, 3], max_new_tokens=3))
    try:
        split_heads(model.backend.from_numpy(np.ones((2, 4), np.float32)), 2)
    except TypeCheckError:
        print(name)
"""


def test_every_shape_in_a_signature_is_what_runs():
    """Catches an annotation that no longer says what passes: all of them are checked while the whole model runs, on
    every backend. That they are checked at all shows in the last lines, where an axis is missing.
    """
    support = Path(__file__).parent / "third_party"
    environment = {**os.environ, "PYTHONPATH": f"{support}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run([sys.executable, "-c", HOOKED], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == pg.available_backends()
