"""The shape, dtype and framework of each op's result, with any number of leading axes."""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.testing import claims
from portable_gpt2.testing.cases import CASES

BATCHES = [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 2, 1, 3)]


@pytest.mark.parametrize("name", CASES)
def test_kernels_return_what_the_definition_returns(backend, name):
    """Catches a kernel whose result has another shape, dtype or framework."""
    case = CASES[name]
    arrays = case.on(backend, "float32").values()
    for form in claims.FORMS[:2]:
        result = claims.in_form(form, case.op, backend, **case.options)(*arrays)
        assert pg.backend_of(result).array_types == backend.array_types
        assert tuple(backend.shape(result)) == case.reference().shape
        assert result.dtype == backend.dtype("float32")


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("form", claims.FORMS[:2], indirect=True)
def test_ops_take_any_number_of_leading_axes(backend, form, batch):
    """Catches an op that needs one leading axis, or an axis that is not empty."""
    rng = np.random.default_rng(0)

    def put(*shape):
        return backend.from_numpy(rng.standard_normal(shape), "float32")

    x, table = put(*batch, 5), put(6, 5)
    ids = backend.from_numpy(rng.integers(0, 6, batch).astype(np.int32))
    q, k, v, mask = put(*batch, 4, 5), put(*batch, 7, 5), put(*batch, 7, 2), backend.from_numpy(np.ones((4, 7), bool))
    calls = {
        "conv1d": ((x, put(5, 2), put(2)), (*batch, 2)),
        "softmax": ((x,), (*batch, 5)),
        "gelu": ((put(*batch),), batch),
        "layer_norm": ((x, put(5), put(5)), (*batch, 5)),
        "attention": ((q, k, v, mask), (*batch, 4, 2)),
        "attention_scores": ((q, k, mask), (*batch, 4, 7)),
        "attention_weights": ((q, k, mask), (*batch, 4, 7)),
        "embed": ((ids, table), (*batch, 5)),
        "cross_entropy": ((put(*batch, 6), ids), ()),
        "unembed": ((x, table), (*batch, 6)),
    }
    assert set(calls) == set(ops.__all__)

    def run(given):
        return {name: form(getattr(ops, name))(*arrays) for name, arrays in given.items()}

    if backend.compiles_per_shape:  # one function is compiled in less time than each operation by itself
        run = backend.compile(run)
    results = run({name: arrays for name, (arrays, _) in calls.items()})
    found = {name: tuple(backend.shape(result)) for name, result in results.items()}
    assert found == {name: shape for name, (_, shape) in calls.items()}
