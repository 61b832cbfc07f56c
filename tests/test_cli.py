"""The command: text on stdout and nothing else, the rest on stderr, wrong use in one line and never a traceback."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import frameworks
import in_process
import numpy as np
import pytest
import tiny
import tokenizers

import portable_gpt2 as pg
from portable_gpt2.cli import main
from portable_gpt2.params import nest
from portable_gpt2.registry import known_backends


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory of checkpoints: `it`, one that takes long, one that is broken, one without a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints")
    tiny.write_tokenizer(path)
    tokenizer, numpy = pg.Tokenizer.load(path), pg.get_backend("numpy")
    tiny.model(numpy, tokenizer=tokenizer).save(path / "it")
    tiny.model(numpy).save(path / "nameless")
    tiny.endless(tokenizer).save(path / "endless")
    broken = {**tiny.weights(), "ln_f/b": np.full(16, 3e38, np.float32)}  # an infinity less another
    pg.GPT2(tiny.CONFIG, nest(broken), tokenizer).save(path / "broken")
    return path


@pytest.fixture
def command(checkpoints, capsys, monkeypatch):
    """Run the command in this process, among the checkpoints; return its exit status, stdout and stderr."""
    monkeypatch.chdir(checkpoints)
    return in_process.runner(capsys)


def arguments(*args):
    # -P: the installed package, and not what lies in the working directory
    return [sys.executable, "-P", "-m", "portable_gpt2.cli", *args]


@pytest.fixture
def process(checkpoints):
    """Run the command in a process of its own."""

    def run(*args, **environment):
        done = subprocess.run(
            arguments(*args), cwd=checkpoints, env={**os.environ, **environment}, capture_output=True, encoding="utf-8"
        )
        return done.returncode, done.stdout, done.stderr

    return run


# generate


def test_the_prompt_and_its_continuation_go_to_stdout(command, backend, checkpoints):
    """Catches a backend that writes another text, a prompt that is missing, and chatter among the text."""
    args = ["--model", "it", "--backend", backend.name, "--seed", "7", "-n", "20"]
    status, out, err = command("generate", "To be", *args)
    expected = pg.GPT2.load(checkpoints / "it", backend="numpy").generate("To be", max_new_tokens=20, seed=7)
    assert (status, out) == (0, f"To be{expected}\n")
    first, last = err.splitlines()
    assert first == (
        "<GPT2 of 2 layers, 2 heads, 16 wide, context 64, vocabulary 384, "
        f"on {backend.name}, {next(iter(backend.devices()))}>, seed 7, "
        "from Hugging Face's layout, model.safetensors, float32"
    )
    assert re.fullmatch(r"20 tokens in \d+\.\d\d s, \d+\.\d tokens/s", last)


def test_the_same_in_a_process_of_its_own(process, checkpoints):
    """Catches what works only where everything is imported already."""
    status, out, err = process("generate", "Быть", "--model", "it", "--seed", "7", "--max-new-tokens", "20")
    expected = pg.GPT2.load(checkpoints / "it", backend="numpy").generate("Быть", max_new_tokens=20, seed=7)
    assert (status, out) == (0, f"Быть{expected}\n")
    assert "on numpy, cpu>, seed 7" in err
    assert "tokens/s" in err.splitlines()[-1]
    assert len(err.splitlines()) == 2


def test_the_command_is_installed_under_its_name():
    """Catches an entry point that leads nowhere."""
    [point] = importlib.metadata.entry_points(group="console_scripts", name="portable-gpt2")
    assert point.load() is main


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["--temperature", "0"], {"temperature": 0}),
        (["--temperature", "2.5", "--top-k", "0"], {"temperature": 2.5, "top_k": None}),
        (["--top-k", "3"], {"top_k": 3}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--top-p", "off"], {"top_p": None}),
        (["--seed", str(2**64 - 1)], {"seed": 2**64 - 1}),
        (["--dtype", "float64"], {}),
        (["--device", "cpu"], {}),
    ],
    ids=" ".join,
)
def test_options_reach_the_model(command, checkpoints, args, options):
    """Catches an option that is parsed and forgotten, and a default that is not the library's."""
    model = pg.GPT2.load(checkpoints / "it", backend="numpy")
    status, out, _ = command("generate", "To be", "--model", "it", "-n", "30", "--seed", "7", *args)
    assert (status, out) == (0, f"To be{model.generate('To be', **{'max_new_tokens': 30, 'seed': 7, **options})}\n")


