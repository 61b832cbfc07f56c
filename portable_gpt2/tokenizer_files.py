"""Read and check the files of a tokenizer. An entry that is not supported raises an error that names it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import strict_json
from .checks import shown
from .files import holds_file

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
ADDED_FILE, SPECIAL_FILE, SETTINGS_FILE = "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"
_PAIRS = (VOCAB_FILE, MERGES_FILE), ("encoder.json", "vocab.bpe")  # Hugging Face's names and OpenAI's


class AddedToken(NamedTuple):
    """A token that is searched for in a text before the rest of the text is split into words and merged."""

    id: int
    special: bool
    """Whether text that spells the token is encoded as ordinary text unless the token is allowed."""
    normalized: bool
    """Whether the token is searched for only after, and between, the tokens without this flag, as in transformers."""


class Definition(NamedTuple):
    """The properties in which a byte-level BPE may differ from GPT-2's."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, AddedToken]


def read_files(directory: Path) -> dict[str, bytes] | None:
    """Return the contents of the files that define the tokenizer of a directory, or None if there is no tokenizer.

    The keys are Hugging Face's names. ``tokenizer.json`` contains the vocabulary, the merges and the added tokens. If
    this file does not exist, the vocabulary is in ``vocab.json``, the merges are in ``merges.txt``, and the added
    tokens are in ``added_tokens.json`` or, for newer tokenizers, in ``tokenizer_config.json``.
    """
    names = _names(directory)
    if not names:
        return None
    also = (ADDED_FILE, SPECIAL_FILE, SETTINGS_FILE) if VOCAB_FILE in names else (SPECIAL_FILE, SETTINGS_FILE)
    names |= {name: name for name in also if holds_file(directory / name)}
    return {name: (directory / there).read_bytes() for name, there in names.items()}


def _names(directory: Path) -> dict[str, str]:
    """Return the names of the files that hold a directory's vocabulary. The keys are Hugging Face's names."""
    if holds_file(directory / TOKENIZER_FILE):
        return {TOKENIZER_FILE: TOKENIZER_FILE}
    pairs = (pair for pair in _PAIRS if all([holds_file(directory / name) for name in pair]))
    return dict(zip(_PAIRS[0], next(pairs, ()), strict=False))


def definition(files: Mapping[str, bytes], directory: Path | None = None) -> Definition:
    """Return the tokenizer that a set of files defines.

    Parameters
    ----------
    files : dict
        The files, as `read_files` returns them.
    directory : Path, optional
        The directory that they were read from, for messages.

    Raises
    ------
    ValueError
        If a file is malformed, or describes a tokenizer that does not work as GPT-2's does. The message names the file
        and the entry.
    """

    @contextlib.contextmanager
    def reading(name: str) -> Iterator[bytes]:
        try:
            yield files.get(name, b"{}")
        except (ValueError, RecursionError) as error:  # RecursionError: JSON that is nested too deeply
            if directory is None:
                raise ValueError(str(error)) from error
            raise ValueError(f"{directory / _names(directory).get(name, name)}: {error}") from error

    with reading(SETTINGS_FILE) as data:
        settings = _object(data)
        _check_settings(settings, alone=TOKENIZER_FILE not in files)
        listed = [
            {"id": int(i), **_object_of(f"added_tokens_decoder[{i!r}]", token)}
            for i, token in _object_of("added_tokens_decoder", settings.get("added_tokens_decoder", {})).items()
        ]
        special = _special_names(settings)
    if "added_tokens_decoder" not in settings:  # if this newer entry exists, the two files below are not needed
        with reading(SPECIAL_FILE) as data:
            special = _special_names({**settings, **_object(data)})
        with reading(ADDED_FILE) as data:
            added = _object(data)
            listed = [
                {"id": i, "content": content, "special": content in special, "normalized": content not in special}
                for content, i in added.items()
            ]

    if TOKENIZER_FILE in files:
        with reading(TOKENIZER_FILE) as data:
            found = _object(data)
            check_tokenizer(found)
            vocab = _vocab(found["model"]["vocab"])
            merges = list(_merges(found["model"]["merges"], vocab))
            listed = [*found.get("added_tokens", []), *listed]
            return Definition(vocab, merges, _added(vocab, listed, special))
    with reading(VOCAB_FILE) as data:
        vocab = _vocab(_object(data))
    with reading(MERGES_FILE) as data:
        merges = _read_merges(data.decode(), vocab)
    with reading(ADDED_FILE if ADDED_FILE in files else SETTINGS_FILE):
        return Definition(vocab, merges, _added(vocab, listed, special))


