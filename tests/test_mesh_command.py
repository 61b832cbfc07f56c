"""Processes of a mesh: one of them writes, all draw the same tokens, an error of one is an error of all.

With PORTABLE_GPT2_MESHES=all, as in ``nox -s mesh``, they are also four processes, or two of JAX.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import mesh_processes
import pytest
import tiny
from processes import heed_signals

import portable_gpt2 as pg
from portable_gpt2 import cli
from portable_gpt2.cli import streams, train
from portable_gpt2.mesh import Mesh, MeshError, parse
from portable_gpt2.training import Run, Trainer

SCRIPT = mesh_processes.__file__
MESHES = os.environ.get("PORTABLE_GPT2_MESHES") == "all"
CONFIG = dataclasses.replace(tiny.CONFIG, n_head=4, n_vocab=385)  # there is padding after the rows of wte
RUNS = [("torch", 2, "data=1,model=2")]
if MESHES:
    RUNS += [("torch", 4, "data=2,model=2"), ("torch", 2, "data=2"), ("jax", 2, "model=2"), ("jax", 2, "data=2")]
TRAIN = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--n-ctx", "8", "--vocab-size", "259"),
    *("--steps", "2", "--warmup", "0", "--batch-size", "2"),
)
GENERATE = ("generate", "--prompt-file", "-", "-n", "6")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "model"
    tiny.model(pg.get_backend("numpy"), CONFIG).save(path)
    tiny.write_tokenizer(path)
    return path


def start(engine, n, arguments, stdin=""):
    """Run a program in n processes; return the status and the two streams of all of them together."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
    if engine == "torch":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        done = subprocess.run(
            [*torchrun, *arguments], input=stdin, capture_output=True, text=True, timeout=300, env=env
        )
        return done.returncode, done.stdout, done.stderr
    processes = started_by_jax(n, arguments, env)
    done = [process.communicate(stdin if i == 0 else "", timeout=300) for i, process in enumerate(processes)]
    return max(p.returncode for p in processes), "".join(o for o, _ in done), "".join(e for _, e in done)


def started_by_jax(n, arguments, env):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = env | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(n)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return [
        subprocess.Popen([sys.executable, *arguments], env={**env, "JAX_PROCESS_ID": str(i)}, text=True, **pipes)
        for i in range(n)
    ]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}-{run[2]}")
def ran(request, directory, tmp_path_factory):
    """The findings of each process, the directory of its files, the model of one device, and the streams."""
    engine, n, sizes = request.param
    request.getfixturevalue(engine)
    room = tmp_path_factory.mktemp("room")
    command = [*GENERATE, "--model", str(directory), "--backend", engine, "--mesh", sizes]
    methods = [SCRIPT, engine, sizes, str(directory), str(room)]
    if engine == "jax":  # in a user's program, its library writes to stdout when processes are connected
        status, _, err = start(engine, n, methods)
        assert status == 0, err[-3000:]
        status, out, err = start(engine, n, ["-P", "-m", "portable_gpt2", *command], "To be")
    else:  # processes are started once
        status, out, err = start(engine, n, [*methods, *command], "To be")
    assert status == 0, err[-3000:]
    found = [json.loads((room / f"{i}.json").read_text()) for i in range(n)]
    return found, room, pg.GPT2.load(directory, backend="numpy"), out, err, sizes


def test_all_processes_draw_the_same_tokens_without_a_seed(ran):
    """Catches a random seed per process, and one seed for all texts."""
    found, *_ = ran
    assert all(each["count"] == len(found) for each in found)
    assert all(each["seedless"] == found[0]["seedless"] and each["seeds"] == found[0]["seeds"] for each in found)
    first, second = found[0]["seedless"]
    assert first != second
    assert len(set(found[0]["seeds"])) == 2


def test_different_arguments_are_refused_in_all_processes(ran):
    """Catches texts that are mixed from two seeds, and processes that wait for each other forever."""
    for each in ran[0]:
        for name, what in (("seed", "prompts, seeds"), ("prompt", "prompts, seeds"), ("text", "texts or options")):
            kind, message = each[f"{name} of each"]
            assert kind == "ValueError"
            assert f"given different {what}" in message