def test_the_seed_that_was_drawn_draws_the_text_again(command):
    """Catches a text that nobody can repeat."""
    args = ["generate", "To be", "--model", "it", "-n", "30", "--top-k", "0"]
    texts = {}
    for _ in range(3):
        _, out, err = command(*args)
        texts[re.search(r", seed (\d+), from ", err, re.MULTILINE)[1]] = out
    assert len(set(texts.values())) == len(texts) == 3
    for seed, text in texts.items():
        assert command(*args, "--seed", seed)[1] == text


def test_the_environment_names_the_backend(command, backend, monkeypatch):
    """Catches a command that knows its own default only."""
    monkeypatch.setenv("PORTABLE_GPT2_BACKEND", backend.name)
    status, _, err = command("generate", "To be", "--model", "it", "-n", "1")
    assert status == 0
    assert f"on {backend.name}, " in err


@pytest.mark.parametrize("prompt", ["", " ", "-", "--model", "a\nb\n", "🙂 <|endoftext|>", "\x00\x1b"])
def test_any_prompt_is_written_as_it_is(command, checkpoints, prompt):
    """Catches a prompt that is stripped, escaped, or taken for an option."""
    expected = pg.GPT2.load(checkpoints / "it", backend="numpy").generate(prompt, max_new_tokens=5, seed=7)
    status, out, _ = command("generate", "--model", "it", "-n", "5", "--seed", "7", "--", prompt)
    assert (status, out) == (0, f"{prompt}{expected}\n")


def test_no_tokens_are_no_mistake(command):
    """Catches a division by no time at all."""
    status, out, err = command("generate", "To be", "--model", "it", "-n", "0")
    assert (status, out) == (0, "To be\n")
    assert err.splitlines()[-1].startswith("0 tokens in 0.00 s")


def test_tokens_are_counted_where_the_text_ends_within_a_character(command, checkpoints):
    """Catches the piece that is left over at the end being counted as a token."""
    model = pg.GPT2.load(checkpoints / "it", backend="numpy")
    half = next(
        seed
        for seed in range(100)
        if model.generate("To be", max_new_tokens=7, seed=seed, top_k=None)[-1:] == "\ufffd"
        and len(list(model.stream("To be", max_new_tokens=7, seed=seed, top_k=None))) == 8
    )
    _, _, err = command("generate", "To be", "--model", "it", "-n", "7", "--top-k", "0", "--seed", str(half))
    assert err.splitlines()[-1].startswith("7 tokens in ")


def test_a_console_of_few_characters_does_not_end_the_text(process):
    """Catches a UnicodeEncodeError in the middle of a text, on a console that is not of UTF-8."""
    args = ["generate", "é", "--model", "it", "--seed", "7", "-n", "30"]
    status, out, err = process(*args, PYTHONIOENCODING="ascii")
    assert status == 0
    assert out.startswith("?")
    assert len(err.splitlines()) == 2


# Several texts


@pytest.fixture(scope="module")
def it(checkpoints):
    return pg.GPT2.load(checkpoints / "it", backend="numpy")


def test_several_prompts_are_written_one_after_the_other(command, checkpoints, it):
    """Catches a prompt file that is stripped, or whose line endings are changed, and samples that are mixed up."""
    text = "A line\r\nand the next\n\n"
    (checkpoints / "prompt.txt").write_bytes(text.encode())
    args = ["To be", "--prompt-file", "prompt.txt", "--num-samples", "2", "-n", "8", "--seed", "7"]
    status, out, err = command("generate", *args, "--model", "it")
    expected = it.complete(["To be", text], num_samples=2, max_new_tokens=8, seed=7)
    names = [f"prompt {i}, sample {j}" for i in (1, 2) for j in (1, 2)]
    bar = "=" * 20
    assert status == 0
    assert out == "".join(f"{bar} {n} {bar}\n{c.prompt}{c.text}\n" for n, c in zip(names, expected, strict=True))
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s", err.splitlines()[-1])


