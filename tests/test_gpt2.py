"""The GPT2 object loads, accepts, returns and refuses the same on every backend."""

import dataclasses
import inspect

import numpy as np
import pytest
import tiny
import tokenizers

import portable_gpt2 as pg
from portable_gpt2.params import flatten, nest
from portable_gpt2.sampling import Sampling


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny.write_tokenizer(path)
    tokenizer = pg.Tokenizer.load(path)
    tiny.model(pg.get_backend("numpy"), tokenizer=tokenizer).save(path / "it")
    return path / "it"


@pytest.fixture(scope="module")
def reference(directory):
    return pg.GPT2.load(directory, backend="numpy")


@pytest.fixture(scope="module")
def model(backend, directory):
    """The same model on every backend; what one test has compiled serves the next."""
    return pg.GPT2.load(directory, backend=backend)


@pytest.fixture(scope="module")
def nameless(backend):
    """A model without a tokenizer."""
    return tiny.model(backend)


# Results


def test_without_a_seed_each_text_is_another(model):
    """Catches a default seed, and one that is drawn once for all calls."""
    assert len({model.generate("To be", max_new_tokens=20, top_k=None, temperature=3.0) for _ in range(4)}) > 1


def test_the_defaults_are_those_that_are_documented(model):
    """Catches a default that drifts: it would change the text of everybody who names a seed and nothing else."""
    sampling = {field.name: field.default for field in dataclasses.fields(Sampling)}  # pinned by test_sampling
    others = {"max_new_tokens": 100, "stop": None, "sliding": False}
    for method, more in (("stream_ids", {}), ("stream", {"allow_special": False})):
        parameters = inspect.signature(getattr(pg.GPT2, method)).parameters.values()
        assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == others | more
    defaults = sampling | others
    explicit = model.generate("To be", **{**defaults, "seed": 7, "max_new_tokens": 30})
    assert model.generate("To be", seed=7, max_new_tokens=30) == explicit


def test_pieces_join_to_what_generate_returns(model):
    """Catches a stream that is another text than generate's, or that ends with bytes held back."""
    options = {"seed": 3, "max_new_tokens": 30, "top_k": None}  # many of the ids are parts of characters
    assert "".join(model.stream("存在", **options)) == model.generate("存在", **options)


def test_ids_are_python_s_ints(model):
    """Catches a framework's scalars, which print otherwise and keep arrays alive."""
    assert all(type(token) is int for token in model.stream_ids([1, 2], max_new_tokens=5))


def test_an_empty_prompt_starts_from_the_end_of_text(model):
    """Catches an empty prompt that fails, or starts from something that is nowhere said."""
    [end] = [model.tokenizer.end_of_text]
    expected = list(model.stream_ids([end], max_new_tokens=8, seed=5, stop=end))
    assert model.generate("", max_new_tokens=8, seed=5) == model.tokenizer.decode(expected)


def test_text_stops_at_the_end_of_text_and_ids_do_not(model, reference):
    """Catches <|endoftext|> in a text, and ids that end where nobody asked them to."""
    prompt, end = model.tokenizer.encode("To be"), model.tokenizer.end_of_text
    options = {"max_new_tokens": 30, "temperature": 100.0, "top_k": None}
    seed, ids = next(
        (seed, ids)
        for seed in range(1000)
        if end in (ids := list(reference.stream_ids(prompt, seed=seed, **options)))[5:25] and ids[-1] != end
    )
    assert list(model.stream_ids(prompt, seed=seed, **options)) == ids
    assert model.generate("To be", seed=seed, **options) == model.tokenizer.decode(ids[: ids.index(end)])


def test_stop_names_one_id_or_several(nameless):
    """Catches a stop that is part of the text, NumPy's ints that are not understood, and a stop that is ignored."""
    ids = list(nameless.stream_ids([1, 2], max_new_tokens=30, seed=7))
    first = min(ids.index(ids[5]), ids.index(ids[9]))
    for stop in (
        [ids[5], ids[9]],
        {ids[5], ids[9]},
        (ids[9], ids[5]),
        np.asarray([ids[5], ids[9]]),
        iter([ids[9], ids[5]]),
    ):
        assert list(nameless.stream_ids([1, 2], max_new_tokens=30, seed=7, stop=stop)) == ids[:first]
    for stop in (ids[5], np.int64(ids[5]), [ids[5]]):
        assert list(nameless.stream_ids([1, 2], max_new_tokens=30, seed=7, stop=stop)) == ids[: ids.index(ids[5])]
    assert list(nameless.stream_ids([1, 2], max_new_tokens=30, seed=7, stop=[])) == ids


