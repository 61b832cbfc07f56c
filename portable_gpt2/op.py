"""What an op is: a definition in array-API terms, a kernel where the backend has one, and the checks that both need."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .backend import Backend
from .checks import is_int, is_number, shown
from .registry import _BACKEND_OF_TYPE, backend_of


@runtime_checkable
class Op(Protocol):
    """An op: called, it may run a kernel of the arrays' backend; `reference` always runs the definition.

    `check` refuses what does not fit the definition's signature, and returns the backend and the arguments by name.
    """

    check: Callable[..., tuple[Backend, dict[str, Any]]]
    reference: Callable[..., Any]
    __name__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a kernel, or else the definition."""


_KINDS = {"Int": "integral", "Bool": "bool"}
_PLAIN = (float, int, type(None))


class _Argument(NamedTuple):
    """What a signature says of one array: its kind of dtype and the shapes that it may have."""

    kind: str
    shapes: list[list[str]]

    def __str__(self) -> str:
        return " or ".join(f"[{', '.join(shape)}]" for shape in self.shapes)


def _read_annotation(annotation: str) -> _Argument | None:
    """Read ``Float[Array, "nx nf"] | Float[Array, "1 nx nf"]``; None for what is no array."""
    found = re.findall(r"(Float|Int|Bool)\[Array, ['\"](.*?)['\"]\]", annotation)
    return _Argument(found[0][0], [shape.split() for _, shape in found]) if found else None


