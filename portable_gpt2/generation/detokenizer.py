"""Incremental conversion of tokens to text, which returns only whole characters and no part of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from .stop_strings import StopStrings


class StreamingDetokenizer:
    """Converts tokens to text one by one.

    `read` returns only text that is certain. It holds back the bytes of an incomplete character, and characters that
    may turn out to begin a stop string. The text ends before the first stop string that is complete.

    Parameters
    ----------
    decode : callable
        A `Tokenizer.decoder`.
    stops : StopStrings or strs
        Strings that end the text and are not part of it. A `StopStrings` can serve several detokenizers.

    Attributes
    ----------
    ended : bool
        Whether a stop string was found. If so, there is no more text.

    Examples
    --------
    >>> from portable_gpt2.generation.detokenizer import StreamingDetokenizer
    >>> words = {0: "one t", 1: "wo", 2: " three"}
    >>> detokenizer = StreamingDetokenizer(lambda token: "" if token is None else words[token], ["two"])
    >>> [detokenizer.read(token) for token in (0, 1)], detokenizer.ended
    (['one ', ''], True)
    """

    def __init__(self, decode: Callable[[int | None], str], stops: StopStrings | Iterable[str] = ()) -> None:
        self._decode, self._stops = decode, stops if isinstance(stops, StopStrings) else StopStrings(stops)
        self._state, self._held, self._n_held = self._stops.start, deque[str](), 0
        self.ended = False

    def read(self, token: int | None) -> str:
        """Return the text that is certain after one more token. For None, after the last token, return the rest."""
        piece = self._decode(token)
        n_before = self._n_held
        if piece:
            self._held.append(piece)
            self._n_held += len(piece)
        for i, c in enumerate(piece, 1):
            self._state = self._stops.after(self._state, c)
            if self._state.found:
                self.ended = True
                return self._release(n_before + i - self._state.found)
        return self._release(self._n_held if token is None else self._n_held - self._state.depth)

    def _release(self, n: int) -> str:
        """Remove the first n characters that are held back, and return them."""
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
        """Yield what `read` returns for each token, until a stop string ends the text; at the end, yield the rest."""
        for token in tokens:
            yield self.read(token)
            if self.ended:
                return
        if rest := self.read(None):
            yield rest
