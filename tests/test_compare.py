"""Where two models part: porting bugs are placed and explained, and correct models raise no alarm.

A thorough run has every bug several times, and hundreds of correct pairs. CONTRIBUTING.md shows how to start it.
"""

import dataclasses
import math
import re
import warnings
from types import MappingProxyType

import hypothesis
import ml_dtypes
import numpy as np
import ported
import pytest
import tiny
from ported import assert_no_alarm

import portable_gpt2 as pg
from portable_gpt2.checkpoint import stored
from portable_gpt2.comparison import sides, steps
from portable_gpt2.comparison.compare import compare, judged
from portable_gpt2.comparison.growth import of_logits
from portable_gpt2.comparison.guesses import GUESSES, Case, explain
from portable_gpt2.comparison.report import report
from portable_gpt2.comparison.sides import Side, trace_model
from portable_gpt2.comparison.trace import Trace
from portable_gpt2.model import gpt2
from portable_gpt2.numerics import Numerics
from portable_gpt2.numerics.bounds import Bounded
from portable_gpt2.testing.plain_gpt2 import CONFIGS, on_backend, random_weights

ALL = ["numpy", "tensorflow", "jax", "torch", "mlx"]
THOROUGH = hypothesis.settings.get_current_profile_name().endswith("thorough")
OF_NUMPY = Numerics(exp=(3.6, 0.0), log=8.0)


def traced(config, arrays, tokens, weights=MappingProxyType({}), dtype="float32", source="port"):
    """Return the trace of a plain model."""
    return Trace(source, tokens, arrays, dtype, config, {p: stored(a) for p, a in weights.items()}, OF_NUMPY)


def placed(bug, config, weights, tokens):
    """Return the result where a mistake should be found, and the first result of the port that is beyond its bound."""
    with np.errstate(all="ignore"):
        wrong = traced(config, ported.port(config, weights, tokens, bug), tokens)
    culprit = next((op for op in judge_all(wrong, weights) if not op.within), None)
    return bug.culprit(pg.model.observed_names(config)), culprit


def judge_all(trace, weights):
    """Return the judgement on each result, with the weights as arrays."""
    return judged(trace, trace.config, {path: stored(a) for path, a in weights.items()})[0]


def test_porting_bugs_are_placed_at_their_op_and_explained():
    """Catches an op that is judged on other inputs than its own, and a guess that explains nothing or too much."""
    n, misses = (6 if THOROUGH else 1) * len(ported.KINDS), []
    for bug, *rest in ported.bugs(n, seed=0 if THOROUGH else 19):
        name, culprit = placed(bug, *rest)
        if culprit is None or culprit.name != name or not re.search(bug.cause, culprit.guess):
            misses.append(f"{bug}\n    {culprit}")
    print(f"{n} mistakes, {len(misses)} of which are not placed or not explained")
    assert not misses, "\n".join(misses)


def weight_mistakes(config, weights, random):
    """Yield a path and weights in which this tensor is changed, by one kind of mistake each."""
    n, layer = config.n_embd, int(random.integers(config.n_layer))
    w, b, c = f"h{layer}/attn/c_proj/w", f"h{layer}/mlp/c_fc/b", f"h{layer}/attn/c_attn/w"
    yield w, weights[w].T.copy()
    yield w, -weights[w]
    yield b, np.zeros_like(weights[b])
    yield c, np.concatenate([weights[c][:, n:], weights[c][:, :n]], axis=1)
    yield c, ported.in_form(weights[c], "bfloat16")
    yield f"h{layer}/ln_1/g", weights[f"h{layer}/ln_2/g"]
    yield f"h{layer}/mlp/c_proj/w", weights[f"h{(layer + 1) % config.n_layer}/mlp/c_proj/w"]
    yield "wpe", np.roll(weights["wpe"], 1, axis=0)
    yield "wte", 2 * weights["wte"]
    changed = weights[w].copy()
    changed[1, 2] += 1e-3
    yield w, changed


