"""Byte-level BPE: text to token ids and back, one id at a time where text streams."""

from __future__ import annotations

import codecs
import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from . import checks

END_OF_TEXT = "<|endoftext|>"
VOCAB_FILE, MERGES_FILE, TOKENIZER_FILE = "vocab.json", "merges.txt", "tokenizer.json"
ADDED_FILE = "added_tokens.json"  # of old tokenizers of transformers
_PAIRS = (VOCAB_FILE, MERGES_FILE), ("encoder.json", "vocab.bpe")  # Hugging Face's names and OpenAI's


class Tokenizer:
    """GPT-2's tokenizer, on the tokenizers package; with GPT-2's files its ids are tiktoken's.

    Any text comes back from its ids, and text that spells ``<|endoftext|>`` is text unless that is allowed. Any ids
    decode: bytes that are not UTF-8 become U+FFFD.

    What is a letter, a number or a space is the package's to decide, by the Unicode tables that it was built with.
    Those of tokenizers 0.23 and of tiktoken 0.14 (Unicode 16) are the same for every code point.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        A byte-level BPE; `Tokenizer.load` reads one from its files.

    Raises
    ------
    ValueError
        If it is not a byte-level BPE, or two entries of its vocabulary have one id.

    Examples
    --------
    A tokenizer of the 256 bytes, without a merge:

    >>> import tokenizers
    >>> from tokenizers.models import BPE
    >>> from tokenizers.pre_tokenizers import ByteLevel
    >>> bytewise = tokenizers.Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    >>> bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False)
    >>> tokenizer = Tokenizer(bytewise)
    >>> tokenizer.encode("né")
    [77, 127, 102]
    >>> tokenizer.decode([77, 127, 102])
    'né'
    >>> decode = tokenizer.decoder()
    >>> [decode(token) for token in [77, 127, 102]]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if not isinstance(tokenizer.model, models.BPE) or "ByteLevel" not in repr(tokenizer.pre_tokenizer):
            raise ValueError(
                f"expected a byte-level BPE, as GPT-2's is; got the model {type(tokenizer.model).__name__} behind the "
                f"pre-tokenizer {type(tokenizer.pre_tokenizer).__name__}"
            )
        entries: dict[int, str] = {}
        for entry, token in tokenizer.get_vocab().items():
            if (other := entries.setdefault(token, entry)) != entry:
                raise ValueError(f"{other!r} and {entry!r} have one id, {token}: the text of one would be the other's")
        if END_OF_TEXT in (token.content for token in tokenizer.get_added_tokens_decoder().values()):
            tokenizer.add_special_tokens([END_OF_TEXT])  # it may have been added as a word
        tokenizer.encode_special_tokens = True  # as text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._files = [TOKENIZER_FILE]

    @classmethod
    def from_bpe(cls, bpe: models.BPE) -> Tokenizer:
        """Return GPT-2's tokenizer with another vocabulary and other merges: what two files hold, and are saved as."""
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made = cls(tokenizer)
        made._files = [VOCAB_FILE, MERGES_FILE]
        return made

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer | None:
        """Read ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``; None where there is neither.

        The first holds all that the others do, and tokens that were added beside them. OpenAI's ``encoder.json`` and
        ``vocab.bpe`` are the other two by other names.

        Raises
        ------
        ValueError
            If a file is malformed. The message names it.
        """
        directory = checks.path("directory", directory)
        file = directory / TOKENIZER_FILE
        try:
            if file.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            for vocab, merges in ((directory / vocab, directory / merges) for vocab, merges in _PAIRS):
                if not (vocab.is_file() and merges.is_file()):
                    continue
                file = directory / ADDED_FILE
                if file.is_file() and json.loads(file.read_bytes()):
                    raise ValueError(f"holds tokens beside {vocab.name}: save the tokenizer as {TOKENIZER_FILE}")
                file = vocab
                ids = _read_vocab(vocab)
                file = merges
                bpe = models.BPE(ids, _read_merges(merges, ids))
                file = vocab
                return cls.from_bpe(bpe)
        except BaseException as error:  # the package raises Exception itself, or panics, which is not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{file}: {error}") from error
        return None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it into an existing directory, in the files that it came from.

        ``vocab.json`` and ``merges.txt`` cannot hold all of a ``tokenizer.json``: tokens that were added beside the
        vocabulary would be lost, ``<|endoftext|>`` often among them.
        """
        directory = checks.path("directory", directory)
        if self._files == [TOKENIZER_FILE]:
            self._tokenizer.save(str(directory / TOKENIZER_FILE))
        else:
            self._tokenizer.model.save(str(directory))

    def __len__(self) -> int:
        """Return the number of entries of the vocabulary."""
        return self._tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``, if the vocabulary has one."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Parameters
        ----------
        text : str
            What `decode` returns for these ids.
        allow_special : bool, default False
            Whether ``<|endoftext|>`` inside the text is that one token. Leave it off for text from elsewhere: whoever
            wrote it could end the prompt in its midst. Other special tokens are text in any case.

        Raises
        ------
        TypeError
            If it is no str.
        ValueError
            If it holds a lone surrogate, which is half a character, a character that the vocabulary cannot spell, or,
            where that is allowed, an ``<|endoftext|>`` that the vocabulary lacks.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected text as a str; got {type(text).__name__}")
        try:
            spelled = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text, {text[error.start]!r}, is a lone surrogate, which has no UTF-8 "
                f"form: decode the text with errors='replace' where it is read"
            ) from None
        if not self._lacking.isdisjoint(spelled):
            i, c = next((i, c) for i, c in enumerate(text) if not self._lacking.isdisjoint(c.encode()))
            raise ValueError(
                f"the vocabulary cannot spell character {i} of the text, {c!r}: it lacks {len(self._lacking)} of the "
                f"256 bytes, all of which a byte-level BPE should have"
            )
        first, *rest = text.split(END_OF_TEXT) if allow_special else [text]
        ids = self._ids(first)
        if rest:
            end = self.end_of_text
            if end is None:
                raise ValueError(f"the text holds {END_OF_TEXT}, which the vocabulary lacks: do not allow it there")
            for part in rest:
                ids += [end, *self._ids(part)]
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        ids : iterable of int
            A list, or an integer array of one axis.

        Raises
        ------
        TypeError
            If one of them is no integer.
        ValueError
            If one of them is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> Callable[[int | None], str]:
        """Return a function from the next id to the text that it completes; None at the end gives what is left over.

        A character whose bytes are split over tokens is held back until it is whole, so that the pieces joined are
        what `decode` returns for all ids at once. An id without text, which a model padded to a rounder size may draw,
        becomes U+FFFD.
        """
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def step(token: int | None) -> str:
            if token is None:
                return incremental.decode(b"", final=True)
            spelled = self._spelled(token)
            return incremental.decode("\ufffd".encode() if spelled is None else spelled)

        return step

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id stands for.

        Raises
        ------
        TypeError
            If it is no integer.
        ValueError
            If it is not in the vocabulary.
        """
        spelled = self._spelled(token)
        if spelled is None:
            raise ValueError(f"token id {token} is not in the tokenizer's vocabulary of {len(self)}")
        return spelled

    def _spelled(self, token: int) -> bytes | None:
        token = operator.index(token)
        spelled = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        if spelled is None:
            return None
        if token in self._added:
            return spelled.encode()
        return b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in spelled)

    @cached_property
    def _lacking(self) -> frozenset[int]:
        """The bytes that have no token: the package would drop them in silence."""
        return frozenset(b[0] for c, b in _BYTES.items() if self._tokenizer.token_to_id(c) is None)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())


