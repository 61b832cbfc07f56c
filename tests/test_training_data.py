"""What training reads: a tokenizer made for a text, its ids in a file, windows of them."""

import hypothesis
import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import strategies as st

from portable_gpt2.tokenizer import Tokenizer
from portable_gpt2.training import batch, data, documents, train_tokenizer, windows, write_tokens
from portable_gpt2.training.data import open_tokens, pieces

ODD = st.text(st.sampled_from(list("ab' \n\t\r.1é\u00a0\u2028\u3000\u0085\x1c中🙂")), max_size=60)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe()))


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer with merges of spaces, line ends and tabs: a text that is split inside them gets other ids."""
    return train_tokenizer(["a  b   c\n\n\nd \n \n e\t\tf\r\n\r\ng    \n\n  h\u3000\u3000i\x1c\x1cj"] * 9, 263)


SPACED = st.text(st.sampled_from(list("a \n")), max_size=30)
ADDED = ["foo bar", "\n\n", "b f", "a\n", "r  b", " foo", "x\x1c", "<|user|> "]
WORDY = st.lists(st.sampled_from([*ADDED, "foo", " ", "bar", "\n", "a", "<|user|>", "\x1c", "!"]), max_size=20).map(
    "".join
)


@hypothesis.given(text=ODD | SPACED | st.text(max_size=60), size=st.integers(1, 20))
@hypothesis.example("x\n\n\ny", 2)
def test_the_pieces_of_a_text_have_its_ids(spaced, text, size):
    """Catches a text that is cut within a token, or between spaces that belong together."""
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert [token for piece in found for token in spaced.encode(piece)] == spaced.encode(text)


@hypothesis.given(
    tokens=st.lists(
        st.builds(tokenizers.AddedToken, st.sampled_from(ADDED), special=st.booleans(), normalized=st.booleans()),
        max_size=5,
        unique_by=lambda token: token.content,
    ),
    text=WORDY,
    size=st.integers(1, 12),
    allowed=st.booleans(),
)
@hypothesis.example([tokenizers.AddedToken("foo bar", special=False)], "a foo bar", 3, False)
@hypothesis.example([tokenizers.AddedToken("foo bar", special=True)], "a foo bar", 3, True)
def test_no_piece_ends_within_an_added_token(tokens, text, size, allowed):
    """Catches "foo bar", which is one token, in two pieces: it would be other ids in training than in a prompt."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.add_tokens(tokens)
    tokenizer = Tokenizer(whole)
    found = list(pieces(text, size, tokenizer.found_whole(tokenizer.allowed(allowed))))
    assert "".join(found) == text
    ids = [token for piece in found for token in tokenizer.encode(piece, allow_special=allowed)]
    assert ids == tokenizer.encode(text, allow_special=allowed)


def test_what_python_takes_for_a_space_may_be_within_a_word():
    """Catches a cut before U+001C: a space to Python, and a sign to GPT-2, which merges with the sign before it."""
    made = train_tokenizer(["!\x1c!\x1c!\x1c"], 258)
    assert len(made.encode("!\x1c")) == 1
    assert [token for piece in pieces("a!\x1cb", 2) for token in made.encode(piece)] == made.encode("a!\x1cb")


@pytest.mark.parametrize("text", ["so many words\n", "so many words\r\n", "words "])
def test_a_long_text_is_cut(text):
    """Catches a cut that is never found, where lines end otherwise or not at all."""
    assert max(map(len, pieces(text * 100, 50))) < 50 + len(text)


def test_documents_end_where_the_next_begins(tokenizer, tmp_path):
    """Catches documents that run into each other, and ids that are narrowed."""
    texts = ["To be", "or not to be"]
    n = write_tokens(texts, tokenizer, len(tokenizer), tmp_path / "tokens")
    end = [tokenizer.end_of_text]
    assert open_tokens(tmp_path / "tokens", len(tokenizer)).tolist() == [
        token for text in texts for token in tokenizer.encode(text) + end
    ]
    assert n == len(open_tokens(tmp_path / "tokens", len(tokenizer)))
    assert (tmp_path / "tokens").stat().st_size == 2 * n
    wide = tmp_path / "wide"
    assert write_tokens(texts, tokenizer, 65_537, wide) == n
    assert wide.stat().st_size == 4 * n
    assert open_tokens(wide, 65_537).tolist() == open_tokens(tmp_path / "tokens", len(tokenizer)).tolist()


