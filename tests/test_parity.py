"""The whole model, on every backend, against Hugging Face transformers, on checkpoints that transformers writes.

transformers in double on the same weights is the truth, and its own error in float32, or in 16 bits, is the yardstick:
each backend's largest error is at most 4 times that. In float64 the yardstick is that of float32, scaled by the ratio
of the unit round-offs, and the truth adds one of its own.

Every weight is exact in every dtype, and the weights are large: attention is far from uniform, no bias is 0 and no gain
is 1, so that mistakes show.
"""

import json
import math
from typing import Any, NamedTuple

import layouts
import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.checkpoint import convert
from portable_gpt2.generation import decoder
from portable_gpt2.testing import claims

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SHAPES = {
    "plain": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 150, "vocab_size": 211},
    "narrow": {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 24,
        "n_positions": 33,
        "vocab_size": 50,
        "n_inner": 40,
        "layer_norm_epsilon": 0.02,
    },
    "unscaled": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 40,
        "vocab_size": 97,
        "scale_attn_weights": False,
    },
    "by layer": {
        "n_layer": 3,
        "n_head": 3,
        "n_embd": 24,
        "n_positions": 48,
        "vocab_size": 64,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "upcast": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_positions": 40,
        "vocab_size": 80,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
}


class Case(NamedTuple):
    """A checkpoint, and what transformers makes of it."""

    directory: Any
    hugging_face: Any  # in double
    tokens: np.ndarray
    truth: np.ndarray
    error: dict[str, float]


def load_hugging_face(directory, dtype):
    # In double, transformers does not run reorder_and_upcast_attn; it changes the arithmetic, not the mathematics.
    switch = {"reorder_and_upcast_attn": False} if dtype == torch.float64 else {}
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True, **switch
    )
    assert not any(info.values()), info
    return model.eval()


def logits_of(hugging_face, tokens):
    with torch.no_grad():
        return hugging_face(torch.from_numpy(tokens).long()).logits.double().numpy()


def draw_weights(hugging_face, seed):
    """Replace all weights by large random ones of eight bits, of which float16 takes none for subnormal."""
    rng = np.random.default_rng(seed)
    for name, x in hugging_face.named_parameters():
        drawn = torch.from_numpy(rng.standard_normal(x.shape))
        if name.endswith("wpe.weight"):
            pass  # double, or a greedy text soon repeats one token
        elif "ln_" in name and name.endswith("weight"):
            drawn = 1 + 0.3 * drawn
        elif x.ndim == 2 and "wte" not in name:
            drawn *= 1.5 / math.sqrt(x.shape[0])
        else:
            drawn *= 0.5
        drawn = drawn.bfloat16().float()
        x.data = torch.where(drawn.abs() < 2.0**-14, 0.0, drawn)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Return a function from the name of a shape to its case."""
    found = {}

    def get(name):
        if name not in found:
            config = transformers.GPT2Config(**SHAPES[name], bos_token_id=None, eos_token_id=None)
            model = transformers.GPT2LMHeadModel(config)
            draw_weights(model, seed=4)
            directory = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(directory)
            tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.n_positions))
            hugging_face = load_hugging_face(directory, torch.float64)
            truth = logits_of(hugging_face, tokens)
            error = {
                dtype: float(abs(logits_of(load_hugging_face(directory, getattr(torch, dtype)), tokens) - truth).max())
                for dtype in ("float32", "bfloat16", "float16")
            }
            error["float64"] = 1.25 * error["float32"] * 2.0**-29
            found[name] = Case(directory, hugging_face, tokens, truth, error)
        return found[name]

    return get


@pytest.fixture(scope="module")
def load(backend, case):
    """Return a function from the name of a shape to the model on the backend; each is compiled only once."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = pg.GPT2.load(case(name).directory, backend=backend)
        return found[name]

    return get


# Logits


