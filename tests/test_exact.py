"""The correctly rounded elements of each op: against fractions, and against FLINT's balls."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
from hypothesis import given

from portable_gpt2.correct_rounding import exact

# Fractions make ties likely; the others have all magnitudes, and subnormal numbers among them.
SIMPLE = st.integers(-48, 48).map(lambda n: n / 16)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.sampled_from([None, 0.0, -0.25, 0.3, 1e-30]) | st.floats(-1e3, 1e3)


def floats(*shape):
    """Return a strategy for float32 arrays: of simple fractions, of moderate numbers, or of any numbers."""
    kinds = (SIMPLE, st.floats(-8, 8, width=32), SIMPLE | ANY)
    return st.one_of([hnp.arrays(np.float32, shape, elements=elements) for elements in kinds])


def clean(a):
    return np.where(abs(a) < 2.0**-126, 0, a)


def every(*shape):
    return np.nonzero(np.ones(shape))


def assert_equal(found, expected):
    expected = np.asarray(expected, np.float32)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes(), f"{found} should be {expected}"


@given(floats(2, 5), floats(5, 3), floats(3))
def test_conv1d_and_unembed_are_correctly_rounded(x, w, b):
    """Catches a wrong bound of the sum, a tie that does not go to even, a bias that is left out."""
    at = every(2, 3)
    assert_equal(
        exact.conv1d(x, w, b, at),
        [oracle.dot(clean(x[i]), clean(w[:, j]), *clean(b[[j]])) for i, j in np.transpose(at)],
    )
    assert_equal(exact.unembed(x, w.T, at), [oracle.dot(clean(x[i]), clean(w[:, j])) for i, j in np.transpose(at)])


@given(floats(2, 4), st.sampled_from([-1, 0]))
def test_softmax_is_correctly_rounded(x, axis):
    """Catches the wrong axis, and a wrong bound of an exponential, a sum or a quotient."""
    at = every(2, 4)
    rows = clean(x) if axis == -1 else clean(x.T)
    expected = [oracle.softmax(rows[(i, j)[axis - 1]].tolist(), (i, j)[axis]) for i, j in np.transpose(at)]
    assert_equal(exact.softmax(x, at, axis=axis), expected)


@given(floats(6))
def test_gelu_is_correctly_rounded(x):
    """Catches a wrong constant, and a wrong bound for either sign."""
    assert_equal(exact.gelu(x, every(6)), [oracle.gelu(float(each)) for each in clean(x)])


@given(floats(2, 5), floats(5), floats(5), st.sampled_from([1e-5, 1.0, 1e-300]))
def test_layer_norm_is_correctly_rounded(x, g, b, eps):
    """Catches a wrong bound of the variance, and a comparison of squares that ignores a sign."""
    at = every(2, 5)
    x, g, b = clean(x), clean(g), clean(b)
    assert_equal(
        exact.layer_norm(x, g, b, at, eps=eps),
        [oracle.layer_norm(x[i], g[j], b[j], j, eps) for i, j in np.transpose(at)],
    )


@given(floats(2, 4), st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_cross_entropy_is_correctly_rounded(logits, targets):
    """Catches a wrong bound of a logarithm or of the mean."""
    found = exact.cross_entropy(logits, np.asarray(targets))
    assert_equal(found, [oracle.cross_entropy(clean(logits).tolist(), targets)])
