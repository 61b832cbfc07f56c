"""Run the default sessions of nox, two at a time, and print the output of each when it has ended.

A session installs packages on one processor, and each of its processes imports a framework and collects all tests. Two
sessions of one process each take less time on two processors than one session of two processes after the other.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

LAST = ("tests(jax)", "tests(torch)", "typing", "tests(mlx)", "tests(ndonnx)", "lint")
"""The sessions that start when others have ended. With this order, both processors have work until the end."""


def run(session: str, log: Path) -> tuple[str, int, float]:
    """Run a session, and return its name, its exit status and its time in seconds."""
    start = time.monotonic()
    with log.open("wb") as file:
        status = subprocess.run(["nox", "--session", session], stdout=file, stderr=subprocess.STDOUT).returncode
    return session, status, time.monotonic() - start


def main(room: Path) -> int:
    """Run all sessions, whose output is kept in files of a directory, and return the exit status."""
    listed = subprocess.run(["nox", "--list", "--json"], stdout=subprocess.PIPE, check=True).stdout
    names = [session["session"] for session in json.loads(listed)]
    names.sort(key=lambda name: LAST.index(name) if name in LAST else -1)  # the sort is stable
    os.environ["PORTABLE_GPT2_PROCESSES"] = "1"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(room / "jax")
    ended = []
    with ThreadPoolExecutor(2) as pool:
        logs = {pool.submit(run, name, room / f"{i}.log"): room / f"{i}.log" for i, name in enumerate(names)}
        for future in as_completed(logs):
            ended.append(future.result())
            sys.stdout.buffer.write(logs[future].read_bytes())
            sys.stdout.flush()
    for name, status, seconds in ended:
        print(f"{name}: {'failed' if status else 'success'}, {seconds:.0f} s", flush=True)
    return int(any(status for _, status, _ in ended))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
