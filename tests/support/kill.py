"""Start runs, and kill each one (SIGKILL) at its N-th system call: ``python kill.py DIRECTORY N ...``.

The calls that are counted are those that Python reports to audit hooks (to open, create, rename or remove a file),
fsync, and the writes of metrics. Each run is a process that is forked from this one. Without an N, the number of calls
of a whole run is printed.
"""

import os
import signal
import sys

from runs import begin

from portable_gpt2.training import records, train

EVENTS = ("open", "os.", "shutil.")


def train_until(directory, last):
    """Train a run until a given call, which kills the process. If it is not reached, return the number of calls."""
    calls = 0

    def count(event, args=()):
        nonlocal calls
        if event.startswith(EVENTS):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def wrapped(*args):
            count("os.before")
            result = function(*args)
            count("os.after")
            return result

        return wrapped

    os.fsync = counted(os.fsync)
    records.Metrics.add = counted(records.Metrics.add)
    begun = begin(directory)
    sys.addaudithook(count)
    for _ in train(*begun):
        pass
    return calls


def main(room, *points):
    if not points:
        print(train_until(os.path.join(room, "counted"), 0))
    for point in points:
        process = os.fork()
        if process == 0:
            train_until(os.path.join(room, point), int(point))
            os._exit(0)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), point


main(*sys.argv[1:])
