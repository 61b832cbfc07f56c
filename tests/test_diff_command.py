"""``portable-gpt2 diff``: its output, its exit status, and its files, which are complete or absent."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from processes import heed_signals

import portable_gpt2 as pg
from portable_gpt2.cli import diff, main, streams
from portable_gpt2.comparison import sides
from portable_gpt2.files import already_exists
from portable_gpt2.params import nest


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A directory with checkpoints and traces: `it`, `other` with a transposed matrix, and a trace of each."""
    path = tmp_path_factory.mktemp("room")
    tiny.write_tokenizer(path)
    tokenizer = pg.Tokenizer.load(path)
    weights = tiny.weights()
    pg.GPT2(tiny.CONFIG, nest(weights), tokenizer).save(path / "it")
    pg.GPT2(tiny.CONFIG, nest(weights)).save(path / "nameless")
    changed = {**weights, "h1/attn/c_proj/w": weights["h1/attn/c_proj/w"].T.copy()}
    pg.GPT2(tiny.CONFIG, nest(changed), tokenizer).save(path / "other")
    model = pg.GPT2.load(path / "it", backend="numpy")
    tokens = model.tokenizer.encode("To be, or not to be")
    traced = {name: x for name, x in model.trace(tokens).items()}
    pg.Trace("it", tokens, traced, config=model.config).save(path / "it.npz")
    wrong = {**traced, "h1/ln_2": traced["h1/ln_2"] + np.float32(0.01)}
    pg.Trace("port", tokens, wrong, config=model.config).save(path / "wrong.npz")
    (path / "text.txt").write_text("Whether 'tis nobler", "utf-8")
    return path


@pytest.fixture
def command(room, capsys, monkeypatch, tmp_path):
    """Run the command in this process; return its exit status, stdout and stderr. Files are written to tmp_path."""
    monkeypatch.chdir(tmp_path)
    for name in os.listdir(room):
        os.symlink(room / name, tmp_path / name)

    def run(*args):
        capsys.readouterr()
        try:
            status = main(["diff", *args])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


def arguments(*args):
    return [sys.executable, "-P", "-m", "portable_gpt2", "diff", *args]


def found_by(command, *args):
    status, out, _ = command(*args, "--json")
    return status, json.loads(out)


def test_a_model_does_not_part_from_itself(command):
    """Catches an alarm where there is nothing, and a status that a script would take for a difference."""
    status, out, err = command("it", "it")
    assert (status, err) == (0, "")
    assert "reference  it on numpy, cpu, float32" in out
    assert "Weights: no difference." in out
    assert out.endswith("\n")


def test_the_status_says_that_two_models_part(command):
    """Catches a difference that is shown and has the status 0."""
    status, out, _ = command("it", "other")
    assert status == 1
    assert "h1/attn/c_proj/w" in out.splitlines()[0]
    assert "transposed" in out


def test_the_op_that_went_wrong_is_named(command):
    """Catches sides that are exchanged: B is judged."""
    status, found = found_by(command, "it", "wrong.npz")
    assert (status, found["culprit"], found["equal"]) == (1, "h1/ln_2", False)
    status, found = found_by(command, "wrong.npz", "it")
    assert found["culprit"] is None


@pytest.mark.parametrize(
    ("args", "a", "b"),
    [
        ([], "numpy, cpu, float32", "numpy, cpu, float32"),
        (["--dtype", "float16"], "numpy, cpu, float16", "numpy, cpu, float16"),
        (["--dtype-b", "float16"], "numpy, cpu, float32", "numpy, cpu, float16"),
        (["--dtype", "float64", "--dtype-b", "bfloat16"], "numpy, cpu, float64", "numpy, cpu, bfloat16"),
        (["--backend", "numpy", "--device-b", "cpu"], "numpy, cpu, float32", "numpy, cpu, float32"),
    ],
)
def test_options_reach_their_side(command, args, a, b):
    """Catches an option that reaches the other side, or none."""
    status, found = found_by(command, "it", "it", "--text", "To be", *args)
    assert (found["a"], found["b"]) == (f"it on {a}", f"it on {b}")
    assert status == 0


