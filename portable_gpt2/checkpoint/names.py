"""Map the names of tensors in files to the paths of parameters.

Hugging Face's names may have any prefix, if all tensors share it: ``transformer.``, the prefixes that wrappers add,
such as ``module.`` (data parallel) and ``_orig_mod.`` (compiled), and combinations. OpenAI's names begin with
``model/``. GGUF files have llama.cpp's names.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checks import named
from ..config import GPT2Config
from ..host import CheckpointError, StoredTensor, float_dtypes
from ..params import shapes
from .tensors import transposed, without_leading_axes

PREFIX = "transformer."
OPENAI = "model/"
LM_HEAD = "lm_head.weight"  # this name never begins with ``transformer.``

_ANY_NAME = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)(?:wpe\.weight|wte\.weight|ln_f\.weight|h\.\d+\.\w+\.\w+.*)", re.DOTALL
)
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_LEAVES = {"w": "weight", "g": "weight", "b": "bias"}
# llama.cpp's names of the parts of a model.
_GGUF = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn/c_attn": "attn_qkv",
    "attn/c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp/c_fc": "ffn_up",
    "mlp/c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
# The names that PyTorch's wrappers insert before those of the module that they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Found(NamedTuple):
    """A tensor and the file that holds it."""

    file: Path
    tensor: StoredTensor


def hugging_face_name(path: str) -> str:
    """Return Hugging Face's name of a parameter, without a prefix: ``h.3.ln_1.weight`` for ``h3/ln_1/g``."""
    scope, _, leaf = path.rpartition("/")
    if not scope:
        return f"{leaf}.weight"
    return re.sub(r"^h(\d+)\.", r"h.\1.", f"{scope.replace('/', '.')}.") + _LEAVES[leaf]


def prefixed_name(path: str) -> str:
    """Return Hugging Face's name of a parameter in a language model, with the prefix ``transformer.``."""
    name = hugging_face_name(path)
    return name if name == LM_HEAD else PREFIX + name


def gguf_name(path: str) -> str:
    """Return llama.cpp's name of a parameter: ``blk.3.attn_norm.weight`` for ``h3/ln_1/g``."""
    match = re.fullmatch(r"(?:h(\d+)/)?(.+?)(?:/([wgb]))?", path)
    assert match is not None
    layer, scope, leaf = match.groups()
    return (f"blk.{layer}." if layer else "") + f"{_GGUF[scope]}.{_LEAVES[leaf or 'w']}"


def is_openai(names: Mapping[str, Any]) -> bool:
    """Return whether any name is one of OpenAI's."""
    return any(name.startswith(OPENAI) for name in names)


def prefix_of(names: Iterable[str]) -> str | None:
    """Return the prefix of most of the names that are Hugging Face's, or None if there is no such name.

    Examples
    --------
    >>> from portable_gpt2.checkpoint.names import prefix_of
    >>> prefix_of(["module.transformer.wpe.weight", "module.transformer.ln_f.weight", "module.lm_head.weight"])
    'module.transformer.'
    """
    found = Counter(match["prefix"] for name in names if (match := _ANY_NAME.fullmatch(name)))
    return found.most_common(1)[0][0] if found else None


class Layout(NamedTuple):
    """The names and shapes that the parameters have in a file."""

    names: dict[str, str]
    """The name of each parameter, by path."""
    dropped: set[str]
    """The names of tensors that are not parameters: masks, and an lm_head that is a copy of wte."""
    head: str
    """The name that lm_head has if the file contains it."""
    stored_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    """A function from a path and the parameter's shape to the shape in the file."""
    is_linear: bool = False
    """Whether conv1d weights are stored as those of nn.Linear: [out, in]."""


def layout_of(found: Mapping[str, Found], config: GPT2Config, *, is_linear: bool = False) -> Layout:
    """Return the layout of a file with these tensors, whose names are Hugging Face's or OpenAI's."""
    paths = shapes(config)
    if is_openai(found):
        # OpenAI's conv1d weights have a leading axis of size 1: the width of the kernel.
        return Layout(
            {path: OPENAI + path for path in paths},
            set(),
            OPENAI + "lm_head",
            lambda path, shape: (1, *shape) if path.endswith("/w") else shape,
        )
    prefix = prefix_of(found) or ""
    head = prefix.removesuffix(PREFIX) + LM_HEAD
    return Layout(
        {path: head if path == "lm_head" else prefix + hugging_face_name(path) for path in paths},
        {n for n in found if n.startswith(prefix) and _MASK_BUFFER.fullmatch(n.removeprefix(prefix))}
        | ({head} if config.tie_word_embeddings else set()),
        head,
        _linear_shape if is_linear else lambda path, shape: shape,
        is_linear,
    )


