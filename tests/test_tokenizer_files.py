"""A tokenizer's files: each entry is honoured or refused by name, and special tokens are what the files say."""

import copy
import json

import pytest
import tiny
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken

import portable_gpt2 as pg

END = "<|endoftext|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
BOS = [{"SpecialToken": {"id": END, "type_id": 0}}, *TEMPLATE["single"]]


def written(directory, change=lambda file: None):
    """Write a tokenizer.json after a change of what it says; return the directory."""
    file = json.loads(tiny.byte_level_bpe())
    change(file)
    (directory / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    return directory


def at(*path):
    """Return a function that makes a change: what stands at a path of keys becomes a value."""
    *above, last = path

    def change(value):
        def of(file):
            for key in above:
                file = file[key]
            file[last] = value

        return of

    return change


def added(content, **flags):
    """Return a change: a token is added."""
    token = {"id": 384, "content": content, "special": False, "normalized": False} | flags
    token |= {name: flags.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
    return lambda file: file["added_tokens"].append(token)


normalizer, cutter, after, decoder = map(at, ("normalizer", "pre_tokenizer", "post_processor", "decoder"))
REFUSED = {
    "dropout": (at("model", "dropout")(0.5), "model.dropout is 0.5; the ids of a text would be random"),
    "lowercase": (normalizer({"type": "Lowercase"}), "normalizer is 'Lowercase'; it changes characters of a text"),
    "NFC": (normalizer({"type": "NFC"}), "normalizer is 'NFC'"),
    "strip": (normalizer({"type": "Strip", "strip_left": True, "strip_right": True}), "normalizer is 'Strip'"),
    "prepend": (normalizer({"type": "Prepend", "prepend": "x"}), "normalizer is 'Prepend'"),
    "replace": (
        normalizer({"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "normalizer is 'Replace'; it changes characters",
    ),
    "sequence": (normalizer({"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "normalizer is 'NFKC'"),
    "byte-level normalizer": (normalizer({"type": "ByteLevel"}), "normalizer is 'ByteLevel'"),
    "prefix space": (cutter(BYTE_LEVEL | {"add_prefix_space": True}), "pre_tokenizer.add_prefix_space is True"),
    "no word on prefix": (cutter({"type": "ByteLevel"}), "pre_tokenizer is {'type': 'ByteLevel'}; GPT-2 splits"),
    "no regex": (cutter(BYTE_LEVEL | {"use_regex": False}), "pre_tokenizer.use_regex is False; GPT-2 splits"),
    "two": (cutter({"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 2}), "pre_tokenizer is .*with ByteLevel only"),
    "digits": (
        cutter({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}),
        "pre_tokenizer is 'Digits'",
    ),
    "split": (
        cutter({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a"}}, BYTE_LEVEL]}),
        "pre_tokenizer is 'Split'",
    ),
    "punctuation": (
        cutter({"type": "Sequence", "pretokenizers": [BYTE_LEVEL, {"type": "Punctuation", "behavior": "Isolated"}]}),
        "pre_tokenizer is 'Punctuation'",
    ),
    "metaspace": (cutter({"type": "Metaspace"}), "expected a byte-level BPE.* got the model BPE after Metaspace"),
    "bos": (after(TEMPLATE | {"single": BOS, "special_tokens": {}}), "post_processor.single is .*; it adds tokens"),
    "RoBERTa": (after({"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["a", 1]}), "is 'RobertaProcessing'"),
    "BERT": (after({"type": "BertProcessing", "sep": ["a", 1], "cls": ["a", 1]}), "is 'BertProcessing'"),
    "metaspace decoder": (decoder({"type": "Metaspace"}), "decoder is 'Metaspace'; GPT-2's ids stand for bytes"),
    "strip decoder": (
        decoder({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Strip"}]}),
        "decoder is 'Strip'",
    ),
    "suffix": (at("model", "end_of_word_suffix")("</w>"), "model.end_of_word_suffix is '</w>'"),
    "prefix": (at("model", "continuing_subword_prefix")("##"), "model.continuing_subword_prefix is '##'"),
    "bytes": (at("model", "byte_fallback")(True), "model.byte_fallback is True"),
    "whole words": (at("model", "ignore_merges")(True), "model.ignore_merges is True"),
    "lstrip": (added("<m>", lstrip=True), "the added token '<m>': lstrip is True; white space before the token"),
    "rstrip": (added("<m>", rstrip=True, special=True), "the added token '<m>': rstrip is True; white space after"),
    "word": (added("<m>", single_word=True), "the added token '<m>': single_word is True"),
    "empty": (added(""), "the added token '': content is ''; expected text"),
    "surrogate": (added("\ud800"), "surrogates not allowed"),
    "gap": (added("<m>", id=390), "the added token '<m>' has the id 390, but transformers gives it 384"),
    "other": (added("a", id=384), "the added token 'a' has the id 384, but transformers gives it"),
    "twice": (lambda file: [added("<m>")(file), added("<n>")(file)], "'<n>' has the id 384, but .* gives it 385"),
    "no id": (added("<m>", id="384"), "lacks its text or its id"),
    "unknown": (at("surprise")(1), "surprise is not a known entry and may change the ids"),
    "unknown in the model": (at("model", "temperature")(1), "model.temperature is not a known entry"),
    "unknown option": (cutter(BYTE_LEVEL | {"lower": True}), "pre_tokenizer.lower is not a known entry"),
    "unknown flag": (lambda file: file["added_tokens"][0].update(upper=True), ": upper is not a known entry"),
    "unknown step": (after({"type": "Shuffle"}), "post_processor is 'Shuffle'"),
    "version": (at("version")("2.0"), "version is '2.0'"),
    "a list": (at("added_tokens")({}), "added_tokens is {}; expected a list"),
    "tokens that are text": (at("added_tokens")(["a"]), "an added token is 'a'; expected an object"),
    "model": (at("model")([]), r"model is \[\]; expected an object"),
    "no merges": (lambda file: file["model"].pop("merges"), "model.merges is missing"),
    "merges": (at("model", "merges")({"a": 1}), "model.merges is {'a': 1}; expected a list"),
    "a merge": (at("model", "merges")([["h"]]), r"model.merges\[0\] is \['h'\]; expected two entries"),
    "a merge of three": (at("model", "merges")([["h", "e", "r"]]), r"model.merges\[0\] is .* two entries"),
    "a merge of numbers": (at("model", "merges")([[1, 2]]), r"model.merges\[0\] is \[1, 2\]"),
    "a merge that is not there": (at("model", "merges")(["h #"]), r"model.merges\[0\], 'h #': 'h#' is not in the voc"),
    "a merge again": (
        at("model", "merges")(["h e", "h e"]),
        r"model.merges\[1\], 'h e', repeats model.merges\[0\]",
    ),
    "an id": (at("model", "vocab", "a")(2**32), "the id of 'a' is 4294967296"),
    "one id": (at("model", "vocab", "a")(5), "have the same id, 5"),
    "WordPiece": (at("model")({"type": "WordPiece", "vocab": {}}), "expected a byte-level BPE.* the model WordPiece"),
    "Unigram": (at("model")({"type": "Unigram", "vocab": []}), "expected a byte-level BPE.* the model Unigram"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_be_another_tokenizer_is_refused_by_name(tmp_path, change):
    """Catches ids that are random or of another text, white space that is lost, and an entry that is dropped."""
    of, message = REFUSED[change]
    written(tmp_path, of)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}") as error:
        pg.Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


ACCEPTED = {
    "as it is": lambda file: None,
    "dropout of 0": at("model", "dropout")(0.0),
    "prefix and suffix that are empty": lambda file: file["model"].update(
        continuing_subword_prefix="", end_of_word_suffix=""
    ),
    "an unknown token, which nothing becomes": lambda file: file["model"].update(unk_token=END, fuse_unk=True),
    "no type, and merges as text, as in 2020": lambda file: (
        [file["model"].pop(name) for name in ("type", "byte_fallback", "ignore_merges")]
        and file["model"].update(merges=[" ".join(pair) for pair in file["model"]["merges"]])
    ),
    "no word on the regex": cutter({k: v for k, v in BYTE_LEVEL.items() if k != "use_regex"}),
    "one in a sequence": cutter({"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}),
    "an empty sequence": normalizer({"type": "Sequence", "normalizers": []}),
    "offsets": after(BYTE_LEVEL | {"add_prefix_space": True, "trim_offsets": False}),
    "a template of the text alone": after(TEMPLATE | {"special_tokens": {}}),
    "no decoder": decoder(None),
    "truncation": at("truncation")({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    "padding": at("padding")(
        {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
        | {"pad_token": END}
    ),
    "a word": added("foo bar"),
    "a word, normalized": added("\n\n", normalized=True),
    "a special token": added("<|user|>", special=True),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_changes_no_id_is_accepted(tmp_path, change):
    """Catches a real file that is refused for an entry without effect, and one whose ids are others."""
    written(tmp_path, ACCEPTED[change])
    package = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    package.no_truncation()
    package.no_padding()
    tokenizer = pg.Tokenizer.load(tmp_path)
    text = tiny.TEXT + "a foo bar\n\n\n<|user|>Hi"
    assert tokenizer.encode(text, allow_special=True) == package.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == package.get_vocab_size()


WORDS = ["foo bar", "\n\n", "o b", " a", "é!", "<|user|>", "<|user|><|bot|>", "<|bot|>", "user", "|", END, "x y\n z"]
FRAGMENTS = st.lists(
    st.sampled_from(
        [*WORDS, "f", "foo", " bar", " ", "\n", "  ", "a", "<|", "|>", "é", "!", "x", "y", "z", "🙂", "\x1c"]
    )
    | st.text(max_size=3),
    max_size=14,
).map("".join)
TOKENS = st.lists(
    st.builds(
        AddedToken, st.sampled_from(WORDS), special=st.booleans(), normalized=st.booleans(), single_word=st.just(False)
    ),
    max_size=6,
    unique_by=lambda token: token.content,
)


def with_tokens(tokens):
    """Return a tokenizer with added tokens, and the package's own."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.add_tokens(tokens)
    return pg.Tokenizer(whole), whole


@given(tokens=TOKENS, text=FRAGMENTS)
@example(tokens=[AddedToken("|", special=False, normalized=False), AddedToken(END, special=False)], text=END)
def test_added_tokens_are_found_where_the_package_finds_them(tokens, text):
    """Catches another order of search: the shorter of two, one within another, a normalized one too early."""
    tokenizer, whole = with_tokens(tokens)
    whole.add_special_tokens([END])  # as transformers makes it
    assert tokenizer.encode(text, allow_special=True) == whole.encode(text, add_special_tokens=False).ids
    special = {token.content for token in tokens if token.special} | {END}
    assert set(tokenizer.special_tokens) == special
    assert all(whole.token_to_id(name) == token for name, token in tokenizer.special_tokens.items())


@given(tokens=TOKENS, text=FRAGMENTS, data=st.data())
def test_any_text_comes_back_whatever_is_allowed(tokens, text, data):
    """Catches a special token that is found though it is not allowed, or text that is lost at its side."""
    tokenizer, _ = with_tokens(tokens)
    names = data.draw(st.lists(st.sampled_from(sorted(tokenizer.special_tokens)), unique=True))
    for allowed in (False, True, names, set(names), dict.fromkeys(names)):
        ids = tokenizer.encode(text, allow_special=allowed)
        assert tokenizer.decode(ids) == text
        step = tokenizer.decoder()
        assert "".join([*map(step, ids), step(None)]) == text
        may = set(tokenizer.special_tokens if allowed is True else allowed or ())
        others = {tokenizer.special_tokens[name] for name in tokenizer.special_tokens.keys() - may}
        assert not others.intersection(ids, [0, *range(384, 390)])  # "|" is a byte, too
    assert tokenizer.encode(text, allow_special=names) == tokenizer.encode(text, allow_special=set(names))


def test_a_special_token_is_one_id_where_it_is_allowed():
    """Catches the markers of a chat that are spelled out, and one allowed by name that allows others."""
    chat = [AddedToken(name, special=True) for name in ("<|user|>", "<|bot|>", "<|user|><|bot|>")]
    tokenizer, _ = with_tokens(chat)
    user, bot, both = 384, 385, 386
    hi = tokenizer.encode("Hi")
    assert tokenizer.special_tokens == {END: 0, "<|user|>": user, "<|bot|>": bot, "<|user|><|bot|>": both}
    assert tokenizer.encode("<|user|>Hi<|bot|>", allow_special=True) == [user, *hi, bot]
    assert tokenizer.encode("<|user|><|bot|><|user|>", allow_special=True) == [both, user]
    assert tokenizer.encode("<|user|><|bot|>", allow_special=["<|user|>", "<|bot|>"]) == [user, bot]
    only = tokenizer.encode("<|user|>Hi<|bot|>", allow_special={"<|user|>"})
    assert only == [user, *tokenizer.encode("Hi<|bot|>")]
    assert user not in tokenizer.encode("<|user|>Hi")
    assert tokenizer.encode("<|user|>Hi", allow_special=[]) == tokenizer.encode("<|user|>Hi")


@pytest.mark.parametrize(
    ("allowed", "error", "message"),
    [
        (END, TypeError, r"expected True, False, or a list of names \(\['<\|endoftext\|>'\] names one\)"),
        (b"x", TypeError, "allow_special names 120; expected the names of special tokens"),
        (1, TypeError, "allow_special is 1; expected True, False, or a list of names"),
        (None, TypeError, "allow_special is None; expected True, False, or a list of names"),
        (iter([END]), TypeError, "expected True, False, or a list of names"),
        ([0], TypeError, "allow_special names 0; expected the names of special tokens, each a str"),
        (["a"], ValueError, r"names 'a', which is not a special token of this tokenizer; it has <\|endoftext\|>"),
        ({END, "<pad>"}, ValueError, "names '<pad>', which is not a special token"),
    ],
)
def test_what_names_no_special_token_is_refused(allowed, error, message):
    """Catches a name that is misspelt and so never found, and a str whose letters are taken for names."""
    tokenizer, _ = with_tokens([])
    with pytest.raises(error, match=message):
        tokenizer.encode("x", allow_special=allowed)


def test_models_take_the_names_too(tmp_path):
    """Catches a method that drops them on the way to the tokenizer."""
    tokenizer, _ = with_tokens([AddedToken("<|user|>", special=True)])
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_vocab=385, n_ctx=32, eos_token_id=0)
    model = tiny.model(pg.get_backend("numpy"), config, tokenizer=tokenizer)
    text, ids = "<|user|>To", [384, *tokenizer.encode("To")]
    for allowed in (True, ["<|user|>"]):
        options = {"allow_special": allowed, "max_new_tokens": 4, "temperature": 0}
        expected = tokenizer.decode(model.stream_ids(ids, max_new_tokens=4, temperature=0))
        assert "".join(model.stream(text, **options)) == model.generate(text, **options) == expected
        assert [completion.text for completion in model.complete([text], **options)] == [expected]
        assert model.score(text, allow_special=allowed).tokens == ids
        assert model.score([text], allow_special=allowed)[0].tokens == ids
        assert model.trace(text, allow_special=allowed)["logits"].shape[1] == len(ids)
    assert model.score(text).tokens == tokenizer.encode(text) != ids


# vocab.json, merges.txt and the files next to them


@pytest.fixture
def pair(tmp_path):
    """A directory with vocab.json and merges.txt."""
    tiny.write_tokenizer(tmp_path)
    return tmp_path


def write(directory, name, entries):
    (directory / name).write_text(json.dumps(entries), "utf-8")


def test_added_tokens_stand_next_to_the_vocabulary(pair):
    """Catches tokens of old fine-tunes that are refused or dropped, and all of them taken for special ones."""
    write(pair, "added_tokens.json", {"<|user|>": 385, "foo bar": 384})
    write(pair, "special_tokens_map.json", {"bos_token": END, "additional_special_tokens": ["<|user|>"]})
    tokenizer = pg.Tokenizer.load(pair)
    assert (len(tokenizer), tokenizer.n_vocab) == (386, 386)
    assert tokenizer.special_tokens == {END: 0, "<|user|>": 385}
    assert tokenizer.encode("foo bar<|user|>")[0] == 384
    assert tokenizer.encode("foo bar<|user|>", allow_special=True) == [384, 385]


def test_newer_settings_hold_the_added_tokens(pair):
    """Catches the one file that newer tokenizers have for three."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {"0": {"content": END, "special": True, **flags}, "384": {"content": "<|a|>", "special": True, **flags}}
    write(pair, "tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "<|p|>", "model_max_length": 9})
    tokenizer = pg.Tokenizer.load(pair)
    assert tokenizer.special_tokens == {END: 0, "<|a|>": 384, "<|p|>": 385}
    assert tokenizer.decode([385, 384]) == "<|p|><|a|>"


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (
            "tokenizer_config.json",
            {"add_prefix_space": True},
            "add_prefix_space is True; transformers would add a space",
        ),
        ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token is True; transformers would add a token"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is True"),
        ("tokenizer_config.json", [], r"the file is \[\]; expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]; expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "invalid literal for int"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"384": {"content": "a b", "lstrip": True}}},
            "lstrip is True",
        ),
        ("added_tokens.json", {"<a>": 390}, "the added token '<a>' has the id 390, but transformers gives it 384"),
        ("added_tokens.json", {"<a>": "384"}, "lacks its text or its id"),
        ("added_tokens.json", {"<a>": True}, "lacks its text or its id"),
        ("added_tokens.json", {"": 384}, "content is ''; expected text"),
        ("added_tokens.json", ["<a>"], r"the file is \['<a>'\]; expected an object"),
        ("special_tokens_map.json", 3, "the file is 3; expected an object"),
    ],
)
def test_a_file_next_to_the_vocabulary_is_honoured_or_refused(pair, name, entries, message):
    """Catches a setting that changes the ids and is dropped, and a complaint that names no file."""
    write(pair, name, entries)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        pg.Tokenizer.load(pair)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_what_is_no_file_is_refused(pair, name):
    """Catches a directory that is read as a file, or passed over."""
    (pair / name).mkdir()
    with pytest.raises(OSError, match=f"{name}: is a directory; expected a regular file"):
        pg.Tokenizer.load(pair)


def test_all_files_survive_a_round_trip(pair, tmp_path):
    """Catches added tokens or special flags that are lost when a tokenizer is saved: text would have other ids."""
    write(pair, "added_tokens.json", {"<|user|>": 384, "foo bar": 385})
    write(pair, "special_tokens_map.json", {"additional_special_tokens": ["<|user|>"]})
    write(pair, "tokenizer_config.json", {"model_max_length": 64})
    (tmp_path / "again").mkdir()
    first = pg.Tokenizer.load(pair)
    first.save(tmp_path / "again")
    again = pg.Tokenizer.load(tmp_path / "again")
    text = "foo bar<|user|> To be"
    for allowed in (True, False):
        assert again.encode(text, allow_special=allowed) == first.encode(text, allow_special=allowed)
    assert again.special_tokens == first.special_tokens
    for file in pair.glob("*.*"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_package_s_tokenizer_is_not_changed():
    """Catches an object of the caller's that loses its truncation, or has other ids from then on."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.enable_truncation(3)
    before = whole.to_str()
    pg.Tokenizer(whole).encode("To be, or not to be", allow_special=True)
    assert whole.to_str() == before


def test_a_tokenizer_of_another_package_is_refused():
    """Catches an AttributeError, which says nothing of what was expected."""
    with pytest.raises(TypeError, match=r"tokenizer is 'gpt2'; expected a tokenizers\.Tokenizer"):
        pg.Tokenizer("gpt2")
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(object())
    with pytest.raises(ValueError, match=r"the tokenizer cannot be written down as tokenizer\.json: "):
        pg.Tokenizer(whole)


def test_ids_are_ints_and_not_bools():
    """Catches True that is decoded as the token 1."""
    tokenizer, _ = with_tokens([])
    with pytest.raises(TypeError, match="True is a bool"):
        tokenizer.decode([True])


# Whatever a file says

VALUES = st.sampled_from(
    [None, True, False, 0, 0.5, 1, -1, "", "ByteLevel", "Ġ", "a b", [], {}, [[]], {"type": "NFC"}, 384]
)


def paths(found, above=()):
    """Yield the path of every entry, those of the vocabulary and the merges rarely."""
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for i, (key, value) in enumerate(items):
        if i < 12:
            yield (*above, key)
            yield from paths(value, (*above, key))


SOURCE = json.loads(tiny.byte_level_bpe())
ADDED_TOKENS = [
    {"id": 384, "content": "foo bar", "special": False, "normalized": True},
    {"id": 385, "content": "<|user|>", "special": True, "normalized": False, "lstrip": False},
]
SOURCE["added_tokens"] += ADDED_TOKENS
PATHS = list(paths(SOURCE))


@given(
    changes=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3),
    text=FRAGMENTS | st.text(max_size=20),
)
def test_whatever_is_accepted_gives_any_text_back(shared, changes, text):
    """Catches an entry that is not looked at: text that comes back as another, ids that differ from time to time."""
    file = copy.deepcopy(SOURCE)
    for (*above, last), value in changes:
        inside = file
        for key in above:
            is_there = (
                key in inside if isinstance(inside, dict) else isinstance(inside, list) and key in range(len(inside))
            )
            inside = inside[key] if is_there else None
        if isinstance(inside, dict) or (isinstance(inside, list) and last in range(len(inside))):
            inside[last] = copy.deepcopy(value)
    (shared / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    message = ""
    try:
        tokenizer = pg.Tokenizer.load(shared)
        ids = tokenizer.encode(text, allow_special=True)
        assert tokenizer.decode(ids) == text
        assert pg.Tokenizer.load(shared).encode(text, allow_special=True) == ids
    except ValueError as error:
        message = str(error)
    known = (f"{shared}/tokenizer.json: ", "the vocabulary cannot spell ", "the text holds ")
    assert not message or message.startswith(known)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory in which each example writes its file."""
    return tmp_path_factory.mktemp("shared")