DOCUMENTS = [
    ("a", ["a"]),
    ("a<|endoftext|>b", ["a", "b"]),
    ("a<|endoftext|>b<|endoftext|>", ["a", "b"]),
    ("<|endoftext|>a<|endoftext|><|endoftext|>b", ["a", "b"]),
    ("a\n<|endoftext|>\nb\n<|endoftext|>\n", ["a\n", "\nb\n"]),
    ("", []),
    ("<|endoftext|>", []),
    (" \n", []),
    ("a<|endoftext|", ["a<|endoftext|"]),
]


@pytest.mark.parametrize(("text", "expected"), DOCUMENTS)
def test_the_end_of_text_separates_documents(tokenizer, tmp_path, text, expected):
    """Catches separators that are spelled out, twice the token where a file ends with it, and documents of nothing."""
    assert list(documents(text)) == expected
    write_tokens([text, "c"], tokenizer, 384, tmp_path / "tokens", allow_special=["<|endoftext|>"])
    found = open_tokens(tmp_path / "tokens", 384).tolist()
    end = [tokenizer.end_of_text]
    assert found == [token for document in [*expected, "c"] for token in tokenizer.encode(document) + end]


def test_119_separators_make_120_documents(tokenizer, tmp_path, monkeypatch):
    """Catches a separator on the border of two pieces, whatever their size."""
    text = "<|endoftext|>".join(f"Document {i}: to be, or not to be." for i in range(120))
    for size in (1, 7, 50, 1 << 20):
        monkeypatch.setattr(data, "_CHUNK", size)
        write_tokens([text], tokenizer, 384, tmp_path / str(size), allow_special=True)
        found = open_tokens(tmp_path / str(size), 384)
        assert np.count_nonzero(found == tokenizer.end_of_text) == 120
        assert tokenizer.decode(found) == text + "<|endoftext|>"
    write_tokens([text], tokenizer, 384, tmp_path / "as text")
    assert np.count_nonzero(open_tokens(tmp_path / "as text", 384) == tokenizer.end_of_text) == 1


def test_other_special_tokens_are_tokens_only_if_they_are_named(tmp_path):
    """Catches a chat's markers that are spelled out though they are allowed, and found though they are not."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.add_special_tokens(["<|user|>"])
    tokenizer = Tokenizer(whole)
    for name, allowed in {"named": ["<|user|>", "<|endoftext|>"], "not": ["<|endoftext|>"], "all": True}.items():
        write_tokens(["<|user|>a<|endoftext|>b"], tokenizer, 385, tmp_path / name, allow_special=allowed)
        assert (384 in open_tokens(tmp_path / name, 385)) is (name != "not")
    with pytest.raises(
        ValueError, match=r"'<\|user\|>' has the id 384 in the tokenizer; the model's vocabulary has 384"
    ):
        write_tokens(["<|user|>a"], tokenizer, 384, tmp_path / "small", allow_special=True)


def test_a_token_file_that_is_damaged_is_refused(tmp_path):
    file = tmp_path / "tokens"
    file.write_bytes(np.asarray([1, 2, 300], "<u2").tobytes())
    assert open_tokens(file, 301).tolist() == [1, 2, 300]
    with pytest.raises(ValueError, match="tokens: token id 300 is not in the vocabulary of 300"):
        open_tokens(file, 300)
    file.write_bytes(b"123")
    with pytest.raises(ValueError, match="tokens: has 3 bytes; expected token ids of 2 bytes"):
        open_tokens(file, 300)


def test_a_tokenizer_is_made_as_it_is_asked_for(tmp_path):
    """Catches entries that are missing, an <|endoftext|> elsewhere, and two runs that differ."""
    made = train_tokenizer([tiny.TEXT], 300)
    assert len(made) == 300
    assert made.end_of_text == 0
    assert len(made.encode(tiny.TEXT)) < len(tiny.TEXT.encode())
    assert made.decode(made.encode("Ünseen 🙃\n")) == "Ünseen 🙃\n"
    made.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    again = Tokenizer.load(tmp_path)
    assert again.encode(tiny.TEXT) == made.encode(tiny.TEXT) == train_tokenizer([tiny.TEXT], 300).encode(tiny.TEXT)


@pytest.mark.parametrize(
    ("n_vocab", "why"),
    [(256, "are 257 entries"), (5000, "has merges for only 2[0-9]{2} entries: ask for no more, or give more text")],
)
def test_a_tokenizer_that_cannot_be_made_is_refused(n_vocab, why):
    with pytest.raises(ValueError, match=why):
        train_tokenizer(["to be or not to be"], n_vocab)


@hypothesis.given(
    n=st.integers(2, 40), length=st.integers(2, 40), index=st.integers(0, 2**40), seed=st.integers(0, 2**64 - 1)
)
def test_windows_are_pieces_of_the_text(n, length, index, seed):
    """Catches a window beyond the end, one that depends on another, and a batch that is not the same again."""
    hypothesis.assume(length <= n)
    tokens = np.arange(n, dtype=np.uint16)
    found = batch(tokens, index, batch_size=6, length=length, seed=seed)
    assert found.dtype == np.int32
    assert found.shape == (6, length)
    assert np.array_equal(found, found[:, :1] + np.arange(length))
    assert found.max() < n
    assert np.array_equal(batch(tokens, index, batch_size=3, length=length, seed=seed), found[:3])


def test_every_window_is_drawn_as_often(tmp_path):
    """Catches the first or the last window left out, the same words for two batches, and for two seeds."""
    tokens = np.arange(12, dtype=np.uint16)
    drawn = np.concatenate([batch(tokens, i, batch_size=10, length=5, seed=1)[:, 0] for i in range(1000)])
    counts = np.bincount(drawn, minlength=8)
    assert len(counts) == 8
    assert ((counts - 1250) ** 2 / 1250).sum() < 24.3  # chi-square of 7 degrees at 0.001
    first = [tuple(batch(np.arange(10**6), i, batch_size=4, length=2, seed=1)[:, 0]) for i in range(100)]
    assert len({start for starts in first for start in starts}) > 395
    assert tuple(batch(np.arange(10**6), 0, batch_size=4, length=2, seed=2)[:, 0]) not in first


@hypothesis.given(n=st.integers(2, 60), length=st.integers(2, 20))
def test_held_out_tokens_are_predicted_once(n, length):
    """Catches tokens between two windows that neither predicts, or both."""
    hypothesis.assume(length <= n)
    found = windows(np.arange(n), length)
    predicted = found[:, 1:].ravel().tolist()
    assert predicted == list(range(1, 1 + len(predicted)))
    assert n - 1 - len(predicted) < length - 1


def test_too_little_text_is_refused():
    with pytest.raises(
        ValueError, match="the text has 5 tokens and a window has 6: give more text, or a shorter context"
    ):
        batch(np.arange(5), 0, batch_size=1, length=6, seed=0)
    with pytest.raises(ValueError, match="the held-out text has 5 tokens and a window has 6"):
        windows(np.arange(5), 6)


@pytest.mark.parametrize("n_vocab", [10**12, 2**62])
def test_a_vocabulary_beyond_the_memory_is_refused(n_vocab):
    """Catches the library's abort, which ends the whole process: it reserves memory for all that is asked for."""
    with pytest.raises(ValueError, match=f"a vocabulary of {n_vocab} .* has merges for only 26. entries"):
        train_tokenizer(["to be, or not to be"] * 3, n_vocab)


