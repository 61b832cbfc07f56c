"""Check the reproducible mode at a real size, and measure what it costs: ``python -m bench.reproducible --help``.

Each combination of a backend, a number of threads and a choice of kernels runs in a process of its own. It computes the
logits of the same 32 texts in several ways, and prints one hash for each way. All hashes must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

BACKENDS = ("numpy", "torch", "jax", "tensorflow")
KERNELS = {
    "own choice": {},
    "AVX2": {"OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"OPENBLAS_CORETYPE": "Nehalem", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
N_TEXTS, N_TOKENS = 32, 8


def main() -> int:
    """Run the check or the measurement; return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.reproducible", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("--model", default="shakespeare", metavar="DIR", help="checkpoint (default: the shipped model)")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="run only these backends")
    add("--device", metavar="DEVICE", help="such as cuda:0; number of threads and kernels do not matter there")
    add("--costs", action="store_true", help="measure times and memory instead of the check")
    add("--texts", type=int, metavar="N", help="hash the logits of N texts, with one process for each backend")
    add("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(_CHILDREN[chosen.child](chosen)))
        return 0
    threads = "2" if chosen.costs or chosen.device else "1"
    settings: list[tuple[str, str, dict[str, str]]] = [(threads, "own choice", {})]
    if not chosen.costs and chosen.texts is None and not chosen.device:
        settings = [(threads, name, KERNELS[name]) for threads, name in itertools.product("12", KERNELS)]
    seen = set()
    for backend, (threads, kernels, environment) in itertools.product(chosen.backends, settings):
        found = _start(backend, threads, environment, chosen)
        hashes = found.pop("hashes", {})
        seen |= set(hashes.values())
        print(f"{backend}, {threads} threads, kernels: {kernels}: {len(set(hashes.values()))} hash", found, flush=True)
    if not chosen.costs:
        print(f"{len(seen)} hash in all: {', '.join(seen)}")
    return len(seen) > 1


def _start(backend: str, threads: str, environment: dict[str, str], chosen: argparse.Namespace) -> dict[str, Any]:
    child = "costs" if chosen.costs else "check" if chosen.texts is None else "texts"
    command = [sys.executable, "-m", "bench.reproducible", "--model", chosen.model, "--backends", backend]
    command += ["--child", child, *(["--texts", str(chosen.texts)] if chosen.texts else [])]
    command += ["--device", chosen.device] if chosen.device else []
    limits = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "TF_CPP_MIN_LOG_LEVEL": "3"}
    limits |= {"TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads}
    if threads == "1":  # XLA takes as many threads as there are processors
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        output = subprocess.run(
            command, env={**os.environ, **limits, **environment}, stdout=subprocess.PIPE, check=True
        )
    finally:
        os.sched_setaffinity(0, _PROCESSORS)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


_PROCESSORS = os.sched_getaffinity(0)


def _load(chosen: argparse.Namespace, **options: Any) -> Any:
    import portable_gpt2 as pg

    return pg.GPT2.load(chosen.model, backend=chosen.backends[0], device=chosen.device, tokenizer=None, **options)


def _tokens(n_vocab: int, n_texts: int = N_TEXTS, n: int = N_TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n_vocab, (n_texts, n)).astype(np.int32)


def _check(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return a hash of the same logits, computed in several ways, and the number of undecided elements."""
    model = _load(chosen, reproducible=True)
    tokens = _tokens(model.config.n_vocab)
    lengths = [N_TOKENS - i % 4 for i in range(N_TEXTS)]
    ways = {f"batches of {n}": _in_batches(model, tokens, n) for n in (1, 8, 32)}
    ways |= {
        f"cached, batches of {n}{', ragged' if ragged else ''}": _cached(model, tokens, n, lengths if ragged else None)
        for n in (1, 8, 32)
        for ragged in (False, True)
    }
    # The last tokens of a ragged text are not read, so their logits are left out everywhere.
    hashes = {name: _hash(found, lengths) for name, found in ways.items()}
    return {"hashes": hashes, "seconds": round(time.process_time())}


def _hash(logits: list[np.ndarray], lengths: list[int]) -> str:
    digest = hashlib.sha256()
    for rows, n in zip(logits, lengths, strict=True):
        digest.update(np.ascontiguousarray(rows[:n]).data)
    return digest.hexdigest()[:16]


def _in_batches(model: Any, tokens: np.ndarray, n: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for i in range(0, len(tokens), n):
        found += list(model.backend.to_numpy(model.logits(tokens[i : i + n])))
    return found


def _cached(model: Any, tokens: np.ndarray, n: int, lengths: list[int] | None) -> list[np.ndarray]:
    """Return logits of texts that are read in two pieces, and padded on the left if they are ragged."""
    import portable_gpt2 as pg

    step = model._compile(
        lambda params, tokens, cache: pg.gpt2(params, tokens, model.config, cache), model.params, donate=("cache",)
    )
    found: list[np.ndarray] = []
    for i in range(0, len(tokens), n):
        padding = [0] * n if lengths is None else [N_TOKENS - each for each in lengths[i : i + n]]
        rows = [
            np.concatenate([[0] * k, row[: N_TOKENS - k]]) for k, row in zip(padding, tokens[i : i + n], strict=True)
        ]
        padded = np.asarray(rows, np.int32)
        cache = pg.new_cache(
            model.params, model.config, batch=n, capacity=N_TOKENS, padding=padding if any(padding) else None
        )
        parts = []
        for piece in (padded[:, :5], padded[:, 5:6], padded[:, 6:]):
            start = sum(part.shape[1] for part in parts)
            given = model.backend.from_numpy(np.ascontiguousarray(piece), device=model._device)
            logits, cache = step(given, cache._replace(position=start))
            parts.append(model.backend.to_numpy(logits))
        found += [row[k:] for row, k in zip(np.concatenate(parts, axis=1), padding, strict=True)]
    return found


def _texts(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return one hash of the logits of many texts of different lengths, and how many elements of each op were hard."""
    from portable_gpt2.correct_rounding import mode
    from portable_gpt2.model import gpt2
    from portable_gpt2.op import interpreted

    model, digest = _load(chosen), hashlib.sha256()
    interpreter = mode.Interpreter(model.params)
    random = np.random.default_rng(1)
    for _ in range(chosen.texts):
        tokens = random.integers(0, model.config.n_vocab, (1, 16 << random.integers(3))).astype(np.int32)
        given = model.backend.from_numpy(tokens, device=model._device)
        with interpreted(interpreter):
            logits, _ = gpt2(model.params, given, model.config)
        digest.update(np.ascontiguousarray(model.backend.to_numpy(logits)).data)
    counts: Counter[str] = interpreter.counts
    return {"hashes": {"texts": digest.hexdigest()[:16]}, **counts}


def _costs(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the times of a prompt of 128 tokens and of a decode step, and the memory, of both modes."""
    found: dict[str, Any] = {}
    for name, reproducible in (("float32", False), ("reproducible", True)):
        model = _load(chosen, reproducible=reproducible)
        prompt = _tokens(model.config.n_vocab, 1, 128)[0].tolist()

        def read(model: Any = model, prompt: list[int] = prompt) -> tuple[np.ndarray, Any]:
            import portable_gpt2 as pg

            return model._decoder.read([prompt], pg.new_cache(model.params, model.config, capacity=256))

        def step(model: Any = model, state: list[Any] = [read()[1]]) -> Any:  # noqa: B006
            _, state[0] = model._decoder.read([[7]], state[0])

        found[name] = {
            "prompt, ms": _median(read, 5),
            "decode, ms": _median(step, 30),
            "logits of the prompt, ms": _median(lambda: model.backend.to_numpy(model.logits([prompt])), 5),  # noqa: B023
            "memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        }
    plain, rounded = found.values()
    found["ratio"] = {key: round(rounded[key] / plain[key], 2) for key in plain}
    return found


def _median(function: Callable[[], Any], n: int) -> float:
    times = []
    for _ in range(n + 2):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return round(1000 * float(np.median(times[2:])), 1)


_CHILDREN = {"check": _check, "texts": _texts, "costs": _costs}

if __name__ == "__main__":
    sys.exit(main())