@pytest.mark.parametrize("known", [True, False])
def test_a_wrong_tensor_is_found(known):
    """Catches weights that are not compared, and a model that is judged with the reference's weights although its own
    are known. If they are not known, the op that uses them is named.
    """
    random = np.random.default_rng(3)
    for _ in range(4 if THOROUGH else 1):
        config = ported.some_config(random)
        weights = ported.some_weights(config, random)
        tokens = random.integers(0, config.n_vocab, (1, 20))
        right = traced(config, ported.port(config, weights, tokens), tokens, weights)
        for path, a in weight_mistakes(config, weights, random):
            changed = {**weights, path: a}
            wrong = traced(config, ported.port(config, changed, tokens), tokens, changed if known else {})
            found = compare(right, wrong)
            assert not found.equal
            if known:
                assert [finding.path for finding in found.weights] == [path]
                assert found.culprit is None
                assert found.verdict.startswith("The weights differ (")
                assert path in found.verdict
            else:
                names = {"wpe": "embedding", "wte": "embedding"}
                assert found.weights is None
                assert found.culprit.name == names.get(path, path.rpartition("/")[0])


@pytest.mark.parametrize("style", ported.STYLES)
def test_another_order_of_computation_raises_no_alarm(style):
    """Catches a bound that does not permit the scale at q, the bias in the product, or sums in another order."""
    random = np.random.default_rng(ported.STYLES.index(style))
    for _ in range(25 if THOROUGH else 3):
        config = ported.some_config(random)
        weights = ported.some_weights(config, random)
        tokens = random.integers(0, config.n_vocab, (1, int(random.integers(2, 40))))
        right, other = (ported.port(config, weights, tokens, style=each) for each in ("plain", style))
        found = compare(traced(config, right, tokens, weights), traced(config, other, tokens))
        assert_no_alarm(found)
        assert found.verdict.startswith("Every op is within its bound, ")


