"""``portable-gpt2 train``: from texts to a model that loads, ended by Ctrl-C or worse, and resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import tokenizers
from processes import heed_signals

import portable_gpt2 as pg
from portable_gpt2.cli import main
from portable_gpt2.params import flatten

SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--n-ctx", "8", "--vocab-size", "260"]
SMALL += ["--batch-size", "2", "--warmup", "1"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A working directory with two texts."""
    (tmp_path / "a.txt").write_text(tiny.TEXT, "utf-8")
    (tmp_path / "b.txt").write_text("To be, or not to be\r\n" * 20, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(room, capfd):
    """Run the command in this process; return its exit status, stdout and stderr."""

    def run(*args):
        capfd.readouterr()
        try:
            status = main(["train", *args])
        except SystemExit as exit_:
            status = exit_.code
        out, err = capfd.readouterr()
        return status, out, err.replace("\r", "\n")

    return run


def process(*args, **options):
    call = [sys.executable, "-P", "-m", "portable_gpt2.cli", "train", *args]
    return subprocess.Popen(call, stderr=subprocess.PIPE, env=dict(os.environ), preexec_fn=heed_signals, **options)


def bits(directory):
    """Return the files of a run, but for the seconds in its metrics."""
    found = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    found["metrics.jsonl"] = re.sub(rb'"seconds": [^}]*', b"", found["metrics.jsonl"])
    return found


def test_texts_become_a_model(command, room, backend, monkeypatch):
    """Catches options that are lost on the way, and a directory that is not a checkpoint."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # the bar is for terminals
    recipe = ["--steps", "3", "--eval-every", "2", "--learning-rate", "0.01", "--seed", "9", "--dtype", "float32"]
    args = ["--data", "a.txt", "b.txt", "--out", "run", *SMALL, *recipe, "--backend", backend.name]
    status, out, err = command(
        *args, "--max-grad-norm", "off", "--held-out", "0.2", "--scale-residual", "--plot", "losses.png"
    )
    assert (status, out) == (0, "")
    assert f"parameters on {backend.name}, cpu, 16 tokens per step" in err
    held_out = re.findall(r"step (\d): held-out loss (\d\.\d{4})", err)
    assert [step for step, _ in held_out] == ["0", "2", "3"]
    assert f"run: the model of step 3, held-out loss {held_out[-1][1]} nats per token" in err
    assert re.search(r"3/3 .*loss \d\.\d{4}, [\d,]+ tokens/s", err)
    assert (room / "losses.png").read_bytes().startswith(b"\x89PNG")
    run = pg.training.Run.open("run")
    expected = {
        "steps": 3,
        "batch_size": 2,
        "warmup": 1,
        "eval_every": 2,
        "learning_rate": 0.01,
        "seed": 9,
        "max_grad_norm": None,
    }
    assert run.recipe == pg.training.Recipe(**expected)
    assert run.config == pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_ctx=8, n_vocab=260, eos_token_id=0)
    training, held = run.tokens()
    assert len(held) == round(0.2 * (len(training) + len(held)))
    whole = run.tokenizer.decode([*training.tolist(), *held.tolist()])
    assert whole == f"{tiny.TEXT}<|endoftext|>{'To be, or not to be' + chr(13) + chr(10)}".replace(
        "To be, or not to be\r\n", "To be, or not to be\r\n" * 20
    ) + ("<|endoftext|>")
    model = pg.GPT2.load("run", backend=backend)
    assert model.score("To be, or not to be").perplexity < 260
    assert len(model.generate("To be", max_new_tokens=2, seed=1)) > 0


def test_another_text_may_be_held_out(command, room):
    """Catches a held-out text that is trained on."""
    assert command("--data", "a.txt", "--held-out", "b.txt", "--out", "run", *SMALL, "--steps", "1")[0] == 0
    training, held = pg.training.Run.open("run").tokens()
    tokenizer = pg.training.Run.open("run").tokenizer
    assert tokenizer.decode(held.tolist()) == "To be, or not to be\r\n" * 20 + "<|endoftext|>"
    assert tokenizer.decode(training.tolist()) == tiny.TEXT + "<|endoftext|>"


def test_a_checkpoint_is_trained_further(command, room):
    """Catches weights that are initialised again, another shape, and a tokenizer that is trained again."""
    tiny.write_tokenizer(room)
    model = tiny.model(pg.get_backend("numpy"), tokenizer=pg.Tokenizer.load(room))
    model.save("it")
    options = ["--steps", "2", "--batch-size", "2", "--context", "8", "--learning-rate", "1e-5", "--warmup", "0"]
    status, _, err = command("--data", "a.txt", "--init-from", "it", "--out", "run", *options)
    assert status == 0
    assert "16 tokens per step" in err
    after = pg.GPT2.load("run", backend="numpy")
    assert after.config == tiny.CONFIG
    assert after.tokenizer.encode("To be") == model.tokenizer.encode("To be")
    moved = [np.abs(x - y).max() for (_, x), (_, y) in zip(flatten(after.params), flatten(model.params), strict=True)]
    assert 0 < max(moved) < 1e-4


def test_a_tokenizer_may_be_given(command, room):
    """Catches one that is made all the same."""
    tiny.write_tokenizer(room)
    small = [option for option in SMALL if option not in ("--vocab-size", "260")]
    assert command("--data", "a.txt", "--tokenizer", ".", "--out", "run", *small, "--steps", "1")[0] == 0
    assert pg.training.Run.open("run").config.n_vocab == 384


SEPARATED = "<|endoftext|>".join(f"{i}: To be, or not to be.\n" for i in range(120))


def ends(directory):
    """Return how many documents end in the training text, and in the one that is held out."""
    run = pg.training.Run.open(directory)
    return [int(np.count_nonzero(tokens == run.tokenizer.end_of_text)) for tokens in run.tokens()]


def test_the_end_of_text_separates_documents(command, room):
    """Catches separators that become literal text, in one of the two texts, and a tokenizer made of them."""
    (room / "many.txt").write_text(SEPARATED)
    (room / "three.txt").write_text("To be<|endoftext|>or not<|endoftext|>to be, that is it<|endoftext|>\n")
    data = ["--data", "many.txt", "--held-out", "three.txt", *SMALL, "--steps", "1"]
    assert command(*data, "--out", "run")[0] == 0
    assert ends("run") == [120, 3]
    training, _ = pg.training.Run.open("run").tokens()
    tokenizer = pg.training.Run.open("run").tokenizer
    assert tokenizer.decode(training) == SEPARATED + "<|endoftext|>"
    assert not any(b"|" in tokenizer.token_bytes(i) for i in range(257, 260))
    assert command(*data, "--out", "text", "--no-allow-special")[0] == 0
    assert ends("text") == [1, 1]
    assert command(*data, "--out", "named", "--no-allow-special", "--allow-special-token", "<|endoftext|>")[0] == 0
    assert ends("named") == [120, 3]


def test_every_file_is_a_document_however_it_is_given(command, room):
    """Catches --data a --data b, which drops a."""
    expected = None
    for i, data in enumerate((["--data", "a.txt", "b.txt"], ["--data", "a.txt", "--data", "b.txt"])):
        assert command(*data, "--held-out", "0", "--out", f"run{i}", *SMALL, "--steps", "1")[0] == 0
        assert ends(f"run{i}") == [2, 0]
        tokens = pg.training.Run.open(f"run{i}").tokens()[0].tolist()
        expected = expected or tokens
        assert tokens == expected


def test_other_special_tokens_are_read_if_they_are_asked_for(command, room):
    """Catches a chat's markers that are spelled out, and found without a word."""
    chat = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe())
    chat.add_special_tokens(["<|user|>", "<|bot|>"])
    (room / "chat").mkdir()
    chat.save("chat/tokenizer.json")
    (room / "chat.txt").write_text("<|user|>To be?<|bot|>Or not.<|endoftext|>" * 9)
    small = [option for option in SMALL if option not in ("--vocab-size", "260")]
    found = {}
    for options in ((), ("--allow-special",), ("--allow-special-token", "<|bot|>"), ("--no-allow-special",)):
        name = f"run{len(found)}"
        data = ["--data", "chat.txt", "--held-out", "0", "--tokenizer", "chat", *small, "--steps", "1"]
        assert command(*data, *options, "--out", name)[0] == 0
        tokens = pg.training.Run.open(name).tokens()[0].tolist()
        found[options] = [tokens.count(token) for token in (0, 384, 385)]
    assert [*found.values()] == [[9, 0, 0], [9, 9, 9], [9, 0, 9], [1, 0, 0]]
    status, _, err = command(*data, "--allow-special-token", "<|tool|>", "--out", "none")
    assert (status, "allow_special names '<|tool|>', which is not a special token" in err) == (2, True)


