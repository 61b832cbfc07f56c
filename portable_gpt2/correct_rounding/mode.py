"""The reproducible mode: the result of an op is the float32 number nearest to its exact result.

Every implementation that computes this number computes the same bits. The mode evaluates an op in float64 on the
arrays' own device, with a bound of the error (`float64`). If all numbers within the bound round to the same float32
number, the result is decided. This is so for all but one element in 7,500 (GPT-2) to 22,000 (the shipped model). The
others are computed on the host, with as many digits as the decision needs (`exact`). The method is that of Ziv, "Fast
evaluation of elementary mathematical functions with correctly rounded last bit", ACM Trans. Math. Softw. 17(3), 1991.

docs/reproducible.md says what the exact result of each op is.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ..backend import Backend
from ..numerics import Numerics, stated
from ..op import interpreted
from ..ops import embed, in_range
from ..params import Params, flatten
from ..registry import backend_of
from ..signature import Signature
from . import exact, exact_gradients, float64, float64_gradients

At = tuple[np.ndarray, ...]

_SMALLEST = 2.0**-126  # the smallest normal float32
_ZERO_BELOW = _SMALLEST - 2.0**-150  # a number of this magnitude rounds to _SMALLEST, and a smaller one counts as 0


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Round every op correctly within a ``with`` block, only for this thread or asynchronous task.

    The result of an op is then the float32 number that is nearest to the exact result on its float32 arguments, so it
    has the same bits on every backend, device and processor, and for every batch. docs/reproducible.md defines the
    exact result of each op, and says what the mode costs.

    The ops take float32 arrays, whose values are read: the mode does not work inside of functions that are traced, such
    as those of ``jax.jit``. Numbers below 2^-126 in magnitude count as 0, and a zero has no sign.

    Raises
    ------
    TypeError
        An op raises it if the backend has no float64, or if an array has no values because a function is being traced.
    ValueError
        An op raises it if an array has another dtype than float32.

    Notes
    -----
    `GPT2.load` has an option for a whole model.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> x = np.linspace(-3, 3, 5, dtype=np.float32)
    >>> with pg.reproducible():
    ...     y = pg.softmax(x)
    >>> [float(each).hex() for each in y[:2]]
    ['0x1.f914e40000000p-10', '0x1.1af3cc0000000p-7']
    """
    with interpreted(Interpreter()):
        yield


