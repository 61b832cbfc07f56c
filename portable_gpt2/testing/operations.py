"""A table of all ops: hypothesis strategies for their arguments, and the derived bounds on their errors.

Each function takes a dtype and returns a strategy for the arrays and the options of an op. The fast profile draws from
a small set of shapes, which includes shapes with no element and with one. The thorough profile draws any shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np

import portable_gpt2 as pg

from ..numerics import Numerics, bounds, stated
from . import claims, strategies

Arguments = tuple[tuple[np.ndarray | None, ...], dict[str, Any]]


@st.composite
def linear_layers(draw, dtype):
    """Draw x, w and b. Large values may overflow; the bound is then infinite."""
    shape, nf = draw(strategies.shapes(least=1)), draw(strategies.lengths([3, 0], most=9))
    width = draw(st.sampled_from([(), (1,)]))
    root = bounds.FORMATS[dtype].largest ** 0.5 / 8
    largest = draw(st.sampled_from([root, None]))
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    w = draw(strategies.arrays((*width, shape[-1], nf), dtype, largest=largest))
    return x, w, draw(strategies.arrays((nf,), dtype))


@st.composite
def arrays_and_axes(draw, dtype):
    """Draw an array with at least one axis, and the index of one of its axes."""
    shape = draw(strategies.shapes(least=1))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return draw(strategies.arrays(shape, dtype)), axis


@st.composite
def layers(draw, dtype):
    """Draw x, g and b of layer_norm. The squares of x do not overflow in the dtype of the computation."""
    shape = draw(strategies.shapes(least=1))
    largest = bounds.FORMATS[bounds.computed_in(dtype)].largest ** 0.5 / 16
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    return x, *(draw(strategies.arrays(shape[-1:], dtype, largest=2.0**10)) for _ in range(2))


EPS = st.sampled_from([1e-5, 1e-5, 1e-3, 1e-12])


@st.composite
def masks(draw, batch, queries, keys):
    """Draw None, a causal mask, or any mask in which each query has a key. Its leading axes may broadcast."""
    kind = draw(st.sampled_from(["none", "causal", "any"]))
    if kind == "none":
        return None
    if kind == "causal":
        return np.arange(keys) <= np.arange(queries)[:, None]
    leading = batch[draw(st.integers(0, len(batch))) :]
    leading = tuple(draw(st.sampled_from([1, n])) for n in leading)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = random.random((*leading, queries, keys)) < 0.5
    return mask | (np.arange(keys) == random.integers(0, keys, (*leading, queries, 1)))


# The leading axes, and the numbers of queries, of keys, of columns of q and k, and of columns of v.
_HEADS = [
    ((2,), 1, 9, 8, 8),
    ((2, 1), 5, 5, 3, 2),
    ((1, 2, 2), 3, 4, 8, 2),
    ((), 1, 1, 1, 1),
    ((0,), 3, 4, 8, 2),
    ((), 3, 4, 8, 2),
    ((2,), 0, 4, 8, 2),
    ((2,), 3, 4, 8, 0),
]


@st.composite
def heads(draw, dtype, *, masked=False):
    """Draw q, k, v, a mask and a scale. The scores do not overflow in the dtype of the computation."""
    some = st.integers(1, 9)
    rest = st.tuples(strategies.shapes(most=3), st.integers(0, 9), some, some, st.integers(0, 9))
    batch, queries, keys, d, dv = draw(strategies.cases(_HEADS, rest))
    largest = min(draw(st.sampled_from([4.0, 64.0, np.inf])), bounds.FORMATS[dtype].largest ** 0.5 / 16)
    q = draw(strategies.arrays((*batch, queries, d), dtype, largest=largest))
    k = draw(strategies.arrays((*batch, keys, d), dtype, largest=largest))
    v = draw(strategies.arrays((*batch, keys, dv), dtype, largest=bounds.FORMATS[dtype].largest / 32))
    mask = draw(masks(batch, queries, keys).filter(lambda mask: mask is not None or not masked))
    return q, k, v, mask, draw(st.sampled_from([None, None, 1.0, 0.3]))


@st.composite
def attended(draw, dtype):
    """Draw q, k, v and a mask, and the options: a scale, and whether attention is causal."""
    q, k, v, mask, scale = draw(heads(dtype))
    queries, keys = q.shape[-2], k.shape[-2]
    both = np.tri(queries, keys, keys - queries, dtype=np.bool_) & (True if mask is None else mask)
    causal = draw(st.booleans()) and queries <= keys and bool(both.any(axis=-1).all())
    return (q, k, v, mask), {"scale": scale, "causal": causal}


@st.composite
def rows(draw, dtype, kinds):
    """Draw ids in one of some integer dtypes, and a table that has a row for each id."""
    vocab, d = draw(strategies.cases([(7, 3), (1, 1), (2, 0)], st.tuples(st.integers(1, 9), st.integers(0, 9))))
    w = draw(strategies.arrays((vocab, d), dtype))
    kind = draw(st.sampled_from(kinds))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = random.integers(0, vocab, draw(strategies.shapes())).astype(kind)
    return draw(strategies.laid_out(np.asarray(ids))), w


@st.composite
def products_with_a_table(draw, dtype):
    """Draw x [..., d] and a table [n, d]."""
    shape, vocab = draw(strategies.shapes(least=1)), draw(strategies.lengths([3, 0], most=9))
    largest = draw(st.sampled_from([bounds.FORMATS[dtype].largest ** 0.5 / 8, None]))
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    return x, draw(strategies.arrays((vocab, shape[-1]), dtype, largest=largest))


# The leading axes, and the number of logits. No axis has length 0, because the mean of no elements is undefined.
_LOGITS = [((), 5), ((1,), 1), ((3,), 4), ((2, 3), 7), ((2, 1, 2), 3)]


@st.composite
def logits_and_targets(draw, dtype, kinds):
    """Draw logits, and targets in one of some integer dtypes."""
    leading = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    batch, n = draw(strategies.cases(_LOGITS, st.tuples(leading, st.integers(1, 9))))
    targets = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, n, batch)
    kind = draw(st.sampled_from(kinds))
    return draw(strategies.arrays((*batch, n), dtype)), np.asarray(targets, kind)


class Operation(NamedTuple):
    """An op, with the strategy and the bound that are used to test it on any backend."""

    op: Any
    arguments: Callable[[str, Sequence[str]], st.SearchStrategy[Arguments]]
    """A function of a floating dtype and of the dtypes of ids. It returns a strategy for arrays and options of a call.
    """
    bound: Callable[..., bounds.Bounded]
    """A function of the arrays and the options, and of the stated errors if `needs_numerics`."""
    needs_numerics: bool = False
    """Whether the op calls exp, tanh or log."""

    def bounded(self, numerics: Numerics, arrays: Any, options: Any) -> bounds.Bounded:
        """Return the exact result of a call, and its bound on a backend that states these errors."""
        given = {"numerics": numerics} if self.needs_numerics else {}
        return self.bound(*arrays, **options, **given)

    def check(self, backend: Any, dtype: str, data: Any) -> None:
        """Check that one call, drawn from `data`, is within its bound in each form, and agrees with NumPy.

        NumPy runs the definition. The two results may differ by the sum of their bounds. By the triangle inequality,
        any two backends that are within their bounds do.
        """
        arrays, options = data.draw(self.arguments(dtype, strategies.integer_dtypes(backend)))
        numpy = pg.get_backend("numpy")
        numerics, of_numpy = stated(backend, dtype), stated(numpy, dtype)
        bounded = self.bounded(numerics, arrays, options)
        expected = claims.compute(self.op.reference, numpy, *arrays, **options)
        results = claims.results(self.op, backend, *arrays, **options)  # the last call, which a report repeats
        claims.assert_within(bounded, results)
        # Equal errors have the same bound, which takes milliseconds in float64.
        other = bounded if numerics == of_numpy else self.bounded(of_numpy, arrays, options)
        claims.assert_agree(dict.fromkeys(results, expected), results, bounded.error + other.error)


OPERATIONS = {
    "conv1d": Operation(pg.conv1d, lambda dtype, ids: linear_layers(dtype).map(lambda a: (a, {})), bounds.linear),
    "softmax": Operation(
        pg.softmax,
        lambda dtype, ids: arrays_and_axes(dtype).map(lambda a: (a[:1], {"axis": a[1]})),
        bounds.softmax,
        needs_numerics=True,
    ),
    "gelu": Operation(
        pg.gelu,
        lambda dtype, ids: strategies.shapes().flatmap(lambda s: strategies.arrays(s, dtype)).map(lambda x: ((x,), {})),
        bounds.gelu,
        needs_numerics=True,
    ),
    "layer_norm": Operation(
        pg.layer_norm,
        lambda dtype, ids: st.tuples(layers(dtype), st.fixed_dictionaries({"eps": EPS})),
        bounds.layer_norm,
    ),
    "attention": Operation(pg.attention, lambda dtype, ids: attended(dtype), bounds.attention, needs_numerics=True),
    "attention_scores": Operation(
        pg.attention_scores,
        lambda dtype, ids: attended(dtype).map(lambda a: ((*a[0][:2], a[0][3]), a[1])),
        bounds.attention_scores,
    ),
    "attention_weights": Operation(
        pg.attention_weights,
        lambda dtype, ids: attended(dtype).map(lambda a: ((*a[0][:2], a[0][3]), a[1])),
        bounds.attention_weights,
        needs_numerics=True,
    ),
    "embed": Operation(
        pg.embed,
        lambda dtype, ids: rows(dtype, ids).map(lambda a: (a, {})),
        lambda ids, w: bounds.Bounded(bounds.exact(w[ids]), np.zeros(w[ids].shape)),
    ),
    "unembed": Operation(
        pg.unembed,
        lambda dtype, ids: products_with_a_table(dtype).map(lambda a: (a, {})),
        lambda x, w: bounds.linear(x, w.T),
    ),
    "cross_entropy": Operation(
        pg.cross_entropy,
        lambda dtype, ids: logits_and_targets(dtype, ids).map(lambda a: (a, {})),
        bounds.cross_entropy,
        needs_numerics=True,
    ),
}
