"""Training on meshes computes what training on one device computes, and its runs continue on any mesh or none."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import once
import pytest
import train_divided as support

import portable_gpt2 as pg
from portable_gpt2.checkpoint.safetensors_files import open_safetensors
from portable_gpt2.training import Recipe, Run, Trainer

# Sums in another order differ by rounding errors: in float64 by about 2^-53 of the terms. The steps are so few and eps
# is so large that they do not grow much (the largest difference was 2e-14). A wrong sum, mean or norm changes the first
# losses by more than 1e-5.
BOUND = 1e-11

# JAX compiles for seconds on each mesh, so few are tested unless the variable asks for all, as `nox -s mesh` does.
ALL = os.environ.get("PORTABLE_GPT2_MESHES") == "all"
MORE = ("data=1,model=1", "model=2", "data=2", "data=4,model=1", "model=4") if ALL else ()
MESHES = [("jax", sizes, False) for sizes in (*MORE, "data=2,model=2")]
SHARDED = [("jax", "data=2,model=2", True), *([("jax", "data=4", True)] if ALL else [])]
ON_TORCH = [
    ("torch", "data=1,model=2", False),
    *([("torch", "data=2", False)] if ALL else []),
    ("torch", "data=2", True),
]
# Meshes of another number of processes.
ON_MORE = [
    ("torch-of-1", "data=1,model=1", False),
    *(("torch-of-4", sizes, False) for sizes in ("data=2,model=2", "data=4", "model=4")),
    *(("torch-of-4", sizes, True) for sizes in ("data=2,model=2", "data=4")),
    *(("jax-of-2", sizes, False) for sizes in ("data=2", "model=2")),
]
TRAINED = [*MESHES, *SHARDED, *ON_TORCH, *(ON_MORE if ALL else [])]
by_name = {"ids": lambda each: f"{each[0]}, {each[1]}{', sharded' if each[2] else ''}"}

TEXT = "to be or not to be, that is the question. " * 40
SILENCE = (b"", b"")
COMMAND = [
    *("train", "--backend", "torch", "--mesh", "data=2", "--data", "text.txt", "--vocab-size", "259"),
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--n-ctx", "8", "--batch-size", "2", "--warmup", "0"),
    *("--eval-every", "4"),
]


def name_of(engine, sizes, shard):
    return f"{engine}-{sizes}{'-sharded' * shard}"


def started(engine, directory, tasks, n_ranks=1, **environment):
    """Start the processes of one script."""
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last number counts
    env = {**os.environ, "JAX_ENABLE_X64": "1", "XLA_FLAGS": devices, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if engine == "torch":
        env |= {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    elif n_ranks > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(n_ranks), "XLA_FLAGS": ""}
    env |= environment
    arguments = [sys.executable, support.__file__, engine, str(directory), json.dumps(tasks)]
    return [
        subprocess.Popen(
            arguments,
            env={**env, "RANK": str(rank), "JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(n_ranks)
    ]


def ended(processes, stopped=None):
    """Wait for the processes. Return the pairs of their stdout and stderr, and their statuses.

    A process that is stopped gets killed after the others have ended.
    """
    try:
        if stopped is not None:
            for process in processes:
                if process is not processes[stopped]:
                    process.wait(timeout=120)
            processes[stopped].kill()
        outputs = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return outputs, [process.returncode for process in processes]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, jax, torch):
    """Train on all meshes, and return the directory that has the runs and the results of each process."""
    return once.filled(tmp_path_factory, "meshes", train_on_all)


def train_on_all(found):
    """Fill the directory. Each process of the meshes adds its results."""
    (found / "text.txt").write_text(TEXT)
    tasks = [["whole", name_of("jax", sizes, shard), sizes, shard] for _, sizes, shard in (*MESHES, *SHARDED)]
    tasks += [
        ["whole", "moving", "data=2,model=2", False, 15],
        ["whole", "interrupted-jax", "data=2,model=2", True, 20],
        ["whole", "interrupted-jax", "data=2,model=2", True],
    ]
    assert ended(started("jax", found, tasks)) == ([SILENCE], [0])
    tasks = [["whole", name_of(*each), each[1], each[2]] for each in ON_TORCH]
    tasks += [
        ["whole", "moving", "data=2", True, 32],
        ["whole", "interrupted-torch", "data=2", True, 20],
        ["whole", "interrupted-torch", "model=2", False, 30],
        ["whole", "interrupted-torch", "data=2", True],
        ["refused_write", "refused", "model=2"],
        ["told", *COMMAND, "--out", "told", "--steps", "8", "--shard-optimizer"],
        ["told", *COMMAND, "--out", "odd", "--steps", "8", "--batch-size", "3"],
    ]
    assert ended(started("torch", found, tasks, 2)) == ([SILENCE] * 2, [0] * 2)
    for engine, n in (("torch", 1), ("torch", 4), ("jax", 2)) if ALL else ():
        name = f"{engine}-of-{n}"
        (found / name).mkdir()
        tasks = [["whole", f"../{name_of(*each)}", *each[1:]] for each in ON_MORE if each[0] == name]
        outputs, statuses = ended(started(engine, found / name, tasks, n))
        assert statuses == [0] * n, outputs
        assert [err for _, err in outputs] == [b""] * n  # gloo writes to stdout that it is connected
    support.trained(found / "one", one_device())


def one_device():
    return Trainer(support.CONFIG, support.RECIPE, "numpy")


def results(directory, engine, i, n=2):
    return [json.loads((directory / f"{engine}-{i}-{rank}.json").read_text()) for rank in range(n)]


def numbers(directory, name):
    """Return the metrics of a run but the seconds, [step, 4], with NaN for those that were not computed."""
    lines = Run.open(directory / name).metrics()
    return np.asarray([[line.get(key, np.nan) for key in ("step", "loss", "norm", "held_out")] for line in lines])


def state_of(directory, name):
    last = Run.open(directory / name).last["name"]
    files = (directory / name / "training" / last / each for each in ("model.safetensors", "adamw.safetensors"))
    return {path: tensor.read() for file in files for path, tensor in open_safetensors(file).items()}


@pytest.mark.parametrize("each", TRAINED, **by_name)
def test_a_mesh_trains_as_one_device_does(directory, each):
    """Catches a mean over the local batch, a sum that is missing or made twice, and a norm that counts a part twice."""
    found, expected = numbers(directory, name_of(*each)), numbers(directory, "one")
    assert found.shape == (51, 4)
    np.testing.assert_allclose(found, expected, rtol=BOUND, atol=0)
    found, expected = state_of(directory, name_of(*each)), state_of(directory, "one")
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=0, atol=BOUND * max(1e-3, abs(x).max()), err_msg=path)


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_moments_are_divided_over_data(directory, engine):
    """Catches moments that each device has as a whole."""
    i = {"jax": len(MESHES), "torch": len(ON_TORCH) - 1}[engine]
    n = {"jax": 4, "torch": 2}[engine]
    (params, *moments), *_ = results(directory, engine, i, 1 if engine == "jax" else 2)
    assert moments[0] == moments[1]
    # A few biases, which are short, are whole.
    assert moments[0] < (0.7 if engine == "torch" else 0.75) * params, n


def test_a_run_goes_on_on_another_mesh_and_on_one_device(directory):
    """Catches moments of another part, windows of another step, and a checkpoint that remembers the mesh."""
    assert Run.open(directory / "moving").last["step"] == 32
    support.trained(directory / "moving", one_device())
    np.testing.assert_allclose(numbers(directory, "moving"), numbers(directory, "one"), rtol=BOUND, atol=0)


def test_a_run_that_goes_on_on_the_same_mesh_has_the_same_bits(directory):
    """Catches a state that is not saved exactly, or that is computed anew."""
    np.testing.assert_array_equal(
        numbers(directory, "interrupted-jax"), numbers(directory, name_of("jax", "data=2,model=2", True))
    )
    before = numbers(directory, "interrupted-torch")[:21]
    np.testing.assert_array_equal(before, numbers(directory, name_of("torch", "data=2", True))[:21])
    np.testing.assert_allclose(numbers(directory, "interrupted-torch"), numbers(directory, "one"), rtol=BOUND, atol=0)
    found = state_of(directory, "interrupted-jax")
    for path, x in state_of(directory, name_of("jax", "data=2,model=2", True)).items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_if_the_checkpoint_cannot_be_written_all_processes_fail(directory):
    """Catches a process that waits for one that has failed."""
    first, second = results(directory, "torch", len(ON_TORCH) + 4)
    assert first == "OSError: no space left"
    assert second == "MeshError: process 0 of the mesh: no space left"
    assert Run.open(directory / "refused").last["step"] == 2


def test_the_command_trains_on_a_mesh_and_one_process_speaks(directory):
    """Catches a process that repeats the messages of the first."""
    (status, out, err), second = results(directory, "torch", len(ON_TORCH) + 5)
    assert (status, out) == (0, "")
    assert "parameters on torch, the mesh data=2,model=1, 16 tokens per step" in err
    assert "told: the model of step" in err
    assert second == [0, "", ""]
    assert len(Run.open(directory / "told").metrics()) == 9
    assert pg.GPT2.load(directory / "told", backend="numpy").generate("to be", max_new_tokens=3, seed=0)


def test_a_batch_that_cannot_be_divided_is_refused(directory):
    (status, _, err), second = results(directory, "torch", len(ON_TORCH) + 6)
    assert status == 2
    assert "batch_size is 3; the mesh data=2,model=1 divides each batch over data=2: give a multiple of 2" in err
    assert second == [2, "", ""]
    assert not (directory / "odd").exists()


HOW = [("SIGKILL", 0), ("SIGKILL", 1), *([("SIGSTOP", 1)] if ALL else [])]


@pytest.mark.parametrize(("how", "number"), HOW, ids=str)
def test_if_a_process_is_killed_or_hangs_the_others_end_and_the_run_goes_on(torch, tmp_path, how, number):
    """Catches a process that waits for the other one forever, and a traceback."""
    (tmp_path / "text.txt").write_text(TEXT)
    out = ["--out", str(tmp_path / "run"), "--steps", "8"]
    hangs = how == "SIGSTOP"
    timeout = {"PORTABLE_GPT2_MESH_TIMEOUT": "5"} if hangs else {}
    processes = started("torch", tmp_path, [["killed", how, number, 6, *COMMAND, *out]], 2, **timeout)
    found = ended(processes, number if hangs else None)
    assert found == ([SILENCE] * 2, [-signal.SIGKILL * (number == i) for i in range(2)])
    status, written, err, seconds = json.loads((tmp_path / f"torch-0-{1 - number}.json").read_text())
    assert (status, written, seconds < 30) == (2, "", True)
    last = err.splitlines()[-1]
    assert last.startswith("portable-gpt2: another process of the mesh has ended, or does not answer: ")
    assert ("along an axis of the mesh did not come within 5 s (PORTABLE_GPT2_MESH_TIMEOUT); to con" in last) == hangs
    assert last.endswith(f"portable-gpt2 train --resume --out {tmp_path / 'run'}")
    assert len(err.splitlines()) == (1 if number == 0 else 4)
    assert Run.open(tmp_path / "run").last["step"] == 4
    again = ["--resume", "--out", str(tmp_path / "run"), "--backend", "numpy"]
    assert pg.cli.commands.run(["train", *again]) == 0
    assert [line["step"] for line in Run.open(tmp_path / "run").metrics()] == list(range(9))


def test_numpy_is_refused():
    """The message names the backends that have meshes."""
    with pytest.raises(ValueError, match=r"backend 'numpy' computes on one device; .* 'jax' or 'torch'"):
        Trainer(support.CONFIG, support.RECIPE, "numpy", {"data": 2})


def test_tensorflow_is_refused(tf):
    with pytest.raises(ValueError, match=r"backend 'tensorflow' computes on one device; .* 'jax' or 'torch'"):
        Trainer(support.CONFIG, support.RECIPE, "tensorflow", {"data": 2})


def test_a_mesh_is_needed_to_divide_moments():
    with pytest.raises(ValueError, match="needs a mesh"):
        Trainer(support.CONFIG, support.RECIPE, "numpy", shard_optimizer=True)


def test_what_needs_one_device_is_refused(jax):
    with pytest.raises(ValueError, match="leave out the mesh"):
        Trainer(support.CONFIG, Recipe(batch_size=4, reproducible=True), "jax", {"data": 1})


def test_parameters_that_are_not_on_the_mesh_are_refused(jax):
    """Catches whole arrays of which each device would take a part of another shape."""
    recipe = Recipe(batch_size=4, gradient_accumulation_steps=2)
    trainer = Trainer(support.CONFIG, recipe, "jax", {"data": 1})
    with pytest.raises(ValueError, match="is not on the mesh"):
        trainer.start(pg.init_params(support.CONFIG, backend="jax"))
    params = pg.init_params(support.CONFIG, backend="numpy")
    found, _ = trainer.tensors(trainer.start(params))
    for path, x in pg.params.flatten(params):
        np.testing.assert_array_equal(found[path].read(), x)
    with pytest.raises(ValueError, match="expected one shape"):
        trainer.step(trainer.start(params), [np.zeros((n, 4), np.int32) for n in (4, 3)])
