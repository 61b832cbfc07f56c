"""Ids that are out of range, in the transformations of each framework other than `Backend.compile`.

The values of the ids are not known there, so that the result is NaN. The tests of every backend are in
portable_gpt2/testing/contract/test_ids.py.
"""

import math

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.contract.test_ids import LOGITS, TABLE, N, bad_ids


def transforms(name):
    """Return functions of a framework that transform a function of ids and floats so that no value can be read."""
    if name == "jax":
        import jax

        return {"vmap": lambda fn: lambda i, x: jax.vmap(fn, (0, None))(i[None], x)[0]}
    if name == "tensorflow":
        import tensorflow as tf

        return {"graph": lambda fn: tf.function(fn, autograph=False)}
    import torch

    def compiled(fn):
        torch._dynamo.reset()  # it gives up after eight versions of one function
        return torch.compile(fn, backend="aot_eager", fullgraph=True)

    return {
        "compile": compiled,
        "vmap": lambda fn: lambda i, x: torch.func.vmap(fn, (0, None))(i[None], x)[0],
    }


with_transforms = pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"], indirect=True)


@with_transforms
def test_an_id_that_cannot_be_read_makes_a_row_of_nan(backend):
    """Catches the row of another id, by whatever rule the compiler has: the last, the first, one modulo the length."""
    table = backend.from_numpy(TABLE)
    for way, transform in transforms(backend.name).items():
        for form in (pg.embed, pg.embed.reference):
            for bad, ids in bad_ids(backend):
                look_up = transform(lambda i, w, form=form: form(i, w))
                found = backend.to_numpy(look_up(ids, table))
                np.testing.assert_array_equal(found[[0, 2]], TABLE[[2, 3]], err_msg=f"{way} {bad}")
                assert np.isnan(found[1]).all(), (way, bad)


@with_transforms
def test_a_target_that_cannot_be_read_makes_the_loss_nan(backend):
    """Catches a loss that leaves the target out, or takes another's."""
    logits = backend.from_numpy(LOGITS)
    for way, transform in transforms(backend.name).items():
        for form in (pg.cross_entropy, pg.cross_entropy.reference):
            for bad, ids in bad_ids(backend):
                loss = transform(lambda i, x, form=form: form(x, i))
                assert math.isnan(backend.to_numpy(loss(ids, logits))), (way, bad)


@with_transforms
def test_ids_in_range_are_looked_up_all_the_same(backend):
    """Catches a NaN, or a gradient that is dropped, where every id is in range; the least and the largest are."""
    host = np.asarray([0, N - 1, 0], np.int32)
    ids, table, logits = map(backend.from_numpy, (host, TABLE, LOGITS))
    expected = pg.cross_entropy(LOGITS, host)
    for way, transform in transforms(backend.name).items():
        np.testing.assert_array_equal(backend.to_numpy(transform(pg.embed)(ids, table)), TABLE[host], err_msg=way)
        found = transform(lambda i, x: pg.cross_entropy(x, i))(ids, logits)
        assert float(backend.to_numpy(found)) == pytest.approx(float(expected), rel=1e-6), way


@pytest.mark.parametrize("bad", [-1, N, -100])
def test_gradients_of_an_id_that_torch_cannot_read(torch, bad):
    """Catches a gradient that is added to the row of another id, of a compiled function and its compiled gradient."""
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
