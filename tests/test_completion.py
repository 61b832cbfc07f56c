"""From tokens to text: which characters are held back, and where a stop string ends the text."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
from hypothesis import example, given

import portable_gpt2 as pg
from portable_gpt2.generation.completion import Request, complete
from portable_gpt2.generation.detokenizer import StreamingDetokenizer
from portable_gpt2.generation.stop_strings import StopStrings
from portable_gpt2.sampling import Sampling

few = st.text("ab\n", max_size=12)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def reader_of(pieces, stops):
    """Return a reader of the tokens 0, 1 ..., which stand for these pieces, of which each but the last is whole."""
    return StreamingDetokenizer(lambda token: "" if token is None else pieces[token], stops)


def ended(text, stops):
    """Return a text up to the first complete stop string; if two end at the same character, up to the longer one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.lists(few, max_size=8), stop_strings)
@example(["ab", "b"], ["bb"])
@example(["a", "b", "a", "b", "b"], ["abb", "bab"])
@example(["ab"], ["b", "abb"])
@example(["ab"], ["b", "ab"])
def test_text_ends_before_a_stop_string_however_it_is_cut_into_tokens(pieces, stops):
    """Catches a stop string that is missed across the border of tokens, or found later or earlier than it is complete;
    text that was written before it turned out to be one; and text that is held back for nothing.
    """
    reader, written = reader_of(pieces, stops), ""
    for token in range(len(pieces)):
        written += reader.read(token)
        whole = "".join(pieces[: token + 1])
        assert ended(whole, stops).startswith(written)
        if reader.ended:
            break
        begun = len(whole) - len(written)
        assert begun == max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
    if not reader.ended:
        written += reader.read(None)
    whole = "".join(pieces)
    assert written == ended(whole, stops)
    assert reader.ended == any(stop in whole for stop in stops)


@given(st.lists(few, max_size=8), stop_strings)
def test_pieces_are_the_text(pieces, stops):
    """Catches text that is lost at the end, and tokens that are asked for after it."""
    asked = []

    def tokens():
        for token in range(len(pieces)):
            asked.append(token)
            yield token

    reader = reader_of(pieces, stops)
    assert "".join(reader.pieces(tokens())) == ended("".join(pieces), stops)
    if reader.ended:
        assert any(stop in "".join(pieces[: asked[-1] + 1]) for stop in stops)
        assert not any(stop in "".join(pieces[: asked[-1]]) for stop in stops)


@pytest.mark.parametrize(
    ("piece", "stops"),
    [
        ("abcd", ["x" * 10**6]),  # nothing begins it
        ("aaaa", ["a" * 10**6]),  # all that was read begins it
        ("aaaa", ["a" * 10**5 + "b"]),  # and then turns out not to
        ("abcd", [f"a{i}" for i in range(10**5)]),
        ("aaab", ["a" * i + "bc" for i in range(1000)]),
    ],
    ids=["unlike", "like", "nearly", "many", "nested"],
)
def test_the_work_for_stop_strings_is_proportional_to_the_text(monkeypatch, piece, stops):
    """Catches a search that looks at a whole stop string, at all that is held back or at every stop for every token."""
    looked = []
    child = StopStrings._child
    monkeypatch.setattr(StopStrings, "_child", lambda self, state, c: looked.append(c) or child(self, state, c))
    pieces = [piece] * 5_000
    reader = reader_of(pieces, stops)
    for token in range(len(pieces)):
        reader.read(token)
    assert len(looked) <= 3 * len(piece) * len(pieces)


def test_what_is_held_back_is_not_kept_when_it_is_certain():
    """Catches text that piles up: a long stream holds back no more than what may begin a stop string."""
    reader = reader_of(["ab", ""] * 1000, ["abc"])
    for token in range(2000):
        reader.read(token)
    assert len(reader._held) <= 2


# With a model, on every backend


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    return pg.Tokenizer.load(path)


def test_a_stop_string_that_the_last_bytes_complete_ends_the_text(tokenizer):
    """Catches "length" where the text ended at a stop string: bytes of no character become U+FFFD at the end alone."""
    token = next(token for token in range(tokenizer.n_vocab) if tokenizer.token_bytes(token) == b"\xe5")

    class OneToken:
        def stream(self, generations, max_new_tokens, ends):
            generations[0].tokens.append(token)
            yield generations[0]

    request = Request(0, "x", [5], Sampling(seed=0), 0)
    (completion,) = complete(OneToken(), tokenizer, [request], 1, set(), StopStrings(["\ufffd"]))
    assert (completion.text, completion.finish_reason) == ("", "stop")


