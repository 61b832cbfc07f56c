"""Each backend agrees with NumPy on every op, within the sum of the two bounds."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.numerics import stated
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.operations import OPERATIONS

pytestmark = pytest.mark.every_device


@pytest.mark.parametrize("name", OPERATIONS)
@strategies.fewer
@given(data=st.data())
def test_the_backend_agrees_with_numpy(backend, dtype, numerics, name, data):
    """Catches two backends that compute different functions, such as two forms of GELU, or other layouts, axes or
    dtypes of ids. By the triangle inequality, any two backends that pass differ by at most the sum of their bounds.
    """
    operation, numpy = OPERATIONS[name], pg.get_backend("numpy")
    arrays, options = data.draw(operation.arguments(dtype))
    results = claims.results(operation.op, backend, *arrays, **options)
    expected = claims.compute(operation.op.reference, numpy, *arrays, **options)
    both = dict.fromkeys((numerics, stated(numpy, dtype)))  # equal errors have the same bound
    error = sum(operation.bounded(each, arrays, options).error for each in both) * (2 / len(both))
    claims.assert_agree(dict.fromkeys(results, np.asarray(expected)), results, error)


def test_every_op_is_compared():
    """Catches an op that is added and not compared."""
    assert {operation.op for operation in OPERATIONS.values()} == {getattr(ops, name) for name in ops.__all__}
