"""A result beyond its bound, and the ways to say how else it may have been computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ...config import GPT2Config
from ...host import StoredTensor
from ...numerics import bounds
from ...numerics.bounds import FORMATS, Bounded
from ..steps import Alternative, Call, Results, Step, copied, evaluate, selection, within
from .arithmetic import Computed, computed


class Case(NamedTuple):
    """A result beyond its bound, and what is known about the model that computed it.

    Parameters
    ----------
    step : Step
        How the result should be computed.
    call : Call
        The call that should have computed it.
    computed : float array
        The result.
    result : function
        Returns another result of the same model by its name.
    weights : dict of StoredTensor
        The model's parameters by path.
    config : GPT2Config
        The model's shape and options.
    suspects : set of str
        The results before this one that are beyond their bounds.
    worst : tuple of int
        The element with the largest ratio of error and bound.
    """

    step: Step
    call: Call
    computed: np.ndarray
    result: Results
    weights: Mapping[str, StoredTensor]
    config: GPT2Config
    suspects: set[str]
    worst: tuple[int, ...]

    # The methods that return an alternative: what the result is under another definition, with a bound.

    def but(self, **changes: Any) -> Alternative:
        """Return the same op with other inputs, parameters or options; see `Call.but`."""
        return by(self.call.but(**changes))

    def formula(self, f: Callable[..., Computed], *, whole: bool = False) -> Alternative:
        """Return a formula of the inputs and the parameters.

        With `whole`, the formula is computed for all positions at once, because these depend on each other.
        """

        def definition(call: Call) -> Bounded:
            inputs = [self.given(x) for x in call.inputs]
            return f(*inputs, **{name: self.given(a) for name, a in call.params.items()}).bounded(call.dtype)

        return once(lambda: definition(self.call)) if whole else by(self.call, definition)

    def then(self, f: Callable[[Computed], Computed], *, across: bool = False) -> Alternative:
        """Return a formula of the right result. With `across`, the formula needs all columns of a position."""

        def definition(call: Call) -> Bounded:
            right = evaluate(call)
            return f(self.given(right.value, right.error)).bounded(call.dtype)

        if not across:
            return by(self.call, definition)
        complete = functools.lru_cache(maxsize=1)(lambda rows: definition(self.call.at(np.asarray(rows))))

        def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
            return Bounded(*(a[..., columns] for a in complete(tuple(rows.tolist()))))

        return alternative

    def copy(self, x: np.ndarray) -> Alternative:
        """Return an array as it is."""
        return lambda rows, columns: copied(within(x, rows, columns))

    @property
    def u(self) -> float:
        """The unit round-off of the arithmetic."""
        return FORMATS[bounds.computed_in(self.call.dtype)].unit

    def given(self, x: np.ndarray, error: np.ndarray | float = 0.0) -> Computed:
        """Return an array for a formula. Each operation may err twice: the program may compute in another order."""
        return computed(x, 2 * self.u, error)

    @property
    def last_rows(self) -> np.ndarray:
        """The last four positions, on which free parameters are estimated."""
        return np.arange(self.computed.shape[-2])[-4:]

    @property
    def columns(self) -> np.ndarray:
        """All columns."""
        return np.arange(self.computed.shape[-1])

    def beside(self, name: str) -> str:
        """Return the name of a result in the same scope."""
        return f"{self.step.name.rpartition('/')[0]}/{name}"

    def read(self, scope: str, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Return the parameters of another scope, with the names, the shapes and the dtype of these."""
        found = {}
        for name, a in like.items():
            tensor = self.weights.get(f"{scope}/{name}")
            if tensor is None or tensor.shape != a.shape:
                return None
            found[name] = tensor.read().astype(a.dtype, copy=False)
        return found


Guesses = Iterator[tuple[str, Alternative]]
Function = Callable[[Case], Guesses]


def by(call: Call, definition: Callable[[Call], Bounded] = evaluate) -> Alternative:
    """Return the alternative that a call, or a function of the call, defines."""
    return lambda rows, columns: definition(call.at(rows, columns))


def once(whole: Callable[[], Bounded]) -> Alternative:
    """Return the alternative of a result that is computed as a whole, when it is needed for the first time."""
    found: list[Bounded] = []

    def alternative(rows: np.ndarray, columns: np.ndarray) -> Bounded:
        if not found:
            found.append(whole())
        value, error = (a[..., selection(rows), :][..., selection(columns)] for a in found[0])
        return Bounded(value, error)

    return alternative


FORMS = ("float16", "bfloat16", "TF32")
FORMS_OF_8_BITS = ("float8_e4m3fn", "float8_e5m2")


def rounded(x: np.ndarray, form: str) -> np.ndarray:
    """Return an array that is rounded to a format, in its own dtype. TF32 has 11 significant bits.

    Examples
    --------
    >>> rounded(np.asarray([1 + 2**-12, 1 + 2**-10], np.float32), "TF32").tolist()
    [1.0, 1.0009765625]
    """
    if form == "TF32":
        bits = x.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
        return nearest.astype(np.uint32).view(np.float32).astype(x.dtype)
    with np.errstate(over="ignore"):
        return x.astype(getattr(ml_dtypes, form, form)).astype(x.dtype)


def unit(form: str) -> float:
    """Return the unit round-off of a format."""
    return 2.0**-11 if form == "TF32" else float(_finfo(getattr(ml_dtypes, form, form)).eps) / 2


def smallest(form: str) -> float:
    """Return the distance of the two numbers of a format that are nearest to 0."""
    return 2.0**-136 if form == "TF32" else float(_finfo(getattr(ml_dtypes, form, form)).smallest_subnormal)


_finfo: Any = ml_dtypes.finfo  # it has no types