@pytest.fixture(scope="module")
def model(backend, tokenizer):
    return tiny.model(backend, tokenizer=tokenizer)


PROMPTS = ["To be", "", "存在", "x " * 12, "Whether 'tis nobler in the mind", "To be", "a"]
OPTIONS = {"max_new_tokens": 24, "seed": 7, "temperature": 1.3}


@pytest.fixture(scope="module")
def alone(model):
    return [model.generate(prompt, **OPTIONS) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("order", [0, 1, 2], ids=["as given", "reversed", "rotated"])
def test_each_text_is_what_its_prompt_alone_would_have_given(model, alone, batch_size, order):
    """Catches padding that is seen, positions that count it, rows that are mixed up, and draws that depend on them."""
    order = [PROMPTS, PROMPTS[::-1], PROMPTS[3:] + PROMPTS[:3]][order]
    found = list(model.complete(order, batch_size=batch_size, **OPTIONS))
    assert [c.prompt for c in found] == order
    assert [c.text for c in found] == [alone[PROMPTS.index(prompt)] for prompt in order]
    assert all(c.index == 0 for c in found)


def test_samples_differ_and_the_first_is_the_one_of_generate(model, alone):
    """Catches samples that are all the same, that depend on how many there are, or on the batch."""
    found = [c.text for c in model.complete(PROMPTS[:2], num_samples=5, batch_size=3, **OPTIONS)]
    assert found[0::5] == alone[:2]
    assert len(set(found)) == 10
    assert [c.text for c in model.complete(PROMPTS[:1], num_samples=2, **OPTIONS)] == found[:2]
    assert model.generate(PROMPTS[:2], **OPTIONS) == model.generate(tuple(PROMPTS[:2]), **OPTIONS) == alone[:2]
    assert model.generate(PROMPTS[0], num_samples=2, **OPTIONS) == found[:2]
    assert model.generate(PROMPTS[:2], num_samples=5, **OPTIONS) == found


def test_without_a_seed_each_prompt_has_its_own(model):
    """Catches one random seed for all prompts: eight equal prompts gave one text eight times."""
    options = {"max_new_tokens": 20, "temperature": 3.0, "top_k": None}
    found = list(model.complete(["To be"] * 8, num_samples=2, **options))
    assert len({completion.seed for completion in found}) == 8
    assert len({completion.text for completion in found}) > 8
    assert len(set(model.generate(["To be"] * 8, **options))) > 1
    again = model.complete(["To be"], num_samples=2, seed=found[6].seed, **options)
    assert [completion.text for completion in again] == [completion.text for completion in found[6:8]]


def test_with_a_seed_equal_prompts_have_equal_texts(model, alone):
    """Catches a text that depends on where its prompt stands in the list, which the documentation excludes."""
    found = list(model.complete(["To be"] * 4, **OPTIONS))
    assert {completion.text for completion in found} == {alone[0]}
    assert {completion.seed for completion in found} == {OPTIONS["seed"]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": itertools.repeat("To be")}, ValueError, "prompts has more than 1,048,576 items"),
        ({"prompts": {"To be": 1}}, TypeError, "prompts is {'To be': 1}; expected texts, in a list"),
        ({"prompts": b"To be"}, TypeError, "prompts is b'To be'; expected texts, in a list"),
        ({"prompts": range(10**12)}, ValueError, "prompts has more than 1,048,576 items"),
        ({"stop": itertools.repeat(5)}, ValueError, "stop has more than 1,048,576 items"),
        ({"stop": b"x"}, TypeError, "stop is b'x'; expected a token id, a string, or several of them"),
        ({"stop": {"x": 1}}, TypeError, "stop is {'x': 1}; expected a token id, a string"),
        ({"stop": np.asarray(5)}, TypeError, "stop is array"),
        ({"num_samples": 10**12, "batch_size": 10**12}, ValueError, "a cache of 1,000,000,000,000 texts .* GiB"),
        ({"sliding": "no"}, ValueError, "sliding is 'no'; expected true or false"),
    ],
)
def test_what_never_ends_or_is_something_else_is_refused_at_the_call(model, options, error, message):
    """Catches a list of an endless iterator, the bytes of a text taken for token ids, and a batch beyond the memory."""
    with pytest.raises(error, match=message):
        model.complete(**{"prompts": ["To be"], "max_new_tokens": 3, **options})


