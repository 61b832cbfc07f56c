"""Transformations of functions: compilation, donation, gradients and loops, over trees of arrays and ints."""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.backend import Backend


class Pair(NamedTuple):
    """A NamedTuple of two trees, as `KVCache` and the moments of AdamW are."""

    first: Any
    second: Any


def array(backend, *numbers, dtype=np.float32):
    return backend.from_numpy(np.asarray(numbers, dtype))


def values(backend, tree):
    """Return a tree with each array replaced by a list of numbers; an int stays an int."""
    if isinstance(tree, dict):
        return {name: values(backend, x) for name, x in sorted(tree.items())}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(values(backend, x) for x in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(values(backend, x) for x in tree)
    if tree is None or isinstance(tree, int):
        return tree
    return backend.to_numpy(tree).tolist()


def step(params, scale, tokens, cache, n):
    """Write into a cache, as a decode step does. Return an array and the cache."""
    backend = pg.backend_of(tokens)
    row = params["h0"]["w"] * scale + backend.xp.astype(tokens, scale.dtype)
    k = tuple(backend.write(buffer, row + i, cache.second["position"]) for i, buffer in enumerate(cache.first))
    return backend.xp.sum(k[0], axis=0), Pair(k, {"padding": None, "position": cache.second["position"] + n})


def test_a_compiled_function_computes_what_the_function_computes(backend):
    """Catches arguments or bound arguments that are mixed up, and a new int or array that has no effect."""
    params, scale = {"h0": {"b": array(backend, 9.0), "w": array(backend, 5.0, 6.0)}}, array(backend, 2.0)
    for donate in ((), ("cache",)):
        traces = []

        def traced(*args, traces=traces):
            traces.append(1)
            return step(*args)

        run = backend.compile(functools.wraps(step)(traced), params, scale, donate=donate)

        def empty():
            return Pair(tuple(backend.zeros((4, 2), like=scale) for _ in range(2)), {"padding": None, "position": 0})

        plain, compiled = empty(), empty()
        for i, token in enumerate([7, 3, 8]):
            tokens = array(backend, [token, token + 1], dtype=np.int32)
            expected, plain = step(params, scale, tokens, plain, 1)
            found, compiled = run(tokens, compiled, 1)
            assert values(backend, found) == values(backend, expected)
            assert values(backend, compiled.first) == values(backend, plain.first)
            assert int(compiled.second["position"]) == i + 1
            # The caller knows the position, and gives it as an int again.
            compiled = compiled._replace(second={"padding": None, "position": i + 1})
        assert len(traces) == (1 if backend.compiles_per_shape else len(traces))


def test_an_array_on_the_host_is_not_baked_in(backend):
    """Catches a compiled function that keeps the values of its first call, such as those that `peek` returned."""

    def last(x, indices, n):
        seen = backend.peek(indices)
        assert seen is None or seen.tolist() == expected
        return backend.xp.take(x, indices, axis=0), indices + n

    run = backend.compile(last)
    for expected, n in (([0], 2), ([2], 2), ([2], 3), ([1], 5)):
        found, after = run(array(backend, 1.0, 10.0, 100.0), array(backend, *expected, dtype=np.int32), n)
        assert values(backend, found) == [10.0 ** expected[0]]
        assert values(backend, after) == [expected[0] + n]


def test_trees_keep_their_containers(backend):
    """Catches a container that becomes another one, an order of dict entries that moves values, and a lost None."""
    x, y, z = (array(backend, float(n), n + 0.5) for n in range(3))
    tree = {"z": x, "a": {"k": (y, None), "b": [z, Pair(x, None)]}, "n": None, "pair": Pair(y, {"w": z})}

    def swapped(tree):
        inner = tree["a"]
        first = {**tree, "z": inner["k"][0], "a": {"k": [inner["b"]], "one": inner["k"]}}
        return Pair(first, tree["pair"].second["w"] + 1)

    expected = swapped(tree)
    found = backend.compile(swapped)(tree)
    assert type(found) is Pair
    assert values(backend, found) == values(backend, expected)
    for around in (lambda x: (x,), lambda x: [x, x], lambda x: {"x": x}, lambda x: x):
        assert values(backend, backend.compile(around)(y)) == values(backend, around(y))


def test_one_compiled_function_takes_several_shapes_and_structures(backend):
    """Catches a function that was compiled for one shape, or one tree, and is used for another."""
    run = backend.compile(lambda pair: Pair(pair.second, pair.first + 1))
    for shape in ((2,), (3,), (2, 2), (2,)):
        for second in (None, array(backend, 4.0), (array(backend, 5.0),)) if shape == (2,) else (None,):
            found = run(Pair(backend.from_numpy(np.zeros(shape, np.float32)), second))
            assert values(backend, found) == Pair(values(backend, second), np.ones(shape).tolist())


def test_a_donated_argument_changes_no_other_array(backend):
    """Catches a donated buffer that is read after it was overwritten, or that shares memory with an array in use."""

    def write(bound, cache, other):
        first, total = cache[..., :1, :] + bound, other + cache
        return backend.write(cache, bound, 1), first, total

    bound, other = array(backend, [5.0, 5.0]), array(backend, [1.0, 2.0])
    run = backend.compile(write, bound, donate=("cache",))
    cache, kept = backend.zeros((3, 2), like=bound) + 1, backend.zeros((3, 2), like=bound) + 1
    read = cache + 1
    for row in (1.0, 5.0):
        cache, first, total = run(cache, other)
        assert values(backend, cache) == [[1, 1], [5, 5], [1, 1]]
        assert values(backend, first) == [[6, 6]]
        assert values(backend, total) == [[2, 3], [row + 1, row + 2], [2, 3]]
    assert values(backend, [kept, read, bound, other]) == [[[1, 1]] * 3, [[2, 2]] * 3, [[5, 5]], [[1, 2]]]


def test_a_compiled_function_changes_no_argument_that_is_not_donated(backend):
    """Catches memory of an argument that is used for a result although the argument was not donated."""
    x, y = array(backend, [1.0, 2.0]), array(backend, [3.0, 4.0])
    run = backend.compile(lambda x, y: (x + y, x * y))
    for _ in range(2):
        assert values(backend, run(x, y)) == ([[4, 6]], [[3, 8]])
        assert values(backend, [x, y]) == [[[1, 2]], [[3, 4]]]


def gradient_of(backend, fn):
    found = backend.value_and_grad(fn)
    if found is NotImplemented:
        pytest.skip(f"{backend.name} does not differentiate; `gradients` does")
    return found


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_the_gradient_is_with_respect_to_the_first_argument(backend, is_compiled):
    """Catches the gradient of another argument, of the squared value, or of the arrays in another order."""
    xp = backend.xp
    of = gradient_of(backend, lambda tree, c: xp.sum(tree["h0"]["w"] * tree["h0"]["w"] * c) + xp.sum(tree["b"]))
    run = backend.compile(lambda tree, c: of(tree, c)) if is_compiled else of
    tree = {"h0": {"w": array(backend, 1.0, -2.0)}, "b": array(backend, 0.5)}
    for n in (1, 2):
        value, found = run(tree, array(backend, 3.0 * n, 4.0))
        assert backend.shape(value) == ()
        assert values(backend, value) == 3.0 * n + 16.5
        assert values(backend, found) == {"b": [1.0], "h0": {"w": [6.0 * n, -16.0]}}
    assert values(backend, tree) == {"b": [0.5], "h0": {"w": [1.0, -2.0]}}


def test_a_gradient_sums_the_uses_of_an_array(backend):
    """Catches a gradient that keeps the last use alone: the embedding matrix is used twice."""
    xp = backend.xp
    of = gradient_of(backend, lambda w, i: xp.sum(xp.take(w, i, axis=0)) + xp.sum(w * w))
    _, found = of(array(backend, [1.0], [2.0], [3.0]), array(backend, 2, 0, 2, dtype=np.int32))
    assert values(backend, found) == [[3.0], [4.0], [8.0]]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_loop_ends_when_its_condition_is_false(backend, is_compiled):
    """Catches a loop that runs once too often, a state that is not passed on, and an index that cannot be traced.

    The states are those of training, with an int and a dict, and of decoding, with a NamedTuple, None and a condition
    that depends on values. Such a condition occurs only in compiled functions, on backends that define `while_loop`.
    """
    xp = backend.xp
    depends_on_values = is_compiled and backend.while_loop.__func__ is not Backend.while_loop

    def total(rows, limit):
        def body(state):
            i, sums, pair = state
            row = rows[i, ...]
            progress = backend.write(pair.first, row[None, :], i)
            return i + 1, {"sum": sums["sum"] + row, "none": None}, Pair(progress, pair.second)

        def is_unfinished(state):
            has_room = state[0] < 4
            return has_room & (xp.max(state[1]["sum"]) < limit[0]) if depends_on_values else has_room

        start = 0, {"sum": rows[0, ...] * 0, "none": None}, Pair(backend.zeros((4, 2), like=rows), None)
        i, sums, pair = backend.while_loop(is_unfinished, body, start)
        return i, sums, pair

    run = backend.compile(total) if is_compiled else total
    rows = np.asarray([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    for limit in (0.0, 2.5, 13.0, 99.0):
        n = int(np.sum(np.cumsum([0, *rows[:, 1]])[:4] < limit)) if depends_on_values else 4
        i, sums, pair = run(backend.from_numpy(rows), array(backend, limit))
        assert int(i) == n
        assert sums["none"] is pair.second is None
        assert values(backend, sums["sum"]) == rows[:n].sum(axis=0).tolist()
        assert values(backend, pair.first) == [*rows[:n].tolist(), *[[0, 0]] * (4 - n)]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_for_each_has_the_bits_of_single_calls(backend, is_compiled):
    """Catches results in another order, or of other arrays, and sums over several arrays at once."""
    xp, random = backend.xp, np.random.default_rng(0)
    # A backend that compiles runs it in compiled functions. It is slow in others: there is one shape of arrays here.
    shapes = ((3,), (3,), (3,)) if backend.compiles_per_shape and not is_compiled else ((3,), (2, 3), (3,))
    ps, gs = ([backend.from_numpy(random.standard_normal(s).astype(np.float32)) for s in shapes] for _ in range(2))
    rates = array(backend, 0.25, 3.0)

    def update(rates, p, g):
        m = 0.9 * p + (1 - 0.5) * g
        size = xp.sqrt(m * m * rates[1]) + 1e-8
        return p - rates[0] * m / xp.where(size == 0, 1.0, size), m

    def each(rates, ps, gs):
        several = backend.for_each(functools.partial(update, rates), ps, gs)
        one = backend.for_each(lambda x: xp.sum(x * x), ps)
        return [list(result) for result in several], list(one)

    run = backend.compile(each) if is_compiled else each
    several, one = run(rates, ps, gs)
    assert len(several) == len(one) == len(shapes)
    single = backend.compile(update) if is_compiled else update
    tolerance = 1e-6 if is_compiled else 0  # a compiler may fuse each function differently
    for result, total, p, g in zip(several, one, ps, gs, strict=True):
        for found, expected in zip(result, single(rates, p, g), strict=True):
            np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(expected), tolerance, tolerance)
        assert backend.shape(total) == ()
        np.testing.assert_allclose(backend.to_numpy(total), np.sum(backend.to_numpy(p) ** 2), 1e-6)


def test_for_each_of_no_arrays_is_empty(backend):
    """Catches an error where a tree has no vectors, or no matrices."""
    assert backend.for_each(lambda x: x, []) == []