@pytest.mark.parametrize("backend", ALL if THOROUGH else ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_models_raise_no_alarm(backend, dtype):
    """Catches a bound that a backend exceeds in the model, in float32 or in 16 bits."""
    if dtype not in backend.dtypes:
        pytest.skip("the backend has no such dtype")
    numpy = pg.get_backend("numpy")
    tokens = np.random.default_rng(0).integers(0, 50, (1, 20))
    models = [(config, random_weights(config, seed), tokens) for seed, config in enumerate(CONFIGS.values())]
    for config, weights, tokens in [*models, *ported.right_models(45 if THOROUGH else 0)]:
        a, b = pg.GPT2(config, on_backend(numpy, weights)), pg.GPT2(config, on_backend(backend, weights, dtype))
        assert_no_alarm(compare(a, b, tokens[0]))


def test_float64_is_judged_in_a_higher_precision():
    """Catches an exact result that is computed in float64 for a model in float64."""
    config = CONFIGS["every option"]
    weights = random_weights(config)
    model = pg.GPT2(config, on_backend(pg.get_backend("numpy"), weights, "float64"))
    found = compare(model, model, [1, 2, 3, 4, 5, 6])
    assert found.equal
    assert 0 < max(finding.ratio for finding in found.ops) <= 1
    changed = pg.GPT2(pg.GPT2Config(**{**vars(config), "layer_norm_epsilon": 0.02 + 1e-12}), model.params)
    found = compare(model, changed, [1, 2, 3, 4, 5, 6])
    assert found.culprit.name == "h0/ln_1"


def test_elements_that_are_not_judged_are_counted():
    """Catches a selection of the elements that looks like all of them, and a result without a bound that passes."""
    random = np.random.default_rng(15)
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_vocab=500, n_ctx=12, eos_token_id=None)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 12))
    model = pg.GPT2(config, on_backend(pg.get_backend("numpy"), weights, "float64"))
    found = compare(model, model, tokens[0])
    (logits,) = (op for op in found.ops if op.name == "logits")
    assert (logits.judged, logits.elements) == (4 * (50_000 // (4 * 32)), 12 * 500)
    (note,) = found.notes
    assert re.match(
        r"The results above have [\d,]+ elements, and [\d,]+ were judged. In float64, only a selection", note
    )
    arrays = ported.port(config, weights, tokens)
    arrays["h0/attn/residual"][0, :11] = np.inf
    arrays["h0/mlp/c_fc"][:] = np.nan
    found = compare(traced(config, arrays, tokens, weights), traced(config, arrays, tokens))
    judged = {op.name: (op.judged, op.elements) for op in found.ops}
    assert judged["h0/ln_2"] == (32, 384)
    assert judged["h0/mlp/c_fc"] == (1536, 1536)
    assert "h0/mlp/gelu" in found.missing
    assert "h0/mlp/gelu" not in judged
    assert [note[:6] for note in found.notes] == ["The re", "The lo"]


def test_results_in_fewer_bits_than_the_computation_are_noted():
    """Catches an alarm about results that were rounded when they were written, without a word about the rounding."""
    random = np.random.default_rng(32)
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    weights, tokens = ported.some_weights(config, random), random.integers(0, 50, (1, 12))
    arrays = ported.port(config, weights, tokens)
    right = traced(config, arrays, tokens, weights)
    narrow = {**arrays, "h0/ln_1": arrays["h0/ln_1"].astype(np.float16)}
    found = compare(right, traced(config, narrow, tokens))
    assert found.notes[0].startswith(
        "The judged model computes in float32, and 1 of its 18 results have fewer bits, such"
    )
    assert found.culprit.guess.startswith("its result is rounded to float16")
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    found = compare(right, traced(config, wide, tokens, dtype="float64"))
    assert found.culprit.guess == "its result is rounded to float32"
    assert compare(right, traced(config, wide, tokens, dtype="")).equal
    # Results of float32 are judged as such, whatever the trace says: bfloat16 does not hold them.
    assert compare(right, traced(config, arrays, tokens, dtype="bfloat16")).culprit is None


def test_no_warning_is_shown_for_nan_and_infinity():
    """Catches a warning of NumPy between the lines of a report."""
    random = np.random.default_rng(33)
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    weights, tokens = ported.some_weights(config, random), random.integers(0, 50, (1, 12))
    right = traced(config, ported.port(config, weights, tokens), tokens, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in (("h0/attn/scores", np.nan), ("h0/mlp/c_fc", np.inf)):
            changed = right.arrays[name].copy()
            changed[..., 3, 2] = value
            found = compare(right, traced(config, {**right.arrays, name: changed}, tokens))
            assert found.culprit.name == name
            report(found)
        huge, tiny = np.full((1, 1, 1), 1e300), np.full((1, 1, 1), 1e-300)
        assert steps.compared(huge, Bounded(0 * huge, tiny)).ratio == np.inf


def test_progress_covers_every_stage_while_it_runs():
    """Catches a forward pass during which a progress bar stands still, and a bar that stays incomplete."""
    model, events = tiny.model(pg.get_backend("numpy")), []

    def progress(items, what, unit):
        for item in items:
            yield item
            events.append(what)
        events.append(f"end of {what}")

    side = Side("probe", lambda tokens, progress: trace_model(model, tokens, name="it", progress=progress))
    compare(model, side, [1, 2, 3], progress=progress)
    n = len(pg.model.observed_names(tiny.CONFIG))
    stages = ["tracing GPT2", "tracing it", "comparing weights", "judging", "simulating rounding errors"]
    assert list(dict.fromkeys(events)) == [each for stage in stages for each in (stage, f"end of {stage}")]
    assert [events.count(stage) for stage in stages] == [n, n, len(tiny.weights()), n, n]

    def interrupted(items, what, unit):
        for i, item in enumerate(items):
            if what.startswith("tracing") and i == 5:
                raise InterruptedError(what)
            yield item

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        noted = lambda *args, observe: gpt2(*args, observe=lambda *x: (seen.append(x), observe(*x)))  # noqa: E731
        patch.setattr(sides, "gpt2", noted)
        with pytest.raises(InterruptedError, match="tracing GPT2"):
            compare(model, model, [1, 2, 3], progress=interrupted)
    assert len(seen) == 5


def test_no_guess_explains_a_right_op():
    """Catches a guess that is accepted because its bound is wide. Only another eps may be within rounding of the right
    one, where the variance is large.
    """
    random = np.random.default_rng(5)
    for _ in range(20 if THOROUGH else 1):
        config = ported.some_config(random)
        weights = ported.some_weights(config, random)
        tokens = random.integers(0, config.n_vocab, (1, 24))
        arrays = ported.port(config, weights, tokens)
        known = traced(config, arrays, tokens, weights).weights
        result = steps.results(arrays, config)
        for step in steps.steps(config):
            call = steps.call(step, tokens, result, known, config, "float32", OF_NUMPY)
            place = steps.judge(call, arrays[step.name]).element
            case = Case(step, call, arrays[step.name], result, known, config, set(), place)
            cause, _ = explain(case)
            assert not cause or "eps" in cause, f"{step.name}: {cause}"


def softmax_in_16_bits(x):
    x = x - x.max(axis=-1, keepdims=True)
    e = np.exp(x)
    return e / e.astype(np.float32).sum(axis=-1, keepdims=True).astype(e.dtype)


def softmax_in_float32(x):
    x = x.astype(np.float32)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
def test_roundings_to_16_bits_within_an_op_are_named(form):
    """Catches a definition that has a rounding at another place. NumPy's 16-bit arrays round after each operation."""
    random, dtype = np.random.default_rng(30), np.dtype(getattr(ml_dtypes, form, form))
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=48, n_vocab=20, n_ctx=24, eos_token_id=None)
    q, k, v = (random.normal(0, 2, (1, 2, 24, 24)).astype(dtype) for _ in range(3))
    x = random.normal(0, 2, (1, 24, 192)).astype(dtype)
    root, factor = dtype.type(math.sqrt(2 / math.pi)), dtype.type(0.044715)
    mask, scale = np.tri(24, dtype=np.bool_), np.float32(24**-0.5)

    def product(x, y):
        return (x.astype(np.float64) @ y.astype(np.float64)).astype(np.float32).astype(dtype)

    def scaled(x, scale):
        return (x.astype(np.float32) * scale).astype(dtype)

    keys = np.swapaxes(k, -1, -2)
    plain, exact = product(q, keys), (q.astype(np.float64) @ keys.astype(np.float64)).astype(np.float32)
    for cause, scores in {
        f"the scores are rounded to {form} before the scale": plain.astype(np.float32) * scale,
        f"the scores are rounded to {form} before and after the scale": scaled(plain, scale),
        f"the scaled scores are rounded to {form}": scaled(exact, scale),
        f"the scaled q and the scores are rounded to {form}": product(scaled(q, scale), keys),
    }.items():
        hidden = np.where(mask, scores, -np.inf).astype(scores.dtype)
        results = {cause: softmax_in_float32(hidden).astype(dtype)}
        if scores.dtype == dtype:
            results[f"{cause}, and so is each step of softmax"] = softmax_in_16_bits(hidden)
        for expected, w in results.items():
            arrays = {"h0/attn/q": q, "h0/attn/k": k, "h0/attn/weights": w}
            found = compare(*[traced(config, arrays, np.arange(24)[None] % 20, dtype=form)] * 2)
            assert found.culprit.guess == expected
            del arrays["h0/attn/weights"]
            arrays |= {"h0/attn/v": v, "h0/attn/attention": product(w, v)}
            found = compare(*[traced(config, arrays, np.arange(24)[None] % 20, dtype=form)] * 2)
            assert expected in found.culprit.guess.split(" or ")
    for cubes in (x * x * x, (x.astype(np.float32) ** 3).astype(dtype)):
        y = dtype.type(0.5) * x * (1 + np.tanh(root * (x + factor * cubes)))
        assert y.dtype == dtype
        arrays = {"h0/mlp/c_fc": x, "h0/mlp/gelu": y}
        found = compare(*[traced(config, arrays, np.arange(24)[None] % 20, dtype=form)] * 2)
        assert found.culprit.guess == f"each elementary step of GELU is rounded to {form}"


UNKNOWN = {
    "noise": lambda x, random: x * (1 + 1e-3 * random.standard_normal(x.shape)),
    "absolute noise": lambda x, random: x + 1e-3 * random.standard_normal(x.shape),
    "a smooth function": lambda x, random: x + 1e-3 * np.abs(x).max() * np.sin(x),
    "a gain": lambda x, random: x * (1 + 1e-4 * np.arange(x.shape[-1])),
    "zeros": lambda x, random: np.where(random.random(x.shape) < 0.1, 0, x),
    "a square": lambda x, random: x + 1e-4 * x * x,
    "sorted": lambda x, random: np.sort(x, axis=-1),
    "two factors": lambda x, random: np.where(x > 0.1, x, 1.01 * x),
    "columns shifted": lambda x, random: np.roll(x, 3, axis=-1),
}


@pytest.mark.parametrize("mistake", UNKNOWN)
def test_no_guess_explains_a_mistake_that_is_not_in_the_list(mistake):
    """Catches a guess that resembles the result, and errors of any kind that are taken for those of 16 bits."""
    random = np.random.default_rng(6)
    config = ported.some_config(random)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 20))
    right = ported.port(config, weights, tokens)
    names = [name for name in right if "scores" not in name]  # a function of hidden scores is another mask
    for name in names[:: 1 if THOROUGH else 9]:
        wrong = UNKNOWN[mistake](right[name].astype(np.float64), random).astype(np.float32)
        ops = judge_all(traced(config, {**right, name: wrong}, tokens), weights)
        first = next(op for op in ops if not op.within)
        assert (first.name, first.guess) == (name, "")
        assert all(not op.guess or "it follows from" in op.guess for op in ops)


