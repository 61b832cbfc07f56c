"""Ops: a definition in array-API terms, a kernel where the backend has one, and the checks that both need.

Every op checks its arguments by the same rules; the docstring of `op` states them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from .backend import Backend
from .registry import _BACKEND_OF_TYPE
from .signature import Signature

P = ParamSpec("P")
R = TypeVar("R")


@runtime_checkable
class Op(Protocol[P, R]):
    """An op. A call may run a kernel of the arrays' backend; `reference` always runs the definition.

    `check` refuses arguments that do not fit the definition's signature, and returns the backend and the arguments by
    name.
    """

    check: Callable[P, tuple[Backend, dict[str, Any]]]
    reference: Callable[P, R]
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a kernel, or else the definition."""


@runtime_checkable
class Interpreter(Protocol):
    """Computes the results of ops instead of kernels and definitions: see `interpreted`."""

    def __call__(self, signature: Signature, backend: Backend, given: dict[str, Any]) -> Any:
        """Return the result of an op, for arguments by name that fit its signature."""

    def add(self, x: Any, y: Any) -> Any:
        """Return x + y, where y may have fewer leading axes than x."""

    def formula(self, name: str, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return the results of a formula that has several: see `formula`."""


_INTERPRETER: ContextVar[Interpreter | None] = ContextVar("interpreter", default=None)
_n_interpreters = 0  # in all threads; `torch.compile` can read an int, and cannot read a context variable
_counting = threading.Lock()


@contextlib.contextmanager
def interpreted(interpreter: Interpreter | None) -> Iterator[None]:
    """Let an interpreter compute the ops within a ``with`` block, only for this thread or asynchronous task.

    With None, kernels and definitions compute them, as they do outside of such a block.
    """
    global _n_interpreters
    token = _INTERPRETER.set(interpreter)
    with _counting:
        _n_interpreters += 1
    try:
        yield
    finally:
        with _counting:
            _n_interpreters -= 1
        _INTERPRETER.reset(token)


def current_interpreter() -> Interpreter | None:
    """Return the interpreter of the innermost `interpreted` block; None outside of such a block."""
    return _INTERPRETER.get() if _n_interpreters else None


def op(definition: Callable[P, R]) -> Op[P, R]:
    """Return an op with this definition. The op checks its arguments and runs a kernel, or else the definition.

    The checks are read from the annotations of the definition. A kernel runs as soon as it is known that the arrays
    belong to one backend and have one floating dtype. If the kernel returns NotImplemented or raises an exception, the
    other checks run.

    The definition computes in float32 or float64: 16-bit arguments are converted to float32, and the result is
    converted back, which rounds it once.

    Raises
    ------
    TypeError
        If an argument is missing, unknown or not an array; if the arrays belong to different frameworks, the float
        arrays do not have one floating dtype, an array has floats where the signature says Int or Bool, or an option
        has another type than the signature says.
    ValueError
        If the shapes do not fit: the same name in the signature means the same length.
    """
    signature = Signature(definition)
    name, check = signature.name, signature.check
    has_one_array = len(signature.arrays) == 1

    @functools.wraps(definition)
    def reference(*args: Any, **kwargs: Any) -> Any:
        backend, given = check(*args, **kwargs)
        narrow = [key for key in given if key in signature.floats and _is_narrow(backend, given[key])]
        if not narrow:
            return definition(**given)  # type: ignore[call-arg]
        dtype = given[narrow[0]].dtype
        wide = {key: backend.xp.astype(given[key], backend.xp.float32) for key in narrow}
        return backend.xp.astype(definition(**{**given, **wide}), dtype)  # type: ignore[call-arg]

    @functools.wraps(definition)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        kind: Any = type(args[0]) if args else None
        backend = _BACKEND_OF_TYPE.get(kind)
        if backend is None or not ((has_one_array and not kwargs) or _are_alike(signature, backend, args, kwargs)):
            backend = signature.check_types(args, kwargs)
        if _n_interpreters and (interpreter := _INTERPRETER.get()) is not None:
            return interpreter(signature, *check(*args, **kwargs))
        kernel = backend.kernels.get(name)
        if kernel is None:
            return reference(*args, **kwargs)
        try:
            result = kernel(*args, **kwargs)
        except Exception:
            reference(*args, **kwargs)  # raises a clearer error if the input is not valid
            raise
        return reference(*args, **kwargs) if result is NotImplemented else result

    dispatch.check, dispatch.reference = check, reference  # type: ignore[attr-defined]
    return dispatch  # type: ignore[return-value]


def formula(definition: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """Let an `Interpreter` compute a function that takes arrays, and options by keyword, and returns arrays by name."""
    names = list(inspect.signature(definition).parameters)

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        interpreter = current_interpreter()
        if interpreter is None:
            return definition(*args, **kwargs)
        return interpreter.formula(definition.__name__, dict(zip(names, args, strict=False)), kwargs)

    return call


_PLAIN = (float, int, type(None))


def _are_alike(signature: Signature, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the arguments are arrays of one class, floats of one dtype, and plain Python numbers and bools.

    This fast path takes most calls: `Signature.check_types` would take several times as long. Most frameworks have one
    object per dtype; where each access makes a new one, as in MLX, equal dtypes are different objects.
    """
    kind, dtype = type(args[0]), args[0].dtype
    for x in args:
        if type(x) is not kind or (x.dtype is not dtype and x.dtype != dtype):
            return False
    for key, x in kwargs.items():
        if key in signature.floats:
            if type(x) is not kind or (x.dtype is not dtype and x.dtype != dtype):
                return False
        elif key in signature.booleans:
            if type(x) is not bool:
                return False
        elif type(x) not in _PLAIN and not (key in signature.arrays and type(x) is kind):
            return False
    return dtype in backend.dtype_names


def _is_narrow(backend: Backend, x: Any) -> bool:
    return backend.dtype_names[x.dtype] in ("bfloat16", "float16")
