"""The ``portable-gpt2`` command: text on stdout, messages on stderr, wrong use in one line with exit status 2.

Exit status: 0; 2 if it failed; 130, 143 and 129 after SIGINT (Ctrl-C), SIGTERM and SIGHUP; 141 if nobody reads stdout.
See docs/decisions/0027.
"""

from __future__ import annotations

from . import signals, streams


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    streams.prepare()
    signals.leave_at_once()
    from . import commands  # not above: it imports NumPy, and Ctrl-C may come first

    signals.clean_up_first()
    try:
        return commands.run(argv)
    finally:
        if argv is None:  # the process ends
            signals.leave_at_once()
