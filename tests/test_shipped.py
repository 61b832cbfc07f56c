"""The model inside: there, small, loaded by name, and the same text on every backend."""

import json
import re

import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint import SHIPPED
from portable_gpt2.cli import main

DIRECTORY = SHIPPED / "shakespeare"


@pytest.fixture(scope="module")
def model(backend):
    return pg.GPT2.load("shakespeare", backend=backend)


def test_it_is_small_and_in_16_bits():
    """Catches weights of 32 bits, and a run's leavings."""
    files = {file.name: file.stat().st_size for file in DIRECTORY.iterdir()}
    assert sorted(files) == ["MODEL_CARD.md", "config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sum(files.values()) <= 8_000_000
    assert pg.checkpoint.read_checkpoint("shakespeare").source == (
        "shakespeare, which ships with portable_gpt2, Hugging Face's layout, model.safetensors, float16"
    )


ROMEO = {"temperature": 0.8, "seed": 7, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def texts():
    """What NumPy draws."""
    numpy = pg.GPT2.load("shakespeare", backend="numpy")
    return {"sampled": numpy.generate("ROMEO.", **ROMEO), "greedy": numpy.generate("ROMEO.", temperature=0)}


def test_every_backend_writes_the_same(model, texts):
    assert model.generate("ROMEO.", **ROMEO) == texts["sampled"]
    assert model.generate("ROMEO.", temperature=0) == texts["greedy"]


def test_it_writes_verse(texts):
    """Catches a model that has learnt nothing: lines, words, and Shakespeare's words among them."""
    assert texts["sampled"].count("\n") >= 3
    words = re.findall(r"[A-Za-z']+", texts["sampled"])
    assert len(words) > 15
    assert len({"the", "and", "I", "you", "my", "of", "to", "in", "is", "that", "a", "thou"} & set(words)) >= 3


PASSAGE = """ROMEO.
But soft! What light through yonder window breaks?
It is the east, and Juliet is the sun.
"""


def test_it_finds_shakespeare_likelier_than_the_rest(model):
    """The whole way to a perplexity, on every backend: lines of verse, and the same words in another order."""
    verse, shuffled = PASSAGE, " ".join(sorted(PASSAGE.split()))
    assert 5 < model.score(verse).perplexity < 100
    assert model.score(shuffled).perplexity > 2 * model.score(verse).perplexity
    assert model.score("生きるべきか死ぬべきか").byte_perplexity > 3 * model.score(verse).byte_perplexity


def test_its_perplexity_is_one_number(model):
    """Every backend says the same of it, to more digits than the card shows."""
    numpy = pg.GPT2.load("shakespeare", backend="numpy")
    assert model.score(PASSAGE).perplexity == pytest.approx(numpy.score(PASSAGE).perplexity, rel=1e-5)


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
