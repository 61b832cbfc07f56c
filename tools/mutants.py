"""Mutation testing: change the code in one place at a time, and list the changes that no test notices.

``python tools/mutants.py [MODULE[.FUNCTION] ...]`` tests modules of the installed package, those of TESTS unless given.
Tests are collected once. Each mutant then runs in a fork of its own, which replaces the code of the mutated function in
memory and runs the tests that reach the mutated line, until one fails. No file is written. If the mutated line is not
in a function, all tests run in a new process that imports the mutated module.

A mutant that survives must be in mutants.toml, with a reason. A test that calls the module only in a subprocess is not
selected: a survivor may be false, a kill cannot.
"""

import argparse
import ast
import builtins
import contextlib
import functools
import gc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
from mutations import Mutant, marked, mutants

OUT = os.dup(1)  # pytest captures the standard output
ROOT = Path(__file__).parents[1]
KIT = "portable_gpt2/testing"
MODEL = [
    f"{KIT}/model/test_logits.py",
    f"{KIT}/model/test_cache.py",
    f"{KIT}/contract/test_ids.py",
    "tests/test_model.py",
]
TESTS = {  # for each module of portable_gpt2, the tests that are about it, but not those that take many seconds
    "ops": [
        f"{KIT}/ops",
        f"{KIT}/contract/test_ids.py",
        f"{KIT}/contract/test_refusals.py",
        "tests/test_interpreter.py",
        "tests/test_gradients.py",
    ],
    "gradients": [
        f"{KIT}/training/test_gradients.py",
        f"{KIT}/contract/test_ids.py",
        "tests/test_gradients.py",
        "tests/test_model.py::test_tokens_that_have_no_loss_are_refused",
        "tests/test_model.py::test_parameters_of_another_model_are_refused",
    ],
    "sampling": ["tests/test_sampling.py", "-k", "not distribution and not noise and not independent"],
    "model": [*MODEL, f"{KIT}/model/test_trace.py", "tests/test_gradients.py", f"{KIT}/training/test_gradients.py"],
    "cache": MODEL,
}
ACCEPTED = Path(__file__).with_suffix(".toml")
PYTEST = ["-q", "-p", "no:cacheprovider", "--assert=plain", "-c", str(ROOT / "pyproject.toml")]
PYTEST += ["-m", "not gpu", "--backend=numpy,array_api_strict,none"]
SECONDS = 20  # of processor time; a test may take ten times as long as without a mutation, and this much more


def say(text: str) -> None:
    """Write a line to the standard output."""
    os.write(OUT, f"{text}\n".encode())


def name_of(item: Any) -> str:
    """Return the name of a test. The node id has no path if the file is not in the checkout."""
    return f"{item.path.parent.name}/{item.path.name}::{item.name}"


