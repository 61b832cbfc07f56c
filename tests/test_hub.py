"""Models of the hub, with a local stand-in: which files are requested and cached, and the errors without it."""

import json
import os

import hub
import numpy as np
import processes
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint.hub import is_id

LOAD = """
import sys
import portable_gpt2 as pg
for source in {sources!r}:
    try:
        model = pg.GPT2.load(source, backend="numpy")
        print(model.source, *model.stream_ids([1, 2, 3], max_new_tokens=8, temperature=0), sep="; ")
    except (pg.CheckpointError, pg.BackendNotInstalled) as error:
        print(type(error).__name__, error, sep="; ")
"""


@pytest.fixture
def model(tmp_path):
    """A model's directory, with what models of the hub hold besides."""
    (tmp_path / "tokenizer").mkdir()
    tiny.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = pg.Tokenizer.load(tmp_path / "tokenizer")
    tiny.model(pg.get_backend("numpy"), tokenizer=tokenizer).save(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", "json")
    for name in ("pytorch_model.bin", "tf_model.h5", "model-00001-of-00002.safetensors", "README.md"):
        (tmp_path / "model" / name).write_text("not needed")
    return tmp_path / "model"


@pytest.fixture
def load(tmp_path):
    """Load models, all in one process, with a cache of this test's; return a line that is said of each."""

    def run(environment, *sources):
        home = {"HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        return processes.run(LOAD.format(sources=sources), **{**home, **environment}).splitlines()

    return run


EXPECTED = "; ".join(
    str(token) for token in tiny.model(pg.get_backend("numpy")).stream_ids([1, 2, 3], max_new_tokens=8, temperature=0)
)
NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]


def test_only_what_is_needed_is_asked_for_and_once(model, load):
    """Catches gigabytes of the same weights in other forms, a second download, and an offline mode that goes online."""
    with hub.serving({"someone/tiny": model}) as (online, asked):
        [said] = load(online, "someone/tiny")
        where = f"someone/tiny of the hub at {hub.COMMIT[:8]}"
        assert said == f"{where}, Hugging Face's layout, model.safetensors, float32; {EXPECTED}"
        assert load({**online, "HF_HUB_OFFLINE": "1"}, "someone/tiny") == [said]
        assert sorted(asked) == NEEDED
    assert load(online, "someone/tiny") == [said]  # now nobody answers


def test_what_goes_with_a_model_is_asked_for_too(model, load):
    """Catches ends, starts and chat templates that a directory keeps and the hub's models lose."""
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    with hub.serving({"someone/tiny": model}) as (online, asked):
        load(online, "someone/tiny")
    assert sorted(asked) == sorted([*NEEDED, "generation_config.json", "chat_template.jinja", "tools.jinja"])


def test_a_revision_is_what_stands_behind_the_at(model, load):
    """Catches a revision that is ignored, and one that does not exist being replaced by another."""
    with hub.serving({"tiny": model}, revisions=["v1.0"]) as (online, asked):
        named, by_commit, unknown, main = load(online, "tiny@v1.0", f"tiny@{hub.COMMIT}", "tiny@v2", "tiny")
    assert named.endswith(EXPECTED)
    assert by_commit.endswith(EXPECTED)
    assert sorted(asked) == NEEDED
    assert unknown.startswith("CheckpointError; tiny@v2: the hub has no revision 'v2' of tiny")
    assert main.startswith("CheckpointError; tiny: ")


def test_shards_are_asked_for_by_their_index(model, load):
    """Catches shards that are not downloaded, and all that look like shards being."""
    os.rename(model / "model.safetensors", model / "of-another-name.safetensors")
    weight_map = {
        f"transformer.{pg.checkpoint.hugging_face_name(path)}": "of-another-name.safetensors" for path in tiny.weights()
    }
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with hub.serving({"someone/tiny": model}) as (online, asked):
        [said] = load(online, "someone/tiny")
    assert said.endswith(f"model.safetensors.index.json of 1 files, float32; {EXPECTED}")
    assert {*asked} == {*NEEDED, "of-another-name.safetensors", "model.safetensors.index.json"} - {"model.safetensors"}


def test_other_weights_are_asked_for_where_there_are_no_safetensors(model, load, torch):
    """Catches models of before safetensors being refused, and tokenizers of two files."""
    (model / "model.safetensors").unlink()
    (model / "tokenizer.json").unlink()
    tensors = {pg.checkpoint.hugging_face_name(path): torch.from_numpy(a) for path, a in tiny.weights().items()}
    torch.save(tensors, model / "pytorch_model.bin")
    with hub.serving({"someone/tiny": model}) as (online, asked):
        [said] = load(online, "someone/tiny")
    assert said.endswith(f"pytorch_model.bin, float32; {EXPECTED}")
    assert sorted(asked) == ["config.json", "merges.txt", "pytorch_model.bin", "vocab.json"]


def test_what_is_not_there_is_said(model, load, tmp_path):
    """Catches a traceback of an HTTP client, and a message that does not say where it was looked for."""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").unlink()
    with hub.serving({"tiny": model}) as (online, _):
        unknown, weightless = load(online, "tiny2", "tiny")
    assert unknown.startswith(
        "CheckpointError; tiny2: no such directory, and no such model on the hub, http://127.0.0.1"
    )
    assert "tiny: the hub's model has no model.safetensors, nor weights in another form" in weightless
    for environment in (online, {**online, "HF_HUB_OFFLINE": "1"}):
        [said] = load(environment, "tiny3")
        assert said.startswith(
            "CheckpointError; tiny3: no such directory; and the hub's model of this name is not complete"
        )
        assert str(tmp_path / "home" / "hub") in said
        assert ("HF_HUB_OFFLINE is set" in said) == (environment["HF_HUB_OFFLINE"] == "1")


def test_a_directory_wins_over_a_model_of_the_hub(model, tmp_path, monkeypatch):
    """Catches the hub being asked for what lies here under the same name."""
    monkeypatch.chdir(tmp_path)
    found = pg.GPT2.load("model", backend="numpy")
    assert found.source == "Hugging Face's layout, model.safetensors, float32"
    np.testing.assert_array_equal(found.params["wte"], tiny.weights()["wte"])


def test_ids_are_told_from_paths():
    """Catches a slip in a path that is sent to a server far away, and an id that is not taken for one."""
    ids = ["gpt2", "gpt2-medium", "openai-community/gpt2-xl", "user/model@v1.0", "a/b@refs/pr/1"]
    paths = ["./gpt2", "../gpt2", "/gpt2", "a/b/c", "a/", "", "~/gpt2", "a b", "a@", "@a", "a\\b", "a/.."]
    assert [source for source in ids + paths if is_id(source)] == ids