def test_a_prompt_may_come_from_stdin(process, checkpoints, it):
    """Catches a prompt that is read in the terminal's encoding, or to the first line only."""
    prompt = "Быть или\nне быть"
    args = arguments("generate", "--prompt-file", "-", "--model", "it", "-n", "8", "--seed", "7")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(args, cwd=checkpoints, env=environment, input=prompt.encode(), capture_output=True)
    assert done.returncode == 0
    written = prompt + it.generate(prompt, max_new_tokens=8, seed=7)
    assert done.stdout.decode("ascii") == "".join(c if ord(c) < 128 else "?" for c in written) + "\n"


def test_json_lines_hold_what_was_drawn(command, it):
    """Catches JSON that is not one object a line, and a number that cannot be had otherwise left out."""
    args = ["To be", "存在", "--num-samples", "2", "-n", "8", "--seed", "7", "--json"]
    status, out, _ = command("generate", *args, "--model", "it")
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    expected = it.complete(["To be", "存在"], num_samples=2, max_new_tokens=8, seed=7)
    assert found == [{**vars(completion), "seed": 7} for completion in expected]
    assert set(found[0]) == {"prompt", "text", "tokens", "index", "finish_reason", "seed"}


def test_without_a_prompt_the_text_starts_from_end_of_text(command, it):
    """Catches a prompt that is required though OpenAI's code has its unconditional samples."""
    status, out, _ = command("generate", "--model", "it", "-n", "8", "--seed", "7")
    assert (status, out) == (0, it.generate("", max_new_tokens=8, seed=7) + "\n")


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["--stop", " ", "--stop", "zz"], {"stop": [" ", "zz"]}),
        (["--stop-token", "12", "--stop-token", "255", "--top-k", "0"], {"stop": [12, 255], "top_k": 0}),
        (["--min-p", "0.2", "--top-k", "0"], {"min_p": 0.2, "top_k": 0}),
        (["--min-p", "off", "--repetition-penalty", "3"], {"repetition_penalty": 3}),
        (["--sliding", "-n", "90"], {"sliding": True, "max_new_tokens": 90}),
        (["--allow-special"], {"allow_special": True}),
        (["--allow-special-token", "<|endoftext|>"], {"allow_special": ["<|endoftext|>"]}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_every_option_reaches_the_model(command, it, args, options):
    """Catches an option that is read and dropped: each of these changes the text."""
    prompt = "Be<|endoftext|>To be"
    plain = {"max_new_tokens": 20, "seed": 13}
    status, out, _ = command("generate", prompt, "--model", "it", "-n", "20", "--seed", "13", *args)
    expected = it.generate(prompt, **{**plain, **options})
    assert (status, out) == (0, f"{prompt}{expected}\n")
    assert expected != it.generate(prompt, **plain)


def test_a_stop_token_ends_the_text(command, it):
    """Catches a token id that is read and dropped: both of these end the text, the second one first."""
    ids = list(it.stream_ids(it.tokenizer.encode("To be"), max_new_tokens=20, seed=13))
    last, first = ids[15], ids[6]
    args = ["--stop-token", str(last), "--stop-token", str(first)]
    status, out, _ = command("generate", "To be", "--model", "it", "-n", "20", "--seed", "13", *args)
    n = min(ids.index(last), ids.index(first))
    assert (status, out) == (0, f"To be{it.tokenizer.decode(ids[:n])}\n")


def test_special_tokens_may_be_allowed_by_name(command, checkpoints, it):
    """Catches a name that allows them all, one that is dropped, and one that the tokenizer lacks and nobody misses."""
    whole = tokenizers.Tokenizer.from_str(tiny.byte_level_bpe("added"))
    whole.add_special_tokens(["<|user|>", "<|bot|>"])
    config = dataclasses.replace(tiny.CONFIG, n_vocab=386)
    model = tiny.model(pg.get_backend("numpy"), config, tokenizer=pg.Tokenizer(whole))
    model.save(checkpoints / "chat", force=True)
    text = "<|user|>To be<|bot|>"
    (checkpoints / "chat.txt").write_text(text)
    found = {}
    for options, allowed in (
        ([], False),
        (["--allow-special-token", "<|bot|>"], ["<|bot|>"]),
        (["--allow-special-token", "<|bot|>", "--allow-special-token", "<|user|>"], ["<|bot|>", "<|user|>"]),
        (["--allow-special"], True),
    ):
        status, out, _ = command("score", "chat.txt", "--model", "chat", "--json", *options)
        assert status == 0
        found[str(allowed)] = json.loads(out)["tokens"]
        assert found[str(allowed)] == model.tokenizer.encode(text, allow_special=allowed)
    assert [384 in tokens for tokens in found.values()] == [False, False, True, True]
    assert [385 in tokens for tokens in found.values()] == [False, True, True, True]
    for arguments in (["generate", "x"], ["score", "chat.txt"], ["attend", "x", "-o", "x.png"]):
        status, _, error = command(*arguments, "--model", "chat", "--allow-special-token", "<|use|>")
        assert (status, error.count("\n")) == (2, 1 if arguments[0] == "generate" else error.count("\n"))
        assert "allow_special names '<|use|>', which is not a special token of this tokenizer; it has <|endoft" in error


# score


def test_score_says_how_likely_each_text_is(command, checkpoints, it):
    """Catches figures of another text, of another stride, or rounded away."""
    text = "To be, or not to be: that is the question.<|endoftext|>\n" * 4
    (checkpoints / "a.txt").write_text(text, encoding="utf-8")
    totals = []
    (checkpoints / "b.txt").write_text("存在", encoding="utf-8")
    for args, options in (
        ([], {}),
        (["--stride", "3"], {"stride": 3}),
        (["--bos"], {"bos": True}),
        (["--allow-special"], {"allow_special": True}),
    ):
        status, out, _ = command("score", "a.txt", "b.txt", "--model", "it", *args)
        assert status == 0
        totals.append(out)
        for line, name, score in zip(
            out.splitlines(), ["a.txt", "b.txt"], it.score([text, "存在"], **options), strict=True
        ):
            assert line == (
                f"{name}: perplexity {score.perplexity:.4f} per token, {score.byte_perplexity:.4f} per byte; "
                f"log-probability {score.total:.4f} of {score.n_tokens} tokens, {score.n_bytes} bytes"
            )
    assert len(set(totals)) == 4


def test_score_as_json_holds_every_log_probability(command, checkpoints, it):
    """Catches a NaN, which is no JSON, and figures of less than full precision."""
    (checkpoints / "b.txt").write_text("存在", encoding="utf-8")
    (checkpoints / "empty.txt").write_text("")
    status, out, _ = command("score", "b.txt", "empty.txt", "--model", "it", "--json")
    assert status == 0
    first, empty = (json.loads(line, parse_constant=pytest.fail) for line in out.splitlines())
    score = it.score("存在")
    assert first["tokens"] == it.tokenizer.encode("存在")
    assert first["log_probs"] == [None, *score.log_probs[1:].tolist()]
    assert (first["total"], first["perplexity"]) == (score.total, score.perplexity)
    assert (empty["tokens"], empty["perplexity"]) == ([], None)


def test_a_file_that_is_no_text_is_refused_by_name(command, checkpoints):
    """Catches a traceback, and text that was guessed."""
    (checkpoints / "latin.txt").write_bytes(b"caf\xe9")
    for args in (["score", "latin.txt"], ["generate", "--prompt-file", "latin.txt"]):
        status, out, err = command(*args, "--model", "it")
        assert (status, out) == (2, "")
        assert "latin.txt: not UTF-8" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--prompt-file", "score"])
def test_a_byte_order_mark_is_not_text(command, checkpoints, it, option):
    """Catches a mark that Windows puts before a text, which costs a token and changes all that follow."""
    (checkpoints / "bom.txt").write_bytes("\ufeffTo be\ufeff".encode())
    if option == "score":
        _, out, _ = command("score", "bom.txt", "--model", "it", "--json")
        assert json.loads(out)["tokens"] == it.tokenizer.encode("To be\ufeff")
    else:
        _, out, _ = command("generate", option, "bom.txt", "--model", "it", "-n", "0")
        assert out == "To be\ufeff\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_text_in_another_encoding_is_refused_by_its_name(command, checkpoints, encoding):
    """Catches a message about byte 0xff, of which no user knows what to do."""
    mark = "" if encoding == "utf-16" or encoding == "utf-32" else "\ufeff"
    (checkpoints / "other.txt").write_bytes(f"{mark}To be".encode(encoding))
    for args in (["score", "other.txt"], ["generate", "--prompt-file", "other.txt"]):
        status, out, err = command(*args, "--model", "it")
        assert (status, out) == (2, "")
        assert f"other.txt: not UTF-8 but {encoding[:6].upper()}, as its byte order mark says; iconv -f" in err


def test_a_file_that_is_named_twice_is_scored_twice(command, checkpoints):
    """Catches a row of the output that is missing."""
    (checkpoints / "b.txt").write_text("存在", encoding="utf-8")
    first, second = command("score", "b.txt", "b.txt", "--model", "it")[1].splitlines()
    assert first == second


def test_json_is_strict_where_a_number_is_infinite(command, checkpoints, monkeypatch):
    """Catches Infinity and NaN, which json.dumps writes and no other parser reads."""
    (checkpoints / "b.txt").write_text("存在", encoding="utf-8")
    log_probs = np.asarray([np.nan, -np.inf, -1e9, -1.5])
    monkeypatch.setattr(pg.GPT2, "score", lambda *_, **__: pg.Score([1, 2, 3, 4], log_probs, 6))
    _, out, _ = command("score", "b.txt", "--model", "it", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["log_probs"] == [None, None, -1e9, -1.5]
    assert found["total"] is found["perplexity"] is found["byte_perplexity"] is None


def test_samples_without_a_seed_have_seeds_of_their_own(command, it):
    """Catches one text given eight times, and a text that nobody can repeat."""
    args = ["generate", *["To be"] * 4, "--model", "it", "-n", "12", "--top-k", "0"]
    found = [json.loads(line) for line in command(*args, "--json")[1].splitlines()]
    assert len({each["text"] for each in found}) == len({each["seed"] for each in found}) == 4
    again = it.generate("To be", max_new_tokens=12, top_k=0, seed=found[2]["seed"])
    assert again == found[2]["text"]
    assert len(set(re.findall(r"^=+ prompt \d, sample 1, seed (\d+) =+$", command(*args)[1], re.MULTILINE))) == 4


# attend


@pytest.mark.parametrize("chosen", [["--layer", "1", "--head", "0"], ["--layer", "0"], [], ["--head", "1"]], ids=str)
def test_attend_draws_maps(command, checkpoints, chosen):
    """Catches a map that is not drawn, and a file of another kind than its name says."""
    pytest.importorskip("matplotlib")
    status, out, err = command("attend", "To be, $x_1$ 存在\n", "--model", "it", *chosen, "-o", "map.png")
    assert (status, out) == (0, "")
    assert err == "wrote map.png\n"
    assert (checkpoints / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not list(checkpoints.glob(".map*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layer", "2"], "there is no layer 2; the model has 2, from 0"),
        (["--head", "-1"], "argument --head: -1 is not from 0 to 2**63 - 1"),
        (["--layer", "some"], "argument --layer: 'some': expected a whole number or all"),
        (["-o", "map.xyz"], "map.xyz: the name must end in a format of matplotlib"),
        (["-o", "map"], "map: the name must end in a format of matplotlib"),
        (["-o", "nowhere/map.png"], "nowhere: no such directory"),
        (
            ["--model", "nowhere-at-all", "-o", "map"],
            "map: the name must end in a format",
        ),  # before loading
    ],
)
def test_what_attend_cannot_draw_is_refused(command, args, message):
    """Catches an index from the end, and an image that is left half written."""
    pytest.importorskip("matplotlib")
    status, out, err = command("attend", "To be", "--model", "it", "-o", "map.png", *args)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_attend_says_what_to_install(command, monkeypatch):
    """Catches an ImportError that names a package and not the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = command("attend", "To be", "--model", "it", "-o", "map.png")
    assert status == 2
    assert "pip install 'portable-gpt2[plot]'" in err


# Wrong use

IT = ["--model", "it"]
WRONG = [  # what follows `generate`, and what the message says
    (["x", "--model"], "argument --model: expected one argument"),
    (["x", *IT, "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["x", *IT, "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    (["x", *IT, "-n", "3", "--stop", ""], "argument --stop: the stop string is empty, so every text would end at once"),
    (["x", *IT, "-n", "3", "--num-samples", "0"], "argument --num-samples: 0 is not from 1 to 2**63 - 1"),
    (["x", *IT, "-n", "3", "--batch-size", "0"], "argument --batch-size: 0 is not from 1 to 2**63 - 1"),
    (["x", *IT, "-n", "3", "--min-p", "2"], "min_p is 2.0; expected a number above 0 and at most 1 (None is off)"),
    (["x", *IT, "-n", "3", "--repetition-penalty", "0"], "repetition_penalty is 0.0; expected a number above 0"),
    (
        ["x", "--model", "./nowhere"],
        "nowhere: no such directory; give one that holds config.json and model",
    ),
    (
        ["x", "--model", "nowhere"],
        "nowhere: no such directory; and the hub's model of this name is not",
    ),
    (["x", "--model", "."], "config.json: no such file; a checkpoint holds config.json and model.safetensors"),
    (["x", "--model", "nameless"], "the model has no tokenizer: its checkpoint had no vocab.json and merges.txt"),
    (["x", *IT, "--backend", "keras"], "unknown backend 'keras'; the known backends are "),
    (["x", *IT, "--backend", ""], "argument --backend: the value is empty; if it comes from a variable"),
    (["x", *IT, "--device", "cuda:77"], "backend 'numpy' has no device 'cuda:77'; the devices here are cpu"),
    (["x", *IT, "--dtype", "int8"], "backend 'numpy' has no floating dtype 'int8'; choose one of float32"),
    (["x", *IT, "-n", "-1"], "argument -n/--max-new-tokens: -1 is not from 0 to 2**63 - 1"),
    (["x", *IT, "-n", "many"], "argument -n/--max-new-tokens: 'many': expected a whole number"),
    (
        ["x", *IT, "-n", "64"],
        "a prompt of 1 tokens and max_new_tokens = 64 do not fit into n_ctx = 64: give at most 63",
    ),
    (["x " * 99, *IT], "do not fit into n_ctx = 64: shorten the prompt"),
    (
        ["x", *IT, "-n", "3", "--temperature", "-1"],
        "temperature is -1.0; expected a number of at least 0 (0 is greedy)",
    ),
    (["x", *IT, "-n", "3", "--temperature", "nan"], "temperature is nan; expected a number of at least 0"),
    (["x", *IT, "-n", "3", "--temperature", "inf"], "temperature is inf; expected a number of at least 0"),
    (["x", *IT, "--temperature", "hot"], "argument --temperature: 'hot': expected a number"),
    (["x", *IT, "-n", "3", "--top-k", "-1"], "top_k is -1; expected an int of at least 0 (0 or None is off)"),
    (["x", *IT, "--top-k", "0.5"], "argument --top-k: '0.5': expected a whole number"),
    (["x", *IT, "-n", "3", "--top-p", "0"], "top_p is 0.0; expected a number above 0 and at most 1"),
    (["x", *IT, "-n", "3", "--top-p", "nan"], "top_p is nan; expected a number above 0 and at most 1"),
    (["x", *IT, "-n", "3", "--seed", "-1"], "seed is -1; expected an int from 0 to 2**64 - 1"),
    (["x", *IT, "-n", "3", "--seed", str(2**64)], f"seed is {2**64}; expected an int from 0 to 2**64 - 1"),
    (["x", *IT, "--seed", "7.5"], "argument --seed: '7.5': expected a whole number"),
    (["x", "--temp", "1"], "unrecognized arguments: --temp 1"),
    (["x", *IT, "--stop-token", "-1"], "argument --stop-token: -1 is not from 0 to 2**63 - 1"),
    (["x", *IT, "--min-p", "x"], "argument --min-p: 'x': expected a number or off"),
    (["x", *IT, "--top-k", ""], "argument --top-k: '': expected a whole number"),
    (["x", "--model", "./nowhere", "--batch-size", "0"], "argument --batch-size: 0 is not"),  # before a model is loaded
    (["x", "--model", "./nowhere", "--temperature", "nan"], "temperature is nan"),
    (["a\udcff", *IT], "character 1 of the text, '\\udcff', is a lone surrogate"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_use_ends_with_one_line_and_status_2(command, args, message):
    """Catches a traceback, a message without what is wrong, and text that was begun before the mistake was found."""
    status, out, err = command("generate", *args)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("portable-gpt2")
    assert len(err.splitlines()) == 1


def test_a_stride_is_refused_before_a_model_is_loaded(command, checkpoints):
    """Catches gigabytes that are read for a mistyped number."""
    status, _, err = command("score", "config.json", "--model", "./nowhere", "--stride", "0")
    assert (status, err.count("\n")) == (2, 1)
    assert "argument --stride: 0 is not from 1 to 2**63 - 1" in err


def test_a_bug_shows_where_it_is(command, monkeypatch):
    """Catches a net that is too wide: a mistake of ours that is told as if it were the user's."""

    def broken(*args, **options):
        raise KeyError("a bug")

    monkeypatch.setattr(pg.GPT2, "load", broken)
    with pytest.raises(KeyError, match="a bug"):
        command("generate", "x", *IT)


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 1.5 TiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")],
    ids=repr,
)
def test_memory_that_is_full_is_said_in_one_line(command, monkeypatch, error):
    """Catches a traceback for a model that is too large."""

    def full(*args, **options):
        raise error

    monkeypatch.setattr(pg.GPT2, "load", full)
    assert command("generate", "x", *IT) == (2, "", f"portable-gpt2: out of memory: {error}\n")


