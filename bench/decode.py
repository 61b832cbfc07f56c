"""Decoding of one text.

Its time per token is compared with the time to read all weights once, with other libraries, and between positions in
the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .clock import in_turn
from .peers import PEERS
from .rows import BANDWIDTH, Row
from .run import LEFT_OUT, Run
from .throughput import weight_bytes
from .worker import Worker

PROMPT, NEW = 128, 64
POSITIONS = (10, 500, 1000)
# The number of tokens measured at each position. From position 500, a cache of 512 positions has room for 12 tokens.
WINDOW = 12


def plan(backend: str) -> list[Row]:
    """Return the planned rows for one framework."""
    names = [
        "124M against the limit",
        *(f"124M against {peer}" for peer in PEERS[backend]),
        "sampling against greedy",
        *map(_position, POSITIONS),
        "355M against the limit",
    ]
    return [Row("decode", backend, name, "ms/token") for name in names]


def _position(position: int) -> str:
    first = POSITIONS[0]
    return f"position {position}" + (f" against position {first}" if position != first else "")


def measure(run: Run, backend: str) -> Iterator[Row]:
    """Measure the planned rows on one framework."""
    rows = {row.name: row for row in plan(backend)}
    yield from _beside_peers(run, backend, rows)
    yield from _positions(run, backend, rows)
    if run.quick:
        yield rows["355M against the limit"].failed(LEFT_OUT)
    else:
        yield from _larger(run, backend, rows)


def _beside_peers(run: Run, backend: str, rows: dict[str, Row]) -> Iterator[Row]:
    """Measure greedy decoding from position 128 to 192.

    A long and a short generation are timed for every side. The time per token is the difference between the two times,
    divided by the number of additional tokens.
    """
    new = 16 if run.quick else NEW
    model = {"backend": backend, "directory": run.checkpoint("124M"), "prompt": PROMPT}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        machine, ours = (stack.enter_context(Worker()) for _ in range(2))
        sides = {
            BANDWIDTH: lambda: machine.ask("machine:bandwidth"),
            "ours, 1 token": lambda: ours.ask("model:generate", **model, new=1),
            "ours": lambda: ours.ask("model:generate", **model, new=1 + new),
            "ours, sampled": lambda: ours.ask("model:generate", **model, new=1 + new, sampled=True),
        }
        for peer in PEERS[backend]:
            theirs = stack.enter_context(Worker(KERAS_BACKEND=backend))
            for side, n in ((f"{peer}, 1 token", 1), (peer, 1 + new)):
                sides[side] = lambda theirs=theirs, peer=peer, n=n: theirs.ask(
                    "peers:generate", peer=peer, prompt=PROMPT, new=n
                )
        samples = in_turn(run.rounds, sides, failures)

    def per_token(side: str, first: str) -> float:
        return (min(samples[side]) - min(samples[first])) / new * 1e3

    def row(name: str, *sides: str) -> Row | None:
        """Return the row as failed if one of its sides failed; otherwise return None."""
        why = [failures[side] for side in ("ours, 1 token", "ours", *sides) if side in failures]
        return rows[name].failed(why[0]) if why else None

    def kept(*sides: str) -> dict[str, list[float]]:
        return {side: samples[side] for side in ("ours, 1 token", "ours", *sides)}

    yield row("124M against the limit", BANDWIDTH) or rows["124M against the limit"].measured(
        per_token("ours", "ours, 1 token"),
        reads="weights",
        n_bytes=weight_bytes("124M"),
        samples=kept(BANDWIDTH),
        note=f"a prompt of {PROMPT} tokens and the first new token take {min(samples['ours, 1 token']) * 1e3:.0f} ms",
    )
    for peer in PEERS[backend]:
        name, first = f"124M against {peer}", f"{peer}, 1 token"
        yield row(name, first, peer) or rows[name].measured(
            per_token("ours", "ours, 1 token"),
            per_token(peer, first),
            peer,
            samples=kept(first, peer),
            note=f"its first token takes {min(samples[first]) * 1e3:.0f} ms",
        )
    yield row("sampling against greedy", "ours, sampled") or rows["sampling against greedy"].measured(
        per_token("ours, sampled", "ours, 1 token"),
        per_token("ours", "ours, 1 token"),
        "greedy",
        samples=kept("ours, sampled"),
        note="top_k 40, top_p 0.95",
    )


def _positions(run: Run, backend: str, rows: dict[str, Row]) -> Iterator[Row]:
    """Measure the time per token of twelve tokens after a prompt, for prompts of three lengths."""
    model = {"backend": backend, "directory": run.checkpoint("124M"), "new": WINDOW}
    failures: dict[str, str] = {}
    with Worker() as ours:
        sides = {
            f"position {position}": lambda position=position: ours.ask(
                "model:token_seconds", **model, position=position
            )
            for position in POSITIONS
        }
        samples = in_turn(run.rounds, sides, failures)
    first, *later = sides
    if first in failures:
        yield from (rows[_position(position)].failed(failures[first]) for position in POSITIONS)
        return
    yield rows[first].measured(min(samples[first]) * 1e3, samples={first: samples[first]})
    for side in later:
        row = rows[f"{side} against {first}"]
        if side in failures:
            yield row.failed(failures[side])
        else:
            both = {each: samples[each] for each in (first, side)}
            yield row.measured(min(samples[side]) * 1e3, min(samples[first]) * 1e3, first, samples=both)


def _larger(run: Run, backend: str, rows: dict[str, Row]) -> Iterator[Row]:
    """Compare decoding of the 355M shape, from position 128, with the time to read its weights once."""
    model = {"backend": backend, "directory": run.checkpoint("355M"), "position": PROMPT, "new": NEW // 2}
    failures: dict[str, str] = {}
    with Worker() as machine, Worker() as ours:
        sides = {
            BANDWIDTH: lambda: machine.ask("machine:bandwidth"),
            "ours": lambda: ours.ask("model:token_seconds", **model),
        }
        samples = in_turn(run.rounds, sides, failures)
    row = rows["355M against the limit"]
    if failures:
        yield row.failed("; ".join(failures.values()))
    else:
        value = min(samples["ours"]) * 1e3
        yield row.measured(value, reads="weights", n_bytes=weight_bytes("355M"), samples=samples)
