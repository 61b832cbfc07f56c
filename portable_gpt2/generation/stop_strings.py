"""Find the first of several stop strings in a text that arrives character by character."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class StopStrings:
    """Stop strings as an automaton, which finds them in a single pass over a text.

    Aho and Corasick, "Efficient string matching: an aid to bibliographic search", 1975. States are created when a text
    first reaches them. The only cost of a stop string that never begins to appear in a text is that it is sorted.

    Examples
    --------
    >>> from portable_gpt2.generation.stop_strings import StopStrings
    >>> stops = StopStrings(["two", "once"])
    >>> state = stops.start
    >>> for c in "one two":
    ...     state = stops.after(state, c)
    >>> state.depth, state.found
    (3, 3)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted(set(strings))
        self.start = State(0, 0, len(self._strings))

    def after(self, state: State, c: str) -> State:
        """Return the state after one more character."""
        created: list[State] = []
        at: State | None = state
        while at is not None:
            if (known := at.next.get(c)) is not None:
                break
            if (child := self._child(at, c)) is not None:
                at.next[c] = child
                created.append(child)
            at = at.suffix
        else:
            known = self.start
        for child in reversed(created):  # the suffix of each state is the state that was created after it
            child.suffix = known
            child.found = child.depth if len(self._strings[child.first]) == child.depth else known.found
            known = child
        return known

    def _child(self, state: State, c: str) -> State | None:
        """Return a new state for the prefix followed by c; None if no stop string begins with this longer prefix."""
        depth = state.depth

        def at_depth(string: str) -> str:
            return string[depth : depth + 1]

        first = bisect_left(self._strings, c, state.first, state.last, key=at_depth)
        last = bisect_right(self._strings, c, first, state.last, key=at_depth)
        return State(depth + 1, first, last) if first < last else None


class State:
    """A state of the automaton: the longest suffix of the text that is a prefix of a stop string.

    Attributes
    ----------
    depth : int
        The length of the prefix.
    found : int
        The length of the longest stop string that the text ends with; 0 if there is none.
    first, last : int
        The stop strings with this prefix are those from `first` to `last` - 1, in sorted order.
    suffix : State or None
        The state of the longest proper suffix of the prefix that is itself a prefix of a stop string; None for the
        empty prefix.
    next : dict
        The states that were created for the prefix followed by one more character, by that character.
    """

    __slots__ = ("depth", "first", "found", "last", "next", "suffix")

    def __init__(self, depth: int, first: int, last: int) -> None:
        self.depth, self.first, self.last, self.found = depth, first, last, 0
        self.suffix: State | None = None
        self.next: dict[str, State] = {}
