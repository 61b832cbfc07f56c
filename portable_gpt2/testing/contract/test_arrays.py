"""Arrays to and from the host: every memory layout, both byte orders, every dtype, and the refusals."""

import ml_dtypes
import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.numerics.bounds import host_dtype
from portable_gpt2.testing.strategies import takes

FLOATS = ("float32", "float64", "bfloat16", "float16")
OTHERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
REQUIRED = ("float32", "bool", "int32")


def values(dtype):
    """Return 27 numbers of a dtype, among them the largest, the smallest, and each that a conversion could lose."""
    if dtype.kind == "b":
        found = [True, False, False]
    elif dtype.kind in "iu":
        found = [np.iinfo(dtype).max, np.iinfo(dtype).min, 1, 0]
    else:
        limits = ml_dtypes.finfo(dtype)
        found = [0.0, -0.0, 1.5, -np.inf, np.nan, limits.max, limits.smallest_subnormal]
    return np.resize(np.asarray(found, dtype), 27)


def layouts(dtype):
    """Return arrays of one dtype in every layout that memory can have, by name."""
    base = values(dtype).reshape(3, 3, 3)  # some frameworks compile for each shape, so there are few of them
    read_only = base.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"?" + base.tobytes(), np.uint8)[1:].view(dtype).reshape(base.shape)
    return {
        "contiguous": base,
        "empty": base[:, :0],
        "scalar": base[0, 0, 1:2].reshape(()),
        "NumPy scalar": base[0, 0, 1],
        "read-only": read_only,
        "reversed": base[::-1, :, ::-1],
        "read-only and reversed": read_only[::-1],
        "strided": np.repeat(base, 2, axis=1)[:, ::2],
        "transposed": base.T,
        "Fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0], (3, 3, 3)),
        "unaligned": unaligned,
        "big-endian": base.astype(dtype.newbyteorder(">")),
        "little-endian": base.astype(dtype.newbyteorder("<")),
    }


@pytest.mark.parametrize("kind", FLOATS + OTHERS)
def test_arrays_come_back_with_their_bits(backend, kind):
    """Catches a layout or a byte order that is misread, a dtype that is narrowed or widened, a host array that changes.

    A dtype that the framework lacks, or would narrow, is refused with a TypeError.
    """
    for layout, a in layouts(host_dtype(kind)).items():
        before = a.tobytes()
        if kind not in REQUIRED and not takes(backend, kind):
            with pytest.raises(TypeError, match=kind):
                backend.from_numpy(a)
            continue
        x = backend.from_numpy(a)
        back = backend.to_numpy(x)
        assert pg.backend_of(x).array_types == backend.array_types, f"{layout}: a {type(x).__name__}"
        assert type(back) is np.ndarray, f"{layout}: a {type(back).__name__}"
        assert back.dtype == host_dtype(kind), f"{layout}: {back.dtype}, not {kind}"
        assert back.shape == a.shape, f"{layout}: shape {back.shape}, not {a.shape}"
        assert back.tobytes() == a.astype(host_dtype(kind)).tobytes(), f"{layout}: {back.tolist()}, not {a.tolist()}"
        assert a.tobytes() == before, f"{layout}: the host array has changed"
        name, expected = backend.dtype_names.get(x.dtype), kind if kind in FLOATS else None
        assert name == expected, (
            f"{layout}: the framework took {kind}, which `dtypes` names {name}, not {expected}: "
            "add it to `dtypes`, or let `put` raise a TypeError for it"
        )
        assert backend.shape(x) == a.shape, f"{layout}: `shape` is {backend.shape(x)}, not {a.shape}"
        assert ops.is_empty(x) == (layout == "empty"), f"{layout}: shape {a.shape}, is_empty is {ops.is_empty(x)}"


def test_conversion_rounds_alike_on_every_backend(backend, dtype):
    """Catches a conversion on the device, where a framework may round twice, or flush what is subnormal to 0."""
    rng = np.random.default_rng(0)
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 2**-11 + 2**-40, 1 + 2**-24 + 2**-50]
    a = np.concatenate([rng.standard_normal(1000), ties, [1e-40, 6e-8, 7e4, 1e39, np.inf, np.nan]])
    with np.errstate(all="ignore"):
        expected = a.astype(host_dtype(dtype))
        x = backend.from_numpy(a, dtype)
    assert x.dtype == backend.dtype(dtype)
    assert backend.to_numpy(x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["int32", "float8", "double", "", None, ["float32"]], ids=repr)
