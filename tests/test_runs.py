"""Run directories: a damaged file is refused by its name, one process trains a run, and no line of metrics is lost."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
from runs import CONFIG, RECIPE, begin, contents, lines, resume, write_ids
from safetensors.numpy import load_file, save_file

import portable_gpt2 as pg
from portable_gpt2 import training
from portable_gpt2.params import flatten
from portable_gpt2.training import Run, Trainer, records, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    list(train(*begin(directory)))
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same run, stopped after step 3. Its last checkpoint is step-3, its best is step-0."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    reports = train(*begin(directory))
    for report in reports:
        if report.step == 3:
            break
    reports.close()
    return directory


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, to be spoilt."""
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def rewrite(file, change, seal=True):
    """Change the entries of a record; seal it again, so that what is refused is what it says."""
    entries = json.loads(file.read_text())
    del entries["sha256"]
    before = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    change(entries)
    file.write_text(records.sealed(entries) if seal else json.dumps({**entries, "sha256": before}))


def test_a_stopped_run_ends_in_the_same_bits(run, whole):
    """The rest of this file spoils such a run; catches a fixture that could not be resumed in any case."""
    resume(run)
    assert lines(run) == lines(whole)
    assert contents(run) == contents(whole)


# Records


def put(*keys_and_value):
    """Return a function that sets an entry at any depth."""
    *keys, last, value = keys_and_value

    def change(entries):
        for key in keys:
            entries = entries[key]
        entries[last] = value

    return change


def drop(*keys):
    *keys, last = keys

    def change(entries):
        for key in keys:
            entries = entries[key]
        del entries[last]

    return change


RUN, POINTERS = "training/run.json", "training/checkpoints.json"
ELSEWHERE = "../../other/step-3"
WRONG_RECORDS = [
    (RUN, put("n_training", 10**9), "n_training is 1000000000; expected an int from 0 to 300"),
    (RUN, put("n_training", None), "n_training is None"),
    (RUN, put("n_training", True), "n_training is True"),
    (RUN, put("n_training", -1), "n_training is -1"),
    (RUN, drop("n_training"), "the record lacks 'n_training'"),
    (RUN, put("recipe", "epochs", 3), "recipe has the unknown 'epochs'"),
    (RUN, drop("recipe", "seed"), "recipe lacks 'seed'"),
    (RUN, put("recipe", []), r"recipe is \[\]; expected an object"),
    (RUN, put("recipe", "steps", "6"), "steps is '6'; expected an int"),
    (RUN, put("recipe", "dtype", ["float32"]), "dtype is "),
    (RUN, put("recipe", "context", 9), "context is 9; the model has n_ctx = 8 positions"),
    (RUN, put("tokens", "sha256", "abc"), "the SHA-256 of the tokens is 'abc'"),
    (RUN, put("where", "backend", 3), "backend is 3; expected a name"),
    (RUN, put("where", None), "where is None"),
    (POINTERS, put("last", {}), "last lacks 'files'"),
    (POINTERS, put("last", None), "last is None; expected an object"),
    (POINTERS, put("last", "name", ELSEWHERE), "its name is '../../other/step-3'; expected 'step-3'"),
    (POINTERS, put("last", "name", "step-2"), "its name is 'step-2'; expected 'step-3'"),
    (POINTERS, put("best", "name", "/etc"), "best: its name is '/etc'; expected 'step-0'"),
    (POINTERS, put("last", "step", "3"), "last: its step is '3'; expected an int"),
    (POINTERS, put("last", "step", -3), "last: its step is -3"),
    (POINTERS, put("last", "held_out", "low"), "its held-out loss is 'low'"),
    (POINTERS, put("best", "files", "../../secret", "0" * 64), "'../../secret' has .*expected a file's bare name"),
    (POINTERS, put("best", "files", {}), "expected SHA-256 by name"),
    (POINTERS, put("metrics", "lines", -1), "metrics is .*expected the number of lines"),
    (POINTERS, drop("metrics"), "the record lacks 'metrics'"),
    (POINTERS, put("step", 9), "the record has the unknown 'step'"),
]