def test_processes_send_each_other_bytes_flags_and_errors(ran):
    """Catches a block that is lost, bytes of another process, and an error that only one process learns of."""
    found, *_ = ran
    *others, last = found
    for each in found:
        assert each["common"]
        assert each["empty"]
        assert each["of the last"] == str(len(found) - 1)
        assert each["agree"] == [True, False, False]
    assert last["together"] == ["OSError", "no such disk"]
    assert all(
        each["together"] == ["MeshError", f"process {len(found) - 1} of the mesh: no such disk"] for each in others
    )


def test_a_model_saved_on_a_mesh_has_the_bytes_of_one_saved_on_one_device(ran, tmp_path):
    """Catches c_attn in the mesh's order, rows of padding, and a process whose file replaces that of another."""
    _, room, one, *_ = ran
    one.save(tmp_path / "one")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (room / "saved").iterdir()} == files


def test_a_model_that_cannot_be_saved_is_an_error_in_all_processes(ran):
    """Catches processes that wait for process 0, and half a checkpoint."""
    found, room, one, *_, sizes = ran
    for i, each in enumerate(found):
        for name, kind, text in (("again", "FileExistsError", "exists already"), ("full", "OSError", "no space left")):
            assert each[name][0] == (kind if i == 0 else "MeshError")
            assert text in each[name][1]
        assert dict(parse(each["mesh of the framework"][0])) == {"data": 1, "model": 1, **parse(sizes)}
        assert each["export"][0] == "ValueError"
        assert each["export"][1].startswith("export needs a model on one device")
        expected = list(one.stream_ids([1, 2, 3], max_new_tokens=5, seed=3))
        assert each["still works"] == each["mesh of the framework"][1] == expected
    assert not (room / "full").exists()
    assert sorted(path.name for path in room.iterdir() if not path.name.startswith(".")) == sorted(
        ["saved", *(f"{i}.json" for i in range(len(found)))]
    )


def test_process_0_alone_writes_and_reads_stdin(ran):
    """Catches a process that writes too, one that reads a part of stdin, and a library's messages in the text."""
    _, _, one, out, err, _ = ran
    seed = int(err.split("seed ")[1].split(",")[0])
    assert out == "To be" + one.generate("To be", max_new_tokens=6, seed=seed) + "\n"
    assert err.count("<GPT2 of") == 1
    assert err.count("tokens/s") == 1


def test_a_process_other_than_0_writes_no_page_and_no_plot(directory, tmp_path, monkeypatch, capsys, jax):
    """Catches a page or a plot that each process writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "_silent", [])
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    where = ["--backend", "jax", "--mesh", "data=1"]
    assert cli.main(["train", "--data", "text.txt", "--out", "run", *TRAIN, *where]) == 0
    for is_first in (False, True):
        capsys.readouterr()
        monkeypatch.setattr(Mesh, "is_first", is_first)
        assert cli.main(["score", "text.txt", "--model", str(directory), "--html", "x.html", *where]) == 0
        assert cli.main(["train", "--resume", "--out", "run", "--plot", "x.svg", *where]) == 0
        out, err = capsys.readouterr()
        assert [(tmp_path / name).exists() for name in ("x.html", "x.svg")] == [is_first] * 2
        assert (out.count("perplexity"), err.count("wrote x.")) == (is_first, 2 * is_first)
        assert is_first or (out, err) == ("", "")


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_of_the_arguments_has_one_line(number):
    """Catches a line of each process, before the processes are connected."""
    env = {**os.environ, "RANK": str(number)}
    command = [sys.executable, "-P", "-m", "portable_gpt2", "generate", "To", "--mesh", "rows=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1 - number)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        ("os.abort()", -signal.SIGABRT, "the line\n"),
        ("os.kill(os.getpid(), signal.SIGABRT)", -signal.SIGABRT, "the line\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("os._exit(3)", 3, ""),
        ("pass", 0, ""),
    ],
)
def test_a_process_that_a_library_aborts_leaves_a_line(end, status, line):
    """Catches a process of JAX that ends without a word, and a line for another end."""
    code = f"import os, signal; from portable_gpt2.cli import signals; signals.report_abort('the line', 2); {end}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", line)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("name", "before"),
    [("SIGTERM", ""), ("SIGHUP", ""), ("SIGTERM", "signal.signal(signal.SIGINT, signal.SIG_IGN)")],
    ids=["SIGTERM", "SIGHUP", "SIGTERM in the background"],
)
def test_a_process_of_a_mesh_that_gets_a_signal_says_how_to_continue(name, before):
    """Catches a process other than 0 that ends without a word, because process 0 has ended."""
    code = f"""
