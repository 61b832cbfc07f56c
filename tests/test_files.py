"""Files and directories: a lock dies with its process, and what is written is complete or absent."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from portable_gpt2 import files

HOLD = """
import pathlib, sys, time
from portable_gpt2 import files
with files.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_the_id_of_the_first(tmp_path):
    """Would catch two writers in one directory, and a refusal that does not say whom to wait for."""
    file = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(files.Locked, match=str(holder.pid)) as refused, files.lock(file):
            pass
        assert refused.value.pid == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert file.exists()
    with files.lock(file) as held:  # a lock that kill -9 left does not block
        assert held
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_threads_at_a_time_holds_a_lock(tmp_path):
    """Would catch a lock on a file that its last holder has just removed: it excludes nobody."""
    inside, both, taken, told = [], [], [], []

    def take():
        for _ in range(200):
            try:
                with files.lock(tmp_path / "lock"):
                    inside.append(1)
                    both.append(len(inside) > 1)
                    taken.append(1)
                    inside.pop()
            except files.Locked as error:
                told.append(error.pid)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken
    assert not any(both)
    assert set(told) <= {None, os.getpid()}
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_its_holder_has_just_removed_is_taken_again(tmp_path, monkeypatch):
    """Would catch the race of the test above in every run: the file is gone between opening and locking it."""
    open_, opened = os.open, []

    def removed_once(path, *args):
        descriptor = open_(path, *args)
        if not opened:
            os.unlink(path)
        opened.append(path)
        return descriptor

    monkeypatch.setattr(os, "open", removed_once)
    with files.lock(tmp_path / "lock"):
        assert len(opened) == 2
        assert (tmp_path / "lock").exists()
