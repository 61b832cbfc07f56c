"""Files that change after they were read: a model, and a run's token ids, stay what they were."""

import json
import os

import frameworks
import layouts
import numpy as np
import processes
import pytest
import tiny

from portable_gpt2.checkpoint import read_checkpoint
from portable_gpt2.training import data

SPOIL = """
import json, os, pathlib, sys
import numpy as np
import portable_gpt2 as pg

for directory, backend, how in json.loads(sys.argv[1]):
    print(directory, backend, how, file=sys.stderr, flush=True)  # if SIGBUS ends the process, this was the case
    model = pg.GPT2.load(directory, backend=backend)
    before = pg.to_numpy(model.logits([[1, 2, 3]])).copy()
    for file in pathlib.Path(directory).iterdir():
        if how == "truncated":
            os.truncate(file, 0)
        else:
            size = file.stat().st_size
            with file.open("r+b") as stream:  # the same file, as cp and rsync --inplace write it
                stream.write(bytes(size))
    assert np.array_equal(pg.to_numpy(model.logits([[1, 2, 3]])), before), "the weights have changed"
    print("unchanged")
"""


def test_a_model_does_not_change_with_its_file(tmp_path):
    """Would catch weights that are mapped: other text after the file was overwritten, a SIGBUS after a truncation.

    One process, which may end by SIGBUS, tries all backends that are installed and all files that they can write.
    """
    cases = []
    for layout in ("safetensors", "bin", "OpenAI"):
        needed, write = layouts.WRITERS[layout]
        for name in frameworks.HERE if needed in (None, *frameworks.HERE) else ():
            for how in ("overwritten", "truncated"):
                directory = tmp_path / f"{layout}, {name}, {how}"
                write(directory, tiny.CONFIG, tiny.weights(seed=1))
                cases.append([str(directory), name, how])
    printed = processes.run(f"import sys; sys.argv[1:] = {[json.dumps(cases)]!r}{SPOIL}").splitlines()
    assert printed.count("unchanged") == len(cases) >= 2 * len(frameworks.HERE)


def test_tensors_that_were_read_do_not_change_with_their_file(tmp_path):
    """Would catch `read_checkpoint` that returns views of a file, as convert and a run's moments are read."""
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights(seed=1))
    found = {path: tensor.read() for path, tensor in read_checkpoint(tmp_path / "it").tensors.items()}
    layouts.write_safetensors(tmp_path / "it", tiny.CONFIG, tiny.weights(seed=2))
    assert all(np.array_equal(found[path], a) for path, a in tiny.weights(seed=1).items())


def test_token_ids_do_not_change_with_their_file(tmp_path):
    """Would catch a training run that reads other text in its midst, and one that a truncation ends with SIGBUS."""
    file = tmp_path / "tokens.bin"
    np.arange(100, dtype="<u2").tofile(file)
    tokens = data.open_tokens(file, 100)
    with file.open("r+b") as stream:
        stream.write(bytes(200))
    os.truncate(file, 0)
    np.testing.assert_array_equal(tokens, np.arange(100))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_token_ids_of_a_large_file_are_mapped(tmp_path, monkeypatch):
    """Would catch a text that has to fit into memory."""
    monkeypatch.setattr(data, "_LARGEST_READ", 100)
    np.arange(100, dtype="<u2").tofile(tmp_path / "tokens.bin")
    assert isinstance(data.open_tokens(tmp_path / "tokens.bin", 100), np.memmap)
