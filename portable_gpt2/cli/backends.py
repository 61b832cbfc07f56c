"""``portable-gpt2 backends``: list the array frameworks."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from typing import Any

from ..registry import BackendNotInstalled, available_backends, get_backend, how_to_install, known_backends
from . import streams


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "backends",
        help="list the array frameworks and their devices",
        description="List the array frameworks that can run a model, their versions and their devices.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    streams.write("")
    rows = [("backend", "version", "devices")]
    for name in known_backends():
        try:
            if name not in available_backends():
                rows.append((name, "-", f"not installed: {how_to_install(name)}"))
                continue
            devices = get_backend(name).devices()
            rows.append((name, _version(name), ", ".join(devices)))
        except BackendNotInstalled as error:
            rows.append((name, "-", " ".join(str(error).split())))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for first, second, last in rows:
        streams.write(f"{first:{widths[0]}}  {second:{widths[1]}}  {last}\n")
    return 0


def _version(module: str) -> str:
    """Return the version of an imported top-level module; that of its distribution if it does not know its own."""
    if version := getattr(sys.modules[module], "__version__", None):
        return str(version)
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "?"
