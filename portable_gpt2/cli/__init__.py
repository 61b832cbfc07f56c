"""The ``portable-gpt2`` command: text on stdout, messages on stderr, wrong use in one line with exit status 2.

Exit status: 0; 2 if it failed; 130, 143 and 129 after SIGINT (Ctrl-C), SIGTERM and SIGHUP; 141 if nobody reads stdout.
See docs/decisions/0027.
"""

from . import signals


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status.

    Without arguments of its own it is the program, and takes charge of the process's signals and standard streams.
    """
    if argv is None:
        signals.leave_at_once()  # before more is imported
        from . import streams

        streams.prepare()  # before a file is opened
    from . import commands

    try:
        return commands.run(argv)
    finally:
        if argv is None:
            signals.leave_at_once()  # until the process has ended
