"""The hand-written gradient in float64, against complex steps, and what the gradients refuse.

`portable_gpt2.testing.training` tests the gradients on every backend.
"""

import inspect

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients, ops
from portable_gpt2.op import interpreted
from portable_gpt2.params import flatten
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights
from portable_gpt2.testing.training.test_gradients import CONFIGS, STEP, TOKENS, plain_loss


def some_derivatives(weights, config, each=3):
    """Return derivatives of the loss by some entries of every parameter, by complex steps."""
    random, found = np.random.default_rng(1), {}
    for path, a in weights.items():
        for _ in range(each):
            i = tuple(int(random.integers(n)) for n in a.shape)
            moved = {p: x.astype(complex) for p, x in weights.items()}
            moved[path][i] += STEP * 1j
            found[path, i] = plain_loss(moved, config).imag / STEP
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_the_loss_is_that_of_complex_steps(name):
    """Catches a gradient that skips a layer, or passes one twice: the hand-written gradient, NumPy, float64."""
    config, backend = CONFIGS[name], pg.get_backend("numpy")
    weights = random_weights(config)
    value, backward = gradients.loss(on_backend(backend, weights, "float64"), backend.from_numpy(TOKENS), config)
    assert float(value) == pytest.approx(plain_loss(weights, config), rel=1e-12)
    found = dict(flatten(backward()))
    assert {path: a.shape for path, a in found.items()} == {path: a.shape for path, a in weights.items()}
    for (path, i), derivative in some_derivatives(weights, config).items():
        assert found[path][i] == pytest.approx(derivative, rel=1e-11, abs=1e-13), (path, i)


def test_a_gradient_refuses_what_its_op_refuses(backend):
    """Catches shapes that only the framework's matrix product complains about, in its own words."""
    q, v = backend.from_numpy(np.zeros((3, 4), np.float32)), backend.from_numpy(np.zeros((2, 4), np.float32))
    for attention in (pg.attention, gradients.attention):
        with pytest.raises(ValueError, match=r"^attention: v has shape \[2, 4\], expected .*keys = 3"):
            attention(q, q, v)
    scalar, target = backend.from_numpy(np.zeros((), np.float32)), backend.from_numpy(np.zeros((), np.int32))
    for cross_entropy in (pg.cross_entropy, gradients.cross_entropy):
        with pytest.raises(ValueError, match=r"^cross_entropy: logits has shape \[\]"):
            cross_entropy(scalar, target)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_the_loss_of_no_targets_is_nan_and_its_gradient_empty(backend, shape):
    """Catches a ZeroDivisionError in the backward pass of a mean over nothing."""
    logits = backend.from_numpy(np.zeros(shape, np.float32))
    value, backward = gradients.cross_entropy(logits, backend.from_numpy(np.zeros(shape[:-1], np.int32)))
    assert np.isnan(backend.to_numpy(value))
    assert backend.to_numpy(backward()["logits"]).shape == shape


@pytest.mark.parametrize("shape", [(0, 0), (2, 0)])
def test_a_vocabulary_of_nothing_is_refused(backend, shape):
    """Catches the framework's own error about the largest of no numbers, and a range from 0 to -1."""
    logits, targets = backend.from_numpy(np.zeros(shape, np.float32)), backend.from_numpy(np.zeros(shape[:1], np.int32))
    for cross_entropy in (pg.cross_entropy, gradients.cross_entropy):
        with pytest.raises(ValueError, match=r"^cross_entropy: logits have shape \[\d, 0\]; the vocabulary is empty"):
            cross_entropy(logits, targets)


@pytest.mark.parametrize("name", [name for name in pg.ops.__all__ if hasattr(gradients, name)])
def test_a_rule_has_the_parameters_of_its_op(name):
    """Catches another default: a model would be trained with another epsilon than it is run with."""
    rule, op = (inspect.signature(getattr(module, name)).parameters.values() for module in (gradients, pg))
    assert [(p.name, p.kind, p.default) for p in rule] == [(p.name, p.kind, p.default) for p in op]


class ByDefinition:
    """An interpreter that computes definitions, and keeps the names of what it computed."""

    def __init__(self):
        self.ops, self.formulas = [], []

    def __call__(self, signature, backend, given):
        self.ops.append(signature.name)
        return getattr(ops, signature.name).reference(**given)

    def add(self, x, y):
        self.ops.append("add")
        assert x.ndim >= y.ndim  # as Interpreter.add promises
        return x + y

    def formula(self, name, arrays, options):
        self.formulas.append(name)
        return getattr(gradients, name).__wrapped__(**arrays, **options)