def test_a_definition_without_a_value_explains_nothing(monkeypatch):
    """Catches a formula whose result is NaN, which permits any number, as an explanation."""
    monkeypatch.setitem(GUESSES, "attention_scores", (lambda case: iter([("NaN", case.then(lambda y: y * np.nan))]),))
    random = np.random.default_rng(21)
    config = ported.some_config(random)
    rest = config, ported.some_weights(config, random), random.integers(0, config.n_vocab, (1, 20))
    assert placed(ported.Bug("no mask", "h0/attn/scores"), *rest)[1].guess == ""


def test_a_nan_is_judged_where_it_arises():
    """Catches a copy of NaN that is called wrong because NaN is unequal to itself, with a guess that NaN permits."""
    random = np.random.default_rng(20)
    config = pg.GPT2Config(n_layer=3, n_head=2, n_embd=16, n_vocab=61, n_ctx=40, eos_token_id=None)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 20))
    with np.errstate(invalid="ignore"):
        arrays = ported.port(config, weights, tokens, ported.Bug("not a number", "h0/mlp/gelu"))
    (found,) = [op for op in judge_all(traced(config, arrays, tokens), weights) if not op.within]
    assert found.name == "h0/mlp/gelu"
    assert re.fullmatch(r"128 of its 1,280 elements are NaN, and the others are right", found.guess)


