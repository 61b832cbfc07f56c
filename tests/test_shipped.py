"""The shipped model: its files, its name, its card, and that it has learnt something.

`portable_gpt2.testing.model` tests that it writes the same text on every backend.
"""

import json
import re

import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint import SHIPPED
from portable_gpt2.cli import main
from portable_gpt2.testing.plain_gpt2 import PASSAGE, PERPLEXITY, SHAKESPEARE, in_dtype, plain_text, truth_and_error

DIRECTORY = SHIPPED / "shakespeare"


@pytest.fixture(scope="module")
def model():
    return pg.GPT2.load("shakespeare", backend="numpy")


def test_it_is_small_and_in_16_bits():
    """Catches weights of 32 bits, and a run's leavings."""
    files = {file.name: file.stat().st_size for file in DIRECTORY.iterdir()}
    assert sorted(files) == ["MODEL_CARD.md", "config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sum(files.values()) <= 8_000_000
    assert pg.checkpoint.read_checkpoint("shakespeare").source == (
        "shakespeare, which ships with portable_gpt2, Hugging Face's layout, model.safetensors, float16"
    )


def test_what_the_kit_expects_of_it_is_what_plain_numpy_computes(model):
    """Catches a model that was trained again without its texts in `testing`, and texts that rounding errors change.

    Errors of the size that a backend may make are added to the logits of plain NumPy in float64.
    """
    config, tokenizer = model.config, model.tokenizer
    flat = {path: tensor.read() for path, tensor in pg.checkpoint.read_checkpoint("shakespeare").tensors.items()}
    ids = np.asarray([tokenizer.encode(PASSAGE)])
    logits, error = truth_and_error(in_dtype(flat, np.float64), ids, config)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = np.take_along_axis(log_probs[0, :-1], ids[0, 1:, None], axis=-1)
    assert pytest.approx(np.exp(-scored.mean()), rel=1e-7) == PERPLEXITY
    random = np.random.default_rng(0)
    for prompt, options, text in SHAKESPEARE:
        n, sampling = options["max_new_tokens"], {k: x for k, x in options.items() if k != "max_new_tokens"}
        noise = lambda shape: 4 * error * random.uniform(-1, 1, shape)  # noqa: E731
        found = plain_text(flat, tokenizer.encode(prompt), n, config, noise=noise, **sampling)
        assert tokenizer.decode(found) == text


def test_it_writes_verse():
    """Catches a model that has learnt nothing: lines, words, and Shakespeare's words among them."""
    text = SHAKESPEARE[0][-1]
    assert text.count("\n") >= 3
    words = re.findall(r"[A-Za-z']+", text)
    assert len(words) > 15
    assert len({"the", "and", "I", "you", "my", "of", "to", "in", "is", "that", "a", "thou"} & set(words)) >= 3


def test_it_finds_shakespeare_likelier_than_the_rest(model):
    """The whole way to a perplexity: lines of verse, and the same words in another order."""
    verse, shuffled = PASSAGE, " ".join(sorted(PASSAGE.split()))
    assert 5 < model.score(verse).perplexity < 100
    assert model.score(shuffled).perplexity > 2 * model.score(verse).perplexity
    assert model.score("生きるべきか死ぬべきか").byte_perplexity > 3 * model.score(verse).byte_perplexity


def test_the_command_uses_it_unless_told_otherwise(capsys, tmp_path, monkeypatch):
    """Catches a default that a directory of that name in the way takes the place of."""
    monkeypatch.chdir(tmp_path)
    tiny.model(pg.get_backend("numpy")).save("shakespeare")
    assert main(["generate", "ROMEO.", "-n", "8", "--seed", "7", "--backend", "numpy"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ROMEO.")
    assert "of 4 layers, 4 heads, 256 wide" in err
    assert pg.GPT2.load("shakespeare", backend="numpy").config == tiny.CONFIG  # a directory that is named is that one


def test_an_unknown_name_lists_it():
    with pytest.raises(pg.CheckpointError, match=r"a model of the hub, such as .*, or shakespeare"):
        pg.GPT2.load("not/a/name/at/all", backend="numpy")


def test_its_card_says_what_it_is():
    """Catches a card of another model: its shape and its size are those of the files."""
    card = (DIRECTORY / "MODEL_CARD.md").read_text("utf-8")
    config = pg.GPT2Config.from_dict(json.loads((DIRECTORY / "config.json").read_text()))
    assert f"{pg.params.count(config):,} parameters" in card
    assert f"{config.n_layer} layers" in card
    weights = pg.checkpoint.read_checkpoint("shakespeare").tensors
    assert {tensor.dtype for tensor in weights.values()} == {"float16"}
    assert all(np.isfinite(tensor.read()).all() for tensor in weights.values())
