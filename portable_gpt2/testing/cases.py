"""One small valid call of every op, for tests that check the same property of all ops."""

from typing import Any, NamedTuple

import numpy as np

import portable_gpt2 as pg

from ..numerics.bounds import FORMATS

UNIT = {dtype: format.unit for dtype, format in FORMATS.items()}  # the unit round-off


class Case(NamedTuple):
    """An op, its arrays by name (floating-point arrays in float64, with values of order 1), and its options."""

    op: Any
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]

    def floats(self):
        """Return the names of the floating-point arrays, with respect to which the op can be differentiated."""
        return [name for name, a in self.arrays.items() if a.dtype == np.float64]

    def reference(self, **replaced):
        """Return the result of the definition in NumPy float64. `replaced` has arrays to use instead of the case's."""
        return self.op.reference(**{**self.arrays, **replaced}, **self.options)

    def on(self, backend, dtype, **options):
        """Return the arrays on a backend: floating-point arrays in the dtype, and integers in int32."""
        return {
            name: backend.from_numpy(a, dtype, **options) if a.dtype == np.float64 else backend.from_numpy(a, **options)
            for name, a in self.arrays.items()
        }


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


_CAUSAL = np.tril(np.ones((3, 3), np.bool_))
_QKV = {"q": _normal(2, 3, 5), "k": _normal(2, 3, 5, seed=1), "v": _normal(2, 3, 4)}

CASES = {
    "conv1d": Case(pg.conv1d, {"x": _normal(2, 3, 5), "w": _normal(5, 4), "b": _normal(4)}, {}),
    "conv1d_width_1": Case(pg.conv1d, {"x": _normal(2, 3, 5), "w": _normal(1, 5, 4), "b": _normal(4)}, {}),
    "softmax": Case(pg.softmax, {"x": _normal(2, 3, 5)}, {}),
    "softmax_axis_-2": Case(pg.softmax, {"x": _normal(2, 3, 5)}, {"axis": -2}),
    "gelu": Case(pg.gelu, {"x": _normal(2, 3, 5)}, {}),
    "layer_norm": Case(pg.layer_norm, {"x": _normal(2, 3, 5), "g": _normal(5), "b": _normal(5, seed=1)}, {}),
    "attention": Case(pg.attention, _QKV, {}),
    "attention_masked": Case(pg.attention, {**_QKV, "mask": _CAUSAL}, {}),
    "attention_causal": Case(pg.attention, _QKV, {"causal": True}),
    "attention_scores": Case(pg.attention_scores, {"q": _QKV["q"], "k": _QKV["k"]}, {}),
    "attention_weights": Case(pg.attention_weights, {"q": _QKV["q"], "k": _QKV["k"]}, {}),
    "attention_weights_masked": Case(pg.attention_weights, {"q": _QKV["q"], "k": _QKV["k"], "mask": _CAUSAL}, {}),
    "attention_weights_causal": Case(pg.attention_weights, {"q": _QKV["q"], "k": _QKV["k"]}, {"causal": True}),
    "embed": Case(pg.embed, {"ids": np.asarray([[1, 5, 1], [0, 2, 5]], np.int32), "w": _normal(6, 5)}, {}),
    "cross_entropy": Case(
        pg.cross_entropy, {"logits": _normal(2, 3, 6), "targets": np.asarray([[1, 5, 1], [0, 2, 5]], np.int32)}, {}
    ),
    "unembed": Case(pg.unembed, {"x": _normal(2, 3, 5), "w": _normal(6, 5)}, {}),
}
FORMS = ("kernel", "definition")


def form_of(op, form):
    """Return the op itself, which runs the kernel of the backend, or the definition of the op."""
    return {"kernel": op, "definition": op.reference}[form]


def assert_agrees(result, expected, dtype):
    """Assert that a result agrees with a float64 result, up to 64 roundings of values of order 1."""
    assert result.shape == expected.shape
    assert result.dtype.name == dtype
    bound = 64 * UNIT[dtype] * (1 + np.abs(expected))
    error = np.abs(result.astype(np.float64) - expected)
    assert np.all(error <= bound), f"off by {np.max(error / bound):.3g} times the bound"