class _Weight:
    """A parameter of a model, and what the mode needs of it, each computed when it is needed for the first time."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @functools.cached_property
    def wide(self) -> Any:
        """The parameter in float64."""
        return _compiled(backend_of(self.array), _widened)(self.array)

    @functools.cached_property
    def column_norms(self) -> Any:
        """Upper bounds of the Euclidean norms of the columns, which `conv1d` multiplies with."""
        return _compiled(backend_of(self.array), float64.column_norms)(self.wide)

    @functools.cached_property
    def row_norms(self) -> Any:
        """Upper bounds of the Euclidean norms of the rows, which `unembed` multiplies with."""
        return _compiled(backend_of(self.array), _row_norms)(self.wide)

    @functools.cached_property
    def host(self) -> np.ndarray:
        """The parameter on the host; on a CPU this is a view."""
        return backend_of(self.array).to_numpy(self.array)


class Interpreter:
    """Computes ops as the mode defines them.

    Parameters
    ----------
    params : dict, optional
        The parameters of a model, which do not change. What the mode needs of them is computed only once.
    """

    def __init__(self, params: Params | None = None) -> None:
        self.counts: Counter[str] = Counter()
        """For each op, how many elements were computed, undecided, and otherwise wrong."""
        # The keys are identities, which stay valid as long as the arrays exist; the values hold the arrays.
        self._weights = {id(x): _Weight(x) for _, x in flatten(params or {})}

    def __call__(self, signature: Signature, backend: Backend, given: dict[str, Any]) -> Any:
        """Return the result of an op, for arguments by name that fit its signature."""
        name = signature.name
        floats = {key: x for key, x in given.items() if key in signature.floats}
        for key, x in floats.items():
            check(backend, backend.dtype_names[x.dtype], f"{name}: {key}: ")
        if "targets" in given:  # ids that are out of range raise an error here, because compiled code cannot do so
            in_range(f"{name}: targets", given["targets"], backend.shape(given["logits"])[-1])
        # NaN and infinities are results like any other: NumPy need not warn of them.
        with interpreted(None), backend.permit_64_bits(), np.errstate(all="ignore"):
            if name == "embed":
                return _compiled(backend, _defined)(embed(**given))
            weights = {key: self._weights[id(x)] for key, x in floats.items() if id(x) in self._weights}
            options = {key: x for key, x in given.items() if key not in signature.arrays}
            if name.startswith("attention") and options.get("scale") is None:
                # d ** -0.5 would be a function of the platform's library; these two operations are rounded correctly.
                options["scale"] = 1 / math.sqrt(max(backend.shape(given["q"])[-1], 1))
            arrays = {key: x for key, x in given.items() if key not in options and x is not None}
            arrays |= {key: weight.wide for key, weight in weights.items()}
            if name in _NORMS and "w" in weights:
                arrays["w_norms"] = getattr(weights["w"], _NORMS[name])
            narrow = tuple(key for key in floats if key not in weights)
            attempt = _attempt(backend, name, tuple(options.items()), _numerics(name, backend, given), narrow)

            def exactly(at: dict[str, At]) -> dict[str, np.ndarray]:
                on_host = {key: backend.to_numpy(x) for key, x in arrays.items() if key in given}
                on_host |= {key: weight.host for key, weight in weights.items()}
                return {"": getattr(exact, name)(**on_host, **options, at=at[""])}

            return self._decided(name, backend, attempt(arrays), exactly)[""]

    def formula(
        self,
        name: str,
        arrays: dict[str, Any],
        options: Mapping[str, Any] = MappingProxyType({}),
        constants: Sequence[float] = (),
    ) -> dict[str, Any]:
        """Return the results of a function of `float64_gradients`.

        The arrays are float32, integers or bools. Options that differ between calls are given as constants. If an
        element of a float32 array is NaN or infinite, every result is NaN.
        """
        arrays = {key: x for key, x in arrays.items() if x is not None}
        backend = backend_of(next(iter(arrays.values())))
        floats = [key for key, x in arrays.items() if x.dtype in backend.dtype_names]
        for key in floats:
            check(backend, backend.dtype_names[arrays[key].dtype], f"{name}: {key}: ")
        with interpreted(None), backend.permit_64_bits(), np.errstate(all="ignore"):
            given = dict(arrays)
            if constants:
                place = backend.placement(arrays[floats[0]])
                given["constants"] = backend.from_numpy(np.asarray(constants, np.float64), "float64", place)
            numerics = _numerics(name, backend, {key: arrays[key] for key in floats})
            attempt = _attempt(backend, name, tuple(options.items()), numerics, tuple(floats), several=True)

            def exactly(at: dict[str, At]) -> dict[str, np.ndarray]:
                on_host = {key: backend.to_numpy(x) for key, x in arrays.items()}
                if constants:
                    on_host["constants"] = np.asarray(constants, np.float64)
                found: dict[str, np.ndarray] = getattr(exact_gradients, name)(**on_host, **options, at=at)
                return found

            return self._decided(name, backend, attempt(given), exactly)

    def norm(self, arrays: Sequence[Any], n: int) -> float:
        """Return the norm of the vector of all elements of float32 arrays, divided by n, rounded to float32.

        The squares of float32 numbers are exact, and the relative error of a sum of k of them is at most k u. If an
        element is NaN or infinite, the result is NaN.
        """
        backend, totals, size = backend_of(arrays[0]), [], 0
        with backend.permit_64_bits(), np.errstate(all="ignore"):
            for x in arrays:
                totals.append(float(backend.to_numpy(_compiled(backend, _square_sum)(x))))
                size = max(size, math.prod(backend.shape(x)))
        if not all(map(math.isfinite, totals)):
            return math.nan
        value = math.sqrt(math.fsum(totals)) / n
        error = value * (size + 8) * 2.0**-53
        low, high = (float(_narrowed(np.asarray(each))) for each in (value - error, value + error))
        return low if low == high else exact_gradients.norm([backend.to_numpy(x) for x in arrays], n)

    def _decided(
        self,
        name: str,
        backend: Backend,
        attempts: dict[str, tuple[Any, Any, Any, Any]],
        exactly: Callable[[dict[str, At]], dict[str, np.ndarray]],
    ) -> dict[str, Any]:
        """Return the results that `_attempt` found, with the open elements decided on the host.

        `exactly` takes the indices of the undecided elements of each result, and returns the correctly rounded
        elements.
        """
        results: dict[str, Any] = {}
        opened: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        at_undecided: dict[str, At] = {}
        for key, (result, is_open, value, error) in attempts.items():
            results[key], shape = result, backend.shape(result)
            self.counts[f"{name}: elements"] += math.prod(shape)
            with _refuse_tracers(name):
                places = np.flatnonzero(backend.to_numpy(is_open))
            if not len(places):
                at_undecided[key] = (np.zeros(0, np.int64),) * len(shape)
                continue
            value, error = (np.broadcast_to(backend.to_numpy(x), shape).reshape(-1)[places] for x in (value, error))
            if name in _NORMS:  # an infinity or NaN is exact
                error = np.where(np.isfinite(value), error, 0.0)
            low, high = _narrowed(value - error), _narrowed(value + error)
            undecided = (low != high) & (error != 0)
            at_undecided[key] = np.unravel_index(places[undecided], shape) if shape else ()
            opened[key] = places, low, undecided, value
        if any(undecided.any() for _, _, undecided, _ in opened.values()):
            decided = exactly(at_undecided)
            for key, (_, low, undecided, value) in opened.items():
                self.counts[f"{name}: undecided"] += int(np.sum(undecided))
                self.counts[f"{name}: otherwise wrong"] += int(np.sum(decided[key] != _narrowed(value[undecided])))
                low[undecided] = decided[key]
        for key, (places, low, _, _) in opened.items():
            low[np.isnan(low)] = np.nan  # frameworks give NaN different bits
            found = np.require(backend.to_numpy(results[key]), requirements="W")
            found.reshape(-1)[places] = low
            results[key] = backend.from_numpy(found, device=backend.placement(results[key]))
        return results

    def add(self, x: Any, y: Any) -> Any:
        """Return x + y. IEEE 754 rounds a sum correctly, so only subnormal numbers and NaN are replaced."""
        with np.errstate(all="ignore"):
            return _compiled(backend_of(x), _sum)(x, y)


_NORMS = {"conv1d": "column_norms", "unembed": "row_norms"}


@functools.cache
def _compiled(backend: Backend, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of arrays once. JAX would otherwise compile each of its operations, for every shape."""
    return backend.compile(fn)