def test_there_are_guesses_for_every_op():
    """Catches an op without guesses."""
    assert GUESSES.keys() == steps.OPS.keys()
    assert all(GUESSES.values())


def test_missing_results_are_derived_or_listed():
    """Catches c_attn that is not derived from q, k and v, or the reverse, and a verdict that hides what is missing."""
    random = np.random.default_rng(7)
    config = ported.some_config(random)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 16))
    arrays = ported.port(config, weights, tokens)
    right = traced(config, arrays, tokens, weights)

    def without(*endings, source=arrays):
        kept = {name: x for name, x in source.items() if not name.endswith(endings)}
        return compare(right, traced(config, kept, tokens))

    found = without("c_attn")
    assert found.missing == []
    assert "h0/attn/c_attn" in [finding.name for finding in found.ops]
    found = without("/q", "/k", "/v", "/scores", "/weights")
    assert {name.rpartition("/")[2] for name in found.missing} == {"q", "k", "v", "scores", "weights"}
    assert "h0/attn/attention" in [finding.name for finding in found.ops]
    assert found.verdict == "Every op is within its bound, and the logits are equal."
    found = without("ln_2")
    assert found.equal
    assert "h0/mlp/c_fc" in found.missing
    assert "Every op that could be judged" in found.verdict
    wrong = ported.port(config, weights, tokens, ported.Bug("activation", "h0/mlp/gelu", "relu"))
    found = without("mlp/gelu", source=wrong)
    assert not found.equal
    assert "the difference at h0/mlp/c_proj" in found.verdict
    wrong = ported.port(config, weights, tokens, ported.Bug("order", "h1/attn/c_attn", "kqv"))
    found = without("c_attn", source=wrong)
    assert (found.culprit.name, found.culprit.guess) == ("h1/attn/c_attn", "the order is k, q, v, not q, k, v")


def test_the_element_with_the_largest_ratio_is_named():
    """Catches an index within a block of the vocabulary, or of the sampled positions."""
    random = np.random.default_rng(8)
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=9000, n_ctx=8, eos_token_id=None)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 6))
    arrays = ported.port(config, weights, tokens)
    wrong = {**arrays, "logits": arrays["logits"].copy()}
    wrong["logits"][0, 3, 8500] += 1
    found = compare(traced(config, arrays, tokens, weights), traced(config, wrong, tokens)).culprit
    assert (found.name, found.element, found.computed) == ("logits", (0, 3, 8500), wrong["logits"][0, 3, 8500])
    assert found.computed - found.exact == pytest.approx(1, abs=1e-5)
    wrong["logits"][0, 2, 7] = np.nan
    found = compare(traced(config, arrays, tokens, weights), traced(config, wrong, tokens)).culprit
    assert (found.element, found.ratio) == ((0, 2, 7), np.inf)