def test_a_number_of_samples_beyond_the_memory_is_refused_where_a_list_is_asked_for(model):
    """Catches a list of 10^12 rows; the iterator takes as many as are read from it."""
    first = next(model.complete(["To be"], num_samples=10**12, batch_size=2, max_new_tokens=3, seed=7))
    assert first.index == 0
    with pytest.raises(ValueError, match="1,000,000,000,000 continuations of 1 prompts would take"):
        model.generate(["To be"], num_samples=10**12, max_new_tokens=3)
    for prompt in (iter(["To be"]), {"To be"}, np.asarray(["To be"]), 7, None):
        with pytest.raises(TypeError, match=r"prompt is .*; expected a str, or a list of them"):
            model.generate(prompt)


def test_a_row_ends_alone(model, alone, tokenizer):
    """Catches a stop that ends the whole batch, tokens that are drawn after the end, and an end that is not told."""
    stop = alone[0][4:7]
    assert stop in alone[0]
    found = list(model.complete(PROMPTS, stop=stop, **OPTIONS))
    for completion, text in zip(found, alone, strict=True):
        assert completion.text == ended(text, [stop])
        assert completion.finish_reason == ("stop" if stop in text or len(completion.tokens) < 24 else "length")
        assert tokenizer.decode(completion.tokens).startswith(completion.text)
        assert completion.text == model.generate(completion.prompt, stop=stop, **OPTIONS)


def test_a_stop_string_and_a_stop_token_may_be_named_together(model, alone, tokenizer):
    """Catches one of the two being lost."""
    drawn = list(model.stream_ids(tokenizer.encode(PROMPTS[0]), stop=tokenizer.end_of_text, **OPTIONS))
    assert len(drawn) > 3
    by_token = model.generate(PROMPTS[0], stop=["never there", drawn[3]], **OPTIONS)
    assert by_token == tokenizer.decode(drawn[: drawn.index(drawn[3])])
    [completion] = model.complete(PROMPTS[:1], stop=drawn[3], **OPTIONS)
    assert (completion.tokens, completion.finish_reason) == (drawn[: drawn.index(drawn[3])], "stop")
    assert model.generate(PROMPTS[0], stop=[alone[0][1], 383], **OPTIONS) == alone[0][: alone[0].index(alone[0][1])]


def test_a_text_ends_at_the_configurations_end_token_too(backend, tokenizer, alone):
    """Catches an end token that is named in config.json and is not the tokenizer's."""
    drawn = tokenizer.encode(alone[0])
    config = pg.GPT2Config(**{**vars(tiny.CONFIG), "eos_token_id": drawn[3]})
    found = tiny.model(backend, config, tokenizer=tokenizer).generate(PROMPTS[0], **OPTIONS)
    assert found == tokenizer.decode(drawn[: drawn.index(drawn[3])])


def test_many_prompts_are_checked_before_any_is_computed(model, monkeypatch):
    """Catches an error that comes after half of the work."""
    monkeypatch.setattr(model, "_decoder", None)
    with pytest.raises(ValueError, match="do not fit into n_ctx = 64"):
        model.complete(["To be", "x " * 99], max_new_tokens=3)
    with pytest.raises(TypeError, match="expected text as a str; got int"):
        model.complete(["To be", 3], max_new_tokens=3)
    with pytest.raises(TypeError, match="prompts is 'To be'; expected texts, in a list"):
        model.complete("To be", max_new_tokens=3)
    assert list(model.complete([], max_new_tokens=3)) == []


@pytest.mark.parametrize("prompt", [5, 64, 100], ids=["short", "full", "too long"])
def test_a_sliding_window_goes_on_from_its_last_half(model, prompt):
    """Catches a window that slides at another place, tokens that are lost or doubled there, and positions of the random
    stream that begin again.
    """
    ids = [(7 * i) % 384 for i in range(prompt)]
    options = {"temperature": 1.3, "seed": 7, "top_k": 40, "top_p": None}
    found = list(model.stream_ids(ids, max_new_tokens=100, sliding=True, **options))
    text, window = list(ids), ids if prompt < 64 else ids[-32:]
    for _ in range(100):
        logits = model.backend.to_numpy(model.logits([window]))[0, -1]
        text.append(pg.sampling.sample(logits, len(text), **options))
        window = [*window, text[-1]]
        window = window if len(window) < 64 else text[-32:]
    assert found == text[prompt:]


def test_sliding_texts_are_what_each_alone_would_have_been(model):
    """Catches texts of several lengths whose window slides where the longest is full."""
    options = {**OPTIONS, "max_new_tokens": 90, "sliding": True}
    alone = [model.generate(prompt, **options) for prompt in PROMPTS[:4]]
    assert model.generate(PROMPTS[:4], **options) == alone