@functools.cache
def _attempt(
    backend: Backend,
    name: str,
    options: tuple[tuple[str, Any], ...],
    numerics: Numerics,
    narrow: tuple[str, ...],
    several: bool = False,
) -> Any:
    """Return a function of the arguments of an op, or of a formula that has several results.

    It returns a dict with an entry for each result: the float32 array; a bool array that is True where the host must
    look, because an element is undecided or may be subnormal; and the `Evaluation`. The arguments that are named in
    `narrow` are float32, and the other floats are float64. All results of a formula are NaN if an element of one of its
    arguments is NaN or infinite.
    """
    xp = backend.xp
    evaluate = getattr(float64_gradients if several else float64, name)

    def attempt(arrays: dict[str, Any]) -> dict[str, tuple[Any, Any, Any, Any]]:
        arrays = arrays | {key: _widened(arrays[key]) for key in narrow}
        evaluations = evaluate(**arrays, **dict(options), numerics=numerics)
        found = {}
        nan = sum(xp.sum(arrays[key] - arrays[key]) for key in narrow) if several else 0  # 0, or NaN
        for key, (value, error) in evaluations.items() if several else [("", evaluations)]:
            if several:
                value, error = value + nan, xp.where(nan == 0, error, 0.0)  # the sum with 0 changes -0 to 0
            low, high = xp.astype(value - error, xp.float32), xp.astype(value + error, xp.float32)
            # A framework may flush subnormal numbers, and then they are 0 here.
            is_open = (low != high) | ((abs(low) <= _SMALLEST) & ((value != 0) | (error != 0)))
            found[key] = low, is_open, value, error
        return found

    return backend.compile(attempt)


