"""The state of one run of the benchmark: the number of rounds, and checkpoints, which are created on first use."""

from __future__ import annotations

from pathlib import Path

from .worker import Worker

LEFT_OUT = "left out in quick mode"


class Run:
    """One run. The caller removes the directory of its checkpoints."""

    def __init__(self, directory: Path, *, quick: bool = False) -> None:
        self.directory, self.quick = directory, quick
        self.rounds = 2 if quick else 3

    def checkpoint(self, name: str) -> str:
        """Return the directory of a checkpoint of `checkpoints.SHAPES`, which is created by the first call."""
        directory = self.directory / name
        if not directory.exists():
            with Worker() as worker:
                worker.ask("checkpoints:make", name=name, directory=str(directory))
        return str(directory)
