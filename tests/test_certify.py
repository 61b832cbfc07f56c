"""Certificates: each statement of a certificate is true, and a certificate states nothing that is not proved."""

import dataclasses
import json
import math

import numpy as np
import processes
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.cli import main
from portable_gpt2.host import float_dtypes
from portable_gpt2.testing import plain_gpt2

pytestmark = pytest.mark.usefixtures("flint")

CONFIG = plain_gpt2.CONFIGS["every option"]
FLAT = plain_gpt2.random_weights(CONFIG)
IDS = plain_gpt2.some_tokens(CONFIG, 1, 6)[0].tolist()


def model(flat=FLAT, backend="numpy", dtype="float32"):
    return pg.GPT2(CONFIG, plain_gpt2.on_backend(pg.get_backend(backend), flat, dtype))


def truth(ids, flat=FLAT):
    return plain_gpt2.plain_gpt2(flat, np.asarray([ids]), CONFIG)[0]


def test_a_certificate_has_the_logits_the_errors_and_the_largest(flint):
    """Catches rows of another text, an error of another row, and a margin that is larger than the gap."""
    logits = truth(IDS)
    found = pg.certify(model(), IDS)
    bounds = pg.get_backend("flint").enclosure(found.logits)
    np.testing.assert_allclose(bounds.lower, logits, atol=1e-12)
    assert (bounds.radius <= found.radius).all()
    assert found.radius <= 1e-30
    assert found.tokens == IDS
    assert found.argmax == np.argmax(logits, axis=-1).tolist() == found.computed_argmax
    gaps = np.sort(logits, axis=-1)
    np.testing.assert_allclose(found.margins, gaps[:, -1] - gaps[:, -2], rtol=1e-9)
    computed = pg.to_numpy(model().logits([IDS]))[0].astype(np.float64)
    np.testing.assert_allclose(found.errors, abs(computed - logits).max(axis=-1), rtol=1e-5)
    assert found.largest == pytest.approx(abs(logits).max())
    assert (found.backend, found.dtype, found.new_tokens, found.proved) == ("numpy", "float32", [], [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_unit_is_the_error_of_an_ideal_implementation(dtype):
    """Catches a result that is not rounded, or is rounded to another dtype, and an error at another position."""
    narrow = float_dtypes["bfloat16" if dtype == "bfloat16" else "float32"]

    def rounded(name, x):
        x[...] = x.astype(narrow)

    logits = plain_gpt2.plain_gpt2(FLAT, np.asarray([IDS]), CONFIG, observe=rounded)[0]
    expected = abs(logits - truth(IDS)).max(axis=-1) * (2.0**-29 if dtype == "float64" else 1)
    found = pg.certify(model(dtype=dtype), IDS)
    np.testing.assert_allclose(found.ideal, expected, rtol=1e-3)
    assert found.of_ideal == found.errors.max() / found.ideal.max()
    assert 0.2 < found.of_ideal < 50
    assert f"{found.of_ideal:.3g} times {expected.max():.3g}, the error of an ideal implementation," in str(found)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_logits_that_overflow_have_an_infinite_error():
    """Catches the quotient of two infinities that is called an error, and JSON with an infinity in it."""
    big = {**FLAT, "ln_f/g": np.full(CONFIG.n_embd, 60000.0)}
    found = pg.certify(model(big, dtype="float16"), IDS)
    assert np.isinf(found.errors).all()
    assert np.isinf(found.ideal).all()
    assert "that numpy computed in float16 are NaN or infinite at 6 of 6 positions" in str(found)
    assert "nan" not in str(found)


def test_the_precision_is_doubled_until_the_radii_are_small_enough():
    """Catches a radius that is asked for and not reached, and a precision that is larger than necessary."""
    assert pg.certify(model(), IDS[:2]).bits == 256
    found = pg.certify(model(), IDS[:2], radius=1e-100)
    assert (found.bits, found.radius <= 1e-100) == (512, True)
    bad = {**FLAT, "ln_f/b": np.full(CONFIG.n_embd, np.nan)}
    with pytest.raises(ArithmeticError, match=r"the largest radius is inf in 16384 bits; are the logits finite\?"):
        pg.certify(model(bad), IDS[:2])


def test_an_error_of_the_model_is_seen(monkeypatch):
    """Catches an error that is measured against the model's own logits."""
    it = model()
    own = it.logits

    def wrong(ids):
        logits = own(ids).copy()
        logits[0, 2, 5] += 0.25
        return logits

    monkeypatch.setattr(it, "logits", wrong)
    errors = pg.certify(it, IDS).errors
    assert errors[2] == pytest.approx(0.25, rel=1e-3)
    assert np.delete(errors, 2).max() < 1e-4


def test_greedy_tokens_are_proved():
    """Catches a token that is compared with the logits of another position."""
    it = model()
    found = pg.certify(it, IDS, max_new_tokens=5)
    assert found.new_tokens == list(it.stream_ids(IDS, max_new_tokens=5, temperature=0))
    assert len(set(found.new_tokens)) > 1
    assert found.tokens == [*IDS, *found.new_tokens[:-1]]
    assert found.proved == [True] * 5
    assert found.argmax[-5:] == found.new_tokens


def test_the_greedy_text_of_another_model_is_not_proved():
    """Catches a proof that follows from the model's own logits."""
    other = model(plain_gpt2.random_weights(CONFIG, seed=9))
    found = pg.certify(other, IDS, max_new_tokens=4, weights=model())
    assert found.new_tokens == list(other.stream_ids(IDS, max_new_tokens=4, temperature=0))
    expected = np.argmax(truth(found.tokens), axis=-1)[-4:]
    assert found.proved == (expected == found.new_tokens).tolist()
    assert not all(found.proved)


def test_equal_logits_are_not_decided():
    """Catches the first of two equal logits that is called the largest."""
    head = FLAT["lm_head"].copy()
    best = int(np.argmax(truth(IDS)[3]))
    head[(best + 7) % CONFIG.n_vocab] = head[best]
    twins = {**FLAT, "lm_head": head}
    found = pg.certify(model(twins), IDS)
    assert found.argmax[3] is None
    assert found.margins[3] == 0
    assert any(best is not None for best in found.argmax)
    assert "not decided" in str(found)


def test_logits_that_differ_by_less_than_float64_are_decided():
    """Catches an argmax that is decided by midpoints or bounds in float64."""
    head = FLAT["lm_head"].copy()
    best = int(np.argmax(truth(IDS)[3]))
    other = (best + 7) % CONFIG.n_vocab
    head[other] = head[best]
    h = plain_hidden(IDS, {**FLAT, "lm_head": head})
    column = int(np.argmax(abs(head[best])))
    head[other, column] = np.nextafter(head[best, column], np.inf if h[3, column] > 0 else -np.inf)
    found = pg.certify(model({**FLAT, "lm_head": head}, dtype="float64"), IDS)
    assert found.argmax[3] == other
    assert 0 < found.margins[3] < 1e-14


def plain_hidden(ids, flat):
    """Return the result of ln_f."""
    exact = pg.get_backend("numpy")
    return pg.model.transformer(plain_gpt2.on_backend(exact, flat, "float64"), np.asarray([ids]), CONFIG)[0][0]


def test_rounded_weights_are_exact_or_those_of_another_model():
    """Catches weights in bfloat16 that are not certified as they are, and an error without that of rounded weights."""
    flat = {path: a * 1.01 for path, a in FLAT.items()}
    narrow, wide = model(flat, dtype="bfloat16"), model(flat)
    own = pg.certify(narrow, IDS)
    rounded = {path: pg.to_numpy(x).astype(np.float64) for path, x in pg.params.flatten(narrow.params)}
    exact = pg.get_backend("flint")
    np.testing.assert_allclose(exact.enclosure(own.logits).lower, truth(IDS, rounded), atol=1e-12)
    assert own.dtype == "bfloat16"
    of_checkpoint = pg.certify(narrow, IDS, weights=wide)
    single = {path: pg.to_numpy(x).astype(np.float64) for path, x in pg.params.flatten(wide.params)}
    np.testing.assert_allclose(exact.enclosure(of_checkpoint.logits).lower, truth(IDS, single), atol=1e-12)
    assert of_checkpoint.errors.max() > 1e-3


def test_every_backend_is_certified_by_the_same_logits():
    """Catches a certificate that depends on the backend: a model of ball arithmetic has no error but its rounding."""
    found = pg.certify(model(backend="flint"), IDS)
    assert found.backend == "flint"
    assert found.argmax == pg.certify(model(), IDS).argmax
    assert found.units <= 1


def test_progress_names_each_result_once():
    """Catches a bar that stays incomplete."""
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name
        seen.append("end")

    pg.certify(model(), IDS[:2], progress=progress)
    assert seen == [*pg.model.observed_names(CONFIG), "end"]


def test_what_cannot_be_certified_is_refused():
    """Catches an error that comes after minutes of computing, or that does not say what to do."""
    it = model()
    small = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
    for call, message in {
        lambda: pg.certify(it, IDS, radius=0.0): "radius is 0.0",
        lambda: pg.certify(it, IDS, max_new_tokens=CONFIG.n_ctx): r"do not fit into n_ctx = 40: give at most 34$",
        lambda: pg.certify(it, IDS * 20): "120 tokens were given; the model has n_ctx = 40",
        lambda: pg.certify(it, [99]): "token id 99 is not in the vocabulary",
        lambda: pg.certify(it, "To be"): "the model has no tokenizer",
        lambda: pg.certify(it, IDS, backend="numpy"): "backend 'numpy' does not enclose exact results",
        lambda: pg.certify(it, IDS, weights=pg.GPT2(small, pg.init_params(small))): "the weights belong to",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_text_that_takes_too_much_memory_is_refused_before_the_model_runs(monkeypatch):
    """Catches a process that FLINT aborts, after minutes, because it cannot allocate memory."""
    config = dataclasses.replace(CONFIG, n_vocab=2**50)
    it = model()
    monkeypatch.setattr(it, "config", config)
    why = "the enclosures of 6,755,399,441,055,744 logits take about 4,053,239,664.6 GB of memory; give a shorter text"
    with pytest.raises(MemoryError, match=why):
        pg.certify(it, IDS)


def test_a_missing_python_flint_is_told_with_its_remedy():
    """Catches an ImportError that names a module, and an import of flint by the package itself."""
    code = """
    import sys

    sys.modules["flint"] = None
    import importlib.util

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "flint" else find_spec(name, *rest)
    del sys.modules["flint"]
    import portable_gpt2 as pg

    try:
        pg.certify(pg.GPT2.load("shakespeare"), "To be")
    except ImportError as error:
        print(error)
    """
    said = processes.run(code)
    assert "backend 'flint' is known, but flint is not installed: pip install 'portable-gpt2[flint]'" in said


# The command


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_tokenizer(tmp_path)
    tiny.model(pg.get_backend("numpy"), tokenizer=pg.Tokenizer.load(tmp_path)).save(tmp_path / "it")


@pytest.mark.usefixtures("room")
def test_the_command_writes_text_or_json(capsys):
    """Catches an option that does not reach `certify`."""
    args = ["certify", "To be", "--model", "it", "--backend", "numpy", "--dtype", "bfloat16", "--max-new-tokens", "2"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "2 of the 2 greedy tokens are proved" in out
    assert "that numpy computed in bfloat16" in out
    found = {}
    for name, extra in {"rounded": [], "original": ["--original-weights", "--radius", "1e-90"]}.items():
        assert main([*args, "--json", *extra]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    it = pg.GPT2.load("it", backend="numpy")
    assert found["rounded"]["tokens"][:-1] == it.tokenizer.encode("To be")
    assert found["rounded"]["bits"] < found["original"]["bits"]
    assert max(found["rounded"]["errors"]) != max(found["original"]["errors"])
    assert len(found["rounded"]["proved"]) == len(found["rounded"]["new_tokens"]) == 2


def test_the_shipped_model_is_certified_in_seconds():
    """Catches an enclosure of the shipped model that is wide; its greedy text is proved token by token."""
    it = pg.GPT2.load("shakespeare", backend="numpy")
    found = pg.certify(it, "ROMEO.", max_new_tokens=6)
    assert found.proved == [True] * 6
    assert found.radius < 2.0**-160
    assert 1e-7 < found.errors.max() < 1e-4
    assert math.isfinite(found.units)
