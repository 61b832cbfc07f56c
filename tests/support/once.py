"""Directories that the processes of pytest-xdist share."""

import os
import time

PATIENCE = 1800  # seconds; a process that was killed fills nothing


def filled(tmp_path_factory, name, fill):
    """Return a directory that `fill` has filled, in one process of pytest-xdist while the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each process has a directory in it
    found, is_filled, failed = (base / f"{name}{ending}" for ending in ("", "-is-filled", "-failed"))
    try:
        found.mkdir()
    except FileExistsError:
        end = time.monotonic() + PATIENCE
        while not is_filled.exists():
            assert time.monotonic() < end, f"another process has not filled the directory within {PATIENCE} s"
            assert not failed.exists(), "another process could not fill the directory; its error is shown there"
            time.sleep(0.1)
        return found
    try:
        fill(found)
    except BaseException:
        failed.touch()
        raise
    is_filled.touch()
    return found
