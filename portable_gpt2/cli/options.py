"""Parsers of options. Each says what was expected, in one line, and knows what can be refused without a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from ..checks import LARGEST, shown
from . import streams

FAILED = 2
"""The exit status of wrong use, and of everything else that fails."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, which names the option, what was given, and what was expected.

    An option must be written in full: the beginning of a name that is unique today may not be so tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.register("type", int, _integer)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        """End the process."""
        streams.say(f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)")
        self.exit(FAILED)

    def _print_message(self, message: str, file: Any = None) -> None:
        streams.write(message)  # the help; argparse itself would not notice that it is lost


class Command(Parser):
    """The parser of one command. It refuses an empty value of every argument that has no type: a path, or a name.

    An argument whose value is text says so by ``type=str``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, _not_empty)


def at_least(low: int, alternative: str = "") -> Callable[[str], int]:
    """Return a function that reads a whole number from low to 2^63 - 1."""

    def read(text: str) -> int:
        value = _integer(text, alternative)
        if not low <= value <= LARGEST:
            raise argparse.ArgumentTypeError(f"{shown(value)} is not from {low} to 2**63 - 1")
        return value

    return read


def number_or_off(text: str) -> float | str:
    """Read a number, or the word off."""
    return text if text == "off" else _number(text, " or off")


def index_or_all(text: str) -> int | str:
    """Read an index from 0, or the word all."""
    return text if text == "all" else at_least(0, " or all")(text)


def stop_text(text: str) -> str:
    """Read a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty; every text begins with an empty one")
    return text


def _integer(text: str, alternative: str = "") -> int:
    try:
        return int(text)
    except ValueError:  # also of more than 4,300 digits
        fewer = " of fewer digits" if text.strip().lstrip("+-").isdecimal() else ""
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number{fewer}{alternative}") from None


def _number(text: str, alternative: str = "") -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a number{alternative}") from None


def _not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; if it comes from a variable, the variable is not set")
    return text
