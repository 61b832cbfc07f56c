"""Run a test in a process of its own, which it may spoil.

After a failed assertion of a kernel on CUDA, such as an index out of range, all later calls of the process fail.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IS_OWN = "PORTABLE_GPT2_OWN_PROCESS" in os.environ
"""Whether this process was started by `run_test`."""


@functools.cache
def run_test(test: str, *options: str, directory: Path) -> tuple[list[str] | None, str]:
    """Run a test function with all its parameters on accelerators, once, in a new process.

    Return the names of the tests that failed, or None if the process died, and the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as room:
        record = Path(room, "record.json")
        plugins = ["-p", "portable_gpt2.testing.plugin", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", *plugins, *options, f"--record={record}", test],
            cwd=directory,
            capture_output=True,
            text=True,
            env={**os.environ, "PORTABLE_GPT2_OWN_PROCESS": "1"},
        )
        failed = json.loads(record.read_text())["failed"] if record.exists() else None
    return failed, done.stdout[-2000:]
