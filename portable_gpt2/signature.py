"""The checks of an op's arguments, read from the annotations of its definition."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .checks import is_int, is_number, shown
from .registry import backend_of

_Sizes = dict[str, tuple[Any, ...]]  # maps a name in a shape to its lengths; a name such as *batch has several


class ArrayType(NamedTuple):
    """The annotation of an array: the kind of its dtype, and the shapes that it may have."""

    kind: str
    shapes: list[list[str]]

    def __str__(self) -> str:
        return " or ".join(f"[{', '.join(shape)}]" for shape in self.shapes)


def array_type(annotation: str) -> ArrayType | None:
    """Read an annotation such as ``Float[Array, "nx nf"] | Float[Array, "1 nx nf"]``; None for other types.

    Examples
    --------
    >>> print(array_type('Float[Array, "nx nf"] | Float[Array, "1 nx nf"]'))
    [nx, nf] or [1, nx, nf]
    """
    found = re.findall(r"(Float|Int|Bool)\[Array, ['\"](.*?)['\"]\]", annotation)
    return ArrayType(found[0][0], [shape.split() for _, shape in found]) if found else None


class Signature:
    """The rules that an op's arguments must follow. `check` applies them in a fixed order.

    Attributes
    ----------
    name : str
        The op's name, with which every message begins.
    arrays : dict
        The `ArrayType` of each array, by the parameter's name.
    floats : frozenset
        The names of the arrays that must have one floating dtype.
    booleans : frozenset
        The names of the options that are true or false.
    """

    def __init__(self, definition: Callable[..., Any]) -> None:
        self._signature = inspect.signature(definition)
        parameters = self._signature.parameters.values()
        self.name = definition.__name__
        if not all(isinstance(p.annotation, str) for p in parameters if p.annotation is not p.empty):
            raise TypeError(
                f"{self.name}: an annotation is an object, and the checks are read from its text; begin the file with "
                f"`from __future__ import annotations`"
            )
        self.arrays = {p.name: read for p in parameters if (read := array_type(p.annotation))}
        self.floats = frozenset(name for name, read in self.arrays.items() if read.kind == "Float")
        self._names = dict.fromkeys(self._signature.parameters)
        self._n_positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        self._required = frozenset(p.name for p in parameters if p.default is p.empty)
        self._optional = frozenset(p.name for p in parameters if p.default is None)
        self._numbers = frozenset(p.name for p in parameters if p.annotation in ("float", "float | None"))
        self._integers = frozenset(p.name for p in parameters if p.annotation == "int")
        self.booleans = frozenset(p.name for p in parameters if p.annotation == "bool")

    def check(self, *args: Any, **kwargs: Any) -> tuple[Backend, dict[str, Any]]:
        """Refuse arguments that do not fit; return the arrays' backend, and the arguments by name."""
        backend = self.check_types(args, kwargs)
        given = self.bind(args, kwargs)
        self.check_shapes(backend, given)
        return backend, given

    def check_types(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
        """Refuse arrays of different backends, and float arrays that differ in dtype or have no floating dtype.

        NumPy numbers and bools in kwargs are replaced by Python's, which do not widen an array's dtype.
        """
        owner = dtype = None
        first = first_float = ""
        for key, x in chain(zip(self._names, args, strict=False), kwargs.items()):
            if x is None and key in self._optional:
                continue
            if key not in self.arrays:
                self._convert_option(key, x, kwargs)
                continue
            try:
                backend = backend_of(x)
            except TypeError as error:
                raise TypeError(f"{self.name}: {key}: {error}") from None
            if owner is None:
                owner, first = backend, key
            elif backend is not owner:
                raise TypeError(
                    f"{self.name}: {first} is an array of {owner.name} and {key} one of {backend.name}; "
                    f"give arrays of one framework"
                )
            if key not in self.floats:
                continue
            if dtype is None:
                dtype, first_float = x.dtype, key
                if dtype not in backend.dtype_names:
                    raise TypeError(f"{self.name}: {key} has dtype {dtype}; expected {' or '.join(backend.dtypes)}")
            elif x.dtype != dtype:
                raise TypeError(
                    f"{self.name}: {first_float} has dtype {dtype} and {key} has {x.dtype}; convert one of them"
                )
        if owner is None:
            self.bind(args, kwargs)
            raise TypeError(f"{self.name}: expected an array")
        return owner

    def _convert_option(self, key: str, x: Any, kwargs: dict[str, Any]) -> None:
        """Replace an option by Python's float, int or bool; refuse an option that must be one of these and is not."""
        if key in self._numbers and type(x) is not float:
            if not is_number(x):
                raise TypeError(f"{self.name}: {key} is {shown(x)}; expected a number")
            try:
                kwargs[key] = float(x)
            except OverflowError:
                raise ValueError(f"{self.name}: {key} is {shown(x)}, which is too large for a float") from None
        elif key in self._integers and is_int(x):
            kwargs[key] = int(x)
        elif key in self.booleans:
            if not isinstance(x, bool | np.bool_):
                raise TypeError(f"{self.name}: {key} is {shown(x)}; expected true or false")
            kwargs[key] = bool(x)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name; refuse a missing or unknown argument. Messages name the op, not its kernel."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        is_complete = self._required <= given.keys() <= self._names.keys()
        if is_complete and len(args) <= self._n_positional and len(given) == len(args) + len(kwargs):
            return given
        try:  # only for the error, because it takes 3 us, and torch.compile would add a hundred guards
            return self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            plain = [p.replace(annotation=p.empty) for p in self._signature.parameters.values()]
            raise TypeError(f"{self.name}: {error}; expected {self.name}{inspect.Signature(plain)}") from None

    def check_shapes(self, backend: Backend, given: dict[str, Any]) -> None:
        """Refuse shapes that the signature does not permit; a dimension unknown while tracing matches any length."""
        sizes: _Sizes = {}
        sources: dict[str, tuple[str, tuple[Any, ...]]] = {}  # maps a size's name to the first array that has it
        for key, x in given.items():
            expected = self.arrays.get(key)
            if expected is None or x is None:
                continue
            if why := backend.refusal(x):
                raise TypeError(f"{self.name}: {key} {why}")
            if not _is_of_kind(backend, x.dtype, expected.kind):
                raise TypeError(f"{self.name}: {key} has dtype {x.dtype}; expected {expected.kind.lower()}")
            shape = backend.shape(x)
            if not any(_match(pattern, shape, sizes) for pattern in expected.shapes):
                known = {d.replace("#", "") for pattern in expected.shapes for d in pattern} & sources.keys()
                because = ", ".join(
                    f"{d} = {show_shape(sizes[d]) if d[0] == '*' else show_shape(sizes[d])[1:-1]} "
                    f"from {sources[d][0]} of shape {show_shape(sources[d][1])}"
                    for d in sorted(known)
                )
                raise ValueError(
                    f"{self.name}: {key} has shape {show_shape(shape)}, expected {expected}"
                    f"{because and ', with ' + because}"
                    f"{'; an axis marked # may be 1 or missing' if '#' in str(expected) else ''}"
                )
            for d in sizes:
                sources.setdefault(d, (key, shape))


_KINDS = {"Int": "integral", "Bool": "bool"}


def _is_of_kind(backend: Backend, dtype: Any, kind: str) -> bool:
    """Return whether a dtype has the kind of an annotation; `check_types` has checked the floats already."""
    if kind == "Float":
        return True
    try:
        return bool(backend.xp.isdtype(dtype, _KINDS[kind]))
    except TypeError:  # a dtype that isdtype does not know, such as NumPy's strings and JAX's random keys
        return False


def show_shape(shape: tuple[Any, ...]) -> str:
    """Return a shape as text; ? stands for a dimension that is unknown while tracing."""
    return f"[{', '.join(str(n) if isinstance(n, int) else '?' for n in shape)}]"


def _match(pattern: list[str], shape: tuple[Any, ...], sizes: _Sizes) -> bool:
    """Match a shape with a pattern such as ``*batch nx``; if it matches, add the lengths of its names to sizes.

    ``*#batch`` matches lengths that broadcast to those of ``*batch``: they may be 1, and the first may be missing.

    Examples
    --------
    >>> sizes = {"nx": (3,)}
    >>> _match(["*batch", "nx"], (4, 2, 3), sizes), sizes
    (True, {'nx': (3,), '*batch': (4, 2)})
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
    """Refuse an axis that is not an int, or that the shape does not have."""
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"{name}: axis is {shown(axis)}; expected an int")
    if not -len(shape) <= axis < len(shape):
        if not shape:
            raise ValueError(f"{name}: axis is {shown(axis)}, but x is a scalar and has no axis")
        raise ValueError(
            f"{name}: axis is {shown(axis)}, but x has shape {show_shape(shape)}; "
            f"give one of {-len(shape)} to {len(shape) - 1}"
        )
