"""The result of checking a backend, as text and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import strict_json
from ..numerics.bounds import FORMATS

_WIDTH = 100


@dataclass(frozen=True)
class Level:
    """How many tests of a level passed, failed, failed as expected, or were skipped, and the seconds they took."""

    name: str
    passed: int = 0
    failed: int = 0
    expected: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A test that failed, and how to find the cause.

    `op` is a function of the package, of the namespace or of `Backend`. `form` is ``kernel``, ``definition``,
    or one of these with ``compiled`` in front. A value that is not known is None or empty.
    """

    test: str
    """The name of the test, which `expected_failures` takes."""
    level: str
    backend: str
    device: str
    dtype: str = ""
    op: str = ""
    form: str = ""
    catches: str = ""
    """The mistakes that the test catches: the first paragraph of its docstring."""
    message: str = ""
    ratio: float | None = None
    """The error of the worst element, divided by its bound."""
    index: tuple[int, ...] | None = None
    computed: float | None = None
    exact: float | None = None
    allowed: float | None = None
    """The largest permitted error of the element."""
    diagnosis: str = ""
    script: str = ""
    """Code that reproduces the failure, to paste into a Python interpreter."""

    @property
    def file(self) -> str:
        """The file of the test."""
        return self.test.partition("::")[0]

    def __str__(self) -> str:
        where = ", ".join(each for each in (self.backend, self.device, self.dtype, self.form, self.op) if each)
        lines = [f"{self.test}", f"  {where}"]
        if self.index is not None:
            at = f"element {list(self.index)}" if self.index else "the result"
            lines.append(f"  {at} is {self.computed!r}, exact is {self.exact!r}, permitted error {self.allowed:.3g}")
        if self.ratio is not None:
            lines.append(f"  the error is {self.ratio:.3g} times its bound")
        if self.index is None and self.ratio is None:
            lines += _indented(self.message)
        if self.diagnosis:
            lines += _wrapped(f"Diagnosis: {self.diagnosis}")
        elif self.catches:
            lines += _wrapped(self.catches)
        if self.script:
            lines += ["  To reproduce:", "", textwrap.indent(self.script.rstrip(), "      ")]
        return "\n".join(lines)


@dataclass(frozen=True)
class Ratio:
    """The largest error that was seen, divided by its bound. `where` is the backend, and its device if given."""

    op: str
    where: str
    dtype: str
    ratio: float


@dataclass(frozen=True)
class Skipped:
    """Tests that did not run, and the reason."""

    reason: str
    tests: int


@dataclass(frozen=True)
class Report:
    """The result of `portable_gpt2.testing.check`. Its text is what ``portable-gpt2 check`` prints.

    Parameters
    ----------
    backend : str
        The name of the backend.
    devices : tuple of str
        The devices that were checked.
    levels : tuple of Level
        The levels that ran, in order: each with the number of its tests that passed and failed, and the seconds.
    failures : tuple of Failure
        The tests that failed.
    ratios : tuple of Ratio
        For each function, device and dtype, the largest error, divided by its bound.
    skipped : tuple of Skipped
        The tests that did not run, by reason.
    stopped : str
        The reason why further tests did not run; empty if all that were asked for did.
    interrupted : bool
        Whether the user ended the check before its last test.

    Examples
    --------
    >>> from portable_gpt2.testing.report import Level, Report
    >>> report = Report("mlx", ("cpu",), (Level("contract", passed=61, seconds=1.5),), (), (), ())
    >>> report.ok
    True
    >>> print(report)
    mlx on cpu
    <BLANKLINE>
    contract     61 passed    1.5 s
    <BLANKLINE>
    mlx passes.
    """

    backend: str
    devices: tuple[str, ...]
    levels: tuple[Level, ...]
    failures: tuple[Failure, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...]
    stopped: str = ""
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every test ran, and passed or failed as expected."""
        return not self.failures and not self.interrupted

    def _by_cause(self) -> list[list[Failure]]:
        """Return the failures, those with the same diagnosis together. One that names an element comes first."""
        groups: dict[str, list[Failure]] = {}
        causes: dict[str, set[str]] = {}
        for failure in self.failures:
            if failure.diagnosis:
                causes.setdefault(failure.file, set()).add(failure.diagnosis)
        for failure in self.failures:
            of_file = causes.get(failure.file, {failure.test})
            # A failure without a diagnosis probably has the cause of the others in its file, if they have only one.
            key = failure.diagnosis or (next(iter(of_file)) if len(of_file) == 1 else failure.test)
            groups.setdefault(key, []).append(failure)
        return [sorted(group, key=lambda each: (not each.diagnosis, each.index is None)) for group in groups.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, texts and numbers."""
        return {**dataclasses.asdict(self), "ok": self.ok}

    def to_json(self) -> str:
        """Return the report as one line of JSON. A number that is not finite is null."""
        return strict_json.line(self.to_dict())

    def __str__(self) -> str:
        parts = [_group(failures) for failures in self._by_cause()]
        parts += [f"{self.backend} on {', '.join(self.devices)}"]
        parts += ["\n".join(map(_level_line, self.levels))]
        if self.ratios:
            parts.append("\n".join(["Largest error / bound", "", *ratio_table(self.ratios)]))
        if self.skipped:
            parts.append(
                "\n".join(["Not run", "", *(f"{each.tests:>7} tests: {each.reason}" for each in self.skipped)])
            )
        n = len(self.failures)
        verdict = "passes" if self.ok else f"fails {n or 'no'} test{'s' * (n > 1)}"
        verdict += " so far" * self.interrupted
        parts.append(f"{self.backend} {verdict}.{f' {self.stopped}' if self.stopped else ''}")
        return "\n\n".join(parts)


def _group(failures: list[Failure]) -> str:
    """Return the text of the first failure, and the names of others that have the same diagnosis."""
    first, *others = failures
    names = [f"    {each.test}" for each in others]
    return "\n".join([str(first), *(["", "  Probably the same cause:", *names] if others else [])])


def _level_line(level: Level) -> str:
    counts = [(level.failed, "failed"), (level.expected, "failed as expected"), (level.skipped, "skipped")]
    more = "".join(f", {n} {what}" for n, what in counts if n)
    return f"{level.name:<10}{level.passed:>5} passed{more}{level.seconds:>7.1f} s"


def ratio_table(ratios: Iterable[Ratio]) -> list[str]:
    """Return the lines of a table of ratios: one line for each function and device, and a column for each dtype."""
    cells = {(each.op, each.where, each.dtype): each.ratio for each in ratios}
    rows = list(dict.fromkeys((op, where) for op, where, _ in sorted(cells)))
    lines = [f"{'':<19}{'':<18}" + "".join(f"{dtype:>10}" for dtype in FORMATS)]
    for row in rows:
        found = [cells.get((*row, dtype)) for dtype in FORMATS]
        texts = "".join(f"{'' if ratio is None else format(ratio, '.3g'):>10}" for ratio in found)
        lines.append(f"{row[0]:<19}{row[1]:<18}{texts}")
    return lines if rows else []


def _indented(text: str) -> list[str]:
    return [f"  {textwrap.shorten(line, 300)}" for line in text.strip().splitlines()[:12]]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent="  ", subsequent_indent="  ")
