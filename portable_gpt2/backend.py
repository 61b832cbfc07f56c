"""The abstract interface between the portable code and an array framework.

A backend is an array-API namespace plus the few services that the standard lacks. All portable code computes through
one; every difference between frameworks is in their adapters. `registry` finds backends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np


class Backend:
    """An array framework, as the portable code uses it. An adapter is a subclass.

    - An adapter must define `name`, `array_types`, `xp`, `dtypes` and `devices`.
    - It may define `kernels`, `compiles_per_shape`, `handwritten_gradient_is_faster`; `refusal`; `resolve_device`,
      `device`, `placement`; `put`, `to_numpy`, `peek`, `read_checkpoint`; `shape`, `arange`, `zeros`, `write`,
      `index_add`, `split`; `compile`, `value_and_grad`, `fori_loop`, `relayout`. Each has a default.
    - It inherits the constructor, `default_device`, `dtype_names`, `dtype` and `from_numpy`.

    Parameters
    ----------
    device : str or the framework's own device object, optional
        The device of the arrays that this backend creates; the framework's default device unless given.

    Raises
    ------
    ValueError
        If there is no such device. The message lists the devices.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> backend = pg.get_backend("numpy")
    >>> x = backend.from_numpy(np.asarray([1.0, 4.0]), "float32", device="cpu")
    >>> backend.xp.sqrt(x), backend.dtype_names[x.dtype], backend.device(x)
    (array([1., 2.], dtype=float32), 'float32', 'cpu')
    """

    # An adapter must define these.

    name: ClassVar[str]
    """The backend's name, which is also its framework's top-level module."""

    array_types: ClassVar[tuple[type, ...]]
    """The classes of this backend's arrays; `refusal` may refuse arrays of a subclass."""

    xp: ClassVar[Any]
    """The array-API namespace over the framework's own arrays: no wrapper class goes in or comes out."""

    dtypes: ClassVar[Mapping[str, Any]]
    """The framework's floating dtypes by name: float32, and those of float64, bfloat16, float16 that it has."""

    def devices(self) -> Mapping[str, Any]:
        """Return the framework's own device objects by names such as ``cpu``, ``cuda:0``."""
        raise NotImplementedError

    # An adapter may define these: facts about the framework.

    kernels: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """The framework's own implementations of portable ops, by the op's name and with its signature.

    The arrays that reach a kernel belong to this backend, and their float dtypes are equal. Nothing else has been
    checked; the only array of an op may even have integers. A kernel returns NotImplemented for every shape, dtype or
    axis that it does not take, including malformed ones. The definition, with its checks, runs instead. If a kernel
    raises an exception, the checks run before the exception is raised again.
    """

    compiles_per_shape: ClassVar[bool] = False
    """Whether `compile` compiles again for each new shape of an argument, so that padding saves time."""

    handwritten_gradient_is_faster: ClassVar[bool] = False
    """Whether the functions of `gradients` take less time than `value_and_grad` inside a compiled function."""

    def refusal(self, x: Any) -> str | None:
        """Return why no op computes with x, and what to do instead; None if ops compute with x.

        x is an instance of `array_types`. The answer may depend on the class of x: in a subclass, ``*`` may be another
        product, and values may be hidden or have a unit. By default a subclass is accepted if the package of one of
        `array_types` defines it, as frameworks do for tracers and parameters. The answer may also depend on x itself,
        such as a sparse array. It completes the sentence "x ...", such as "is sparse; give a dense array".
        """
        packages = {kind.__module__.partition(".")[0] for kind in self.array_types}
        if type(x).__module__.partition(".")[0] in packages:
            return None
        return subclass_refusal(self.name, f"{self.array_types[0].__module__}.{self.array_types[0].__qualname__}(x)")

    # Devices

    def resolve_device(self, device: Any) -> Any:
        """Return the framework's own object for a device; such an object itself is returned as it is.

        A name may have ``:0`` at its end or lack it. An adapter that takes other objects or names overrides this
        method, and calls the method of `Backend` for all others.

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
        with contextlib.suppress(Exception):  # another framework's object, whose == may raise
            if device in devices.values():
                return device
        said = f"{device!r:.80}" if isinstance(device, str) else f"that is a {type(device).__name__}"
        raise ValueError(f"backend {self.name!r} has no device {said}; the devices here are {', '.join(devices)}")

    def device(self, x: Any) -> str:
        """Return the name of the device of x, as in `devices`."""
        return next(name for name, device in self.devices().items() if device == x.device)

    def placement(self, x: Any) -> Any:
        """Return the device of x as `resolve_device` returns it, or a sharding that replicates over its devices."""
        return x.device

    # To and from the host

    def put(self, a: np.ndarray, device: Any) -> Any:
        """Return a NumPy array as this framework's, on a device.

        The array has native byte order; the result may share its memory. The device is the framework's own object, or
        None for the framework's default device.

        Raises
        ------
        TypeError
            If the framework would silently narrow the dtype. The message names the switch that permits the dtype.
        """
        return self.xp.asarray(a, device=device)

    def to_numpy(self, x: Any) -> np.ndarray:
        """Return x on the host, as a view if possible; bfloat16 becomes the bfloat16 of ml_dtypes."""
        return np.asarray(x)

    def peek(self, x: Any) -> np.ndarray | None:
        """Return x on the host if its values can be read at once; None for tracers and arrays on an accelerator.

        Where ids can be read, an id out of range raises an error; elsewhere it becomes NaN. Therefore the answer must
        depend on the kind of x and its device, and not on whether x has been computed yet.
        """
        return None

    def read_checkpoint(self, path: str) -> Mapping[str, Any]:
        """Return the contents of a file of the framework's own format by name, each tensor as a `StoredTensor`.

        Nested objects of the file are nested in the result: dicts, lists, numbers and strings.

        Optional. An adapter that has it lists the names of such files in the entry-point group
        ``portable_gpt2.checkpoints``: the name of an entry point is the backend's, its value a tuple of patterns of
        file names (as `fnmatch` understands them), in a module that imports no framework. No file may be executed.
        This method, and the `read` of a tensor, may raise any Exception; the caller adds the name of the file to the
        message. The text of a `CheckpointError` is shown as it is.
        """
        raise NotImplementedError

    # Functions that the array API lacks, or has without shardings

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape of x as a tuple; a dimension unknown while tracing is a scalar array (`shape_list`)."""
        return tuple(x.shape)

    def arange(self, n: Any, *, like: Any) -> Any:
        """Return the integers 0 to n - 1 on the device of `like`, with its sharding; n may be a scalar array."""
        return self.xp.arange(n, device=like.device)

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        """Return zeros of the dtype of `like`, on its device, with its sharding."""
        return self.xp.zeros(shape, dtype=like.dtype, device=like.device)

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        """Return buffer [..., capacity, d] with rows start to start + n - 1 replaced by value [..., n, d].

        The result may use the buffer's memory, so do not read `buffer` afterwards. The function is not
        differentiable. The caller has checked that start + n is at most capacity, unless start is traced.
        """
        buffer[..., start : start + self.shape(value)[-2], :] = value
        return buffer

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        """Return x [n, d] with each row of rows [m, d] added to the row of x that indices [m] names.

        An index may occur several times. The result may use the memory of x, so do not read `x` afterwards. The caller
        has checked that the indices are from 0 to n - 1.
        """
        xp = self.xp
        chosen = indices[None, :] == self.arange(self.shape(x)[0], like=indices)[:, None]
        return x + xp.matmul(xp.astype(chosen, x.dtype), rows)

    def split(self, x: Any, n: int) -> Sequence[Any]:
        """Return the n equal parts of x along its last axis, which n divides. They may share the memory of x."""
        size = self.shape(x)[-1] // n
        return [x[..., i * size : (i + 1) * size] for i in range(n)]

    # Transformations of functions

    def compile(self, fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        """Return ``functools.partial(fn, *bound)``, compiled where eager code is not already fast.

        The bound arguments are trees of arrays that do not change. The other arguments are trees of arrays and Python
        ints; another int does not cause another compilation. Arrays that the function creates are on the device of the
        given arrays. Do not use an argument again that is named in `donate`: its memory may have been reused.
        """
        return functools.partial(fn, *bound)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with the arguments of fn that returns its value and the gradient by its first argument.

        fn returns a scalar array. Its first argument, and the gradient, are trees of float arrays. Optional:
        NotImplemented where the framework cannot differentiate.
        """
        absent: Any = NotImplemented
        return absent  # type: ignore[no-any-return]

    def fori_loop(self, n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Return the state, a tree of arrays, after ``state = body(i, state)`` for i from 0 to n - 1.

        In a compiled function it may remain a loop, whose iterations use the same memory; then i is traced.
        """
        for i in range(n):
            state = body(i, state)
        return state

    def relayout(self, path: str, x: Any) -> Any:
        """Return a parameter in the memory layout in which this backend reads it fastest, with equal shape and values.

        A parameter that has this layout already is returned as it is. `path` is its name, such as ``h3/attn/c_attn/w``.
        """
        return x

    # An adapter inherits these.

    def __init__(self, device: Any = None) -> None:
        self.default_device = None if device is None else self.resolve_device(device)
        self.dtype_names = {dtype: name for name, dtype in self.dtypes.items()}
        """The names of the framework's floating dtypes; others are missing."""

    def __repr__(self) -> str:
        where = "" if self.default_device is None else f", device={str(self.default_device)!r}"
        return f"get_backend({self.name!r}{where})"

    def dtype(self, name: str) -> Any:
        """Return the framework's floating dtype of that name.

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

    def from_numpy(self, a: np.ndarray, dtype: str | None = None, device: Any = None) -> Any:
        """Return a NumPy array as this framework's, on a device, or on the backend's default device.

        The conversion to dtype, a name, is done on the host, so that the bits are the same on every backend. Nothing is
        copied if the framework can share memory; the result may therefore share memory with a writeable `a`.

        Raises
        ------
        ValueError
            If there is no such dtype or device.
        TypeError
            If the framework would silently narrow the dtype. The message names the switch that permits the dtype.
        """
        if dtype is None:
            a = a.astype(a.dtype.newbyteorder("="), copy=False)
        else:
            self.dtype(dtype)
            a = a.astype(getattr(ml_dtypes, dtype, None) or dtype, copy=False)
        return self.put(a, self.default_device if device is None else self.resolve_device(device))


def subclass_refusal(name: str, conversion: str) -> str:
    """Return the answer of `Backend.refusal` for a class that is not defined by the framework itself."""
    return f"is a subclass of {name}'s array, which may compute otherwise; {conversion} is a plain array"
