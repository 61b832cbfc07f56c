"""A run that is killed at any call of the system ends, when it is resumed, in the bits of a run that was not."""

import os
import pathlib
import subprocess
import sys

import hypothesis
import pytest
from runs import begin, contents, lines, resume

import portable_gpt2 as pg
from portable_gpt2.training import Run, train

SCRIPT = pathlib.Path(__file__).parent / "support" / "kill.py"
N = 250 if hypothesis.settings().max_examples >= 1000 else 25


def kill(*args):
    paths = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    call = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(call, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": paths}).stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_a_killed_run_ends_in_the_same_bits_and_has_each_line_once(tmp_path):
    """Catches two writes in the wrong order: a checkpoint without its line, a record of a checkpoint that has gone.

    There are 25 points, or 250 by the profile `thorough`, at equal distances among the calls of a whole run.
    """
    list(train(*begin(tmp_path / "whole")))
    total, without = int(kill(tmp_path)), 0
    points = sorted({1 + i * (total - 1) // (N - 1) for i in range(N)})
    kill(tmp_path, *points)
    for point in points:
        directory = tmp_path / str(point)
        if (directory / "model.safetensors").exists():
            assert pg.GPT2.load(directory, backend="numpy").config.n_ctx == 8
        try:
            Run.open(directory)
        except ValueError as error:
            created = (directory / "training").exists()
            told = "ended before its first checkpoint; start it again" if created else "holds no training run to resume"
            assert told in str(error)  # noqa: PT017 - only if there is one
            list(train(*begin(directory)))
            without += 1
        else:
            resume(directory)
        assert lines(directory) == lines(tmp_path / "whole"), point
        found, expected = contents(directory), contents(tmp_path / "whole")
        assert {name: found.get(name) for name in expected} == expected, point
    assert without < len(points) / 2