@pytest.mark.parametrize(
    ("args", "program"),
    [
        (["frobnicate"], "portable-gpt2"),
        (["--frobnicate"], "portable-gpt2"),
        (["backends", "x"], "portable-gpt2 backends"),
    ],
    ids=str,
)
def test_what_is_no_command_ends_with_one_line_and_status_2(command, args, program):
    """Catches argparse's usage, of several lines."""
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err.startswith(f"{program}: ")
    assert "--help" in err
    assert len(err.splitlines()) == 1


def test_wrong_use_of_a_backend_ends_with_one_line_and_status_2(command, backend):
    """Catches a framework's own error for a device or a dtype that it does not have."""
    for option, value in (("--device", "cuda:77"), ("--dtype", "int8")):
        status, out, err = command("generate", "x", *IT, "--backend", backend.name, option, value)
        assert (status, out) == (2, "")
        assert f"portable-gpt2: backend '{backend.name}' has no " in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_a_broken_checkpoint_ends_with_one_line_and_status_2(command, checkpoints, tmp_path, name):
    """Catches a traceback where a file is at fault, and a line that does not name it."""
    shutil.copytree(checkpoints / "it", tmp_path / "it")
    content = (tmp_path / "it" / name).read_bytes()
    (tmp_path / "it" / name).write_bytes(content[: len(content) // 2])
    status, out, err = command("generate", "x", "--model", str(tmp_path / "it"))
    assert (status, out) == (2, "")
    assert err.startswith(f"portable-gpt2: {tmp_path / 'it' / name}")
    assert len(err.splitlines()) == 1


def test_logits_that_are_nan_end_with_one_line_and_status_2(command):
    """Catches a text from broken weights, or a traceback, after the prompt was written."""
    status, out, err = command("generate", "x", "--model", "broken", "-n", "3")
    assert (status, out) == (2, "x")
    assert err.splitlines()[-1].startswith("portable-gpt2: the logits hold a NaN")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    "args",
    [["generate", "x", "--model", "nowhere"], ["generate", "x", *IT, "--temperature", "nan", "-n", "3"], ["score"]],
    ids=" ".join,
)
def test_wrong_use_in_a_process_of_its_own(process, args):
    """Catches an exit status that gets lost on the way out."""
    status, out, err = process(*args)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("portable-gpt2")


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["backends", "--help"]], ids=" ".join)
def test_help_goes_to_stdout(command, args):
    """Catches help that counts as an error."""
    status, out, err = command(*args)
    assert (status, err) == (0, "")
    assert out.startswith("usage: portable-gpt2")