def op(definition: Callable[..., Any]) -> Op:
    """Let the arrays' backend supply a kernel for a definition, and check what the definition is given.

    The checks are read from the definition's own annotations: arrays of one backend, floats of one dtype, integers
    where it says Int, and shapes, of which the same name means the same length. A kernel runs once it is known that
    arrays of one backend do not differ in dtype; all else is checked when it declines, or fails.

    The definition computes in float32 at least: 16-bit arrays are widened before and the result is rounded once.
    """
    signature = inspect.signature(definition)
    read = {name: _read_annotation(parameter.annotation) for name, parameter in signature.parameters.items()}
    arrays = {name: argument for name, argument in read.items() if argument is not None}
    name, names = definition.__name__, tuple(read)
    floats = frozenset(key for key, argument in arrays.items() if argument.kind == "Float")
    parameters = signature.parameters.values()
    scalars = frozenset(p.name for p in parameters if p.annotation in ("float", "float | None"))
    integers = frozenset(p.name for p in parameters if p.annotation == "int")
    optional = frozenset(p.name for p in parameters if p.default is None)

    positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
    required = frozenset(p.name for p in parameters if p.default is p.empty)

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name; refuse one that is missing or unknown in the op's name, not its kernel's."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if (
            len(args) <= positional
            and len(given) == len(args) + len(kwargs)
            and required <= given.keys() <= read.keys()
        ):
            return given
        try:  # which takes 3 us, and torch.compile a hundred guards
            return signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
            raise TypeError(f"{name}: {error}; expected {name}{inspect.Signature(plain)}") from None

    def check_types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
        """Refuse arrays of different backends, and floats of different dtypes or none.

        A NumPy number among kwargs becomes Python's, which does not widen what it is multiplied with.
        """
        owner = dtype = None
        first = floating = ""
        for key, x in chain(zip(names, args, strict=False), kwargs.items()):
            if x is None and key in optional:
                continue
            if key not in arrays:
                if key in scalars and type(x) is not float:
                    if not is_number(x):
                        raise TypeError(f"{name}: {key} is {shown(x)}; expected a number")
                    try:
                        kwargs[key] = float(x)
                    except OverflowError:
                        raise ValueError(f"{name}: {key} is {shown(x)}, which no float is as large as") from None
                elif key in integers and is_int(x):
                    kwargs[key] = int(x)
                continue
            try:
                backend = backend_of(x)
            except TypeError as error:
                raise TypeError(f"{name}: {key}: {error}") from None
            if owner is None:
                owner, first = backend, key
            elif backend is not owner:
                raise TypeError(
                    f"{name}: {first} is an array of {owner.name} and {key} one of {backend.name}; "
                    f"give arrays of one framework"
                )
            if key in floats:
                if dtype is None:
                    dtype, floating = x.dtype, key
                    if dtype not in backend.dtype_names:
                        raise TypeError(f"{name}: {key} has dtype {dtype}; expected {' or '.join(backend.dtypes)}")
                elif x.dtype != dtype:
                    raise TypeError(
                        f"{name}: {floating} has dtype {dtype} and {key} has {x.dtype}; convert one of them"
                    )
        if owner is None:
            bind(args, kwargs)
            raise TypeError(f"{name}: expected an array")
        return owner

    def check_shapes(backend: Backend, given: dict[str, Any]) -> None:
        """Refuse shapes that the signature does not admit; a dimension unknown while tracing matches any."""
        sizes: dict[str, tuple[Any, ...]] = {}
        sources: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for key, x in given.items():
            argument = arrays.get(key)
            if argument is None or x is None:
                continue
            if why := backend.refusal(x):
                raise TypeError(f"{name}: {key} {why}")
            kind = _KINDS.get(argument.kind)
            if kind is not None and not _is_of_kind(backend, x.dtype, kind):
                raise TypeError(f"{name}: {key} has dtype {x.dtype}; expected {argument.kind.lower()}")
            shape = backend.shape(x)
            if not any(_match(pattern, shape, sizes) for pattern in argument.shapes):
                needed = {d.replace("#", "") for pattern in argument.shapes for d in pattern} & sources.keys()
                because = ", ".join(
                    f"{d} = {_show(sizes[d]) if d[0] == '*' else _show(sizes[d])[1:-1]} "
                    f"from {sources[d][0]} of shape {_show(sources[d][1])}"
                    for d in sorted(needed)
                )
                raise ValueError(
                    f"{name}: {key} has shape {_show(shape)}, expected {argument}{because and ', with ' + because}"
                    f"{'; # may be 1, or missing in front' if '#' in str(argument) else ''}"
                )
            for d in sizes:
                sources.setdefault(d, (key, shape))

    def check(*args: Any, **kwargs: Any) -> tuple[Backend, dict[str, Any]]:
        backend = check_types(args, kwargs)
        given = bind(args, kwargs)
        check_shapes(backend, given)
        return backend, given

    @functools.wraps(definition)
    def reference(*args: Any, **kwargs: Any) -> Any:
        backend, given = check(*args, **kwargs)
        narrow = [key for key in given if key in floats and _is_narrow(backend, given[key])]
        if not narrow:
            return definition(**given)
        dtype = given[narrow[0]].dtype
        wide = {key: backend.xp.astype(given[key], backend.xp.float32) for key in narrow}
        return backend.xp.astype(definition(**{**given, **wide}), dtype)

    is_alone = len(arrays) == 1

    def are_alike(backend: Backend, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether all arrays are floats of one type and dtype and all else is plain: nearly always."""
        dtype = args[0].dtype
        for x in args:
            if type(x) is not kind or x.dtype is not dtype:
                return False
        for key, x in kwargs.items():
            if key in floats:
                if type(x) is not kind or x.dtype is not dtype:
                    return False
            elif type(x) not in _PLAIN and not (key in arrays and type(x) is kind):
                return False
        return dtype in backend.dtype_names

    @functools.wraps(definition)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        kind: Any = type(args[0]) if args else None
        backend = _BACKEND_OF_TYPE.get(kind)
        if backend is None or not ((is_alone and not kwargs) or are_alike(backend, kind, args, kwargs)):
            backend = check_types(args, kwargs)
        kernel = backend.kernels.get(name)
        if kernel is None:
            return reference(*args, **kwargs)
        try:
            result = kernel(*args, **kwargs)
        except Exception:
            reference(*args, **kwargs)  # which says what is wrong, if the input is
            raise
        return reference(*args, **kwargs) if result is NotImplemented else result

    dispatch.check, dispatch.reference = check, reference  # type: ignore[attr-defined]
    return dispatch  # type: ignore[return-value]


def _is_narrow(backend: Backend, x: Any) -> bool:
    return backend.dtype_names[x.dtype] in ("bfloat16", "float16")


def _is_of_kind(backend: Backend, dtype: Any, kind: str) -> bool:
    try:
        return bool(backend.xp.isdtype(dtype, kind))
    except TypeError:  # a dtype that the namespace's own isdtype does not know: NumPy's strings, JAX's random keys
        return False


def _show(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(n) if isinstance(n, int) else '?' for n in shape)}]"


def _match(pattern: list[str], shape: tuple[Any, ...], sizes: dict[str, tuple[Any, ...]]) -> bool:
    """Match a shape with a pattern such as ``*batch nx``; on success, remember what each name stood for.

    ``*#batch`` broadcasts to what ``*batch`` stood for: its lengths may be 1, and the first of them missing.
    """
    rest = len(shape) - len(pattern)
    variadic = next((i for i, d in enumerate(pattern) if d[0] == "*"), None)
    if rest != 0 and (variadic is None or rest < -1):
        return False
    found = dict(sizes)
    for i, d in enumerate(pattern):
        if variadic is None or i < variadic:
            lengths = (shape[i],)
        elif i == variadic:
            lengths = shape[i : i + rest + 1]
        else:
            lengths = (shape[i + rest],)
        broadcasts = "#" in d
        expected = (int(d),) if d.isdigit() else found.setdefault(d.replace("#", ""), tuple(lengths))
        if broadcasts:
            expected = expected[len(expected) - len(lengths) :]
        if len(expected) != len(lengths):
            return False
        known = [(m, n) for m, n in zip(expected, lengths, strict=True) if isinstance(m, int) and isinstance(n, int)]
        if any(m != n and not (broadcasts and n == 1) for m, n in known):
            return False
    sizes.update(found)
    return True


def check_axis(name: str, axis: int, shape: tuple[Any, ...]) -> None:
    """Refuse an axis that is no int, or that the shape does not have."""
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"{name}: axis is {shown(axis)}; expected an int")
    if not -len(shape) <= axis < len(shape):
        if not shape:
            raise ValueError(f"{name}: axis is {shown(axis)}, but x is a scalar and has no axis")
        raise ValueError(
            f"{name}: axis is {shown(axis)}, but x has shape {_show(shape)}; "
            f"give one of {-len(shape)} to {len(shape) - 1}"
        )
