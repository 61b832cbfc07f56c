"""Byte-level BPE: from text to token ids and back."""

from __future__ import annotations

import codecs
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from . import checks
from .checks import shown
from .tokenizer_files import END_OF_TEXT, TOKENIZER_FILE, Definition, definition, pair_of_files, read_files


class Tokenizer:
    """GPT-2's tokenizer, built on the tokenizers package. With GPT-2's files it gives the same ids as tiktoken.

    Decoding the ids of a text returns the text. If a text spells a special token such as ``<|endoftext|>``, it is
    encoded as ordinary text unless that token is allowed. All ids can be decoded: bytes that are not UTF-8 become
    U+FFFD. A tokenizer with a step that GPT-2 does not have, such as a normalizer, dropout or a space before each text,
    is refused, and the message names that step.

    Added tokens that are not special are found in every text, as in transformers.

    The Unicode tables of the tokenizers package decide which characters are letters, numbers or spaces. The tables of
    tokenizers 0.23 and of tiktoken 0.14 (Unicode 16) are equal for every code point.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        A byte-level BPE. `Tokenizer.load` makes one from files.

    Raises
    ------
    TypeError
        If it is not a `tokenizers.Tokenizer`.
    ValueError
        If it is not a byte-level BPE that works as GPT-2's does, or if two entries of its vocabulary have the same id.

    Examples
    --------
    A tokenizer of the 256 bytes, without merges:

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
        if not isinstance(tokenizer, tokenizers.Tokenizer):
            raise TypeError(
                f"tokenizer is {shown(tokenizer)}; expected a tokenizers.Tokenizer (a tokenizer of transformers "
                f"has one as its backend_tokenizer), or a directory for Tokenizer.load"
            )
        try:
            files = {TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode()}
        except Exception as error:  # the package raises this class for a component that was written in Python
            raise ValueError(f"the tokenizer cannot be written down as {TOKENIZER_FILE}: {error}") from error
        self._define(definition(files), files)

    def _define(self, found: Definition, files: dict[str, bytes]) -> None:
        self._files, self.definition = files, found
        self._bpe = tokenizers.Tokenizer(models.BPE(found.vocab, found.merges))
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._added = found.added
        self._added_by_id = {token.id: content for content, token in found.added.items()}
        self._n_base = 1 + max((id for entry, id in found.vocab.items() if entry not in found.added), default=-1)
        self._n_vocab = max(self._n_base, 1 + max(self._added_by_id, default=-1))
        self._patterns: dict[frozenset[str], list[re.Pattern[str]]] = {}

    @classmethod
    def _from_files(cls, files: dict[str, bytes], directory: Path | None = None) -> Tokenizer:
        made = cls.__new__(cls)
        made._define(definition(files, directory), files)
        return made

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """Return the tokenizer that the content of a ``tokenizer.json`` defines."""
        return cls._from_files({TOKENIZER_FILE: data})

    @classmethod
    def from_bpe(cls, bpe: models.BPE) -> Tokenizer:
        """Return GPT-2's tokenizer with another vocabulary and other merges.

        `save` then writes it as ``vocab.json`` and ``merges.txt``.
        """
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found = definition({TOKENIZER_FILE: tokenizer.to_str().encode()})
        return cls._from_files(pair_of_files(found))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer | None:
        """Read ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``. Return None if there is neither.

        ``tokenizer.json`` contains the vocabulary, the merges and the added tokens. ``vocab.json`` and ``merges.txt``
        contain only the vocabulary and the merges; the added tokens are then in ``added_tokens.json`` or
        ``tokenizer_config.json``. ``tokenizer_config.json`` or ``special_tokens_map.json`` lists the special tokens. In
        OpenAI's release, ``vocab.json`` is named ``encoder.json``, and ``merges.txt`` is named ``vocab.bpe``.

        Raises
        ------
        ValueError
            If a file is malformed, or describes a tokenizer that does not work as GPT-2's does. The message names the
            file and the entry.
        OSError
            If something other than a regular file has one of these names.
        """
        where = checks.path("directory", directory)
        files = read_files(where)
        return None if files is None else cls._from_files(files, where)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files, unchanged, into an existing directory."""
        where = checks.path("directory", directory)
        for name, content in self._files.items():
            (where / name).write_bytes(content)

    def __len__(self) -> int:
        """Return the number of entries of the vocabulary, including added tokens."""
        return self._bpe.get_vocab_size() + sum(self._bpe.token_to_id(content) is None for content in self._added)

    @property
    def n_vocab(self) -> int:
        """The smallest ``n_vocab`` of a model that has all ids: the largest id plus 1. Smaller ids may be unused."""
        return self._n_vocab

    @property
    def n_base(self) -> int:
        """The same as `n_vocab`, but without added tokens, whose ids occur only in texts that spell such a token."""
        return self._n_base

    @property
    def special_tokens(self) -> dict[str, int]:
        """The id of each special token, by name."""
        special = ((content, token.id) for content, token in self._added.items() if token.special)
        return dict(sorted(special, key=operator.itemgetter(1)))

    @property
    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``, if the vocabulary has one."""
        return self._added[END_OF_TEXT].id if END_OF_TEXT in self._added else None

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        """Return the ids of a text.

        Parameters
        ----------
        text : str
            The text. `decode` converts the ids back into this text.
        allow_special : bool or collection of str, default False
            The special tokens that become one id if the text spells them: none (False), all (True), or those with these
            names. Other special tokens are encoded as ordinary text. Do not allow special tokens in text from an
            untrusted source: the author of the text could end the prompt early, or impersonate another speaker of a
            dialogue. If two special tokens begin at the same character, the longer one is used.

        Raises
        ------
        TypeError
            If the text is not a str, or ``allow_special`` is a str.
        ValueError
            If the text contains a lone surrogate, which is half a character, or a character that the vocabulary cannot
            spell; if all special tokens are allowed, and the text contains ``<|endoftext|>``, but the vocabulary does
            not; or if ``allow_special`` names a token that is not a special token of the vocabulary.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> from portable_gpt2.checkpoint import SHIPPED
        >>> tokenizer = pg.Tokenizer.load(SHIPPED / "shakespeare")
        >>> tokenizer.special_tokens
        {'<|endoftext|>': 0}
        >>> tokenizer.encode("<|endoftext|>", allow_special=["<|endoftext|>"])
        [0]
        >>> len(tokenizer.encode("<|endoftext|>"))
        9
        """
        if not isinstance(text, str):
            raise TypeError(f"expected text as a str; got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text, {text[error.start]!r}, is a lone surrogate, which has no UTF-8 "
                f"form: decode the text with errors='replace' when you read it"
            ) from None
        allowed = self.allowed(allow_special)
        if allow_special is True and self.end_of_text is None and END_OF_TEXT in text:
            raise ValueError(f"the text holds {END_OF_TEXT}, which the vocabulary lacks: do not allow it for this text")
        ids: list[int] = []
        start = 0
        for part in self._parts(text, allowed):
            if isinstance(part, int):
                ids.append(part)
                start += len(self._added_by_id[part])
            else:
                self._check_spelling(part, start)
                ids += self._bpe.encode(part, add_special_tokens=False).ids
                start += len(part)
        return ids

    def allowed(self, allow_special: bool | Collection[str]) -> frozenset[str]:
        """Return the special tokens that a value of `encode`'s parameter ``allow_special`` allows.

        Raises
        ------
        TypeError, ValueError
            As for `encode`.
        """
        if isinstance(allow_special, bool):
            return frozenset(self.special_tokens if allow_special else ())
        if isinstance(allow_special, str) or not isinstance(allow_special, Collection):
            hint = f" ([{allow_special!r}] names one)" if isinstance(allow_special, str) else ""
            raise TypeError(f"allow_special is {shown(allow_special)}; expected True, False, or a list of names{hint}")
        for name in allow_special:
            if not isinstance(name, str):
                raise TypeError(f"allow_special names {shown(name)}; expected the names of special tokens, each a str")
            if name not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise ValueError(
                    f"allow_special names {shown(name)}, which is not a special token of this tokenizer; it has {known}"
                )
        return frozenset(allow_special)

    def found_whole(self, allowed: frozenset[str]) -> list[str]:
        """Return the added tokens to search for in a text: the allowed special tokens, and all that are not special."""
        return [content for content, token in self._added.items() if not token.special or content in allowed]

    def _parts(self, text: str, allowed: frozenset[str]) -> list[str | int]:
        """Split a text at added tokens. Return their ids and the pieces of text between them, in order."""
        parts: list[str | int] = [text]
        for pattern in self._splitters(allowed):
            split = ([part] if isinstance(part, int) else self._split(pattern, part) for part in parts)
            parts = [each for found in split for each in found]
        return parts

    def _split(self, pattern: re.Pattern[str], text: str) -> list[str | int]:
        return [self._added[part].id if i % 2 else part for i, part in enumerate(pattern.split(text))]

    def _splitters(self, allowed: frozenset[str]) -> list[re.Pattern[str]]:
        """Return the patterns that find added tokens, to be applied one after the other.

        If two tokens begin at the same character, a pattern finds the longer one.
        """
        if allowed not in self._patterns:
            whole = sorted(self.found_whole(allowed), key=len, reverse=True)
            rounds = [
                [content for content in whole if self._added[content].normalized is late] for late in (False, True)
            ]
            self._patterns[allowed] = [re.compile(f"({'|'.join(map(re.escape, each))})") for each in rounds if each]
        return self._patterns[allowed]

    def _check_spelling(self, text: str, start: int) -> None:
        """Raise an error for a character that the vocabulary cannot spell. tokenizers would drop it silently."""
        if not self._lacking or self._lacking.isdisjoint(text.encode()):
            return
        i, c = next((i, c) for i, c in enumerate(text, start) if not self._lacking.isdisjoint(c.encode()))
        raise ValueError(
            f"the vocabulary cannot spell character {i} of the text, {c!r}: it lacks {len(self._lacking)} of the 256 "
            f"bytes; a byte-level BPE should have all of them"
        )

    @cached_property
    def _lacking(self) -> frozenset[int]:
        """The bytes that have no token."""
        return frozenset(b[0] for c, b in _BYTES.items() if self._bpe.token_to_id(c) is None)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of ids. Bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        ids : iterable of int
            A list, or an integer array with one axis.

        Raises
        ------
        TypeError
            If an id is not an integer.
        ValueError
            If an id is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> Callable[[int | None], str]:
        """Return a function that decodes one id at a time; called with None at the end, it returns the remaining text.

        A character whose bytes belong to several tokens is returned when it is complete. So the concatenated results
        equal what `decode` returns for all ids at once. An id without text becomes U+FFFD; a model whose vocabulary was
        padded to a round size may sample one.
        """
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def step(token: int | None) -> str:
            if token is None:
                return incremental.decode(b"", final=True)
            spelled = self._spelled(token)
            return incremental.decode("\ufffd".encode() if spelled is None else spelled)

        return step

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token.

        Raises
        ------
        TypeError
            If the id is not an integer.
        ValueError
            If the id is not in the vocabulary.
        """
        spelled = self._spelled(token)
        if spelled is None:
            raise ValueError(f"token id {token} is not in the tokenizer's vocabulary of {len(self)}")
        return spelled

    def _spelled(self, token: int) -> bytes | None:
        if isinstance(token, bool):
            raise TypeError(f"{token} is a bool, which cannot be interpreted as an integer; expected a token id")
        token = operator.index(token)
        if token in self._added_by_id:
            return self._added_by_id[token].encode()
        spelled = self._bpe.id_to_token(token) if 0 <= token < 2**32 else None
        return None if spelled is None else b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in spelled)


def _printable_bytes() -> dict[str, bytes]:
    """Return the byte that each character of the vocabulary stands for, as in GPT-2.

    A printable byte is represented by the character with its code. The other bytes are represented, in order, by the
    characters from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(moved)}


_BYTES = _printable_bytes()
