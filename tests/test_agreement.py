"""All backends agree with each other on every op."""

from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.numerics import bounds
from portable_gpt2.testing import claims, strategies
from portable_gpt2.testing.operations import OPERATIONS

# JAX has float64 only in a process with JAX_ENABLE_X64=1.
SHARED_DTYPES = ["float32", "bfloat16", "float16", pytest.param("float64", marks=pytest.mark.x64)]


@pytest.mark.parametrize("dtype", SHARED_DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
@strategies.fewer
@given(data=st.data())
def test_backends_agree(name, dtype, data):
    """Catches two backends that compute different functions, such as two forms of GELU, or other layouts, axes or
    dtypes of ids: any two results, of kernels or definitions, differ by at most the sum of their error bounds.
    """
    operation = OPERATIONS[name]
    arrays, options = data.draw(operation.arguments(dtype))
    results = {}
    backends = [backend for backend in map(pg.get_backend, pg.available_backends()) if dtype in backend.dtypes]
    for backend in backends:
        results[backend.name, "op"] = claims.compute(operation.op, backend, *arrays, **options)
        if operation.op.__name__ in backend.kernels:  # otherwise the op is its definition
            results[backend.name, "definition"] = claims.compute(operation.op.reference, backend, *arrays, **options)
    names = [backend.name for backend in backends]
    errors = dict(zip(names, operation.errors_on(backends, dtype, arrays, options), strict=True))
    for one, other in combinations(results, 2):
        allowed = errors[one[0]] + errors[other[0]]
        ratio = bounds.Bounded(bounds.exact(results[other]), allowed).ratio(results[one])
        assert ratio <= 1, f"{one} and {other} differ by {ratio:.3g} times the sum of their bounds"


def test_every_op_is_compared():
    """Catches an op that is added and not compared."""
    assert {operation.op for operation in OPERATIONS.values()} == {
        op for op in vars(ops).values() if hasattr(op, "reference")
    }
