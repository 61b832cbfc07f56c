"""``generate --interactive`` and ``--stream-json``: texts are those of ``generate``, and each is written at once."""

import codecs
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import tiny
from processes import heed_signals

import portable_gpt2 as pg
from portable_gpt2.cli import main


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A directory with two checkpoints: `it`, and `endless`, whose texts take minutes."""
    path = tmp_path_factory.mktemp("room")
    tiny.write_tokenizer(path)
    tokenizer = pg.Tokenizer.load(path)
    tiny.model(pg.get_backend("numpy"), tokenizer=tokenizer).save(path / "it")
    tiny.endless(tokenizer).save(path / "endless")
    return path


@pytest.fixture(scope="module")
def it(room):
    return pg.GPT2.load(room / "it", backend="numpy")


@pytest.fixture
def command(room, capsys, monkeypatch):
    """Run `generate` in this process, with a text as its stdin; return its exit status, stdout and stderr."""
    monkeypatch.chdir(room)

    def run(*args, stdin=b"", model="it"):
        (room / "stdin").write_bytes(stdin)
        capsys.readouterr()
        with open(room / "stdin") as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            try:
                status = main(["generate", *args, "--model", model])
            except SystemExit as exit_:
                status = exit_.code
        return status, *capsys.readouterr()

    return run


# Prompts from a pipe


def test_each_line_of_a_pipe_is_a_prompt(command, it):
    """Catches a prompt that is stripped or printed twice, and a text that depends on the prompts before it."""
    prompts = ["To be", " 存在 ", "", "To be"]
    options = {"max_new_tokens": 6, "seed": 7}
    lines = b"\xef\xbb\xbfTo be\r\n" + "\n".join(prompts[1:]).encode()
    status, out, err = command("--interactive", "-n", "6", "--seed", "7", stdin=lines)
    assert (status, out) == (0, "".join(f"{prompt}{it.generate(prompt, **options)}\n" for prompt in prompts))
    assert len(err.splitlines()) == 1
    assert command("--interactive", stdin=b"")[:2] == (0, "")


def test_a_seed_that_was_drawn_is_said(command, it):
    """Catches a text that nobody can repeat, and one seed for all prompts."""
    _, out, err = command("--interactive", "-n", "6", "--top-k", "0", stdin=b"To be\n" * 3)
    seeds = [int(seed) for seed in re.findall(r"^seed (\d+)$", err, re.MULTILINE)]
    assert len(set(seeds)) == 3
    assert out == "".join(f"To be{it.generate('To be', max_new_tokens=6, top_k=0, seed=seed)}\n" for seed in seeds)


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        ([], b"x " * 99, "do not fit into n_ctx = 64: shorten the prompt"),
        ([], b"a\ncaf\xe9\n", "stdin: line 2 is not UTF-8"),
        (["a prompt"], b"", "--interactive reads prompts from stdin, and writes one text for each: leave out a prompt"),
        (["--prompt-file", "x"], b"", "leave out --prompt-file"),
        (["--json"], b"", "leave out --json"),
        (["--stream-json"], b"", "leave out --stream-json"),
        (["--num-samples", "2"], b"", "leave out --num-samples"),
    ],
)
def test_what_cannot_be_continued_ends_a_pipe_with_one_line(command, args, stdin, message):
    """Catches a prompt that is left out with status 0, and an option that is dropped."""
    status, _, err = command("--interactive", "-n", "3", *args, stdin=stdin)
    assert status == 2
    assert message in err.splitlines()[-1]


# Prompts from a terminal


class Terminal:
    """A command on a terminal."""

    def __init__(self, room, *args):
        master, slave = pty.openpty()
        self._master, self.read = master, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        environment = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}

        def prepare():
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # it becomes the controlling terminal
            heed_signals()

        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "portable_gpt2", "generate", "--interactive", *args],
            cwd=room, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
            preexec_fn=prepare,
        )  # fmt: skip
        os.close(slave)

    def type(self, text):
        os.write(self._master, text.encode())

    def until(self, pattern, again=""):
        """Wait until the terminal shows a text that matches, after the last one; return the match.

        While nothing comes, ``again`` is typed: Python misses a Ctrl-C that comes after it has written the prompt and
        before it waits for a key.
        """
        deadline = time.monotonic() + 30
        while (found := re.search(pattern, self.read, re.DOTALL)) is None:
            assert time.monotonic() < deadline, self.read[:500]
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.read += self._decoder.decode(os.read(self._master, 4096)).replace("\r", "")
                except OSError:  # the command has ended
                    break
            else:
                self.type(again)
        found = re.search(pattern, self.read, re.DOTALL)
        assert found, self.read[:500]
        self.read = self.read[found.end() :]
        return found

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(room):
    opened = []

    def start(*args):
        opened.append(Terminal(room, *args))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_terminal_edits_and_remembers_lines_and_ctrl_c_ends_a_text(terminal, room):
    """Catches a loop without line editing or history, a prompt that ends the command because it is too long, Ctrl-C
    that ends the command or does not stop the text, and Ctrl-D that does not end the command.
    """
    pytest.importorskip("readline")
    model = pg.GPT2.load(room / "endless", backend="numpy")
    text = model.generate("To be", max_new_tokens=9, seed=7).rstrip("\ufffd")  # the end may be within a character
    begun = f"\nTo be{re.escape(text)}"
    session = terminal("--model", "endless", "-n", "99990", "--seed", "7")
    session.until("Ctrl-D ends the command.*> ")
    session.type("To bex\x7f\n")
    session.until(begun)
    session.type("\x03")
    session.until("\n> ")
    session.type("x " * 99 + "\n")
    session.until("do not fit into n_ctx = 100000: .*> ")
    session.type("\x1b[A\x1b[A\n")  # the line before the last one
    session.until(begun)
    session.type("\x03")
    session.until("\n> ")
    session.type("half")
    session.until("half")
    session.until("> ", again="\x03")
    session.type("\x04")
    assert session.process.wait(timeout=60) == 0


# --stream-json


def test_each_token_is_an_object_before_the_next_is_sampled(command, it, monkeypatch):
    """Catches pieces that are written at the end, tokens of another sample, and an end without its reason."""
    prompts = ["To be", "存"]
    args = [*prompts, "--num-samples", "2", "-n", "9", "--seed", "7", "--stop", "zq", "--top-k", "0"]
    status, out, _ = command(*args, "--stream-json")
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    expected = list(it.complete(prompts, num_samples=2, max_new_tokens=9, seed=7, stop="zq", top_k=0))
    pieces = [each for each in found if "piece" in each]
    ends = [each for each in found if "piece" not in each]
    assert [set(each) for each in pieces] == [{"prompt_index", "index", "token", "piece"}] * len(pieces)
    assert ends == [{"prompt_index": i // 2, **vars(each)} for i, each in enumerate(expected)]
    assert found.index(ends[0]) >= 36 - 4  # each text has up to 9 tokens
    for i, each in enumerate(expected):
        own = [piece for piece in pieces if (piece["prompt_index"], piece["index"]) == (i // 2, each.index)]
        assert [piece["token"] for piece in own if piece["token"] is not None] == each.tokens
        assert "".join(piece["piece"] for piece in own) == each.text
    assert [(each["prompt_index"], each["index"]) for each in pieces[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_text_that_is_held_back_comes_at_the_end_without_a_token(it):
    """Catches the last character of a text that ends within it."""
    half = next(
        seed for seed in range(100) if it.generate("To", max_new_tokens=7, seed=seed, top_k=None)[-1] == "\ufffd"
    )
    pieces = []
    [whole] = it.complete(["To"], max_new_tokens=7, seed=half, top_k=None, on_piece=pieces.append)
    assert (pieces[-1].token, pieces[-1].piece) in {(None, "\ufffd"), (whole.tokens[-1], "\ufffd")}
    assert "".join(piece.piece for piece in pieces) == whole.text
