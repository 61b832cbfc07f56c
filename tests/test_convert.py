"""convert and save: what they write is complete or absent, and what they replace is there until then."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import frameworks
import hypothesis
import layouts
import ml_dtypes
import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2 import files
from portable_gpt2.checkpoint import convert, read_checkpoint
from portable_gpt2.cli import main


def arrays(directory):
    return {path: tensor.read() for path, tensor in read_checkpoint(directory).tensors.items()}


def is_model(directory, seed, dtype=np.float32, config=tiny.CONFIG):
    """Return whether a directory holds the whole model of a seed, and nothing else."""
    found = arrays(directory)
    names = sorted(os.listdir(directory))
    assert set(names) - {"merges.txt", "vocab.json"} == {"config.json", "model.safetensors"}
    return all(np.array_equal(found[path], a.astype(dtype)) for path, a in tiny.weights(config, seed).items())


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a tokenizer, seed 1."""
    layouts.write_sharded_safetensors(tmp_path / "source", tiny.CONFIG, tiny.weights(seed=1))
    tiny.write_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def older(tmp_path):
    """Another checkpoint, seed 2, in a directory of its own."""
    layouts.write_safetensors(tmp_path / "out", tiny.CONFIG, tiny.weights(seed=2))
    return tmp_path / "out"


# The command


def test_the_command_writes_a_checkpoint_and_says_from_what(source, tmp_path, capsys):
    """Catches a command that writes to stdout, or that does not say what it took the source for."""
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    said = "Hugging Face's layout, model.safetensors.index.json of 3 files, float32"
    assert err == f"{tmp_path / 'out'}: from {said}\n"
    assert is_model(tmp_path / "out", seed=1)
    assert pg.Tokenizer.load(tmp_path / "out").encode("To be") == pg.Tokenizer.load(source).encode("To be")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtype_is_that_of_the_file(source, tmp_path, dtype):
    """Catches a conversion that is made twice, or by way of another dtype."""
    assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert is_model(tmp_path / "out", seed=1, dtype=getattr(ml_dtypes, dtype, dtype))
    assert {a.dtype.name for a in arrays(tmp_path / "out").values()} == {dtype}


def test_what_a_dtype_cannot_hold_is_refused(source, tmp_path):
    """Catches weights that become infinite in float16."""
    large = {**tiny.weights(), "h1/attn/c_proj/b": np.full(16, 1e5, np.float32)}
    layouts.write_safetensors(source, tiny.CONFIG, large)
    with pytest.raises(ValueError, match="h1/attn/c_proj/b holds values beyond the range of float16"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_it_needs_no_framework(source, tmp_path):
    """Catches a conversion that computes."""
    code = "import sys; from portable_gpt2.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code, "convert", str(source), str(tmp_path / "out")]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not set(frameworks.FRAMEWORKS) & set(modules)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["source", "out"], "out: exists already; give a new directory, or replace this one by force"),
        (["source", "out", "--dtype", "int8"], "no floating dtype 'int8'; choose one of float64"),
        (
            ["out", "source/config.json", "--force"],
            "config.json: exists already and is not a directory; give a new one",
        ),
        (["./none", "new"], "none: no such directory"),
        (["source", ".", "--force"], "is the current directory, and is not replaced"),
        (["source"], "the following arguments are required: DST"),
    ],
)
def test_wrong_use_ends_with_one_line_and_changes_nothing(source, older, tmp_path, monkeypatch, capsys, args, why):
    """Catches a directory that is lost, and a traceback."""
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    try:
        status = main(["convert", *args])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert why in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


# Force


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_all_that_a_directory_holds(source, older, exchange, monkeypatch):
    """Catches two checkpoints in one directory, and temporary files next to it, with and without renameat2."""
    (older / "pytorch_model.bin").write_text("of the older one")
    if not exchange:
        monkeypatch.setattr(files, "_swap", lambda *paths: False)
    beside = sorted(older.parent.iterdir())
    convert(source, older, force=True)
    assert is_model(older, seed=1)
    assert sorted(older.parent.iterdir()) == beside


def test_a_checkpoint_may_be_converted_in_place(source):
    """Catches a source that is gone before all of it is read."""
    convert(source, source, force=True, dtype="bfloat16")
    assert is_model(source, seed=1, dtype=ml_dtypes.bfloat16)


def test_a_model_is_saved_over_what_it_was_loaded_from(older, backend):
    """Catches weights that are mapped from a file which is overwritten."""
    model = pg.GPT2.load(older, backend=backend)
    model.save(older, force=True)
    assert is_model(older, seed=2)


def test_a_link_to_a_directory_stays_one(source, older, tmp_path):
    """Catches a link that is replaced, with the directory that it led to left as it was."""
    (tmp_path / "link").symlink_to(older)
    convert(source, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert is_model(older, seed=1)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_conversion_that_fails_leaves_the_older_one(source, older, exchange, monkeypatch):
    """Catches a destination that is emptied first, and half a checkpoint that is left next to it."""
    if not exchange:
        monkeypatch.setattr(files, "_swap", lambda *paths: False)
    spoilt = source / "model-00003-of-00003.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    beside = sorted(older.parent.iterdir())
    with pytest.raises(pg.CheckpointError, match="holds a NaN"):
        convert(source, older, force=True)
    assert is_model(older, seed=2)
    assert sorted(older.parent.iterdir()) == beside


CONVERT = """
import sys
from portable_gpt2.checkpoint import convert
print("ready", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2], force=sys.argv[3:] == ["--force"])
print("done", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
@pytest.mark.parametrize("force", [False, True])
def test_a_process_that_is_killed_leaves_the_old_or_the_new_and_nothing_between(tmp_path, force):
    """Catches a destination that is there before it is complete, or gone before the new one is there; at some random
    moments, a tenth as many as hypothesis has examples.
    """
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=64, n_vocab=20_000, n_ctx=8, eos_token_id=None)
    layouts.write_safetensors(tmp_path / "source", config, tiny.weights(config, seed=1))
    layouts.write_safetensors(tmp_path / "older", config, tiny.weights(config, seed=2))
    moments, seconds, outcomes = hypothesis.settings.default.max_examples // 10, 0.0, []
    random_moment = random.Random(0)
    for i in range(moments + 1):
        (tmp_path / str(i)).mkdir()
        out = tmp_path / str(i) / "out"
        if force:
            shutil.copytree(tmp_path / "older", out)
        command = [sys.executable, "-P", "-c", CONVERT, str(tmp_path / "source"), str(out), *["--force"] * force]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(b"\n")
            start = time.perf_counter()
            process.stdin.flush()
            if i == 0:  # undisturbed, to see how long it takes
                assert process.stdout.readline() == b"done\n"
                seconds = time.perf_counter() - start
            else:
                time.sleep(random_moment.uniform(0, 1.2 * seconds))
                process.send_signal(signal.SIGKILL)
        if not out.exists():
            outcomes.append("absent")
        else:
            [outcome] = [name for name, seed in (("new", 1), ("old", 2)) if is_model(out, seed, config=config)]
            outcomes.append(outcome)
        shutil.rmtree(tmp_path / str(i))
    assert set(outcomes) <= ({"old", "new"} if force else {"absent", "new"})
    assert outcomes[0] == "new"
    print(f"killed at {moments} moments of {seconds:.3f} s: {', '.join(outcomes[1:])}")
