"""The abstract interface between the portable code and an array framework.

A backend is an array-API namespace plus the few services that the standard lacks. Portable code calls a framework only
through its backend; everything that differs between frameworks is in their adapters. The module `registry` finds
backends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

from .host import Enclosure, StoredTensor
from .numerics import Numerics


class Backend:
    """An array framework, as the portable code uses it. An adapter is a subclass.

    - An adapter must define `name`, `array_types`, `xp`, `dtypes` and `devices`.
    - It may define `numerics`, `kernels`, `compiles_per_shape`, `handwritten_gradient_is_faster`; `refusal`;
      `resolve_device`, `device`, `placement`; `put`, `to_numpy`, `peek`, `read_checkpoint`; `shape`, `arange`, `zeros`,
      `write`, `index_add`, `split`; `compile`, `value_and_grad`, `while_loop`, `for_each`, `relayout`, `write_graph`;
      `runs_ahead`, `fetch`, `top_k`, `gumbel`, `permit_64_bits`; `process`, `mesh`, `mesh_sizes`, `from_parts`,
      `on_mesh`, `all_sum`, `all_sum_part`, `all_max`, `all_concat`, `all_copy`; `enclosure`, `working_precision`. Each
      has a default.
    - It inherits the constructor, `default_device`, `dtype_names`, `dtype` and `from_numpy`.

    Four rules hold for all members:

    - **Refusals.** A method raises a TypeError if an object has the wrong type or dtype: it is not an array, belongs to
      another framework, has integers where floats are expected, or has a dtype that the framework lacks or would
      narrow. It raises a ValueError if a name, a device, a shape or a value is wrong.
    - **Trees.** A tree is an array, an int or None, or a dict, list, tuple or NamedTuple of trees, to any depth. The
      keys of a dict are strings. A result has the same containers as the tree that it stands for, and dicts keep the
      order of their keys or are sorted.
    - **Devices.** If `devices` has one entry, arrays need no attribute ``device``, and functions of `xp` need no
      keyword ``device``, because the defaults use neither. With several devices, the defaults use both. Operators and
      functions of `xp` may compute on the framework's default device, as TensorFlow's do outside of compiled functions;
      a method that creates or writes arrays, and a compiled function, must not.
    - **Lazy arrays.** A framework may compute an array when its values are needed. `to_numpy`, `peek` and `fetch` wait
      for the values. A result is computed from the values that its arguments have when the function is called, even
      if `write` or a compiled function uses their memory again before the result is needed.

    Token ids that portable code makes are int32 arrays; ops take ids of every integer dtype. Ids and positions are
    converted to ``xp.int64`` before they are used as indices, which may be a narrower dtype in a framework that has no
    int64.

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
    """The array-API namespace. Its functions take and return the framework's own arrays, without a wrapper class.

    Portable code uses the dtypes ``float32``, ``float64``, ``int32`` and ``int64`` as attributes of the namespace, and
    only these functions, with these arguments and keywords (a default need not exist):

    - ``exp(x)``, ``log(x)``, ``sqrt(x)``, ``tanh(x)``;
    - ``max(x, axis=-1, keepdims=True)``, ``mean(x, axis=-1, keepdims=True)``, ``sum(x, axis=-1, keepdims=True)``, also
      without keywords, and ``sum`` with a tuple of axes; ``cumulative_sum(x, axis=-1)``;
    - ``matmul(x, y)`` of matrices with the same leading axes, or none; ``matrix_transpose(x)``,
      ``permute_dims(x, axes)``, ``reshape(x, shape)``, ``concat(arrays, axis=-1)`` of a list or tuple;
    - ``take(x, indices, axis=0)`` with a vector of int32 or int64, and ``take_along_axis(x, indices, axis=-1)`` with
      int64; the indices are never negative;
    - ``where(condition, x, y)``, in which x or y may be a Python number that takes the dtype of the other;
    - ``astype(x, dtype, copy=False)``, also without the keyword; ``isdtype(dtype, kind)`` with the kinds
      ``"integral"`` and ``"bool"``, which may raise a TypeError for a dtype that is neither;
    - ``bitwise_right_shift(x, n)`` of int64 and a Python int.

    The defaults of `put`, `arange`, `zeros` and `top_k` also use ``asarray(a, device=device)``,
    ``arange(n, device=device)``, ``zeros(shape, dtype=dtype, device=device)`` and ``argsort(x, axis=-1)``.

    Arrays support ``+ - * /``, ``**``, ``-x``, ``abs``, comparisons, ``& |`` of bools, and ``& ^`` of integers. The
    operands are arrays of one dtype, or a Python number on either side, which does not change the dtype. An index is
    made of ints, slices, ``None`` and ``...``; an int may be traced. Arithmetic of int64 wraps around. 16-bit arrays
    are only added, moved, indexed and converted. `portable_gpt2.testing.contract.namespace` has examples of all of
    these.
    """

    dtypes: ClassVar[Mapping[str, Any]]
    """The framework's floating dtypes by name: float32, and float64, bfloat16 and float16 if it has them."""

    def devices(self) -> Mapping[str, Any]:
        """Return the framework's own device objects by names such as ``cpu``, ``cuda:0``."""
        raise NotImplementedError

    # An adapter may define these: facts about the framework.

    numerics: ClassVar[Mapping[str, Mapping[str, Numerics]]] = {}
    """The errors of exp, tanh and log, by kind of device (``cpu``, ``cuda``) and by dtype (float32, float64).

    The bounds on the errors of the ops are derived from them. A function without a stated error is assumed to err by at
    most 1 ulp.
    """

    kernels: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """The framework's own implementations of portable ops, by the op's name and with its signature.

    The arrays that reach a kernel belong to this backend, and their float dtypes are equal. Nothing else has been
    checked: if the op has only one array, even an integer array reaches the kernel. A kernel returns NotImplemented for
    every shape, dtype or axis that it does not support, valid or not. The op's checks and its portable definition then
    run instead. If a kernel raises an exception, the checks run before the exception is raised again.

    A kernel keeps the promises of the op's docstring and of its definition:

    - It changes none of its arguments. The result has the float dtype of the arguments.
    - It takes arrays of any memory layout, with zero or more leading axes and with axes of length 0.
    - Its error is within the bound of the op. A 16-bit result is computed in float32 at least and rounded once; only
      attention may round its weights as well.
    - ``conv1d`` returns the same bits if w has the shape [1, nx, nf] instead of [nx, nf], or if all leading axes of x
      are reshaped into one.
    - ``softmax`` makes a row that has NaN or +inf, or only -inf, NaN as a whole, and no other row.
    - ``attention`` gives a hidden key the weight 0. If none of the visible keys of a query has a score above -inf, the
      row of this query is NaN.
    - ``embed`` returns the bits of the rows. ``embed`` and ``cross_entropy`` take ids of every integer dtype.
    - An id that is out of range never stands for another row, as it would if it counted from the end or wrapped
      around. The result is NaN: in the row of this id (``embed``), or as a whole (``cross_entropy``). If `peek` returns
      the ids, the kernel returns NotImplemented instead, and the definition raises a ValueError.
    - A kernel can be compiled and differentiated if the backend can do so.
    """

    compiles_per_shape: ClassVar[bool] = False
    """Whether `compile` compiles again for each new shape of an argument, so that padding saves time."""

    handwritten_gradient_is_faster: ClassVar[bool] = False
    """Whether, on a CPU, the functions of `gradients` take less time than `value_and_grad` in a compiled function."""

    def refusal(self, x: Any) -> str | None:
        """Return the reason why ops refuse x, with a remedy; None if ops accept x.

        x is an instance of `array_types`. A subclass may be refused, because its operations may mean something else:
        ``*`` may be a matrix product, elements may be masked, or values may have units. By default a subclass is
        accepted if it is defined in the package of one of `array_types`, such as a framework's tracers and parameters.
        An array may also be refused for a property of its own, such as a sparse format. The returned text continues a
        sentence that begins with the name of x, such as "is sparse; give a dense array".
        """
        packages = {kind.__module__.partition(".")[0] for kind in self.array_types}
        if type(x).__module__.partition(".")[0] in packages:
            return None
        return subclass_refusal(self.name, f"{self.array_types[0].__module__}.{self.array_types[0].__qualname__}(x)")

    # Devices

    def resolve_device(self, device: Any) -> Any:
        """Return the framework's own object for a device name; a device object is returned unchanged.

        The suffix ``:0`` of a name is optional. An adapter that accepts further objects or names overrides this
        method, and calls the method of `Backend` for all other devices.

        Raises
        ------
        ValueError
            If there is no such device, or if arrays on it would have no values (PyTorch's ``meta``). The message lists
            the devices.
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
        devices = self.devices()
        return next(name for name, device in devices.items() if len(devices) == 1 or device == x.device)

    def placement(self, x: Any) -> Any:
        """Return the framework's device object of x. If x is sharded, return a sharding that replicates an array.

        `from_numpy` takes the result as a device, even if x is traced; then it may be None.
        """
        device, *others = self.devices().values()
        return x.device if others else device

    def _options(self, device: Any) -> dict[str, Any]:
        """Return the keyword argument with which functions of `xp` create an array on a device."""
        return {} if device is None or len(self.devices()) == 1 else {"device": device}

    # To and from the host

    def put(self, a: np.ndarray, device: Any) -> Any:
        """Convert a NumPy array to an array of this framework on a device.

        The NumPy array has native byte order; the result may share its memory. It may have any memory layout, negative
        strides among them, and may be read-only. The device is the framework's own object, or None for the framework's
        default device.

        Raises
        ------
        TypeError
            If the framework lacks the dtype or would silently narrow it. The message names the switch that permits the
            dtype, if there is one.
        """
        return self.xp.asarray(a, **self._options(device))

    def to_numpy(self, x: Any) -> np.ndarray:
        """Return x on the host, as a view if possible; bfloat16 becomes the bfloat16 of ml_dtypes.

        The result has the present values of x. They may change when x itself is written to: by `write` or `index_add`,
        or by a compiled function to which x is donated. Nothing else changes them.
        """
        return np.asarray(x)

    def peek(self, x: Any) -> np.ndarray | None:
        """Return x on the host if its values can be read immediately; None for a tracer or an array on an accelerator.

        If ids can be read, `embed` raises an error for an id that is out of range; otherwise, its result for this id
        is NaN. Therefore, whether this method returns None must depend on the class and the device of x, and not on
        whether x has been computed yet.
        """
        return None

    def read_checkpoint(self, path: str) -> Mapping[str, Any]:
        """Read a file in the framework's own format. Return its contents, with a `StoredTensor` for each tensor.

        The result is nested as the file is: it has the file's dicts and lists of tensors, numbers and strings.

        This method is optional. An adapter that defines it also registers an entry point in the group
        ``portable_gpt2.checkpoints``. The entry point's name is the name of the backend. Its value is a tuple of
        patterns of file names, as `fnmatch` understands them, in a module that imports no framework. The method must
        not execute code from a file. It may raise any Exception, and so may the `read` of a tensor; the caller adds the
        name of the file to the message, and shows the text of a `CheckpointError` unchanged.
        """
        raise NotImplementedError

    # Functions that the array API lacks, or that must also handle sharded arrays

    def shape(self, x: Any) -> tuple[Any, ...]:
        """Return the shape of x as a tuple; a dimension unknown while tracing is a scalar array."""
        return tuple(x.shape)

    def arange(self, n: Any, *, like: Any) -> Any:
        """Return the integers 0 to n - 1 on the device of `like`; n may be a scalar array.

        If `like` is sharded over several devices, each of them gets the whole array.
        """
        return self.xp.arange(n, **self._options(self.placement(like)))

    def zeros(self, shape: tuple[int, ...], *, like: Any) -> Any:
        """Return zeros of the dtype of `like`, on its device.

        If `like` is sharded over several devices, each of them gets the whole array.
        """
        return self.xp.zeros(shape, dtype=like.dtype, **self._options(self.placement(like)))

    def write(self, buffer: Any, value: Any, start: Any) -> Any:
        """Return buffer [..., capacity, d] with rows start to start + n - 1 replaced by value [..., n, d].

        The result may use the buffer's memory, so do not read `buffer` afterwards. The function is not
        differentiable. `start` may be an array or traced. It is at least 0, and start + n is at most capacity.
        """
        buffer[..., start : start + self.shape(value)[-2], :] = value
        return buffer

    def index_add(self, x: Any, indices: Any, rows: Any) -> Any:
        """Return x [n, d] with row i of rows [m, d] added to row indices[i] of x, for each i.

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
        """Return ``functools.partial(fn, *bound)``, compiled if the framework's eager code is slow.

        The bound arguments are trees of arrays that do not change. The other arguments are trees of arrays and Python
        ints. Their values must not be baked in: an int may become an array of integers in the function, and then does
        not cause another compilation when its value changes. Arrays that the function creates are on the device of the
        given arrays. The result is a tree, too. After the call, do not use the arguments that are named in `donate`:
        their memory may have been reused. No other argument changes.
        """
        return functools.partial(fn, *bound)

    def value_and_grad(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes the arguments of `fn`, and returns the value and the gradient of `fn`.

        `fn` returns a scalar array. The gradient is with respect to the first argument. Gradient and argument are trees
        of float arrays. If the framework cannot differentiate, this method returns NotImplemented.
        """
        absent: Any = NotImplemented
        return absent  # type: ignore[no-any-return]

    def while_loop(self, condition: Callable[[Any], Any], body: Callable[[Any], Any], state: Any) -> Any:
        """Return the state, a tree of arrays and ints, after ``state = body(state)`` as long as the condition is true.

        In a compiled function, an adapter need not unroll the loop: iterations then use the same memory, and the state
        is traced. The default is a loop in Python, whose condition must not depend on traced arrays. A condition that
        depends on them occurs only if `runs_ahead` is true and `compiles_per_shape` as well.
        """
        while condition(state):
            state = body(state)
        return state

    def for_each(self, fn: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
        """Return ``[fn(*arrays) for arrays in zip(*lists)]``. `fn` returns an array, or a tuple of arrays.

        `fn` must use only Python's operators and functions of `xp`, with its arrays and with arrays of one element. An
        adapter may call `fn` with objects that stand for several arrays each, and then computes with all of them at
        once. Each result has the same bits as if `fn` had been called for each array.
        """
        return [fn(*arrays) for arrays in zip(*lists, strict=True)]

    def relayout(self, path: str, x: Any) -> Any:
        """Return a parameter in the memory layout in which this backend reads it fastest, with the same values.

        The shape stays the same. A parameter that already has this layout is returned unchanged. `path` is the
        parameter's name, such as ``h3/attn/c_attn/w``.
        """
        return x

    def write_graph(
        self,
        fn: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
        tensors: Mapping[str, StoredTensor],
        inputs: Mapping[str, tuple[str, tuple[int | str, ...]]],
        outputs: Mapping[str, tuple[int | str, ...]],
        file: BinaryIO,
        weights: tuple[str, BinaryIO] | None = None,
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write ``fn(tensors, inputs)`` as a graph, which other programs run without Python.

        `fn` takes two dicts of arrays and returns one. The tensors are part of the graph, under their names, and are
        read one at a time. Each input has a dtype and a shape, and each output a shape. A length that is a name may
        differ from run to run; the same name means the same length. If `weights` is given, the tensors are written to
        that file, whose name relative to the graph's file comes first. `properties` describe the graph.

        This method is optional. An adapter that defines it also registers an entry point in the group
        ``portable_gpt2.graphs``. The entry point's name is the suffix of the files, without the dot. Its value is the
        name of the backend, in a module that imports no framework.
        """
        raise NotImplementedError

    # Functions for choosing tokens on the device (see generation/choice.py)

    def runs_ahead(self, x: Any) -> bool:
        """Return whether the device of x computes while the host does something else, so that waiting costs time.

        Tokens are then chosen on the device, which must be able to compute in float64.
        """
        return not self.device(x).startswith("cpu")

    def fetch(self, x: Any) -> Callable[[], np.ndarray]:
        """Start to copy x to the host. Return a function that waits for the copy, and returns it.

        The copy has the present values of x, even if the memory of x is written to afterwards.
        """
        copy = self.to_numpy(x).copy()
        return lambda: copy

    def top_k(self, x: Any, k: int) -> tuple[Any, Any]:
        """Return the k largest entries along the last axis, in descending order, and their indices.

        Equal entries may be in any order.
        """
        xp = self.xp
        indices = xp.argsort(-x, axis=-1)[..., :k]
        return xp.take_along_axis(x, indices, axis=-1), indices

    def gumbel(self, entries: Any, places: Any, seeds: Any, streams: Any) -> Any:
        """Return the Gumbel variates that `random.gumbel` computes on the host, as a float64 array, by a kernel.

        The arguments are int64 arrays that broadcast to the shape of the result; seeds and streams stand for unsigned
        integers. By default this method returns NotImplemented. A kernel pays off if the backend does not fuse the
        hundreds of operations of the portable definition.
        """
        return NotImplemented

    def permit_64_bits(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the framework does not narrow int64 and float64, even while tracing."""
        return contextlib.nullcontext()

    # Functions of a backend that computes on several devices (see mesh.py)

    def process(self) -> tuple[int, int]:
        """Return the number of this process, from 0, and how many processes have the devices of a mesh together.

        The processes run the same program. Process 0 alone writes files and messages.
        """
        return 0, 1

    def mesh(self, sizes: Mapping[str, int]) -> Any:
        """Return the framework's own mesh of devices, with these axes. By default, meshes are refused.

        Raises
        ------
        ValueError
            If there are not as many devices as the product of the sizes. The message says how to get them.
        """
        raise ValueError(f"backend {self.name!r} computes on one device; a mesh needs the backend 'jax' or 'torch'")

    def mesh_sizes(self, mesh: Any) -> Mapping[str, int] | None:
        """Return the sizes of the axes of the framework's own mesh; None if the object is not one."""
        return None

    def mesh_split(self, mesh: Any, axis: str) -> tuple[Any, Any]:
        """Return the index of this device along an axis, and the axis as `all_sum` takes it.

        It is called in a function on a mesh.
        """
        raise NotImplementedError

    def from_parts(
        self,
        mesh: Any,
        spec: Sequence[str | None],
        shape: Sequence[int],
        read: Callable[[tuple[slice, ...]], np.ndarray],
    ) -> Any:
        """Return an array that is divided over a mesh: the axis i over the mesh's axis spec[i], or whole if it is None.

        `read` returns a part of the array on the host. It is called only for the parts of this process's devices.
        """
        raise NotImplementedError

    def on_mesh(
        self, fn: Callable[..., Any], mesh: Any, specs: Any, results: Any, *, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Return a function that calls `fn` on each device of a mesh, with the device's parts of the arguments.

        `specs` has a tree for each argument, and `results` is one, with the `spec` of each array (see `from_parts`) in
        the places of the arrays. The arguments at the indices `donate` must not be used after the call.
        """
        raise NotImplementedError

    def all_sum(self, x: Any, axis: Any) -> Any:
        """Return the sum of the arrays x of all devices along an axis of a mesh, the same on each, in a fixed order."""
        raise NotImplementedError

    def all_max(self, x: Any, axis: Any) -> Any:
        """Return the elementwise maximum of the arrays x of all devices along an axis of a mesh, the same on each."""
        raise NotImplementedError

    def all_concat(self, x: Any, axis: Any, along: int = -1) -> Any:
        """Return the arrays x of all devices along an axis of a mesh, joined along the axis `along` of the arrays."""
        raise NotImplementedError

    def all_sum_part(self, x: Any, axis: Any, along: int) -> Any:
        """Return this device's part of ``all_sum(x, axis)``, which is divided over the devices along an axis of x.

        It needs half of the messages of `all_sum`.
        """
        raise NotImplementedError

    def all_copy(self, x: Any, axis: Any) -> Any:
        """Return x, which is the same on all devices along an axis of a mesh. Its gradient is the sum of theirs."""
        return x

    # Functions of a backend whose arrays enclose exact results (see certificate.py)

    def enclosure(self, x: Any) -> Enclosure:
        """Return bounds of the exact values of a float array, on the host.

        This method is optional. A backend that defines it computes with intervals or balls: each element of a result
        contains the result that exact arithmetic would have, for any elements of the arguments.
        """
        raise NotImplementedError

    def working_precision(self, bits: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which results are computed with a precision of that many bits.

        A backend that defines `enclosure` defines this method as well. A higher precision makes the enclosures smaller.
        """
        raise NotImplementedError

    # An adapter inherits these.

    def __init__(self, device: Any = None) -> None:
        self.default_device = None if device is None else self.resolve_device(device)
        self.dtype_names = {dtype: name for name, dtype in self.dtypes.items()}
        """The name of each floating dtype of the framework. Other dtypes are not in this dict."""

    def __repr__(self) -> str:
        where = "" if self.default_device is None else f", device={str(self.default_device)!r}"
        return f"get_backend({self.name!r}{where})"

    def dtype(self, name: str) -> Any:
        """Return the framework's floating dtype of that name.

        Raises
        ------
        ValueError
            If the framework has no such dtype. The message lists the dtypes that it has.
        """
        try:
            return self.dtypes[name]
        except (KeyError, TypeError):
            said = f"{name!r:.80}" if isinstance(name, str) else f"that is a {type(name).__name__}"
            raise ValueError(
                f"backend {self.name!r} has no floating dtype {said}; choose one of {', '.join(self.dtypes)}"
            ) from None

    def from_numpy(self, a: np.ndarray, dtype: str | None = None, device: Any = None) -> Any:
        """Convert a NumPy array to an array of this framework on a device.

        The device is the backend's default device unless given. The conversion to `dtype`, a name, is done on the host,
        so that the bits are the same on every backend. Nothing is copied if the framework can share memory; the result
        may therefore share memory with a writeable `a`.

        Raises
        ------
        ValueError
            If there is no such dtype or device.
        TypeError
            If a is not a NumPy array, or the framework lacks its dtype or would silently narrow it. The message names
            the switch that permits the dtype, if there is one.
        """
        if not isinstance(a, np.ndarray | np.generic):
            raise TypeError(f"expected a NumPy array, got {type(a).__module__}.{type(a).__qualname__}")
        if dtype is None:
            a = a.astype(a.dtype.newbyteorder("="), copy=False)
        else:
            self.dtype(dtype)
            a = a.astype(getattr(ml_dtypes, dtype, None) or dtype, copy=False)
        return self.put(a, self.default_device if device is None else self.resolve_device(device))


def subclass_refusal(name: str, conversion: str) -> str:
    """Return the answer of `Backend.refusal` for a class that the framework itself does not define."""
    return f"is a subclass of {name}'s array, and may compute differently; convert it with {conversion}"
