"""Probes of PyTorch models: every result that is reported is the one that the model computed.

tests/test_parity_probes.py probes the models of transformers and of KerasHub.
"""

import dataclasses

import numpy as np
import pytest
import truth

import portable_gpt2 as pg
from portable_gpt2.comparison.sides import open_side
from portable_gpt2.model import observed_names
from portable_gpt2.numerics import stated
from portable_gpt2.testing.plain_gpt2 import in_dtype, random_weights, some_tokens

CONFIG = pg.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_vocab=101, n_ctx=16, eos_token_id=None)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, n_inner=24)
TOKENS = some_tokens(CONFIG, 1, 12).astype(np.int64)
UNSEEN = {f"h{i}/attn/{name}" for i in range(2) for name in ("scores", "weights")}


@pytest.fixture(scope="module")
def ports(torch):
    """The ports, which import PyTorch."""
    import ports

    return ports


@pytest.fixture
def nano(ports):
    return ports.fill(ports.GPT(CONFIG), in_dtype(random_weights(CONFIG), np.float32))


def test_a_port_with_nanogpt_s_names_is_traced_without_further_ado(nano, torch):
    """Catches a result under another's name, an input that is taken for an output, and heads that are split wrongly."""
    weights = random_weights(CONFIG)
    trace = open_side(nano).run(TOKENS)
    assert list(trace.arrays) == [name for name in observed_names(CONFIG) if name not in UNSEEN]
    truth.assert_near(trace, weights, CONFIG)
    assert trace.source == "ports's GPT on torch, cpu, float32"
    assert (trace.dtype, dataclasses.replace(trace.config, eos_token_id=None)) == ("float32", CONFIG)
    assert trace.numerics == stated(pg.get_backend("torch"), "float32")
    assert trace.weights.keys() == weights.keys()
    for path, a in weights.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a, err_msg=path)
        assert trace.weights[path].shape == a.shape


def test_nothing_of_the_model_is_changed(nano, torch):
    """Catches a hook that stays, also after an error, and a parameter, a mode or a random state that changes."""
    before = {name: x.clone() for name, x in nano.state_dict().items()}
    with torch.no_grad():
        logits = nano(torch.from_numpy(TOKENS))[0]
    state = torch.get_rng_state()
    side = pg.probe(nano)
    side.run(TOKENS)
    failing = nano.transformer.ln_f.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        side.run(TOKENS)
    failing.remove()
    assert not any(module._forward_hooks for module in nano.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in nano.state_dict().items())
    assert not any(x.grad is not None for x in nano.parameters())
    with torch.no_grad():
        assert torch.equal(nano(torch.from_numpy(TOKENS))[0], logits)


def test_a_model_without_biases_has_biases_of_zero(ports):
    """Catches parameters that are left out, so that an op of the model cannot be judged."""
    weights = {path: a * (not path.endswith("/b")) for path, a in random_weights(CONFIG).items()}
    trace = open_side(ports.fill(ports.GPT(CONFIG, bias=False), in_dtype(weights, np.float32))).run(TOKENS)
    truth.assert_near(trace, weights, CONFIG)
    for path, a in weights.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a, err_msg=path)


def test_a_port_with_names_of_its_own_is_traced_by_them(ports):
    """Catches a dict that is half read, q, k and v that are not joined, and results that the model overwrites later."""
    weights = random_weights(UNTIED)
    model = ports.fill(ports.Port(UNTIED), in_dtype(weights, np.float32), ports.PORT_NAMES)
    trace = pg.probe(model, ports.PORT_NAMES, config=UNTIED).run(TOKENS)
    assert list(trace.arrays) == [name for name in observed_names(CONFIG) if name not in UNSEEN]
    truth.assert_near(trace, weights, UNTIED)
    assert trace.config == UNTIED
    assert trace.weights.keys() == weights.keys()
    for path, a in weights.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a, err_msg=path)

    heads = ("attn/q", "attn/k", "attn/v", "attn/attention")
    unknown = pg.probe(model, ports.PORT_NAMES).run(TOKENS)
    assert unknown.config is None
    assert unknown.arrays.keys() == {name for name in trace.arrays if not name.endswith(heads)}


