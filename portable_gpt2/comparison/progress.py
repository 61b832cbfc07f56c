"""The progress of a comparison: stages, each of which passes its items on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[Iterable[Any], str, str], Iterable[Any]]
"""Returns the items of a stage, given these, what is done in the stage, and what its items are."""


def silent(items: Iterable[Any], what: str, unit: str) -> Iterable[Any]:
    """Return the items, and show nothing."""
    return items


@contextlib.contextmanager
def counted(progress: Progress, items: Iterable[Any], what: str, unit: str = "results") -> Iterator[Callable[[], None]]:
    """Provide a function that is called after each item, for a stage that is not a loop.

    Examples
    --------
    >>> def progress(items, what, unit):
    ...     for item in items:
    ...         yield item
    ...         print(what, item)
    >>> with counted(progress, "ab", "tracing") as done:
    ...     done()
    ...     print("next")
    tracing a
    next
    tracing b
    """
    left = iter(progress(items, what, unit))

    def done() -> None:
        next(left, None)

    done()  # the first item begins
    yield done
    for _ in left:  # also those that the stage did not count
        pass
