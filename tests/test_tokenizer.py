"""Byte-level BPE: any text becomes ids and comes back, any ids become text, and special tokens stay out of it."""

import json

import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

import portable_gpt2 as pg

LAYOUTS = ["files", "json", "json, added"]

any_ids = st.lists(st.integers(0, tiny.CONFIG.n_vocab - 1), max_size=40)


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    """How the tokenizer's files lie; every test that takes it runs on each layout."""
    return request.param


@pytest.fixture(scope="module")
def directory(layout, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path, layout)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return pg.Tokenizer.load(directory)


# Text to ids and back


@given(text=st.text())
@example(text="")
@example(text=" leading, trailing  \n\t\r\n ")
@example(text="\x00\x7f\x80\xa0\xad\u200b\u2028\ufeff\ufffd\U0010ffff")
@example(text="é e\u0301 가 \u1100\u1161 ﬁ Ⅷ ½")  # what a normalisation would change
@example(text=tiny.TEXT)
def test_any_text_comes_back(tokenizer, text):
    """Catches a normalisation, a space that is added or lost, and bytes that have no token."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_used(tokenizer):
    """Catches an encoder that only spells bytes: every text would come back from that, too."""
    ids = tokenizer.encode(tiny.TEXT)
    assert len(ids) < 0.9 * len(tiny.TEXT.encode())
    assert all(type(token) is int for token in ids)
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode(" the")] == [b" the"]


def test_layouts_agree(tmp_path):
    """Catches tokenizer.json read with another pre-tokenizer than the pair of files."""
    for name in ("files", "json"):
        (tmp_path / name).mkdir()
        tiny.write_tokenizer(tmp_path / name, name)
    pair, whole = (pg.Tokenizer.load(tmp_path / name) for name in ("files", "json"))
    assert pair.encode(tiny.TEXT) == whole.encode(tiny.TEXT)


def that_merges_whatever_it_may(text):
    """Return a tokenizer that merges all of a text, except where the pre-tokenizer has cut: a token is a piece."""
    stand_ins = dict(pg.tokenizer._BYTES)
    spelling = {b[0]: c for c, b in stand_ins.items()}
    spelled = "".join(spelling[b] for b in text.encode())
    pieces = {spelled[i:j] for i in range(len(spelled)) for j in range(i + 1, len(spelled) + 1)}
    pieces = sorted(pieces, key=lambda piece: (len(piece), piece))
    merges = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*sorted(stand_ins), *pieces]))}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe


@pytest.mark.parametrize(
    "pieces",
    [
        ["Hello", ",", " world", "!"],
        ["I", "'ll", " they", "'re", " we", "'ve"],
        ["don", "'t", " he", "'d", " I", "'m", " it", "'s"],
        ["DON", "'", "T", " I", "'", "LL"],  # case-sensitive, as OpenAI's is by mistake
        ["abc", "123", " 456", " 7", "x"],
        ["a", " ", " b", "  ", " c"],
        ["trailing", "   "],
        ["a", "\n", "\n", "b", "\n\n"],
        ["a", " \t", "\n", "b"],
        [" ok", "?!...", " (", "yes", ")"],
        ["snake", "_", "case"],
        ["naïve", " café", " Быть", " 日本語"],
        [" ١٢٣", " ½²"],
        ["<|", "endoftext", "|>"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("layout", ["files", "json"])
def test_text_is_cut_where_gpt_2_cuts_it(tmp_path, layout, pieces):
    r"""Catches another pattern than 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+."""
    bpe = that_merges_whatever_it_may("".join(pieces))
    bpe.model.save(str(tmp_path)) if layout == "files" else bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = pg.Tokenizer.load(tmp_path)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("".join(pieces))] == pieces


# Ids to text, at once and as they come


@given(ids=any_ids)
def test_any_ids_decode(tokenizer, ids):
    """Catches ids whose bytes are not UTF-8 raising, or vanishing instead of becoming U+FFFD."""
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    assert tokenizer.decode(ids) == spelled.decode("utf-8", errors="replace")
    assert bool(tokenizer.decode(ids)) == bool(ids)


def test_every_byte_has_a_token(tokenizer):
    """Catches a wrong table of the printable stand-ins, in which a byte is another."""
    spelled = {tokenizer.token_bytes(token) for token in range(len(tokenizer))}
    assert {bytes([b]) for b in range(256)} <= spelled
    assert tokenizer.decode(tokenizer.encode("Ġ Ċ ā \xa0 \xad")) == "Ġ Ċ ā \xa0 \xad"  # stand-ins themselves


@given(ids=any_ids)
def test_streamed_pieces_join_to_the_whole(tokenizer, ids):
    """Catches a character that is lost, doubled or replaced where it is split over tokens, and a lost rest."""
    step = tokenizer.decoder()
    assert "".join([*map(step, ids), step(None)]) == tokenizer.decode(ids)


@given(text=st.text(min_size=1))
@example(text="🙂")
@example(text="a👩‍👩‍👧é")
def test_a_split_character_is_held_back_until_it_is_whole(tokenizer, text):
    """Catches a stream that writes U+FFFD for the half of a character that has come so far."""
    assume("\ufffd" not in text)
    step, seen = tokenizer.decoder(), b""
    for token in tokenizer.encode(text):
        seen += tokenizer.token_bytes(token)
        text_so_far = step(token)
        assert "\ufffd" not in text_so_far
        assert seen.startswith(text_so_far.encode())
        seen = seen[len(text_so_far.encode()) :]
        assert len(seen) < 4  # nothing is held back but the beginning of one character
    assert not seen
    assert step(None) == ""


def test_what_is_left_of_a_character_comes_at_the_end(tokenizer):
    """Catches a text that ends in half a character losing it."""
    half = [next(t for t in range(len(tokenizer)) if tokenizer.token_bytes(t) == bytes([b])) for b in (0xF0, 0x9F)]
    step = tokenizer.decoder()
    assert [step(half[0]), step(half[1]), step(None)] == ["", "", "\ufffd"]
    assert tokenizer.decode(half) == "\ufffd"


def test_an_id_beyond_the_vocabulary_does_not_end_a_stream(tokenizer):
    """Catches an error in the midst of a text: a model whose vocabulary was padded may draw an id without text."""
    step = tokenizer.decoder()
    assert [step(len(tokenizer) + 5), *map(step, tokenizer.encode("a")), step(None)] == ["\ufffd", "a", ""]


def test_ids_may_be_numpy_s(tokenizer):
    """Catches a table or a range check that knows Python's ints only."""
    ids = tokenizer.encode("To be")
    assert tokenizer.decode(np.asarray(ids, np.int64)) == tokenizer.decode(np.asarray(ids, np.uint16)) == "To be"


