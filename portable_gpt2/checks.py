"""Validation of the values that users pass. Most checks return the value in Python's own type.

NumPy's narrow integers wrap around and its narrow floats round, so the code computes with the ``int`` or the ``float``
that a check returned. A message names the argument, the value that was given, and the values that were expected.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .registry import to_numpy

LARGEST = 2**63 - 1
"""The largest integer that is accepted: NumPy and the frameworks have no larger signed integers."""

_MANY_ITEMS = 100

MANY = 2**20
"""The largest number of items that are taken from an iterable."""


def shown(x: Any) -> str:
    """Return the repr of a value for a message, shortened to one line. If the repr raises an error, say so."""
    if type(x) in (list, tuple) and len(x) > _MANY_ITEMS:  # the whole repr would take far more memory than x
        return f"{' '.join(repr(x[:_MANY_ITEMS]).split())[:60]}... ({len(x):,} items)"
    try:
        text = " ".join(repr(x).split())
    except Exception as error:  # such as ValueError for an int of more than 4,300 digits
        text = f"<{type(x).__name__} that cannot be printed: {type(error).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def plain(text: str) -> str:
    r"""Return a text in which characters that do not print, such as those that control a terminal, are escaped.

    Examples
    --------
    >>> plain("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'
    """
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return "".join(escaped)


def named(name: str) -> str:
    """Return a name that was read from a file, for a message: its repr if it is long or does not print."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def is_int(x: Any) -> bool:
    """Return whether x is an integer of Python or NumPy. True and 1.0 are not integers."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Return whether x is a real number of Python or NumPy. True is not a number."""
    return isinstance(x, numbers.Real | np.integer | np.floating) and not isinstance(x, bool)


def integer(name: str, x: Any, low: int = 0, high: int = LARGEST, *, note: str = "") -> int:
    """Return an integer from low to high as Python's int.

    Raises
    ------
    ValueError
        If x is not an integer, or is out of the range. The message ends with `note`.

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
    """Return a finite number from low to high as Python's float.

    With `above`, the number must be greater than low. With `below`, the number must be less than high.

    Raises
    ------
    ValueError
        If x is not a number, is NaN or infinite, or is out of the range. The message ends with `note`.

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


def seed(name: str, x: Any) -> int:
    """Return the seed of a random stream, an integer from 0 to 2^64 - 1, as Python's int."""
    if not is_int(x) or not 0 <= x < 2**64:
        raise ValueError(f"{name} is {shown(x)}; expected an int from 0 to 2**64 - 1")
    return operator.index(x)


def path(name: str, x: Any) -> Path:
    """Return a path. An empty path, which would name the current directory, is refused.

    Raises
    ------
    TypeError
        If x is not a str, or an `os.PathLike` that gives a str.
    ValueError
        If the path is empty, or cannot be the name of a file.

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
        raise ValueError(f"{name} is {shown(text)}, which holds a NUL character; a path cannot hold one")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {shown(text)}, which cannot be encoded as the name of a file") from None
    return Path(text)


def memory(n_bytes: int, what: str) -> None:
    """Refuse a computation that needs more memory than the machine has, before it allocates any.

    Parameters
    ----------
    n_bytes : int
        A lower bound of the memory that is needed.
    what : str
        The object that needs the memory. The message begins with it: ``a vocabulary of 10**12 entries``.

    Raises
    ------
    ValueError
        If the machine has less memory. Nothing is refused if the system does not report how much memory it has.
    """
    if n_bytes > (total := total_memory()):
        raise ValueError(
            f"{what} would take {n_bytes / 2**30:,.1f} GiB of memory; this machine has {total / 2**30:,.1f}"
        )


def total_memory() -> float:
    """Return the machine's memory in bytes, or infinity if the system does not report how much memory it has."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def flag(name: str, x: Any) -> bool:
    """Return a bool of Python or NumPy as Python's bool. Other types are refused, because ``bool("no")`` is True."""
    if isinstance(x, bool | np.bool_):
        return bool(x)
    raise ValueError(f"{name} is {shown(x)}; expected true or false")


def several(name: str, x: Any, expected: str) -> list[Any]:
    """Return the items of an iterable as a list. At most `MANY` + 1 items are read, because an iterator may never end.

    Raises
    ------
    TypeError
        If x is not an iterable, or is a single text or dict, whose characters or keys would be the items.
    ValueError
        If x has more than `MANY` items.

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
    except TypeError:  # an array without an axis has __iter__, which raises this error
        items = None
    if items is None:
        raise TypeError(f"{name} is {shown(x)}; expected {expected}, in a list")
    found = list(islice(items, MANY + 1))
    if len(found) > MANY:
        raise ValueError(f"{name} has more than {MANY:,} items; expected {expected}, fewer at a time")
    return found


def token_ids(name: str, given: Any, n_vocab: int, axes: int = 1, *, may_be_empty: bool = False) -> np.ndarray:
    """Return ids from 0 to n_vocab - 1 as a NumPy array of shape [seq], or [batch, seq] with two axes.

    The ids may be given as a list, or as an array of any backend.

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
    """Return a row of token ids, a list or an array. Items such as True, which NumPy would convert, are refused."""
    if isinstance(given, range):
        return given[: n_vocab + 1]  # the first n_vocab + 1 items of a longer range include an item that is not an id
    if not isinstance(given, list | tuple):
        return given if is_int(given) else integers(name, given, "rows of ints")
    for kind in {*map(type, given)} - {int, list, tuple, range}:
        if not issubclass(kind, int | np.integer) or issubclass(kind, bool):
            bad = next(x for x in given if type(x) is kind)
            raise TypeError(f"{name} hold {shown(bad)}; expected integers")
    return given


def integers(name: str, given: Any, expected: str) -> np.ndarray:
    """Return an array of integers, which may belong to any backend, as a NumPy array."""
    try:
        ids = to_numpy(given)
    except TypeError as error:
        raise TypeError(f"{name} are of type {type(given).__name__}; expected {expected}") from error
    if ids.dtype.kind not in "iu" and ids.size:
        raise TypeError(f"{name} have dtype {ids.dtype}; expected integers")
    return ids


def positions(n: int, n_ctx: int) -> None:
    """Refuse a text of more tokens than the model has positions."""
    if n > n_ctx:
        raise ValueError(f"{n} tokens were given; the model has n_ctx = {n_ctx} positions")


def new_tokens(
    max_new_tokens: int, sliding: bool, prompts: Sequence[Sequence[int]], n_ctx: int, *, may_slide: bool = True
) -> int:
    """Return `max_new_tokens` as Python's int. Prompts that leave no room for so many tokens are refused.

    If the caller has no option `sliding`, `may_slide` is false, and the message does not advise to use it.
    """
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    if flag("sliding", sliding):
        if n_ctx < 2:
            raise ValueError("sliding needs a context of at least two tokens; the model has n_ctx = 1")
        return max_new_tokens
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > n_ctx:
        room = n_ctx - longest
        advice = f"give at most {room}" if room > 0 else "shorten the prompt"
        advice += ", or let the window slide (sliding)" if may_slide else ""
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} do not fit into n_ctx = {n_ctx}: "
            f"{advice}"
        )
    return max_new_tokens


def stops(stop: str | int | Iterable[str | int] | None, n_vocab: int) -> tuple[set[int], list[str]]:
    """Return the token ids and the strings that end a text, as two collections."""
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
        elif not 0 <= each < n_vocab:
            raise ValueError(f"stop names {shown(each)}, which is not in the vocabulary of {n_vocab} tokens")
        else:
            ends.add(int(each))
    return ends, strings
