"""The reference of the command in Markdown, from its parser: ``python tools/command_reference.py``."""

import argparse
import re
import textwrap
from collections.abc import Iterator

from portable_gpt2.cli import commands


def subcommands() -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Return the parser of each subcommand, and its description in a few words, by name."""
    found = next(action for action in commands.parser()._actions if isinstance(action, argparse._SubParsersAction))
    short = {choice.dest: choice.help or "" for choice in found._choices_actions}
    return {name: (parser, short[name]) for name, parser in found.choices.items()}


def escaped(text: str) -> str:
    """Return a help text as Markdown: code stays code, and other signs of Markdown stand for themselves."""
    code = r"(`[^`]+`)"
    return "".join(
        part if re.fullmatch(code, part) else re.sub(r"([\\*_<>\[\]|#~$])", r"\\\1", part)
        for part in re.split(code, text)
    )


def usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage in lines of at most 80 characters, which are not broken within brackets."""
    parts = re.sub(r"\[.*?\]", lambda found: found[0].replace(" ", "\0"), " ".join(parser.format_usage().split()))
    wrapped = textwrap.fill(parts.removeprefix("usage: "), 80, subsequent_indent="    ", break_on_hyphens=False)
    return wrapped.replace("\0", " ")


def section(name: str, parser: argparse.ArgumentParser, short: str) -> Iterator[str]:
    """Yield the lines of a subcommand's section: its usage, its description and its arguments."""
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    yield from (f"## {name}", "", f"{escaped(short[:1].upper() + short[1:])}.", "")
    yield from ("```text", usage(parser), "```", "")
    yield from (escaped(parser.description or ""), "")
    for group in parser._action_groups:
        if group._group_actions:
            yield from (f"**{(group.title or '').capitalize()}**", "")
        for action in group._group_actions:
            yield f"`{formatter._format_action_invocation(action)}`"
            yield from (f": {escaped(formatter._expand_help(action))}", "")


def page() -> str:
    """Return the sections of all subcommands."""
    return "\n".join(line for name, given in subcommands().items() for line in section(name, *given))


if __name__ == "__main__":
    print(page())
