"""Damaged checkpoints: whatever happened to a file, it is refused by its name, or nothing but weights' values changed.

The files of every layout, and those that go with one, are spoilt at random: bytes of any of them (cut, flipped,
overwritten, inserted, removed), the entries of configurations, indices and headers, and the tensors themselves. Some
are replaced by something else: a Git LFS pointer, an error page, a pipe.
"""

import dataclasses
import json
import os
import shutil

import layouts
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.checkpoint import read_checkpoint
from portable_gpt2.checkpoint.companions import configuration, written_companions
from portable_gpt2.params import shapes

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=24, n_ctx=8, eos_token_id=None)
WEIGHTS = tiny.weights(CONFIG)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
UNDETERMINED = ("n_head", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "eos_token_id")
UNDETERMINED += ("bos_token_id", "pad_token_id")
COMPANIONS = {
    "generation_config.json": b'{"eos_token_id": [3, 4], "bos_token_id": 5, "temperature": 0.5}',
    "tokenizer_config.json": b'{"model_max_length": 8, "chat_template": "{{ messages }}"}',
    "chat_template.jinja": b"{{ messages }}",
}

NUMBERS = st.sampled_from([0, 1, -1, 7, 9, 2**31, 2**63, 2**64, 10**30, 0.5, 1e300]) | st.integers(0, 2000)
JUNK = NUMBERS | st.sampled_from([None, True, "", "F64", "I8", "../x", "/dev/zero", "none", [], {}, [1, [2]], {"a": 1}])


# What may happen to a file: functions from what can be drawn and the old content to the new one


def cut(draw, content):
    return content[: draw(st.integers(0, max(len(content) - 1, 0)))]


def flip(draw, content):
    spoilt = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        spoilt[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(spoilt)


def overwrite(draw, content):
    start, new = draw(st.integers(0, len(content) - 1)), draw(st.binary(min_size=1, max_size=12))
    return (content[:start] + new + content[start + len(new) :])[: len(content)]


def insert(draw, content):
    start = draw(st.integers(0, len(content)))
    return content[:start] + draw(st.binary(min_size=1, max_size=12)) + content[start:]


def remove(draw, content):
    start = draw(st.integers(0, len(content) - 1))
    return content[:start] + content[start + draw(st.integers(1, 12)) :]


def replace(draw, content):
    return draw(
        st.sampled_from([POINTER, b"", b"<!doctype html>", b"GGUF" + content, b"\x1f\x8b" + content, b"{}", b"[]"])
    )


def edit_json(draw, content):
    """Change, remove or rename one entry at any depth."""
    entries = json.loads(content)
    node = entries
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
            break
        node = node[key]
    match draw(st.sampled_from(["change", "remove", "rename", "copy"])):
        case "change":
            node[key] = draw(JUNK)
        case "remove":
            del node[key]
        case "rename" if isinstance(node, dict):
            node[draw(st.sampled_from([f"{key}x", "h.0.ln_1.weight", "lm_head.weight"]))] = node.pop(key)
        case "copy":
            node[key] = node[draw(st.sampled_from(keys))]
    return json.dumps(entries).encode()


def edit_header(draw, content):
    """Change the header of a file of safetensors, or lie about its length."""
    size = int.from_bytes(content[:8], "little")
    header = edit_json(draw, content[8 : 8 + size])
    length = draw(st.just(len(header)) | NUMBERS.filter(lambda n: isinstance(n, int) and 0 <= n < 2**64))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def spoil_tensors(draw, arrays):
    """Drop, add, reshape, retype a tensor, or make one of its numbers none."""
    arrays, path = dict(arrays), draw(st.sampled_from(list(arrays)))
    a = arrays[path]
    match draw(st.sampled_from(["drop", "add", "reshape", "widen", "retype", "no number", "number"])):
        case "drop":
            del arrays[path]
        case "add":
            arrays[draw(st.sampled_from(["h1/ln_1/g", "h0/attn/c_attn/lora", "step"]))] = a
        case "reshape":
            arrays[path] = np.ascontiguousarray(a.T).reshape(-1, *a.shape[:0:-1]) if a.ndim > 1 else a[:-1]
        case "widen":
            arrays[path] = a[..., None]
        case "retype":
            arrays[path] = a.astype(draw(st.sampled_from(["int32", "uint8", "bool", "int64"])))
        case kind:
            arrays[path] = a.copy()
            value = {"no number": [np.nan, -np.nan, np.inf, -np.inf], "number": [0.0, -3e38, 1e-45]}[kind]
            arrays[path].reshape(-1)[draw(st.integers(0, a.size - 1))] = draw(st.sampled_from(value))
    return arrays


class Files(dict):
    """Contents by name, which hypothesis need not print."""

    def __repr__(self):
        return f"<files {', '.join(self)}>"


@pytest.fixture(scope="module")
def whole(layout, tmp_path_factory):
    """The files of a checkpoint by name."""
    directory = tmp_path_factory.mktemp("whole") / "it"
    layouts.WRITERS[layout][1](directory, CONFIG, WEIGHTS)
    files = {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.suffix != ".meta"}
    return Files(files | COMPANIONS)


def put(directory, name, kind):
    """Put something that is not a file in place of one."""
    (directory / name).unlink()
    match kind:
        case "pipe":
            os.mkfifo(directory / name)
        case "directory":
            (directory / name).mkdir()
        case "loop":
            (directory / name).symlink_to(name)
        case "device":
            (directory / name).symlink_to("/dev/zero")


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore:.*form of GELU")
@pytest.mark.filterwarnings("error")
def test_a_damaged_checkpoint_is_refused_or_only_its_values_changed(layout, whole, tmp_path, data):
    """Catches any exception but CheckpointError, a crash, a hang, a file elsewhere that is read, and a model that is
    loaded in another shape than the one that was saved.
    """
    draw, directory = data.draw, tmp_path / "it"
    shutil.rmtree(directory, ignore_errors=True)
    if draw(st.integers(0, 3)) == 0:
        layouts.WRITERS[layout][1](directory, CONFIG, spoil_tensors(draw, WEIGHTS))
    else:
        directory.mkdir()
        name = draw(st.sampled_from(sorted(whole)))
        changes = [cut, flip, overwrite, insert, remove, replace]
        changes += [edit_json] * 5 * name.endswith(".json") + [edit_header] * 5 * name.endswith(".safetensors")
        files = {**whole, name: draw(st.sampled_from(changes))(draw, whole[name])}
        if draw(st.integers(0, 20)) == 0:
            del files[name]
        for file, content in files.items():
            (directory / file).write_bytes(content)
        if name in files and draw(st.integers(0, 20)) == 0:
            put(directory, name, draw(st.sampled_from(["pipe", "directory", "loop", "device"])))
    try:
        found = read_checkpoint(directory)
        arrays = {path: tensor.read() for path, tensor in found.tensors.items()}
    except pg.CheckpointError as error:
        assert str(error).startswith(f"{directory}")  # noqa: PT017 - only if there is one
        assert "\n" not in str(error)  # noqa: PT017
        assert "weights_only" not in str(error)  # noqa: PT017
        return
    same = {field: getattr(CONFIG, field) for field in UNDETERMINED}
    assert dataclasses.replace(found.config, **same) == CONFIG
    assert {path: a.shape for path, a in arrays.items()} == shapes(CONFIG)
    for a in arrays.values():
        assert a.dtype == np.float32
        assert np.isfinite(a).all()
    written = written_companions(found.config, ["float32"], found.companions)
    assert configuration(directory, written) == found.config
    assert {
        name: content for name, content in written.items() if name in COMPANIONS
    }.items() <= found.companions.items()
