"""Ends, starts, and the files that other programs read: honoured as transformers does, and never lost on the way."""

import dataclasses
import json
import shutil

import layouts
import pytest
import tiny
import torch
import transformers

import portable_gpt2 as pg
from portable_gpt2.checkpoint import SHIPPED, convert, read_checkpoint, write_checkpoint
from portable_gpt2.checkpoint.companions import CHAT_TEMPLATES, GENERATION_FILE, TOKENIZER_SETTINGS
from portable_gpt2.cli import main
from portable_gpt2.training.run import Run

# The ids of what the shipped model continues "To be" with, greedily, which is " a man that I am a man." and more.
GREEDY = [259, 443, 329, 293, 457, 259, 443, 14, 199, 199, 59, 519]


def edit(directory, name, **entries):
    """Change entries of a file of JSON, which need not be there; an entry of None is one of null."""
    file = directory / name
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | entries))


@pytest.fixture
def shipped(tmp_path):
    """A copy of the shipped model, which a test may change."""
    shutil.copytree(SHIPPED / "shakespeare", tmp_path / "it")
    return tmp_path / "it"


# Ends and starts

ENDS = [  # entries of config.json, those of generation_config.json, after how many of GREEDY the text ends
    ({}, None, 12),
    ({"eos_token_id": [0, 457]}, None, 4),
    ({"eos_token_id": [457, 0]}, None, 4),
    ({"eos_token_id": 457}, None, 4),
    ({"eos_token_id": [293, 457]}, None, 3),
    ({"eos_token_id": None}, None, 12),
    ({"eos_token_id": [50256, 457]}, None, 4),
    ({"eos_token_id": 0}, {"eos_token_id": 457}, 4),
    ({"eos_token_id": 0}, {"eos_token_id": [5, 457]}, 4),
    ({"eos_token_id": [0, 457]}, {"eos_token_id": 329}, 2),  # the one in generation_config.json is the only one
    ({"eos_token_id": 457}, {"eos_token_id": 0}, 12),
    ({"eos_token_id": 457}, {"eos_token_id": None}, 12),
    ({"eos_token_id": 457}, {"max_length": 20}, 12),
]


@pytest.mark.parametrize(("config", "generation", "length"), ENDS)
def test_a_text_ends_where_transformers_ends_it(shipped, config, generation, length):
    """Catches ends after the first that are forgotten, and a generation_config.json that is not read."""
    edit(shipped, "config.json", **config)
    if generation is not None:
        edit(shipped, "generation_config.json", **generation)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(shipped, dtype=torch.float32)
    model = pg.GPT2.load(shipped, backend="numpy")
    prompt = model.tokenizer.encode("To be")
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert out[:length] == GREEDY[:length]
    assert len(out) == min(length + 1, 12)  # theirs has the end as well
    [completion] = model.complete(["To be"], max_new_tokens=12, temperature=0)
    assert completion.text == model.tokenizer.decode(GREEDY[:length])


def test_every_end_ends_a_text_on_every_backend(shipped, backend):
    """Catches a backend that compiles one end into its step, and a configuration that jit cannot hash."""
    edit(shipped, "config.json", eos_token_id=[0, 457])
    model = pg.GPT2.load(shipped, backend=backend)
    expected = model.tokenizer.decode(GREEDY[:4])
    [completion] = model.complete(["To be"], max_new_tokens=12, temperature=0)
    assert completion.text == expected
    assert model.generate("To be", max_new_tokens=12, temperature=0) == expected
    assert "".join(model.stream("To be", max_new_tokens=12, temperature=0)) == expected


STARTS = [  # entries of config.json, those of generation_config.json, what an empty prompt starts from
    ({}, None, 0),
    ({"bos_token_id": 5}, None, 5),
    ({"bos_token_id": 5, "eos_token_id": [7, 2047]}, None, 5),
    ({"bos_token_id": 5}, {"bos_token_id": 7}, 7),
    ({"bos_token_id": 5}, {"bos_token_id": 0, "eos_token_id": 12}, 0),
]


@pytest.mark.parametrize(("config", "generation", "start"), STARTS)
def test_an_empty_prompt_starts_where_transformers_starts_it(shipped, config, generation, start):
    """Catches a text that starts from the end of another one where the model was trained with a start of its own."""
    edit(shipped, "config.json", **config)
    if generation is not None:
        edit(shipped, "generation_config.json", **generation)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(shipped, dtype=torch.float32)
    first, *out = theirs.generate(max_new_tokens=5, do_sample=False)[0].tolist()
    assert first == start
    model = pg.GPT2.load(shipped, backend="numpy")
    assert model.config.start == start
    assert model.generate("", max_new_tokens=5, temperature=0) == model.tokenizer.decode(out)


