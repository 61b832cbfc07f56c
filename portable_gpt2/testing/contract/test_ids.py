"""Ids that are out of range: an error where `peek` returns their values, and NaN everywhere else.

No other row is ever read. An accelerator may fail for the rest of the process after it has read outside of an array, so
there these tests run in a process of their own.
"""

import functools

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.testing import claims
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
    return lambda ids, table, logits: form(ids, table)


def cross_entropy(form):
    return lambda ids, table, logits: form(logits, ids)


CALLS = {  # functions of ids, of TABLE and of LOGITS, and the beginning of the message
    "embed": (embed(pg.embed), "embed: ids"),
    "embed, definition": (embed(pg.embed.reference), "embed: ids"),
    "embed, gradient": (embed(lambda ids, x: gradients.embed(ids, x)[0]), "embed: ids"),
    "cross_entropy": (cross_entropy(pg.cross_entropy), "cross_entropy: targets"),
    "cross_entropy, definition": (cross_entropy(pg.cross_entropy.reference), "cross_entropy: targets"),
    "cross_entropy, gradient": (
        cross_entropy(lambda x, ids: gradients.cross_entropy(x, ids)[0]),
        "cross_entropy: targets",
    ),
}


def names_of(backend):
    """Return the names of CALLS, without the definitions that the op itself runs."""
    return [name for name in CALLS if not name.endswith("definition") or name.partition(",")[0] in backend.kernels]


def bad_ids(backend):
    """Yield each id of BAD, and three ids on the backend of which it is the second."""
    for bad, dtype in BAD:
        if takes(backend, dtype):
            ids = np.asarray([2, 1, 3], dtype)
            ids[1] = bad
            yield bad, backend.from_numpy(ids)


def together(backend):
    """Yield the ids of BAD in rounds: a list with one id of each dtype, as `bad_ids` yields them."""
    of_dtype = {}
    for bad, ids in bad_ids(backend):
        of_dtype.setdefault(str(ids.dtype), []).append((bad, ids))
    for i in range(max(map(len, of_dtype.values()))):
        yield [each[i % len(each)] for each in of_dtype.values()]


def is_peeked(backend, names):
    """Return a function that makes some of CALLS with each array of ids, and a list of whether the ids can be read."""
    seen = []

    def call(arrays, table, logits):
        seen[:] = [backend.peek(ids) is not None for ids in arrays]
        return [{name: CALLS[name][0](ids, table, logits) for name in names} for ids in arrays]

    return call, seen


@functools.lru_cache(maxsize=1)
def compiled(backend):
    """Return one compiled function that makes all calls, and whether the ids could be read when it was traced.

    Each call has one array of ids of each dtype. To compile a function for each call and each dtype takes seconds.
    """
    call, seen = is_peeked(backend, names_of(backend))
    return backend.compile(call), seen


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_an_id_that_is_out_of_range_stands_for_no_row(backend, is_compiled):
    """Catches an id that counts from the end, is taken modulo the length, clamped, or wraps in a narrower dtype.

    An error is a ValueError that names the range.
    """
    names, floats = names_of(backend), (backend.from_numpy(TABLE), backend.from_numpy(LOGITS))
    is_one = is_compiled and backend.compiles_per_shape
    for group in [names] if is_one else [[name] for name in names]:
        run, peeked = compiled(backend) if is_one else is_peeked(backend, group)
        run = backend.compile(run) if is_compiled and not is_one else run
        for drawn in together(backend) if is_one else ([each] for each in bad_ids(backend)):
            try:
                results = run([ids for _, ids in drawn], *floats)
            except ValueError as error:
                ((bad, _),) = drawn
                said = f"{CALLS[group[0]][1]} range from {min(2, bad)} to {max(3, bad)}; expected 0 to {N - 1}"
                if type(error) is not ValueError or said not in str(error):
                    raise
                assert all(peeked), f"{bad}: the values cannot be read, and the result should be NaN"
                continue
            for (bad, ids), found in zip(drawn, results, strict=True):
                for name in group:
                    result, said = backend.to_numpy(found[name]), f"{name} of {bad} ({ids.dtype})"
                    assert not any(peeked), f"{said} raised no error, but became {result.tolist()}"
                    if "embed" in name:
                        claims.assert_same(result[[0, 2]], TABLE[[2, 3]], f"rows next to {said}")
                        result = result[1]
                    assert np.isnan(result).all(), f"{said} became {result.tolist()}, not NaN"


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_ids_in_range_of_every_integer_dtype_are_looked_up(backend, is_compiled):
    """Catches NaN where every id is in range, an integer dtype that is refused, and the least and the largest id."""
    host = np.asarray([0, N - 1, 0])
    floats = backend.from_numpy(TABLE), backend.from_numpy(LOGITS)
    expected = float(pg.cross_entropy(LOGITS.astype(np.float64), host))
    dtypes = [dtype for dtype in dict.fromkeys(dtype for _, dtype in BAD) if takes(backend, dtype)]
    run, _ = compiled(backend) if is_compiled else is_peeked(backend, names_of(backend))
    results = run([backend.from_numpy(host.astype(dtype)) for dtype in dtypes], *floats)
    for dtype, found in zip(dtypes, results, strict=True):
        for name, result in found.items():
            computed, said = backend.to_numpy(result), f"{name} of ids of {dtype}"
            if "embed" in name:
                claims.assert_same(computed, TABLE[host], said)
            else:
                assert abs(float(computed) - expected) <= 1e-5 * expected, f"{said} is {computed}, not {expected}"


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_an_id_that_is_out_of_range_adds_to_no_gradient(backend, is_compiled):
    """Catches a gradient that is added to the row of another id, and a finite gradient of a loss that is NaN."""
    xp = backend.xp
    table, logits = backend.from_numpy(TABLE), backend.from_numpy(LOGITS)
    ones = backend.from_numpy(np.ones((3, 4), np.float32))
    differentiates = backend.value_and_grad(xp.sum) is not NotImplemented

    def slopes(ids, table, logits):
        rows = {"by hand": gradients.embed(ids, table)[1](ones)["w"]}
        loss = {"by hand": gradients.cross_entropy(logits, ids)[1]()["logits"]}
        if differentiates:
            rows["own"] = backend.value_and_grad(lambda w, ids: xp.sum(pg.embed(ids, w)))(table, ids)[1]
            loss["own"] = backend.value_and_grad(lambda x, ids: pg.cross_entropy(x, ids))(logits, ids)[1]
        return rows, loss

    run = backend.compile(slopes) if is_compiled else slopes
    expected = np.zeros_like(TABLE)
    expected[[2, 3]] = 1
    for bad in (-1, N, -100):
        ids = backend.from_numpy(np.asarray([2, bad, 3], np.int32))
        if backend.peek(ids) is not None and not (is_compiled and backend.compiles_per_shape):
            continue  # the ids are refused
        rows, loss = run(ids, table, logits)
        for way in rows:
            claims.assert_same(backend.to_numpy(rows[way]), expected, f"the gradient of embed of {bad}, {way}")
            found = backend.to_numpy(loss[way])
            assert np.isnan(found[1]).all(), f"the gradient of cross_entropy of {bad}, {way}: {found[1].tolist()}"
            assert np.isfinite(found[[0, 2]]).all(), f"the gradient of cross_entropy of {bad}, {way}: {found.tolist()}"


