"""The page "Add a backend": its files are written, its commands run, and they print what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

# This command of the page runs the whole kit, which takes a minute. It runs if the variable asks for it, as
# `nox -s docs` does. The kit runs on this library in any case, with an adapter of the tests.
ALL_LEVELS = "portable-gpt2 check array_api_strict --examples 1 --device cpu"
ALL = os.environ.get("PORTABLE_GPT2_PAGES") == "all"
PAGE = Path(__file__).parents[1] / "docs" / "add-a-backend.md"
METADATA = "Metadata-Version: 2.1\nName: strict-adapter\nVersion: 1.0\n"


def alike(line):
    """Return a line as it is compared: without its numbers, and with one space for several."""
    return re.sub(r"\d+(\.\d+)?", "0", " ".join(line.split()))


def run(command, directory):
    """Run a command of the page; return the lines that it prints."""
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "120"}
    program, *arguments = command.split()
    assert program == "portable-gpt2"
    command = [sys.executable, "-m", "portable_gpt2.cli", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr
    return [*map(alike, done.stdout.splitlines())]


def test_the_page_does_what_it_says(tmp_path):
    """Catches a step that fails, output that is no longer what the page shows, and a mistake that is not reported."""
    assert f"\n$ {ALL_LEVELS}\n" in PAGE.read_text()
    metadata, file = tmp_path / "strict_adapter-1.0.dist-info", None
    metadata.mkdir()
    (metadata / "METADATA").write_text(METADATA)
    n_commands = 0
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if language == "toml":
            entry = block.replace('[project.entry-points."portable_gpt2.backends"]', "[portable_gpt2.backends]")
            (metadata / "entry_points.txt").write_text(entry.replace('"', ""))
        elif language == "python" and (named := re.match(r"# (\w+\.py)\n", block)):
            (tmp_path / named[1]).write_text(block)
        elif language == "python":  # members of the adapter
            file = tmp_path / "strict_adapter.py"
            file.write_text(f"{file.read_text()}\n{block}")
        elif language == "console":
            command, *shown = block.removeprefix("$ ").splitlines()
            n_commands += 1
            if command == ALL_LEVELS and not ALL:
                continue
            printed = iter(run(command, tmp_path))
            for line in map(alike, shown):
                assert line in printed, f"{command} does not print {line!r}, or not after the lines before it"
    assert n_commands >= 4
