"""A tokenizer that cannot be used does not make the weights unusable: they work by token ids."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import models

import portable_gpt2 as pg
from portable_gpt2.checkpoint import TokenizerError, convert, read_checkpoint
from portable_gpt2.cli import main
from portable_gpt2.params import flatten

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1355256\n"


def lowercasing(directory):
    file = json.loads(tiny.byte_level_bpe())
    file["normalizer"] = {"type": "Lowercase"}
    (directory / "tokenizer.json").write_text(json.dumps(file))


def cut(directory):
    tiny.write_tokenizer(directory)
    merges = (directory / "merges.txt").read_bytes()
    (directory / "merges.txt").write_bytes(merges[: len(merges) // 2])


def of_another_model(directory):
    tiny.write_tokenizer(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["vocab_size"] == 384
    vocab = json.loads((directory / "vocab.json").read_text("utf-8"))
    (directory / "vocab.json").write_text(json.dumps({**vocab, "ToĠ": 390}))


def word_piece(directory):
    tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(directory / "tokenizer.json"))
    (directory / "vocab.txt").write_text("[UNK]\n")


def in_openai_s_names(directory):
    cut(directory)
    for name, theirs in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        (directory / name).rename(directory / theirs)


def settings_that_are_a_pipe(directory):
    tiny.write_tokenizer(directory)
    os.mkfifo(directory / "tokenizer_config.json")


def settings_that_were_not_downloaded(directory):
    tiny.write_tokenizer(directory)
    (directory / "tokenizer_config.json").write_bytes(LFS)


def a_loop_of_links(directory):
    tiny.write_tokenizer(directory)
    (directory / "special_tokens_map.json").symlink_to("special_tokens_map.json")


UNUSABLE = {
    "OpenAI's names": (in_openai_s_names, "vocab.bpe: "),
    "a pipe": (settings_that_are_a_pipe, r"tokenizer_config.json: is a named pipe \(FIFO\)"),
    "settings of Git LFS": (settings_that_were_not_downloaded, "tokenizer_config.json: is a Git LFS pointer"),
    "a loop": (a_loop_of_links, "special_tokens_map.json: a loop of symbolic links"),
    "WordPiece": (word_piece, "tokenizer.json: expected a byte-level BPE, such as GPT-2's; got the model WordPiece"),
    "lowercasing": (lowercasing, "tokenizer.json: normalizer is 'Lowercase'"),
    "cut": (cut, "merges.txt: "),
    "larger": (of_another_model, "the tokenizer has 391 entries and the model 384|no line merges"),
    "no JSON": (lambda directory: (directory / "tokenizer.json").write_bytes(b"\xff\x00"), "tokenizer.json: 'utf-8'"),
    "Git LFS": (
        lambda directory: (directory / "tokenizer.json").write_bytes(LFS),
        "tokenizer.json: is a Git LFS pointer",
    ),
    "a directory": (lambda directory: (directory / "tokenizer.json").mkdir(), "tokenizer.json: is a directory"),
}


@pytest.fixture(params=UNUSABLE)
def unusable(request, tmp_path):
    """A checkpoint whose tokenizer cannot be used, and what the message says."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    write, message = UNUSABLE[request.param]
    write(tmp_path / "it")
    return tmp_path / "it", message


def test_the_weights_work_by_ids(unusable):
    """Catches a model that cannot be loaded for the sake of a file that it does not need."""
    directory, message = unusable
    with pytest.raises(pg.CheckpointError, match=message) as error:
        pg.GPT2.load(directory, backend="numpy")
    assert isinstance(error.value, TokenizerError)
    assert "GPT2.load(..., tokenizer=None), the model takes and returns token ids" in str(error.value)
    works_by_ids(pg.GPT2.load(directory, backend="numpy", tokenizer=None))


def works_by_ids(model):
    assert model.tokenizer is None
    expected = tiny.model(pg.get_backend("numpy"))
    assert list(model.stream_ids([1, 2, 3], max_new_tokens=5, seed=3)) == list(
        expected.stream_ids([1, 2, 3], max_new_tokens=5, seed=3)
    )
    with pytest.raises(ValueError, match=r"the model has no tokenizer: .* or it was loaded without"):
        model.generate("To be")


def test_the_weights_work_by_ids_on_every_backend(tmp_path, backend):
    """The checkpoint's tokenizer is read before the backend is asked for anything, so one case is enough here."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path)
    cut(tmp_path)
    with pytest.raises(TokenizerError, match=r"merges\.txt: "):
        pg.GPT2.load(tmp_path, backend=backend)
    works_by_ids(pg.GPT2.load(tmp_path, backend=backend, tokenizer=None))


def test_another_tokenizer_may_take_its_place(unusable, tmp_path):
    """Catches files of the tokenizer that was replaced, which are written next to the new one's."""
    directory, _ = unusable
    other = pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe()))
    model = pg.GPT2.load(directory, backend="numpy", tokenizer=other)
    assert model.tokenizer is other
    model.save(tmp_path / "out")
    again = pg.GPT2.load(tmp_path / "out", backend="numpy")
    assert again.tokenizer.encode("To be") == other.encode("To be")


