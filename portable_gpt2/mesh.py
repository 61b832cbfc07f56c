"""Meshes: one model on several devices, divided by rules that are data.

A mesh has the axes ``data`` and ``model``. Along ``data``, all devices have the same weights, and each computes a part
of the batch. Along ``model``, each device has a part of the weights, and the devices compute each text together. The
adapter turns the rules into placements of its framework, and calls a function on each device (`Backend.on_mesh`); what
the devices tell each other is in `divided`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, TypeAlias

import numpy as np

from . import checks
from .backend import Backend
from .cache import KVCache
from .config import GPT2Config
from .divided import Split
from .host import StoredTensor
from .params import Params, flatten, nest, shapes

DATA, MODEL = "data", "model"

Spec: TypeAlias = tuple[str | None, ...]
"""For each axis of an array, the axis of the mesh over which it is divided, or None if it is whole on each device."""

RULES: Mapping[str, Spec] = {
    "*/attn/c_attn/w": (None, None, MODEL),
    "*/attn/c_attn/b": (None, MODEL),
    "*/mlp/c_fc/w": (None, MODEL),
    "*/mlp/c_fc/b": (MODEL,),
    "*/c_proj/w": (MODEL, None),
    "wte": (MODEL, None),
    "lm_head": (MODEL, None),
}
"""How a parameter is divided, by patterns of its path (see `fnmatch`). All other parameters are whole on each device.

