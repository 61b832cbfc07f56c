"""From drawn tokens to text: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from .generate import Decoder, Text
from .sampling import Sampling
from .tokenizer import Tokenizer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Parameters
    ----------
    prompt : str
        The prompt.
    text : str
        The continuation only.
    tokens : list of int
        The ids that were drawn, without the one of ``stop`` that ended them, and with those that spelled a stop string.
    index : int
        Which of several samples of the prompt it is, from 0.
    finish_reason : str
        ``stop`` if it ended by itself, ``length`` if max_new_tokens did it.
    seed : int
        The seed that it was sampled with: with it, the same prompt gives the same text.

    Examples
    --------
    >>> from portable_gpt2 import Completion
    >>> Completion("To be", ", or not", [11, 393, 407], 0, "length", seed=7).text
    ', or not'
    """

    prompt: str
    text: str
    tokens: list[int]
    index: int
    finish_reason: str
    seed: int


class Reader:
    """The text of tokens that come one by one.

    Of what was read, `read` returns what is certain: a character that is split over tokens, and what may be the
    beginning of a stop string, are held back. The text ends before the stop string that is complete first.

    Parameters
    ----------
    decode : callable
        A `Tokenizer.decoder`.
    stops : strs
        Strings that end the text and are not part of it.

    Attributes
    ----------
    ended : bool
        Whether a stop string was read. There is no more text then.

    Examples
    --------
    >>> from portable_gpt2.completion import Reader
    >>> words = {0: "one t", 1: "wo", 2: " three"}
    >>> reader = Reader(lambda token: "" if token is None else words[token], ["two"])
    >>> [reader.read(token) for token in (0, 1)], reader.ended
    (['one ', ''], True)
    """

    def __init__(self, decode: Callable[[int | None], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops, self._held, self.ended = decode, stops, "", False

    def read(self, token: int | None) -> str:
        """Return the text that is certain after one more token; None, after the last, gives what is left."""
        text = self._held + self._decode(token)
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) if token is None else len(text) - max(map(self._begun(text), self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token makes certain, and what is left after the last, until the text has ended."""
        for token in tokens:
            yield self.read(token)
            if self.ended:
                return
        if rest := self.read(None):
            yield rest

    @staticmethod
    def _begun(text: str) -> Callable[[str], int]:
        """Return how many characters at the end of the text may be the beginning of a stop string."""
        return lambda stop: next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


class Row(NamedTuple):
    """One text that is to be completed: its prompt, as text and as ids, and which of several samples it is."""

    prompt: str
    ids: list[int]
    sampling: Sampling
    sample: int


def complete(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    max_new_tokens: int,
    ends: set[int],
    stops: Sequence[str],
) -> Iterator[Completion]:
    """Complete a batch; each row ends by itself, at a token of ends or before a string of stops."""
    texts = [Text(list(row.ids), row.sampling, row.sample) for row in rows]
    readers = {text: Reader(tokenizer.decoder(), stops) for text in texts}
    written: dict[Text, list[str]] = {text: [] for text in texts}
    for text in decoder.stream(texts, max_new_tokens):
        if text.tokens[-1] in ends:
            text.tokens.pop()
            text.ended = True
        else:
            written[text].append(readers[text].read(text.tokens[-1]))
            text.ended = readers[text].ended
    for text, row in zip(texts, rows, strict=True):
        if not readers[text].ended:
            written[text].append(readers[text].read(None))
        reason = "stop" if text.ended or readers[text].ended else "length"
        assert row.sampling.seed is not None
        ids = text.tokens[len(row.ids) :]
        yield Completion(row.prompt, "".join(written[text]), ids, row.sample, reason, row.sampling.seed)


def batched(items: Iterable[_T], n: int) -> Iterator[list[_T]]:
    """Yield lists of n items, the last of what is left."""
    iterator = iter(items)
    while batch := list(islice(iterator, n)):
        yield batch
