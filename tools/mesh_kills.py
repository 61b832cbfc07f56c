"""Kill processes of training runs on a mesh at random moments: ``python tools/mesh_kills.py --help``.

First a run trains undisturbed. Then, for each moment, a run with the same options starts, one of its processes gets
SIGKILL (or SIGSTOP), and the script checks that

- the other processes end, within 30 s and with one line on stderr that says what to do,
- the directory of the run is whole: its last checkpoint can be read,
- the run continues, or starts again if it had no checkpoint, and its last weights, moments and metrics have the bits of
  the undisturbed run. With ``--then``, it continues on another mesh or backend, and may differ by rounding errors.

The moments are spread over the life of a process: its start, its steps and checkpoints, and its end. With JAX, they
begin when the processes are connected, because they wait for each other for ten minutes before. The exit status is the
number of runs in which a check failed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import portable_gpt2 as pg
from portable_gpt2 import cli
from portable_gpt2.checkpoint.safetensors_files import open_safetensors
from portable_gpt2.cli import commands  # noqa: F401  (a forked process need not import it)
from portable_gpt2.mesh import parse
from portable_gpt2.training import Run

STEPS = 8
OPTIONS = (
    *("--n-layer", "1", "--n-head", "4", "--n-embd", "32", "--n-ctx", "32", "--vocab-size", "270", "--batch-size", "4"),
    *("--steps", str(STEPS), "--warmup", "0", "--eval-every", "2"),
)
PATIENCE = 30
LINES = (
    "portable-gpt2: another process of the mesh has ended, or does not answer: ",
    "portable-gpt2: a library has aborted this process, probably because another process of the mesh has ended; ",
    "portable-gpt2: this process got SIGTERM, which torchrun sends if another process of the mesh has ended; ",
)


class Forked:
    """A process that was forked from this one, with the methods of a `subprocess.Popen`.

    It needs a fraction of the time of a new one, because the modules are imported already.
    """

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.environ.update(env)
                sys.argv = ["portable-gpt2", *arguments]
                os._exit(cli.main())
            except SystemExit as ended:
                os._exit(ended.code)  # type: ignore[arg-type]
            finally:
                traceback.print_exc()
                os._exit(70)

    def poll(self) -> int | None:
        """Return the status if the process has ended, and None otherwise."""
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, limit: float) -> None:
        """Wait for the end of the process."""
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("", limit)
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)


stores: list[Any] = []


def forked(n: int, command: list[str], log: Path) -> list[Any]:
    """Start n processes of PyTorch as torchrun would: their common store is in this process, which outlives them."""
    import torch
    import torch.distributed.device_mesh
    import torch.distributed.tensor  # each process would take seconds to import this
    import torch.utils._pytree
    import tqdm  # noqa: F401

    pg.get_backend("torch").xp  # noqa: B018
    log.unlink(missing_ok=True)
    torch.set_num_threads(1)
    if n == 1:
        return [Forked(command, {}, log)]
    stores[:] = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    env = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[0].port), "WORLD_SIZE": str(n),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    return [Forked(command, {**env, "RANK": str(i), "LOCAL_RANK": str(i)}, log) for i in range(n)]


def start(engine: str, sizes: str, arguments: list[str], log: Path, torchrun: bool) -> list[Any]:
    """Start the processes of a command. If torchrun starts them, it is the only one that is returned."""
    n = 1 if sizes == "numpy" else int(np.prod([*parse(sizes).values()]))
    where = ["--backend", "numpy"] if sizes == "numpy" else ["--backend", engine, "--mesh", sizes]
    if not torchrun and (engine == "torch" or sizes == "numpy"):
        return forked(n, ["train", *arguments, *where], log)
    command = ["-m", "portable_gpt2", "train", *arguments, *where]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if engine == "torch":
        begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        with log.open("w") as file:
            return [subprocess.Popen([*begin, *command], env=env, stdout=file, stderr=file)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(n)}
    with log.open("w") as file:
        return [
            subprocess.Popen(
                [sys.executable, *command], env={**env, "JAX_PROCESS_ID": str(i)}, stdout=file, stderr=file
            )
            for i in range(n)
        ]


def ranks(started: list[Any], n: int) -> dict[int, int]:
    """Return the ids of the processes of a mesh by their number, as soon as all of them exist."""
    if len(started) > 1 or n == 1:
        return {i: process.pid for i, process in enumerate(started)}
    found: dict[int, int] = {}
    while len(found) < n and started[0].poll() is None:
        for child in Path(f"/proc/{started[0].pid}/task/{started[0].pid}/children").read_text().split():
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            rank = [int(each[5:]) for each in environment if each.startswith(b"RANK=")]
            if rank and b"portable_gpt2" in command:
                found[rank[0]] = int(child)
        time.sleep(0.01)
    return found


def is_running(pid: int) -> bool:
    """Return whether a process exists, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def finish(started: list[Any], limit: float) -> list[int]:
    """Wait for processes, and kill those that still run after the limit."""
    end = time.monotonic() + limit
    for process in started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in started]