def test_logits_are_compared_as_distributions():
    """Catches a divergence in the other direction, and a position that is not the first."""
    x = np.log([[[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]]])
    y = np.log([[[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]])
    found = of_logits(x, y)
    assert (found.first, found.greedy) == (1, (0, 1))
    assert found.divergence == pytest.approx(0.75 * np.log(3) - 0.25 * np.log(3))
    assert found.largest == pytest.approx(np.log(3))
    assert of_logits(x, x) == (0.0, 0.0, None, None, None, 0)
    x[0, 0, 1] = -np.inf  # as some programs do with logits of padding
    assert of_logits(x, x)[:2] == (0.0, 0.0)


def test_sides_that_cannot_be_compared_are_refused():
    """Catches two texts, two shapes, and results of another shape, which must give one clear line."""
    random = np.random.default_rng(9)
    config = tiny.CONFIG
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 5))
    arrays = ported.port(config, weights, tokens)
    right = traced(config, arrays, tokens, weights)
    other = pg.GPT2Config(**{**vars(config), "n_layer": 3})
    for side, message in [
        (traced(config, arrays, (tokens + 1) % config.n_vocab), "is a trace of the tokens"),
        (traced(other, arrays, tokens), "n_layer is 2 in port and 3 in port"),
        (traced(None, {"h9/ln_2": arrays["h1/ln_2"]}, tokens), "port: h9/ln_2 is a result of layer 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(right, side)
    with pytest.raises(ValueError, match="nothing can be compared: the traces share no results"):
        compare(*(traced(None, {name: arrays[name]}, tokens) for name in ("logits", "ln_f")))
    with pytest.raises(ValueError, match="no text is given"):
        compare(*[tiny.model(pg.get_backend("numpy"))] * 2)


def vocabularies(config, n, random, pad):
    """Return the weights of a model and of the same model with a vocabulary of n ids."""
    weights, n_embd = ported.some_weights(config, random), config.n_embd
    for path in ("wte", "lm_head"):
        if path in weights:
            weights[path] = weights[path].astype(np.float32)
    larger = {
        path: np.concatenate([a, np.full((n - len(a), n_embd), pad, np.float32)]) if path in ("wte", "lm_head") else a
        for path, a in weights.items()
    }
    return weights, larger


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("is_larger", ["a", "b"])
@pytest.mark.parametrize("known", ["models", "weights of a", "weights of b", "no configuration of b"])
def test_vocabularies_of_two_sizes_are_compared_in_their_common_part(tied, is_larger, known):
    """Catches padding that makes a comparison impossible, rows that are judged with another model's weights, and a
    divergence over ids that one model does not have.
    """
    random = np.random.default_rng(20)
    small = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=7)
    small = dataclasses.replace(small, tie_word_embeddings=tied)
    large = dataclasses.replace(small, n_vocab=64)
    tokens = random.integers(0, small.n_vocab, (1, 12))
    weights = dict(zip((50, 64), vocabularies(small, 64, random, 0.0), strict=True))
    a, b = (small, large) if is_larger == "b" else (large, small)

    def side(config, style, has_weights, has_config=True):
        arrays = ported.port(config, weights[config.n_vocab], tokens, style=style)
        own = weights[config.n_vocab] if has_weights else {}
        return traced(config if has_config else None, arrays, tokens, own)

    x = side(a, "plain", known != "weights of b")
    y = side(b, "reversed", known in ("models", "weights of b"), known != "no configuration of b")
    found = compare(x, y)
    assert not found.equal
    assert found.missing == []
    assert all(op.within for op in found.ops)
    sizes = f"{a.n_vocab} token ids in the reference, {b.n_vocab} in the judged model"
    assert found.verdict.startswith(f"The vocabularies differ ({sizes}), and every op is within its bound, so rounding")
    assert found.notes[0].startswith("Logits are compared for the 50 token ids that both sides have. The KL divergence")
    if known == "models":
        changed = {"wte"} if tied else {"wte", "lm_head"}
        assert {each.path for each in found.weights} == changed
        verb = "added" if is_larger == "b" else "missing"
        assert all(each.kind.startswith(f"14 rows {verb} at the end") for each in found.weights)
    (judged,) = (op for op in found.ops if op.name == "logits")
    assert judged.elements == 12 * b.n_vocab
    assert judged.judged == 12 * (b.n_vocab if ("weights" in known and "b" in known) or known == "models" else 50)
    p, q = (each.arrays["logits"][0, :, :50].astype(np.float64) for each in (x, y))
    p, q = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in (p, q))
    assert found.logits.divergence == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).max(), abs=1e-15)
    assert found.logits.common == 50
    assert found.logits.largest == found.growth[-1].difference <= found.growth[-1].rounding


