"""Damaged runs: a run is refused by a file's name, or ends in the bits that it would have had.

The files of a run that was stopped are spoilt at random: bytes of any of them (cut, flipped, overwritten, inserted,
removed), the entries of its JSON files and of its lines of metrics, the tensors of its moments, the order of its
tokens. A file is removed, or a named pipe, a directory, a loop of links or another file takes its place.
"""

import contextlib
import json
import os
import shutil
import signal

import pytest
from damage import cut, edit_header, edit_json, flip, insert, overwrite, remove, spoil_tensors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runs import begin, contents, lines, resume
from safetensors import SafetensorError
from safetensors.numpy import load, save

from portable_gpt2.training import train


def edit_line(draw, content):
    """Edit the JSON of a line of metrics, or drop, repeat or move a line."""
    found = content.splitlines(keepends=True)
    i = draw(st.integers(0, len(found) - 1))
    match draw(st.sampled_from(["edit", "drop", "repeat", "move"])):
        case "edit":
            found[i] = edit_json(draw, found[i]) + b"\n"
        case "drop":
            del found[i]
        case "repeat":
            found.insert(i, found[i])
        case "move":
            found.insert(draw(st.integers(0, len(found) - 1)), found.pop(i))
    return b"".join(found)


def spoil_moments(draw, content):
    arrays = dict(
        sorted(load(content).items())
    )  # load has an order of its own each time, and a draw may not depend on it
    return save(spoil_tensors(draw, arrays))


def exchange(draw, content):
    """Exchange two parts of equal length."""
    n = draw(st.integers(1, len(content) // 2))
    i = draw(st.integers(0, len(content) - 2 * n))
    j = draw(st.integers(i + n, len(content) - n))
    return content[:i] + content[j : j + n] + content[i + n : j] + content[i : i + n] + content[j + n :]


def nothing(file):
    pass


def loop(file):
    file.symlink_to(file)


def nowhere(file):
    file.symlink_to(file.with_name("nowhere"))


def elsewhere(file):
    file.symlink_to("/dev/zero")


def another(file):
    file.write_text("{}")


def spoil(draw, directory):
    """Do something to a file of a run."""
    names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    last = "training/step-3"
    more = [f"{last}/more.json"] if (directory / last).is_dir() else []
    name = draw(st.sampled_from([*names, *names, "training/lock", last, *more]))
    file = directory / name
    if not file.is_file() or draw(st.integers(0, 4)) == 0:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        draw(st.sampled_from([nothing, os.mkfifo, os.mkdir, loop, nowhere, elsewhere, another]))(file)
        return
    content = file.read_bytes()
    changes = [cut] if not content else [cut, flip, flip, overwrite, insert, remove, exchange]
    if content and file.suffix == ".json":
        changes += [edit_json] * 5
    if content and file.suffix == ".jsonl":
        changes += [edit_line] * 5
    if content and file.suffix == ".safetensors":
        changes += [edit_header] * 2 + [spoil_moments] * 2
    with contextlib.suppress(ValueError, KeyError, IndexError, SafetensorError):  # it may be spoilt already
        content = draw(st.sampled_from(changes))(draw, content)
    file.write_bytes(content)


def same(name, found, expected):
    """Return whether two files are equal; two records, whether their entries are: spaces may have changed."""
    return found == expected or (found and name == "training/run.json" and json.loads(found) == json.loads(expected))


class Whole(tuple):
    """What hypothesis need not print."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)

    def __repr__(self):
        return "<a whole run>"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 3, and what its directory holds once it has ended."""
    room = tmp_path_factory.mktemp("stopped")
    list(train(*begin(room / "whole")))
    reports = train(*begin(room / "run"))
    while next(reports).step < 3:
        pass
    reports.close()
    return Whole(room / "run", lines(room / "whole"), contents(room / "whole"))


@given(data=st.data())
@settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink what was spoilt takes minutes, and tells no more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_damaged_run_is_refused_or_ends_in_the_same_bits(stopped, tmp_path, data):
    """Catches any other exception, a message that names no file, a hang, and a byte that matters and is not checked."""
    whole, expected_lines, expected = stopped
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(whole, directory)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        spoil(data.draw, directory)
    signal.alarm(60)  # a process that waits for a pipe would wait for ever
    try:
        resume(directory)
    except ValueError as error:
        assert type(error).__name__ in ("CheckpointError", "ValueError")  # noqa: PT017 - only if there is one
        assert str(error).startswith(str(directory))  # noqa: PT017
        return
    finally:
        signal.alarm(0)
    assert lines(directory) == expected_lines
    found = contents(directory)
    # The best checkpoint, of step 0, is read only if a file that was published is damaged: then it is checked.
    read = [name for name in expected if not name.startswith("training/step-0/")]
    assert [name for name in read if not same(name, found.get(name), expected[name])] == []
