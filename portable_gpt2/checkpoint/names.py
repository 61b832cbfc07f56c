"""The names that a GPT-2's tensors go by in files, Hugging Face's and OpenAI's, and the paths that they have here."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend import StoredTensor, float_dtypes
from ..config import GPT2Config
from ..params import shapes
from .errors import CheckpointError

PREFIX = "transformer."
OPENAI = "model/"
LM_HEAD = "lm_head.weight"  # never with the prefix

_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LEAVES = {"w": "weight", "g": "weight", "b": "bias"}


class Found(NamedTuple):
    """A tensor and the file that holds it."""

    file: Path
    tensor: StoredTensor


def hugging_face_name(path: str) -> str:
    """Return Hugging Face's name of a parameter, without prefix: ``h3/ln_1/g`` is ``h.3.ln_1.weight``."""
    scope, _, leaf = path.rpartition("/")
    if not scope:
        return f"{leaf}.weight"
    return re.sub(r"^h(\d+)\.", r"h.\1.", f"{scope.replace('/', '.')}.") + _LEAVES[leaf]


def prefixed_name(path: str) -> str:
    """Return Hugging Face's name of a parameter as its models for text write it, under ``transformer.``."""
    name = hugging_face_name(path)
    return name if name == LM_HEAD else PREFIX + name


def is_openai(names: Mapping[str, Found]) -> bool:
    """Return whether tensors go by OpenAI's names."""
    return any(name.startswith(OPENAI) for name in names)


def by_path(file: Path, found: Mapping[str, Found], config: GPT2Config, config_name: str) -> dict[str, StoredTensor]:
    """Return the parameters by path, in the order of `params.shapes`, once all have the shapes that config says.

    Hugging Face's names may carry the prefix ``transformer.`` or not; the buffers of masks that old versions wrote are
    dropped, and so is an ``lm_head.weight`` that equals wte where the two are tied.

    Parameters
    ----------
    file : path
        Of the weights, or of their index if they are in several.
    found : dict
        Tensors by the names in the file.
    config : GPT2Config
        The model's shape.
    config_name : str
        The name of the file that says so.
    """
    if config.n_layer > len(found):  # before a list of what so many layers should hold is made
        raise CheckpointError(f"{file}: holds {len(found)} tensors; {config_name} says n_layer = {config.n_layer}")
    ours = shapes(config)
    if is_openai(found):
        name_of, dropped = OPENAI.__add__, set[str]()
    else:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in found) else ""
        name_of = prefixed_name if prefix else hugging_face_name
        dropped = {n for n in found if n.startswith(prefix) and _MASK_BUFFER.fullmatch(n.removeprefix(prefix))}
        dropped |= {LM_HEAD} if config.tie_word_embeddings else set()
    paths = {name_of(path): path for path in ours}

    if missing := [name for name in paths if name not in found]:
        raise CheckpointError(f"{file}: lacks {_some(missing)}")
    if extra := [name for name in found if name not in paths and name not in dropped]:
        raise CheckpointError(f"{file}: holds {_some(extra)}, which a GPT-2 of this {config_name} does not have")
    parameters = {}
    for name, path in paths.items():
        at, tensor = found[name]
        # OpenAI's leading 1 is the receptive field of GPT-1's convolution.
        expected = (1, *ours[path]) if is_openai(found) and path.endswith("/w") else ours[path]
        if tensor.shape != expected:
            raise CheckpointError(
                f"{at}: {name} has shape {list(tensor.shape)}; {config_name} makes it {list(expected)}"
            )
        _check_dtype(at, name, tensor)
        parameters[path] = StoredTensor(ours[path], tensor.dtype, functools.partial(_reshaped, tensor, ours[path]))
    if LM_HEAD in dropped and LM_HEAD in found:
        at, head = found[LM_HEAD]
        _check_dtype(at, LM_HEAD, head)
        if head.shape != ours["wte"] or not np.array_equal(head.read(), parameters["wte"].read()):
            raise CheckpointError(f"{at}: {LM_HEAD} differs from wte.weight, but {config_name} ties the two")
    return parameters


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.read().reshape(shape)


def _check_dtype(file: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in float_dtypes:
        raise CheckpointError(f"{file}: {name} is of dtype {tensor.dtype}; expected {' or '.join(float_dtypes)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