def pair_of_files(found: Definition) -> dict[str, bytes]:
    """Return ``vocab.json`` and ``merges.txt`` of a tokenizer that has no added tokens."""
    vocab = dict(sorted(found.vocab.items(), key=lambda entry: entry[1]))
    merges = "".join(f"{left} {right}\n" for left, right in found.merges)
    return {
        VOCAB_FILE: json.dumps(vocab, ensure_ascii=False, separators=(",", ":")).encode(),
        MERGES_FILE: f"#version: 0.2\n{merges}".encode(),
    }


# JSON


def _object(data: bytes) -> dict[str, Any]:
    return _object_of("the file", strict_json.parse(data))


def _object_of(name: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {shown(found)}; expected an object")
    return found


# The entries of a tokenizer.json, with the values that are accepted

_Accepted = tuple[Any, ...] | Callable[[Any], bool] | None
"""The values that an entry may have, or a function that returns whether a value is accepted. None accepts all."""


def _is_the_text_alone(template: Any) -> bool:
    """Return whether a template is the text alone, without added tokens."""
    return isinstance(template, list) and [set(step) if isinstance(step, dict) else None for step in template] == [
        {"Sequence"}
    ]


# The steps before and after the model. Each entry has the name of a list of such steps, the accepted kinds with their
# options, and the reason why other kinds are refused.
_COMPONENTS: dict[str, tuple[str, dict[str, dict[str, _Accepted]], str]] = {
    "normalizer": (
        "normalizers",
        {},
        "it changes characters of a text, so decoding would return another text",
    ),
    "pre_tokenizer": (
        "pretokenizers",
        {"ByteLevel": {"add_prefix_space": (False,), "use_regex": (True,), "trim_offsets": None}},
        "GPT-2 splits a text into words with ByteLevel only, which adds no space before the text and uses its regex",
    ),
    "post_processor": (
        "processors",
        {
            "ByteLevel": {
                "add_prefix_space": None,
                "trim_offsets": None,
                "use_regex": None,
            },  # these options change only the offsets of tokens, not the ids
            "TemplateProcessing": {"single": _is_the_text_alone, "pair": None, "special_tokens": None},
        },
        "it adds tokens to each text, which GPT-2 does not",
    ),
    "decoder": (
        "decoders",
        {"ByteLevel": {"add_prefix_space": None, "trim_offsets": None, "use_regex": None}},  # these options do nothing
        "GPT-2's ids stand for bytes",
    ),
}

_MODEL: dict[str, tuple[_Accepted, str]] = {
    "type": (("BPE",), "expected a BPE"),
    "vocab": (None, ""),
    "merges": (None, ""),
    "dropout": ((None, 0), "the ids of a text would be random; save the tokenizer without dropout"),
    "continuing_subword_prefix": ((None, ""), "GPT-2 marks no token that continues a word"),
    "end_of_word_suffix": ((None, ""), "GPT-2 marks no token that ends a word"),
    "byte_fallback": ((False, None), "GPT-2's vocabulary has every byte already"),
    "ignore_merges": ((False, None), "GPT-2 applies merges even to a word that is in its vocabulary"),
    "unk_token": (None, ""),  # used only for characters that the vocabulary lacks; `Tokenizer.encode` refuses these
    "fuse_unk": (None, ""),
}
_ADDED: dict[str, tuple[_Accepted, str]] = {
    "id": (None, ""),
    "content": (lambda content: isinstance(content, str) and content != "", "expected text"),
    "special": ((True, False), "expected true or false"),
    "normalized": ((True, False), "expected true or false"),
    "single_word": ((False,), "whether a text holds the token must not depend on the characters around it"),
    "lstrip": ((False,), "white space before the token would be lost, so decoding would return another text"),
    "rstrip": ((False,), "white space after the token would be lost, so decoding would return another text"),
    "__type": (None, ""),
}
_FILE: dict[str, tuple[_Accepted, str]] = {
    "version": (("1.0",), "expected 1.0"),
    "model": (None, ""),
    "added_tokens": (lambda tokens: isinstance(tokens, list), "expected a list"),
    "truncation": (None, ""),  # truncation and padding are for batches, and are off by default
    "padding": (None, ""),
    **{name: (None, "") for name in _COMPONENTS},
}


def check_tokenizer(found: Mapping[str, Any]) -> None:
    """Raise an error if a ``tokenizer.json`` is not a byte-level BPE that works as GPT-2's does."""
    model = _object_of("model", found.get("model"))
    kind = model.get("type", "BPE" if "merges" in model else "one without a type")  # files from 2020 have no type
    cutters = {name: _sequence(name, found.get(name)) for name in _COMPONENTS}
    if kind != "BPE" or not any(part.get("type") == "ByteLevel" for part in cutters["pre_tokenizer"]):
        said = " and ".join(str(part.get("type")) for part in cutters["pre_tokenizer"]) or "no pre-tokenizer"
        raise ValueError(f"expected a byte-level BPE, such as GPT-2's; got the model {kind} after {said}")
    _check_entries("", found, _FILE)
    _check_entries("model.", model, _MODEL)
    for name in ("vocab", "merges"):
        if name not in model:
            raise ValueError(f"model.{name} is missing")
    for name, parts in cutters.items():
        _, kinds, why = _COMPONENTS[name]
        for part in parts:
            if (step := part.get("type")) not in [*kinds]:
                raise ValueError(f"{name} is {shown(step)}; {why}")
            options = {"type": (None, ""), **{option: (value, why) for option, value in kinds[step].items()}}
            _check_entries(f"{name}.", part, options)
    if len(cutters["pre_tokenizer"]) > 1 or "add_prefix_space" not in cutters["pre_tokenizer"][0]:
        raise ValueError(f"pre_tokenizer is {shown(found['pre_tokenizer'])}; {_COMPONENTS['pre_tokenizer'][2]}")


def _sequence(name: str, part: Any) -> list[dict[str, Any]]:
    """Return the steps of a component. It may be absent, one step, or a sequence of components."""
    if part is None:
        return []
    entries = _object_of(name, part)
    if entries.get("type") != "Sequence":
        return [entries]
    inside = entries.get(_COMPONENTS[name][0])
    if not isinstance(inside, list):
        raise ValueError(f"{name} is {shown(part)}; expected {_COMPONENTS[name][0]}, as a list")
    return [each for one in inside for each in _sequence(name, one)]


def _check_entries(where: str, found: Mapping[str, Any], known: Mapping[str, tuple[_Accepted, str]]) -> None:
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"{where}{name} is not a known entry and may change the ids; expected {', '.join(known)}")
        accepted, why = known[name]
        if accepted is not None and not (accepted(value) if callable(accepted) else value in accepted):
            raise ValueError(f"{where}{name} is {shown(value)}; {why}")


