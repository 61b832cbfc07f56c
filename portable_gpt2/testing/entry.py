"""The entry point for pytest: load the plugin only in runs of these tests.

In all other runs, the plugin's options and fixtures would only be in the way of others.
"""

from __future__ import annotations

from typing import Any

_TESTS = "portable_gpt2.testing"


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Load the plugin if an argument names these tests, as in ``pytest --pyargs portable_gpt2.testing``."""
    if any(arg.startswith(_TESTS) for arg in args):
        early_config.pluginmanager.import_plugin(f"{_TESTS}.plugin")
