"""Export a model as a graph: a file such as ``gpt2.onnx``, which other programs run without Python.

The backends that can write graphs register in the entry-point group ``portable_gpt2.graphs``, by the suffix of the
files. The functions below are the ones that they trace.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from . import checks
from .backend import Backend
from .cache import KVCache
from .checkpoint import cast
from .config import GPT2Config
from .files import already_exists, holds_file, replacing
from .host import StoredTensor, float_dtypes
from .model import gpt2, head, transformer
from .params import nest
from .registry import BackendNotInstalled, available_backends, backend_of, get_backend, how_to_install

ENTRY_POINTS = "portable_gpt2.graphs"
LARGEST = 2_000_000_000
"""From this number of bytes on, the weights are in a file of their own: a file of ONNX has less than 2 GiB."""

Shape = tuple[int | str, ...]


class Graph(NamedTuple):
    """A function to export. A length that is a name, such as ``batch``, may differ from run to run."""

    fn: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    """Takes the parameters by path and the inputs by name, and returns the outputs by name."""
    inputs: dict[str, tuple[str, Shape]]
    """The dtype and the shape of each input."""
    outputs: dict[str, Shape]


def logits_graph(config: GPT2Config, dtype: str) -> Graph:
    """Return the graph of `gpt2` without a cache: from tokens to the logits after each of them."""

    def fn(params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        return {"logits": gpt2(nest(params), inputs["tokens"], config)[0]}

    return Graph(fn, {"tokens": ("int64", ("batch", "seq"))}, {"logits": ("batch", "seq", config.n_vocab)})


def step_graph(config: GPT2Config, dtype: str) -> Graph:
    """Return the graph of `gpt2` with a cache: from tokens to the logits after the last one, and the extended cache.

    The state, which consists of the position and of the buffers of each layer, is an input and an output. The order of
    the inputs and of the outputs is the same.
    """
    paths = [(f"h{i}/attn/k", f"h{i}/attn/v") for i in range(config.n_layer)]

    def fn(params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        tokens, tree = inputs["tokens"], nest(params)
        k, v = zip(*[(inputs[k], inputs[v]) for k, v in paths], strict=True)
        h, cache = transformer(tree, tokens, config, KVCache(k, v, inputs["position"]))
        assert cache is not None
        backend = backend_of(tokens)
        last = backend.arange(backend.shape(tokens)[1], like=tokens)[-1:]
        logits = head(tree, backend.xp.take(h, last, axis=1))[:, 0, :]
        buffers = chain.from_iterable(zip(cache.k, cache.v, strict=True))
        return {"logits": logits, **dict(zip(map(_next, state), (cache.position, *buffers), strict=True))}

    buffer = ("batch", config.n_head, "capacity", config.head_size)
    state: dict[str, tuple[str, Shape]] = {"position": ("int64", ())}
    state.update((path, (dtype, buffer)) for path in chain.from_iterable(paths))
    return Graph(
        fn,
        {"tokens": ("int64", ("batch", "seq")), **state},
        {"logits": ("batch", config.n_vocab), **{_next(name): shape for name, (_, shape) in state.items()}},
    )


def _next(name: str) -> str:
    """Return the name of an output that takes the place of an input in the next run."""
    return f"next/{name}"


GRAPHS: dict[str, Callable[[GPT2Config, str], Graph]] = {"logits": logits_graph, "step": step_graph}


def export(
    path: str | os.PathLike[str],
    config: GPT2Config,
    tensors: Mapping[str, StoredTensor],
    *,
    what: str = "logits",
    dtype: str | None = None,
    external_data: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write a model as a graph. The file appears complete or not at all. `GPT2.export` describes the arguments.

    `tensors` are the parameters by path; each is read just before it is written. Return the files that were written:
    that of the graph, and that of the weights if they are in a file of their own.
    """
    file = checks.path("path", path)
    if what not in GRAPHS:
        raise ValueError(f"what is {checks.shown(what)}; expected {' or '.join(map(repr, GRAPHS))}")
    force, external_data = checks.flag("force", force), checks.flag("external_data", external_data)
    backend = _writer(file)
    dtype = next(iter(tensors.values())).dtype if dtype is None else dtype
    backend.dtype(dtype)
    graph = GRAPHS[what](config, dtype)
    n_bytes = float_dtypes[dtype].itemsize * sum(math.prod(tensor.shape) for tensor in tensors.values())
    data = file.with_name(f"{file.name}.data") if external_data or n_bytes > LARGEST else None
    properties = {"what": what, "config": json.dumps(config.to_dict())}
    written = [file] if data is None else [file, data]
    with contextlib.ExitStack() as stack:
        drafts = [stack.enter_context(replacing(each)) for each in written]
        for each in written:
            if holds_file(each) and not force:
                raise already_exists(each)
        with contextlib.ExitStack() as opened:
            out, *weights = (opened.enter_context(draft.open("wb")) for draft in drafts)
            backend.write_graph(
                graph.fn,
                {name: cast(name, tensor, dtype) for name, tensor in tensors.items()},
                graph.inputs,
                graph.outputs,
                out,
                (data.name, weights[0]) if data is not None else None,
                properties,
            )
        if data is not None:  # the weights appear first, and must not appear next to the graph of another model
            Path(os.path.realpath(file)).unlink(missing_ok=True)
    return written


def _writer(file: Path) -> Backend:
    """Return the backend that writes files with the suffix of a file."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    suffix = file.suffix.removeprefix(".")
    if suffix not in points:
        known = " or ".join(f".{name}" for name in sorted(points))
        raise ValueError(f"{file}: the format of a graph follows from the suffix of its name; expected {known}")
    name = points[suffix].load()
    if name not in available_backends():
        how = how_to_install(name, suffix)
        raise BackendNotInstalled(f"{file}: writing it takes {name}, which is not installed: {how}")
    return get_backend(name)
