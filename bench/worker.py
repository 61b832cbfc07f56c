"""Worker processes. They are called by messages, so that two of them can be measured in turn.

A message is a line of JSON on stdin, and its answer is a line of JSON on stdout. Everything that a framework prints
goes to stderr. The called functions keep their models between calls (`functools.cache`).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOM = Path(__file__).resolve().parents[1]  # the directory that this package is imported from
LIMIT = 900  # seconds; a call that takes longer is stuck


class WorkerError(RuntimeError):
    """A call failed in the worker, or the worker died. The message is the last line that the worker wrote."""


class Worker:
    """A Python process that calls functions of this package: ``worker.ask("machine:bandwidth", megabytes=600)``."""

    def __init__(self, **environment: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOM,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def ask(self, function: str, *, limit: float = LIMIT, **arguments: Any) -> Any:
        """Call a function of this package in the worker and return its result. The call fails after `limit` seconds."""
        alarm = threading.Timer(limit, self.process.kill)
        alarm.start()
        try:
            self.process.stdin.write(json.dumps([function, arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            alarm.cancel()
        if not answer:
            raise WorkerError(f"the process ended with status {self.process.wait()}: {self._last_line()}")
        result, error = json.loads(answer)
        if error is not None:
            raise WorkerError(error)
        return result

    def _last_line(self) -> str:
        self.log.seek(0)
        return next((line for line in reversed(self.log.read().splitlines()) if line.strip()), "it wrote nothing")


def environment(threads: int) -> dict[str, str]:
    """Return the environment variables of every measurement.

    None of them is for JAX, which starts as many threads as its process may use processors.
    """
    pools = ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP")
    return {**{f"{pool}_THREADS": str(threads) for pool in pools}, "TF_CPP_MIN_LOG_LEVEL": "3"}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for message in sys.stdin:
        name, arguments = json.loads(message)
        module, _, function = name.partition(":")
        try:
            result = getattr(importlib.import_module(f"{__package__}.{module}"), function)(**arguments)
            answer = [result, None]
        except Exception as error:  # the row of the table then shows the exception
            answer = [None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