def test_separators_that_the_tokenizer_lacks_are_refused(command, room):
    """Catches documents that run into each other: whether that is meant is for the user to say."""
    bare = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("left out"))
    (room / "bare").mkdir()
    bare.save("bare/tokenizer.json")
    (room / "many.txt").write_text(SEPARATED)
    small = [option for option in SMALL if option not in ("--vocab-size", "260")]
    data = ["--tokenizer", "bare", *small, "--steps", "1"]
    status, _, err = command("--data", "many.txt", *data, "--out", "run")
    message = "--data: the texts hold <|endoftext|>, which the tokenizer lacks; --no-allow-special reads it as text"
    assert (status, err) == (2, f"portable-gpt2: {message}\n")
    assert command("--data", "many.txt", *data, "--out", "text", "--no-allow-special")[0] == 0
    assert command("--data", "a.txt", *data, "--out", "plain")[0] == 0


def test_ids_may_have_gaps(command, room):
    """Catches a model that is made for as many ids as there are entries, where the largest id is beyond them."""
    vocab = json.loads(tiny.byte_level_bpe())["model"]
    vocab["vocab"]["<|endoftext|>"] = 400
    (room / "gaps").mkdir()
    (room / "gaps" / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    (room / "gaps" / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in vocab["merges"]), "utf-8")
    small = [option for option in SMALL if option not in ("--vocab-size", "260")]
    assert command("--data", "a.txt", "--tokenizer", "gaps", "--out", "run", *small, "--steps", "1")[0] == 0
    assert pg.GPT2.load("run", backend="numpy").config.n_vocab == 401


