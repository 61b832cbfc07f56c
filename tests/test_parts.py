"""Parts of tensors: equal to the same part of the whole, read without the rest, and checked as the whole is."""

import contextlib
import itertools
import json
import math
import os
import tracemalloc

import layouts
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import portable_gpt2 as pg
from portable_gpt2.checkpoint import cast, convert, formats, read_checkpoint, tensors
from portable_gpt2.checkpoint.safetensors_files import open_safetensors
from portable_gpt2.checkpoint.tensors import mapped, transposed, without_leading_axes
from portable_gpt2.host import StoredTensor, float_dtypes
from portable_gpt2.training.run import _checked as moment

MIB = 1 << 20
LENGTHS = [2, 3, 5, 6, 7, 1, 0]


def indices(shape):
    """Return a strategy of the indices of parts, with every form of an end and often fewer slices than axes."""
    ends = [st.none() | st.integers(-n - 1, n + 1) for n in shape]
    slices = [st.builds(slice, end, end, st.sampled_from([None, 1])) for end in ends]
    return st.integers(0, len(shape)).flatmap(lambda n: st.tuples(*slices[:n]))


def assert_is(part, expected):
    """Assert that a part is contiguous and has the expected values, to the bit."""
    assert (part.dtype, part.shape, part.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert part.flags.c_contiguous


def opened(directory, arrays, n_files):
    """Write arrays to one safetensors file, or to several with an index. Return the tensors."""
    if n_files == 1:
        save_file(arrays, directory / "model.safetensors")
    else:
        shards = layouts.split(arrays, n_files)
        layouts.write_index(directory, "model", ".safetensors", shards)
        for number, part in shards.items():
            save_file(part, directory / f"model{number}.safetensors")
    weights = formats.find_weights(directory)
    return {name: found.tensor for name, found in formats.open_weights(weights).tensors.items()}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_part_is_that_of_the_whole(tmp_path_factory, monkeypatch, data):
    """Catches a wrong offset, axis or size of an element, a last block that is short, and an end that is negative."""
    # With a small buffer, these small tensors are read in several blocks, or row by row.
    monkeypatch.setattr(tensors, "_BUFFER", data.draw(st.sampled_from([1, 16, 50, 200, MIB]), "buffer"))
    dtypes = st.sampled_from([*float_dtypes])
    shapes = data.draw(st.lists(st.lists(st.sampled_from(LENGTHS), max_size=4), min_size=2, max_size=4), "shapes")
    random = np.random.default_rng(data.draw(st.integers(0, 9), "seed"))
    arrays = {
        f"tensor {i}": random.standard_normal(shape).astype(float_dtypes[data.draw(dtypes)])
        for i, shape in enumerate(shapes)
    }
    found = opened(tmp_path_factory.mktemp("it"), arrays, data.draw(st.sampled_from([1, 2]), "files"))
    for name, a in arrays.items():
        index, dtype = data.draw(indices(a.shape)), data.draw(dtypes)
        assert_is(found[name].part(index), a[index])
        assert_is(found[name].read(), a)
        assert_is(cast(name, found[name], dtype).part(index), a[index].astype(float_dtypes[dtype]))
        index = data.draw(indices(a.shape[::-1]))
        assert_is(transposed(cast(name, found[name], dtype)).part(index), a.T[index].astype(float_dtypes[dtype]))


@pytest.mark.parametrize("n", range(3))
def test_leading_axes_are_dropped_from_parts(tmp_path, n):
    """Catches an index that is applied to the axes that are dropped, and an axis that stays."""
    a = np.arange(15, dtype=np.float32).reshape((1,) * n + (5, 3))
    save_file({"a": a}, tmp_path / "a.safetensors")
    tensor = without_leading_axes(open_safetensors(tmp_path / "a.safetensors")["a"], 2)
    assert tensor.shape == (5, 3)
    assert_is(tensor.read(), a.reshape(5, 3))
    assert_is(tensor.part((slice(1, 4), slice(2))), a.reshape(5, 3)[1:4, :2])


def some_parts(shape):
    """Yield indices: a slice of each axis, of all axes, of none, and an empty one."""
    middle = [slice(n // 3, n // 3 + max(1, n // 2)) for n in shape]
    yield from itertools.product(*([slice(None), each] for each in middle))
    yield ()
    yield (slice(2, 2),)


def assert_parts_are_those_of(directory, expected):
    """Assert that parts of all parameters of a checkpoint have the expected values."""
    found = read_checkpoint(directory).tensors
    for path, a in expected.items():
        for index in some_parts(a.shape):
            assert_is(found[path].part(index), a[index])


@pytest.mark.filterwarnings("ignore:.*form of GELU")
def test_every_layout_has_parts(layout, tmp_path):
    """Catches a weight of nn.Linear whose index is not transposed, and a format whose parts cannot be read at all."""
    layouts.WRITERS[layout][1](tmp_path / "it", tiny.CONFIG, tiny.weights())
    assert_parts_are_those_of(tmp_path / "it", tiny.weights())


def test_openai_s_names_in_safetensors(tmp_path):
    """Catches an index that is applied to the leading axis of OpenAI's weights, which has length 1."""
    layouts.write_config(tmp_path, tiny.CONFIG)
    arrays = {f"model/{path}": a[None] if path.endswith("/w") else a for path, a in tiny.weights().items()}
    save_file(arrays, tmp_path / "model.safetensors")
    assert_parts_are_those_of(tmp_path, tiny.weights())


def test_parts_of_gguf_files(tmp_path):
    """Catches a transposed weight whose index is not; both dtypes of the file are read."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    for dtype in ("float32", "bfloat16"):
        convert(tmp_path / "it", tmp_path / f"{dtype}.gguf", dtype=dtype)
        expected = {path: t.read() for path, t in read_checkpoint(tmp_path / f"{dtype}.gguf").tensors.items()}
        assert_parts_are_those_of(tmp_path / f"{dtype}.gguf", expected)


# What is read


class Counted:
    """A stream that counts what is read from it."""

    def __init__(self, stream):
        self._stream, self.counts = stream, []
        self.read, self.seek, self.close = stream.read, stream.seek, stream.close

    def readinto(self, buffer):
        self.counts.append(self._stream.readinto(buffer))
        return self.counts[-1]


@pytest.fixture
def streams(monkeypatch):
    """The streams of all files of weights that are opened from now on."""
    found, init = [], tensors.OpenFile.__init__

    def counting(self, file):
        init(self, file)
        self.stream = Counted(self.stream)
        found.append(self.stream)

    monkeypatch.setattr(tensors.OpenFile, "__init__", counting)
    return found


def of_tensor(tmp_path, shape, index):
    a = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    save_file({"before": a[:1, :3].copy(), "it": a}, tmp_path / "model.safetensors")
    return open_safetensors(tmp_path / "model.safetensors")["it"], a[index].copy()


@pytest.mark.parametrize(
    ("shape", "index", "reads", "n_bytes"),
    [
        ((2048, 1024), (slice(512, 1024),), 1, 2 * MIB),  # rows
        ((2048, 1024), (slice(None), slice(256, 512)), 8, 8 * MIB),  # columns, of blocks of rows
        ((2048, 1024), (slice(100, 612), slice(1, 3)), 2, 2 * MIB),  # some columns of some rows
        ((4, MIB), (slice(1, 4), slice(7, 1007)), 3, 3 * 4000),  # columns of long rows
        ((2, 1024, 1024), (slice(1, 2), slice(256, 512)), 1, MIB),  # two axes
        ((2048, 1024), (slice(9, 9),), 0, 0),
    ],
)
def test_little_more_than_a_part_is_read(tmp_path, streams, shape, index, reads, n_bytes):
    """Catches a part that is cut out of the whole, and blocks that are kept or too large."""
    tensor, expected = of_tensor(tmp_path, shape, index)
    tracemalloc.start()
    try:
        part = tensor.part(index)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_is(part, expected)
    [stream] = streams
    assert (len(stream.counts), sum(stream.counts)) == (reads, n_bytes)
    assert peak <= part.nbytes + 2 * MIB


def test_a_checkpoint_s_parts_are_read_without_the_rest(tmp_path, streams):
    """Catches a wrapper, for the checks, the names or the dtype, that reads the whole tensor for a part."""
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=512, n_vocab=4096, n_ctx=8, eos_token_id=None)
    layouts.write_safetensors(tmp_path, config, tiny.weights(config))
    wte = cast("wte", read_checkpoint(tmp_path).tensors["wte"], "float64")
    [stream] = streams
    stream.counts.clear()
    tracemalloc.start()
    try:
        part = wte.part((slice(1024, 2048), slice(128)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_is(part, wte.read()[1024:2048, :128])
    assert sum(stream.counts) == 1024 * 512 * 4 + 4096 * 512 * 4
    assert peak <= 1.5 * part.nbytes + 2 * MIB  # the part in both dtypes


# Errors


def test_a_file_that_became_shorter_is_named(tmp_path):
    """Catches uninitialized memory that is returned as the values of a part."""
    layouts.write_safetensors(tmp_path, tiny.CONFIG, tiny.weights())
    file, header = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    ends = {name: entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
    assert max(ends, key=ends.get) == "transformer.wte.weight"
    wte = read_checkpoint(tmp_path).tensors["wte"]
    os.truncate(file, file.stat().st_size - 8)
    assert_is(wte.part((slice(2, 5), slice(1, 3))), tiny.weights()["wte"][2:5, 1:3])
    for index in ((slice(-2, None),), (slice(None), slice(1)), ()):
        with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: .*wte.*: EOFError: the file ends 8 bytes"):
            wte.part(index)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("layout_", ["safetensors", "OpenAI's names"])
def test_a_part_with_a_nan_is_refused(tmp_path, bad, layout_):
    """Catches a part that is not checked, and a check of all the rest, which would have to be read."""
    arrays = {path: np.array(a) for path, a in tiny.weights().items()}
    arrays["h0/mlp/c_fc/w"][3, 5] = bad
    layouts.write_config(tmp_path, tiny.CONFIG)
    named = {f"model/{p}": a[None] if p.endswith("/w") else a for p, a in arrays.items()}
    save_file(layouts.hugging_face_names(arrays) if layout_ == "safetensors" else named, tmp_path / "model.safetensors")
    weight = read_checkpoint(tmp_path).tensors["h0/mlp/c_fc/w"]
    for index in ((slice(3, 4),), (slice(None), slice(5, 7)), ()):
        with pytest.raises(pg.CheckpointError, match=r"model\.safetensors: .* holds a NaN or an infinity"):
            weight.part(index)
    for index in ((slice(4, None),), (slice(None), slice(5)), (slice(3, 3),)):
        assert_is(weight.part(index), arrays["h0/mlp/c_fc/w"][index])


def test_a_part_that_overflows_a_dtype_is_refused():
    """Catches a part that is converted without the check of the whole."""
    a = np.array([[1, 2], [1e6, 3]], np.float32)
    tensor = cast("a", StoredTensor(a.shape, "float32", lambda: a), "float16")
    with pytest.raises(ValueError, match=r"^a holds values beyond the range of float16$"):
        tensor.part((slice(None), slice(1)))
    assert_is(tensor.part((slice(None), slice(1, 2))), a[:, 1:].astype(np.float16))


def test_parts_of_moments_are_checked(tmp_path):
    """Catches a part of an average of squares that is below 0."""
    a = np.array([[1, 2], [-1, 3]], np.float32)
    stored = StoredTensor(a.shape, "float32", lambda: a)
    for name, refused in (("v/wte", True), ("m/wte", False)):
        context = pytest.raises(pg.CheckpointError, match="below 0") if refused else contextlib.nullcontext()
        with context:
            moment(tmp_path, name, stored).part((slice(1, 2),))
        assert_is(moment(tmp_path, name, stored).part((slice(1),)), a[:1])


def test_a_tensor_that_only_reads_as_a_whole_has_parts():
    """Catches a part that keeps the whole in memory, or is a view of somebody's array, and one of another shape."""
    a = np.arange(6.0).reshape(2, 3)
    tensor = StoredTensor((2, 3), "float64", lambda: a)
    for each in (tensor, mapped(tensor, lambda x: x)):
        assert_is(each.part((slice(1),)), a[:1])
        assert each.part((slice(1),)).base is None
        assert_is(each.part(()), a)
    turned = StoredTensor((3, 2), "float64", lambda: a.T)
    assert_is(turned.part(()), np.ascontiguousarray(a.T))
    assert_is(StoredTensor((), "float64", lambda: np.float64(3) * np.ones(())).part(()), np.array(3.0))


@pytest.mark.parametrize("index", [(slice(0, 2, 2),), (slice(None, None, -1),), (0,), (slice(1),) * 3, (Ellipsis,)])
def test_another_index_is_refused(index):
    """Catches a step or a number that is ignored, so that another part is returned."""
    tensor = StoredTensor((2, 3), "float64", lambda: np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"^the index of a part is \(.*\); expected at most 2 slices with step 1$"):
        tensor.part(index)
