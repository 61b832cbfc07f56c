"""Python code in a process of its own: with the installed package, and nothing of the checkout on its path."""

import os
import subprocess
import sys
import textwrap


def run(code, *, path=(), **environment):
    """Run code with some directories on its path, and return what it prints; what it writes on failing is shown."""
    set_path = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n" if path else ""
    process = subprocess.run(
        [sys.executable, "-P", "-c", set_path + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