def _narrowed(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32 on the host. Numbers that would be subnormal become 0 or the smallest normal number."""
    rounded = np.where(abs(x) < _ZERO_BELOW, 0.0, np.where(abs(x) < _SMALLEST, np.copysign(_SMALLEST, x), x))
    return rounded.astype(np.float32)


def _without_subnormals(x: Any) -> Any:
    """Replace numbers below 2^-126 in magnitude by 0, and -0 too."""
    return backend_of(x).xp.where((x > -_SMALLEST) & (x < _SMALLEST), 0.0, x)


def _defined(x: Any) -> Any:
    """Replace subnormal numbers and -0 by 0, and every NaN by the same NaN: frameworks give NaN different bits."""
    return backend_of(x).xp.where(x == x, _without_subnormals(x), math.nan)


def _sum(x: Any, y: Any) -> Any:
    return _defined(_without_subnormals(x) + _without_subnormals(y))


def _widened(x: Any) -> Any:
    """Convert float32 to float64."""
    xp = backend_of(x).xp
    return _without_subnormals(xp.astype(x, xp.float64))


def _row_norms(w: Any) -> Any:
    return float64.column_norms(backend_of(w).xp.matrix_transpose(w))


def _square_sum(x: Any) -> Any:
    """Return the sum of the squares of a float32 array, in float64."""
    wide = _widened(x)
    return backend_of(x).xp.sum(wide * wide)


def _numerics(name: str, backend: Backend, given: dict[str, Any]) -> Numerics:
    """Return the errors that the backend states for float64 on the device of the arrays."""
    with _refuse_tracers(name):
        device = backend.device(next(iter(given.values())))
    return _stated(backend, device)


@functools.cache
def _stated(backend: Backend, device: str) -> Numerics:
    if not _has_float64(backend, device):
        raise TypeError(_NO_FLOAT64.format(f"{backend.name} does not have on {device}"))
    return stated(backend, "float64", device.partition(":")[0])


_NO_FLOAT64 = "the reproducible mode computes in float64, which {}; choose another backend or device"


@functools.cache
def _has_float64(backend: Backend, device: str | None) -> bool:
    """Return whether a device, or that on which the backend creates arrays, computes in float64."""
    if "float64" not in backend.dtypes:
        return False
    try:
        with backend.permit_64_bits():
            x = backend.from_numpy(np.asarray([1.0, 2.0**-40]), device=device)
            third = x / 3
            is_equal = backend.to_numpy(third == third)  # balls, which enclose numbers, cannot be compared
            return bool(is_equal.all()) and float(backend.to_numpy(backend.xp.sum(x))) == 1 + 2.0**-40
    except Exception:  # a framework's own error, such as that of PyTorch on Apple's GPU
        return False


def check(backend: Backend, dtype: str, who: str = "") -> None:
    """Refuse a dtype other than float32, and a backend that has no float64."""
    if not _has_float64(backend, None):
        raise TypeError(who + _NO_FLOAT64.format(f"{backend.name} does not have"))
    if dtype != "float32":
        raise ValueError(f"{who}dtype is {dtype}; the reproducible mode takes and returns float32")


@contextlib.contextmanager
def _refuse_tracers(name: str) -> Iterator[None]:
    """Replace an error that a framework raises for an array that has no values."""
    try:
        yield
    except Exception as error:
        raise TypeError(
            f"{name}: the reproducible mode reads the values of arrays, but here they have none, because a function is "
            f"being traced; call the function without compiling it"
        ) from error


def compiler(backend: Backend, params: Params) -> Callable[..., Callable[..., Any]]:
    """Return a function with the signature of `Backend.compile`, whose functions run in the mode.

    The mode reads arrays after each op, so a function is not compiled as a whole; each op is compiled by itself. If the
    backend compiles again for every shape, ints become arrays, as they do in a compiled function, so that no shape
    depends on the number of tokens in the cache.

    Raises
    ------
    ValueError, TypeError
        If the parameters are not float32, or the backend has no float64.
    """
    for path, x in flatten(params):
        check(backend, backend.dtype_names[x.dtype], f"{path}: ")
    interpreter = Interpreter(params)

    def compile(fn: Callable[..., Any], *bound: Any, donate: tuple[str, ...] = ()) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if backend.compiles_per_shape:
                args = tuple(_with_arrays(backend, each) for each in args)
            with interpreted(interpreter):
                return fn(*bound, *args)

        return run

    return compile


def _with_arrays(backend: Backend, tree: Any) -> Any:
    """Return a tree with arrays of int32 instead of ints."""
    if isinstance(tree, int):
        return backend.from_numpy(np.asarray(tree, np.int32))
    if isinstance(tree, dict):
        return {key: _with_arrays(backend, each) for key, each in tree.items()}
    if isinstance(tree, tuple | list):
        made = [_with_arrays(backend, each) for each in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    return tree
