"""Tokenizers that Hugging Face transformers writes, or reads: their ids are the same here."""

import json

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import portable_gpt2 as pg

transformers = pytest.importorskip("transformers")

END = "<|endoftext|>"
MARKS = [END, "<|user|>", "<|bot|>", "<|user|><|bot|>", "[PAD]", "foo bar", "\n\n", "<tool>", "<pad>"]
TEXTS = st.lists(
    st.sampled_from([*MARKS, "Hi", " ", "\n", "foo", " bar", "To be", "<|user", "|>", "é", "🙂"]) | st.text(max_size=4),
    max_size=12,
).map("".join)


def plain(directory):
    """Write vocab.json and merges.txt alone."""
    tiny.write_tokenizer(directory)


def saved(change=lambda tokenizer: None, **options):
    """Return a function that writes a tokenizer which transformers has changed and saved."""

    def write(directory):
        tiny.write_tokenizer(directory)
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(directory, **options)
        change(tokenizer)
        for name in ("vocab.json", "merges.txt"):
            (directory / name).unlink()
        tokenizer.save_pretrained(directory)

    return write


def chat(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|user|><|bot|>"]})


def words(tokenizer):
    tokenizer.add_tokens(["foo bar", AddedToken("\n\n", normalized=False), AddedToken("<tool>", special=True)])


def any_of_them(directory):
    """Write a tokenizer of the tokenizers package, as PreTrainedTokenizerFast saves it."""
    import tokenizers

    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("added"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=END).save_pretrained(directory)


def legacy(files):
    """Return a function that writes the files of transformers before version 4.34."""

    def write(directory):
        tiny.write_tokenizer(directory)
        for name, entries in files.items():
            (directory / name).write_text(json.dumps(entries), "utf-8")

    return write


def spelled(end):
    """Return a function that writes merges.txt with another end of line, or without its first line."""

    def write(directory):
        tiny.write_tokenizer(directory)
        merges = (directory / "merges.txt").read_bytes()
        changed = merges.partition(b"\n")[2] if end is None else merges.replace(b"\n", end)
        (directory / "merges.txt").write_bytes(changed)

    return write


def shuffled(directory):
    """Write a vocabulary whose ids are in no order."""
    tiny.write_tokenizer(directory)
    vocab = json.loads((directory / "vocab.json").read_text("utf-8"))
    entries = dict(sorted(vocab.items(), key=lambda entry: entry[1] * 7 % 384))
    (directory / "vocab.json").write_text(json.dumps(entries), "utf-8")


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}
WRITERS = {
    "vocab and merges": plain,
    "saved": saved(),
    "chat": saved(chat),
    "pad": saved(lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"})),
    "words": saved(words),
    "chat and words": saved(lambda tokenizer: [chat(tokenizer), words(tokenizer)]),
    "pad is the end": saved(lambda tokenizer: setattr(tokenizer, "pad_token", END)),
    "any": any_of_them,
    "CRLF": spelled(b"\r\n"),
    "no version": spelled(None),
    "shuffled": shuffled,
    "added": legacy({"added_tokens.json": {"<|user|>": 384, "foo bar": 385}}),
    "added and special": legacy(
        {
            "added_tokens.json": {"<|bot|>": 385, "<|user|>": 384, "foo bar": 386},
            "special_tokens_map.json": {
                "bos_token": {"content": END, "normalized": True, **FLAGS},
                "eos_token": END,
                "additional_special_tokens": ["<|user|>", "<|bot|>"],
            },
        }
    ),
    "special, without ids": legacy(
        {
            "special_tokens_map.json": {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]},
            "tokenizer_config.json": {"model_max_length": 1024, "mask_token": "<tool>"},
        }
    ),
    "special by its name alone": legacy(
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {"384": {"content": "<pad>", "special": False, "normalized": False, **FLAGS}},
                "pad_token": "<pad>",
            }
        }
    ),
    "settings": legacy(
        {
            "tokenizer_config.json": {
                "add_prefix_space": False,
                "added_tokens_decoder": {
                    "0": {"content": END, "special": True, "normalized": True, **FLAGS},
                    "384": {"content": "<|user|>", "special": True, "normalized": False, **FLAGS},
                    "385": {"content": "foo bar", "special": False, "normalized": True, **FLAGS},
                },
                "eos_token": END,
                "pad_token": "<pad>",
            },
            "special_tokens_map.json": {"pad_token": "[PAD]"},
        }
    ),
}


@pytest.fixture(scope="module", params=WRITERS)
def both(request, tmp_path_factory):
    """One tokenizer, read by transformers and by us."""
    directory = tmp_path_factory.mktemp("it")
    WRITERS[request.param](directory)
    if request.param == "any":
        return transformers.AutoTokenizer.from_pretrained(directory), pg.Tokenizer.load(directory)
    return transformers.GPT2TokenizerFast.from_pretrained(directory), pg.Tokenizer.load(directory)


@given(text=TEXTS)
def test_ids_are_those_of_transformers(both, text):
    """Catches a special token that is spelled out, a word found at another place, ids that are counted otherwise."""
    theirs, ours = both
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, allow_special=True) == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_entries_are_those_of_transformers(both):
    """Catches an id that is another token, one that is missing, and a token that is special to one of the two."""
    theirs, ours = both
    assert {name: ours.special_tokens.get(name) for name in theirs.all_special_tokens} == dict(
        zip(theirs.all_special_tokens, theirs.all_special_ids, strict=True)
    )
    assert len(ours) == len(theirs)
    added = {token: entry.content for token, entry in theirs.added_tokens_decoder.items()}
    assert {token: ours.decode([token]) for token in added} == added


def test_what_we_save_transformers_reads(both, tmp_path):
    """Catches added tokens and special flags that are lost when we save them."""
    theirs, ours = both
    ours.save(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    text = "".join(MARKS) + tiny.TEXT
    assert again(text)["input_ids"] == ours.encode(text, allow_special=True)
    assert again.all_special_tokens == theirs.all_special_tokens


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved(add_prefix_space=True), "add_prefix_space"),
        (saved(lambda tokenizer: setattr(tokenizer, "add_bos_token", True)), "post_processor.single"),
        (saved(lambda tokenizer: tokenizer.add_tokens([AddedToken("x", lstrip=True)])), "lstrip is True"),
        (legacy({"added_tokens.json": {"<a>": 400}}), "has the id 400, but transformers gives it 384"),
    ],
)
def test_what_would_lose_text_is_refused(tmp_path, write, message):
    """Catches a file of transformers that is read as if it did not say so."""
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        pg.Tokenizer.load(tmp_path)
    assert transformers.GPT2TokenizerFast.from_pretrained(tmp_path)("To be")["input_ids"]