def test_padding_that_wins_and_padding_that_is_wrong_are_found():
    """Catches a model that generates ids that no tokenizer has, and logits that are judged only where both sides
    have them.
    """
    random = np.random.default_rng(21)
    small = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    large = dataclasses.replace(small, n_vocab=64)
    tokens = random.integers(0, small.n_vocab, (1, 12))
    weights, padded = vocabularies(small, 64, random, 0.0)
    padded["wte"][60] = 50 * random.standard_normal(16)
    a, b = (
        traced(config, ported.port(config, w, tokens), tokens, w) for config, w in ((small, weights), (large, padded))
    )
    for x, y in ((a, b), (b, a)):
        found = compare(x, y)
        wins = b.arrays["logits"].argmax(axis=-1)[0] >= 50
        assert 0 < found.logits.outside == wins.sum() < 12
        assert 60 in found.logits.greedy
        assert f"an id that only one side has at {wins.sum()} of 12 positions" in found.verdict
    of_common = [compare(x, y).growth[-1].rounding for x, y in ((a, b), (b, a))]
    assert max(of_common) < 3 * min(of_common)  # the logits of padding are larger, and are not compared
    rolled = {**a.arrays, "logits": np.roll(a.arrays["logits"], 1, axis=-1)}
    found = compare(b, traced(small, rolled, tokens))
    assert (found.culprit.name, found.culprit.guess) == ("logits", "the token ids are off by +1")
    b.arrays["logits"][0, 3, 62] += 1
    found = compare(a, b)
    assert (found.culprit.name, found.culprit.element) == ("logits", (0, 3, 62))
    assert found.logits.largest < 1e-4
    assert found.verdict.startswith("The vocabularies differ (50 token ids in the reference, 64 in the judged model), ")
    assert "and the models part at logits, where the error of unembed is" in found.verdict


@pytest.mark.parametrize("rows", [12, 16, 20])
def test_contexts_of_two_sizes_are_compared(rows):
    """Catches positions that are taken for unknown because one model has more of them."""
    random = np.random.default_rng(24)
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    weights, tokens = ported.some_weights(config, random), random.integers(0, 50, (1, 12))
    arrays = ported.port(config, weights, tokens)
    other = {**weights, "wpe": np.resize(weights["wpe"], (rows, 16))}
    own = dataclasses.replace(config, n_ctx=rows)
    for x, y in ((weights, other), (other, weights), ({}, other), (other, {})):
        found = compare(traced(config, arrays, tokens, x), traced(own, arrays, tokens, y))
        assert found.missing == []
        assert all(op.within for op in found.ops)
        assert not any(math.isnan(each.rounding) for each in found.growth)
    for path, n in (("wte", int(tokens.max())), ("wpe", 11)):
        fewer = {**weights, path: weights[path][:n]}
        found = compare(*[traced(None, arrays, tokens, fewer)] * 2)
        assert found.missing == ["embedding"]
        assert all(math.isnan(each.rounding) for each in found.growth)


PARAMETER_FREE = ("split", "attention_scores", "attention_weights", "attention", "add", "gelu")


