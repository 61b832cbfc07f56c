"""The functions that the array API lacks: shape, arange, zeros, write, index_add, split, top_k, relayout."""

import functools

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics.bounds import host_dtype
from portable_gpt2.testing.strategies import takes

SHAPES = ((), (0,), (3,), (2, 5), (2, 0, 3), (1, 2, 3, 4))


def test_shapes_are_tuples_of_ints(backend):
    """Catches a shape that is a list, an array, or a framework's own class, and a scalar that has an axis."""
    for shape in SHAPES:
        found = backend.shape(backend.from_numpy(np.zeros(shape, np.float32)))
        assert type(found) is tuple
        assert found == shape
        assert all(type(n) is int for n in found)


def test_arange_counts_from_0_in_integers_that_can_index(backend):
    """Catches floats, a range from 1, a range that lacks its end, and one that has it twice."""
    like = backend.from_numpy(np.ones((2, 5), np.float32))
    table = backend.from_numpy(np.eye(5, dtype=np.float32))
    for n in (0, 1, 5):
        indices = backend.arange(n, like=like)
        assert backend.xp.isdtype(indices.dtype, "integral")
        assert np.array_equal(backend.to_numpy(indices), np.arange(n))
        assert np.array_equal(backend.to_numpy(backend.xp.take(table, indices, axis=0)), np.eye(5)[:n])
        assert np.array_equal(backend.to_numpy(pg.embed(indices, table)), np.eye(5)[:n])
    integers = backend.from_numpy(np.ones(2, np.int32))
    assert backend.arange(3, like=integers).dtype == backend.arange(3, like=like).dtype


def test_zeros_have_the_dtype_of_an_array(backend):
    """Catches another dtype, memory that is not cleared, and a shape that is not the one given."""
    for dtype in filter(functools.partial(takes, backend), (*backend.dtypes, "int32")):
        like = backend.from_numpy(np.ones(2, host_dtype(dtype)))
        for shape in SHAPES[:4] if dtype == "float32" else SHAPES[2:3]:
            zeros = backend.zeros(shape, like=like)
            assert zeros.dtype == like.dtype
            found = backend.to_numpy(zeros)
            assert (found.shape, found.tobytes()) == (shape, bytes(found.nbytes))


def test_zeros_share_no_memory(backend):
    """Catches zeros that share memory: rows that are written to one cache would appear in the others."""
    like = backend.from_numpy(np.ones((1, 2), np.float32))
    first, second = (backend.zeros((3, 2), like=like) for _ in range(2))
    first = backend.write(first, like, 1)
    assert not backend.to_numpy(second).any()
    assert not backend.to_numpy(backend.zeros((3, 2), like=like)).any()
    assert np.array_equal(backend.to_numpy(first), [[0, 0], [1, 1], [0, 0]])


def written(leading, capacity, n, start, dtype):
    """Return a buffer, rows, and the buffer with the rows in it. NaN and infinity in the buffer must stay there."""
    buffer = np.arange(1.0, 1 + np.prod(leading) * capacity * 2).reshape(*leading, capacity, 2).astype(dtype)
    if buffer.dtype.kind == "f":
        buffer[..., ::3, :1] = np.nan
        buffer[..., ::2, 1:] = np.inf
    value = -np.arange(1.0, 1 + np.prod(leading) * n * 2).reshape(*leading, n, 2).astype(dtype)
    expected = buffer.copy()
    expected[..., start : start + n, :] = value
    return buffer, value, expected


def assert_rows(backend, result, expected, what):
    found = backend.to_numpy(result)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"), (
        f"{what}: {found.tolist()}, not {expected.tolist()}"
    )


@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_write_replaces_rows_and_no_others(backend, leading):
    """Catches rows that are one off, wrap around or are clamped at the end; a start that must be a number.

    The rest of the buffer may hold anything, such as NaN.
    """
    capacity = 4
    for n in (1, 4) if leading else (3,):
        for start in range(capacity - n + 1):
            buffer, value, expected = written(leading, capacity, n, start, np.float32)
            for at in (start, backend.arange(capacity, like=backend.from_numpy(value))[start]):
                given = backend.from_numpy(value)
                result = backend.write(backend.from_numpy(buffer.copy()), given, at)
                assert_rows(backend, result, expected, f"{n} rows at {at}")
                assert np.array_equal(backend.to_numpy(given), value)


def test_write_in_a_compiled_function_takes_every_start(backend):
    """Catches a start that is baked in: an int, an int32 array, and a position that a compiled function computes."""

    def write(buffer, value, position, steps):
        return backend.write(buffer, value, position), position + steps

    run = backend.compile(write, donate=("buffer",))
    for start in (0, 2, 1, 3):
        buffer, value, expected = written((1, 2), 4, 1, start, np.float32)
        for at in (start, backend.from_numpy(np.asarray(start, np.int32))):
            result, position = run(backend.from_numpy(buffer.copy()), backend.from_numpy(value), at, 1)
            assert_rows(backend, result, expected, f"a row at {at}")
            assert int(position) == start + 1


