"""Another kind of file instead of a checkpoint's: the error names the file, its kind, and what to do."""

import bz2
import gzip
import json
import lzma
import os
import stat
import zipfile

import layouts
import numpy as np
import processes
import pytest
import tiny
from safetensors.numpy import save_file

import portable_gpt2 as pg
from portable_gpt2.checkpoint import convert, read_checkpoint
from portable_gpt2.checkpoint.contents import LARGEST_TEXT

pytestmark = pytest.mark.filterwarnings("ignore:.*form of GELU")

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:d73cbc7f5cf9ab4ed4b1e0d4c3f3a3ad9c2e9f6d1ac2a5bd1d8a4c1a2f6a8d11
size 548105171
"""
TEXTS = ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TEXTS += ["chat_template.jinja", "chat_template.json", "tokenizer.json"]


@pytest.fixture
def checkpoint(layout, tmp_path):
    """A checkpoint of every layout with a tokenizer; a test may spoil it."""
    layouts.WRITERS[layout][1](tmp_path / "it", tiny.CONFIG, tiny.weights())
    if layout == "OpenAI":
        tiny.write_tokenizer(tmp_path)
        layouts.write_openai_tokenizer(tmp_path / "it", tmp_path)
    else:
        tiny.write_tokenizer(tmp_path / "it")
    return tmp_path / "it"


def read_files(directory):
    """Return the names of all files that are read: what PyTorch and TensorFlow write besides is not."""
    return sorted(file.name for file in directory.iterdir() if file.suffix != ".meta" and file.name != "checkpoint")


# Git LFS, error pages, archives

WRONG = {  # content, and what is said
    "a pointer": (POINTER, r"is a Git LFS pointer .*run `git lfs pull`"),
    "a page": (b"\n<!DOCTYPE html>\n<html><title>404</title></html>", "is an HTML page, .*download the file again"),
    "a plain page": (b"<html><body>Access denied</body></html>", "is an HTML page"),
    "gzip": (gzip.compress(b"x" * 100), "is a gzip archive; unpack it"),
    "bzip2": (bz2.compress(b"x" * 100), "is a bzip2 archive; unpack it"),
    "xz": (lzma.compress(b"x" * 100), "is an xz archive; unpack it"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_something_else_in_place_of_any_file_is_named_with_what_to_do(checkpoint, what):
    """Catches "invalid load key, 'v'", "header too large", "Expecting value": the words of a parser."""
    content, why = WRONG[what]
    for name in read_files(checkpoint):
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        if ".data-" not in name:  # TensorFlow reads it when it is asked for a tensor
            with pytest.raises(pg.CheckpointError, match=rf"it.{name}: {why}"):
                read_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(before)
    read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", TEXTS)
def test_companions_are_told_from_pointers_too(tmp_path, name):
    """Catches a pointer that is carried to where there is no repository to pull from."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    (tmp_path / "it" / name).write_bytes(POINTER)
    with pytest.raises(pg.CheckpointError, match=rf"it.{name}: is a Git LFS pointer"):
        read_checkpoint(tmp_path / "it")
    if "token" in name:  # the weights do not need it
        with pytest.warns(UserWarning, match="is a Git LFS pointer"):
            convert(tmp_path / "it", tmp_path / "out")
    else:
        with pytest.raises(pg.CheckpointError, match="is a Git LFS pointer"):
            convert(tmp_path / "it", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_empty_file_is_called_one(checkpoint):
    """Catches a download that did not begin, and a message of a parser."""
    for name in set(read_files(checkpoint)) - {"vocab.json", "merges.txt", "encoder.json", "vocab.bpe"}:
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"")
        if ".data-" not in name:
            with pytest.raises(pg.CheckpointError, match=rf"{name}: is an empty file"):
                read_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(before)


