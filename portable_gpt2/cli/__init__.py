"""The ``portable-gpt2`` command. It writes text to stdout and messages to stderr.

The exit status is 0 after success, and 2 after an error, which is reported in one line on stderr. It is 130, 143 or 129
after SIGINT (Ctrl-C), SIGTERM or SIGHUP, and 141 if nobody reads stdout. See docs/decisions/0027.
"""

from . import signals


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status.

    Without `argv`, it reads the arguments of the process, and sets up the process's signals and standard streams.
    """
    if argv is None:
        signals.leave_at_once()  # before other modules are imported
        from . import streams

        streams.prepare()  # before a file is opened
    from . import commands

    try:
        return commands.run(argv)
    finally:
        if argv is None:
            signals.leave_at_once()  # while the interpreter shuts down