def test_a_table_without_rows_has_nothing_to_look_up(backend):
    """Catches an index of 0, which stands for an id out of range, into nothing. No ids at all are in range."""
    table, ids = backend.from_numpy(np.zeros((0, 3), np.float32)), backend.from_numpy(np.zeros(2, np.int32))
    for form in (pg.embed, pg.embed.reference):
        with pytest.raises(ValueError, match="embed: ids"):
            form(ids, table)
        assert tuple(backend.shape(form(ids[:0], table))) == (0, 3)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_table_of_one_row_has_a_row_for_0_alone(backend, is_compiled):
    """Catches an index of 1, which stands for an id out of range, into one row."""
    table, host = np.asarray([[1.0, 2.0]], np.float32), np.asarray([0, 1], np.int32)
    look_up = backend.compile(pg.embed) if is_compiled else pg.embed
    try:
        found = backend.to_numpy(look_up(backend.from_numpy(host), backend.from_numpy(table)))
    except ValueError as error:
        if "embed: ids range from 0 to 1; expected 0 to 0" not in str(error):
            raise
    else:
        np.testing.assert_array_equal(found, [[1, 2], [np.nan, np.nan]])


LOSSES = {"loss": pg.loss, "gradient": lambda *args: gradients.loss(*args)[0]}


def test_every_token_of_a_window_is_checked(backend):
    """Catches a check of the tokens that are read alone: the last token is only predicted."""
    params = pg.init_params(CONFIG, backend=backend)

    def losses(names, params, tokens):
        return {name: LOSSES[name](params, tokens, CONFIG) for name in names}

    is_one = backend.compiles_per_shape  # one compiled function, as in training
    groups = [[*LOSSES]] if is_one else [[name] for name in LOSSES]
    for group in groups:
        run = (backend.compile if is_one else functools.partial)(functools.partial(losses, group), params)
        for tokens, subject in (
            ([0, 1, N], "cross_entropy: targets"),
            ([N, 0, 1], "embed: ids"),
            ([0, -1, 1], "embed: ids"),
        ):
            given = backend.from_numpy(np.asarray([tokens], np.int32))
            if is_one or backend.peek(given) is None:
                found = {name: float(backend.to_numpy(value)) for name, value in run(given).items()}
                assert np.isnan([*found.values()]).all(), f"the losses of {tokens} are {found}, not NaN"
            else:
                with pytest.raises(ValueError, match=f"^{subject} range from .*; expected 0 to {N - 1}$"):
                    run(given)