def test_a_port_s_mistake_is_in_the_trace(ports, torch):
    """Catches a trace that has what the model should have computed, and not what it did."""
    model = ports.fill(ports.GPT(CONFIG), in_dtype(random_weights(CONFIG), np.float32))
    expected = open_side(model).run(TOKENS)
    model.transformer.h[1].ln_2.eps = 0.5
    found = open_side(model).run(TOKENS)
    names = list(expected.arrays)
    differ = [name for name in names if not np.array_equal(found.arrays[name], expected.arrays[name])]
    assert differ == names[names.index("h1/ln_2") :]


def test_a_model_in_other_dtypes_is_traced(nano, torch):
    """Catches bfloat16, which NumPy lacks, and a dtype that is not that of the computation."""
    for dtype in ("bfloat16", "float64"):
        trace = open_side(nano.to(getattr(torch, dtype))).run(TOKENS)
        assert trace.dtype == dtype
        assert {x.dtype.name for x in trace.arrays.values()} == {dtype}
        assert trace.weights["wte"].dtype == dtype


def test_a_model_that_cannot_be_traced_is_refused(nano, ports, torch):
    """Catches results with dropout in them, and a name that is misspelt and then simply missing."""
    with pytest.raises(
        ValueError, match=r"GPT is in training mode, in which dropout changes the results; call eval\(\)"
    ):
        open_side(nano.train()).run(TOKENS)
    nano.eval().transformer.h[1].attn.train()
    with pytest.raises(ValueError, match="is in training mode"):
        open_side(nano).run(TOKENS)
    nano.eval()
    for tokens, why in {
        (1000, 3): "token id 1000 is not in the vocabulary, which has ids 0 to 100",
        (1, 17): "17 tokens were given; the model has n_ctx = 16 positions",
    }.items():
        with pytest.raises(ValueError, match=why):
            open_side(nano).run(np.full((1, tokens[1]), tokens[0]))
    port = ports.Port(CONFIG).eval()

    class Other(torch.nn.Linear):
        def forward(self, x):
            return {"x": 1}

        def register_forward_hook(self, *args, **kwargs):
            if self.bias is None:
                raise RuntimeError("no")
            return super().register_forward_hook(*args, **kwargs)

    for model, names, why in [
        (port, None, r"the modules of Port do not have GPT-2's names, such as h\.0\.ln_1; give our name for each"),
        (port, {"norm1": "ln_f"}, r"the model has no module 'norm1'; the nearest names are norm, layers\.1\.norm1, "),
        (port, {"norm": "lnf"}, r"'lnf' is neither wte, wpe, h\{\}/attn nor the name of a result, such as h\{\}/ln_1"),
        (port, {"norm": "h{x}/ln_1"}, r"'h\{x\}/ln_1' is neither wte"),
        (port, {"norm": "h{}/ln_1"}, r"'norm' and 'h\{\}/ln_1' do not both have \{\}, which stands for"),
        (port, {"layers.{}.norm1": "ln_f"}, r"'layers\.\{\}\.norm1' and 'ln_f' do not both have"),
        (
            port,
            {"norm": "ln_f", "layers.0.norm1": "ln_f"},
            r"two modules the name ln_f, 'layers\.0\.norm1' being the s",
        ),
        (Other(2, 2).eval(), {"": "logits"}, r"the module for logits returned \{'x': 1\}; expected an array of floats"),
        (nano, {"transformer.h": "h0/ln_1"}, "the model computed without calling its modules for h0/ln_1; if it is"),
        (torch.nn.Tanh().eval(), {"": "logits"}, "Tanh has no parameters, which say on which device it computes"),
        (Other(2, 2, False).eval(), {"": "logits"}, r"Other takes no hooks \(no\); give the model from which it was"),
    ]:
        with pytest.raises(ValueError, match=why):
            pg.probe(model, names).run(TOKENS)
    for names in ([1], {1: "ln_f"}, {"norm": 1}):
        with pytest.raises(TypeError, match=r"names (is|has) .*; expected"):
            pg.probe(port, names).run(TOKENS)
    with pytest.raises(TypeError, match=r"<class 'ports\.GPT'> is not a model that can be traced"):
        pg.probe(ports.GPT)


