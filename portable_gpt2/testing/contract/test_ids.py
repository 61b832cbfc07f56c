"""Ids that are out of range: an error where `peek` returns their values, and NaN everywhere else.

No other row is ever read. An accelerator may fail for the rest of the process after it has read outside of an array, so
there these tests run in a process of their own.
"""

import math

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.testing.strategies import takes

pytestmark = [pytest.mark.every_device, pytest.mark.own_process]

N = 6
TABLE = np.random.default_rng(0).normal(0, 1, (N, 4)).astype(np.float32)
LOGITS = np.random.default_rng(1).normal(0, 1, (3, N)).astype(np.float32)
CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=N, n_ctx=4, eos_token_id=None)
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
BAD = [(-1, "int32"), (N, "int32"), (-100, "int16"), (127, "int8"), (2**31 - 1, "int32"), (-(2**31), "int32")]
BAD += [(200, "uint8"), (2**32 + 1, "int64"), (-(2**63), "int64"), (2**63 + 1, "uint64"), (2**32 - 1, "uint32")]


def embed(form):
    return lambda ids, table: form(ids, table)


def cross_entropy(form):
    return lambda ids, logits: form(logits, ids)


CALLS = {  # a function of ids and floats, the floats, and the beginning of the message
    "embed": (embed(pg.embed), TABLE, "embed: ids"),
    "embed, definition": (embed(pg.embed.reference), TABLE, "embed: ids"),
    "embed, gradient": (lambda ids, x: gradients.embed(ids, x)[0], TABLE, "embed: ids"),
    "cross_entropy": (cross_entropy(pg.cross_entropy), LOGITS, "cross_entropy: targets"),
    "cross_entropy, definition": (cross_entropy(pg.cross_entropy.reference), LOGITS, "cross_entropy: targets"),
    "cross_entropy, gradient": (
        lambda ids, x: gradients.cross_entropy(x, ids)[0],
        LOGITS,
        "cross_entropy: targets",
    ),
}


def bad_ids(backend):
    """Yield each id of BAD, and three ids on the backend of which it is the second."""
    for bad, dtype in BAD:
        if takes(backend, dtype):
            ids = np.asarray([2, 1, 3], dtype)
            ids[1] = bad
            yield bad, backend.from_numpy(ids)