def results(directory: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the metrics of a run but the seconds, and the tensors of its last checkpoint."""
    run = Run.open(directory)
    metrics = [[line.get(key, np.nan) for key in ("step", "loss", "norm", "held_out")] for line in run.metrics()]
    last = directory / "training" / run.last["name"]
    files = (last / each for each in ("model.safetensors", "adamw.safetensors"))
    return np.asarray(metrics), {
        path: tensor.read() for file in files for path, tensor in open_safetensors(file).items()
    }


def differences(found: Any, expected: Any) -> tuple[bool, float]:
    """Return whether two results have the same bits, and their largest difference."""
    (metrics, tensors), (of_metrics, of_tensors) = found, expected
    if metrics.shape != of_metrics.shape or tensors.keys() != of_tensors.keys():
        return False, float("inf")
    pairs = [(metrics, of_metrics), *((tensors[path], of_tensors[path]) for path in tensors)]
    largest = max(float(np.nanmax(np.abs(a.astype(np.float64) - b))) for a, b in pairs)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs), largest


def main() -> int:
    """Run the checks, and print a line of JSON for each moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", choices=("torch", "jax"), default="torch")
    add("--mesh", default="data=2", metavar="SIZES")
    add("--moments", type=int, default=20, metavar="N", help="moments for each of the processes")
    add("--ranks", type=int, nargs="+", metavar="I", help="the processes to kill (default: each)")
    add("--signal", choices=("KILL", "STOP"), default="KILL")
    add("--then", metavar="SIZES", nargs="+", help="meshes on which every fifth run continues, or numpy")
    add("--seed", type=int, default=0)
    add("--shard-optimizer", action="store_true")
    add("--torchrun", action="store_true", help="let torchrun start the processes; this takes several times as long")
    chosen = parser.parse_args()
    n = int(np.prod([*parse(chosen.mesh).values()]))
    more = ["--shard-optimizer"] if chosen.shard_optimizer else []
    failures = 0
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        Path("text.txt").write_text("to be or not to be, that is the question. " * 200)

        def await_connection(name: str, ids: dict[int, int]) -> None:
            while chosen.engine == "jax" and not Path(name).exists() and all(map(is_running, ids.values())):
                time.sleep(0.01)

        def begun(name: str) -> list[Any]:
            arguments = ["--data", "text.txt", "--out", name, *OPTIONS, *more]
            return start(chosen.engine, chosen.mesh, arguments, Path(f"{name}.log"), chosen.torchrun)

        started = begun("whole")
        ids = ranks(started, n)
        await_connection("whole", ids)
        origin = time.monotonic()
        while any(map(is_running, ids.values())):
            time.sleep(0.01)
        length = time.monotonic() - origin
        assert finish(started, 60) == [0] * len(started), Path("whole.log").read_text()[-3000:]
        expected = results(Path("whole"))
        print(json.dumps({"undisturbed": True, "seconds": round(length, 2)}), flush=True)

        draw = random.Random(chosen.seed)
        moments = [(rank, i) for rank in chosen.ranks or range(n) for i in range(chosen.moments)]
        for number, (rank, i) in enumerate(moments):
            delay = (i + draw.random()) / chosen.moments * length
            while True:  # until the process still runs at that moment
                shutil.rmtree("run", ignore_errors=True)
                started = begun("run")
                ids = ranks(started, n)
                await_connection("run", ids)
                time.sleep(delay)
                if is_running(ids[rank]):
                    break
                finish(started, 60)
                delay *= 0.9
            os.kill(ids[rank], getattr(signal, f"SIG{chosen.signal}"))
            at, others = time.monotonic(), [pid for each, pid in ids.items() if each != rank]
            limit = PATIENCE if chosen.signal == "KILL" else 2 * PATIENCE
            has_signalled = chosen.torchrun or chosen.engine != "torch" or chosen.signal == "STOP"
            while any(map(is_running, others)) and time.monotonic() < at + limit:
                if not has_signalled and time.monotonic() > at + 1:
                    for pid in others:
                        os.kill(pid, signal.SIGTERM)  # as torchrun does
                    has_signalled = True
                time.sleep(0.01)
            ended = time.monotonic() - at
            if chosen.engine == "jax":
                for pid in ids.values():
                    if is_running(pid):
                        os.kill(pid, signal.SIGKILL)
            statuses = finish(started, 90)
            log = Path("run.log").read_text(errors="replace")
            lines = [line for line in log.splitlines() if line.startswith("portable-gpt2: ")]
            lost = [line for line in lines if line.startswith(LINES)]
            directory, last = Path("run"), None
            if directory.exists() and (directory / "training" / "checkpoints.json").exists():
                run = Run.open(directory)
                run.restore(pg.get_backend("numpy"))
                last = run.last["step"]
            where = chosen.then[number // 5 % len(chosen.then)] if chosen.then and number % 5 == 4 else chosen.mesh
            continued = Path("run.log" if last is None else "again.log")
            if last is None:
                again, where = begun("run"), chosen.mesh
            else:
                given = ["--resume", "--out", "run", *(more if where != "numpy" else [])]
                torchrun = chosen.torchrun and where != "numpy"
                again = start(chosen.engine, where, given, continued, torchrun)
            resumed = finish(again, 300)
            same, difference = differences(results(directory), expected) if not any(resumed) else (False, None)
            found = {
                "rank": rank, "after": round(delay, 2), "others ended after": round(ended, 2), "statuses": statuses,
                "lines": [line[15:38] for line in lost],
                "other lines": [line for line in lines if line not in lost][:2],
                "checkpoint": last, "continued on": where, "same bits": same, "difference": difference,
            }  # fmt: skip
            is_early = last is None  # a process that has not joined the others is reported by torchrun
            is_late = last == STEPS  # the processes do not need each other any more
            good = (
                ended < limit and (len(lost) == len(others) or is_early or is_late)
                and all(str(directory) in line for line in lost) and not any(resumed)
                and (same or (where != chosen.mesh and difference is not None and difference < 1e-3))
            )  # fmt: skip
            failures += not good
            print(json.dumps({"good": good, **found}), flush=True)
            if not good:
                print(log[-2500:], continued.read_text()[-1500:] if any(resumed) else "", sep="", flush=True)
    print(json.dumps({"moments": len(moments), "failures": failures}))
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
