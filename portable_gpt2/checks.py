"""Validation of what users pass. A check returns the value as Python's own type, which the code then computes with.

NumPy's narrow integers wrap around, and its floats round: a number that was validated is an ``int`` or a ``float`` from
here on. Messages name the argument, what was given, and what was expected.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .registry import to_numpy

if TYPE_CHECKING:
    from .config import GPT2Config

LARGEST = 2**63 - 1
"""The largest count that is accepted: more would not fit into the integers of NumPy and of the frameworks."""

MANY = 2**20
"""The most items that are taken from an iterable."""


def shown(x: Any) -> str:
    """Return the repr of a value, shortened to a line: it may have a million characters, or raise."""
    try:
        text = " ".join(repr(x).split())
    except Exception as error:  # an int of more than 4,300 digits has no repr; a stranger's class may raise anything
        text = f"<{type(x).__name__} that cannot be printed: {type(error).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def is_int(x: Any) -> bool:
    """Return whether x is a whole number, Python's or NumPy's. A bool is not one, and neither is 1.0."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Return whether x is a real number, Python's or NumPy's. A bool is not one."""
    return isinstance(x, numbers.Real | np.integer | np.floating) and not isinstance(x, bool)


def integer(name: str, x: Any, low: int = 0, high: int = LARGEST, *, note: str = "") -> int:
    """Return a whole number from low to high as Python's int.

    Raises
    ------
    ValueError
        If x is not a whole number, or is out of the range. `note` is added to what was expected.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.checks import integer
    >>> integer("top_k", np.uint8(200)) + 100
    300
    """
    if is_int(x) and low <= (value := operator.index(x)) <= high:
        return value
    if low == -LARGEST:
        expected = "an int"
    elif high == LARGEST:
        expected = f"an int of at least {low}" if not is_int(x) or x < low else "an int below 2**63"
    else:
        expected = f"an int from {low} to {high}"
    raise ValueError(f"{name} is {shown(x)}; expected {expected}{note and f' ({note})'}")


def number(
    name: str,
    x: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    note: str = "",
) -> float:
    """Return a finite number from low to high as Python's float. With `above` or `below`, that end is left out.

    Raises
    ------
    ValueError
        If x is not a number, is NaN or infinite, or is out of the range. `note` is added to what was expected.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.checks import number
    >>> number("temperature", np.float32(0.5))
    0.5
    """
    try:
        value = float(x) if is_number(x) else math.nan
    except OverflowError:  # an int beyond the largest float
        value = math.nan
    in_range = (low < value if above else low <= value) and (value < high if below else value <= high)
    if in_range and math.isfinite(value):
        return value
    expected = f"a number {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        ends = f"{'below' if below else 'at most'} {high:g}"
        expected = f"{expected} and {ends}" if above or below else f"a number from {low:g} to {high:g}"
    raise ValueError(f"{name} is {shown(x)}; expected {expected}{note and f' ({note})'}")


def seed(x: Any) -> int:
    """Return a seed of a random stream: an int from 0 to 2**64 - 1."""
    if not is_int(x) or not 0 <= x < 2**64:
        raise ValueError(f"seed is {shown(x)}; expected an int from 0 to 2**64 - 1")
    return operator.index(x)


def path(name: str, x: Any) -> Path:
    """Return a path that names something: an empty one would be the current directory.

    Raises
    ------
    TypeError
        If x is not a str or an `os.PathLike` of one.
    ValueError
        If it is empty, or holds a NUL, which no path can.

    Examples
    --------
    >>> from portable_gpt2.checks import path
    >>> path("directory", "")
    Traceback (most recent call last):
    ...
    ValueError: directory is an empty path; if it comes from a variable, the variable is not set
    """
    try:
        text = os.fspath(x)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"{name} is {shown(x)}; expected a path, as a str or a pathlib.Path")
    if not text.strip():
        raise ValueError(f"{name} is an empty path; if it comes from a variable, the variable is not set")
    if "\0" in text:
        raise ValueError(f"{name} is {shown(text)}, which holds a NUL character; no path can")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {shown(text)}, which cannot be the name of a file: it is not text") from None
    return Path(text)


def memory(n_bytes: int, what: str) -> None:
    """Refuse what needs more memory than the machine has, before anything is made.

    Parameters
    ----------
    n_bytes : int
        How many bytes it takes at least.
    what : str
        What takes them, as the message begins: ``a vocabulary of 10**12 entries``.

    Raises
    ------
    ValueError
        If the machine has less memory. Where the system does not say how much it has, nothing is refused.
    """
    if n_bytes > (total := total_memory()):
        raise ValueError(
            f"{what} would take {n_bytes / 2**30:,.1f} GiB of memory; this machine has {total / 2**30:,.1f}"
        )


def total_memory() -> float:
    """Return the machine's memory in bytes; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def flag(name: str, x: Any) -> bool:
    """Return a switch as Python's bool; the text ``no``, which is true, and the number 0 are refused."""
    if isinstance(x, bool | np.bool_):
        return bool(x)
    raise ValueError(f"{name} is {shown(x)}; expected true or false")