# Special tokens


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", " <|endoftext|><|endoftext|>\n"])
def test_text_that_spells_a_special_token_is_text(tokenizer, text):
    """Catches a prompt that ends itself: whoever controls a part of it could cut it off from the rest."""
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text


def test_a_special_token_added_as_a_word_is_special_all_the_same(tmp_path):
    """Catches a tokenizer.json whose author left out the flag."""
    bpe = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out"))
    bpe.add_tokens(["<|endoftext|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][0]["special"] is False
    tokenizer = pg.Tokenizer.load(tmp_path)
    assert tokenizer.end_of_text == 384
    assert 384 not in tokenizer.encode("a<|endoftext|>b")


def test_the_end_of_text_is_known_by_its_id(tokenizer, layout):
    """Catches a tokenizer that is asked to spell it, or one that finds it in the vocabulary only."""
    assert tokenizer.end_of_text == (383 if layout == "json, added" else 0)
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert len(tokenizer) == 384


def test_a_vocabulary_may_lack_the_end_of_text():
    """Catches an id that is made up."""
    assert pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out"))).end_of_text is None


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    """Catches prompts that are cut to the length that somebody trained with."""
    bpe = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    bpe.enable_truncation(3)
    bpe.enable_padding(length=8)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = pg.Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"
    assert len(tokenizer.encode("a")) == 1


# What is refused


@pytest.mark.parametrize(
    ("text", "where", "what"), [("\ud800", 0, r"\ud800"), ("ab\udfffc", 2, r"\udfff"), ("🙂\ud83d", 1, r"\ud83d")]
)
def test_a_lone_surrogate_is_refused(tokenizer, text, where, what):
    """Catches half a character reaching the package, whose error names neither it nor the place."""
    with pytest.raises(
        ValueError, match=f"character {where} of the text, .*is a lone surrogate.*errors='replace'"
    ) as e:
        tokenizer.encode(text)
    assert what in str(e.value)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a", "b"]])
def test_what_is_no_text_is_refused(tokenizer, text):
    """Catches bytes or a list that the package takes for something else."""
    with pytest.raises(TypeError, match=f"expected text as a str; got {type(text).__name__}"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [-1, 384, 2**31, 2**32, 2**64])
def test_an_id_that_is_not_in_the_vocabulary_is_refused(tokenizer, token):
    """Catches an OverflowError, a token that is skipped in silence, or one counted from the end."""
    for call in (tokenizer.token_bytes, lambda token: tokenizer.decode([1, token])):
        with pytest.raises(ValueError, match=f"token id {token} is not in the tokenizer's vocabulary of 384"):
            call(token)


@pytest.mark.parametrize("token", [1.0, "a", None])
def test_an_id_that_is_no_int_is_refused(tokenizer, token):
    """Catches 1.5 being decoded as 1."""
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        tokenizer.decode([token])


def test_a_character_that_the_vocabulary_cannot_spell_is_refused():
    """Catches text that vanishes in silence: a BPE trained without all 256 bytes drops what it has not seen."""
    bpe = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = pg.Tokenizer(bpe)
    assert tokenizer.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match=r"cannot spell character 3 of the text, 'é': it lacks 254 of the 256 bytes"):
        tokenizer.encode("abaé")


MALFORMED = {
    "vocab.json and merges.txt": [
        {"vocab.json": "", "merges.txt": ""},
        {"vocab.json": "{", "merges.txt": ""},
        {"vocab.json": "[]", "merges.txt": ""},
        {"vocab.json": '{"a": -1}', "merges.txt": ""},
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b c\n"},
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b\n"},
    ],
    "tokenizer.json": [
        {"tokenizer.json": ""},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "[1, 2"},
        {"tokenizer.json": lambda text: text[: len(text) // 2]},
        {"tokenizer.json": lambda text: text.replace('"BPE"', '"XYZ"')},
    ],
}


@pytest.mark.parametrize(("named", "files"), [(named, files) for named, cases in MALFORMED.items() for files in cases])
def test_a_malformed_file_is_refused_by_name(tmp_path, named, files):
    """Catches the package's bare Exception, which names no file; through GPT2.load it is a CheckpointError."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    for name, text in files.items():
        content = text if isinstance(text, str) else text(tiny.byte_level_bpe())
        (tmp_path / "it" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"it.{named}: "):
        pg.Tokenizer.load(tmp_path / "it")
    with pytest.raises(pg.CheckpointError, match=f"it.{named}: "):
        pg.GPT2.load(tmp_path / "it", backend="numpy")


@pytest.mark.parametrize(
    "other",
    [
        tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        tokenizers.Tokenizer(models.Unigram([("a", 0.0)], 0)),
        tokenizers.Tokenizer(models.BPE({"a": 0}, [])),
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path, other):
    """Catches BERT's or Llama's tokenizer whose ids are spelled as if they were bytes."""
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a byte-level BPE, as GPT-2's is; got the model "):
        pg.Tokenizer.load(tmp_path)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"], ["tokenizer_config.json"]])
def test_without_its_files_there_is_no_tokenizer(tmp_path, files):
    """Catches an error where the model still works by ids, and half a pair that counts as one."""
    for name in files:
        (tmp_path / name).write_text("{}")
    assert pg.Tokenizer.load(tmp_path) is None


# Files


def test_a_tokenizer_survives_a_round_trip(tokenizer, layout, tmp_path):
    """Catches <|endoftext|> getting lost, where it was added beside the vocabulary: text would never end."""
    tokenizer.save(tmp_path)
    again = pg.Tokenizer.load(tmp_path)
    assert again.end_of_text == tokenizer.end_of_text
    assert len(again) == len(tokenizer)
    assert [again.token_bytes(t) for t in range(384)] == [tokenizer.token_bytes(t) for t in range(384)]
    assert again.encode(tiny.TEXT) == tokenizer.encode(tiny.TEXT)
    expected = ["merges.txt", "vocab.json"] if layout == "files" else ["tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_a_model_saves_its_tokenizer(tokenizer, tmp_path):
    """Catches a checkpoint that comes back without one."""
    tiny.model(pg.get_backend("numpy"), tokenizer=tokenizer).save(tmp_path / "it")
    model = pg.GPT2.load(tmp_path / "it", backend="numpy")
    assert model.tokenizer.encode(tiny.TEXT) == tokenizer.encode(tiny.TEXT)
    assert model.tokenizer.end_of_text == tokenizer.end_of_text