def test_convert_copies_it_and_says_why(unusable, tmp_path, capfd):
    """Catches a conversion that is refused for the sake of a tokenizer, and one that drops it without a word."""
    directory, message = unusable
    with pytest.warns(UserWarning, match=f"{message}.*copied unchanged: ") as warned:
        convert(directory, tmp_path / "out")
    copied = str(warned[0].message).partition("copied unchanged: ")[2]
    names = {file.name for file in directory.iterdir() if file.is_file()} - {"config.json", "model.safetensors"}
    assert {*copied.split(", ")} == (names or {"none of its files"})
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    with pytest.warns(UserWarning, match="copied unchanged: "):  # what a conversion wrote, another may replace
        convert(directory, tmp_path / "out", force=True)
    before, after = (pg.GPT2.load(path, backend="numpy", tokenizer=None) for path in (directory, tmp_path / "out"))
    for (path, x), (_, y) in zip(flatten(before.params), flatten(after.params), strict=True):
        assert np.array_equal(x, y), path


def test_a_command_that_needs_text_says_why(unusable, capfd):
    """Catches a traceback."""
    directory, _ = unusable
    assert main(["generate", "To be", "--model", str(directory)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "the model takes and returns token ids" in error


@pytest.mark.parametrize("given", ["gpt2", 3, True, tokenizers.Tokenizer(models.BPE())])
def test_what_is_no_tokenizer_is_refused(tmp_path, given):
    """Catches the package's tokenizer, or a directory, taken for ours, and noticed at the first text."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    with pytest.raises(TypeError, match=r"tokenizer is .*; expected a Tokenizer \(Tokenizer.load reads one\), or None"):
        pg.GPT2.load(tmp_path / "it", backend="numpy", tokenizer=given)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "tokenizer.model"])
def test_a_tokenizer_of_another_kind_goes_with_a_conversion(tmp_path, name):
    """Catches GPT-2's weights with BERT's or SentencePiece's tokenizer, whose text nobody can make any more."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    (tmp_path / "it" / name).write_bytes(b"\n\x01\xff")
    for _ in range(2):
        convert(tmp_path / "it", tmp_path / "out", force=True)
    assert (tmp_path / "out" / name).read_bytes() == b"\n\x01\xff"


# Tokens that were added to a tokenizer, and not to the model


@pytest.fixture
def padded(tmp_path):
    """A checkpoint whose tokenizer has [PAD] and a word beyond the model's vocabulary, as people make it."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.add_special_tokens(["[PAD]"])
    whole.add_tokens(["foo bar"])
    whole.save(str(tmp_path / "it" / "tokenizer.json"))
    return tmp_path / "it"


def test_tokens_beyond_the_model_matter_only_if_they_come_up(padded):
    """Catches a model that cannot be used for a token that no text has, and an id that reads another row of wte."""
    model = pg.GPT2.load(padded, backend="numpy")
    assert (model.config.n_vocab, model.tokenizer.n_base, model.tokenizer.n_vocab) == (384, 384, 386)
    tokenizer = pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe()))
    plain = tiny.model(pg.get_backend("numpy"), tokenizer=tokenizer)
    assert model.generate("[PAD]To be", max_new_tokens=6, seed=1) == plain.generate(
        "[PAD]To be", max_new_tokens=6, seed=1
    )
    for text, name, allowed in (("To[PAD] be", r"\[PAD\]", True), ("a foo bar", "foo bar", False)):
        for call in (model.generate, model.stream, model.score, model.trace, lambda x, **k: model.complete([x], **k)):
            with pytest.raises(
                ValueError, match=f"the text holds '{name}', whose id is 38[45]: it was added to the tok"
            ):
                call(text, allow_special=allowed)


def test_a_conversion_keeps_them(padded, tmp_path):
    """Catches a tokenizer.json that is cut to the model's vocabulary."""
    convert(padded, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (padded / "tokenizer.json").read_bytes()


def test_an_end_of_text_beyond_the_model_is_not_one(tmp_path):
    """Catches an id that the model lacks as the beginning of a text, or as what ends it."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out"))
    whole.add_special_tokens(["<|endoftext|>"])
    config = dataclasses.replace(tiny.CONFIG, eos_token_id=None)
    tiny.model(pg.get_backend("numpy"), config).save(tmp_path / "it")
    whole.save(str(tmp_path / "it" / "tokenizer.json"))
    model = pg.GPT2.load(tmp_path / "it", backend="numpy")
    assert model.tokenizer.end_of_text == 384
    assert len(model.generate("To be", max_new_tokens=3, seed=1)) > 0
    with pytest.raises(
        ValueError, match=r"the prompt is empty, and the vocabulary has no <\|endoftext\|> to start from"
    ):
        model.generate("", max_new_tokens=3)


def test_a_checkpoint_is_read_with_its_tokenizer_unless_told_otherwise(padded):
    """Catches a tokenizer that is left out where nobody asked for that."""
    assert read_checkpoint(padded).tokenizer is not None
    assert read_checkpoint(padded, tokenizer=None).tokenizer is None
