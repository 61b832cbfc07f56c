"""The command's standard streams and signals: no text is lost unnoticed, lost messages end no work, no file is spoilt.

Every command runs in a process of its own, each stream of which is fine, closed, full (/dev/full) or a pipe that nobody
reads. With HYPOTHESIS_PROFILE=thorough, all combinations are tried.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from processes import heed_signals

import portable_gpt2 as pg
from portable_gpt2.cli import streams

if not os.path.exists("/dev/full"):
    pytest.skip("the system has no /dev/full", allow_module_level=True)

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
TRAIN = "train --data data.txt --n-layer 1 --n-head 1 --n-embd 8 --n-ctx 8 --vocab-size 260 --batch-size 2 --steps 3"
COMMANDS = {  # the arguments, and whether the command writes text to stdout
    "generate": ("generate To --model it -n 3 --seed 7", True),
    "generate --stream-json": ("generate To be --model it -n 3 --seed 7 --stream-json", True),
    "generate --interactive": ("generate --interactive --model it -n 1 --seed 7 --sliding", True),
    "score --html": ("score data.txt --model it --html OUT.html", True),
    "score -": ("score - --model it", True),
    "attend": ("attend To --model it -o OUT.png", False),
    "trace": ("trace To --model it -o OUT.npz", False),
    "certify": ("certify To --model it", True),
    "diff": ("diff it it --text To", True),
    "convert": ("convert it OUT", False),
    "train": (f"{TRAIN} --out OUT", False),
    "--help": ("generate --help", True),
    "wrong use": ("generate --frobnicate", False),
    "no model": ("score data.txt --model ./nowhere", False),
}
STATES = ("fine", "closed", "full", "broken")
COMBINATIONS = list(itertools.product(("fine", "closed"), STATES, STATES))  # of stdin, stdout, stderr
if not THOROUGH:
    COMBINATIONS = [
        ("closed", "closed", "closed"),
        ("fine", "full", "fine"),
        ("fine", "broken", "full"),
        ("fine", "fine", "closed"),
    ]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A directory with a checkpoint, `it`, and a text."""
    path = tmp_path_factory.mktemp("room")
    tiny.write_tokenizer(path)
    tiny.model(pg.get_backend("numpy"), tokenizer=pg.Tokenizer.load(path)).save(path / "it")
    (path / "data.txt").write_text(tiny.TEXT, "utf-8")
    return path


def call(*args):
    return [sys.executable, "-P", "-m", "portable_gpt2", *args]


def start(room, args, states=("fine", "fine", "fine")):
    """Start a command with its standard streams in these states."""
    given, closed = [], [i for i, state in enumerate(states) if state == "closed"]
    for i, state in enumerate(states):
        if state == "full":
            given.append(os.open("/dev/full", os.O_WRONLY))
        elif state == "broken":
            reader, writer = os.pipe()
            os.close(reader)
            given.append(writer)
        else:
            given.append(os.open("data.txt" if i == 0 else os.devnull, os.O_RDWR) if i == 0 else subprocess.PIPE)

    def prepare():
        heed_signals()
        for descriptor in closed:
            os.close(descriptor)

    try:
        streams = dict(zip(("stdin", "stdout", "stderr"), given, strict=True))
        return subprocess.Popen(call(*args), cwd=room, preexec_fn=prepare, **streams)
    finally:
        for descriptor in given:
            if descriptor != subprocess.PIPE:
                os.close(descriptor)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_stream_may_be_closed_full_or_broken(room, name, monkeypatch):
    """Catches text that is lost with status 0, work that dies of a message, a traceback, and a file that is spoilt.

    A file that is opened while stderr is closed gets its number, and messages would be written into it.
    """
    monkeypatch.chdir(room)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # text that waits in a buffer is lost late
    line, writes = COMMANDS[name]
    before = {file: file.read_bytes() for file in (room / "it").iterdir()} | {0: (room / "data.txt").read_bytes()}

    def started(states):
        out = f"{name}-{'-'.join(states)}".replace(" ", "_")
        return out, start(room, line.replace("OUT", out).split(), states)

    healthy, results = ("fine", "fine", "fine"), {}
    combinations = COMBINATIONS[:1] if name == "attend" and not THOROUGH else COMBINATIONS  # matplotlib takes a second
    running = {states: started(states) for states in (healthy, *combinations)}
    for states, (out, process) in running.items():
        found, messages = process.communicate(timeout=120)
        results[states] = out, process.returncode, (found or b"").decode(), (messages or b"").decode()
    _, status, text, _ = results[healthy]
    for (stdin, stdout, stderr), (out, code, found, messages) in results.items():
        where = f"{name}, stdin {stdin}, stdout {stdout}, stderr {stderr}: {messages}"
        assert "Traceback" not in messages, where
        assert "Exception" not in messages, where
        if name in ("score -", "generate --interactive") and stdin == "closed":
            assert code == 2, where
            assert (stderr, stdout) != ("fine", "fine") or messages == "portable-gpt2: stdin is closed\n"
        elif writes and stdout != "fine":
            assert code == (141 if stdout == "broken" else 2), where
            if stderr == "fine" and stdout != "broken":
                assert messages.splitlines()[-1].startswith("portable-gpt2: "), where
                assert "stdout" in messages.splitlines()[-1], where
        else:
            assert code == status, where
            if stdout == "fine":
                assert found.replace(out, "") == text.replace(results[healthy][0], ""), where
            if name == "attend":
                assert (room / f"{out}.png").read_bytes().startswith(b"\x89PNG"), where
            if name == "score --html":
                assert (room / f"{out}.html").read_text("utf-8").endswith("</html>\n"), where
            if name == "trace":
                assert pg.Trace.load(room / f"{out}.npz").tokens.size, where
            if name in ("convert", "train"):
                assert pg.GPT2.load(room / out).tokenizer is not None, where
            if name == "train":
                assert pg.training.Run.open(room / out).last["step"] == 3, where
                assert len((room / out / "metrics.jsonl").read_text().splitlines()) == 4, where
    after = {file: file.read_bytes() for file in (room / "it").iterdir()} | {0: (room / "data.txt").read_bytes()}
    assert after == before


