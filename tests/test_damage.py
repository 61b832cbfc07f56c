"""Damaged checkpoints: whatever happened to a file, it is refused by its name, or nothing but weights' values changed.

The files of every layout, and those that go with one, are spoilt at random: bytes of any of them (cut, flipped,
overwritten, inserted, removed), the entries of configurations, indices and headers, and the tensors themselves. Some
are replaced by something else: a Git LFS pointer, an error page, a pipe.
"""

import dataclasses
import os
import shutil

import layouts
import numpy as np
import pytest
import tiny
from damage import cut, edit_header, edit_json, flip, insert, overwrite, remove, replace, spoil_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.checkpoint import read_checkpoint
from portable_gpt2.checkpoint.companions import configuration, written_companions
from portable_gpt2.params import shapes

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=24, n_ctx=8, eos_token_id=None)
WEIGHTS = tiny.weights(CONFIG)
UNDETERMINED = ("n_head", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "eos_token_id")
UNDETERMINED += ("bos_token_id", "pad_token_id")
COMPANIONS = {
    "generation_config.json": b'{"eos_token_id": [3, 4], "bos_token_id": 5, "temperature": 0.5}',
    "tokenizer_config.json": b'{"model_max_length": 8, "chat_template": "{{ messages }}"}',
    "chat_template.jinja": b"{{ messages }}",
}


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
    """Replace a file by something that is not a regular file."""
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