def test_the_formula_of_attentions_gradient_is_its_rule():
    """Catches an argument that is lost or swapped on the way to an interpreter, which computes each gradient as one
    formula from the arguments of the op: the weights that the op has computed are not given to it.
    """
    random = np.random.default_rng(0)
    q, k, v, dy = (random.standard_normal((2, 3, 3)) for _ in range(4))
    mask = np.triu(np.ones((3, 3), np.bool_), -1)
    for options in ({}, {"mask": mask}, {"mask": mask, "causal": True, "scale": 0.3}):
        value, backward = gradients.attention(q, k, v, **options)
        with interpreted(interpreter := ByDefinition()):
            found, back = gradients.attention(q, k, v, **options)
            gradient = back(dy)
        assert interpreter.formulas == ["attention_backward"]
        np.testing.assert_allclose(found, value, rtol=1e-12)
        assert gradient.keys() == backward(dy).keys()
        for name, expected in backward(dy).items():
            np.testing.assert_allclose(gradient[name], expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_an_interpreter_computes_every_rule_of_the_model():
    """Catches a rule that is computed without the interpreter, and a model whose variables reach it: it knows arrays,
    and not the variables of the tape.
    """
    config, backend = CONFIGS["as published"], pg.get_backend("numpy")
    params, tokens = on_backend(backend, random_weights(config), "float64"), backend.from_numpy(TOKENS)
    value, backward = gradients.loss(params, tokens, config)
    with interpreted(interpreter := ByDefinition()):
        found, back = gradients.loss(params, tokens, config)
        computed = {*interpreter.ops}
        gradient = dict(flatten(back()))
    assert float(found) == pytest.approx(float(value), rel=1e-12)
    for path, expected in flatten(backward()):
        np.testing.assert_allclose(gradient[path], expected, rtol=1e-9, atol=1e-12, err_msg=path)
    rules = {"conv1d", "gelu", "layer_norm", "attention", "embed", "unembed", "cross_entropy", "add"}
    inside = {"attention_scores", "attention_weights", "softmax"}  # of the definition of attention
    assert computed - inside == rules
    assert {*interpreter.formulas} == {f"{name}_backward" for name in rules}


def test_the_gradient_of_a_mean_has_the_factor_1_unless_given():
    """Catches a default factor that only a caller without a factor sees."""
    logits, targets = np.random.default_rng(0).standard_normal((4, 3)), np.asarray([0, 2, 1, 1])
    _, backward = gradients.cross_entropy(logits, targets)
    p = pg.softmax(logits) - np.eye(3)[targets]
    np.testing.assert_allclose(backward()["logits"], p / 4, rtol=1e-12)
    np.testing.assert_allclose(backward(3.0)["logits"], 3 * p / 4, rtol=1e-12)


@pytest.mark.parametrize("loss", [pg.loss, gradients.loss], ids=["loss", "hand-written gradient"])
def test_tokens_that_are_floats_are_refused(loss):
    """Catches an error from within the tape, whose variables have a dtype and few functions."""
    params = on_backend(pg.get_backend("numpy"), random_weights(CONFIGS["as published"]))
    with pytest.raises(TypeError, match=r"^embed: ids has dtype float32; expected int"):
        loss(params, TOKENS.astype(np.float32), CONFIGS["as published"])


@pytest.mark.parametrize("loss", [pg.loss, gradients.loss], ids=["loss", "hand-written gradient"])
def test_what_is_not_a_configuration_is_refused(loss):
    """Catches an error about an attribute that the argument does not have."""
    params = on_backend(pg.get_backend("numpy"), random_weights(CONFIGS["as published"]))
    with pytest.raises(TypeError, match=r"^config is .*; expected a GPT2Config"):
        loss(params, TOKENS, {"n_layer": 1})


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1), ("bfloat16", 8)])
def test_the_loss_of_16_bit_parameters_has_32_bits_and_its_gradient_16(dtype, scale):
    """Catches logits whose loss is computed in 16 bits, and a gradient in another dtype than the parameter's."""
    config, backend = CONFIGS["as published"], pg.get_backend("numpy")
    wide, narrow = (on_backend(backend, random_weights(config), each) for each in ("float32", dtype))
    (expected, back), (value, backward) = (gradients.loss(params, TOKENS, config) for params in (wide, narrow))
    assert value.dtype == np.float32
    assert float(value) == pytest.approx(float(expected), rel=scale * 1e-3)
    truth = dict(flatten(back()))
    for path, x in flatten(backward()):
        assert x.dtype == backend.dtype(dtype), path
        atol = scale * 0.01 * abs(truth[path]).max() + 1e-6
        np.testing.assert_allclose(x.astype(np.float32), truth[path], rtol=scale * 0.05, atol=atol, err_msg=path)