# Special tokens and other added tokens

_SETTINGS = {
    "add_prefix_space": "transformers would add a space before each text, so decoding would return another text",
    "add_bos_token": "transformers would add a token before each text",
    "add_eos_token": "transformers would add a token after each text",
}
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # as ordered in transformers


def _check_settings(settings: Mapping[str, Any], alone: bool) -> None:
    """Raise an error for settings of a ``tokenizer_config.json`` that change the ids.

    If there is also a ``tokenizer.json`` (``alone`` is False), that file defines the tokens before and after a text, so
    the settings for these tokens are not checked.
    """
    for name, why in _SETTINGS.items():
        if settings.get(name) and (alone or name == "add_prefix_space"):
            raise ValueError(f"{name} is {shown(settings[name])}; {why}: save the tokenizer without it")


def _special_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the special tokens that the entries of ``tokenizer_config.json`` or ``special_tokens_map.json`` name."""
    others = [name for name in settings if name.endswith("_token") and name not in _NAMED]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = [settings.get(name) for name in _NAMED]
    values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [extra]
    values += [settings[name] for name in others]
    names = (value.get("content") if isinstance(value, dict) else value for value in values)
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def _added(vocab: Mapping[str, int], listed: Iterable[Any], special: Collection[str]) -> dict[str, AddedToken]:
    """Return the added tokens: those that are listed, and those that are named as special tokens.

    transformers ignores the ids in the file, and numbers the tokens that are not in the vocabulary consecutively. A
    file with other ids is refused, because it is unknown whether the model was trained with the file's ids or with
    those of transformers.
    """
    found: dict[str, AddedToken] = {}
    tokens = [_object_of("an added token", token) for token in listed]
    for token in tokens:
        _check_entries(f"the added token {shown(token.get('content'))}: ", token, _ADDED)
        if "content" not in token or type(token.get("id")) is not int:
            raise ValueError(f"the added token {shown(token)} lacks its text or its id")
        token["content"].encode()  # raises an error for a lone surrogate, which has no UTF-8 form
    following = len(vocab)
    for token in sorted(tokens, key=lambda token: token["id"]):
        content, said = token["content"], token["id"]
        known = found[content].id if content in found else vocab.get(content)
        if said != (given := following if known is None else known):
            raise ValueError(
                f"the added token {content!r} has the id {said}, but transformers gives it {given}: save the tokenizer "
                f"with ids that follow the vocabulary's without a gap"
            )
        following += known is None
        is_special = bool(token.get("special", False))
        found[content] = AddedToken(given, is_special, bool(token.get("normalized", not is_special)))
    for content in special:
        if content not in found:
            found[content] = AddedToken(vocab.get(content, following), special=True, normalized=False)
            following += content not in vocab
        found[content] = found[content]._replace(special=True)
    # The end of text is special even if the file lists it as an ordinary token.
    if END_OF_TEXT not in special and (END_OF_TEXT in vocab or END_OF_TEXT in found):
        given = found[END_OF_TEXT].id if END_OF_TEXT in found else vocab[END_OF_TEXT]
        found[END_OF_TEXT] = AddedToken(given, special=True, normalized=False)
    _check_unique([*vocab.items(), *((content, token.id) for content, token in found.items())])
    return found


def _check_unique(entries: Iterable[tuple[str, int]]) -> None:
    by_id: dict[int, str] = {}
    for entry, token in entries:
        if (other := by_id.setdefault(token, entry)) != entry:
            raise ValueError(f"{other!r} and {entry!r} have the same id, {token}: decoding could not tell them apart")


# The vocabulary and the merges. The tokenizers package could read these files three times as fast (GPT-2's in 65 ms
# instead of 200). But the package silently takes ids modulo 2**32, uses the last of two equal lines, and accepts a file
# that was truncated.


def _vocab(ids: Any) -> dict[str, int]:
    """Return the id of each entry of a vocabulary."""
    for entry, token in _object_of("the vocabulary", ids).items():
        if type(token) is not int or not 0 <= token < 2**32:
            raise ValueError(f"the id of {entry!r} is {shown(token)}; expected a whole number below 2**32")
    _check_unique(ids.items())
    return dict(ids)


def _read_merges(text: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that a BPE merges, in order, from the text of a file that has one pair on each line."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    start = int(lines[0].startswith("#version") or lines == [""])
    merges = _merges(lines[start:], ids, "line {}", start + 1)
    last = max((ids[left + right] for left, right in merges), default=-1)
    for entry, token in ids.items():  # special tokens may come after the merges, but no pair of entries spells them
        if token > last and any(entry[:i] in ids and entry[i:] in ids for i in range(1, len(entry))):
            raise ValueError(f"no line merges two entries into {entry!r}, whose id is {token}: the file is truncated")
    return list(merges)


def _merges(
    lines: Any, ids: Mapping[str, int], where: str = "model.merges[{}]", start: int = 0
) -> dict[tuple[str, str], int]:
    """Return the position of each merge in a list of lines ``left right`` or of pairs."""
    if not isinstance(lines, list):
        raise ValueError(f"model.merges is {shown(lines)}; expected a list")
    merges: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start):
        pair = line.split(" ", 1) if isinstance(line, str) else line
        if isinstance(line, str) and len(pair) == 1:
            pair = [line, ""]
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"{where.format(number)} is {shown(line)}; expected two entries")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            lacking = next(entry for entry in (left, right, left + right) if entry not in ids)
            said = repr(line[:80]) if isinstance(line, str) else shown(line)
            raise ValueError(f"{where.format(number)}, {said}: {lacking[:80]!r} is not in the vocabulary")
        if (first := merges.setdefault((left, right), number)) != number:
            raise ValueError(f"{where.format(number)}, {shown(line)}, repeats {where.format(first)}")
    return merges
