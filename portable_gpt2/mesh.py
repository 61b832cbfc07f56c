"""Meshes: one model on several devices, divided by rules that are data.

A mesh has the axes ``data`` and ``model``. Along ``data``, all devices have the same weights, and each computes a part
of the batch. Along ``model``, each device has a part of the weights, and the devices compute each text together. The
adapter turns the rules into placements of its framework, and calls a function on each device (`Backend.on_mesh`); what
the devices tell each other is in `divided`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from . import checks
from .backend import Backend
from .cache import KVCache
from .config import GPT2Config
from .divided import Split
from .host import StoredTensor, lengths
from .params import Params, flatten, nest, shapes
from .random import new_seed

DATA, MODEL = "data", "model"

Spec: TypeAlias = tuple[str | None, ...]
"""For each axis of an array, the axis of the mesh over which it is divided, or None if it is whole on each device."""

_T = TypeVar("_T")
_BLOCK = 1 << 16  # numbers that are sent at a time
_END = -1

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


class MeshError(RuntimeError):
    """Another process of a mesh failed. The message is the message of its error."""


def _message(error: Exception | None) -> bytes:
    return b"" if error is None else (str(error) or type(error).__name__).encode(errors="replace")


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
        self._gather: dict[int, Callable[..., Any]] = {}

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

    @staticmethod
    def rule(path: str) -> Spec | None:
        """Return the rule of a parameter, or None if it is whole on each device."""
        return next((rule for pattern, rule in RULES.items() if fnmatch(path, pattern)), None)

    def spec(self, path: str) -> Spec:
        """Return the spec of a parameter."""
        return self.on(*(self.rule(path) or ()))

    def rows(self, n_vocab: int) -> int:
        """Return the number of rows of wte with padding."""
        n = self.sizes[MODEL]
        return -(-n_vocab // n) * n

    def shape(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape on the mesh of a parameter of the given shape."""
        if path.endswith(("c_attn/w", "c_attn/b")):
            return (*shape[:-1], 3, shape[-1] // 3)
        return (self.rows(shape[0]), *shape[1:]) if path in ("wte", "lm_head") else tuple(shape)

    def place(self, path: str, tensor: StoredTensor, spec: Spec | None = None) -> Any:
        """Return a parameter on the mesh. Each process reads only the parts of its own devices.

        The spec is that of `spec` unless given. A tensor whose parts cannot be read is read whole, once.
        """
        shape = self.shape(path, tensor.shape)
        spec = (self.spec(path) if spec is None else spec) or (None,) * len(shape)
        if tensor.read_part is None:
            a = tensor.read()
            tensor = tensor._replace(read=lambda: a)

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

    # Processes, which all call these functions, and wait for each other in them

    @property
    def is_alone(self) -> bool:
        """Whether one process has all devices."""
        return self.backend.process()[1] == 1

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone writes files and messages."""
        return self.backend.process()[0] == 0

    def of_each(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers that each process gives, by process. All give as many, and each is an int32."""
        backend, axes = self.backend, [name for name, n in self.sizes.items() if n > 1]
        row = np.asarray([backend.process()[0], *numbers], np.int32)
        if self.is_alone:
            return [row[1:].tolist()]

        def gathered(rows: Any) -> Any:
            for along, axis in reversed([*enumerate((DATA, MODEL))]):
                if axis in axes:
                    rows = backend.all_concat(rows, backend.mesh_split(self.own, axis)[1], along)
            return rows

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return np.broadcast_to(row, lengths(index)).copy()

        spec = self.on(DATA, MODEL, None)
        if len(row) not in self._gather:
            self._gather[len(row)] = self.compile(gathered, (spec,), (None, None, None))
        shape = self.sizes[DATA], self.sizes[MODEL], len(row)
        rows = backend.to_numpy(self._gather[len(row)](backend.from_parts(self.own, spec, shape, read)))
        found = {process: each for process, *each in rows.reshape(-1, len(row)).tolist()}
        return [found[process] for process in sorted(found)]

    def agree(self, flag: bool) -> bool:
        """Return whether a flag is true in every process."""
        return all(found for (found,) in self.of_each([flag]))

    def common(self, data: bytes, process: int = 0) -> bytes:
        """Return the bytes that one process gives. The others may give any bytes."""
        if self.is_alone:
            return data
        upper, lower = self.of_each(divmod(len(data), 2**30))[process]
        n, words = upper * 2**30 + lower, np.zeros(0, np.int32)
        given = np.frombuffer(data + bytes(-len(data) % 4), np.int32)
        while 4 * len(words) < n:
            size = min(1 << (-(-n // 4) - len(words) - 1).bit_length(), _BLOCK)  # a function is compiled for each size
            block = np.zeros(size, np.int32)
            part = given[len(words) : len(words) + size]
            block[: len(part)] = part
            words = np.concatenate([words, np.asarray(self.of_each(block.tolist())[process], np.int32)])
        return words.tobytes()[:n]

    def common_seeds(self, n: int) -> list[int]:
        """Return n random seeds, which are the same in all processes."""
        halves = self.of_each([half for _ in range(n) for half in divmod(new_seed(), 2**16)])[0]
        return [2**16 * upper + lower for upper, lower in zip(halves[::2], halves[1::2], strict=True)]

    def check_common(self, what: str, value: object) -> None:
        """Raise an error in all processes if the texts of a value differ between them.

        Raises
        ------
        ValueError
            If they differ. The processes would compute different texts, and wait for each other forever.
        """
        digest = hashlib.sha256(repr(value).encode()).digest()[:8]
        found = self.of_each(np.frombuffer(digest, np.int32).tolist())
        if any(each != found[0] for each in found):
            raise ValueError(
                f"the processes of the mesh were given different {what}; call the same methods with the same "
                f"arguments in all of them"
            )

    def together(self, fn: Callable[[], _T]) -> _T:
        """Return ``fn()``. If it raises an Exception in one process, all processes raise one.

        Raises
        ------
        MeshError
            In the processes in which `fn` raised nothing. The message is that of the first process that failed.
        """
        if self.is_alone:
            return fn()
        error, result = None, None
        try:
            result = fn()
        except Exception as raised:
            error = raised
        failed = [process for process, (flag,) in enumerate(self.of_each([error is not None])) if flag]
        if not failed:
            return cast(_T, result)
        message = self.common(_message(error), failed[0]).decode()
        raise error or MeshError(f"process {failed[0]} of the mesh: {message}")

    def write(self, tensors: Mapping[str, StoredTensor], write: Callable[[Mapping[str, StoredTensor]], None]) -> None:
        """Call `write` with the tensors in process 0. The others help to gather each tensor that it reads.

        If it raises an Exception, the other processes raise a `MeshError`.
        """
        if self.is_alone:
            write(tensors)
        elif self.is_first:
            error = None
            try:
                write({name: self._announced(i, tensor) for i, (name, tensor) in enumerate(tensors.items())})
            except Exception as raised:
                error = raised
            self.of_each([_END])
            self.common(_message(error))
            if error is not None:
                raise error
        else:
            order = list(tensors.values())
            while (i := self.of_each([0])[0][0]) != _END:
                order[i].read()
            if message := self.common(b"").decode():
                raise MeshError(f"process 0 of the mesh: {message}")

    def _announced(self, i: int, tensor: StoredTensor) -> StoredTensor:
        """Return a tensor that tells the other processes its number before it is gathered."""

        def read() -> np.ndarray:
            self.of_each([i])
            return tensor.read()

        return tensor._replace(read=read, read_part=None)

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
        return self._reshaped(params, lambda shape: (*shape[:-2], shape[-2] * shape[-1]))

    def divided(self, params: Params) -> Params:
        """Undo `local`."""
        return self._reshaped(params, lambda shape: (*shape[:-1], 3, shape[-1] // 3))

    def _reshaped(self, params: Params, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Params:
        """Return the parameters with another shape of c_attn."""
        backend = self.backend
        found = {}
        for path, x in flatten(params):
            is_joined = path.endswith(("c_attn/w", "c_attn/b"))
            found[path] = backend.xp.reshape(x, shape(backend.shape(x))) if is_joined else x
        return nest(found)

    def sum_along(self, x: Any, axis: str) -> Any:
        """Return the sum of x over the devices along an axis, in a function that runs on each device."""
        return self.backend.all_sum(x, self.backend.mesh_split(self.own, axis)[1])
