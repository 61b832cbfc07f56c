"""Train one model with transformers and with portable_gpt2: ``python -m bench.training TEXT... [--out DIRECTORY]``.

The model is a small GPT-2: 4 layers, width 256, context 256, and a BPE tokenizer with 2,048 entries that is trained on
the text. The optimizer is AdamW with betas 0.9 and 0.99, and weight decay 0.1 for matrices. Batches have 12 random
windows. The learning rate is 1e-3 after 100 steps of warm-up, and decays by a cosine to a tenth at step 300. There is
no dropout.

A side of the comparison is transformers, or portable_gpt2 on one backend. All sides read the same windows and use the
same initial distributions; their random weights differ.

First, all sides take fifty steps, in turns of five steps. This gives the seconds per step and the losses. Then
transformers and portable_gpt2 on PyTorch are trained with three seeds, in turns of fifty steps. They are evaluated on
the complete windows of the last 5% of the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from portable_gpt2.training import train_tokenizer, write_tokens

from . import machine
from .worker import Worker, environment

BACKENDS = ("numpy", "jax", "torch", "tensorflow")
BOUNDS = {
    "torch": 1.0,
    "jax": 1.1,
    "tensorflow": 1.3,
    "numpy": 1.6,
}  # the targets: seconds per step, divided by the seconds per step of transformers
PEER = "transformers"
N_VOCAB, HELD_OUT, STEPS, SEEDS = 2048, 0.05, 300, (0, 1, 2)


def main() -> int:
    """Run the comparison; return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__.partition(":")[0] + ".")
    parser.add_argument(
        "text", type=Path, nargs="+", help="texts in UTF-8; they are joined with a blank line between them"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="directory of the results")
    parser.add_argument("--threads", type=int, default=2, help="number of processors for each side (default: 2)")
    parser.add_argument("--quick", action="store_true", help="measure the fifty steps only")
    chosen = parser.parse_args()
    processors = sorted(os.sched_getaffinity(0))[: chosen.threads]
    os.sched_setaffinity(0, processors)
    os.environ.update(environment(len(processors)))

    with tempfile.TemporaryDirectory(prefix="bench-") as room:
        file = str(Path(room, "tokens"))
        text = "\n\n".join(file.read_bytes().decode() for file in chosen.text)
        n = write_tokens([text], train_tokenizer([text], N_VOCAB), N_VOCAB, file)
        options = {"file": file, "n_training": n - round(HELD_OUT * n), "n_vocab": N_VOCAB, "steps": STEPS}
        found: dict[str, Any] = {"machine": machine.describe(len(processors)), "tokens": n}
        found["in turn"] = _in_turn(options)
        if not chosen.quick:
            found["held-out"] = _held_out(options)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    (chosen.out / "training.md").write_text(_table(found))
    _plot(found, chosen.out / "training.png")
    print(_table(found))
    return 0


def _in_turn(options: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Return the losses and the seconds of fifty steps of every side."""
    found: dict[str, list[list[float]]] = {side: [] for side in (PEER, *BACKENDS)}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(Worker()) for side in found}
        for first in range(0, 50, 5):
            for side, worker in workers.items():
                steps = {"first": first, "last": first + 5}
                found[side] += worker.ask("learners:train", side=side, seed=0, **steps, **options)
    return found


def _held_out(options: dict[str, Any]) -> dict[str, list[float]]:
    """Return the held-out losses of transformers and of portable_gpt2 on PyTorch after training, for each seed."""
    found: dict[str, list[float]] = {PEER: [], "torch": []}
    for seed in SEEDS:
        with Worker() as theirs, Worker() as ours:
            workers = {PEER: theirs, "torch": ours}
            for first in range(0, STEPS, 50):
                for side, worker in workers.items():
                    steps = {"first": first, "last": first + 50}
                    worker.ask("learners:train", side=side, seed=seed, **steps, **options)
            for side, worker in workers.items():
                found[side].append(worker.ask("learners:evaluate", side=side, seed=seed, **options))
        print(f"seed {seed}:", {side: losses[-1] for side, losses in found.items()}, flush=True)
    return found


def _seconds(steps: list[list[float]]) -> float:
    return statistics.median(seconds for _, seconds in steps[10:])  # compilation ends before step 10


def _table(found: dict[str, Any]) -> str:
    steps = found["in turn"]
    peer = _seconds(steps[PEER])
    measured = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if value != "not installed")
    lines = [
        "# Training, compared with transformers",
        "",
        f"{measured}.",
        "",
        "This file was written by `nox -s bench-training`. A step has 12 windows of 256 tokens, and the model has 3.75 "
        "million parameters. The seconds are medians of 40 steps, with all sides in turn. The last column is the "
        "largest relative difference between the first 50 losses and those of NumPy.",
        "",
        "| | seconds per step | seconds / transformers' seconds | target, at most | difference of losses |",
        "| --- | --- | --- | --- | --- |",
        f"| transformers, PyTorch | {peer:.3f} | 1 | | |",
    ]
    for side in BACKENDS:
        pairs = zip(steps[side], steps["numpy"], strict=True)
        apart = max(abs(loss / other - 1) for (loss, _), (other, _) in pairs)
        ratio = _seconds(steps[side]) / peer
        met = "met" if ratio <= BOUNDS[side] else "missed"
        lines.append(
            f"| ours, {side} | {_seconds(steps[side]):.3f} | {ratio:.2f} | {BOUNDS[side]}: {met} | {apart:.1e} |"
        )
    if "held-out" in found:
        theirs, ours = found["held-out"][PEER], found["held-out"]["torch"]
        spread = max(theirs) - min(theirs)
        met = "met" if statistics.mean(ours) <= statistics.mean(theirs) + spread else "missed"
        lines += [
            "",
            f"Held-out loss after {STEPS} steps, in nats per token, for seeds {', '.join(map(str, SEEDS))}:",
            "",
            f"- transformers {', '.join(f'{x:.4f}' for x in theirs)}: mean {statistics.mean(theirs):.4f}, "
            f"spread {spread:.4f}",
            f"- ours {', '.join(f'{x:.4f}' for x in ours)}: mean {statistics.mean(ours):.4f}; target "
            f"(at most transformers' mean plus its spread): {met}",
        ]
    return "\n".join(lines) + "\n"


def _plot(found: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (side, steps), style in zip(found["in turn"].items(), ("k:", "-", "--", "-.", ":"), strict=True):
        axes.plot(range(1, 51), [loss for loss, _ in steps], style, label=side, linewidth=3 if style == "k:" else 1.5)
    axes.set(
        xlabel="step",
        ylabel="loss, nats per token",
        title="The same windows on all sides; all of ours have the same initial weights",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