@pytest.mark.parametrize(
    "given",
    [
        np.asarray([1.0, 2.7, 3.0]),
        np.asarray([1, 2, 3], complex),
        np.asarray([True, False, True]),
        np.zeros(3, "M8[s]"),
        np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        [1, 2, 3],
        None,
        "abc",
    ],
    ids=lambda given: type(given).__name__,
)
def test_windows_of_anything_but_integers_are_refused(given):
    """Catches numbers that are rounded to ids, a hidden value that is taken for one, and a message of NumPy's."""
    for take in (windows, lambda tokens, length: batch(tokens, 0, batch_size=1, length=length, seed=0)):
        with pytest.raises(
            TypeError, match=r"^tokens (have dtype \S+; expected integers|are of type \w+; expected int)"
        ):
            take(given, 2)


def test_windows_are_of_one_text():
    """Catches rows that are taken for tokens, and an error of NumPy's about its own arguments."""
    for take in (windows, lambda tokens, length: batch(tokens, 0, batch_size=1, length=length, seed=0)):
        with pytest.raises(ValueError, match=r"^tokens have shape \[3, 3\]; expected int \[n\]$"):
            take(np.zeros((3, 3), int), 2)


@pytest.mark.parametrize(("largest", "dtype"), [(2**32 - 1, "uint32"), (2**31, "int64"), (2**63, "uint64")])
def test_ids_that_a_window_has_no_room_for_are_refused(largest, dtype):
    """Catches an id that wraps around in int32, to one that is negative or another's."""
    tokens = np.full(4, largest, dtype)
    for take in (windows, lambda tokens, length: batch(tokens, 0, batch_size=1, length=length, seed=0)):
        with pytest.raises(ValueError, match=f"^tokens hold {largest}; expected ids below 2\\*\\*31$"):
            take(tokens, 2)
        assert take(tokens - tokens + tokens.dtype.type(2**31 - 1), 2).max() == 2**31 - 1