import os, signal, sys
from portable_gpt2 import cli
from portable_gpt2.cli import commands, train
train._run = lambda arguments: os.kill(os.getpid(), signal.{name})
{before}
sys.argv = ["portable-gpt2", "train", "--resume", "--out", "run", "--mesh", "data=2"]
cli.main()
"""
    command = [sys.executable, "-P", "-c", code]
    env = {**os.environ, "RANK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, preexec_fn=heed_signals)
    assert (done.returncode, done.stdout) == (128 + getattr(signal, name), "")
    assert done.stderr == (
        f"portable-gpt2: this process got {name}, which torchrun sends if another process of the mesh has ended; to "
        f"continue from the last checkpoint, on any mesh: portable-gpt2 train --resume --out run\n"
    )


def test_a_process_of_a_mesh_that_has_lost_another_says_how_to_continue():
    """Catches a process that is silent, and a status that gets lost."""
    code = """
import sys
from portable_gpt2 import cli
from portable_gpt2.cli import commands, train
from portable_gpt2.host import ProcessLost
def lost(arguments):
    raise ProcessLost("a sum failed")
train._run = lost
sys.argv = ["portable-gpt2", "train", "--resume", "--out", "run", "--mesh", "data=2"]
cli.main()
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "portable-gpt2: another process of the mesh has ended, or does not answer: a sum failed; to continue from the "
        "last checkpoint, on any mesh: portable-gpt2 train --resume --out run\n"
    )


def test_an_error_of_another_process_has_a_line_and_a_status(capsys, monkeypatch):
    """Catches a process that ends as if its work were done."""

    def fail(arguments):
        raise MeshError("process 0 of the mesh: no space left")

    monkeypatch.setattr(train, "_run", fail)
    assert cli.main(["train", "--resume", "--out", "run"]) == 2
    assert capsys.readouterr() == ("", "portable-gpt2: process 0 of the mesh: no space left\n")


