"""Run Python code in a new process, which imports the installed package and nothing from the checkout."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

IS_OWN = "PORTABLE_GPT2_OWN_PROCESS" in os.environ
"""Whether this process was started by `run_test`."""


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


@functools.cache
def run_test(test, *options, directory):
    """Run a test function with all its parameters on accelerators, once, in a new process.

    Return the names of the tests that failed, or None if the process died, and the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as room:
        record = Path(room, "record.json")
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            [*command, f"--record={record}", test],
            cwd=directory,
            capture_output=True,
            text=True,
            env={**os.environ, "PORTABLE_GPT2_OWN_PROCESS": "1"},
        )
        failed = json.loads(record.read_text())["failed"] if record.exists() else None
    return failed, done.stdout[-2000:]