LONG = ["--data", "a.txt", "--out", "run", *SMALL, "--steps", "2000", "--eval-every", "500"]


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_bits(command, room):
    """Catches a run that loses its steps, a traceback, and a resumed one that ends elsewhere."""
    assert command(*LONG, "--out", "whole")[0] == 0
    run = process(*LONG)
    while not (room / "run" / "metrics.jsonl").exists() or len((room / "run" / "metrics.jsonl").read_text()) < 3000:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert re.search(rb"stopped after step \d+ of 2000; to continue: portable-gpt2 train --resume --out run", err)
    assert b"Traceback" not in err
    step = pg.training.Run.open("run").last["step"]
    assert 0 < step < 2000
    assert command("--resume", "--out", "run")[0] == 0
    assert bits(room / "run") == bits(room / "whole")
    assert command("--resume", "--out", "run")[0] == 0  # there is nothing left to do
    assert bits(room / "run") == bits(room / "whole")


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(room):
    """Catches files that are half written when the process dies, at whatever moment."""
    args = [*LONG[:-4], "--steps", "100000", "--eval-every", "2"]
    moments, seconds, opened = random.Random(0), 0.0, 0
    for i in range(8):
        checkpoints = room / f"run{i}" / "training" / "checkpoints.json"
        start = time.monotonic()
        run = process(*args, "--out", f"run{i}", start_new_session=True)
        if i == 0:  # up to its first checkpoint, to see how long that takes on this machine
            while not checkpoints.exists():
                assert run.poll() is None
                time.sleep(0.01)
            seconds = time.monotonic() - start
        else:
            time.sleep(moments.uniform(0.7, 2.0) * seconds)
        run.kill()
        run.communicate()
        if not (room / f"run{i}").exists():
            continue
        if not checkpoints.exists():
            with pytest.raises(ValueError, match="ended before its first checkpoint"):
                pg.training.Run.open(room / f"run{i}")
            continue
        found, opened = pg.training.Run.open(room / f"run{i}"), opened + 1
        state = found.restore(pg.get_backend("numpy"))
        assert state.step == found.last["step"]
        assert pg.GPT2.load(room / f"run{i}").config == found.config
    assert opened > 1


