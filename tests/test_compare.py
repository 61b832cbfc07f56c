"""Where two models part: porting bugs are placed and explained, and correct models raise no alarm.

A thorough run (a profile of hypothesis whose name ends in ``thorough``) has every bug several times, and hundreds of
correct pairs.
"""

import re
from types import MappingProxyType

import hypothesis
import numpy as np
import ported
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint import stored
from portable_gpt2.comparison import steps
from portable_gpt2.comparison.compare import compare
from portable_gpt2.comparison.growth import of_logits
from portable_gpt2.comparison.guesses import GUESSES, Case, explain
from portable_gpt2.comparison.trace import Trace
from portable_gpt2.numerics import Numerics
from portable_gpt2.testing.plain_gpt2 import CONFIGS, on_backend, random_weights

THOROUGH = hypothesis.settings.get_current_profile_name().endswith("thorough")
OF_NUMPY = Numerics(exp=(3.6, 0.0), log=8.0)


def traced(config, arrays, tokens, weights=MappingProxyType({}), dtype="float32", source="port"):
    """Return the trace of a plain model."""
    return Trace(source, tokens, arrays, dtype, config, {p: stored(a) for p, a in weights.items()}, OF_NUMPY)


def placed(bug, config, weights, tokens):
    """Return the result where a mistake should be found, and the comparison of the port with the right model."""
    names = pg.model.observed_names(config)
    with np.errstate(all="ignore"):
        wrong = ported.port(config, weights, tokens, bug)
    right = traced(config, ported.port(config, weights, tokens), tokens, weights, source="right")
    return bug.culprit(names), compare(right, traced(config, wrong, tokens, source="wrong"))


def test_porting_bugs_are_placed_at_their_op_and_explained():
    """Catches an op that is judged on other inputs than its own, and a guess that explains nothing or too much."""
    n, found = 3 * len(ported.KINDS) if THOROUGH else 40, []
    for bug, *rest in ported.bugs(n, seed=0 if THOROUGH else 19):
        name, comparison = placed(bug, *rest)
        culprit = comparison.culprit
        is_placed = culprit is not None and culprit.name == name
        found.append((is_placed, is_placed and bool(re.search(bug.cause, culprit.guess)), bug, culprit))
    misses = [f"{bug}\n    {culprit}" for is_placed, explained, bug, culprit in found if not (is_placed and explained)]
    print("\n".join(misses))
    assert sum(is_placed for is_placed, *_ in found) >= 0.99 * n
    assert sum(explained for _, explained, *_ in found) >= 0.9 * n


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


def assert_no_alarm(found):
    """Assert that every result is within its bound, and that no guess was made."""
    assert found.equal, found.verdict
    assert not found.missing
    assert max(finding.ratio for finding in found.ops) <= 1
    assert not any(finding.guess for finding in found.ops)
    for each in found.growth:
        assert each.difference <= each.rounding, each


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
        assert "rounding explains the difference" in found.verdict


@pytest.mark.parametrize("backend", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_models_raise_no_alarm(backend, dtype):
    """Catches a bound that a backend exceeds in the model, in float32 or in 16 bits."""
    if dtype not in backend.dtypes:
        pytest.skip("the backend has no such dtype")
    numpy = pg.get_backend("numpy")
    for seed, config in enumerate(CONFIGS.values()):
        weights = random_weights(config, seed)
        tokens = np.random.default_rng(seed).integers(0, config.n_vocab, 20)
        a, b = pg.GPT2(config, on_backend(numpy, weights)), pg.GPT2(config, on_backend(backend, weights, dtype))
        assert_no_alarm(compare(a, b, tokens))


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
        r"Of the [\d,]+ elements of the results that were judged, [\d,]+ were judged: in float64 a sel", note
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
    assert len(found.notes) == 1


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
        for i, step in enumerate(steps.steps(config)):
            call = steps.call(step, tokens, result, known, config, "float32", OF_NUMPY)
            place = steps.judge(call, arrays[step.name]).element
            case = Case(step, call, arrays[step.name], result, known, config, list(arrays)[:i], set(), place)
            cause, _ = explain(case)
            assert not cause or "eps" in cause, f"{step.name}: {cause}"


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
    assert "rounding explains" in found.verdict
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
    assert of_logits(x, x) == (0.0, 0.0, None, None)


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
    with pytest.raises(ValueError, match="the weights are known of neither side"):
        compare(traced(config, arrays, tokens), traced(config, arrays, tokens))
    with pytest.raises(ValueError, match="neither side has a configuration"):
        compare(traced(None, arrays, tokens, weights), traced(None, arrays, tokens))
    with pytest.raises(ValueError, match="no text is given"):
        compare(*[tiny.model(pg.get_backend("numpy"))] * 2)


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