# Interrupted


def start(checkpoints, *args):
    """Start a generation that would take minutes, and wait for its first text."""
    # If the tests run in the background, SIGINT may be ignored, and a child process inherits this.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from portable_gpt2.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ["--model", "endless", "-n", "90000", "--top-k", "0", *args]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "generate", "To be", *options],
        cwd=checkpoints,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(5) == b"To be"
    return process


def test_ctrl_c_ends_it_quietly(checkpoints):
    """Catches a KeyboardInterrupt and its traceback, and an exit status that says that all was well."""
    process = start(checkpoints)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    [status] = err.decode().splitlines()
    assert status.startswith("<GPT2 of 2 layers")


def test_ctrl_c_while_loading_ends_it_quietly(command, monkeypatch):
    """Catches a handler that begins with the first token."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pg.GPT2, "load", interrupted)
    assert command("generate", "x", *IT) == (130, "", "")


def test_a_closed_pipe_ends_it_quietly(checkpoints):
    """Catches a BrokenPipeError: `portable-gpt2 generate ... | head -c 5` is an ordinary thing to type."""
    process = start(checkpoints)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    [status] = err.splitlines()
    assert status.startswith("<GPT2 of 2 layers")


@pytest.mark.parametrize("args", [["--help"], ["generate", "x", *IT, "-n", "3", "--seed", "7"]], ids=" ".join)
def test_a_pipe_that_is_closed_from_the_start_ends_it_quietly(checkpoints, args):
    """Catches text that waits in a buffer until the interpreter ends, where it is too late to be quiet."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        arguments(*args), cwd=checkpoints, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert len(err.splitlines()) == (args != ["--help"])
    assert "Error" not in err