def gguf_layout(found: Mapping[str, Found], config: GPT2Config) -> Layout:
    """Return the layout of a GGUF file. An output matrix is dropped if the configuration says that it is wte."""
    head = gguf_name("lm_head")
    dropped = {head} if config.tie_word_embeddings else set()
    return Layout({path: gguf_name(path) for path in shapes(config)}, dropped, head, _linear_shape, True)


def _linear_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path.endswith("/w") else shape


def by_path(
    file: Path,
    found: Mapping[str, Found],
    config: GPT2Config,
    config_name: str,
    find_layout: Callable[[Mapping[str, Found], GPT2Config], Layout] = layout_of,
) -> dict[str, StoredTensor]:
    """Return the parameters by path, in the order of `params.shapes`, after checking names, shapes and dtypes.

    The mask buffers that old versions of transformers wrote are dropped. So is an ``lm_head.weight`` if the
    configuration ties it to wte; it must then be equal to wte.

    Parameters
    ----------
    file : path
        The file of weights, or the index if there are several.
    found : dict
        The tensors by their names in the file.
    config : GPT2Config
        The model's shape.
    config_name : str
        The name of the file that the configuration comes from, for messages.
    find_layout : callable
        Returns the layout of the file for its tensors and the configuration. A file with the weights of nn.Linear may
        lack all biases, which are then 0.
    """
    if config.n_layer > len(found):  # checked before a list of all names is made
        raise CheckpointError(f"{file}: holds {len(found)} tensors; {config_name} says n_layer = {config.n_layer}")
    found = _without_wrappers(file, found)
    layout, ours = find_layout(found, config), shapes(config)
    missing = [path for path, name in layout.names.items() if name not in found]
    known = {*layout.names.values(), *layout.dropped}
    extra = [name for name in found if name not in known]
    if layout.is_linear and missing == [path for path in ours if path.endswith("/b")]:
        missing = []  # the model was made with bias=False
    if missing:
        lacks = f"{file}: lacks {_some([layout.names[path] for path in missing])}"
        raise CheckpointError(f"{lacks}; holds {_some(extra)} instead" if extra else lacks)
    if extra:
        raise CheckpointError(f"{file}: holds {_some(extra)}, which a GPT-2 of this {config_name} does not have")
    parameters: dict[str, StoredTensor] = {}
    for path, name in layout.names.items():
        if name not in found:
            dtype = parameters["wte"].dtype
            parameters[path] = StoredTensor(
                ours[path], dtype, functools.partial(np.zeros, ours[path], float_dtypes[dtype])
            )
            continue
        at, tensor = found[name]
        expected = layout.stored_shape(path, ours[path])
        if tensor.shape != expected:
            raise CheckpointError(
                f"{at}: {name} has shape {list(tensor.shape)}; {config_name} requires {list(expected)}"
            )
        _check_dtype(at, name, tensor)
        is_transposed = layout.is_linear and path.endswith("/w")
        parameters[path] = transposed(tensor) if is_transposed else without_leading_axes(tensor, len(ours[path]))
    if layout.head in layout.dropped and layout.head in found:
        at, head = found[layout.head]
        _check_dtype(at, layout.head, head)
        if head.shape != ours["wte"] or not np.array_equal(parameters["wte"].read(), head.read()):
            raise CheckpointError(f"{at}: {layout.head} differs from wte.weight, but {config_name} ties the two")
    return parameters


def _without_wrappers(file: Path, found: Mapping[str, Found]) -> dict[str, Found]:
    """Remove the names of PyTorch's wrappers, which may be in the middle of a name, from the names of tensors."""
    names = {name: _WRAPPERS.sub("", name) for name in found}
    if doubles := [name for name, n in Counter(names.values()).items() if n > 1]:
        both = " and ".join(named(name) for name, plain in names.items() if plain == doubles[0])
        raise CheckpointError(f"{file}: holds {both}, which are two names of one parameter")
    return {plain: found[name] for name, plain in names.items()}


def _check_dtype(file: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in float_dtypes:
        raise CheckpointError(f"{file}: {name} is of dtype {tensor.dtype}; expected {' or '.join(float_dtypes)}")


def _some(names: list[str]) -> str:
    return ", ".join(map(named, names[:3])) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