@pytest.mark.parametrize(
    ("config", "generation", "start"),
    [
        ({"bos_token_id": 5}, {"eos_token_id": 2047}, 5),
        ({"bos_token_id": None, "eos_token_id": 12}, None, 12),
        ({"bos_token_id": None, "eos_token_id": None}, None, 0),  # the tokenizer's <|endoftext|>
        ({"bos_token_id": 50256}, None, 0),  # what a small vocabulary has left of the default
    ],
)
def test_an_empty_prompt_starts_somewhere_where_transformers_refuses_it(shipped, config, generation, start):
    """Catches an empty prompt that is refused though the files name a token to start from."""
    edit(shipped, "config.json", **config)
    if generation is not None:
        edit(shipped, "generation_config.json", **generation)
    model = pg.GPT2.load(shipped, backend="numpy")
    ids = list(model.stream_ids([start], max_new_tokens=2, temperature=0))
    assert model.generate("", max_new_tokens=2, temperature=0) == model.tokenizer.decode(ids)
    with_start = model.score_ids([start, 409, 306]).log_probs[1:]
    assert model.score_ids([409, 306], bos=True).log_probs.tolist() == with_start.tolist()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "entries",
    [
        {"eos_token_id": "0"},
        {"eos_token_id": [0, "1"]},
        {"eos_token_id": [[0]]},
        {"eos_token_id": True},
        {"eos_token_id": [0, None]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": 1.0},
        {"bos_token_id": [0]},
        {"bos_token_id": "<s>"},
        {"pad_token_id": False},
    ],
)
def test_an_end_or_a_start_that_is_no_id_is_refused_by_name(shipped, name, entries):
    """Catches an end that is ignored because it is malformed, and a message that names the other file."""
    edit(shipped, name, **entries)
    with pytest.raises(pg.CheckpointError, match=rf"it.{name}: {next(iter(entries))} is .*; expected an int from 0"):
        read_checkpoint(shipped)


# What goes with a model

RICH = {
    "bos_token_id": 5,
    "eos_token_id": [0, 12],
    "pad_token_id": 3,
    "architectures": ["GPT2LMHeadModel"],
    "_name_or_path": "someone/chat",
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "resid_pdrop": 0.25,
    "summary_type": "last",
    "id2label": {"0": "Gutes", "1": "Böses"},
    "use_cache": False,
    "an_entry_of_next_year": [1, {"a": None}],
}
CONTENTS = {
    "generation_config.json": b'{"eos_token_id":  [0, 12], "bos_token_id": 5, "pad_token_id": 3, "temperature": 0.7}\n',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}", "model_max_length": 64}',
    "special_tokens_map.json": b'{ "eos_token": "<|endoftext|>" }',
    "added_tokens.json": b"{}",
    "chat_template.jinja": "{% for m in messages %}ä{% endfor %}\r\n".encode(),
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}