def test_the_backend_of_b_may_be_another(command, torch):
    """Catches an option that reaches the other side."""
    status, found = found_by(command, "it", "it", "--backend", "numpy", "--backend-b", "torch", "--dtype-b", "bfloat16")
    assert (found["a"], found["b"]) == ("it on numpy, cpu, float32", "it on torch, cpu, bfloat16")
    assert status == 0


def test_a_comparison_that_takes_longer_than_a_second_shows_its_progress(command, monkeypatch):
    """Catches a silence that looks like a hang, in a forward pass, too."""
    observe = sides._op_by_op

    def slowly(model, tokens, names, done):
        return observe(model, tokens, names, lambda: (time.sleep(0.04), done()))

    monkeypatch.setattr(sides, "_op_by_op", slowly)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, _, err = command("it", "it.npz")
    assert status == 0
    assert re.search(r"tracing it: +\d+%.*/33 ", err)
    assert "judging" not in err


# The text


def test_both_sides_read_the_text_that_is_given(command, room):
    """Catches a text that is ignored, or read by one side only."""
    tokenizer = pg.Tokenizer.load(room)
    for args, text in ((["--text", "To be"], "To be"), (["--text-file", "text.txt"], "Whether 'tis nobler")):
        assert found_by(command, "it", "it", *args)[1]["tokens"] == tokenizer.encode(text)


def test_special_tokens_are_read_as_tokens_if_allowed(command, room):
    """Catches an option that does not reach the tokenizer."""
    tokenizer, text = pg.Tokenizer.load(room), "To be<|endoftext|>"
    plain, special = (tokenizer.encode(text, allow_special=allowed) for allowed in (False, True))
    for args, tokens in (([], plain), (["--allow-special"], special)):
        assert found_by(command, "it", "it", "--text", text, *args)[1]["tokens"] == tokens
    assert (
        found_by(command, "it", "it", "--text", text, "--allow-special-token", "<|endoftext|>")[1]["tokens"] == special
    )


def test_without_a_text_there_is_one_that_fits(command):
    """Catches a default text that is longer than the context of the model, or so short that nothing shows."""
    tokens = found_by(command, "it", "it")[1]["tokens"]
    assert len(tokens) == tiny.CONFIG.n_ctx
    assert len(set(tokens)) > 30
    tokens = found_by(command, "nameless", "nameless")[1]["tokens"]
    assert len(tokens) == len(set(tokens)) == 64
    assert max(tokens) < tiny.CONFIG.n_vocab


def test_a_trace_is_compared_on_its_own_tokens(command, room):
    """Catches the default text, which a trace has not read."""
    tokens = pg.Tokenizer.load(room).encode("To be, or not to be")
    assert found_by(command, "it.npz", "it")[1]["tokens"] == tokens
    assert found_by(command, "it", "it.npz")[1]["tokens"] == tokens


# Files


def test_json_and_html_are_written_into_files(command, tmp_path):
    """Catches a file that is empty, and tables that are missing because there is a file."""
    status, out, err = command("it", "other", "--json", "found.json", "--html", "found.html")
    assert status == 1
    assert err.splitlines() == ["wrote found.json", "wrote found.html"]
    assert "h1/attn/c_proj/w" in out
    text = (tmp_path / "found.json").read_text("utf-8")
    assert json.loads(text) == found_by(command, "it", "other")[1]
    assert text.endswith("}\n")
    page = (tmp_path / "found.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>\n")
    assert re.search(r"^  token of the reference +['\"].+['\"] \(\d+\)$", out, re.MULTILINE)
    assert re.search(r"<dt>token of the reference</dt><dd>&#?\w+;.+&#?\w+; \(\d+\)</dd>", page)
    assert "h1/attn/c_proj/w" in page


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_exists_is_replaced_by_force_only(command, tmp_path, option):
    """Catches a page that is overwritten because a name was mistyped."""
    file = tmp_path / "kept"
    file.write_text("precious")
    status, out, err = command("it", "it", option, "kept")
    assert (status, out) == (2, "")
    assert err == f"portable-gpt2: {already_exists('kept')}\n"
    assert file.read_text() == "precious"
    assert command("it", "it", option, "kept", "--force")[0] == 0
    assert file.read_text() != "precious"


