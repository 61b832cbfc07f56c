"""Timing: the sides in turn, round after round, so that what slows the machine slows all of them; then the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from .worker import WorkerError


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(
    rounds: int, sides: Mapping[str, Callable[[], float]], failures: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Let each side measure itself in each round; return the samples of each, in the order measured.

    Where failures are collected, there is a round more, the first, which only warms up; a side whose worker fails is
    left out from then on, and why is entered into failures.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds if failures is None else rounds + 1):
        for name, measure in sides.items():
            if failures is None:
                samples[name].append(measure())
            elif name not in failures:
                try:
                    sample = measure()
                except WorkerError as error:
                    failures[name] = str(error)
                else:
                    samples[name] += [sample] if turn else []
    return samples


def repeated(calls: Mapping[str, Callable[[], Any]], *, rounds: int, at_least: float) -> dict[str, list[float]]:
    """Return samples of the seconds that each call takes, each the mean over enough calls to last `at_least` seconds.

    Calls are timed in turn after one that warms up; how many make a sample is chosen for each.
    """

    def sampler(call: Callable[[], Any]) -> Callable[[], float]:
        call()
        number = max(1, math.ceil(at_least / max(min(seconds(call) for _ in range(3)), 1e-7)))

        def sample() -> float:
            start = time.perf_counter()
            for _ in range(number):
                call()
            return (time.perf_counter() - start) / number

        return sample

    return in_turn(rounds, {name: sampler(call) for name, call in calls.items()})


def fastest(samples: Mapping[str, list[float]]) -> str:
    """Return the name of the side whose best sample is the smallest."""
    return min(samples, key=lambda name: min(samples[name]))