def test_a_stop_that_fits_no_text_is_refused(model, nameless):
    """Catches an empty string, at which every text would end before its first token, and a string among token ids."""
    with pytest.raises(ValueError, match="stop names an empty string, which stands at the beginning of every text"):
        model.generate("To be", stop="")
    with pytest.raises(TypeError, match="stop names 'x'; expected token ids"):
        nameless.stream_ids([1, 2], stop=[3, "x"])


def test_nothing_may_be_asked_for(nameless, model):
    """Catches a crash at 0 tokens, in which a loop over lengths begins."""
    assert list(nameless.stream_ids([1, 2], max_new_tokens=0)) == []
    assert model.generate("To be", max_new_tokens=0) == ""
    assert list(nameless.stream_ids(range(64), max_new_tokens=0)) == []


def test_it_says_what_it_is(model):
    """Catches a repr that leaves out the backend or the device, which one looks for when it is slow."""
    assert repr(model) == (
        f"<GPT2 of 2 layers, 2 heads, 16 wide, context 64, vocabulary 384, on {model.backend.name}, {model.device}>"
    )
    assert model.device in model.backend.devices()


# Token ids, in every form


def test_logits_take_ids_in_every_form(model, reference, backend):
    """Catches a form of ids that is refused or misread: lists, any integer dtype, arrays of any framework."""
    rows = [[5, 300, 7], [1, 0, 383]]
    expected = pg.to_numpy(model.logits(rows))
    assert expected.shape == (2, 3, 384)
    assert expected.dtype == np.float32
    np.testing.assert_allclose(expected, reference.logits(rows), rtol=1e-4, atol=1e-4)
    forms = [tuple(map(tuple, rows)), [np.asarray(row) for row in rows], np.asarray(rows), np.asarray(rows).T.copy().T]
    forms += [np.asarray(rows, dtype) for dtype in ("int16", "int32", "uint16", "uint32", "uint64")]
    for name in pg.available_backends():
        other = pg.get_backend(name)
        forms.append(other.from_numpy(np.asarray(rows, np.int32)))
    for form in forms:
        logits = model.logits(form)
        assert isinstance(logits, backend.array_types)
        np.testing.assert_array_equal(pg.to_numpy(logits), expected)


def test_streams_take_ids_in_every_form(nameless):
    """Catches a prompt that works as a list only."""
    expected = list(nameless.stream_ids([5, 6, 7], max_new_tokens=3, seed=1))
    forms = [(5, 6, 7), range(5, 8), np.asarray([5, 6, 7]), np.asarray([5, 6, 7], np.uint8)]
    forms += [pg.get_backend(name).from_numpy(np.asarray([5, 6, 7], np.int32)) for name in pg.available_backends()]
    for form in forms:
        assert list(nameless.stream_ids(form, max_new_tokens=3, seed=1)) == expected


def test_one_token_alone_and_a_whole_context_have_logits(nameless):
    """Catches the shortest and the longest text being refused."""
    for seq in (1, 64):
        assert tuple(pg.to_numpy(nameless.logits([[3] * seq] * 2)).shape) == (2, seq, 384)


