"""Files of PyTorch, by whatever program: the tensors are those that torch.load returns without a map."""

import collections
import dataclasses
import struct
import sys
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.checkpoint import read_checkpoint

CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_vocab=24, n_ctx=8, eos_token_id=None)


@pytest.fixture
def tensors(torch):
    """A model under Hugging Face's names."""
    return {name: torch.from_numpy(a.copy()) for name, a in layouts.hugging_face_names(tiny.weights(CONFIG)).items()}


@pytest.fixture
def save(torch, tmp_path):
    """Return a function that writes pytorch_model.bin, and returns its path."""
    layouts.write_config(tmp_path, CONFIG)

    def save(state, **options):
        torch.save(state, tmp_path / "pytorch_model.bin", **options)
        return tmp_path / "pytorch_model.bin"

    return save


def rewrite(file, method=zipfile.ZIP_STORED, change=lambda name, content: content, only="", **options):
    """Write a zip file again with other compression, or contents; an entry whose content becomes None is left out."""
    with zipfile.ZipFile(file) as archive:
        members = [(member.filename, change(member.filename, archive.read(member))) for member in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            if content is not None:
                info = zipfile.ZipInfo(name)
                info.compress_type = method if only in name else zipfile.ZIP_STORED
                with archive.open(info, "w", **options) as stream:
                    stream.write(content)


def arrays(directory):
    return {path: tensor.read() for path, tensor in read_checkpoint(directory).tensors.items()}


def assert_holds(directory, expected):
    for path, a in arrays(directory).items():
        np.testing.assert_array_equal(a, expected[path], err_msg=path)


def is_mapped(file):
    return str(file) in Path("/proc/self/maps").read_text()


MAPS = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not say what is mapped")


@MAPS
@pytest.mark.parametrize("options", [{}, {"force_zip64": True}])
def test_what_pytorch_writes_is_mapped(save, tensors, options):
    """Catches a check so strict that every file is read into memory at once."""
    file = save(tensors)
    if options:
        rewrite(file, **options)
    found = read_checkpoint(file.parent)
    assert is_mapped(file)
    for path, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), tiny.weights(CONFIG)[path])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("only", ["", "data.pkl", "data/1", "version"])
def test_members_that_are_compressed_are_not_mapped(save, torch, seed, only):
    """Catches compressed bytes that are taken for numbers: they often are numbers."""
    weights = {path: a.round() for path, a in tiny.weights(CONFIG, seed).items()}  # so that there is something to gain
    file = save({name: torch.from_numpy(a) for name, a in layouts.hugging_face_names(weights).items()})
    rewrite(file, zipfile.ZIP_DEFLATED, only=only)
    assert_holds(file.parent, weights)


def swapped(name, content):
    """Return a member as a machine of the other byte order writes it; all weights have four bytes."""
    if name.endswith("byteorder"):
        return {"little": b"big", "big": b"little"}[sys.byteorder]
    return np.frombuffer(content, np.int32).byteswap().tobytes() if "/data/" in name else content


def test_the_other_byte_order_is_read(save, torch):
    """Catches weights that are swapped in a map of the file, and lost when its pages are given back."""
    config = dataclasses.replace(CONFIG, n_vocab=4000)  # wte has whole pages
    weights = tiny.weights(config)
    file = save({name: torch.from_numpy(a) for name, a in layouts.hugging_face_names(weights).items()})
    layouts.write_config(file.parent, config)
    rewrite(file, change=swapped)
    found = read_checkpoint(file.parent)
    for path, tensor in found.tensors.items():
        for _ in range(2):
            np.testing.assert_array_equal(tensor.read(), weights[path], err_msg=path)