def several(name: str, x: Any, expected: str) -> list[Any]:
    """Return the items of an iterable as a list; an iterator that never ends is refused after `MANY` of them.

    Raises
    ------
    TypeError
        If x is not an iterable, or is one text or one dict, whose items would be something else than was meant.
    ValueError
        If it has more than `MANY` items.

    Examples
    --------
    >>> from portable_gpt2.checks import several
    >>> several("prompts", "To be", "texts")
    Traceback (most recent call last):
    ...
    TypeError: prompts is 'To be'; expected texts, in a list
    """
    try:
        items = None if isinstance(x, str | bytes | bytearray | memoryview | Mapping) else iter(x)
    except TypeError:  # an array without an axis has the method, too
        items = None
    if items is None:
        raise TypeError(f"{name} is {shown(x)}; expected {expected}, in a list")
    found = list(islice(items, MANY + 1))
    if len(found) > MANY:
        raise ValueError(f"{name} has more than {MANY:,} items; expected {expected}, fewer at a time")
    return found


def check_ids(given: Any, config: GPT2Config, axes: int, *, may_be_empty: bool = False) -> np.ndarray:
    """Return token ids from outside, [seq] or [batch, seq], as integers on the host, each an id of the vocabulary."""
    return token_ids("token ids", given, config.n_vocab, axes, may_be_empty=may_be_empty)


def token_ids(name: str, given: Any, n_vocab: int, axes: int = 1, *, may_be_empty: bool = False) -> np.ndarray:
    """Return ids from 0 to n_vocab - 1, in a list or an array of any backend, as integers on the host.

    Examples
    --------
    >>> from portable_gpt2.checks import token_ids
    >>> token_ids("seen", [1, True], 384)
    Traceback (most recent call last):
    ...
    TypeError: seen hold True; expected integers
    """
    expected = f"int {'[seq]' if axes == 1 else '[batch, seq]'}"
    if isinstance(given, list | tuple | range):
        rows = [_row(name, row, n_vocab) for row in given] if axes == 2 else _row(name, given, n_vocab)
        try:
            ids = np.asarray(rows) if rows else np.empty(0, np.int64)
        except ValueError as error:
            raise ValueError(f"{name} are ragged; expected {expected}, rows of equal length") from error
    else:
        ids = integers(name, given, f"{expected}, as a list or an array")
    if may_be_empty and ids.shape == (0,):
        return np.empty(0, np.int32)
    if ids.ndim != axes or 0 in ids.shape:
        raise ValueError(f"{name} have shape {list(ids.shape)}; expected {expected}; no dimension may be 0")
    outside = (ids < 0) | (ids >= n_vocab)
    if outside.any():
        one = name.removesuffix("s") if name == "token ids" else f"{name}: token id"
        bad = shown(int(ids[outside][0]))
        raise ValueError(f"{one} {bad} is not in the vocabulary, which has ids 0 to {n_vocab - 1}")
    return ids.astype(np.int32 if n_vocab <= 2**31 else np.int64)


def _row(name: str, given: Any, n_vocab: int) -> Any:
    """Return a row of token ids, a list or an array; in a list, refuse what NumPy would convert to an int."""
    if isinstance(given, range):
        return given[: n_vocab + 1]  # of more numbers than that, one of these is not an id
    if not isinstance(given, list | tuple):
        return given if is_int(given) else integers(name, given, "rows of ints")
    for kind in {*map(type, given)} - {int, list, tuple, range}:
        if not issubclass(kind, int | np.integer) or issubclass(kind, bool):
            bad = next(x for x in given if type(x) is kind)
            raise TypeError(f"{name} hold {shown(bad)}; expected integers")
    return given


def integers(name: str, given: Any, expected: str) -> np.ndarray:
    """Return an array of integers of any backend on the host."""
    try:
        ids = to_numpy(given)
    except TypeError as error:
        raise TypeError(f"{name} are of type {type(given).__name__}; expected {expected}") from error
    if ids.dtype.kind not in "iu" and ids.size:
        raise TypeError(f"{name} have dtype {ids.dtype}; expected integers")
    return ids


def check_length(seq: int, config: GPT2Config) -> None:
    """Refuse more tokens than the model has positions."""
    if seq > config.n_ctx:
        raise ValueError(f"{seq} tokens were given; the model has n_ctx = {config.n_ctx} positions")


def check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: GPT2Config, sliding: bool) -> int:
    """Return how many new tokens were asked for; refuse prompts that do not fit into the context with so many."""
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    if flag("sliding", sliding):
        if config.n_ctx < 2:
            raise ValueError("sliding needs a context of two tokens at least; the model has n_ctx = 1")
        return max_new_tokens
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > config.n_ctx:
        room = config.n_ctx - longest
        advice = f"give at most {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} do not fit into "
            f"n_ctx = {config.n_ctx}: {advice}, or let the window slide (sliding)"
        )
    return max_new_tokens


def check_stop(stop: str | int | Iterable[str | int] | None, config: GPT2Config) -> tuple[set[int], list[str]]:
    """Return the token ids and the strings that end a text."""
    given: list[Any] = [] if stop is None else [stop]
    if given and not isinstance(stop, str) and not is_int(stop):
        given = several("stop", stop, "a token id, a string, or several of them")
    ends: set[int] = set()
    strings: list[str] = []
    for each in given:
        if isinstance(each, str):
            if not each:
                raise ValueError("stop names an empty string, which stands at the beginning of every text")
            strings.append(each)
        elif not is_int(each):
            raise TypeError(f"stop names {shown(each)}; expected token ids or strings")
        elif not 0 <= each < config.n_vocab:
            raise ValueError(f"stop names {shown(each)}, which is not in the vocabulary of {config.n_vocab}")
        else:
            ends.add(int(each))
    return ends, strings
