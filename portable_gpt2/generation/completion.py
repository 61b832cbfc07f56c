"""From drawn tokens to text: whole characters, up to a stop string."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .decoder import Decoder, Text

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


class _State:
    """How far the text has come into the stop strings: their longest prefix that the text ends with."""

    __slots__ = ("depth", "first", "found", "last", "next", "suffix")

    def __init__(self, depth: int, first: int, last: int) -> None:
        self.depth = depth
        """How long the prefix is. The strings that begin with it are those from `first` to `last` - 1, sorted."""
        self.first, self.last = first, last
        self.found = 0
        """The length of the longest string that the text ends with here; 0 if there is none."""
        self.suffix: _State | None = None
        """The state of the longest proper suffix of this prefix; the empty prefix has none."""
        self.next: dict[str, _State] = {}


class Stops:
    """Stop strings as an automaton, which finds them while a text is read, in time proportional to the text.

    Aho and Corasick, "Efficient string matching: an aid to bibliographic search", 1975. A state is made when a text
    first reaches it, so that strings that no text begins with cost nothing but being sorted.

    Examples
    --------
    >>> from portable_gpt2.generation.completion import Stops
    >>> stops, state = Stops(["two", "once"]), None
    >>> for c in "one two":
    ...     state = stops.after(state or stops.start, c)
    >>> state.depth, state.found
    (3, 3)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted(set(strings))
        self.start = _State(0, 0, len(self._strings))

    def after(self, state: _State, c: str) -> _State:
        """Return the state after one more character."""
        made: list[_State] = []
        at: _State | None = state
        while at is not None:
            if (known := at.next.get(c)) is not None:
                break
            if (child := self._child(at, c)) is not None:
                at.next[c] = child
                made.append(child)
            at = at.suffix
        else:
            known = self.start
        for child in reversed(made):  # the suffix of each is the next shorter one
            child.suffix = known
            child.found = child.depth if len(self._strings[child.first]) == child.depth else known.found
            known = child
        return known

    def _child(self, state: _State, c: str) -> _State | None:
        depth = state.depth

        def at_depth(string: str) -> str:
            return string[depth : depth + 1]

        first = bisect_left(self._strings, c, state.first, state.last, key=at_depth)
        last = bisect_right(self._strings, c, first, state.last, key=at_depth)
        return _State(depth + 1, first, last) if first < last else None


class Reader:
    """The text of tokens that come one by one.

    `read` returns the part of the text so far that is certain: a character that is split over tokens, and a possible
    beginning of a stop string, are held back. The text ends before the stop string that is complete first.

    Parameters
    ----------
    decode : callable
        A `Tokenizer.decoder`.
    stops : Stops or strs
        Strings that end the text and are not part of it. Readers that share a `Stops` prepare the strings once.

    Attributes
    ----------
    ended : bool
        Whether a stop string was read. There is no more text then.

    Examples
    --------
    >>> from portable_gpt2.generation.completion import Reader
    >>> words = {0: "one t", 1: "wo", 2: " three"}
    >>> reader = Reader(lambda token: "" if token is None else words[token], ["two"])
    >>> [reader.read(token) for token in (0, 1)], reader.ended
    (['one ', ''], True)
    """

    def __init__(self, decode: Callable[[int | None], str], stops: Stops | Iterable[str] = ()) -> None:
        self._decode, self._stops = decode, stops if isinstance(stops, Stops) else Stops(stops)
        self._state, self._held, self._n_held = self._stops.start, deque[str](), 0
        self.ended = False

    def read(self, token: int | None) -> str:
        """Return the text that is certain after one more token; None, after the last, gives the rest."""
        piece = self._decode(token)
        start = self._n_held
        if piece:
            self._held.append(piece)
            self._n_held += len(piece)
        for i, c in enumerate(piece, 1):
            self._state = self._stops.after(self._state, c)
            if self._state.found:
                self.ended = True
                return self._release(start + i - self._state.found)
        return self._release(self._n_held if token is None else self._n_held - self._state.depth)

    def _release(self, n: int) -> str:
        """Return the first n characters that are held back, and hold them no longer."""
        released = []
        self._n_held -= n
        while n:
            piece = self._held.popleft()
            released.append(piece[:n])
            if len(piece) > n:
                self._held.appendleft(piece[n:])
            n -= len(released[-1])
        return "".join(released)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token makes certain, and the rest after the last, until the text has ended."""
        for token in tokens:
            yield self.read(token)
            if self.ended:
                return
        if rest := self.read(None):
            yield rest


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
    stops: Stops,
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
