"""``portable-gpt2 completion``: a script by which a shell completes commands, options and their values.

The scripts are made from the parsers, so they know every option. They run no Python: pressing Tab takes no longer than
in other programs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..registry import known_backends
from . import streams

_FILES = re.compile(r"FILE|DIR|SRC|DST|CHECKPOINT|^[AB]$|^file$")
"""Matches the name of a value that is a file or a directory."""


class _Option(NamedTuple):
    names: list[str]
    help: str
    takes_value: bool
    words: list[str]
    """The values that the option may have."""
    takes_file: bool


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "completion",
        help="write a script by which bash, zsh or fish completes commands and options",
        description="Write a script by which a shell completes commands, options and their values when Tab is pressed. "
        "bash: portable-gpt2 completion bash > ~/.local/share/bash-completion/completions/portable-gpt2. zsh: "
        "portable-gpt2 completion zsh > a file named _portable-gpt2 in a directory of $fpath. fish: portable-gpt2 "
        "completion fish > ~/.config/fish/completions/portable-gpt2.fish.",
    )
    parser.add_argument("shell", choices=list(_SCRIPTS), help="name of the shell")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from .commands import parser  # which imports this module

    streams.write(_SCRIPTS[arguments.shell](_read(parser())))
    return 0


class _Command(NamedTuple):
    help: str
    options: list[_Option]
    words: list[str]
    """The values that the positional arguments may have."""
    reads_files: bool
    """Whether a positional argument is a file or a directory."""


def _read(parser: argparse.ArgumentParser) -> dict[str, _Command]:
    """Return the commands of a parser by name. The name of the program itself is empty."""
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    own = _Command("", list(_options(parser)), list(helps), False)
    return {"": own} | {name: _command(helps[name], sub) for name, sub in commands.choices.items()}


def _command(text: str, parser: argparse.ArgumentParser) -> _Command:
    positional = [action for action in parser._actions if not action.option_strings]
    words = [word for action in positional for word in _words(action)]
    return _Command(text, list(_options(parser)), words, any(map(_takes_file, positional)))


def _options(parser: argparse.ArgumentParser) -> Iterator[_Option]:
    for action in parser._actions:
        if action.option_strings:
            text = " ".join((action.help or "").split())
            names = list(action.option_strings)
            yield _Option(names, text, action.nargs != 0, _words(action), _takes_file(action))


def _words(action: argparse.Action) -> list[str]:
    """Return the values that an argument may have."""
    if action.dest.startswith("backend"):
        return known_backends()
    return [*map(str, action.choices or ())]


def _takes_file(action: argparse.Action) -> bool:
    return action.nargs != 0 and bool(_FILES.search(str(action.metavar or action.dest)))


def _bash(commands: dict[str, _Command]) -> str:
    """Return a script for bash 3.2 or later. Where it knows no words, bash completes the names of files."""
    lines = [
        "# bash completion of portable-gpt2, written by `portable-gpt2 completion bash`",
        "_portable_gpt2() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" words="" i',
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        '    if [[ "${COMP_WORDS[i]}" != -* ]]; then command="${COMP_WORDS[i]}"; break; fi',
        "  done",
        '  case "$command $previous" in',
    ]
    for name, command in commands.items():
        for option in command.options:
            if option.takes_value:
                patterns = "|".join(f'"{name} {each}"' for each in option.names)
                lines.append(f"    {patterns}) words={_quoted(' '.join(option.words))} ;;")
    lines.append('    *) case "$command" in')
    for name, command in commands.items():
        options = " ".join(each for option in command.options for each in option.names)
        lines += [
            f'      "{name}") words={_quoted(" ".join(command.words))}',
            f'        if [[ "$current" == -* ]]; then words={_quoted(options)}; fi ;;',
        ]
    lines += [
        "    esac ;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _portable_gpt2 portable-gpt2",
    ]
    return "\n".join(lines) + "\n"


def _zsh(commands: dict[str, _Command]) -> str:
    lines = [
        "#compdef portable-gpt2",
        "# zsh completion of portable-gpt2, written by `portable-gpt2 completion zsh`",
        "_portable_gpt2() {",
        "  local line state",
        f"  _arguments -C {' '.join(_zsh_options(commands['']))} '1: :->command' '*:: :->arguments'",
        "  case $state in",
        "  command)",
        "    local -a commands=(",
    ]
    named = {name: command for name, command in commands.items() if name}
    lines += [f"      {_quoted(f'{name}:{command.help}')}" for name, command in named.items()]
    lines += ["    )", "    _describe command commands ;;", "  arguments)", "    case $line[1] in"]
    for name, command in named.items():
        rest = f"({' '.join(command.words)})" if command.words else "_files" if command.reads_files else " "
        specs = [*_zsh_options(command), _quoted(f"*: :{rest}")]
        lines.append(f"    {name}) _arguments {' '.join(specs)} ;;")
    lines += ["    esac ;;", "  esac", "}"]
    lines += [
        'if [ "$funcstack[1]" = _portable_gpt2 ]; then',
        '  _portable_gpt2 "$@"',
        "else",
        "  compdef _portable_gpt2 portable-gpt2",
        "fi",
    ]
    return "\n".join(lines) + "\n"


def _zsh_options(command: _Command) -> Iterator[str]:
    for option in command.options:
        text = re.sub(r"([\\\[\]:])", r"\\\1", option.help)
        action = f"({' '.join(option.words)})" if option.words else "_files" if option.takes_file else " "
        value = f": :{action}" if option.takes_value else ""
        for name in option.names:
            yield _quoted(f"*{name}[{text}]{value}")


def _fish(commands: dict[str, _Command]) -> str:
    named = {name: command for name, command in commands.items() if name}
    lines = [
        "# fish completion of portable-gpt2, written by `portable-gpt2 completion fish`",
        "complete -c portable-gpt2 -f",
    ]
    outside = f"-n {_quoted('not __fish_seen_subcommand_from ' + ' '.join(named))}"
    for name, command in named.items():
        lines.append(f"complete -c portable-gpt2 {outside} -a {name} -d {_fish_quoted(command.help)}")
    for name, command in commands.items():
        where = f"-n {_quoted(f'__fish_seen_subcommand_from {name}')}" if name else outside
        if name and command.reads_files:
            lines.append(f"complete -c portable-gpt2 {where} -F")
        if name and command.words:
            lines.append(f"complete -c portable-gpt2 {where} -a {_fish_quoted(' '.join(command.words))}")
        for option in command.options:
            names = " ".join(f"-l {each[2:]}" if each.startswith("--") else f"-s {each[1:]}" for each in option.names)
            value = " -r -F" if option.takes_file else " -x" if option.takes_value else ""
            value += f" -a {_fish_quoted(' '.join(option.words))}" if option.words else ""
            lines.append(f"complete -c portable-gpt2 {where} {names}{value} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a text in single quotes, as bash and zsh read it."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    """Return a text in single quotes, as fish reads it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