def test_training_stops_if_another_process_is_asked_to_stop(tmp_path, monkeypatch, capsys, jax):
    """Catches a process that waits for one that has stopped, because only that one got the signal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Mesh, "agree", lambda mesh, flag: False)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    command = ["train", "--data", "text.txt", "--out", "run", *TRAIN, "--backend", "jax", "--mesh", "data=1"]
    assert cli.main(command) == 128 + signal.SIGTERM
    assert "stopped after step 0 of 2; to continue: portable-gpt2 train --resume --out run" in capsys.readouterr().err


if MESHES:

    @pytest.mark.parametrize("command", ["score", "train"])
    def test_process_0_alone_writes_files(directory, tmp_path, torch, command):
        """Catches a page or a plot that each process writes. Each process has a directory of its own."""
        (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
        arguments = {
            "score": ["../text.txt", "--model", str(directory), "--html", "x.html"],
            "train": ["--data", "../text.txt", "--out", str(tmp_path / "run"), *TRAIN, "--plot", "x.svg"],
        }[command]
        script = [
            SCRIPT,
            "in_directories",
            str(tmp_path),
            command,
            *arguments,
            "--backend",
            "torch",
            "--mesh",
            "data=2",
        ]
        status, out, err = start("torch", 2, script)
        assert status == 0, err
        assert [line for line in err.splitlines() if "wrote" in line] == [f"wrote {arguments[-1]}"]
        assert out.count("perplexity") == (command == "score")
        assert [path.name for path in (tmp_path / "0").iterdir()] == [arguments[-1]]
        assert not [*(tmp_path / "1").iterdir()]

    @pytest.mark.parametrize(("how", "number"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGSTOP", 1)])
    def test_if_a_process_of_jax_is_killed_or_hangs_the_other_writes_one_line(jax, tmp_path, how, number):
        """Catches a process that waits forever, and one that JAX aborts without a word."""
        (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
        run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
        command = ["-P", "-m", "portable_gpt2", "train", "--data", str(tmp_path / "text.txt"), "--out", str(run)]
        more = ["--backend", "jax", "--mesh", "data=2", *TRAIN, "--steps", "1000000", "--eval-every", "4"]
        timeout = "60" if how == "SIGSTOP" else "100"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "", "PORTABLE_GPT2_MESH_TIMEOUT": timeout}
        processes = started_by_jax(2, [*command, *more], env)
        try:
            end = time.monotonic() + 200
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < 12:
                assert time.monotonic() < end
                assert [process.poll() for process in processes] == [None, None]
                time.sleep(0.2)
            os.kill(processes[number].pid, getattr(signal, how))
            out, err = processes[1 - number].communicate(timeout=30 + float(timeout) * (how == "SIGSTOP"))
        finally:
            for process in processes:
                process.kill()
        status = processes[1 - number].returncode
        assert (status, out) == (-signal.SIGABRT if "aborted" in err else 2, "")
        *_, last = lines = [line for line in err.splitlines() if not line.startswith("step ")]
        assert len(lines) == (1 if number == 0 else 2)  # process 0 has written the number of parameters
        lost = "portable-gpt2: another process of the mesh has ended, or does not answer: "
        assert last.startswith((lost, "portable-gpt2: a library has aborted this process, probably because another "))
        assert ("did not come within 60 s (PORTABLE_GPT2_MESH_TIMEOUT); to con" in last) == (how == "SIGSTOP")
        assert last.endswith(f"portable-gpt2 train --resume --out {run}")
        assert Run.open(run).restore(pg.get_backend("numpy")).step >= 8


def test_an_error_of_a_command_has_one_line_and_a_status(directory, torch):
    """Catches a line of each process, and a status that gets lost."""
    command = ["generate", "To", "--model", "/no/such/model", "--backend", "torch", "--mesh", "model=2"]
    status, out, err = start("torch", 2, ["-m", "portable_gpt2", *command])
    assert status == 1  # torchrun's
    assert out == ""
    assert sum(line.startswith("portable-gpt2: ") for line in err.splitlines()) == 1
    assert "exitcode  : 2" in err


def test_one_process_generates_on_several_devices(directory, capsys, jax):
    """Catches a command that needs several processes."""
    options = ["generate", "To be", "--model", str(directory), "-n", "6", "--seed", "3", "--backend"]
    assert cli.main([*options, "numpy"]) == 0
    expected, _ = capsys.readouterr()
    assert cli.main([*options, "jax", "--mesh", "model=2"]) == 0
    found, err = capsys.readouterr()
    assert found == expected
    assert "jax, the mesh data=1,model=2" in err


@pytest.mark.parametrize("is_wanted", [False, True])
def test_the_command_divides_moments_if_it_is_asked_to(tmp_path, monkeypatch, jax, is_wanted):
    """Catches an option that is dropped, for a new run or one that is resumed."""
    made = []
    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a, **o: made.append(o) or original(self, *a, **o))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    more = ["--backend", "jax", "--mesh", "data=2", *(["--shard-optimizer"] if is_wanted else [])]
    assert cli.main(["train", "--data", "text.txt", "--out", "run", *TRAIN, *more]) == 0
    assert cli.main(["train", "--resume", "--out", "run", *more]) == 0
    assert made == [{"shard_optimizer": is_wanted}] * 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "To", "--mesh", "rows=2"], "argument --mesh: a mesh is 'rows=2'; expected sizes such as"),
        (["train", "--data", "x", "--out", "y", "--mesh", "model=2"], "backend 'numpy' computes on one device; a mesh"),
        (["train", "--data", "x", "--out", "y", "--mesh", "data=2", "--device", "cpu"], "leave out --device or --mesh"),
        (["generate", "To", "--mesh", "model=2"], "backend 'numpy' computes on one device; a mesh needs the backend"),
        (["generate", "To", "--mesh", "model=2", "--reproducible"], "leave out --reproducible or --mesh"),
        (["score", "x", "--mesh", "model=2", "--device", "cpu"], "leave out --device or --mesh"),
        *(
            ([*command, "--mesh", "model=2"], "computes on one device, and generate, score and train take --mesh")
            for command in (["trace", "a", "-o", "b"], ["fingerprint"], ["attend", "a", "-o", "b"], ["diff", "a", "b"])
        ),
        (["export", "a", "b", "--mesh=model=2"], "computes on one device, and generate, score and train take --mesh"),
    ],
)
def test_a_mesh_where_there_is_none_is_refused_in_one_line(capsys, monkeypatch, arguments, reason):
    """Catches a refusal after the model was loaded, and one that does not say what to do."""
    monkeypatch.setattr(pg.GPT2, "load", None)
    monkeypatch.setenv("PORTABLE_GPT2_BACKEND", "numpy")
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert err.count("\n") == 1
