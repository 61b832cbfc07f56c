"""The results of all ops in plain NumPy, and the error that a trace of another program may have."""

import numpy as np

from portable_gpt2.testing.plain_gpt2 import in_dtype, plain_gpt2


def results(weights, tokens, config):
    """Return the result of each op in plain NumPy, in the dtype of the weights, by name."""
    found = {}
    plain_gpt2(weights, tokens, config, observe=found.__setitem__)
    return found


def assert_near(trace, weights, config):
    """Check that each result errs at most 4 times as much as the same formula in NumPy's float32."""
    exact = results(weights, trace.tokens, config)
    single = results(in_dtype(weights, np.float32), trace.tokens, config)
    for name, x in trace.arrays.items():
        assert abs(x - exact[name]).max() <= 4 * abs(single[name] - exact[name]).max(), name
