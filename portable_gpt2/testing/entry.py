"""The entry point for pytest: load the plugin only in runs of these tests.

In all other runs, the plugin's options and fixtures would only be in the way of others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TESTS = "portable_gpt2.testing"
_DIRECTORY = Path(__file__).resolve().parent


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Load the plugin if an argument names these tests, as in ``pytest --pyargs portable_gpt2.testing``."""
    if any(arg.startswith(_TESTS) or _is_ours(arg) for arg in args):
        early_config.pluginmanager.import_plugin(f"{_TESTS}.plugin")


def _is_ours(arg: str) -> bool:
    """Return whether an argument is the path of these tests or of a file of them."""
    return not arg.startswith("-") and Path(arg.partition("::")[0]).resolve().is_relative_to(_DIRECTORY)