@pytest.mark.parametrize("config_is_known", [True, False])
def test_traces_without_weights_give_what_can_be_known(config_is_known):
    """Catches a refusal, an op without parameters that is not judged, and a claim that rounding explains the rest."""
    random = np.random.default_rng(22)
    config = pg.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    weights, tokens = ported.some_weights(config, random), random.integers(0, 50, (1, 12))

    def side(*bug, style="plain"):
        given = config if config_is_known else None
        return traced(given, ported.port(config, weights, tokens, *bug, style=style), tokens)

    found = compare(side(), side(style="reversed"))
    assert not found.equal
    assert found.weights is None
    assert {op.op for op in found.ops} == set(PARAMETER_FREE)
    assert len(found.ops) == 2 * 9
    assert "h0/ln_1" in found.missing
    start = "Every op that could be judged is within its bound, and it is not known whether rounding explains the diff"
    assert found.verdict.startswith(start)
    assert any(note.startswith("The weights are known of neither side.") for note in found.notes)
    assert any(note.startswith("Neither side has a configuration.") for note in found.notes) != config_is_known
    assert 0 < found.logits.largest < 1e-4
    assert len(found.growth) == len(pg.model.observed_names(config))
    assert all(math.isnan(each.rounding) for each in found.growth)
    found = compare(side(), side())
    assert found.equal
    assert found.verdict.endswith("within its bound, and all results that both sides have are equal.")
    found = compare(side(), side(ported.Bug("activation", "h1/mlp/gelu", "relu")))
    assert (found.culprit.name, found.culprit.guess) == ("h1/mlp/gelu", "the activation is ReLU")
    assert found.verdict.startswith("The models part at h1/mlp/gelu, where the error of gelu is ")
    right, weights["h1/mlp/c_fc/w"] = side(), 1.01 * weights["h1/mlp/c_fc/w"]
    found = compare(right, side())
    assert any(note.startswith("The difference grows most at h1/mlp/c_fc: ") for note in found.notes)


def test_a_few_results_without_a_configuration_are_compared():
    """Catches a shape that is taken for known, although no result has it."""
    random = np.random.default_rng(23)
    for arrays in (
        {"logits": random.normal(size=(1, 3, 9))},
        {"h2/attn/weights": random.random((1, 2, 3, 3))},
        {"h0/mlp/c_fc": random.normal(size=(1, 3, 7)), "h0/mlp/gelu": np.zeros((1, 3, 7))},
    ):
        a, b = (
            traced(None, {name: (x + i).astype(np.float32) for name, x in arrays.items()}, np.asarray([[1, 2, 3]]))
            for i in range(2)
        )
        found = compare(a, b)
        assert not found.equal
        assert [each.name for each in found.growth] == list(arrays)
        assert [op.name for op in found.ops] == [name for name in arrays if name.endswith("gelu")]
    # The weights of a model whose number of heads nobody knows do not say how a difference grows.
    config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=50, n_ctx=16, eos_token_id=None)
    weights, tokens = ported.some_weights(config, random), random.integers(0, 50, (1, 12))
    arrays = {name: x for name, x in ported.port(config, weights, tokens).items() if x.ndim == 3}
    a, b = (traced(None, arrays, tokens, weights) for _ in range(2))
    found = compare(a, b)
    assert all(op.within for op in found.ops)
    assert {"embedding", "h0/ln_1", "h0/attn/c_attn", "h0/mlp/c_proj", "logits"} <= {op.name for op in found.ops}
    assert all(math.isnan(each.rounding) for each in found.growth)


def test_only_the_wrong_op_is_beyond_its_bound():
    """Catches an op that is judged on the reference's inputs, and a hidden weight that need not be 0. A guess must
    explain all elements, also those that are not in the part on which it is tried first.
    """
    random = np.random.default_rng(12)
    config = pg.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_vocab=61, n_ctx=40, eos_token_id=None)
    weights = ported.some_weights(config, random)
    tokens = random.integers(0, config.n_vocab, (1, 24))
    right = traced(config, ported.port(config, weights, tokens), tokens, weights)

    def beyond(arrays):
        return [each for each in compare(right, traced(config, arrays, tokens)).ops if not each.within]

    wrong = ported.port(config, weights, tokens, ported.Bug("eps", "h0/ln_1", 1e-3))
    (found,) = beyond(wrong)
    assert (found.name, found.guess) == ("h0/ln_1", "eps is 0.001, not 1e-05")
    changed = wrong["h0/ln_1"].copy()
    row = next(i for i in range(1, 10) if i != found.element[1])
    changed[0, row, 5] += 2e-5
    first = beyond({**wrong, "h0/ln_1": changed})[0]
    assert first.element == found.element  # so the guess is first tried on other rows than the changed one
    assert first.guess == ""
    leaking = right.arrays["h1/attn/weights"].copy()
    leaking[0, 1, 2, 7] = 1e-9
    (found,) = beyond({**right.arrays, "h1/attn/weights": leaking})
    assert (found.name, found.element) == ("h1/attn/weights", (0, 1, 2, 7))
