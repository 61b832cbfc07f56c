"""The adapter for CuPy, on a stand-in for CuPy that computes with NumPy (tests/stand_in). No GPU is tested.

The stand-in has only functions that CuPy has, refuses NumPy's arrays, and raises an error where the host would wait for
the device. A C++ compiler of the host compiles the adapter's kernels.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / "stand_in"
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")


def run(*arguments):
    """Run Python with the stand-in on the import path; return what it prints."""
    paths = [str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kit_passes_up_to_the_ops():
    """Catches a function that CuPy does not have, a kernel that is not its op, and NumPy's arrays in a computation."""
    options = ["--level", "ops", "--examples", "1", "--device", "cuda:0"]
    assert "cupy passes" in run("-m", "portable_gpt2.cli", "check", "cupy", *options)


TEXTS = """
import portable_gpt2 as pg

model, expected = (pg.GPT2.load("shakespeare", backend=name) for name in ("cupy", "numpy"))
assert model._decoder.runs_ahead
for options in ({"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.7}):
    print(repr([each.generate("ROMEO.", max_new_tokens=20, seed=7, **options) for each in (model, expected)]))
"""


def test_texts_are_those_of_numpy():
    """Catches Gumbel variates, filters and positions on the device that differ from the host's, and a read of a value
    that the host would wait for.
    """
    pairs = [ast.literal_eval(line) for line in run("-W", "error", "-c", TEXTS).splitlines()]
    assert len(pairs) == 4
    for text, expected in pairs:
        assert text == expected
