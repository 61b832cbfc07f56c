"""Every op in one table: hypothesis strategies for its arguments, and the derived bound on its error.

A strategy takes a dtype and yields an op's arrays and its options. The fast profile draws from a few shapes, empty ones
and those of one element included; the thorough profile draws any shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import bounds
import hypothesis.strategies as st
import numpy as np
import strategies

import portable_gpt2 as pg

Arguments = tuple[tuple[np.ndarray | None, ...], dict[str, Any]]


@st.composite
def linear_layers(draw, dtype):
    """Return x, w and b, of small and of large values; if they are too large, nothing is promised."""
    shape, nf = draw(strategies.shapes(least=1)), draw(strategies.lengths([3, 0], most=9))
    width = draw(st.sampled_from([(), (1,)]))
    root = bounds.FORMATS[dtype].largest ** 0.5 / 8
    largest = draw(st.sampled_from([root, None]))
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    w = draw(strategies.arrays((*width, shape[-1], nf), dtype, largest=largest))
    return x, w, draw(strategies.arrays((nf,), dtype))


@st.composite
def arrays_and_axes(draw, dtype):
    """Return an array of at least one axis, and one of its axes."""
    shape = draw(strategies.shapes(least=1))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return draw(strategies.arrays(shape, dtype)), axis


@st.composite
def layers(draw, dtype):
    """Return x, g and b of a layer norm; the squares of x are within the range of the dtype that it computes in."""
    shape = draw(strategies.shapes(least=1))
    largest = bounds.FORMATS[bounds.computed_in(dtype)].largest ** 0.5 / 16
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    return x, *(draw(strategies.arrays(shape[-1:], dtype, largest=2.0**10)) for _ in range(2))


EPS = st.sampled_from([1e-5, 1e-5, 1e-3, 1e-12])


@st.composite
def masks(draw, batch, queries, keys):
    """Return no mask, a causal one, or any in which every query sees a key; its leading axes may broadcast."""
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


# The leading axes, and the numbers of queries, of keys, of q's and k's columns and of v's.
_HEADS = [
    ((), 3, 4, 8, 2),
    ((), 1, 1, 1, 1),
    ((2,), 1, 9, 8, 8),
    ((2, 1), 5, 5, 3, 2),
    ((1, 2, 2), 3, 4, 8, 2),
    ((0,), 3, 4, 8, 2),
    ((2,), 0, 4, 8, 2),
    ((2,), 3, 4, 8, 0),
]


@st.composite
def heads(draw, dtype, *, masked=False):
    """Return q, k, v, a mask and a scale; the scores are within the range of the dtype that they are computed in."""
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
def rows(draw, dtype, kinds):
    """Return ids, of an integer dtype among some, and a table that has a row for each."""
    vocab, d = draw(strategies.cases([(7, 3), (1, 1), (2, 0)], st.tuples(st.integers(1, 9), st.integers(0, 9))))
    w = draw(strategies.arrays((vocab, d), dtype))
    kind = draw(st.sampled_from(kinds))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = random.integers(0, vocab, draw(strategies.shapes())).astype(kind)
    return draw(strategies.laid_out(np.asarray(ids))), w


@st.composite
def products_with_a_table(draw, dtype):
    """Return x and a table with as many columns."""
    shape, vocab = draw(strategies.shapes(least=1)), draw(strategies.lengths([3, 0], most=9))
    largest = draw(st.sampled_from([bounds.FORMATS[dtype].largest ** 0.5 / 8, None]))
    x = draw(strategies.arrays(shape, dtype, largest=largest))
    return x, draw(strategies.arrays((vocab, shape[-1]), dtype, largest=largest))


# The leading axes, none of which may be empty because a mean of nothing is undefined, and the number of logits.
_LOGITS = [((), 5), ((1,), 1), ((3,), 4), ((2, 3), 7), ((2, 1, 2), 3)]


@st.composite
def logits_and_targets(draw, dtype, kinds):
    """Return logits, and targets of an integer dtype among some."""
    leading = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    batch, n = draw(strategies.cases(_LOGITS, st.tuples(leading, st.integers(1, 9))))
    targets = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, n, batch)
    kind = draw(st.sampled_from(kinds))
    return draw(strategies.arrays((*batch, n), dtype)), np.asarray(targets, kind)


def attention_weights_bound(q, k, mask=None, *, scale=None, c):
    """Bound the weights of attention, which are its result if the values are a unit matrix."""
    keys = k.shape[-2]
    identity = np.broadcast_to(np.eye(keys, dtype=k.dtype), (*k.shape[:-2], keys, keys))
    return bounds.attention(q, k, identity, mask, scale=scale, c=c)


class Operation(NamedTuple):
    """An op, and what is needed to test it on any backend."""

    op: Any
    arguments: Callable[[str], st.SearchStrategy[Arguments]]
    """From a dtype to the arrays and the options of a call."""
    bound: Callable[..., bounds.Bounded]
    """From the arrays and the options, and `c` where the op has an `error`, to the exact result and its bound."""
    error: Callable[[str, str], float] | None = None
    """The error of the elementary function that the op computes with, by backend and dtype."""

    def errors(self, names, dtype, arrays, options):
        """Return how far each of some backends may be from the exact result, by the backend's name."""
        found, by_name = {}, {}
        for name in names:
            c = {} if self.error is None else {"c": self.error(name, dtype)}
            key = tuple(c.values())
            if key not in found:
                found[key] = self.bound(*arrays, **options, **c).error
            by_name[name] = found[key]
        return by_name


_EVERYWHERE = ("int8", "uint8", "int16", "int32")  # the integer dtypes that every backend has
OPERATIONS = {
    "conv1d": Operation(pg.conv1d, lambda dtype: linear_layers(dtype).map(lambda a: (a, {})), bounds.linear),
    "softmax": Operation(
        pg.softmax,
        lambda dtype: arrays_and_axes(dtype).map(lambda a: (a[:1], {"axis": a[1]})),
        bounds.softmax,
        bounds.exp_error,
    ),
    "gelu": Operation(
        pg.gelu,
        lambda dtype: strategies.shapes().flatmap(lambda s: strategies.arrays(s, dtype)).map(lambda x: ((x,), {})),
        bounds.gelu,
        bounds.tanh_error,
    ),
    "layer_norm": Operation(
        pg.layer_norm,
        lambda dtype: st.tuples(layers(dtype), st.fixed_dictionaries({"eps": EPS})),
        bounds.layer_norm,
    ),
    "attention": Operation(
        pg.attention,
        lambda dtype: heads(dtype).map(lambda a: (a[:4], {"scale": a[4]})),
        bounds.attention,
        bounds.exp_error,
    ),
    "attention_weights": Operation(
        pg.attention_weights,
        lambda dtype: heads(dtype).map(lambda a: ((*a[:2], a[3]), {"scale": a[4]})),
        attention_weights_bound,
        bounds.exp_error,
    ),
    "embed": Operation(
        pg.embed,
        lambda dtype: rows(dtype, _EVERYWHERE).map(lambda a: (a, {})),
        lambda ids, w: bounds.Bounded(bounds.exact(w[ids]), np.zeros(w[ids].shape)),
    ),
    "unembed": Operation(
        pg.unembed,
        lambda dtype: products_with_a_table(dtype).map(lambda a: (a, {})),
        lambda x, w: bounds.linear(x, w.T),
    ),
    "cross_entropy": Operation(
        pg.cross_entropy,
        lambda dtype: logits_and_targets(dtype, _EVERYWHERE).map(lambda a: (a, {})),
        bounds.cross_entropy,
        bounds.exp_error,
    ),
}
