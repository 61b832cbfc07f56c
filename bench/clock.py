"""Timing. Each round measures all sides of a comparison in turn, so a slow moment of the machine affects all sides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from .worker import WorkerError


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(
    rounds: int, sides: Mapping[str, Callable[[], float]], failures: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Call each side once per round; return the samples of each side, in the order measured.

    If a dict `failures` is given, an additional first round warms up and is not counted. A side whose worker fails is
    then left out of the remaining rounds, and its error message is stored in `failures`.
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
    """Return samples of the seconds per call. A sample is the mean over enough calls to last `at_least` seconds.

    After a warm-up, the functions are timed in turn. The number of calls per sample is chosen for each function.
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