# The package reads these two files as well, three times as fast (GPT-2's in 65 ms against 200), but takes in silence an
# id modulo 2**32, the last of two equal lines, and a file that is cut at the end of a line.


def _read_vocab(file: Path) -> dict[str, int]:
    """Return the id of each entry of a vocabulary."""
    ids = json.loads(file.read_text("utf-8"), object_pairs_hook=_without_doubles)
    if not isinstance(ids, dict):
        raise ValueError(f"expected an object, of entries and their ids; got {type(ids).__name__}")
    for entry, token in ids.items():
        if type(token) is not int or not 0 <= token < 2**32:
            raise ValueError(f"the id of {entry!r} is {token!r}; expected a whole number below 2**32")
    return ids


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    once = dict(pairs)
    if len(once) < len(pairs):
        [(entry, _)] = Counter(entry for entry, _ in pairs).most_common(1)
        raise ValueError(f"{entry!r} stands in it twice")
    return once


def _read_merges(file: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that a BPE merges, in order."""
    lines = file.read_text("utf-8").removesuffix("\n").split("\n")
    start = int(lines[0].startswith("#version") or lines == [""])
    merges: dict[tuple[str, str], int] = {}
    last = -1
    for number, line in enumerate(lines[start:], start=start + 1):
        left, _, right = line.partition(" ")
        made = left + right
        if left not in ids or right not in ids or made not in ids:
            lacking = next(entry for entry in (left, right, made) if entry not in ids)
            raise ValueError(f"line {number}, {line[:80]!r}: {lacking[:80]!r} is not in the vocabulary")
        if (first := merges.setdefault((left, right), number)) != number:
            raise ValueError(f"line {number}, {line!r}, is line {first} again")
        last = max(last, ids[made])
    for entry, token in ids.items():  # after the last, special tokens may follow, which no two entries spell
        if token > last and any(entry[:i] in ids and entry[i:] in ids for i in range(1, len(entry))):
            raise ValueError(f"no line makes {entry!r}, whose id is {token}: the file has lost its end")
    return list(merges)


def _printable_bytes() -> dict[str, bytes]:
    """Return the byte of each printable stand-in: bytes that do not print as themselves move to 256 and on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(moved)}


_BYTES = _printable_bytes()