@pytest.mark.parametrize("gap", [1, 4096])
def test_bytes_in_front_of_the_zip_file_shift_nothing(save, tensors, torch, gap):
    """Catches offsets that are counted from the wrong place, where there are whole pages of them too."""
    file = save(tensors)
    file.write_bytes(b"PK\3\4" + bytes(gap - 4 if gap > 4 else gap) + file.read_bytes())
    try:
        torch.load(file, weights_only=True, mmap=False)
    except Exception:
        with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
            read_checkpoint(file.parent)
    else:
        assert_holds(file.parent, tiny.weights(CONFIG))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_what_pytorch_takes_them_for(save, tensors, torch):
    """Catches another choice between the two than that of torch.load."""
    file = save(tensors)
    with zipfile.ZipFile(file, "a") as archive:
        name = "pytorch_model/data/0"
        archive.writestr(name, (np.frombuffer(archive.read(name), np.float32) + 1).tobytes())
    try:
        theirs = torch.load(file, weights_only=True, mmap=False)
    except Exception:
        with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
            read_checkpoint(file.parent)
    else:
        names = layouts.hugging_face_names({path: path for path in tiny.weights(CONFIG)})
        assert_holds(file.parent, {path: theirs[name].numpy() for name, path in names.items()})


@pytest.mark.parametrize("n", [4, 128])
def test_a_member_that_is_shorter_than_its_tensor_is_refused(save, tensors, n):
    """Catches a tensor that ends with bytes of the next member."""
    file = save(tensors)
    rewrite(file, change=lambda name, content: content[:-n] if name.endswith("/data/1") else content)
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
        arrays(file.parent)


def test_an_encrypted_member_is_refused(save, tensors):
    """Catches ciphertext that is taken for numbers."""
    file = save(tensors)
    content = bytearray(file.read_bytes())
    place = content.rindex(b"PK\1\2")  # the flags of every member, here and in its own header
    while place >= 0:
        content[place + 8] |= 1
        place = content.rfind(b"PK\1\2", 0, place)
    file.write_bytes(content)
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
        arrays(file.parent)


@pytest.mark.parametrize("is_zip", [True, False])
def test_views_are_read_as_the_tensors_that_they_are(save, tensors, torch, is_zip):
    """Catches storages that are taken for tensors: strides, offsets, overlaps, signs that are kept apart."""
    names = layouts.hugging_face_names({path: path for path in tiny.weights(CONFIG)})
    expected = {path: a.copy() for path, a in tiny.weights(CONFIG).items()}
    state = collections.OrderedDict(tensors)

    def put(path, x):
        state[next(name for name, p in names.items() if p == path)] = x
        expected[path] = x.detach().resolve_neg().numpy().copy()

    put("h0/attn/c_attn/w", state["transformer.h.0.attn.c_attn.weight"].T.contiguous().T)
    big = torch.randn(50, 8)
    put("wpe", big[3:19:2])
    put("wte", big[20:44])
    put("h0/ln_1/g", big[1])
    put("h0/ln_1/b", torch.ones(1).expand(8))
    put("h0/ln_2/b", torch._neg_view(torch.randn(8)))
    put("ln_f/g", torch.nn.Parameter(torch.randn(8)))
    put("ln_f/b", big[:, 2][:8])
    assert_holds(save(state, _use_new_zipfile_serialization=is_zip).parent, expected)