def test_an_unknown_dtype_is_refused(backend, name):
    """Catches a dtype that is guessed, and a message that does not list the dtypes."""
    with pytest.raises(ValueError, match="floating dtype") as caught:
        backend.dtype(name)
    said = repr(name) if isinstance(name, str) else f"that is a {type(name).__name__};"
    assert said in str(caught.value)
    assert "float32" in str(caught.value)
    if name is not None:
        with pytest.raises(ValueError, match="floating dtype"):
            backend.from_numpy(np.ones(3, np.float32), name)


@pytest.mark.parametrize("given", [[1.0], 1.0, None, "text"], ids=lambda x: type(x).__name__)
def test_an_object_that_is_not_an_array_is_refused(backend, given):
    """Catches an exception of the framework's own, and a list that becomes an array of a dtype that nobody chose."""
    with pytest.raises(TypeError, match=rf"expected a NumPy array, got .*{type(given).__name__}"):
        backend.from_numpy(given)
    x = backend.from_numpy(np.ones((2, 2), np.float32))
    for call in (lambda: pg.gelu(given), lambda: pg.conv1d(x, given, x), lambda: pg.embed(given, x)):
        with pytest.raises(TypeError, match=f"expected an array of one of the backends .*{type(given).__name__}"):
            call()


def test_arrays_belong_to_the_backend(backend):
    """Catches `array_types` that lacks the class of a result, a scalar or an integer, and a refusal of one's own."""
    x = backend.from_numpy(np.ones((2, 3), np.float32))
    one = backend.from_numpy(np.ones((), np.float32))
    for y in (x, one, x + x, x > 0, x[0, ...], x[..., 0], backend.arange(2, like=x), backend.zeros((2,), like=x)):
        assert isinstance(y, backend.array_types)
        assert backend.refusal(y) is None
        assert pg.backend_of(y).array_types == backend.array_types


@pytest.mark.about("to_numpy")
def test_values_that_were_read_do_not_change(backend):
    """Catches values that are read before they are computed, or memory that the framework uses again."""
    matrix = np.eye(96, k=1, dtype=np.float32)
    matrix[-1, 0] = 1  # a product with this matrix moves all columns by one
    x, y = backend.from_numpy(np.arange(96.0 * 96).reshape(96, 96), "float32"), backend.from_numpy(matrix)
    for _ in range(96):
        x = backend.xp.matmul(x, y)
    found, first = backend.to_numpy(x), backend.to_numpy(x[:1, :])
    at_once, expected = found.copy(), np.arange(96.0 * 96).reshape(96, 96)
    assert np.array_equal(at_once, expected)
    run = backend.compile(lambda x: x + 1)
    for _ in range(8):
        x = run(x)
        backend.to_numpy(backend.xp.matmul(x, y))
    assert np.array_equal(found, expected)
    assert np.array_equal(first, expected[:1])


def test_whether_values_can_be_peeked_at_depends_on_class_and_device(backend):
    """Catches `peek` that returns other values, or None only until an array is computed: errors would then vary."""
    for a in (np.asarray([3, -1], np.int32), np.asarray(7, np.int32), np.zeros(0, np.int32)):
        x = backend.from_numpy(a)
        computed = (x + 1) - 1
        seen = [backend.peek(computed), backend.peek(x), backend.peek(computed)]
        assert len({found is None for found in seen}) == 1
        for found in seen:
            assert found is None or (type(found) is np.ndarray and np.array_equal(found, a))


def test_a_fetched_copy_has_the_values_of_its_time(backend):
    """Catches a copy that shares memory with an array which is written to before the copy is read."""
    for dtype in (np.float32, np.int32):
        a = np.arange(12).reshape(4, 3).astype(dtype)
        x = backend.zeros((4, 3), like=backend.from_numpy(a)) + backend.from_numpy(a)
        read = backend.fetch(x)
        x = backend.write(x, backend.from_numpy(-a[:2] - 1), 1)
        again = backend.fetch(x)
        assert type(read()) is np.ndarray
        assert np.array_equal(read(), a)
        assert np.array_equal(again(), [a[0], *(-a[:2] - 1), a[3]])
