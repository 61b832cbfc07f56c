"""Run the commands and the code of the pages of docs/: ``python tools/run_pages.py [PAGE ...]``.

A block of ``sh`` must exit with 0. A block of ``console`` has commands after ``$`` and, below each, the text that it
writes to stdout; a comment ``# exits with 1`` names a status other than 0. A block of ``python`` is run, or, if it has
``>>>``, is a doctest. In expected text, ``...`` stands for any text. The blocks of a page run in order, in a new
directory. A block after a comment ``<!-- not run: REASON -->`` is not run.

No network is used. A model of the hub that a page names is the model that ships with the package: this runner puts a
copy into a cache of the hub, where the program finds it.
"""

import contextlib
import doctest
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "start.md", "how-to", "explanation"))]
HUB = ("gpt2", "openai-community/gpt2-xl")
COMMIT = "0" * 40
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A block of code of a page."""

    page: Path
    line: int
    kind: str
    code: str
    reason: str | None
    """Why the block is not run."""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that can be run."""
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        if found["kind"] in ("sh", "console", "python"):
            line = text.count("\n", 0, found.start("code")) + 1
            yield Block(page, line, found["kind"], found["code"], found["reason"])


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command of a block of ``console``, and the text that it is expected to write."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command += f"\n{more}"
        yield command, expected


def run_command(command: str, expected: str | None, room: Path, environment: dict[str, str]) -> str:
    """Run a command of the shell; return what is wrong, or nothing."""
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=room, env=environment, capture_output=True, text=True, timeout=3600)
    status = re.search(r"# exits with (\d+)", command)
    if done.returncode != (int(status[1]) if status else 0):
        return f"{command}\nexits with {done.returncode}:\n{done.stdout}{done.stderr}"
    if expected is not None and not doctest.OutputChecker().check_output(expected, done.stdout, OPTIONS):
        return f"{command}\nwrites\n{done.stdout}instead of\n{expected}"
    return ""


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run code in a namespace; return what is wrong, or nothing."""
    written = io.StringIO()
    if ">>>" in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, names, block.page.name, str(block.page), block.line)
        failed = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=written.write, clear_globs=False).failed
        names.update(test.globs)
        return written.getvalue() if failed else ""
    try:
        with contextlib.redirect_stdout(written):
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)
    except Exception:
        return traceback.format_exc()
    return ""


def run_page(page: Path, environment: dict[str, str]) -> tuple[int, list[Block], list[str]]:
    """Run a page. Return the number of blocks that were run, those that were not, and the failures."""
    n, left, failures = 0, list[Block](), list[str]()
    names: dict[str, Any] = {"__name__": "__page__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in blocks(page):
            if block.reason is not None:
                left.append(block)
                continue
            n += 1
            if block.kind == "python":
                found = [run_python(block, names)]
            else:
                given = commands(block) if block.kind == "console" else [(block.code, None)]
                found = [run_command(*each, Path(folder), environment) for each in given]
            failures += [f"{page.relative_to(ROOT)}, line {block.line}:\n{each}" for each in found if each]
    return n, left, failures


@contextlib.contextmanager
def prepared() -> Iterator[dict[str, str]]:
    """Yield the environment of the commands: with the program, and with a cache of the hub."""
    from portable_gpt2.checkpoint import SHIPPED

    with tempfile.TemporaryDirectory() as folder:
        for model in HUB:
            cached = Path(folder, "hub", f"models--{model.replace('/', '--')}")
            shutil.copytree(SHIPPED / "shakespeare", cached / "snapshots" / COMMIT)
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text(COMMIT)
        programs = Path(folder, "bin")
        programs.mkdir()
        for name, arguments in {"python": "", "portable-gpt2": "-m portable_gpt2"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            (programs / name).chmod(0o755)
        changes = {
            "HOME": folder,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }
        changes |= {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "80"}
        os.environ.update(changes)  # for the code that is run in this process
        yield {**os.environ}


def main(arguments: list[str]) -> int:
    """Run pages, all of them unless some are named; return the exit status."""
    paths = [Path(each).resolve() for each in arguments] or PAGES
    pages = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.md")))]
    failures: list[str] = []
    with prepared() as environment:
        for page in pages:
            start = time.perf_counter()
            n, left, failed = run_page(page, environment)
            failures += failed
            reasons = f"; not run: {', '.join(f'line {b.line} ({b.reason})' for b in left)}" if left else ""
            if n or left:
                print(f"{page.relative_to(ROOT)}: {n} blocks, {time.perf_counter() - start:.1f} s{reasons}", flush=True)
            print("\n".join(failed), end="\n" if failed else "", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