def test_help_that_is_lost_is_noticed_without_a_buffer_too(room, monkeypatch):
    """Catches argparse's own writing, which forgets an error."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.chdir(room)
    process = start(room, ["--help"], ("fine", "full", "fine"))
    assert process.communicate()[1] == b"portable-gpt2: cannot write to stdout: No space left on device\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_have_them(terminal, environment, coloured, monkeypatch):
    """Catches escape codes in a pipe, and in the terminal of somebody who does not want them."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert streams.is_coloured() == coloured


@pytest.mark.parametrize(("columns", "width"), [(200, 120), (100, 100), (20, 60), (None, 80)])
def test_lines_are_as_wide_as_the_terminal(columns, width, monkeypatch):
    """Catches a table that is wider than a narrow terminal, and lines of 300 characters."""
    monkeypatch.setenv("COLUMNS", str(columns or 200))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None, raising=False)
    assert streams.width() == width


# Signals


def test_a_warning_takes_a_line(room, tmp_path, monkeypatch):
    """Catches Python's form of two lines, with a path of the source that says nothing to who runs a command."""
    monkeypatch.chdir(room)
    tiny.model(pg.get_backend("numpy")).save(tmp_path / "it")
    (tmp_path / "it" / "tokenizer.json").write_text("{}")
    process = start(room, ("convert", str(tmp_path / "it"), str(tmp_path / "out")))
    _, errors = process.communicate(timeout=60)
    lines = errors.decode().splitlines()
    assert process.returncode == 0
    assert lines[0].startswith("portable-gpt2: warning: ")
    assert "tokenizer.json: " in lines[0]
    assert ".py" not in errors.decode()


def interrupted(room, args, seconds, signum=signal.SIGINT):
    process = start(room, args)
    time.sleep(seconds)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    return process.returncode, err.decode()


def test_ctrl_c_before_anything_is_imported_ends_it_quietly(room, monkeypatch):
    """Catches the traceback of an import that was interrupted, and an import of NumPy before the handler is there."""
    monkeypatch.chdir(room)
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == MODULE: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from portable_gpt2.cli import main\n"
        "sys.argv = ['portable-gpt2', 'generate', 'To', '--model', 'it', '-n', '3']\n"
        "sys.exit(main())\n"
    )
    for module in ("portable_gpt2.cli.streams", "portable_gpt2.cli.commands", "numpy", "numpy.linalg", "tokenizers"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code.replace("MODULE", repr(module))],
            capture_output=True,
            preexec_fn=heed_signals,
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b""), module


