"""``portable-gpt2 check``: check that a backend computes correctly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import testing
from . import signals, streams
from .options import at_least

_FAILED = 1
"""The exit status if a test failed."""


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser(
        "check",
        help="check that a backend computes correctly",
        description="Check that a backend keeps every promise on which the model relies. Each level of tests runs only "
        "if the levels before it passed. The exit status is 1 if a test failed. Ctrl-C ends the check after the test "
        "that is running, and the report has the tests so far. Checking needs pip install 'portable-gpt2[testing]'.",
    )
    add = parser.add_argument
    add("backend", help="name of the backend; `portable-gpt2 backends` lists them")
    add(
        "--level",
        choices=testing.LEVELS,
        default=testing.LEVELS[-1],
        help="last level of tests that runs: contract, constants, ops, model or training (default: training)",
    )
    add(
        "--device",
        help="device to check: cpu, cuda, cuda:1 ... (default: the framework's own choice, and the ops on every "
        "accelerator)",
    )
    add("--only", metavar="TEXT", help="run only the tests whose name, file or level contains this text")
    add("--examples", type=at_least(1), metavar="N", help="number of examples for each property (default: 50)")
    add("--json", metavar="FILE", help="write the report into this file as well, as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from tqdm import tqdm

    streams.write("")
    if arguments.json:
        Path(arguments.json).touch()  # before the tests run, which takes minutes
    # With disable=None, the bar is shown only if stderr is a terminal.
    with (
        signals.Noted() as received,
        tqdm(unit=" tests", desc="checking", disable=None, leave=False, mininterval=0.5) as bar,
    ):

        def progress(level: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(level, refresh=False)
            bar.update(done - bar.n)
            if received:
                raise KeyboardInterrupt

        try:
            report = testing.check(
                arguments.backend,
                level=arguments.level,
                device=arguments.device,
                only=arguments.only or "",
                examples=arguments.examples,
                progress=progress,
            )
        except testing.Interrupted as interruption:
            report = interruption.report
    if arguments.json:
        Path(arguments.json).write_text(report.to_json(), "utf-8")
    streams.write(f"{report}\n")
    if received:
        return signals.status(received[0])
    return 0 if report.ok else _FAILED
