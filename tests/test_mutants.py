"""Mutation testing: which changes it makes, what it says of each, and that the list of accepted ones is up to date."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import portable_gpt2 as pg

TOOLS = Path(__file__).parents[1] / "tools"
PACKAGE = Path(pg.__file__).parent
sys.path.insert(0, str(TOOLS))

import mutations  # noqa: E402

STATEMENTS = {  # a statement, and all that it may become
    "y = a < b <= c": {"y = a <= b <= c", "y = a < b < c"},
    "y = a is None": {"y = a is not None"},
    "y = a - 1": {"y = a + 1", "y = a - 0", "y = a - 2"},
    "y = a // 2": {"y = a * 2", "y = a // 1", "y = a // 3"},
    "y = a and not b": {"y = a or not b", "y = a and b"},
    "y = -a": {"y = a"},
    "y = [0.5, 7, True, None]": {
        *("y = [1.0, 7, True, None]", "y = [0.5, 8, True, None]", "y = [0.5, 7, False, None]", "y = [0.5, 7, True, 0]")
    },
    "y = f(a, b, key=c)": {"y = f(b, a, key=c)", "y = f(a, b)"},
    "y = f('text', *a)": set(),
    "y = xp.max(a)": {"y = xp.min(a)"},
    "y = all(a)": {"y = any(a)"},
    "y = a[b:]": {"y = a[b + 1:]", "y = a[b - 1:]"},
    "y = a[:-1]": {"y = a[:1]", "y = a[:-0]", "y = a[:-2]"},
    "y = b if a else c": {"y = b if True else c", "y = b if False else c"},
    "y = f(y)": {"without y = f(y)"},
    "y += a": {"without y += a", "y -= a"},
    "f(a)": {"without f(a)"},
    "if a: y = b": {"if True:", "if False:"},
    "if a: raise ValueError(f'{a} is {b + 1}')": {"if True:", "without raise ValueError(f'...')"},
    "assert a is None": set(),
    "y: int | None = a": set(),
    "y = f'{a + 1} or less'": set(),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_is_changed_in_every_way_and_in_no_other(statement):
    """Catches a kind of change that is not made, and a message, an annotation or an assertion that is changed."""
    _, found = mutations.mutants(f"def g():\n    '''Return 1 + 1.'''\n    {statement}\n", "m")
    assert {mutant.key for mutant in found} == {f"m.g: {became}" for became in STATEMENTS[statement]}
    assert all(mutant.line == 3 for mutant in found)


def test_a_mutant_is_applied_to_the_tree_once():
    """Catches a change that stays in the tree when the next is made."""
    tree, (first, *_) = mutations.mutants("def g(a, b):\n    return a < b or a == 0\n", "m")
    before = ast.unparse(tree)
    first.apply()
    assert first.key.removeprefix("m.g: ") in ast.unparse(tree) != before


SMALL = """
import functools

def larger(x, y):
    return x if x > y else y

def count(n):
    while n > 0:
        n -= 1
    return n

def unused(x):
    return not x

@functools.cache
def table():
    return [0, 2]
"""
TESTS = """
from small import count, larger, table

def test_first():
    assert larger(1, 1) == 1

def test_larger():
    assert larger(2, 1) == 2
    assert larger(1, 2) == 2

def test_count():
    assert count(3) == 0

def test_the_length_of_the_table():
    assert len(table()) == 2

def test_the_table():
    assert table() == [0, 2]
"""
RUN = """if True:
    import json, sys
    from pathlib import Path
    import mutants, pytest

    mutants.SECONDS = 0.5
    judge = mutants.Judge(Path("small.py").resolve(), sys.argv[1], jobs=2)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "test_small.py"], plugins=[judge])
    Path("results.json").write_text(json.dumps([code, judge.results]))
"""


def judged(room, tests, function="small"):
    """Run the tests on the mutants of SMALL, or of a function of it; return pytest's exit code and the results."""
    (room / "small.py").write_text(SMALL)
    (room / "test_small.py").write_text(tests)
    environment = {"PYTHONPATH": f"{TOOLS}:{room}", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", RUN, function], cwd=room, env=environment, check=True, capture_output=True)
    return json.loads((room / "results.json").read_text())


def test_each_mutant_is_killed_survives_or_times_out(tmp_path):
    """Catches a mutant that is not run or that stays, and a test that is left out because it reads from a cache."""
    code, results = judged(tmp_path, TESTS)
    assert code == 0
    place = f"{tmp_path.name}/test_small.py::"
    assert results == {
        "small.larger: return x if x >= y else y": "survived",
        "small.larger: return x if True else y": f"killed by {place}test_larger",
        "small.larger: return x if False else y": f"killed by {place}test_larger",
        "small.count: while n >= 0:": f"killed by {place}test_count",
        "small.count: while n > 1:": f"killed by {place}test_count",
        "small.count: without n -= 1": "timed out",
        "small.count: n += 1": "timed out",
        "small.count: n -= 0": "timed out",
        "small.count: n -= 2": f"killed by {place}test_count",
        "small.unused: return x": "not reached",
        "small.table: return [1, 2]": f"killed by {place}test_the_table",
        "small.table: return [0, 1]": f"killed by {place}test_the_table",
        "small.table: return [0, 3]": f"killed by {place}test_the_table",
    }


def test_the_mutants_of_one_function_are_run_alone(tmp_path):
    """Catches mutants of other functions, and those of a function whose name begins with the given one."""
    _, results = judged(tmp_path, TESTS, "small.table")
    assert {*results} == {f"small.table: return {numbers}" for numbers in ([1, 2], [0, 1], [0, 3])}
    _, results = judged(tmp_path, TESTS, "small.tab")
    assert results == {}


def test_no_mutant_is_run_if_a_test_fails_without_it(tmp_path):
    """Catches mutants that count as killed by a test that always fails."""
    code, results = judged(tmp_path, TESTS.replace("larger(1, 1) == 1", "larger(1, 1) == 0"))
    assert (code, results) == (4, {})


def test_a_test_that_fails_alone_does_not_count(tmp_path):
    """Catches mutants that count as killed by a test that needs another test before it."""
    needs_the_slow_one = (
        "def test_a(): sum(range(3_000_000)); larger(1, 2); seen.add(1)\ndef test_b(): larger(1, 2); assert seen"
    )
    code, _ = judged(tmp_path, f"{TESTS}\nseen = set()\n{needs_the_slow_one}\n")
    assert code == 4


def test_every_accepted_survivor_has_a_reason():
    """Catches an entry twice, and one of a module that is not tested. The session finds entries that are stale."""
    entries = tomllib.loads((TOOLS / "mutants.toml").read_text())["survivors"]
    accepted = [key for entry in entries for key in entry["mutants"]]
    assert all(len(entry["reason"]) > 20 and entry["mutants"] for entry in entries)
    assert len({*accepted}) == len(accepted)
    assert {key.partition(":")[0].partition(".")[0] for key in accepted} <= {path.stem for path in PACKAGE.glob("*.py")}