def test_importing_the_entry_point_imports_next_to_nothing():
    """Catches an import that takes time before Ctrl-C is dealt with."""
    code = "import sys; before = set(sys.modules); import portable_gpt2.cli; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, encoding="utf-8").stdout.split()
    assert {"portable_gpt2", "portable_gpt2.cli", "portable_gpt2.cli.signals"} <= set(found)
    assert not set(found) & {"numpy", "typing", "argparse", "portable_gpt2.backend", "threading", "pathlib"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_training_that_is_told_to_end_saves_what_it_has(room, name, monkeypatch):
    """Catches steps that are lost when a scheduler ends a job, or a terminal is closed."""
    monkeypatch.chdir(room)
    process = start(room, f"{TRAIN} --steps 1000000 --eval-every 1000000 --out {name}".split())
    while not (room / name / "metrics.jsonl").exists() or (room / name / "metrics.jsonl").stat().st_size < 3000:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # if it has not ended, it would train for an hour
    assert process.returncode == 128 + getattr(signal, name)
    assert b"Traceback" not in err
    run = pg.training.Run.open(room / name)
    assert run.last["step"] > 5
    assert f"stopped after step {run.last['step']} of 1000000; to continue: ".encode() in err


def test_a_signal_that_is_ignored_stays_ignored(room, monkeypatch):
    """Catches `nohup portable-gpt2 train ... &` that ends with its terminal all the same."""
    monkeypatch.chdir(room)
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code += "from portable_gpt2.cli import main; sys.argv[0] = 'portable-gpt2'; sys.exit(main())"
    args = f"{TRAIN} --steps 400 --out nohup".split()
    process = subprocess.Popen([sys.executable, "-P", "-c", code, *args], stderr=subprocess.PIPE)
    while not (room / "nohup" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert pg.training.Run.open(room / "nohup").last["step"] == 400


# Pipes as files


def shell(room, line, **options):
    program = f"{sys.executable} -P -m portable_gpt2"
    command = ["bash", "-c", line.replace("portable-gpt2", program)]
    return subprocess.run(command, cwd=room, capture_output=True, encoding="utf-8", timeout=60, **options)


def test_a_text_may_come_through_a_pipe(room):
    """Catches a check for regular files that goes too far."""
    expected = shell(room, "portable-gpt2 score data.txt --model it --json").stdout
    for line in (
        "portable-gpt2 score <(cat data.txt) --model it --json",
        "cat data.txt | portable-gpt2 score /dev/stdin --model it --json",
        "portable-gpt2 score - --model it --json < data.txt",
        "mkfifo fifo; (sleep 0.5; cat data.txt > fifo) & portable-gpt2 score fifo --model it --json",
        "portable-gpt2 score <(sleep 0.5; cat data.txt) --model it --json",
    ):
        done = shell(room, line)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == json.loads(expected) | {"file": json.loads(done.stdout)["file"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("portable-gpt2 score /dev/zero", "/dev/zero: is a device; expected a text"),
        ("portable-gpt2 score - < /dev/zero", "-: is a device; expected a text"),
        ("portable-gpt2 generate --prompt-file /dev/urandom", "/dev/urandom: is a device; expected a text"),
        ("portable-gpt2 score .", ".: Is a directory"),
        ("portable-gpt2 train --out x --data /dev/zero", "/dev/zero: is a device; expected a text"),
        ("portable-gpt2 train --out x --data data.txt --held-out /dev/zero", "/dev/zero: is a device"),
        ("mkfifo nobody; portable-gpt2 score nobody", "nobody: is a named pipe that nobody opened for writing within"),
        ("portable-gpt2 score - - < data.txt", "-: was read before, and can be read only once"),
        ("portable-gpt2 generate --prompt-file - --prompt-file /dev/stdin < data.txt", "/dev/stdin: was read before"),
        ("portable-gpt2 score /dev/stdin <&-", "stdin is closed"),
        ("truncate -s 8T sparse; portable-gpt2 score sparse", "sparse: its text would take 16,384.0 GiB of memory"),
        ("ln -s loop loop; portable-gpt2 score loop", "loop: Too many levels of symbolic links"),
    ],
    ids=lambda x: x if "portable" in x else "",
)
def test_a_file_without_a_text_is_refused_at_once(room, line, message):
    """Catches a MemoryError, a wait for ever, and a text that is empty because it was read before."""
    done = shell(room, line)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