def test_weights_under_the_name_of_another_format_are_told_theirs(tmp_path, torch):
    """Catches a user who renamed a file, and is told that it is damaged."""
    layouts.write_config(tmp_path, tiny.CONFIG)
    names = layouts.hugging_face_names(tiny.weights())
    save_file(names, tmp_path / "pytorch_model.bin")
    with pytest.raises(pg.CheckpointError, match=r"bin: is a safetensors file; give it the name model\.safetensors$"):
        read_checkpoint(tmp_path)
    for is_zip in (True, False):
        tensors = {name: torch.from_numpy(a) for name, a in names.items()}
        torch.save(tensors, tmp_path / "model.safetensors", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(pg.CheckpointError, match=r"is a file of PyTorch; give it the name pytorch_model\.bin$"):
            read_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/config.json", "{}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(pg.CheckpointError, match=r"pytorch_model\.bin: is not a whole file of tensors as P"):
        read_checkpoint(tmp_path)


# Something that is not a file

KINDS = ["a FIFO", "a directory", "a loop", "a device", "a socket", "a link to nothing"]


def put(kind, file):
    """Put something that is not a file where a file is."""
    file.unlink(missing_ok=True)
    match kind:
        case "a FIFO":
            os.mkfifo(file)
        case "a directory":
            file.mkdir()
        case "a loop":
            file.symlink_to(file.name)
        case "a device":
            file.symlink_to("/dev/zero")
        case "a socket":
            os.mknod(file, stat.S_IFSOCK | 0o600)
        case "a link to nothing":
            file.symlink_to("nowhere")


SAID = r"named pipe|is a directory|loop of symbolic links|is a device|is a socket|where there is no file"


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named_at_once_in_place_of_any_file(checkpoint, kind):
    """Catches a wait for a pipe's writer, an endless device, and a file that is passed over for another one."""
    for name in read_files(checkpoint):
        (checkpoint / name).rename(checkpoint.parent / "aside")
        put(kind, checkpoint / name)
        if (kind, name) != ("a link to nothing", "model.ckpt.data-00000-of-00001"):  # TensorFlow says so itself
            with pytest.raises(pg.CheckpointError, match=rf"{name}: .*({SAID})"):
                read_checkpoint(checkpoint)
        (checkpoint / name).rmdir() if kind == "a directory" else (checkpoint / name).unlink()
        (checkpoint.parent / "aside").rename(checkpoint / name)
    read_checkpoint(checkpoint)


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_file_is_named_in_place_of_a_companion(tmp_path, kind, name):
    """Catches a file that is read only by the way, and hangs all the same."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    put(kind, tmp_path / "it" / name)
    with pytest.raises(pg.CheckpointError, match=rf"it.{name}: .*({SAID})"):
        read_checkpoint(tmp_path / "it")


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_directory_is_named_at_once(tmp_path, kind):
    """Catches a source that is opened before it is looked at."""
    put(kind, tmp_path / "it")
    why = (
        r"it.config\.json: no such file" if "dir" in kind else "it: is not a directory, and weights are read from files"
    )
    with pytest.raises(pg.CheckpointError, match=why):
        read_checkpoint(tmp_path / "it")
    put(kind, tmp_path / "ckpt.pt")
    with pytest.raises(pg.CheckpointError, match=rf"ckpt\.pt.*({SAID}|no such file)"):
        read_checkpoint(tmp_path / "ckpt.pt")


# Names


@pytest.mark.parametrize("length", [255, 256, 5000])
def test_long_names_are_read_or_refused(tmp_path, length):
    """Catches an OSError of the system from a name that it does not take, and a name of 255 bytes that is refused."""
    directory = tmp_path / ("n" * length)
    if length <= 255:
        layouts.write_safetensors(directory, tiny.CONFIG, tiny.weights())
        assert read_checkpoint(directory).config == tiny.CONFIG
    else:
        for source in (directory, str(directory), directory / "deeper", directory.name):
            with pytest.raises(pg.CheckpointError, match="no such directory"):
                read_checkpoint(source)


def test_names_that_are_not_utf_8_are_read(checkpoint, layout, tmp_path):
    """Catches another package's exception for a name that is not UTF-8, instead of a CheckpointError."""
    directory = tmp_path / "caf\udce9"
    try:
        checkpoint.rename(directory)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    if layout == "OpenAI":
        with pytest.raises(pg.CheckpointError, match="caf"):
            read_checkpoint(directory)
    else:
        model = pg.GPT2.load(directory, backend="numpy")
        assert model.tokenizer.encode("To be")
        convert(str(directory), tmp_path / "out\udce9")
        assert read_checkpoint(tmp_path / "out\udce9").config == tiny.CONFIG


# JSON


def test_entries_that_stand_twice_are_refused_in_every_file(tmp_path):
    """Catches a choice between two values that nobody is told of: parsers take the last."""
    layouts.write_sharded_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights(), n=2)
    (tmp_path / "it" / "generation_config.json").write_text('{"eos_token_id": 3}')

    def double(content):
        return b'{"first": {"n_layer": 1, "n_layer": 2},' + content.lstrip()[1:]

    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        before = (tmp_path / "it" / name).read_bytes()
        (tmp_path / "it" / name).write_bytes(double(before))
        with pytest.raises(pg.CheckpointError, match=rf"it.{name}: names 'n_layer' twice; keep the intended entry"):
            read_checkpoint(tmp_path / "it")
        (tmp_path / "it" / name).write_bytes(before)
    weights = tmp_path / "it" / "model-00001-of-00002.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    name, entry = next(iter(json.loads(header).items()))
    header = f'{{"{name}":{json.dumps(entry)},'.encode() + header.lstrip()[1:]
    weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(pg.CheckpointError, match=r"00001-of-00002\.safetensors: (not a whole|names .* twice)"):
        read_checkpoint(tmp_path / "it")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"n_layer": %s}' % ("1" * 5000), "holds an integer of 5,000 digits"),
        ('{"n_layer": -%s}' % ("1" * 5000), "holds an integer of 5,001 digits"),
        ('{"n_layer": 1e999}', "n_layer is inf; expected an int"),
        ('{"n_layer": NaN}', "n_layer is nan; expected an int"),
        ('{"n_layer": 1000000000}', "holds 28 tensors; config.json says n_layer = 1000000000"),
        ('{"n_embd": 1000000000}', "has shape"),
        ('{"n_inner": 100000000000000000000}', "n_inner is 100000000000000000000; expected an int below"),
        ('{"a": ' + "[" * 100_000, "recursion"),
        ('{"activation_function": "%s"}' % ("x" * 10**6), r"activation_function is 'xxx.*\.\.\. \(1000002 char"),
        ('\ufeff{"n_layer": 2}', "BOM"),
    ],
)
def test_json_beyond_all_sizes_is_refused_in_one_line(tmp_path, text, why):
    """Catches a RecursionError, an advice to raise the interpreter's limits, a list of 10**9 names, a page of text."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    own = json.loads((tmp_path / "it" / "config.json").read_text())
    if text.startswith('{"n_'):  # replaces the entry of this name
        own.pop(text.split('"')[1])
        text = json.dumps(own)[:-1] + ", " + text[1:]
    (tmp_path / "it" / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(pg.CheckpointError, match=why) as caught:
        read_checkpoint(tmp_path / "it")
    assert "set_int_max_str_digits" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "vocab.json"])
def test_a_text_of_gigabytes_is_refused_unread(tmp_path, name):
    """Catches a file that is read into memory whole before it is looked at."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    tiny.write_tokenizer(tmp_path / "it")
    with (tmp_path / "it" / name).open("ab") as stream:
        stream.truncate(10 * 2**30)  # without blocks on the disk
    with pytest.raises(
        pg.CheckpointError, match=rf"it.{name}: has 10,737,418,240 bytes; expected at most {LARGEST_TEXT:,}"
    ):
        read_checkpoint(tmp_path / "it")


def test_the_command_names_a_pipe_at_once(tmp_path):
    """Catches a command that hangs, as the library does not."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    (tmp_path / "it" / "config.json").unlink()
    os.mkfifo(tmp_path / "it" / "config.json")
    code = f"from portable_gpt2.cli import main; print(main(['generate', 'x', '--model', {str(tmp_path / 'it')!r}]))"
    assert processes.run(code).split()[-1] == "2"


def test_a_text_that_is_not_there_is_not_asked_for(tmp_path):
    """Catches a companion that is demanded, and one that comes from nowhere."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights())
    found = read_checkpoint(tmp_path / "it")
    assert [*found.companions] == ["config.json"]
    assert all(np.isfinite(tensor.read()).all() for tensor in found.tensors.values())