@pytest.mark.parametrize("name", SHAPES)
def test_the_truth_agrees_with_the_exact_logits(case, name):
    """Catches an error of transformers in double, or of ball arithmetic: the two have no code in common."""
    of = case(name)
    exact = pg.get_backend("flint")
    model = pg.GPT2.load(of.directory, backend=exact, dtype="float64", tokenizer=None)
    bounds = exact.enclosure(model.logits(of.tokens[:1, :8]))
    truth = of.truth[:1, :8]
    distance = np.maximum(truth - bounds.lower, bounds.upper - truth).max()
    assert 0 < distance <= 4 * of.error["float64"] < 1e-11


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_as_near_to_the_truth_as_transformers_own(load, case, backend, name):
    """Catches any difference from GPT-2 as transformers reads a checkpoint: a tensor under another's name, transposed
    or split in another order, an entry of config.json ignored, GELU by erf, a mask one column off.
    """
    expected = case(name)
    logits = pg.to_numpy(load(name).logits(expected.tokens))
    ratio = float(abs(logits - expected.truth).max()) / (4 * expected.error["float32"])
    claims.record("parity", backend, "float32", ratio)
    assert ratio <= 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_logits_in_other_dtypes_are_as_near_to_the_truth_as_transformers_own(case, backend, dtype):
    """Catches float32 somewhere in float64, and in 16 bits sums that are not accumulated in float32."""
    expected = case("plain")
    model = pg.GPT2.load(expected.directory, backend=backend, dtype=dtype)
    logits = pg.to_numpy(model.logits(expected.tokens)).astype(np.float64)
    ratio = float(abs(logits - expected.truth).max()) / (4 * expected.error[dtype])
    claims.record("parity", backend, dtype, ratio)
    assert ratio <= 1


def test_mistakes_would_show(case):
    """Catches weights that make the other tests blind: logits that hardly differ, attention that looks everywhere
    alike, and a yardstick so long that it measures nothing.
    """
    for name in SHAPES:
        model, tokens, truth, error = case(name)[1:]
        with torch.no_grad():
            looks = model(torch.from_numpy(tokens).long(), output_attentions=True).attentions
        assert truth.std() > 1
        assert error["float32"] < 1e-4
        assert error["bfloat16"] < truth.std() / 2
        if "scale_attn_by_inverse_layer_idx" not in SHAPES[name]:
            assert torch.stack(looks)[..., -1, :].amax(-1).mean() > 8 / tokens.shape[1]


# Generation


@pytest.fixture(scope="module")
def text(case):
    """Return a function from the length of a prompt to the text that transformers makes of it, greedily, to the end."""
    found = {}

    def get(prompt):
        if prompt not in found:
            expected = case("plain")
            given = torch.from_numpy(expected.tokens[:1, :prompt])
            ids = expected.hugging_face.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_length=150, pad_token_id=0
            )[0].numpy()
            best = np.sort(logits_of(expected.hugging_face, ids[None])[0, prompt - 1 : -1])
            assert (best[:, -1] - best[:, -2]).min() > 2 * 4 * expected.error["float32"], "draw other weights"
            assert len(set(ids[prompt:])) > 10, "the text repeats itself: draw other weights"
            found[prompt] = ids.tolist()
        return found[prompt]

    return get


@pytest.mark.parametrize("prompt", [1, 20])
def test_greedy_text_is_what_transformers_generates(load, text, prompt):
    """Catches what a single forward pass does not show: cached decoding up to the end of the context, the cache grown
    on the way. No two best logits are closer than the bound on both, so that the tokens must be equal.
    """
    ids = text(prompt)
    drawn = load("plain").stream_ids(ids[:prompt], max_new_tokens=150 - prompt, temperature=0)
    assert [*ids[:prompt], *drawn] == ids


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 128])
def test_cached_logits_are_as_near_to_the_truth_as_transformers_uncached_ones(load, case, backend, monkeypatch, prompt):
    """Catches padding that is seen, a row written in the wrong place, a position that is off by one: the logits that
    each token would be drawn from, along a text that is fixed beforehand.
    """
    expected = case("plain")
    text, rows = expected.tokens[1].tolist(), []

    def dictate(options, logits, position, seen, index):
        rows.append(logits)
        return text[position]

    monkeypatch.setattr(decoder, "sample_with", dictate)
    list(load("plain").stream_ids(text[:prompt], max_new_tokens=150 - prompt))

    ratio = float(abs(np.stack(rows) - expected.truth[1, prompt - 1 : -1]).max()) / (4 * expected.error["float32"])
    claims.record("parity gen.", backend, "float32", ratio)
    assert ratio <= 1


