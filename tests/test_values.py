"""Every number that a public function takes, in every form that a number comes in: NumPy's narrow ones too.

A number is as good as Python's own of the same value, or it is refused by a message of one line that names the
parameter. The parameters are read from the signatures, so that one that is added must be added here as well.
"""

import inspect
import math
import re
import tempfile

import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2 import plot, sampling, score, training
from portable_gpt2.comparison.sides import trace_model

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=384, n_ctx=16, eos_token_id=0)
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_vocab": 16, "n_ctx": 8, "eos_token_id": None}
NUMBER = re.compile(r"\b(int|float|bool)\b")

PUBLIC = {name: getattr(pg, name) for name in pg.__all__}
PUBLIC |= {f"training.{name}": getattr(training, name) for name in training.__all__}
PUBLIC |= {"Sampling": sampling.Sampling, "sample": sampling.sample, "windows": score.windows}
PUBLIC |= {"draw_grid": plot.draw_grid}

# What a user is given and does not make, what an adapter's author calls, and what others validate: the tokenizer.
RECORDS = {
    "Certificate",
    "Completion",
    "Score",
    "Backend",
    "training.Run",
    "training.State",
    "training.Report",
    "Tokenizer",
}
OTHERS = {
    "allow_special": "True or names: tests/test_tokenizer.py",
    "GPT2.export.external_data": "tests/test_export.py",
    "GPT2.export.force": "tests/test_export.py",
    "GPT2.save.force": "tests/test_checkpoint.py",
    "GPT2.trace.text": "ids: tests/test_gpt2.py",
    "Trace.save.force": "tests/test_traces.py",
    "certify.text": "ids: tests/test_certify.py",
    "compare.text": "ids: tests/test_traces.py",
    "training.write_tokens.n_vocab": "tests/test_training_data.py",
    "training.train_tokenizer.n_vocab": "tests/test_training_data.py",
}


def expanded(function):
    """Yield the parameters of a function, and for ``**options: Unpack[SamplingOptions]`` those of `Sampling`."""
    for p in inspect.signature(function).parameters.values():
        if p.annotation == "Unpack[SamplingOptions]":
            yield from inspect.signature(sampling.Sampling).parameters.values()
        else:
            yield p


def parameters():
    """Yield the name of every parameter of a public function or method that is annotated as a number, and its kind."""
    for name, thing in PUBLIC.items():
        if name in RECORDS or (inspect.isclass(thing) and issubclass(thing, Exception)):
            continue
        callables = {name: thing}
        if inspect.isclass(thing):
            methods = {key: f for key, f in vars(thing).items() if inspect.isfunction(f) and key[0] != "_"}
            callables |= {f"{name}.{key}": f for key, f in methods.items()}
        for path, each in callables.items():
            for p in expanded(each):
                kind = None if "Callable" in str(p.annotation) else NUMBER.search(str(p.annotation))
                if kind and f"{path}.{p.name}" not in OTHERS and p.name not in OTHERS:
                    yield f"{path}.{p.name}", kind[0]


PARAMETERS = dict(parameters())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    return pg.GPT2(CONFIG, pg.init_params(CONFIG, backend="numpy"), pg.Tokenizer.load(path))


def weights():
    return pg.init_params(CONFIG, backend="numpy")


def saved(model, **options):
    """Save a trace, and return the names that the file has."""
    with tempfile.TemporaryDirectory() as directory:
        trace_model(model, np.asarray([[1, 2]])).save(f"{directory}/it.npz", **options)
        return sorted(np.load(f"{directory}/it.npz").files)