def test_a_model_without_a_tokenizer_cannot_be_trained_on_text(command, room):
    """Catches the training of a new tokenizer, whose ids mean other tokens than those that the model has learned."""
    tiny.model(pg.get_backend("numpy")).save("nameless")
    status, _, err = command("--data", "a.txt", "--init-from", "nameless", "--out", "run")
    assert status == 2
    assert "nameless: has no tokenizer, which training needs to read text" in err.splitlines()[-1]


WRONG = [
    ([], "--data: give the files to train on, or --resume to continue a run"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "a.txt", "--steps", "0"], "steps is 0; expected an int of at least 1"),
    (["--data", "a.txt", "--steps", "many"], "argument --steps: 'many': expected a whole number"),
    (["--data", "a.txt", *SMALL, "--n-head", "3"], "n_embd is 8, which n_head = 3 does not divide"),
    (["--data", "a.txt", "--vocab-size", "100"], "a vocabulary of 100 is too small"),
    (["--data", "a.txt", "--held-out", "1.5"], "--held-out 1.5: expected a file, or a share"),
    (["--data", "a.txt", "--held-out", "nowhere"], "nowhere"),
    (["--data", "a.txt", "--tokenizer", ".", "--vocab-size", "300"], "--tokenizer has its own"),
    (["--data", "a.txt", "--tokenizer", "."], ".: holds neither tokenizer.json"),
    (["--data", "a.txt", "--init-from", "nowhere/at/all"], "nowhere/at/all: no such directory"),
    (["--data", "a.txt", "--init-from", "x", "--n-layer", "2"], "--n-layer: the checkpoint of --init-from has its own"),
    (["--data", "a.txt", "--context", "1000", *SMALL], "--context 1000: the model has n_ctx = 8 positions"),
    (["--data", "a.txt", "--dtype", "float16"], "dtype is 'float16'; choose one of"),
    (["--data", "a.txt", "--backend", "abacus"], "unknown backend 'abacus'"),
    (["--data", "a.txt", "--plot", "losses"], "losses: the name must end in a format"),
    (["--data", "b.txt", *SMALL, "--held-out", "0.001"], "the held-out text has 0 tokens and a window has 9"),
    (["--resume"], "run: holds no training run to resume"),
    (["--resume", "--steps", "7", "--data", "a.txt"], "--data, --steps: a run that is resumed keeps its options"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_use_ends_with_one_line_and_status_2(command, room, args, message):
    """Catches a traceback, and a message without what is wrong."""
    status, out, err = command("--out", "run", *args)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_what_exists_is_not_written_over(command, room):
    assert command("--data", "a.txt", "--out", "run", *SMALL, "--steps", "1")[0] == 0
    before = bits(room / "run")
    status, _, err = command("--data", "b.txt", "--out", "run", *SMALL, "--steps", "1")
    assert status == 2
    assert "run: exists already; give a new directory, or resume the run that it holds" in err
    assert bits(room / "run") == before


def test_a_loss_that_is_no_number_ends_the_run(command, room):
    options = ["--learning-rate", "1e30", "--max-grad-norm", "off", "--steps", "9"]
    with np.errstate(all="ignore"):
        status, _, err = command("--data", "a.txt", "--out", "run", *SMALL, *options)
    assert status == 2
    assert re.search(r"step \d diverged: the loss is .*Try a lower learning rate than 1e\+30", err)
    assert pg.training.Run.open("run").last["step"] == 0


# Sizes, and what can be refused before a text is read


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vocab-size", str(10**12)], "training 8,000,000,000,952 parameters, with a gradient and two moments"),
        (["--vocab-size", str(10**8)], "the text has merges for "),
        (["--n-embd", str(10**9)], "parameters, with a gradient and two moments of each, would take "),
        (["--n-layer", str(10**9)], "parameters, with a gradient and two moments of each, would take "),
        (["--n-ctx", str(10**9)], "training 8,000,002,9"),
        (["--batch-size", str(10**12)], "a batch of 1000000000000 windows of 8 tokens would take "),
        (["--vocab-size", str(10**400)], "is not from 1 to 2**63 - 1"),
        (["--vocab-size", "0"], "argument --vocab-size: 0 is not from 1 to 2**63 - 1"),
        (["--seed", "9" * 5000], "(5002 characters): expected a whole number of fewer digits"),
        (["--seed", "0x10"], "argument --seed: '0x10': expected a whole number"),
        (["--steps", "1e3"], "argument --steps: '1e3': expected a whole number"),
        (["--max-grad-norm", "x"], "argument --max-grad-norm: 'x': expected a number or off"),
        (["--max-grad-norm", ""], "argument --max-grad-norm: '': expected a number or off"),
        (["--held-out", "nan"], "--held-out nan: expected a file, or a share"),
        (["--context", "9"], "--context 9: the model has n_ctx = 8 positions"),
        (["--n-lay", "3"], "unrecognized arguments: --n-lay 3"),
        (["--plot", "/proc/losses.png"], "/proc: cannot be written to: "),
        (["--plot", "folder.png"], "folder.png: is a directory; expected the name of a file"),
    ],
    ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "",
)
def test_what_cannot_be_is_refused_before_a_text_is_read(command, room, args, message):
    """Catches an abort, a MemoryError or a loop without end, and an hour of work that ends in a mistyped option."""
    (room / "folder.png").mkdir()
    status, out, err = command("--data", "a.txt", "--out", "run", *SMALL, "--steps", "1", *args)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
    assert not (room / "run").exists()
    if str(10**8) not in args:  # then the text is needed to know
        assert command("--data", "nowhere.txt", "--out", "run", *SMALL, "--steps", "1", *args)[2] == err


@pytest.mark.parametrize(
    "name", ["--data", "--held-out", "--init-from", "--tokenizer", "--plot", "--device", "--dtype"]
)
def test_an_empty_value_is_not_the_default(command, room, name):
    """Catches an unset variable that trains another model than was meant: `--init-from "$MODEL"`."""
    status, _, err = command("--data", "a.txt", "--out", "run", *SMALL, name, "")
    assert status == 2
    assert f"argument {name}: the value is empty" in err
    assert not (room / "run").exists()


def test_a_byte_order_mark_is_not_trained_on(command, room):
    """Catches a first token that stands for a mark, in each of several texts and in the held-out one."""
    for name in ("a.txt", "b.txt"):
        (room / name).write_bytes(b"\xef\xbb\xbf" + (room / name).read_bytes())
    assert command("--data", "a.txt", "--held-out", "b.txt", "--out", "run", *SMALL, "--steps", "1")[0] == 0
    run = pg.training.Run.open("run")
    assert not any("\ufeff" in run.tokenizer.decode(ids.tolist()) for ids in run.tokens())
