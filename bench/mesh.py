"""Measure a model on meshes: ``python -m bench.mesh --help``.

Each mesh runs in processes of its own: as many as it has devices with PyTorch, which torchrun starts, and one with JAX.
The efficiency is the rate of a mesh of n devices, divided by n times the rate of the first mesh. The batch grows with
``data``, so that each device has as many texts as one device has alone. On a CPU, the processes and the virtual devices
share the processors; the table then shows what the messages between them cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

BACKENDS = ("torch", "jax")
MESHES = ("model=1", "model=2", "data=2", "model=4", "data=2,model=2", "data=4")
HEADER = (
    "| backend | mesh | prompt, tokens/s | efficiency | decoding, tokens/s | efficiency |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    """Run the measurement, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="bench.mesh", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("--shape", default="124M", help="a shape of bench.checkpoints, such as small (default: 124M)")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="run only these backends")
    add("--meshes", nargs="+", default=list(MESHES), metavar="SIZES", help="meshes; the first is the reference")
    add("--batch", type=int, default=4, metavar="N", help="texts for each part of the batch (default: 4)")
    add("--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    add("--new", type=int, default=32, metavar="N", help="tokens that are decoded (default: 32)")
    add("--dtype", default="float32", help="dtype of the weights (default: float32)")
    add("--child", metavar="DIR", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        _measure(chosen)
        return 0
    from . import checkpoints

    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        checkpoints.make(chosen.shape, directory)
        for backend in chosen.backends:
            first = None
            for mesh in chosen.meshes:
                rates = _start(backend, mesh, directory, chosen)
                first = first or rates
                cells = [
                    f"{rate:.4g} | {rate / alone / _devices(mesh):.2f}"
                    for rate, alone in zip(rates, first, strict=True)
                ]
                print(f"| {backend} | {mesh} | {' | '.join(cells)} |", flush=True)
    return 0


def _devices(mesh: str) -> int:
    from portable_gpt2.mesh import parse

    return int(np.prod([*parse(mesh).values()]))


def _start(backend: str, mesh: str, directory: str, chosen: argparse.Namespace) -> list[float]:
    """Return the rates of a mesh, which processes of its own measure."""
    n = _devices(mesh)
    start = [sys.executable]
    environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // n)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend == "torch":
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    else:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n}"  # it changes only the CPU
    options = {"--batch": chosen.batch, "--prompt": chosen.prompt, "--new": chosen.new, "--dtype": chosen.dtype}
    given = [each for name, value in options.items() for each in (name, str(value))]
    command = [*start, "-m", "bench.mesh", "--child", directory, "--backends", backend, "--meshes", mesh, *given]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    rates: list[float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return rates


def _measure(chosen: argparse.Namespace) -> None:
    """Print the tokens per second of prompts and of decoding on a mesh, in the first process."""
    import portable_gpt2 as pg
    from portable_gpt2.mesh import DATA, parse

    (backend,), (mesh,) = chosen.backends, chosen.meshes
    sizes = parse(mesh)
    model: Any = pg.GPT2.load(chosen.child, backend=backend, mesh=sizes, dtype=chosen.dtype, tokenizer=None)
    batch = chosen.batch * sizes.get(DATA, 1)
    rows = np.random.default_rng(0).integers(0, model.config.n_vocab, (batch, chosen.prompt)).tolist()
    decoder = model._decoder
    prompts, steps = [], []
    for _ in range(3):  # the first compiles
        cache = decoder.new_cache(batch, decoder.capacity(chosen.prompt + chosen.new, chosen.prompt + chosen.new), None)
        began = time.perf_counter()
        _, cache = decoder.read(rows, cache, 1)
        read = time.perf_counter()
        for _ in range(chosen.new):
            _, cache = decoder.read([[7]] * batch, cache, 1)
        prompts.append(read - began)
        steps.append(time.perf_counter() - read)
    if model.mesh.is_first:
        rates = [batch * chosen.prompt / min(prompts[1:]), batch * chosen.new / min(steps[1:])]
        print(json.dumps(rates), flush=True)
    model.mesh.agree(True)
    os._exit(0)  # because gloo's threads may abort an interpreter that shuts down normally


if __name__ == "__main__":
    sys.exit(main())
