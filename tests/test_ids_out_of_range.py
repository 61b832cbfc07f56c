"""Ids that are out of range: an error where their values can be read at once, and a NaN everywhere else.

They can be read in NumPy, and of eager arrays on a CPU. They are not known while they are traced, compiled or mapped;
an accelerator is not waited for. Never is another row taken, nor added to.
"""

import math

import frameworks
import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients

N = 6
TABLE = np.random.default_rng(0).normal(0, 1, (N, 4)).astype(np.float32)
LOGITS = np.random.default_rng(1).normal(0, 1, (3, N)).astype(np.float32)
CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=N, n_ctx=4, eos_token_id=None)
BAD = [(-1, "int32"), (N, "int32"), (-100, "int16"), (127, "int8"), (2**31 - 1, "int32"), (-(2**31), "int32")]
BAD += [(200, "uint8"), (2**32 + 1, "int64"), (-(2**63), "int64"), (2**63 + 1, "uint64"), (2**32 - 1, "uint32")]
# The functions that look up by ids. Each takes the backend, and ids [3] on it; the name of what the message is about.
KNOWN = {
    "embed": (lambda backend, ids: pg.embed(ids, backend.from_numpy(TABLE)), "embed: ids"),
    "embed, definition": (lambda backend, ids: pg.embed.reference(ids, backend.from_numpy(TABLE)), "embed: ids"),
    "embed, gradient": (lambda backend, ids: gradients.embed(ids, backend.from_numpy(TABLE)), "embed: ids"),
    "cross_entropy": (
        lambda backend, ids: pg.cross_entropy(backend.from_numpy(LOGITS), ids),
        "cross_entropy: targets",
    ),
    "cross_entropy, definition": (
        lambda backend, ids: pg.cross_entropy.reference(backend.from_numpy(LOGITS), ids),
        "cross_entropy: targets",
    ),
    "cross_entropy, gradient": (
        lambda backend, ids: gradients.cross_entropy(backend.from_numpy(LOGITS), ids),
        "cross_entropy: targets",
    ),
    "gpt2": (lambda backend, ids: pg.gpt2(params(backend), ids[None], CONFIG), "embed: ids"),
    "loss": (lambda backend, ids: pg.loss(params(backend), ids[None], CONFIG), "embed: ids"),
    "loss, gradient": (lambda backend, ids: gradients.loss(params(backend), ids[None], CONFIG), "embed: ids"),
}


def params(backend):
    return pg.init_params(CONFIG, backend=backend)


def bad_ids(backend):
    """Yield each id of BAD, and three ids on the backend of which it is the second."""
    for bad, dtype in BAD:
        ids = np.asarray([2, 1, 3], dtype)
        ids[1] = bad
        if backend.name != "jax" or ids.itemsize < 8:  # of which JAX has none without its switch
            yield bad, backend.from_numpy(ids)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("backend", frameworks.OURS, indirect=True)
def test_ids_that_can_be_read_are_refused(backend, name):
    """Catches an id that counts from the end, is taken modulo the length or wraps in a narrower dtype, and a message of
    the framework's own.
    """
    call, subject = KNOWN[name]
    for bad, ids in bad_ids(backend):
        low, high = min(2, bad), max(2 if name.startswith("loss") else 3, bad)  # the loss reads all ids but the last
        message = f"^{subject} range from {low} to {high}; expected 0 to {N - 1}$"
        with pytest.raises(ValueError, match=message) as caught:
            call(backend, ids)
        assert type(caught.value) is ValueError


@pytest.mark.parametrize("backend", frameworks.OURS, indirect=True)
def test_the_last_token_of_a_window_is_a_target_and_checked(backend):
    """Catches a check of what is read alone: the last token is only predicted."""
    tokens = backend.from_numpy(np.asarray([[0, 1, N]], np.int32))
    for loss in (pg.loss, gradients.loss):
        with pytest.raises(ValueError, match="cross_entropy: targets range from 1 to 6; expected 0 to 5"):
            loss(params(backend), tokens, CONFIG)


# Where the values are not known: each takes a function of arrays and returns it, transformed.


def ways(backend):
    """Return the ways of a backend to run a function of ids and a float array so that no value can be read."""
    eager = {"eager": lambda fn: fn} if backend.peek(backend.from_numpy(TABLE)) is None else {}  # on an accelerator
    return transforms(backend.name) | eager


def transforms(name):
    if name == "jax":
        import jax

        return {"jit": jax.jit, "vmap": lambda fn: lambda i, x: jax.vmap(fn, (0, None))(i[None], x)[0]}
    if name == "tensorflow":
        import tensorflow as tf

        return {
            "graph": lambda fn: tf.function(fn, autograph=False),
            "xla": lambda fn: tf.function(fn, autograph=False, jit_compile=True),
        }
    if name == "torch":
        import torch

        def compiled(fn):
            torch._dynamo.reset()  # it gives up after eight versions of one function
            return torch.compile(fn, backend="aot_eager", fullgraph=True)

        return {
            "compile": compiled,
            "vmap": lambda fn: lambda i, x: torch.func.vmap(fn, (0, None))(i[None], x)[0],
        }
    return {}  # of array_api_strict, no array can be read


UNKNOWN = [name for name in frameworks.BACKENDS if name != "numpy"]


def on_every_device(test):
    """Run a test on every backend but NumPy, and on every accelerator, in a process of its own."""
    return pytest.mark.every_device(*UNKNOWN)(pytest.mark.own_process(test))