# Scores


def losses(hugging_face, ids):
    """Return transformers' log-probability of each of the ids after the first."""
    with torch.no_grad():
        logits = hugging_face(torch.tensor([ids])).logits[0, :-1]
        return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().numpy()


def test_scores_are_as_near_to_the_truth_as_transformers_own_losses(load, case, backend):
    """Catches a token that is scored by another's logits, and a sum in float32: per token the error is at most 4 times
    the largest that transformers itself makes in float32, and so is that of the mean, which is its loss.
    """
    expected = case("plain")
    single = load_hugging_face(expected.directory, torch.float32)
    ids = expected.tokens[0].tolist()
    truth = losses(expected.hugging_face, ids)
    error = abs(losses(single, ids) - truth).max()
    score = load("plain").score_ids(ids)
    ratio = float(abs(score.log_probs[1:] - truth).max() / (4 * error))
    claims.record("score", backend, "float32", ratio)
    assert ratio <= 1
    with torch.no_grad():
        loss = float(expected.hugging_face(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert abs(-score.total / score.n_tokens - loss) <= 4 * error
    assert abs(math.log(score.perplexity) - loss) <= 4 * error


# Checkpoints


def tensors_of(model):
    return {path: pg.to_numpy(x) for path, x in pg.params.flatten(model.params)}


def test_names_are_read_with_and_without_their_prefix(load, case, backend, tmp_path):
    """Catches a reader that knows one layout of names: the hub's gpt2 has no ``transformer.`` before them."""
    case("plain").hugging_face.transformer.float().save_pretrained(tmp_path)
    case("plain").hugging_face.double()
    bare, prefixed = tensors_of(pg.GPT2.load(tmp_path, backend=backend)), tensors_of(load("plain"))
    assert list(bare) == list(prefixed)
    for path, a in prefixed.items():
        np.testing.assert_array_equal(bare[path], a)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_saved_here_is_the_same_model_in_transformers(load, case, name, tmp_path):
    """Catches a tensor or an entry of config.json that is lost, renamed or laid out otherwise on the way back: the
    logits are the same to the bit, because all the weights and the code are.
    """
    load(name).save(tmp_path / "saved")
    returned = load_hugging_face(tmp_path / "saved", torch.float64)
    np.testing.assert_array_equal(logits_of(returned, case(name).tokens), case(name).truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_bit(case, backend, dtype, tmp_path):
    """Catches a rounding, a transposition or a dtype changed on the way through a backend and back to a file."""
    first = pg.GPT2.load(case("narrow").directory, backend=backend, dtype=dtype)
    first.save(tmp_path / "saved")
    second = pg.GPT2.load(tmp_path / "saved", backend=backend, dtype=dtype)
    assert second.config == first.config
    own = case("narrow").hugging_face.transformer.state_dict()
    found = tensors_of(second)
    for path, a in tensors_of(first).items():
        assert a.dtype.name == found[path].dtype.name == dtype
        assert a.tobytes() == found[path].tobytes(), path
    assert found["h0/attn/c_proj/w"].astype(np.float64).tolist() == own["h.0.attn.c_proj.weight"].tolist()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["n_inner"], config["layer_norm_epsilon"]) == (40, 0.02)


@pytest.fixture(scope="module")
def released(case, tmp_path_factory):
    """The plain case as OpenAI would have released it, written by TensorFlow 1's Saver and not by this package."""
    directory = tmp_path_factory.mktemp("release")
    model = pg.GPT2.load(case("plain").directory, backend="numpy")
    layouts.write_openai(directory, model.config, tensors_of(model))
    return directory


def test_openai_s_release_is_the_model_that_transformers_has(load, case, text, released, backend):
    """Catches a name, a shape or an order that is not OpenAI's: weights, logits and greedy text are those of Hugging
    Face's file of the same model, on every backend.
    """
    model, expected = pg.GPT2.load(released, backend=backend), case("plain")
    for path, a in tensors_of(load("plain")).items():
        np.testing.assert_array_equal(tensors_of(model)[path], a)
    logits = pg.to_numpy(model.logits(expected.tokens))
    np.testing.assert_array_equal(logits, pg.to_numpy(load("plain").logits(expected.tokens)))
    assert abs(logits - expected.truth).max() <= 4 * expected.error["float32"]
    ids = text(20)
    assert [*ids[:20], *model.stream_ids(ids[:20], max_new_tokens=60, temperature=0)] == ids[:80]


def test_from_openai_s_release_through_transformers_and_back_every_bit_is_kept(case, released, tmp_path):
    """Catches a rounding, a transposition or a loss anywhere in OpenAI -> ours -> transformers -> ours."""
    convert(released, tmp_path / "ours")
    load_hugging_face(tmp_path / "ours", torch.float32).save_pretrained(tmp_path / "theirs")
    first, last = (tensors_of(pg.GPT2.load(d, backend="numpy")) for d in (released, tmp_path / "theirs"))
    assert list(first) == list(last)
    for path, a in first.items():
        assert a.tobytes() == last[path].tobytes(), path


@pytest.mark.parametrize("layout", ["in files of 8 KB", "pytorch_model.bin"])
def test_what_transformers_writes_otherwise_is_read_too(case, layout, tmp_path):
    """Catches an index, or a file of before safetensors, that is not as transformers has it."""
    model = load_hugging_face(case("narrow").directory, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if layout == "in files of 8 KB" else "1GB")
    if layout == "pytorch_model.bin":
        torch.save(model.state_dict(), tmp_path / layout)
        (tmp_path / "model.safetensors").unlink()
    expected = tensors_of(pg.GPT2.load(case("narrow").directory, backend="numpy"))
    found = pg.GPT2.load(tmp_path, backend="numpy")
    files = "pytorch_model.bin, " if layout == "pytorch_model.bin" else "model.safetensors.index.json of "
    assert found.source.startswith(f"Hugging Face's layout, {files}")
    for path, a in tensors_of(found).items():
        assert a.tobytes() == expected[path].tobytes()


def test_a_separate_lm_head_is_that_of_transformers(case, backend, tmp_path):
    """Catches wte in the place of a table of the logits' own, when it is read and when it is written."""
    expected = case("narrow")
    config = transformers.GPT2Config(**SHAPES["narrow"], tie_word_embeddings=False, eos_token_id=None)
    separate = transformers.GPT2LMHeadModel(config)
    separate.transformer.load_state_dict(expected.hugging_face.transformer.state_dict())
    draw_weights(separate.lm_head, seed=5)
    separate.save_pretrained(tmp_path / "it")
    truth = logits_of(load_hugging_face(tmp_path / "it", torch.float64), expected.tokens)
    assert abs(truth - expected.truth).max() > 0.1
    found = pg.GPT2.load(tmp_path / "it", backend=backend)
    assert abs(pg.to_numpy(found.logits(expected.tokens)) - truth).max() <= 4 * expected.error["float32"]
    found.save(tmp_path / "saved")
    saved = logits_of(load_hugging_face(tmp_path / "saved", torch.float64), expected.tokens)
    np.testing.assert_array_equal(saved, truth)
