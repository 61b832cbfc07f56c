"""A row of the table: a measured figure, the reference for it, and whether it meets its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import bounds

BANDWIDTH = "GB/s"
"""The name of the samples of the memory's read bandwidth, in every row that has them."""
BANDWIDTH_KEY = "machine", "read bandwidth", "-"


@dataclass
class Row:
    """One figure. A row is planned without a value, so that the table also shows why a row was not measured."""

    group: str
    backend: str
    name: str
    unit: str
    value: float | None = None
    reference: float | None = None
    reference_name: str = ""
    reads: str = ""
    """What must be read from memory at least once, such as "weights", if the time for it limits the row."""
    n_bytes: float = 0.0
    """The number of bytes of what is read."""
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    """The samples of each side, in the order measured: seconds, rates or bytes.

    The value and the reference were computed from them.
    """
    best_of: Callable[[list[float]], float] = min
    """Returns the best of a side's samples: the smallest time, or the largest rate."""
    note: str = ""
    reason: str = "not run"
    """The reason why there is no value."""

    @property
    def key(self) -> tuple[str, str, str]:
        """The group, the name and the backend, which identify the row."""
        return self.group, self.name, self.backend

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of the reference."""
        return None if self.value is None or not self.reference else self.value / self.reference

    @property
    def bound(self) -> bounds.Bound | None:
        """The target of the row, or None."""
        return bounds.find(self.group, self.name, self.backend)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target, or if the value or the reference is missing."""
        bound = self.bound
        if bound is None or self.value is None or (bound.times and self.reference is None):
            return None
        return self.value <= bound.times * (self.reference or 0.0) + bound.plus

    def measured(self, value: float, reference: float | None = None, reference_name: str = "", **more: Any) -> Row:
        """Return the row with its figures."""
        return replace(self, value=value, reference=reference, reference_name=reference_name, reason="", **more)

    def limited_by(self, bandwidth: float | None) -> Row:
        """Return the row, compared with the milliseconds in which its bytes are read at `bandwidth` GB/s.

        A row that has a larger reference already, or that reads nothing, is returned unchanged. The value of the row of
        the bandwidth itself becomes `bandwidth`.
        """
        if self.value is None or bandwidth is None:
            return self
        if self.key == BANDWIDTH_KEY:
            return replace(self, value=bandwidth)
        if not self.reads:
            return self
        limit = self.n_bytes / bandwidth / 1e6
        if self.reference is not None and self.reference >= limit:
            return self
        return replace(self, reference=limit, reference_name=f"{self.reads} read once")

    def failed(self, reason: str) -> Row:
        """Return the row with the reason why it was not measured."""
        return replace(self, reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a dict for JSON."""
        return {
            "group": self.group,
            "backend": self.backend,
            "row": self.name,
            "unit": self.unit,
            "value": self.value,
            "reference": self.reference,
            "reference_name": self.reference_name,
            "ratio": self.ratio,
            "bound": None if self.bound is None else {"times": self.bound.times, "plus": self.bound.plus},
            "met": self.met,
            "best": {name: self.best_of(times) for name, times in self.samples.items() if times},
            "samples": dict(self.samples),
            "note": self.note,
            "not_measured": self.reason or None,
        }
