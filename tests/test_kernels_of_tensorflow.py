"""Kernels of TensorFlow's adapter in a graph, which Grappler rewrites."""

import functools

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds

ROWS = {"finite": [0, 1, -3], "-inf": [0, -np.inf, 1], "only -inf": [-np.inf] * 3}
ROWS |= {"NaN": [0, np.nan, 1], "+inf": [0, np.inf, 1]}
ROWS |= {"both infinities": [0, np.inf, -np.inf], "NaN and -inf": [np.nan, 1, -np.inf]}


@pytest.mark.parametrize("backend", ["tensorflow"], indirect=True)
def test_softmax_in_a_graph_keeps_the_rule_for_nan(backend, dtype, tf):
    """Catches a rewrite that removes the operations that spread a NaN over its row.

    Grappler does not change small graphs, so this graph has six calls.
    """
    graph = tf.function(lambda x: functools.reduce(tf.maximum, [pg.softmax(x + i) for i in range(6)]))
    x = np.asarray([*ROWS.values()] * 3).astype(bounds.host_dtype(dtype))
    computed = backend.to_numpy(graph(backend.from_numpy(x)))
    nan = [name not in ("finite", "-inf") for name in ROWS] * 3
    assert np.array_equal(np.isnan(computed).all(axis=-1), nan), "a row that should be NaN is not"
    assert np.array_equal(np.isnan(computed).any(axis=-1), nan), "a row that should not be NaN is"