def test_a_file_that_appears_meanwhile_is_kept(command, tmp_path, monkeypatch):
    """Catches a check before the computation only, which may take a minute."""

    def compare(*args, **options):
        (tmp_path / "kept").write_text("precious")
        return comparison(*args, **options)

    comparison = diff.compare
    monkeypatch.setattr(diff, "compare", compare)
    status, out, err = command("it", "it", "--html", "kept")
    assert (status, out) == (2, "")
    assert "kept: exists already" in err
    assert (tmp_path / "kept").read_text() == "precious"


def test_a_closed_stdout_is_noticed_before_the_models_run(command, tmp_path, monkeypatch):
    """Catches a minute of computing whose result nobody sees."""

    def write(text):
        raise streams.LostOutput(errno.EBADF, "stdout is closed")

    monkeypatch.setattr(streams, "write", write)
    assert command("it", "it", "--html", "page.html") == (2, "", "portable-gpt2: stdout is closed\n")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["it"], "the following arguments are required: B"),
        (["it", "nowhere"], "nowhere"),
        (["it", "nowhere.npz"], "nowhere.npz: no such file"),
        (["it", "it", "--text", "a", "--text-file", "text.txt"], "not allowed with argument --text"),
        (["it", "it", "--html", "no/where.html"], "no: no such directory"),
        (["it", "it", "--html", "."], ".: is a directory; expected the name of a file"),
        (["it", "it", "--json", "x", "--html", "./x"], "--json and --html: both name x; expected two files"),
        (["it", "it", "--html", ""], "the value is empty"),
        (["it", "it", "--text", ""], "the text is empty; give one that both models can read, or leave it out"),
        (["it", "it", "--text", "word " * 99], "the model has n_ctx = 64 positions"),
        (["it", "it", "--backend-b", "nothing"], "nothing"),
        (["it", "it.npz", "--dtype-b", "float16"], "--dtype-b is given, but it.npz is a trace"),
        (["it.npz", "it.npz", "--backend", "numpy"], "--backend is given, but both sides are traces"),
        (["it", "it.npz", "--text", "other"], "leave the text out"),
        (["nameless", "nameless", "--text", "To be"], "neither side has a tokenizer"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_use_takes_one_line(command, tmp_path, args, message):
    """Catches a traceback, a file that is left, and a mistake that shows only after minutes of computing."""
    before = set(os.listdir(tmp_path))
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_ended_leaves_no_file(room, tmp_path, name):
    """Catches half a page, and a draft that is left when the command is interrupted while it writes."""
    code = (
        "import os, pathlib, sys, time\n"
        "write = pathlib.Path.write_text\n"
        "def slowly(path, text, *args):\n"
        "    write(path, text[:100], *args); os.write(2, b'half\\n'); time.sleep(60)\n"
        "pathlib.Path.write_text = slowly\n"
        "from portable_gpt2.cli import main\n"
        f"sys.argv = ['portable-gpt2', 'diff', {str(room / 'it')!r}, {str(room / 'it')!r}, '--html', 'page.html']\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    )
    assert process.stderr.readline() == b"half\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + getattr(signal, name), b"", b"")
    assert os.listdir(tmp_path) == []


# The terminal


def on_a_terminal(room, **environment):
    """Return the output of the command on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen(
        arguments("it", "wrong.npz"), cwd=room, env=env, stdout=theirs, stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            if not (piece := os.read(ours, 4096)):
                break
        except OSError:  # Linux: the other end is closed
            break
        text += piece
    os.close(ours)
    assert process.wait(timeout=60) == 1
    return text.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_colours_are_for_terminals(room):
    """Catches escape codes in a pipe or a file, and in the terminal of somebody who does not want them."""
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    piped = subprocess.run(arguments("it", "wrong.npz"), cwd=room, env=env, capture_output=True, encoding="utf-8")
    assert piped.returncode == 1
    assert "\x1b" not in piped.stdout
    assert max(map(len, piped.stdout.splitlines())) <= 80
    assert on_a_terminal(room, NO_COLOR="").startswith("\x1b[1;31m")
    assert "\x1b" not in on_a_terminal(room, NO_COLOR="1")