# While weights load


def test_loading_that_is_quick_shows_no_progress_bar(command):
    """Catches a bar that flickers."""
    _, _, err = command("generate", "To be", *IT, "-n", "1")
    assert "loading" not in err


def test_loading_that_takes_longer_than_a_second_shows_a_progress_bar_on_a_terminal(command, monkeypatch):
    """Catches a silence that looks like a hang, and a log that is filled with the states of a bar."""
    numpy = type(pg.get_backend("numpy"))
    from_numpy = numpy.from_numpy

    def slowly(*args, **options):
        time.sleep(0.05)
        return from_numpy(*args, **options)

    monkeypatch.setattr(numpy, "from_numpy", slowly)
    status, out, err = command("generate", "To be", *IT, "-n", "0")
    assert (status, out) == (0, "To be\n")
    assert "loading" not in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = command("generate", "To be", *IT, "-n", "0")
    assert (status, out) == (0, "To be\n")
    assert re.search(r"loading: +\d+%.*/28 ", err)


# backends


def test_backends_lists_what_is_installed_and_how_to_get_the_rest(command):
    """Catches a backend that is missing from the table, or stands there without its version and devices."""
    status, out, _ = command("backends")
    header, *rows = (line.split(maxsplit=2) for line in out.splitlines())
    assert status == 0
    assert header == ["backend", "version", "devices"]
    assert [row[0] for row in rows] == known_backends()
    for name, version, devices in rows:
        if name in pg.available_backends():
            module = sys.modules[name]
            assert version == (getattr(module, "__version__", None) or importlib.metadata.version(name))
            assert devices == ", ".join(pg.get_backend(name).devices())
        else:
            assert (version, devices) == ("-", f"not installed: pip install 'portable-gpt2[{name}]'")


BLOCKED = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {frameworks.FRAMEWORKS}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from portable_gpt2.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_where_only_numpy_is_installed_it_works_and_says_what_to_install(checkpoints):
    """Catches a command that needs a framework nobody asked for, and an advice that is missing."""

    def run(*args):
        return subprocess.run(
            [sys.executable, "-P", "-c", BLOCKED, *args], cwd=checkpoints, capture_output=True, encoding="utf-8"
        )

    table = run("backends")
    assert table.returncode == 0
    for name in frameworks.FRAMEWORKS:
        assert re.search(
            rf"^{name} +- +not installed: pip install 'portable-gpt2\[{name}\]'$", table.stdout, re.MULTILINE
        )
    assert re.search(rf"^numpy +{re.escape(np.__version__)} +cpu$", table.stdout, re.MULTILINE)

    text = run("generate", "To be", *IT, "-n", "3", "--seed", "7")
    assert (text.returncode, text.stdout[:5]) == (0, "To be")

    refused = run("generate", "To be", *IT, "--backend", "torch")
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert "torch is not installed: pip install 'portable-gpt2[torch]' (installed here: numpy)" in line
