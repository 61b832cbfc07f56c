"""Paths: an empty one is refused wherever a path is taken, since it would be the current directory, and others too."""

import argparse
import importlib
import inspect
import os
import pkgutil

import pytest

import portable_gpt2 as pg
from portable_gpt2.cli import commands, main


def paths_of(function):
    """Return the parameters of a function that are paths."""
    return [p for p in inspect.signature(function).parameters.values() if "PathLike" in str(p.annotation)]


def functions():
    """Yield every function and method of the package that takes a path, by its name."""
    for module in pkgutil.walk_packages(pg.__path__, "portable_gpt2."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if getattr(value, "__module__", None) != module.name:
                continue
            members = vars(value) if isinstance(value, type) else {"": value}
            for member in members:
                function = getattr(value, member) if member else value
                if (inspect.isfunction(function) or inspect.ismethod(function)) and paths_of(function):
                    yield f"{module.name}.{name}.{member}".rstrip("."), value, function


FOUND = {name: (owner, function) for name, owner, function in functions()}
EXPECTED = [
    "GPT2.load",
    "GPT2.save",
    "convert",
    "write_checkpoint",
    "Run.create",
    "Run.open",
    "open_tokens",
    "plot.save",
]


def test_the_functions_that_take_a_path_are_found():
    """Would catch a walk over the package that finds nothing, so that the next test proves nothing."""
    for name in EXPECTED:
        assert any(found.endswith(name) for found in FOUND), name


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("name", FOUND)
def test_an_empty_path_is_refused_by_every_function(name, empty, tmp_path, monkeypatch):
    """Would catch `save("", force=True)`, which deleted the current directory, and any function that is added."""
    owner, function = FOUND[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("mine")
    parameters = inspect.signature(function).parameters
    paths = paths_of(function)
    for each in paths:
        others = {
            p.name: tmp_path / "other" if p in paths else None
            for p in parameters.values()
            if p.default is p.empty and p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        given = {**others, each.name: empty, **({"force": True} if "force" in parameters else {})}
        instance = [owner.__new__(owner)] if "self" in parameters and function.__name__ != "__init__" else []
        call = owner if function.__name__ == "__init__" else function
        with pytest.raises(ValueError, match=f"{each.name} is an empty path; if it comes from a variable"):
            call(*instance, **given)
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3, TypeError, "source is 3; expected a path, as a str or a pathlib.Path"),
        (b"model", TypeError, "source is b'model'; expected a path"),
        ("a\0b", ValueError, "source is 'a.x00b', which holds a NUL character"),
        ("\ud800", ValueError, "source is .*, which cannot be encoded as the name of a file"),
    ],
)
def test_what_cannot_be_a_path_is_refused(path, error, message):
    """Catches the errors of the operating system for such paths, which do not name the parameter."""
    with pytest.raises(error, match=message):
        pg.GPT2.load(path, backend="numpy")


def test_a_current_directory_that_was_removed_is_named(tmp_path, monkeypatch):
    """Catches a bare "No such file or directory" for a relative path."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match="it: the current directory no longer exists; give an absolute path"):
        pg.GPT2.load("shakespeare", backend="numpy").save("it")


def arguments():
    """Yield every argument of every command that takes a value: the command, its parser, the action."""
    parser = commands.parser()
    [subparsers] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for command, sub in subparsers.choices.items():
        for action in sub._actions:
            if action.nargs != 0:
                yield command, sub, action


TEXTS = {("generate", "prompt")} | {(name, "text") for name in ("attend", "certify", "diff", "fingerprint", "trace")}


@pytest.mark.parametrize(
    ("command", "sub", "action"), [pytest.param(*a, id=f"{a[0]}-{a[2].dest}") for a in arguments()]
)
def test_an_empty_value_is_refused_by_every_option_that_is_not_text(
    command, sub, action, tmp_path, monkeypatch, capsys
):
    """Would catch `convert CKPT "" --force` with an unset variable, and an option that is added without a check."""
    monkeypatch.chdir(tmp_path)
    given = [command]
    for other in sub._actions:
        value = "" if other is action else "1"
        if other.option_strings and (other.required or other is action):
            given += [other.option_strings[0], value]
        elif not other.option_strings and (other.nargs != "*" or other is action):
            given += [value]
    if (command, action.dest) in TEXTS:
        commands.parser().parse_args(given)
        return
    with pytest.raises(SystemExit) as exit_:
        main(given)
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    if action.type is None:
        assert "the value is empty; if it comes from a variable, the variable is not set" in line
    assert os.listdir(tmp_path) == []
