"""What the command says to somebody who does not know it: first steps, version, suggestions, completion, help."""

import argparse
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys

import in_process
import pytest

from portable_gpt2.cli import commands
from portable_gpt2.registry import known_backends


def parsers():
    """Return the parser of each command by its name."""
    [found] = [a for a in commands.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return found.choices


@pytest.fixture
def command(capsys):
    return in_process.runner(capsys)


def test_no_arguments_show_what_to_try(command):
    """Catches a first step that does not work as it is written: each of the lines must parse."""
    status, out, err = command()
    assert (status, err) == (0, "")
    shown = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  portable-gpt2 ")]
    assert len(shown) >= 3
    for line in shown:
        program, *args = shlex.split(line)
        assert program == "portable-gpt2"
        commands.parser().parse_args(args)
    assert max(len(line) for line in out.splitlines()) < 80


def test_the_module_is_the_command():
    """Catches ``python -m`` that calls itself __main__.py, and a version that is not that of the installed package."""
    version = importlib.metadata.version("portable-gpt2")
    for module, args, expected in (
        ("portable_gpt2", ["--version"], f"portable-gpt2 {version}\n"),
        ("portable_gpt2.cli", ["backends", "x"], "portable-gpt2 backends: unrecognized arguments: x"),
    ):
        done = subprocess.run([sys.executable, "-P", "-m", module, *args], capture_output=True, encoding="utf-8")
        assert (done.stdout + done.stderr).startswith(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --max-new-token 5", "unrecognized arguments: --max-new-token 5; did you mean --max-new-tokens?"),
        ("generate x --max_new_tokens=5", "did you mean --max-new-tokens?"),
        ("generate x --temp 1", "did you mean --temperature?"),  # and not --stop, which has more letters in common
        ("generate x --seeed 1 -- --temp", "did you mean --seed?"),
        ("attend x --ouput y", "--ouput is not an option of portable-gpt2 attend; did you mean --output?"),
        ("genrate x", "'genrate' is not one of generate, score"),
        ("genrate x", "did you mean generate?"),
        ("check numpy --level op", "did you mean ops?"),
        ("--verson", "did you mean --version?"),
        ("--seed 7 generate x", "--seed is not an option of portable-gpt2; write options after the command"),
    ],
)
def test_a_mistyped_name_suggests_the_nearest(command, line, message):
    """Catches a mistake that is named without its remedy, and a suggestion for an option that exists."""
    status, out, err = command(*line.split())
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("line", ["generate x --frobnicate", "generate x y --seed", "generate x --q", "frobnicate"])
def test_nothing_is_suggested_where_nothing_is_near(command, line):
    """Catches advice that has nothing to do with what was typed."""
    assert "did you mean" not in command(*line.split())[2]


@pytest.mark.parametrize("name", parsers())
def test_each_argument_has_a_help_text_that_stands_alone(name):
    """Catches an argument without a text, a text that is a sentence (the others are not), and one that begins with a
    pronoun.
    """
    for action in parsers()[name]._actions:
        assert action.help, action
        first = action.help.split()[0]
        assert first[0].islower() or not first.isalpha(), action.help
        assert not action.help.endswith("."), action.help
        assert first not in {"it", "they", "as", "this", "that"}, action.help


# Completion


def completed(line, script):
    """Return the words that bash offers for the last word of a line."""
    words = shlex.split(line) + [""] * line.endswith(" ")
    code = (
        f"{script}\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        '_portable_gpt2; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_commands_options_and_values(command):
    """Catches a script with a syntax error, an option that is missing, and values of another option."""
    status, script, _ = command("completion", "bash")
    assert status == 0
    assert completed("portable-gpt2 ", script) == list(parsers())
    assert completed("portable-gpt2 --v", script) == ["--version"]
    assert completed("portable-gpt2 gen", script) == ["generate"]
    assert completed("portable-gpt2 generate x --max", script) == ["--max-new-tokens"]
    assert completed("portable-gpt2 generate x --backend ", script) == known_backends()
    assert completed("portable-gpt2 check ", script) == known_backends()
    assert completed("portable-gpt2 check numpy --level o", script) == ["ops"]
    assert completed("portable-gpt2 score text.txt --model sha", script) == []  # readline then completes files
    assert completed("portable-gpt2 completion ", script) == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_knows_every_option(command, shell, tmp_path):
    """Catches an option that a script lacks, and a script that its shell cannot read, where the shell is installed."""
    _, script, _ = command("completion", shell)
    for parser in parsers().values():
        for action in parser._actions:
            for option in action.option_strings:
                assert (f"-l {option[2:]} " if shell == "fish" and option[:2] == "--" else option) in script
    if program := shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(script, "utf-8")
        done = subprocess.run([program, "-n", file], capture_output=True, env={**os.environ, "HOME": str(tmp_path)})
        assert (done.returncode, done.stderr) == (0, b"")


if shutil.which("fish"):

    def test_fish_completes_commands_options_and_values(command, tmp_path):
        """Catches a condition that fish reads in another way, and values of another option."""
        _, script, _ = command("completion", "fish")

        def completed(line):
            code = f"{script}\ncomplete -C {shlex.quote(line)}"
            environment = {**os.environ, "HOME": str(tmp_path)}
            done = subprocess.run(["fish", "-c", code], capture_output=True, encoding="utf-8", env=environment)
            assert (done.returncode, done.stderr) == (0, "")
            return [each.split("\t")[0] for each in done.stdout.splitlines()]

        assert sorted(completed("portable-gpt2 ")) == sorted(parsers())
        assert completed("portable-gpt2 generate x --max") == ["--max-new-tokens"]
        assert completed("portable-gpt2 generate x --backend ") == known_backends()
        assert completed("portable-gpt2 check numpy --level o") == ["ops"]
        assert completed("portable-gpt2 completion ") == ["bash", "fish", "zsh"]
