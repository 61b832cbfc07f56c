"""The facts of a failed claim, from which a report explains the failure.

A test hands its facts to the report in two ways, and needs no code of its own for either of them:

- `claims.compute` keeps its last call. A failure of any kind, at any later place of the same test, is reported with a
  script that repeats this call.
- `claims.assert_within` and `claims.assert_same` raise a `ClaimError`, which has the element, its computed, exact and
  allowed value, and the ratio of the error to its bound.

A test of a member of `Backend` or of a function of the namespace is marked with its name, so that the report can say
which function to look at: ``@pytest.mark.about("write")``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Call:
    """A call of a function of a backend, with NumPy arrays."""

    function: Callable[..., Any]
    backend: Any
    arrays: tuple[np.ndarray | None, ...]
    options: dict[str, Any]
    result: np.ndarray | None = None
    """The result on the host; None if the function raised an exception."""


@dataclass(frozen=True)
class Facts:
    """One element of a result that is not as claimed."""

    op: str
    form: str = ""
    """``kernel``, ``definition``, or one of these with ``compiled`` in front."""
    dtype: str = ""
    ratio: float | None = None
    """The error of the worst element, divided by its bound."""
    index: tuple[int, ...] | None = None
    computed: float | None = None
    exact: float | None = None
    allowed: float | None = None
    """The largest permitted error of the element; 0 if every bit must be the same."""
    call: Call | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    """The largest error / bound of each form in which the op was run."""


class ClaimError(AssertionError):
    """A result is not as claimed. The exception has the facts."""

    def __init__(self, message: str, facts: Facts) -> None:
        super().__init__(message)
        self.facts = facts


_LAST: list[Call] = []
"""The last calls in this test: one for each backend, the latest at the end."""


def keep(call: Call) -> None:
    """Keep a call as the last one of its backend."""
    _LAST[:] = [*(each for each in _LAST if each.backend is not call.backend), call]


def forget() -> None:
    """Forget the last calls, before another test begins."""
    _LAST.clear()


def last_call(backend: Any = None) -> Call | None:
    """Return the last call of `claims.compute`, on any backend or on one, or None."""
    return next((call for call in reversed(_LAST) if backend is None or call.backend is backend), None)