@pytest.mark.parametrize(("name", "change", "why"), WRONG_RECORDS, ids=[why for _, _, why in WRONG_RECORDS])
def test_a_record_that_says_what_cannot_be_is_refused(run, name, change, why):
    """Catches a KeyError, a path out of the directory, and numbers of other types: the seal alone would hide them."""
    rewrite(run / name, change)
    with pytest.raises(pg.CheckpointError, match=why) as raised:
        resume(run)
    assert str(raised.value).startswith(str(run / name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (RUN, put("recipe", "learning_rate", 2e-3)),
        (RUN, put("recipe", "seed", 6)),
        (RUN, put("n_training", 239)),
        (POINTERS, put("last", "held_out", 1.0)),
        (POINTERS, put("best", "held_out", 1.0)),
        (POINTERS, put("metrics", "lines", 3)),
    ],
    ids=["learning rate", "seed", "n_training", "held-out of the last", "held-out of the best", "lines"],
)
def test_a_record_that_was_changed_is_refused(run, name, change):
    """Catches numbers that make sense, and change what the run ends in."""
    rewrite(run / name, change, seal=False)
    with pytest.raises(pg.CheckpointError, match="changed since it was written") as raised:
        resume(run)
    assert str(raised.value).startswith(str(run / name))


@pytest.mark.parametrize("name", [RUN, POINTERS])
@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "{", "[" * 10**5, '{"last": {}}', '{"a": NaN}', "\x00"])
def test_a_record_that_is_none_is_refused(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(pg.CheckpointError) as raised:
        resume(run)
    assert str(raised.value).startswith(str(run / name))


# Files


EVERY_FILE = [RUN, POINTERS, "training/tokens.bin", "metrics.jsonl"]
EVERY_FILE += [f"training/step-3/{name}" for name in ("config.json", "model.safetensors", "adamw.safetensors")]


def fifo(file):
    file.unlink()
    os.mkfifo(file)


def directory(file):
    file.unlink()
    file.mkdir()


def loop(file):
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("spoil", [fifo, directory, loop, pathlib.Path.unlink], ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_missing_or_no_file_is_named(run, name, spoil):
    """Catches a run that waits for ever for a named pipe, and one that begins without a part of what it had."""
    spoil(run / name)
    with pytest.raises(ValueError, match=r"run|training") as raised:
        resume(run)
    told = run if name == POINTERS and spoil is pathlib.Path.unlink else run / name
    assert str(raised.value).startswith(str(told))


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_bit_is_refused(run, name):
    """Catches a bit anywhere that a resumed run would compute with; 20 places in each file."""
    content = (run / name).read_bytes()
    for i in np.random.default_rng(0).integers(0, 8 * len(content), 20):
        spoilt = bytearray(content)
        spoilt[i // 8] ^= 1 << (i % 8)
        (run / name).write_bytes(spoilt)
        if name == "metrics.jsonl" and b"seconds" in content.splitlines()[content[: i // 8].count(b"\n")]:
            line = content.splitlines()[content[: i // 8].count(b"\n")]
            if i // 8 - content.find(line) > line.find(b'"seconds"'):
                continue  # how long a step took is checked to be a number, and no more
        with pytest.raises(pg.CheckpointError) as raised:
            resume(run)
        assert str(raised.value).startswith(str(run / name))


def spoil_tokens(run, change):
    file = run / "training" / "tokens.bin"
    change(file, np.fromfile(file, "<u2"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda file, ids: ids[:-1].tofile(file), "has 598 bytes; 600 were written"),
        (lambda file, ids: ids[::-1].tofile(file), "its SHA-256 differs"),
        (lambda file, ids: np.roll(ids, 1).tofile(file), "its SHA-256 differs"),
        (lambda file, ids: np.concatenate([ids, ids]).tofile(file), "has 1200 bytes"),
        (lambda file, ids: file.write_bytes(b""), "has 0 bytes"),
    ],
    ids=["cut", "reversed", "rotated", "doubled", "empty"],
)
def test_other_tokens_are_refused(run, change, why):
    """Catches a run that resumes with another text than it began with."""
    spoil_tokens(run, change)
    with pytest.raises(pg.CheckpointError, match=why) as raised:
        resume(run)
    assert str(raised.value).startswith(str(run / "training" / "tokens.bin"))


NAME = "v/wpe"
WRONG_MOMENTS = {
    "of one number": (lambda a: {NAME: a[NAME][0, :1].copy()}, r"v/wpe is float32 \[1\]; expected float32 \[8, 8\]"),
    "float16": (lambda a: {NAME: a[NAME].astype(np.float16)}, r"v/wpe is float16 \[8, 8\]; expected float32"),
    "int32": (lambda a: {NAME: a[NAME].astype(np.int32)}, r"v/wpe is I32 \[8, 8\]; expected float32"),
    "float64": (lambda a: {NAME: a[NAME].astype(np.float64)}, r"v/wpe is float64 \[8, 8\]; expected float32"),
    "transposed": (lambda a: {"m/h0/mlp/c_fc/w": a["m/h0/mlp/c_fc/w"].T.copy()}, r"expected float32 \[8, 32\]"),
    "missing": (lambda a: {NAME: None}, "lacks v/wpe"),
    "one too many": (lambda a: {"m/h1/ln_1/g": a["m/h0/ln_1/g"]}, "has m/h1/ln_1/g"),
    "NaN": (lambda a: {NAME: a[NAME] * np.nan}, "v/wpe holds a NaN, an infinity"),
    "infinite": (lambda a: {"m/wte": a["m/wte"] + np.inf}, "m/wte holds a NaN, an infinity"),
    "negative": (lambda a: {NAME: a[NAME] - 1}, "v/wpe holds .* an average of squares below 0"),
}


@pytest.mark.parametrize("kind", WRONG_MOMENTS)
def test_other_moments_are_refused(run, kind):
    """Catches one that is broadcast, or rounded; the digests are made to fit, so that the tensors are what is seen."""
    change, why = WRONG_MOMENTS[kind]
    file = run / "training/step-3/adamw.safetensors"
    arrays = load_file(file)
    arrays = {name: a for name, a in {**arrays, **change(arrays)}.items() if a is not None}
    save_file(arrays, file)
    rewrite(run / POINTERS, put("last", "files", "adamw.safetensors", hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(pg.CheckpointError, match=why) as raised:
        resume(run)
    assert str(raised.value).startswith(str(file))


def test_weights_of_another_dtype_are_refused(run):
    """Catches parameters that are trained in 16 bits since somebody converted a checkpoint in its place."""
    file = run / "training/step-3/model.safetensors"
    save_file({name: a.astype(np.float16) for name, a in load_file(file).items()}, file)
    rewrite(run / POINTERS, put("last", "files", file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(pg.CheckpointError, match=r"model.safetensors: wpe is float16 .*expected float32"):
        resume(run)


def test_a_file_that_the_run_did_not_write_is_refused(run):
    """Catches a tokenizer that is put next to the weights, and would become the model's."""
    tiny.write_tokenizer(run / "training" / "step-3")
    with pytest.raises(pg.CheckpointError, match=r"step-3/[a-z.]+: was not written by this run; remove it"):
        resume(run)


def test_a_published_file_that_was_damaged_is_published_again(run, whole):
    """Catches a model that cannot be loaded after a run that ended well, since its best checkpoint was an old one."""
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (run / "config.json").unlink()
    resume(run)
    assert contents(run) == contents(whole)


# Metrics


def test_a_line_of_metrics_is_there_before_its_checkpoint_is(tmp_path, monkeypatch):
    """Catches a step whose line is never written because the process ends between a checkpoint and the line."""
    run, trainer, state = begin(tmp_path / "run")
    said = []

    def recording(file, entries):
        if file.name == "checkpoints.json":
            steps = [entry["step"] for entry in Run.metrics(run)]
            said.append((entries["last"]["step"], steps))
        write(file, entries)

    write = records.write_record
    monkeypatch.setattr(records, "write_record", recording)
    list(train(run, trainer, state))
    assert said == [(step, list(range(step + 1))) for step in (0, 2, 4, 6)]


@pytest.mark.parametrize("where", [*range(0, 60, 3)])
def test_ctrl_c_at_any_moment_loses_no_line(whole, tmp_path, monkeypatch, where):
    """Catches a report that is forgotten, or written twice, as an interrupt comes between any two calls of the loop."""
    run, trainer, state = begin(tmp_path / "run")
    calls = 0

    def interrupting(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == where // 2 + 1 and where % 2 == 0:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if calls == where // 2 + 1 and where % 2 == 1:
                calls += 1
                raise KeyboardInterrupt
            return result

        return wrapped

    for owner, name in [
        (Trainer, "step"),
        (Trainer, "evaluate"),
        (records.Metrics, "add"),
        (Run, "save"),
        (Run, "_publish"),
        (records, "write_record"),
    ]:
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    with contextlib.suppress(KeyboardInterrupt):
        list(train(run, trainer, state))
    monkeypatch.undo()
    if not run.has_checkpoint:
        run, trainer, state = begin(tmp_path / "run")  # nothing is lost: it may be started again
        list(train(run, trainer, state))
    else:
        assert [entry["step"] for entry in run.metrics()] == list(range(run.last["step"] + 1))
        resume(tmp_path / "run")
    assert lines(tmp_path / "run") == lines(whole)
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda text: text.replace('"loss": ', '"lo', 1), "line 2 is not JSON"),
        (lambda text: "{}\n" + text, "line 1 is {}; expected an object of step 0"),
        (lambda text: text.split("\n", 1)[0] + "\n" + text, "line 2 is .*expected an object of step 1"),
        (lambda text: text.split("\n", 1)[1], "has 3 of the 4 lines|were changed"),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "has 3 of the 4 lines"),
        (lambda text: text[:-1], "has 3 of the 4 lines"),
        (lambda text: text.replace('"loss": 3', '"loss": 4', 1), "the first 4 lines were changed"),
        (lambda text: text.replace('"loss": 3', '"loss": null, "x": 3', 1), "'loss' is None; expected a finite number"),
        (lambda text: text.replace('"loss": ', '"loss": 1e999, "x": ', 1), "'loss' is inf; expected a finite number"),
        (lambda text: "", "has 0 of the 4 lines"),
        (lambda text: text.replace('"seconds": ', '"seconds": "long", "x": ', 1), "'seconds' is 'long'"),
    ],
)
def test_metrics_that_were_changed_are_refused(run, spoil, why):
    """Catches lines that are missing, twice there, or changed, and a KeyError."""
    file = run / "metrics.jsonl"
    file.write_text(spoil(file.read_text()))
    before = file.read_bytes()
    with pytest.raises(pg.CheckpointError, match=why) as raised:
        resume(run)
    assert str(raised.value).startswith(str(file))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "rest", [CUT := '{"step": 4, "lo', '{"step": 4, "loss": 1.5, "seconds": 0.1}\n' * 99, "}\n\xff\n{}\n" * 99 + CUT]
)
def test_lines_after_the_checkpoint_are_taken_again(run, whole, rest):
    """Catches steps twice, and a resumed run that stumbles over a line that a kill cut off."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(rest)
    resume(run)
    assert lines(run) == lines(whole)


def test_metrics_are_read_while_the_run_is_trained(tmp_path):
    """Catches a lock that keeps readers out."""
    run, trainer, state = begin(tmp_path / "run")
    for report in train(run, trainer, state):
        assert [entry["step"] for entry in Run.open(tmp_path / "run").metrics()] == list(range(report.step + 1))
        assert pg.GPT2.load(tmp_path / "run").config == CONFIG


# One process


def test_a_run_that_is_trained_is_locked(run):
    """Catches two that train a run: in one process, by one Run, by two, from another thread."""
    backend = pg.get_backend("numpy")

    def again(found=None):
        found = Run.open(run) if found is None else found
        return train(found, Trainer(CONFIG, RECIPE, backend), found.restore(backend))

    first = Run.open(run)
    reports = again(first)
    next(reports)
    locked = f"run: process {os.getpid()} is training this run; wait for it to end"
    for other in (None, first):
        with pytest.raises(ValueError, match=locked):
            next(again(other))
    with pytest.raises(ValueError, match=locked):
        Run.open(run).save(first.restore(backend), None)
    with concurrent.futures.ThreadPoolExecutor(1) as thread, pytest.raises(ValueError, match=locked):
        thread.submit(next, again()).result()
    assert next(reports).step == 5  # the holder of the lock continues


@pytest.mark.parametrize("end", ["close", "drop", "finish", "fail"])
def test_the_lock_ends_with_the_loop(run, end, monkeypatch):
    """Catches a lock that outlives its loop, however that ends."""
    backend = pg.get_backend("numpy")
    found = Run.open(run)
    reports = train(found, Trainer(CONFIG, RECIPE, backend), found.restore(backend))
    next(reports)
    if end == "close":
        reports.close()
    elif end == "drop":
        del reports
        gc.collect()
    elif end == "finish":
        list(reports)
    else:
        monkeypatch.setattr(Trainer, "step", lambda self, state, batches: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(reports)
        monkeypatch.undo()
    assert not (run / "training" / "lock").exists()
    resume(run)


HOLD = """
import sys
import portable_gpt2 as pg
from portable_gpt2.training import Run, Trainer, train
run, backend = Run.open(sys.argv[1]), pg.get_backend("numpy")
for report in train(run, Trainer(run.config, run.recipe, backend), run.restore(backend)):
    print("trains", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_a_killed_one_does_not_block(run, whole):
    """Catches the second `train --resume` of a run, and a lock that is left by ``kill -9``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout.readline() == b"trains\n"
    with pytest.raises(ValueError, match=f"run: process {process.pid} is training this run"):
        resume(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / "training" / "lock").exists()
    resume(run)
    assert lines(run) == lines(whole)
    assert contents(run) == contents(whole)


def test_a_state_of_another_step_is_refused(run):
    """Catches a loop that continues from a state that is older than the run's last checkpoint."""
    backend = pg.get_backend("numpy")
    old = Run.open(run)
    state, trainer = old.restore(backend), Trainer(CONFIG, RECIPE, backend)
    resume(run)
    with pytest.raises(ValueError, match="its last checkpoint at step 6; the state is at step 3: restore it"):
        next(train(old, trainer, state))


def test_a_trainer_of_another_recipe_is_refused(run):
    backend = pg.get_backend("numpy")
    found = Run.open(run)
    other = Trainer(CONFIG, dataclasses.replace(RECIPE, learning_rate=1.0), backend)
    with pytest.raises(ValueError, match="the trainer has another configuration, or another recipe, than the run"):
        next(train(found, other, found.restore(backend)))


def test_a_run_whose_directory_was_trained_anew_must_be_opened_again(run):
    """Catches the text of another run, of which the opened one has a number of training tokens."""
    found = Run.open(run)
    rewrite(run / RUN, put("n_training", 200))
    with pytest.raises(pg.CheckpointError, match="belongs to another run than the one that was opened; open it again"):
        found.tokens()


# Beginning


def test_a_run_that_ended_before_its_first_checkpoint_may_be_started_again(tmp_path, whole):
    """Catches a directory that can be neither resumed nor started again; and one whose checkpoints would be lost."""
    begin(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "sec')
    (tmp_path / "run" / "training" / ".step-0-1234").mkdir()
    list(train(*begin(tmp_path / "run")))
    assert lines(tmp_path / "run") == lines(whole)
    assert contents(tmp_path / "run") == contents(whole)
    (tmp_path / "run" / POINTERS).unlink()
    with pytest.raises(FileExistsError, match="run: exists already"):
        begin(tmp_path / "run")


@pytest.mark.parametrize("theirs", ["thesis.tex", "training/thesis.tex", "training/step-0/../step-7"])
def test_a_run_is_not_started_over_files_that_are_not_its_own(tmp_path, theirs):
    begin(tmp_path / "run")
    (tmp_path / "run" / "training" / "step-0").mkdir()
    (tmp_path / "run" / theirs).write_text("all of it")
    with pytest.raises(FileExistsError, match="run: exists already"):
        begin(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"recipe": dataclasses.replace(RECIPE, context=9)}, "context is 9; the model has n_ctx = 8 positions"),
        ({"write": lambda file: write_ids(file) + 61}, "the number of tokens for training is 301"),
        ({"write": lambda file: write_ids(file) and None}, "the number of tokens for training is None"),
        ({"backend": 3}, "backend is 3; expected a name"),
        ({"colour": "red"}, "where is {'colour': 'red'}"),
    ],
)
def test_a_run_that_could_not_be_resumed_is_not_created(tmp_path, changed, why):
    """Catches what would be refused when the run is opened."""
    recipe, write = changed.pop("recipe", RECIPE), changed.pop("write", write_ids)
    with pytest.raises(ValueError, match=why):
        Run.create(tmp_path / "run", recipe, CONFIG, None, write, **changed)
    assert not (tmp_path / "run").exists()


def test_an_own_loop_may_save_and_be_resumed(tmp_path):
    """Catches a `Run.save` that works within `train` alone."""
    run, trainer, state = begin(tmp_path / "run")
    for step in range(3):
        state, _, _ = trainer.step(state, [training.batch(run.tokens()[0], step, batch_size=2, length=9, seed=5)])
        with run.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step + 1, "mine": 1}) + "\n")
    run.save(state, None)
    resume(tmp_path / "run")
    assert [entry["step"] for entry in run.metrics()] == [1, 2, 3, 4, 5, 6]
    restored = run.restore(pg.get_backend("numpy"))
    assert restored.step == 6
    assert all(np.isfinite(x).all() for _, x in flatten(restored.params))