class Judge:
    """A plugin of pytest that runs the collected tests on each mutant instead of once."""

    def __init__(self, path: Path, function: str, jobs: int) -> None:
        self.path, self.module, self.jobs = str(path), function.partition(".")[0], jobs
        self.tree, self.all_mutants = mutants(path.read_text(), self.module)
        self.mutants = [mutant for mutant in self.all_mutants if is_in(function, mutant.key)]
        self.results: dict[str, str] = {}
        self.reached: dict[str, set[int]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._running = self._file = ""  # the name of the test that runs, and the path of its file
        self._reaching: set[int] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Let a test of hypothesis end at its first failing example."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", parent=hypothesis.settings.default, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the name of a test that failed."""
        if report.failed:
            self.failed.append(self._running)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Count the lines that a fixture of several tests reaches as reached by every test of the file."""
        before = self._reaching
        if fixturedef.scope != "function":
            self._reaching = self.reached[self._file]
        try:
            return (yield)
        finally:
            self._reaching = before

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run the tests on the code as it is, and then on each mutant."""
        reporter = session.config.pluginmanager.unregister(name="terminalreporter")
        assert reporter is not None
        ((signalled, result),) = self.fork([functools.partial(self.record, session.items)])
        if signalled or result["failed"]:
            raise pytest.UsageError(f"without a mutation, tests fail: {result['failed'] if result else signalled}")
        self.reached |= {name: {*lines} for name, lines in result["reached"].items()}
        self.seconds.update(result["seconds"])
        killers: dict[str, Counter[str]] = defaultdict(Counter)
        work = [functools.partial(self.run, mutant, session.items, killers) for mutant in self.mutants]
        for mutant, (signalled, failed) in zip(self.mutants, self.fork(work), strict=True):
            killers[mutant.function].update(failed or [])
            if signalled in (signal.SIGPROF, signal.SIGALRM):
                result = "timed out"
            else:
                by = [f"signal {signalled}"] if signalled else failed
                result = "not reached" if by is None else f"killed by {by[0]}" if by else "survived"
            self.results[mutant.key] = result
            say(f"{self.module}.py:{mutant.line}: {result}: {mutant.key} (was: {mutant.was})")
        names = {name for counter in killers.values() for name in counter}
        alone = [functools.partial(self.run_until_one_fails, [i]) for i in session.items if name_of(i) in names]
        if bad := [failed for _, failed in self.fork(alone) if failed != []]:
            raise pytest.UsageError(f"without a mutation, these tests fail if they run alone: {bad}")
        return True

    def record(self, items: list[Any]) -> dict[str, Any]:
        """Run all tests, and return their times and the lines of the module that each of them reaches."""
        builtins.reaches = lambda line: self._reaching.add(line)
        replace_code(compile(marked(self.tree, "reaches"), self.path, "exec"))
        caches = [each for each in gc.get_objects() if isinstance(each, functools._lru_cache_wrapper)]
        caches = [each for each in caches if getattr(each.__wrapped__, "__globals__", {}).get("__file__") == self.path]
        for item, following in itertools.zip_longest(items, items[1:]):
            for cache in caches:  # a test would not reach the lines whose values an earlier test left in a cache
                cache.cache_clear()
            self._running, self._file = name_of(item), str(item.path)
            self._reaching, start = self.reached[self._running], time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.seconds[self._running] = time.process_time() - start
        reached = {name: [*lines] for name, lines in self.reached.items()}
        return {"reached": reached, "seconds": self.seconds, "failed": self.failed}

    def run(self, mutant: Mutant, items: list[Any], killers: dict[str, Counter[str]]) -> list[str] | None:
        """Run the tests that reach a mutant until one fails, and return its name; None if no test reaches it."""
        if not mutant.function:
            call = [sys.executable, __file__, self.module, "--only", str(self.all_mutants.index(mutant))]
            order = json.dumps(sorted(map(name_of, items), key=lambda name: self.seconds[name]))
            ended = subprocess.run(call, input=order, text=True, stdout=subprocess.DEVNULL)
            return ["a test in a new process"] if ended.returncode else []
        mutant.apply()
        replace_code(compile(ast.fix_missing_locations(self.tree), self.path, "exec"))
        before = killers[mutant.function]
        chosen = [
            (-before[name], self.seconds[name], i)
            for i, (name, item) in enumerate(zip(map(name_of, items), items, strict=True))
            if mutant.line in self.reached[name] | self.reached[str(item.path)]
        ]
        return self.run_until_one_fails([items[i] for *_, i in sorted(chosen)]) if chosen else None

    def run_until_one_fails(self, items: list[Any]) -> list[str]:
        """Run tests, and return the name of the first that fails."""
        for item, following in itertools.zip_longest(items, items[1:]):
            self._running = name_of(item)
            signal.setitimer(signal.ITIMER_PROF, SECONDS + 10 * self.seconds[self._running])
            signal.alarm(600)  # for a test that waits
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                break
        return self.failed

    def fork(self, work: list[Callable[[], Any]]) -> Iterator[tuple[int, Any]]:
        """Call each function in a fork of this process. Yield the signal that ended it, or 0, and its result."""
        running: deque[tuple[int, int]] = deque()
        for i in range(len(work) + self.jobs - 1):
            if i < len(work):
                read, write = os.pipe()
                if not (process := os.fork()):
                    _end(work[i], write)
                os.close(write)
                running.append((process, read))
            if i >= self.jobs - 1 and running:
                process, read = running.popleft()
                with open(read) as file:
                    text = file.read()
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # what a test has left running
                if code > 0:
                    raise RuntimeError(text)
                yield -code, json.loads(text) if code == 0 else None


def _end(function: Callable[[], Any], write: int) -> None:
    """Call a function in a fork, write its result, and end the process."""
    os.setsid()
    code = 0
    try:
        text = json.dumps(function())
    except BaseException:
        text, code = traceback.format_exc(), 1
    with open(write, "w") as file:
        file.write(text)
    os._exit(code)


def is_in(function: str, key: str) -> bool:
    """Return whether a mutant, of which the key is given, is in a function, a class or a module."""
    scope = key.partition(":")[0]
    return scope == function or scope.startswith(f"{function}.")


def replace_code(module: CodeType) -> None:
    """Give every function of a module that exists now its code in another version of the module."""

    def codes(code: CodeType) -> Iterator[CodeType]:
        for each in code.co_consts:
            if isinstance(each, CodeType):
                yield each
                yield from codes(each)

    new = {(code.co_qualname, code.co_firstlineno): code for code in codes(module)}
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and each.__code__.co_filename == module.co_filename:
            name = each.__code__.co_qualname
            if "<locals>" not in name and "<lambda>" not in name:
                each.__code__ = new[name, each.__code__.co_firstlineno]


class Order:
    """A plugin of pytest that runs tests in the order of their names."""

    def __init__(self, names: list[str]) -> None:
        self.places = {name: i for i, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort the tests."""
        items.sort(key=lambda item: self.places[name_of(item)])


class Importer(importlib.machinery.SourceFileLoader):
    """Imports one module from a tree, and leaves the others to Python."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        super().__init__(name, str(path))
        self.tree = ast.fix_missing_locations(tree)

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the specification of the module, or None for others."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> CodeType:
        """Return the code of the tree."""
        code: CodeType = compile(self.tree, self.path, "exec")
        return code


def main() -> int:
    """Run the mutants of the modules, and return 1 if one survives that is not accepted, or an entry is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE[.FUNCTION]", help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="the number of mutants that run at once")
    parser.add_argument("--only", type=int, help="run the tests on the mutant of this number, in this process")
    args = parser.parse_args()
    modules = args.modules or list(TESTS)
    if unknown := {name.partition(".")[0] for name in modules} - TESTS.keys():
        parser.error(f"unknown modules {', '.join(unknown)}; choose from {', '.join(TESTS)}")
    if len(modules) > 1:
        command = [sys.executable, __file__, f"--jobs={args.jobs}"]
        return max([subprocess.call([*command, module]) for module in modules])
    (function,) = modules
    module = function.partition(".")[0]
    os.environ.update(HYPOTHESIS_PROFILE="few", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    package = Path(importlib.util.find_spec("portable_gpt2").origin).parent
    roots = {"tests": ROOT, "portable_gpt2": package.parent}
    tests = [str(roots[test.partition("/")[0]] / test) if "/" in test else test for test in TESTS[module]]
    path = package / f"{module}.py"
    with tempfile.TemporaryDirectory() as room:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = room
        if args.only is not None:
            tree, found = mutants(path.read_text(), module)
            found[args.only].apply()
            sys.meta_path.insert(0, Importer(f"portable_gpt2.{module}", path, tree))
            return int(pytest.main([*PYTEST, "-x", *tests], plugins=[Order(json.load(sys.stdin))]))
        judge = Judge(path, function, args.jobs)
        if not judge.mutants:
            parser.error(f"{function}: there is no mutant in it; name a function of {module}.py, with its class if any")
        if code := pytest.main([*PYTEST, *tests], plugins=[judge]):
            return int(code)
    return report(function, judge.results)


def report(function: str, results: dict[str, str]) -> int:
    """Print how many mutants survived, and what to do about those that are not accepted; return 1 if there are any."""
    entries = tomllib.loads(ACCEPTED.read_text())["survivors"]
    accepted = {key for entry in entries for key in entry["mutants"] if is_in(function, key)}
    survivors = {key for key, result in results.items() if result == "survived"}
    survivors |= {f"{key.partition(':')[0]}: not reached" for key, result in results.items() if result == "not reached"}
    counts = Counter(result.partition(" by ")[0] for result in results.values())
    say(f"{function}: {len(results)} mutants: " + ", ".join(f"{n} {result}" for result, n in counts.items()))
    for key in sorted(survivors - accepted):
        say(f"survived: {key}; write a test that fails, or give a reason in {ACCEPTED.name}")
    for key in sorted(accepted - survivors):
        say(f"{results.get(key, 'not a mutant any longer')}: {key}; delete its entry in {ACCEPTED.name}")
    return int(survivors != accepted)


if __name__ == "__main__":
    sys.exit(main())