X = np.asarray([[0.5, -1.0, 2.0]])
LOGITS = np.arange(300.0)
CALLS = {  # how to call with a value of the parameter, by the callable; and a value that is accepted
    "GPT2": lambda m, **x: repr(pg.GPT2(CONFIG, weights(), **x)),
    "Trace.save": lambda m, **x: saved(m, **x),
    "GPT2.stream_ids": lambda m, **x: m.stream_ids([1, 2, 3], **{"seed": 7, "max_new_tokens": 4, **x}),
    "GPT2.stream": lambda m, **x: m.stream("To", **{"seed": 7, "max_new_tokens": 4, **x}),
    "GPT2.complete": lambda m, **x: m.complete(["To", "be"], **{"seed": 7, "max_new_tokens": 4, **x}),
    "GPT2.generate": lambda m, **x: m.generate(["To"], seed=7, max_new_tokens=4, **x),
    "GPT2.score": lambda m, **x: m.score("To be, or not to be", **x).log_probs,
    "GPT2.score_ids": lambda m, **x: m.score_ids(list(range(1, 30)), **x).log_probs,
    "GPT2Config": lambda m, **x: pg.GPT2Config(**{**SIZES, **x}),
    "GPT2Config.attention_scale": lambda m, **x: CONFIG.attention_scale(**x),
    "attention": lambda m, **x: pg.attention(X, X, X, **x),
    "attention_scores": lambda m, **x: pg.attention_scores(X, X, **x),
    "attention_weights": lambda m, **x: pg.attention_weights(X, X, **x),
    "layer_norm": lambda m, **x: pg.layer_norm(X, X[0], X[0], **x),
    "softmax": lambda m, **x: pg.softmax(X, **x),
    "certify": lambda m, **x: pg.certify(m, [1, 2, 3], **x).summary(),
    "grow_cache": lambda m, **x: pg.grow_cache(pg.new_cache(weights(), CONFIG, capacity=2), **x),
    "new_cache": lambda m, **x: pg.new_cache(weights(), CONFIG, **x),
    "init_conv1d": lambda m, **x: pg.init_conv1d("c", backend="numpy", **{"nx": 3, "nf": 2, **x}),
    "init_params": lambda m, **x: pg.init_params(CONFIG, backend="numpy", **x),
    "training.batch": lambda m, **x: training.batch(
        np.arange(500), **{"index": 3, "batch_size": 2, "length": 4, "seed": 0, **x}
    ),
    "training.windows": lambda m, **x: training.windows(np.arange(500), **x),
    "training.learning_rate": lambda m, **x: training.learning_rate(recipe=training.Recipe(), **x),
    "training.Recipe": lambda m, **x: training.Recipe(**x),
    "training.Trainer": lambda m, **x: training.Trainer(CONFIG, training.Recipe(), "numpy", **x).mesh,
    "training.Trainer.place": lambda m, **x: training.Trainer(CONFIG, training.Recipe(), "numpy").place(
        "wte", pg.checkpoint.stored(np.ones((2, 3), np.float32)), **x
    ),
    "Sampling": lambda m, **x: sampling.Sampling(**{"seed": 7, **x}),
    "sample": lambda m, **x: sampling.sample(LOGITS, **{"position": 5, "temperature": 100.0, "seed": 0, **x}),
    "windows": lambda m, **x: score.windows(**{"n": 400, "n_ctx": 250, "stride": 3, **x}),
    "draw_grid": lambda m, **x: len(plot.draw_grid(dict.fromkeys("abc", np.eye(2)), title="", **x).axes),
}
GOOD = {"int": 2, "float": 0.5, "bool": True}
GOOD |= {  # where that is out of range, or another value wraps around sooner
    "GPT2Config.attention_scale.layer": 200,
    "GPT2.score_ids.stride": 8,
    "softmax.axis": 1,
    "windows.stride": 128,
    "windows.n": 200,
    "windows.n_ctx": 250,
    "training.batch.length": 200,
    "training.windows.length": 200,
    "training.batch.index": 255,
    "sample.top_k": 200,
    "sample.position": 255,
    "sample.index": 255,
    "new_cache.padding": [2],
    "sample.seen": [2, 3],
    "training.Trainer.shard_optimizer": False,  # without a mesh, there is nothing to divide
}


def good(path):
    return GOOD.get(path, GOOD[PARAMETERS[path]])


def call(model, path, value):
    """Return the result of a call as values of Python and NumPy that can be compared."""
    function, _, parameter = path.rpartition(".")
    return plain(CALLS[function](model, **{parameter: value}))


def plain(x):
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, np.ndarray):
        return (x.dtype.name, x.shape, x.tobytes())
    if hasattr(x, "__next__"):
        return [plain(each) for each in x]
    return (type(x).__name__, repr(x))


def in_form(form, value):
    return [form(each) for each in value] if isinstance(value, list) else form(value)


def test_every_number_of_a_public_function_is_tried():
    """Catches a parameter that is added, and whose bad values nobody has thought of."""
    assert {path.rpartition(".")[0] for path in PARAMETERS} == CALLS.keys()


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_number_of_numpy_s_is_as_good_as_python_s(model, path):
    """Catches a narrow int that wraps around later, and a float or a bool that is compared by its type."""
    value, kind = good(path), PARAMETERS[path]
    forms = {"int": (np.uint8, np.int16, np.int64), "float": (np.float32, np.float64, np.float16), "bool": (np.bool_,)}
    expected = call(model, path, value)
    for form in forms[kind]:
        assert call(model, path, in_form(form, value)) == expected, form


BAD = {
    "int": [True, np.True_, 1.5, np.float32(2), 2.0, "2", b"2", 10**400, 10**5000, -(10**400), math.nan, object()],
    "float": [True, np.True_, "0.5", 10**400, 10**5000, object(), 1j, np.asarray([0.5, 0.5])],
    "bool": [1, 0, 1.0, "no", "false", None, object(), np.asarray([True, False])],
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_what_is_not_a_number_is_refused_in_one_line_that_names_the_parameter(model, path):
    """Catches a bool that is taken for 1, a float that is rounded, a text that is taken for true, and an int whose
    conversion or whose repr raises an exception of Python's or the framework's own.
    """
    name = path.rpartition(".")[2]
    for bad in BAD[PARAMETERS[path]]:
        if name == "stop" and isinstance(bad, str):
            continue
        for given in [bad, [bad]] if name in ("stop", "seen", "padding", "eos_token_id") else [bad]:
            with pytest.raises((ValueError, TypeError)) as caught:
                call(model, path, given)
            message = str(caught.value)
            assert type(caught.value) in (ValueError, TypeError), (path, bad)
            assert name.removesuffix("s") in message, message
            assert len(message) < 400, message
            assert "\n" not in message
