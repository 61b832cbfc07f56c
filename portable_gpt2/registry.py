"""Find a backend by its name, by one of its arrays, or by default.

Adapters register in the entry-point group ``portable_gpt2.backends``, so that any package can add one. The name of an
entry point is the framework's top-level module, and its value is a subclass of `Backend`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Backend

ENTRY_POINTS = "portable_gpt2.backends"
DEFAULT_VARIABLE = "PORTABLE_GPT2_BACKEND"


class BackendNotInstalled(ImportError):
    """The requested backend is unknown, or its framework cannot be imported."""


# The dispatch table, from the class of an array to its backend. The classes of a framework are added when its backend
# is loaded. Other classes, such as those of tracers, are added when `backend_of` first receives an array of the class.
_BACKEND_OF_TYPE: dict[type, Backend] = {}
_LOADED: dict[str, Backend] = {}
if TYPE_CHECKING:
    loaded: dict[str, Backend]  # computed by __getattr__, below
_DEFAULT: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("portable_gpt2_backend", default=None)


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def known_backends() -> list[str]:
    """Return the names of all backends with an installed adapter, whether or not their frameworks are installed."""
    return sorted(_entry_points())


def available_backends() -> list[str]:
    """Return the names of the backends whose framework is installed. No framework is imported.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> "numpy" in pg.available_backends()
    True
    """
    return [name for name in known_backends() if _is_importable(name)]


def how_to_install(name: str, extra: str = "") -> str:
    """Return the command that installs a known backend's framework.

    For a backend of this package, the command names an extra: the given one, or that of the backend's name.
    """
    ours = _entry_points()[name].value.startswith("portable_gpt2_backends.")
    return f"pip install 'portable-gpt2[{extra or name}]'" if ours else f"pip install {name}"


def _is_importable(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def get_backend(name: str | Backend | None = None, device: Any = None) -> Backend:
    """Return a backend by name. Its framework is imported if necessary.

    Parameters
    ----------
    name : str or Backend, optional
        One of `available_backends`, or a backend itself. The default is the backend of the innermost `use_backend`
        block. Outside such a block, the default is the backend that the environment variable PORTABLE_GPT2_BACKEND
        names, or ``numpy`` if the variable is not set.
    device : str or the framework's own device object, optional
        The device of the arrays that the backend creates, such as ``cpu`` or ``cuda:1``; the framework's default device
        unless given.

    Raises
    ------
    BackendNotInstalled
        If the name is unknown or its framework is not installed. The message says what to install.
    ValueError
        If there is no such device. The message lists the devices.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.get_backend("numpy", device="cpu").name
    'numpy'
    """
    if name is None:
        name = _DEFAULT.get() or _backend_of_environment() or "numpy"
    if isinstance(name, Backend):
        backend = name
    elif not isinstance(name, str):
        raise TypeError(f"backend is of type {type(name).__name__}; expected a name such as 'numpy', or a Backend")
    else:
        backend = _load(name)
        _own(backend.array_types, backend)
    return backend if device is None else type(backend)(device)


def _backend_of_environment() -> Backend | None:
    """Return the backend that the environment variable names; None if the variable is not set or empty."""
    if not (name := os.environ.get(DEFAULT_VARIABLE)):
        return None
    try:
        return get_backend(name)
    except BackendNotInstalled as error:
        raise BackendNotInstalled(f"{DEFAULT_VARIABLE} is {name!r:.80}: {error}") from error.__cause__


def _load(name: str) -> Backend:
    if name in _LOADED:
        return _LOADED[name]
    point = _entry_points().get(name)
    if point is None:
        raise BackendNotInstalled(f"unknown backend {name!r:.80}; the known backends are {', '.join(known_backends())}")
    if not _is_importable(name):
        raise BackendNotInstalled(
            f"backend {name!r} is known, but {name} is not installed: {how_to_install(name)} "
            f"(installed here: {', '.join(available_backends())})"
        )
    try:
        backend: Backend = point.load()()
        isinstance(None, backend.array_types)  # an adapter whose array_types cannot be used is broken too
    except Exception as error:  # from a third party's adapter, whose failure must not affect other backends
        raise BackendNotInstalled(
            f"backend {name!r} could not be loaded from {point.value}: {type(error).__name__}: {error}"
        ) from error
    return _LOADED.setdefault(name, backend)  # if two threads load a backend at once, the first wins


@contextlib.contextmanager
def use_backend(name: str | Backend, device: Any = None) -> Iterator[Backend]:
    """Make a backend the default within a ``with`` block, only for this thread or asynchronous task.

    The default is used by functions that create arrays (`init_params`, `GPT2.load`). An op always uses the backend of
    its arguments.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> with pg.use_backend("numpy"):
    ...     pg.get_backend().name
    'numpy'
    """
    backend = get_backend(name, device)
    token = _DEFAULT.set(backend)
    try:
        yield backend
    finally:
        _DEFAULT.reset(token)


@contextlib.contextmanager
def registered(backend: Backend) -> Iterator[Backend]:
    """Let the ops and `get_backend` find a backend that has no entry point, within a ``with`` block, in all threads.

    The backend takes the place of another one that has its name or its array types.

    Examples
    --------
    >>> from portable_gpt2 import get_backend
    >>> from portable_gpt2.registry import registered
    >>> from portable_gpt2_backends.numpy import NumpyBackend
    >>> class Mine(NumpyBackend):
    ...     name = "mine"
    >>> with registered(Mine()):
    ...     get_backend("mine")
    get_backend('mine')
    """
    name = backend.name
    types, named = dict(_BACKEND_OF_TYPE), _LOADED.get(name)
    _LOADED[name] = backend
    _own(backend.array_types, backend)
    try:
        yield backend
    finally:
        del _LOADED[name]
        if named is not None:
            _LOADED[name] = named
        for kind in [kind for kind, owner in _BACKEND_OF_TYPE.items() if owner is backend]:
            del _BACKEND_OF_TYPE[kind]
            if kind in types:
                _BACKEND_OF_TYPE[kind] = types[kind]


def backend_of(x: Any) -> Backend:
    """Return the backend of an array. This function imports no framework.

    Raises
    ------
    TypeError
        If x is not an array of a backend.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.backend_of(np.ones(3)).name
    'numpy'
    """
    backend = _BACKEND_OF_TYPE.get(type(x))
    return backend if backend is not None else _find_owner(x)


def _find_owner(x: Any) -> Backend:
    from . import registry as this_module

    for backend in this_module.loaded.values():
        if isinstance(x, backend.array_types):
            if type(x) not in backend.array_types and (why := backend.refusal(x)):
                raise TypeError(f"{type(x).__module__}.{type(x).__qualname__} {why}")
            _own((type(x), *backend.array_types), backend)
            return backend
    raise TypeError(
        f"expected an array of one of the backends {', '.join(known_backends())}; got {type(x).__module__}."
        f"{type(x).__qualname__}. Make it an array of the framework that you use, such as numpy.asarray(x)"
    )


def _own(types: tuple[type, ...], backend: Backend) -> None:
    for each in types:
        _BACKEND_OF_TYPE[each] = backend


def __getattr__(name: str) -> Any:
    """Compute the attribute `loaded`: the backends of the frameworks that the program has imported so far.

    Loading an adapter cannot be traced. torch.compile traces functions, but it evaluates the attributes of modules.
    Because `loaded` is an attribute, a program may call its first op inside a compiled function.
    """
    if name != "loaded":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for known in known_backends():
        if known in sys.modules and known not in _LOADED:
            try:
                _load(known)
            except BackendNotInstalled as error:  # a broken adapter must not affect other backends
                warnings.warn(f"skipped a backend that cannot be loaded: {error}", RuntimeWarning, stacklevel=4)
    return _LOADED


def to_numpy(x: Any) -> np.ndarray:
    """Return an array of any backend as a NumPy array on the host.

    Raises
    ------
    TypeError
        If x is not an array of a backend, or if its values cannot be read because x is traced or sparse.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.to_numpy(pg.softmax(np.zeros(2)))
    array([0.5, 0.5])
    """
    backend = backend_of(x)
    try:
        return backend.to_numpy(x)
    except Exception as error:  # any exception of the framework
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise TypeError(f"the values of this array of {backend.name} cannot be brought to the host ({why})") from error


def enter_loaded() -> None:
    """Add the classes of all imported frameworks to the dispatch table.

    Each later change of the table makes torch.compile compile again. This function is called once, at the end of `api`,
    so that the adapters that are loaded may import public names of this package.
    """
    for backend in __getattr__("loaded").values():
        _own(backend.array_types, backend)