def test_16_bits_with_a_sign_of_their_own_are_read(save, tensors, torch):
    """Catches a negation that is lost where the bits are looked at."""
    state = {name: torch._neg_view(x.bfloat16()) for name, x in tensors.items()}
    for path, a in arrays(save(state).parent).items():
        np.testing.assert_array_equal(a, -tiny.weights(CONFIG)[path].astype(a.dtype), err_msg=path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_parameters_that_share_memory_are_read_apart(save, tensors, is_zip):
    """Catches what is written to one parameter reaching another, which shared its weights in the file."""
    for name in [name for name in tensors if ".h.1." in name]:
        tensors[name] = tensors[name.replace(".h.1.", ".h.0.")]
    found = arrays(save(tensors, _use_new_zipfile_serialization=is_zip).parent)
    for path in [path for path in found if path.startswith("h0/")]:
        found[path] += 1
        np.testing.assert_array_equal(found[path.replace("h0/", "h1/")], tiny.weights(CONFIG)[path])


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_is_not_an_array_of_numbers_is_refused_by_name(save, tensors, torch):
    """Catches a framework's own message from ten frames down, and quantized integers that are read as weights."""
    name = "transformer.wpe.weight"
    for x, why in [
        (torch.quantize_per_tensor(tensors[name], 0.1, 0, torch.quint8), r"quint8 .*expected float64"),
        (tensors[name].to_sparse(), r"float32 \(sparse coo\); expected float64"),
        (tensors[name].to_sparse_csr(), r"float32 \(sparse csr\); expected float64"),
        (torch.zeros(8, 8, device="meta"), r"float32 \(without data\); expected float64"),
        (tensors[name].to(torch.complex64), r"complex64; expected float64"),
        (tensors[name].int(), r"int32; expected float64"),
        (tensors[name].to(torch.float8_e4m3fn), r"float8_e4m3fn; expected float64"),
    ]:
        with pytest.raises(pg.CheckpointError, match=rf"pytorch_model\.bin: {name} is of dtype {why}"):
            read_checkpoint(save(tensors | {name: x}).parent)


def test_a_buffer_of_counts_is_named(save, tensors, torch):
    """Catches a buffer that is not a parameter, such as a count of batches, being read as one."""
    with pytest.raises(pg.CheckpointError, match=r"holds transformer\.num_batches_tracked, which a GPT-2 .*not have"):
        read_checkpoint(save(tensors | {"transformer.num_batches_tracked": torch.tensor(3)}).parent)


@pytest.mark.parametrize("path", ["size", "offset"])
def test_a_tensor_beyond_its_storage_is_refused(save, tensors, torch, path):
    """Catches memory of others that is read as weights."""
    file = save(tensors)

    def change(name, content):
        if not name.endswith("data.pkl"):
            return content
        if path == "size":  # of wpe, [8, 8], in BININT1s
            return content.replace(b"K\x08K\x08\x86", b"K\x08K\xff\x86", 1)
        return content.replace(b"K\x00K\x08K\x08\x86", b"K\xf0K\x08K\x08\x86", 1)

    before = file.read_bytes()
    rewrite(file, change=change)
    assert file.read_bytes() != before
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: "):
        arrays(file.parent)


ADVICE = r"weights_only|safe_globals|allowlist|pickle_module|torch\.load"


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_message_advises_to_execute_a_pickle(save, tensors, torch, tmp_path):
    """Catches PyTorch's own advice: to load the file again with weights_only=False, or to allow what is in it."""
    file = tmp_path / "pytorch_model.bin"
    states = [Path("x"), {"a": np.float64(1)}, {"a": np.zeros(3)}, {"a": Exception("x")}, {"a": tiny.weights}, 3 + 4j]
    contents = [b"junk" * 100, b"\x80\x02junk", b"PK\3\4junk", b"\x80\x04\x95" + b"x" * 100, b"cposix\nsystem\n."]

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def check():
        with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: ") as caught:
            read_checkpoint(tmp_path)
        message = str(caught.value)
        assert not any(word in message for word in ADVICE.split("|")), message
        assert "\n" not in message
        assert caught.value.__cause__ is None  # so that no traceback shows it either
        assert caught.value.__context__ is None or caught.value.__suppress_context__
        return message

    for state in states:
        for is_zip in (True, False):
            save(state, _use_new_zipfile_serialization=is_zip)
            check()
    for content in contents:
        file.write_bytes(content)
        check()
    torch.jit.save(torch.jit.script(Module()), file)
    assert "TorchScript" in check()
    save({"a": Path("x")})
    assert "holds objects other than tensors (pathlib." in check()
    save(tensors)
    whole = file.read_bytes()
    for n in (1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        assert "it may be cut off or damaged" in check()


def test_a_directory_whose_name_is_not_utf_8_is_read(save, tensors, tmp_path):
    """Catches a name that the framework's own reader cannot take."""
    file = save(tensors)
    directory = tmp_path / "caf\udce9"
    try:
        directory.mkdir()
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    for each in (file, tmp_path / "config.json"):
        each.rename(directory / each.name)
    assert_holds(directory, tiny.weights(CONFIG))


def test_the_header_of_a_member_is_where_these_tests_think(save, tensors):
    """Catches a change of the format that would leave the tests above without an object."""
    content = save(tensors).read_bytes()
    assert content[:4] == b"PK\3\4"
    assert struct.unpack("<HH", content[6:10])[1] == 0