On a mesh, the last axis of c_attn is two axes, [3, n_embd], for queries, keys and values: so each device has the
queries, keys and values of the same heads. The rows of wte and lm_head are padded with zeros to a multiple of the
number of devices.
"""


def parse(text: str) -> dict[str, int]:
    """Return the sizes of a mesh's axes from a text such as ``data=2,model=2``.

    Raises
    ------
    ValueError
        If the text is not a list of the axes ``data`` and ``model`` with numbers from 1.

    Examples
    --------
    >>> from portable_gpt2.mesh import parse
    >>> parse("data=2,model=4")
    {'data': 2, 'model': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, n = part.strip().partition("=")
        if name not in (DATA, MODEL) or name in sizes or not n.isdecimal():
            raise ValueError(f"a mesh is {checks.shown(text)}; expected sizes such as data=2,model=2")
        sizes[name] = int(n)
    return sizes


class Mesh:
    """Devices that compute one model.

    Parameters
    ----------
    backend : Backend
        The backend of the devices: JAX or PyTorch.
    mesh : dict or the framework's own mesh
        The sizes of the axes, such as ``{"data": 2, "model": 2}``; or a ``jax.sharding.Mesh`` or a ``DeviceMesh`` with
        axes of these names. An axis that is missing has the size 1.

    Raises
    ------
    ValueError
        If an axis has another name, a size is not at least 1, there are not as many devices, or the backend computes
        on one device only.

    Attributes
    ----------
    sizes : dict
        The sizes of both axes.
    own
        The framework's own mesh.
    """

    def __init__(self, backend: Backend, mesh: Any) -> None:
        self.backend = backend
        found = backend.mesh_sizes(mesh)
        if found is None:
            if not isinstance(mesh, Mapping):
                raise TypeError(
                    f"mesh is {checks.shown(mesh)}; expected sizes such as {{'data': 2, 'model': 2}}, or a mesh of "
                    f"{backend.name}"
                )
            found = {name: checks.integer(f"the mesh's axis {name}", n, 1) for name, n in mesh.items()}
        if not found or not set(found) <= {DATA, MODEL}:
            raise ValueError(f"the mesh has the axes {', '.join(found) or 'of no name'}; expected data and model")
        self.own = mesh if backend.mesh_sizes(mesh) is not None else backend.mesh(found)
        self.sizes = {DATA: 1, MODEL: 1, **found}
        self._names = set(found)
        self._all_true: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return ",".join(f"{name}={n}" for name, n in self.sizes.items())

    def check(self, config: GPT2Config) -> None:
        """Refuse a mesh over which the heads, or the features of the mlp, cannot be divided."""
        n = self.sizes[MODEL]
        for what, length in (("n_head", config.n_head), ("n_inner", config.n_hidden)):
            if length % n:
                both = math.gcd(config.n_head, config.n_hidden)
                fit = [str(m) for m in range(1, both + 1) if both % m == 0]
                raise ValueError(
                    f"the mesh has model={n}, which does not divide {what} = {length}; use {' or '.join(fit)}"
                )

    # Arrays that are divided

    def on(self, *axes: str | None) -> Spec:
        """Return a spec, in which axes that the mesh does not have are None."""
        return tuple(axis if axis in self._names else None for axis in axes)

    def spec(self, path: str) -> Spec:
        """Return the spec of a parameter."""
        rule = next((rule for pattern, rule in RULES.items() if fnmatch(path, pattern)), None)
        return () if rule is None else self.on(*rule)

    def rows(self, n_vocab: int) -> int:
        """Return the number of rows of wte with padding."""
        n = self.sizes[MODEL]
        return -(-n_vocab // n) * n

    def shape(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape on the mesh of a parameter of the given shape."""
        if path.endswith(("c_attn/w", "c_attn/b")):
            return (*shape[:-1], 3, shape[-1] // 3)
        return (self.rows(shape[0]), *shape[1:]) if path in ("wte", "lm_head") else tuple(shape)

    def place(self, path: str, tensor: StoredTensor) -> Any:
        """Return a parameter on the mesh. Each process reads only the parts of its own devices."""
        shape = self.shape(path, tensor.shape)
        spec = self.spec(path) or (None,) * len(shape)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if path.endswith(("c_attn/w", "c_attn/b")):
                *start, which, columns = index
                d = shape[-1]
                return np.stack(
                    [
                        tensor.part((*start, slice(i * d + columns.start, i * d + columns.stop)))
                        for i in range(which.start, which.stop)
                    ],
                    axis=-2,
                )
            if path in ("wte", "lm_head"):
                rows, *rest = index
                end = min(rows.stop, tensor.shape[0])
                a = tensor.part((slice(min(rows.start, end), end), *rest))
                return np.pad(a, ((0, rows.stop - rows.start - len(a)), (0, 0)))
            return tensor.part(index)

        return self.backend.from_parts(self.own, spec, shape, read)

    def stored(self, path: str, x: Any, shape: Sequence[int]) -> StoredTensor:
        """Return a parameter of the mesh as a tensor of its own shape, which is gathered when it is read."""
        backend = self.backend

        def read() -> np.ndarray:
            a = backend.to_numpy(x)
            return a[: shape[0]] if path in ("wte", "lm_head") else a.reshape(shape)

        return StoredTensor(tuple(shape), str(backend.dtype_names[x.dtype]), read)

    def params_spec(self, config: GPT2Config) -> Params:
        """Return the specs of all parameters, as a tree."""
        return nest({path: self.spec(path) for path in shapes(config)})

    def cache_spec(self, n_layer: int, axis: str | None, padded: bool) -> KVCache:
        """Return the specs of a cache whose batch is divided over an axis, or whole on each device."""
        buffers = (self.on(axis, MODEL, None, None),) * n_layer
        return KVCache(buffers, buffers, (), self.on(axis) if padded else None)

    def batch_axis(self, batch: int) -> str | None:
        """Return the axis over which a batch of this size is divided; None if each device computes all of it."""
        return DATA if batch % self.sizes[DATA] == 0 else None

    def put(self, a: np.ndarray, *axes: str | None) -> Any:
        """Return an array of the host on the mesh, with the axes that `on` takes."""
        return self.backend.from_parts(self.own, self.on(*axes), a.shape, lambda index: np.ascontiguousarray(a[index]))

    # Processes

    def agree(self, flag: bool) -> bool:
        """Return whether a flag is true in every process. All processes call this, and each waits for the others."""
        if self.backend.process()[1] == 1:
            return flag
        if self._all_true is None:
            axes = [name for name, n in self.sizes.items() if n > 1]

            def total(flags: Any) -> Any:
                for axis in axes:
                    flags = self.backend.all_sum(flags, self.backend.mesh_split(self.own, axis)[1])
                return flags

            self._all_true = self.compile(total, (self.on(DATA, MODEL),), (None, None))
        shape = self.sizes[DATA], self.sizes[MODEL]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return np.full([each.stop - each.start for each in index], flag, np.int32)

        flags = self.backend.from_parts(self.own, self.on(DATA, MODEL), shape, read)
        return int(self.backend.to_numpy(self._all_true(flags))[0, 0]) == math.prod(shape)

    # Functions that run on each device

    def compile(
        self, fn: Callable[..., Any], specs: Any, results: Any, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Return `fn`, called on each device with its parts of the arguments (see `Backend.on_mesh`)."""
        return self.backend.on_mesh(fn, self.own, specs, results, donate=donate)

    def split(self, n_vocab: int) -> Split:
        """Return how the model is divided, in a function that runs on each device."""
        n = self.sizes[MODEL]
        return Split(n, *self.backend.mesh_split(self.own, MODEL), n_vocab) if n > 1 else Split(n_vocab=n_vocab)

    def local(self, params: Params) -> Params:
        """Return the parameters of a device in the shapes that `model` needs: c_attn has one last axis again."""
        backend = self.backend
        found = {}
        for path, x in flatten(params):
            if path.endswith(("c_attn/w", "c_attn/b")):
                *start, three, d = backend.shape(x)
                x = backend.xp.reshape(x, (*start, three * d))
            found[path] = x
        return nest(found)
