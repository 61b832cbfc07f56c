"""The ``portable-gpt2`` command: text on stdout, messages on stderr, wrong use in one line with exit status 2."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from . import commands  # here: it imports NumPy, and whoever imports this module wants to be quick

    return commands.run(argv)