def is_peeked(backend, fn):
    """Return a function that reports in a list whether the values of the ids can be read when it is called."""
    seen = []

    def call(ids, x):
        seen.append(backend.peek(ids) is not None)
        return fn(ids, x)

    return call, seen


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_an_id_that_is_out_of_range_stands_for_no_row(backend, name, is_compiled):
    """Catches an id that counts from the end, is taken modulo the length, clamped, or wraps in a narrower dtype.

    An error is a ValueError that names the range.
    """
    fn, floats, subject = CALLS[name]
    x = backend.from_numpy(floats)
    call, peeked = is_peeked(backend, fn)
    run = backend.compile(call) if is_compiled else call
    for bad, ids in bad_ids(backend):
        try:
            found = backend.to_numpy(run(ids, x))
        except ValueError as error:
            said = f"{subject} range from {min(2, bad)} to {max(3, bad)}; expected 0 to {N - 1}"
            if type(error) is not ValueError or said not in str(error):
                raise
            assert peeked[-1], f"{bad}: the values cannot be read, and the result should be NaN"
            continue
        assert not peeked[-1], f"{bad} raised no error, but became {found.tolist()}"
        if "embed" in name:
            assert np.array_equal(found[[0, 2]], TABLE[[2, 3]]), bad
            assert np.isnan(found[1]).all(), f"{bad} became the row {found[1].tolist()}"
        else:
            assert math.isnan(found), bad


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_ids_in_range_of_every_integer_dtype_are_looked_up(backend, is_compiled):
    """Catches NaN where every id is in range, an integer dtype that is refused, and the least and the largest id."""
    host = np.asarray([0, N - 1, 0])
    table, logits = backend.from_numpy(TABLE), backend.from_numpy(LOGITS)
    expected = float(pg.cross_entropy(LOGITS.astype(np.float64), host))
    dtypes = (
        ["int32"] if is_compiled else [dtype for dtype in sorted({dtype for _, dtype in BAD}) if takes(backend, dtype)]
    )
    for form in (pg.embed, pg.embed.reference):
        run = backend.compile(embed(form)) if is_compiled else embed(form)
        for dtype in dtypes:
            assert np.array_equal(backend.to_numpy(run(backend.from_numpy(host.astype(dtype)), table)), TABLE[host]), (
                dtype
            )
    for form in (pg.cross_entropy, pg.cross_entropy.reference):
        run = backend.compile(cross_entropy(form)) if is_compiled else cross_entropy(form)
        for dtype in dtypes:
            found = backend.to_numpy(run(backend.from_numpy(host.astype(dtype)), logits))
            assert abs(float(found) - expected) <= 1e-5 * expected, dtype


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [-1, N, -100])
def test_an_id_that_is_out_of_range_adds_to_no_gradient(backend, bad, is_compiled):
    """Catches a gradient that is added to the row of another id, and a finite gradient of a loss that is NaN."""
    xp = backend.xp
    ids = backend.from_numpy(np.asarray([2, bad, 3], np.int32))
    if backend.peek(ids) is not None and not (is_compiled and backend.compiles_per_shape):
        return  # the ids are refused
    table, logits = backend.from_numpy(TABLE), backend.from_numpy(LOGITS)
    ones = backend.from_numpy(np.ones((3, 4), np.float32))
    of_rows = {"by hand": lambda ids, w: gradients.embed(ids, w)[1](ones)["w"]}
    of_loss = {"by hand": lambda ids, x: gradients.cross_entropy(x, ids)[1]()["logits"]}
    if backend.value_and_grad(xp.sum) is not NotImplemented:
        of_rows["own"] = lambda ids, w: backend.value_and_grad(lambda w, ids: xp.sum(pg.embed(ids, w)))(w, ids)[1]
        of_loss["own"] = lambda ids, x: backend.value_and_grad(lambda x, ids: pg.cross_entropy(x, ids))(x, ids)[1]
    expected = np.zeros_like(TABLE)
    expected[[2, 3]] = 1
    for way in of_rows:
        rows, loss = (backend.compile(fn) if is_compiled else fn for fn in (of_rows[way], of_loss[way]))
        assert np.array_equal(backend.to_numpy(rows(ids, table)), expected), way
        found = backend.to_numpy(loss(ids, logits))
        assert np.isnan(found[1]).all(), way
        assert np.isfinite(found[[0, 2]]).all(), way


def test_a_table_without_rows_has_nothing_to_look_up(backend):
    """Catches an index of 0, which stands for an id out of range, into nothing. No ids at all are in range."""
    table, ids = backend.from_numpy(np.zeros((0, 3), np.float32)), backend.from_numpy(np.zeros(2, np.int32))
    for form in (pg.embed, pg.embed.reference):
        with pytest.raises(ValueError, match="embed: ids"):
            form(ids, table)
        assert tuple(backend.shape(form(ids[:0], table))) == (0, 3)


@pytest.mark.parametrize("loss", [pg.loss, gradients.loss], ids=["loss", "gradient"])
def test_every_token_of_a_window_is_checked(backend, loss):
    """Catches a check of the tokens that are read alone: the last token is only predicted."""
    params = pg.init_params(CONFIG, backend=backend)
    for tokens, subject in (
        ([0, 1, N], "cross_entropy: targets"),
        ([N, 0, 1], "embed: ids"),
        ([0, -1, 1], "embed: ids"),
    ):
        given = backend.from_numpy(np.asarray([tokens], np.int32))
        if backend.peek(given) is None:
            value = loss(params, given, CONFIG)
            assert math.isnan(backend.to_numpy(value[0] if isinstance(value, tuple) else value))
        else:
            with pytest.raises(ValueError, match=f"^{subject} range from .*; expected 0 to {N - 1}$"):
                loss(params, given, CONFIG)