BAD_ROWS = [  # ids, the error, what it says
    ([[1, 2], [3]], ValueError, "token ids are ragged; expected int [batch, seq], rows of equal length"),
    ([[1, [2]]], ValueError, "token ids are ragged; expected int [batch, seq]"),
    ([], ValueError, "token ids have shape [0]; expected int [batch, seq]; no dimension may be 0"),
    ([[]], ValueError, "token ids have shape [1, 0]; expected int [batch, seq]; no dimension may be 0"),
    (np.zeros((0, 3), np.int32), ValueError, "token ids have shape [0, 3]; expected int [batch, seq]"),
    ([1, 2], ValueError, "token ids have shape [2]; expected int [batch, seq]"),
    ([[[1]]], ValueError, "token ids have shape [1, 1, 1]; expected int [batch, seq]"),
    (np.asarray(3), ValueError, "token ids have shape []; expected int [batch, seq]"),
    ([[1.0, 2.0]], TypeError, "token ids hold 1.0; expected integers"),
    ([[1, 2.5]], TypeError, "token ids hold 2.5; expected integers"),
    (np.ones((1, 2), np.float32), TypeError, "token ids have dtype float32; expected integers"),
    ([[1, True]], TypeError, "token ids hold True; expected integers"),
    ([[1, 2], (3, False)], TypeError, "token ids hold False; expected integers"),
    ([[1, np.True_]], TypeError, "token ids hold np.True_; expected integers"),
    ([np.asarray([1, 2]), np.asarray([True, False])], TypeError, "token ids have dtype bool; expected integers"),
    (np.asarray([[1, True]], object), TypeError, "token ids have dtype object; expected integers"),
    ([["a"]], TypeError, "token ids hold 'a'; expected integers"),
    ([[None]], TypeError, "token ids hold None; expected integers"),
    ([[2**70]], ValueError, f"token id {2**70} is not in the vocabulary, which has ids 0 to 383"),
    ([[1, 10**400]], ValueError, "(401 characters) is not in the vocabulary, which has ids 0 to 383"),
    ([[1, 10**5000]], ValueError, "is not in the vocabulary, which has ids 0 to 383"),
    ([range(10**12)], ValueError, "token id 384 is not in the vocabulary, which has ids 0 to 383"),
    (None, TypeError, "token ids are of type NoneType; expected int [batch, seq], as a list or an array"),
    ("To be", TypeError, "token ids are of type str; expected int [batch, seq], as a list or an array"),
    (7, TypeError, "token ids are of type int; expected int [batch, seq], as a list or an array"),
    ([[1, 384]], ValueError, "token id 384 is not in the vocabulary, which has ids 0 to 383"),
    ([[1, 2**40]], ValueError, f"token id {2**40} is not in the vocabulary, which has ids 0 to 383"),
    (np.asarray([[2**64 - 1]], np.uint64), ValueError, f"token id {2**64 - 1} is not in the vocabulary"),
    ([[1, -1]], ValueError, "token id -1 is not in the vocabulary, which has ids 0 to 383"),
    ([[1] * 65], ValueError, "65 tokens were given; the model has n_ctx = 64 positions"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_ROWS, ids=[message for *_, message in BAD_ROWS])
def test_ids_that_make_no_sense_have_no_logits(nameless, ids, error, message):
    """Catches an id that JAX clamps, NumPy wraps or PyTorch reports as an assertion, and other errors of theirs."""
    with pytest.raises(error) as caught:
        nameless.logits(ids)
    assert message in str(caught.value)


def test_bad_ids_of_the_backend_s_own_are_refused(nameless, backend):
    """Catches a check that is made for NumPy's arrays only."""
    for ids, error, message in (
        (np.asarray([[384]], np.int32), ValueError, "token id 384 is not in the vocabulary"),
        (np.asarray([[-1]], np.int32), ValueError, "token id -1 is not in the vocabulary"),
        (np.asarray([[1.0]], np.float32), TypeError, "token ids have dtype float32; expected integers"),
        (np.asarray([[True]]), TypeError, "token ids have dtype bool; expected integers"),
        (np.asarray([1], np.int32), ValueError, "token ids have shape [1]; expected int [batch, seq]"),
    ):
        with pytest.raises(error) as caught:
            nameless.logits(backend.from_numpy(ids))
        assert message in str(caught.value)


BAD_PROMPTS = [
    ([], ValueError, "token ids have shape [0]; expected int [seq]; no dimension may be 0"),
    ([[1, 2]], ValueError, "token ids have shape [1, 2]; expected int [seq]"),
    ([1.0], TypeError, "token ids hold 1.0; expected integers"),
    ([1, True], TypeError, "token ids hold True; expected integers"),
    (range(10**30), ValueError, "token id 384 is not in the vocabulary, which has ids 0 to 383"),
    ("To be", TypeError, "token ids are of type str; expected int [seq], as a list or an array"),
    ([384], ValueError, "token id 384 is not in the vocabulary, which has ids 0 to 383"),
    ([1] * 64, ValueError, "64 tokens and max_new_tokens = 3 do not fit into n_ctx = 64: shorten the prompt"),
    ([1] * 62, ValueError, "62 tokens and max_new_tokens = 3 do not fit into n_ctx = 64: give at most 2"),
]

BAD_OPTIONS = [
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1; expected an int of at least 0"),
    ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens is 2.0; expected an int of at least 0"),
    ({"max_new_tokens": True}, ValueError, "max_new_tokens is True; expected an int of at least 0"),
    ({"max_new_tokens": None}, ValueError, "max_new_tokens is None; expected an int of at least 0"),
    ({"max_new_tokens": 1000}, ValueError, "max_new_tokens = 1000 do not fit into n_ctx = 64: give at most 6"),
    ({"temperature": -0.5}, ValueError, "temperature is -0.5; expected a number of at least 0 (0 is greedy)"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan; expected a number of at least 0"),
    ({"temperature": "hot"}, ValueError, "temperature is 'hot'; expected a number of at least 0"),
    ({"top_k": -1}, ValueError, "top_k is -1; expected an int of at least 0 (0 or None is off)"),
    ({"top_k": 0.5}, ValueError, "top_k is 0.5; expected an int of at least 0"),
    ({"top_p": 0}, ValueError, "top_p is 0; expected a number above 0 and at most 1 (None is off)"),
    ({"top_p": 90}, ValueError, "top_p is 90; expected a number above 0 and at most 1"),
    ({"seed": -7}, ValueError, "seed is -7; expected an int from 0 to 2**64 - 1"),
    ({"seed": "7"}, ValueError, "seed is '7'; expected an int from 0 to 2**64 - 1"),
    ({"stop": 384}, ValueError, "stop names 384, which is not in the vocabulary of 384"),
    ({"stop": [-1]}, ValueError, "stop names -1, which is not in the vocabulary of 384"),
    ({"stop": 1.5}, TypeError, "stop is 1.5; expected a token id, a string, or several of them"),
    ({"stop": [True]}, TypeError, "stop names True; expected token ids"),
    ({"min_p": 0}, ValueError, "min_p is 0; expected a number above 0 and at most 1 (None is off)"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0; expected a number above 0 (1 is off)"),
    ({"temprature": 1.0}, TypeError, "temprature"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS, ids=[message for *_, message in BAD_PROMPTS])
def test_a_prompt_that_makes_no_sense_is_refused_at_the_call(nameless, prompt, error, message):
    """Catches an error that comes with the first token only, where the caller's frame is long gone."""
    with pytest.raises(error) as caught:
        nameless.stream_ids(prompt, max_new_tokens=3)  # nothing is read from it
    assert message in str(caught.value)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=[message for *_, message in BAD_OPTIONS])
def test_an_option_that_makes_no_sense_is_refused_at_the_call(model, options, error, message):
    """Catches an option that stream, stream_ids or generate does not check, or checks too late."""
    prompt = [1] * 58
    with pytest.raises(error) as caught:
        model.stream_ids(prompt, **{"max_new_tokens": 3, **options})
    assert message in str(caught.value)
    for call in (model.stream, model.generate):
        with pytest.raises(error) as caught:
            call(model.tokenizer.decode([65] * 58), **{"max_new_tokens": 3, **options})
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (b"To be", TypeError, "expected (text as )?a str"),
        (None, TypeError, "expected (text as )?a str"),
        (7, TypeError, "expected (text as )?a str"),
        (iter(["To be"]), TypeError, "expected (text as )?a str"),
        ("a\ud800", ValueError, "lone surrogate"),
    ],
)
def test_what_is_no_text_is_refused_at_the_call(model, prompt, error, message):
    """Catches ids given as text, which the tokenizers package would take for a pair of texts."""
    for call in (model.stream, model.generate):
        with pytest.raises(error, match=message):
            call(prompt)


# Without a tokenizer, or with another one


def test_a_checkpoint_without_tokenizer_files_works_by_ids(directory, tmp_path, backend):
    """Catches a checkpoint that is refused for what it does not need, and an error that does not name it."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    model = pg.GPT2.load(tmp_path, backend=backend)
    assert model.tokenizer is None
    assert len(list(model.stream_ids([1, 2], max_new_tokens=3))) == 3
    for call in (model.stream, model.generate):
        with pytest.raises(ValueError, match=r"no tokenizer: .*vocab\.json and merges\.txt.*use stream_ids and logits"):
            call("To be")


def test_an_empty_prompt_needs_an_end_of_text(backend):
    """Catches a start that is made up where the vocabulary has none."""
    tokenizer = pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out")))
    config = pg.GPT2Config(**{**vars(tiny.CONFIG), "eos_token_id": None})
    model = tiny.model(backend, config, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"the prompt is empty, and the vocabulary has no <\|endoftext\|> to start from"
    ):
        model.stream("")
    assert model.generate("To be", max_new_tokens=5, seed=7)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, backend):
    """Catches ids that the model has no embedding for."""
    config = pg.GPT2Config(**{**vars(tiny.CONFIG), "n_vocab": 383})
    tiny.model(pg.get_backend("numpy"), config).save(tmp_path / "it")
    tiny.write_tokenizer(tmp_path / "it")
    with pytest.raises(pg.CheckpointError, match="it: the tokenizer has 384 entries and the model 383"):
        pg.GPT2.load(tmp_path / "it", backend=backend)


# Loading


def test_a_model_computes_in_the_dtype_that_it_is_loaded_in(directory, backend, dtype, reference):
    """Catches 16-bit weights that fail in some op or in the cache, and logits that are far from float32's."""
    model = pg.GPT2.load(directory, backend=backend, dtype=dtype)
    assert {x.dtype for _, x in flatten(model.params)} == {backend.dtype(dtype)}
    logits = model.logits([[5, 300, 7]])
    assert logits.dtype == backend.dtype(dtype)
    tolerance = {"float64": 1e-4, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.8}[dtype]  # of logits from -7 to 7
    assert abs(pg.to_numpy(logits).astype(np.float64) - reference.logits([[5, 300, 7]])).max() < tolerance
    assert len(list(model.stream_ids([5, 300, 7], max_new_tokens=4, seed=7))) == 4
    assert model.generate("To be", max_new_tokens=4, seed=7)


@pytest.mark.parametrize("wrong", ["float8", "int32", "f4", "", np.float32, 16, ["float32"]], ids=repr)
def test_an_unknown_dtype_is_refused_with_those_that_there_are(directory, backend, wrong):
    """Catches a KeyError, and a dtype that is silently another one."""
    with pytest.raises(ValueError, match=rf"backend '{backend.name}' has no floating dtype .*; choose one of float32"):
        pg.GPT2.load(directory, backend=backend, dtype=wrong)


@pytest.mark.parametrize("device", ["gpu:77", "cuda:77", "nowhere", ""])
def test_an_unknown_device_is_refused_with_those_that_there_are(directory, backend, device):
    """Catches a framework's own error, and a model that lands somewhere else."""
    with pytest.raises(
        ValueError, match=rf"backend '{backend.name}' has no device '{device}'; the devices here are .*cpu"
    ):
        pg.GPT2.load(directory, backend=backend, device=device)


@pytest.mark.parametrize("name", ["numpi", "", "keras"])
def test_an_unknown_backend_is_refused_with_those_that_are_known(directory, name):
    """Catches a name that falls back to a default."""
    with pytest.raises(
        pg.BackendNotInstalled, match=f"unknown backend {name!r}; the known backends are .*numpy.*torch"
    ):
        pg.GPT2.load(directory, backend=name)


@pytest.mark.parametrize(
    "name", [7, b"numpy", [], {}, True, pg.Backend, np.zeros(2), 10**5000], ids=lambda x: type(x).__name__
)
def test_what_is_not_the_name_of_a_backend_is_refused(name):
    """Catches Python's own error about a list that cannot be hashed."""
    for call in (pg.get_backend, lambda name: pg.use_backend(name).__enter__()):
        with pytest.raises(TypeError, match=f"backend is of type {type(name).__name__}; expected a name"):
            call(name)


@pytest.mark.parametrize("device", [[], {}, 10**5000, 1.5, object(), np.zeros(2)], ids=lambda x: type(x).__name__)
def test_what_is_not_a_device_is_refused(backend, device):
    """Catches the framework's own error about an object of another kind."""
    with pytest.raises(ValueError, match=f"has no device that is a {type(device).__name__}; the devices here are"):
        pg.get_backend(backend, device)
    with pytest.raises(ValueError, match=f"has no floating dtype that is a {type(device).__name__}; choose one of"):
        backend.dtype(device)


def test_values_that_cannot_be_had_are_a_type_error(torch, jax):
    """Catches the framework's own error about a sparse tensor or a tracer."""
    for x in (torch.eye(2).to_sparse(), torch.zeros(2, device="meta")):
        with pytest.raises(TypeError, match=r"cannot be brought to the host|expected an array|sparse|meta"):
            pg.to_numpy(x)
    with pytest.raises(TypeError, match=r"of jax cannot be brought to the host \(TracerArrayConversionError"):
        jax.jit(pg.to_numpy)(jax.numpy.zeros(2))
    with pytest.raises(TypeError, match="expected an array of one of the backends"):
        pg.to_numpy([1.0])


def test_a_mistake_in_an_option_is_found_before_the_files_are_read(tmp_path, backend):
    """Catches a minute of loading before a typing error is reported."""
    with pytest.raises(ValueError, match="has no device"):
        pg.GPT2.load(tmp_path / "no such directory", backend=backend, device="nowhere")
    with pytest.raises(ValueError, match="has no floating dtype"):
        pg.GPT2.load(tmp_path / "no such directory", backend=backend, dtype="nothing")


def test_the_default_backend_loads(directory, backend):
    """Catches a load that ignores use_backend."""
    with pg.use_backend(backend):
        assert pg.GPT2.load(directory).backend is backend
    assert pg.GPT2.load(str(directory)).backend.name == "numpy"


def test_progress_sees_every_tensor(directory, backend):
    """Catches a progress bar that ends before or after the tensors do."""
    seen = []

    def progress(names):
        assert len(names) == 28
        for name in names:
            seen.append(name)
            yield name

    pg.GPT2.load(directory, backend=backend, progress=progress)
    assert sorted(seen) == sorted(tiny.weights())


# Parameters


def test_parameters_of_another_model_are_refused(backend):
    """Catches a deeper model that computes with the blocks it has, and a shape that shows ten frames down."""
    arrays = {path: backend.from_numpy(a) for path, a in tiny.weights().items()}
    without = {path: x for path, x in arrays.items() if path != "wte"}
    with pytest.raises(ValueError, match=r"the parameters lack wte; config says GPT2Config\(n_layer=2"):
        pg.GPT2(tiny.CONFIG, nest(without))
    shallow = pg.GPT2Config(**{**vars(tiny.CONFIG), "n_layer": 1})
    with pytest.raises(ValueError, match=r"the parameters hold h1/attn/c_attn/b, h1/attn/c_attn/w, .*; config says"):
        pg.GPT2(shallow, nest(arrays))
    short = pg.GPT2Config(**{**vars(tiny.CONFIG), "n_ctx": 32})
    with pytest.raises(ValueError, match=r"wpe has shape \[64, 16\]; config requires \[32, 16\]"):
        pg.GPT2(short, nest(arrays))


def test_a_weight_beyond_the_range_of_the_dtype_is_refused(backend, tmp_path):
    """Catches an infinity that is made on the way, and that shows as a NaN in the logits."""
    if "float16" not in backend.dtypes:
        return
    weights = {path: a.copy() for path, a in tiny.weights().items()}
    weights["h1/mlp/c_fc/b"][3] = 1e5
    pg.GPT2(tiny.CONFIG, nest(weights)).save(tmp_path / "large")
    pg.GPT2.load(tmp_path / "large", backend=backend, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"h1/mlp/c_fc/b holds values beyond the range of float16"):
        pg.GPT2.load(tmp_path / "large", backend=backend, dtype="float16")


def test_sliding_needs_a_context_of_two_tokens():
    """Catches a window that slides to half of one token, which is none."""
    for n_ctx in (1, 2):
        model = tiny.model(pg.get_backend("numpy"), dataclasses.replace(tiny.CONFIG, n_ctx=n_ctx))
        if n_ctx == 2:
            assert len(list(model.stream_ids([1], max_new_tokens=5, sliding=True, seed=7))) == 5
        else:
            with pytest.raises(ValueError, match="sliding needs a context of at least two tokens"):
                model.stream_ids([1], max_new_tokens=5, sliding=True, seed=7)