@on_every_device
def test_an_id_that_cannot_be_read_makes_a_row_of_nan(backend):
    """Catches the row of another id, by whatever rule the compiler has: the last, the first, one modulo the length."""
    table = backend.from_numpy(TABLE)
    for way, transform in ways(backend).items():
        for form in (pg.embed, pg.embed.reference):
            for bad, ids in bad_ids(backend):
                look_up = transform(lambda i, w, form=form: form(i, w))
                found = backend.to_numpy(look_up(ids, table))
                np.testing.assert_array_equal(found[[0, 2]], TABLE[[2, 3]], err_msg=f"{way} {bad}")
                assert np.isnan(found[1]).all(), (way, bad)


@on_every_device
def test_a_target_that_cannot_be_read_makes_the_loss_nan(backend):
    """Catches a loss that leaves the target out, or takes another's."""
    logits = backend.from_numpy(LOGITS)
    for way, transform in ways(backend).items():
        for form in (pg.cross_entropy, pg.cross_entropy.reference):
            for bad, ids in bad_ids(backend):
                loss = transform(lambda i, x, form=form: form(x, i))
                assert math.isnan(backend.to_numpy(loss(ids, logits))), (way, bad)


@on_every_device
def test_ids_in_range_are_looked_up_all_the_same(backend):
    """Catches a NaN, or a gradient that is dropped, where every id is in range; the least and the largest are."""
    host = np.asarray([0, N - 1, 0], np.int32)
    ids, table, logits = map(backend.from_numpy, (host, TABLE, LOGITS))
    expected = pg.cross_entropy(LOGITS, host)
    for way, transform in ways(backend).items():
        np.testing.assert_array_equal(backend.to_numpy(transform(pg.embed)(ids, table)), TABLE[host], err_msg=way)
        found = transform(lambda i, x: pg.cross_entropy(x, i))(ids, logits)
        assert float(backend.to_numpy(found)) == pytest.approx(float(expected), rel=1e-6), way


def rows_of_gradient(backend, transform, fn, ids, x):
    """Return the gradient of the sum of fn(ids, x) by x, by the framework where it has one."""
    own = backend.value_and_grad(lambda x, ids: backend.xp.sum(fn(ids, x)))
    return backend.to_numpy(transform(lambda ids, x: own(x, ids)[1])(ids, x))


@pytest.mark.parametrize("bad", [-1, N, -100])
@pytest.mark.parametrize("backend", ["tensorflow", "jax"], indirect=True)
def test_gradients_of_an_id_that_cannot_be_read(backend, bad):
    """Catches a gradient that is added to the row of another id, and a finite gradient of a loss that is NaN."""
    ids = backend.from_numpy(np.asarray([2, bad, 3], np.int32))
    table, logits = backend.from_numpy(TABLE), backend.from_numpy(LOGITS)
    ones = backend.from_numpy(np.ones((3, 4), np.float32))
    expected = np.zeros_like(TABLE)
    expected[[2, 3]] = 1
    for way, transform in ways(backend).items():
        if way == "vmap":
            continue
        by_hand = transform(lambda ids, w: gradients.embed(ids, w)[1](ones)["w"])(ids, table)
        np.testing.assert_array_equal(backend.to_numpy(by_hand), expected, err_msg=way)
        np.testing.assert_array_equal(rows_of_gradient(backend, transform, pg.embed, ids, table), expected, way)
        found = [
            backend.to_numpy(transform(lambda ids, x: gradients.cross_entropy(x, ids)[1]()["logits"])(ids, logits)),
            rows_of_gradient(backend, transform, lambda ids, x: pg.cross_entropy(x, ids), ids, logits),
        ]
        for gradient in found:
            assert np.isnan(gradient[1]).all(), way
            assert np.isfinite(gradient[[0, 2]]).all(), way


@pytest.mark.parametrize("bad", [-1, N, -100])
def test_gradients_of_an_id_that_torch_cannot_read(torch, bad):
    """Catches what the test above does, of a compiled function and its compiled gradient."""
    ids = torch.asarray([2, bad, 3])
    for fn, x in ((lambda x: pg.embed(ids, x).sum(), TABLE), (lambda x: pg.cross_entropy(x, ids), LOGITS)):
        x = torch.asarray(x).requires_grad_()
        torch.compile(fn, backend="aot_eager", fullgraph=True)(x).backward()
        found = x.grad.numpy()
        if x.shape[0] == N:
            assert np.array_equal(found, np.isin(np.arange(N), [2, 3])[:, None] * np.ones((1, 4)))
        else:
            assert np.isnan(found[1]).all()
            assert np.isfinite(found[[0, 2]]).all()


def test_a_table_without_rows_has_nothing_to_look_up(backend):
    """Catches an index of 0, which stands for one that is out of range, into nothing; no ids at all are in range."""
    table, ids = backend.from_numpy(np.zeros((0, 3), np.float32)), backend.from_numpy(np.zeros(2, np.int32))
    for form in (pg.embed, pg.embed.reference):
        with pytest.raises(ValueError, match="embed: ids"):
            form(ids, table)
        assert tuple(form(ids[:0], table).shape) == (0, 3)


@pytest.mark.own_process
@pytest.mark.every_device
@pytest.mark.parametrize("kind", ["int16", "int32"])
@pytest.mark.parametrize("target", [-100, -7, 6])
def test_a_target_that_is_out_of_range_is_not_left_out(backend, dtype, target, kind):
    """Catches -100, which torch leaves out of the mean, and an id that is taken modulo the vocabulary's length."""
    logits = backend.from_numpy(LOGITS, dtype)
    for op in (pg.cross_entropy, pg.cross_entropy.reference):
        assert np.isfinite(backend.to_numpy(op(logits, backend.from_numpy(np.asarray([1, 5, 2], kind)))))
        try:
            computed = op(logits, backend.from_numpy(np.asarray([1, target, 2], kind)))
        except Exception:  # an index out of range, whatever the framework calls it
            continue
        assert np.isnan(backend.to_numpy(computed)), f"a target of {target} gives {computed}"
