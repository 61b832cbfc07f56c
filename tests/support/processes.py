"""Run Python code in a new process, which imports the installed package and nothing from the checkout."""

import os
import signal
import subprocess
import sys
import textwrap


def run(code, *, path=(), **environment):
    """Run code with some directories on its path, and return its stdout. A failed assertion shows its stderr."""
    set_path = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n" if path else ""
    process = subprocess.run(
        [sys.executable, "-P", "-c", set_path + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def heed_signals():
    """Let this process end at Ctrl-C and at the end of its terminal, as ``preexec_fn`` of a new process.

    Tests that run in the background, or under ``nohup``, ignore these signals, and new processes inherit that.
    """
    for name in {"SIGINT", "SIGHUP"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
