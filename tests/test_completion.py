"""From tokens to text: what is held back, and where a stop string ends it."""

import hypothesis.strategies as st
import pytest
import tiny
from hypothesis import example, given

import portable_gpt2 as pg
from portable_gpt2.completion import Reader

few = st.text("ab\n", max_size=12)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def reader_of(pieces, stops):
    """Return a reader of the tokens 0, 1 ..., which stand for these pieces, of which each but the last is whole."""
    return Reader(lambda token: "" if token is None else pieces[token], stops)


def ended(text, stops):
    """Return a text up to the stop string that is complete first; of two that end together, up to the longer one."""
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


# With a model, on every backend


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    return pg.Tokenizer.load(path)


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
    stream that begin anew.
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