def test_layers_that_share_their_modules_are_told_apart_by_their_calls(ports):
    """Catches results of the first layer that are missing for the second, or have another layer's name."""
    weights = random_weights(CONFIG)
    weights |= {path.replace("ln_1", "ln_2"): a for path, a in weights.items() if "ln_1" in path}
    shared = weights | {path.replace("h0", "h1"): a for path, a in weights.items() if path.startswith("h0/")}
    model = ports.fill(ports.GPT(CONFIG), in_dtype(weights, np.float32))
    model.transformer.h[1] = model.transformer.h[0]
    model.transformer.h[0].ln_2 = model.transformer.h[0].ln_1
    trace = open_side(model).run(TOKENS)
    assert list(trace.arrays) == [name for name in observed_names(CONFIG) if name not in UNSEEN]
    truth.assert_near(trace, shared, CONFIG)
    for path, a in shared.items():
        np.testing.assert_array_equal(trace.weights[path].read(), a, err_msg=path)


def test_modules_that_are_called_several_times_are_refused(nano, torch):
    """Catches results of a first call, on other tokens, that are taken for those of the text."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nano

        def forward(self, ids):
            return self.model(ids.flip(-1)), self.model(ids)

    with pytest.raises(ValueError, match="called 18 of its modules several times, such as that for wte; give a model"):
        open_side(Twice().eval()).run(TOKENS)


def test_a_wrapped_model_is_traced_as_it_is_without_the_wrapper(nano, torch):
    """Catches q, k and v that are left out because the wrapper has no configuration."""
    expected = open_side(nano).run(TOKENS)
    trace = open_side(torch.nn.DataParallel(nano).eval()).run(TOKENS)
    assert trace.config == expected.config
    assert list(trace.arrays) == list(expected.arrays)


def test_no_gradients_are_prepared_while_a_model_is_traced(nano, torch):
    """Catches activations that are kept for a backward pass, and kernels that only run in training."""
    seen = []
    nano.transformer.ln_f.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    open_side(nano).run(TOKENS)
    assert seen == [False]
    assert nano(torch.from_numpy(TOKENS))[0].requires_grad


def test_weights_that_are_not_arrays_are_not_known(nano, torch):
    """Catches an AttributeError: the weight of a quantized module is a method."""

    class Quantized(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def weight(self):
            raise AssertionError

        def forward(self, x):
            return self.linear(x)

    mlp = nano.transformer.h[0].mlp
    mlp.c_fc = Quantized(mlp.c_fc).eval()
    trace = open_side(nano).run(TOKENS)
    assert random_weights(CONFIG).keys() - trace.weights.keys() == {"h0/mlp/c_fc/w", "h0/mlp/c_fc/b"}
    assert "h0/mlp/c_fc" in trace.arrays


def test_logits_of_the_last_position_may_have_lost_their_axis(ports):
    """Catches an IndexError for logits [n_vocab]."""

    class Last(ports.GPT):
        def forward(self, ids):
            t = self.transformer
            x = t.drop(t.wte(ids) + t.wpe.weight[: ids.shape[1]])
            for block in t.h:
                x = block(x)
            return self.lm_head(t.ln_f(x)[0, -1])

    model = ports.fill(Last(CONFIG), in_dtype(random_weights(CONFIG), np.float32))
    names = {"transformer.ln_f": "ln_f", "lm_head": "logits"}
    truth.assert_near(pg.probe(model, names).run(TOKENS), random_weights(CONFIG), CONFIG)


def test_some_names_give_some_results(nano, torch):
    """Catches logits of the last position that are taken for those of all; the output of ln_f gives the others."""
    names = {"transformer.h.{}.ln_1": "h{}/ln_1", "transformer.drop": "embedding", "lm_head": "logits"}
    found = pg.probe(nano, names).run(TOKENS).arrays
    assert list(found) == ["embedding", "h0/ln_1", "h0/residual", "h1/ln_1"]
    found = pg.probe(nano, names | {"transformer.ln_f": "ln_f"}).run(TOKENS).arrays
    assert list(found) == ["embedding", "h0/ln_1", "h0/residual", "h1/ln_1", "h1/residual", "ln_f", "logits"]
    found = pg.probe(nano, {"transformer.h.0.ln_1": "h0/ln_1", "transformer.ln_f": "ln_f"}).run(TOKENS).arrays
    assert list(found) == ["embedding", "h0/ln_1", "ln_f"]  # what ln_f takes is the result of another layer