@pytest.fixture
def rich(tmp_path):
    """A checkpoint with all that transformers writes."""
    directory = tmp_path / "rich"
    layouts.write_safetensors(directory, tiny.CONFIG, tiny.weights())
    tiny.write_tokenizer(directory)
    edit(directory, "config.json", **RICH)
    for name, content in CONTENTS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def contents(directory):
    """Return the contents of all files below a directory but the weights, by name."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != "model.safetensors")
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_every_companion_has_a_test():
    """Catches a companion that is added to the list and not to these tests."""
    assert {*CONTENTS} == {
        GENERATION_FILE,
        *CHAT_TEMPLATES,
        *TOKENIZER_SETTINGS,
        "additional_chat_templates/tools.jinja",
    }


def test_what_goes_with_a_model_is_converted_byte_for_byte(rich, tmp_path):
    """Catches a chat template, an end or a start that a conversion drops, and entries of config.json that it does not
    know.
    """
    before = contents(rich)
    convert(rich, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    convert(rich, rich, force=True)
    assert contents(rich) == before


def test_what_goes_with_a_model_is_saved_byte_for_byte(rich, tmp_path, backend):
    """Catches a model that was loaded, saved, and chats no more."""
    before = contents(rich)
    model = pg.GPT2.load(rich, backend=backend)
    shutil.rmtree(rich)
    model.save(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    again = pg.GPT2.load(tmp_path / "out", backend=backend)
    assert again.config == model.config
    assert (again.config.start, again.config.ends, again.config.pad_token_id) == (5, (0, 12), 3)


def test_transformers_reads_what_was_converted(rich, tmp_path):
    """Catches a file that arrives and means something else there."""
    convert(rich, tmp_path / "out", dtype="bfloat16")
    for read in (transformers.GPT2Config.from_pretrained, transformers.GenerationConfig.from_pretrained):
        theirs, ours = read(rich).to_dict(), read(tmp_path / "out").to_dict()
        assert {**theirs, "dtype": None, "_name_or_path": None} == {**ours, "dtype": None, "_name_or_path": None}


@pytest.mark.parametrize("entry", ["dtype", "torch_dtype"])
def test_the_dtype_that_config_json_names_is_that_of_the_weights(rich, tmp_path, entry):
    """Catches weights in bfloat16 that transformers would load as float32, since config.json says so."""
    edit(rich, "config.json", **{entry: "float32"})
    convert(rich, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(rich)
    convert(rich, tmp_path / "out", dtype="bfloat16")
    expected = {**json.loads((rich / "config.json").read_text()), entry: "bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    pg.GPT2.load(tmp_path / "out", backend="numpy").save(tmp_path / "loaded")  # as float32
    assert json.loads((tmp_path / "loaded" / "config.json").read_text())[entry] == "float32"


def test_what_goes_with_a_model_comes_through_a_run(rich, tmp_path, backend):
    """Catches a fine-tuned model that has lost its chat template, when the run was begun or when it was resumed."""
    (tmp_path / "data.txt").write_text(tiny.TEXT, encoding="utf-8")
    expected = contents(rich)
    del expected["additional_chat_templates/tools.jinja"]
    begin = ["train", "--init-from", str(rich), "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "run")]
    begin += ["--batch-size", "2", "--context", "16", "--eval-every", "1", "--backend", backend.name, "--steps", "2"]
    with pytest.warns(UserWarning, match=r"a run does not keep additional_chat_templates/tools\.jinja: copy it to the"):
        assert main(begin) == 0
    published = {n: c for n, c in contents(tmp_path / "run").items() if "/" not in n and n != "metrics.jsonl"}
    assert published == expected
    run = Run.open(tmp_path / "run")
    assert (run.config.ends, run.config.start) == ((0, 12), 5)
    assert {**run.companions} == {n: c for n, c in expected.items() if n not in ("vocab.json", "merges.txt")}


def test_a_configuration_that_was_changed_is_what_the_files_say(rich, tmp_path):
    """Catches a configuration that is replaced by the one that was read, and one that loses its other entries."""
    found = read_checkpoint(rich)
    config = dataclasses.replace(found.config, eos_token_id=7, bos_token_id=8, layer_norm_epsilon=1e-3)
    write_checkpoint(tmp_path / "out", config, found.tensors, found.tokenizer, companions=found.companions)
    assert read_checkpoint(tmp_path / "out").config == config
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["an_entry_of_next_year"] == RICH["an_entry_of_next_year"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7


def test_a_config_json_that_says_little_is_written_so_that_transformers_reads_it(rich, tmp_path):
    """Catches a config.json without the entries by which transformers finds its class."""
    entries = json.loads((rich / "config.json").read_text())
    del entries["model_type"], entries["architectures"]
    (rich / "config.json").write_text(json.dumps(entries))
    convert(rich, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**entries, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def test_nothing_is_added_to_a_model_that_was_made_here(tmp_path):
    """Catches a file of another model that comes along."""
    model = tiny.model(pg.get_backend("numpy"))
    model.save(tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {"config.json"}


def test_openai_s_release_keeps_what_was_put_next_to_it(tmp_path, tf):
    """Catches companions that are looked for next to config.json only."""
    layouts.write_openai(tmp_path / "it", tiny.CONFIG, tiny.weights())
    edit(tmp_path / "it", "generation_config.json", eos_token_id=[3, 4], bos_token_id=5)
    found = read_checkpoint(tmp_path / "it")
    assert (found.config.ends, found.config.start) == ((3, 4), 5)
    convert(tmp_path / "it", tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").config == found.config
    kept = (tmp_path / "out" / "generation_config.json").read_bytes()
    assert kept == (tmp_path / "it" / "generation_config.json").read_bytes()