def test_write_keeps_the_dtype(backend):
    """Catches a buffer of integers, or of 16-bit floats, that is converted while rows are written."""
    for dtype in filter(functools.partial(takes, backend), (*backend.dtypes, "int32")):
        buffer, value, expected = written((2,), 3, 2, 1, host_dtype(dtype))
        result = backend.write(backend.from_numpy(buffer.copy()), backend.from_numpy(value), 1)
        assert result.dtype == backend.from_numpy(value).dtype
        assert_rows(backend, result, expected, dtype)


def test_write_takes_rows_that_are_not_contiguous(backend):
    """Catches rows that are read in the order of memory: those of the model are transposed views."""
    a = np.arange(24.0, dtype=np.float32).reshape(1, 3, 4, 2)
    rows = backend.xp.permute_dims(backend.from_numpy(a), (0, 2, 1, 3))
    result = backend.write(backend.zeros((1, 4, 5, 2), like=rows), rows, 1)
    expected = np.zeros((1, 4, 5, 2), np.float32)
    expected[..., 1:4, :] = a.transpose(0, 2, 1, 3)
    assert_rows(backend, result, expected, "transposed rows")


def test_a_result_of_a_buffer_keeps_its_values_when_the_buffer_is_written_to(backend):
    """Catches a lazy framework that computes with the new values: the result was computed before the write."""
    a = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    x = backend.from_numpy(a.copy())
    before = x + x
    after = backend.write(x, backend.from_numpy(-np.ones((2, 2), np.float32)), 1)
    assert np.array_equal(backend.to_numpy(after), [a[0], [-1, -1], [-1, -1], a[3]])
    assert np.array_equal(backend.to_numpy(before), a + a)


def test_index_add_adds_each_row_once(backend):
    """Catches an index that occurs twice and is added once, rows that replace, and the rows of another index."""
    for dtype in filter(functools.partial(takes, backend), ("float32", "float64")):
        for indices in ([2, 0, 2, 2], []):
            x, rows = np.arange(10.0).reshape(5, 2), np.arange(1.0, 1 + 2 * len(indices)).reshape(-1, 2)
            expected = x.copy()
            np.add.at(expected, np.asarray(indices, np.int64), rows)
            given = backend.from_numpy(x.copy(), dtype), backend.from_numpy(rows, dtype)
            index = backend.from_numpy(np.asarray(indices, np.int32))
            for each in (index, backend.xp.astype(index, backend.xp.int64)):
                found = backend.index_add(given[0] + 0, each, given[1])
                assert found.dtype == given[0].dtype
                assert np.array_equal(backend.to_numpy(found), expected), indices


def test_split_divides_the_last_axis(backend):
    """Catches parts of another axis, in another order, or of another size."""
    a = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    for n in (1, 2, 3):
        parts = backend.split(backend.from_numpy(a), n)
        assert len(parts) == n
        for part, expected in zip(parts, np.split(a, n, axis=-1), strict=True):
            assert np.array_equal(backend.to_numpy(part), expected)


def test_top_k_returns_the_largest_entries_in_descending_order(backend):
    """Catches ascending order, indices that do not belong to the values, and a NaN where an entry is -inf."""
    rows = np.random.default_rng(0).permutation(2 * 40).reshape(2, 40).astype(np.float32)
    rows[0, 7] = -np.inf
    rows[1, :20] = 5
    for k in (1, 7, 40):
        values, indices = backend.top_k(backend.from_numpy(rows), k)
        found, places = backend.to_numpy(values), backend.to_numpy(backend.xp.astype(indices, backend.xp.int32))
        assert np.array_equal(found, -np.sort(-rows, axis=-1)[:, :k])
        assert np.array_equal(np.take_along_axis(rows, places, axis=-1), found)
        assert all(len(set(row)) == k for row in places.tolist())


def test_relayout_changes_no_value(backend):
    """Catches a relayout that changes values, the shape or the device, and one that copies a second time."""
    rng = np.random.default_rng(0)
    plain = {"wte": (150, 4), "wpe": (3, 4), "h0/mlp/c_fc/w": (4, 16), "h0/mlp/c_proj/w": (16, 4), "h0/ln_1/g": (4,)}
    for path, shape in plain.items():
        a = rng.standard_normal(shape).astype(np.float32)
        x = backend.from_numpy(a)
        y = backend.relayout(path, x)
        assert (y.dtype, backend.shape(y), backend.device(y)) == (x.dtype, shape, backend.device(x))
        assert np.array_equal(backend.to_numpy(y), a)
        assert backend.relayout(path, y) is y


def test_permission_of_64_bits_ends(backend):
    """Catches a switch that stays as the context set it, and a context that can be entered only once."""
    one = backend.from_numpy(np.ones(1, np.int32))
    before = backend.xp.astype(one, backend.xp.int64).dtype
    for _ in range(2):
        with backend.permit_64_bits():
            assert backend.to_numpy(backend.xp.astype(one, backend.xp.int64)).dtype == np.int64
        assert backend.xp.astype(one, backend.xp.int64).dtype == before
