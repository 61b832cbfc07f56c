"""The abstract interface between the portable code and an array framework.

A backend is an array-API namespace plus the few services that the standard lacks. Everything in this package computes
through one; what a framework does differently is written in its adapter and nowhere else. `registry` finds backends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np


class Backend:
    """What the portable code asks of an array framework.

    An adapter subclasses this and overrides what its framework does differently. `name`, `array_types`, `xp`,
    `dtypes`, `devices`, `device`, `from_numpy` and `to_numpy` have no sensible default; the rest has one.

    Parameters
    ----------
    device : str or the framework's own device object, optional
        Where arrays made by this backend live; None leaves the choice to the framework.

    Raises
    ------
    ValueError
        If there is no such device. The message lists those that there are.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> backend = pg.get_backend("numpy")
    >>> x = backend.from_numpy(np.asarray([1.0, 4.0]), "float32", device="cpu")
    >>> backend.xp.sqrt(x), backend.dtype_name(x), backend.device(x)
    (array([1., 2.], dtype=float32), 'float32', 'cpu')
    """

    name: ClassVar[str]
    """What the backend is called: its framework's top-level module."""

    array_types: ClassVar[tuple[type, ...]]
    """The classes whose instances are this backend's arrays.

    An instance of a subclass is one where the framework itself defines the subclass, as it does for its tracers and
    parameters (see `owns`). Others are refused by name: in a subclass, ``*`` may be another product, and values may be
    hidden or have a unit.
    """

    plain: ClassVar[str] = "numpy.asarray(x)"
    """How to make an array of `array_types` of an instance of a subclass, as code for an error message."""

    xp: ClassVar[Any]
    """The array-API namespace over the framework's own arrays: no wrapper class goes in or comes out."""

    kernels: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """The framework's own implementations of portable ops, by the op's name and with its signature.

    The arrays that reach a kernel belong to this backend and their float dtypes are equal; nothing else has been
    checked, of an op of one array not even that it is of floats. A kernel returns NotImplemented for a shape, dtype or
    axis that it does not take, malformed ones included, and the definition, with its checks, runs instead. Where it
    fails, the checks run before its exception goes on.
    """

    compiles_per_shape: ClassVar[bool] = False
    """Whether `compile` compiles again for each new shape of an argument, so that callers should pad to few sizes."""

    handwritten_gradient_is_faster: ClassVar[bool] = False
    """Whether the functions of `gradients` take less time than `value_and_grad` inside a compiled function."""

    dtypes: ClassVar[Mapping[str, Any]]
    """The framework's floating dtypes by name: float32, and those of float64, bfloat16, float16 that it has."""

    def __init__(self, device: Any = None) -> None:
        self.default_device = None if device is None else self.resolve_device(device)
        self._dtype_names = {dtype: name for name, dtype in self.dtypes.items()}
        self._frameworks = {kind.__module__.partition(".")[0] for kind in self.array_types}

    def __repr__(self) -> str:
        where = "" if self.default_device is None else f", device={str(self.default_device)!r}"
        return f"get_backend({self.name!r}{where})"

    def owns(self, kind: type) -> bool:
        """Return whether a class, whose instances are instances of `array_types`, is one of this backend's arrays.

        It is asked once for each class.
        """
        return kind.__module__.partition(".")[0] in self._frameworks

    def refusal(self, x: Any) -> str | None:
        """Return why an array of this backend cannot be computed with, such as a sparse one, and what to do; else None.

        It is asked where the definition of an op is about to run: for want of a kernel, or because the kernel failed.
        """
        return None

    # Shapes and dtypes

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape of x as a tuple; a dimension unknown while tracing is a scalar array (`shape_list`)."""
        return tuple(x.shape)

    def is_empty(self, x: Any) -> bool:
        """Return whether x is known to hold no element."""
        return any(isinstance(n, int) and n == 0 for n in self.shape(x))

    def dtype(self, name: str) -> Any:
        """Return the framework's floating dtype of that name, 16-bit ones included, which the standard does not know.

        Raises
        ------
        ValueError
            If the framework has no such dtype. The message lists those that it has.
        """
        try:
            return self.dtypes[name]
        except (KeyError, TypeError):
            said = f"{name!r:.80}" if isinstance(name, str) else f"that is a {type(name).__name__}"
            raise ValueError(
                f"backend {self.name!r} has no floating dtype {said}; choose one of {', '.join(self.dtypes)}"
            ) from None

    def host_array(self, a: np.ndarray, dtype: str | None = None) -> np.ndarray:
        """Return a in native byte order, converted to the dtype of that name; a itself where it is so already."""
        if dtype is None:
            return a.astype(a.dtype.newbyteorder("="), copy=False)
        self.dtype(dtype)  # refuses a name that this framework does not know
        return a.astype(getattr(ml_dtypes, dtype, None) or dtype, copy=False)

    def dtype_name(self, x: Any) -> str | None:
        """Return the name of x's floating dtype, or None if it is not one of float16 to float64."""
        return self._dtype_names.get(x.dtype)

    def is_floating(self, x: Any) -> bool:
        """Return whether x is of a floating dtype that the portable code computes with."""
        return x.dtype in self._dtype_names

    # Integers that are looked up by

    def index(self, ids: Any) -> Any:
        """Return integers in a signed dtype that `xp.take` takes; from 2**63 on they become negative."""
        return self.xp.astype(ids, self.xp.int64)

    def is_readable(self, x: Any) -> bool:
        """Return whether the values of x can be read at once: not those of a tracer, nor those on an accelerator.

        Ids are checked where they can be read, and elsewhere an id out of range makes a NaN. So the answer must depend
        on what x is and where it lives, and not on what is still being computed.
        """
        return False

    def span(self, ids: Any) -> tuple[int, int] | None:
        """Return the least and the largest of integers, (0, -1) of none, where they can be read; else None."""
        if not self.is_readable(ids):
            return None
        values = self.to_numpy(ids)
        return (int(values.min()), int(values.max())) if values.size else (0, -1)

    # Devices

    def devices(self) -> Mapping[str, Any]:
        """Return the devices that there are: the framework's own objects by names such as ``cpu``, ``cuda:0``."""
        raise NotImplementedError

    def resolve_device(self, device: Any) -> Any:
        """Return the framework's own object for a device; such an object itself is returned as it is.

        A name may have ``:0`` at its end or lack it. An adapter that takes other objects or names overrides this
        method, and calls it for all that it does not know.

        Raises
        ------
        ValueError
            If there is no such device, or if its arrays would have shapes and no values. The message lists the devices.
        """
        devices = self.devices()
        if isinstance(device, str):
            for name in (device, f"{device}:0", device.removesuffix(":0")):
                if name in devices:
                    return devices[name]
        with contextlib.suppress(Exception):  # whatever the framework says of an object of another kind
            if device in devices.values():
                return device
        said = f"{device!r:.80}" if isinstance(device, str) else f"that is a {type(device).__name__}"
        raise ValueError(f"backend {self.name!r} has no device {said}; the devices here are {', '.join(devices)}")

    def device(self, x: Any) -> str:
        """Return where x lives, as one of the strings of `devices`."""
        raise NotImplementedError

    def part_size(self, x: Any) -> int | None:
        """Return of about how many tokens at a time a gradient is best taken where x is; None for all at once.

        Large arrays that are freed on a CPU go back to the system, unless the framework keeps them, and to take them
        again costs page faults; small parts use the same memory again.
        """
        return 1024 if self.device(x).startswith("cpu") else None

    def placement(self, x: Any) -> Any:
        """Return the device of x as `resolve_device` returns it, or a sharding that replicates over its devices."""
        return x.device

    def on(self, device: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which everything computed lives on device (None: wherever its inputs live).

        Only a framework that computes on its default device wherever the inputs live needs to do anything here.
        """
        return contextlib.nullcontext()

    # To and from the host

    def from_numpy(self, a: np.ndarray, dtype: str | None = None, device: Any = None) -> Any:
        """Return a NumPy array as this framework's, on device or else on the backend's default device.

        The conversion to dtype is done on the host, so that the bits are the same on every backend; where the
        framework can, nothing is copied. The result may share memory with a writeable a.

        Raises
        ------
        TypeError
            If the framework would silently narrow the dtype. The message names the switch that permits it.
        """
        raise NotImplementedError

    def to_numpy(self, x: Any) -> np.ndarray:
        """Return x on the host, where nothing need be copied as a view; bfloat16 becomes ml_dtypes' bfloat16."""
        raise NotImplementedError

    def read_checkpoint(self, path: str) -> Mapping[str, Any]:
        """Return the contents of a file of the framework's own format by name, each tensor as a `StoredTensor`.

        Where the file nests objects, so does the result: dicts, lists, numbers and strings stand where they do there.

        Optional. An adapter that has it says which files it is for in the entry-point group
        ``portable_gpt2.checkpoints``: the name of an entry point is the backend's, its value a tuple of patterns of
        file names (as `fnmatch` understands them), in a module that imports no framework. No file is to be executed.
        What is raised, here or by a tensor's `read`, may be any Exception: the caller says which file it was. The text
        of a `CheckpointError` is shown as it is.
        """
        raise NotImplementedError

    # What the standard lacks

    def arange(self, n: Any, *, like: Any) -> Any:
        """Return the integers 0 to n - 1 on like's device, with its sharding; n may be a scalar array."""
        return self.xp.arange(n, device=like.device)

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        """Return zeros of like's dtype, on its device, with its sharding."""
        return self.xp.zeros(shape, dtype=like.dtype, device=like.device)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        """Return buffer [..., capacity, d] with rows start to start + n - 1 replaced by value [..., n, d].

        It may reuse buffer's memory, so only the result may be read. It is not differentiable. The caller has checked
        that start + n is at most capacity.
        """
        buffer[..., start : start + self.shape(value)[-2], :] = value
        return buffer

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        """Return x [n, d] with each of rows [m, d] added to the row of x that indices [m] names, however often it does.

        It may reuse x's memory, so only the result may be read. The caller has made sure that indices, as `index`
        returns them, are from 0 to n - 1.
        """
        xp = self.xp
        chosen = indices[None, :] == self.arange(self.shape(x)[0], like=indices)[:, None]
        return x + xp.matmul(xp.astype(chosen, x.dtype), rows)

    def split(self, x: Any, n: int) -> Sequence[Any]:
        """Return the n equal parts of x along its last axis, which n divides. They may share x's memory."""
        size = self.shape(x)[-1] // n
        return [x[..., i * size : (i + 1) * size] for i in range(n)]

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes what fn takes and returns its value and its gradient by the first argument.

        Optional: NotImplemented where the framework cannot differentiate. fn returns a scalar array; its first
        argument, and the gradient, are trees of float arrays.
        """
        absent: Any = NotImplemented
        return absent  # type: ignore[no-any-return]

    def fori_loop(self, n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Return what becomes of a state, a tree of arrays, by ``state = body(i, state)`` for i from 0 to n - 1.

        Where this is compiled it may stay a loop, each turn of which uses the same memory; i is traced there.
        """
        for i in range(n):
            state = body(i, state)
        return state

    def relayout(self, path: str, x: Any) -> Any:
        """Return a parameter in the memory layout in which this backend reads it fastest, with equal shape and values.

        A parameter that has this layout already is returned as it is. `path` is its name, such as ``h3/attn/c_attn/w``.
        """
        return x

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        """Return ``functools.partial(fn, *bound)``, compiled where eager code is not already fast.

        The bound arguments are trees of arrays that do not change. The other arguments are trees of arrays and Python
        ints; another int does not cause another compilation. Do not use an argument again that is named in `donate`:
        its memory may have been reused.
        """
        return functools.partial(fn, *bound)
