"""The errors of exp, tanh and log that an adapter states for its framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Numerics:
    """Bounds on the relative errors of elementary functions, for normal results, in units of the unit round-off u.

    u is 2^-24 in float32 and 2^-53 in float64. An error of 1 ulp is at most 2 u, which is the default. The 16-bit
    dtypes are computed in float32.

    Parameters
    ----------
    exp : pair of float
        The error of exp(x) is at most ``(c0 + c1 |x|) u``, where exp is ``(c0, c1)``.
    tanh : float
        The error of tanh(x) is at most ``tanh u``.
    log : float
        The error of log(x), for x from 1 to 1e6, is at most ``log u``.

    Raises
    ------
    ValueError
        If an error is negative, infinite or NaN.

    Examples
    --------
    >>> Numerics(exp=(2.0, 1.25))  # an exp whose error grows with |x|
    Numerics(exp=(2.0, 1.25), tanh=2.0, log=2.0)
    """

    exp: tuple[float, float] = (2.0, 0.0)
    tanh: float = 2.0
    log: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 <= error < math.inf for error in (*self.exp, self.tanh, self.log)):
            raise ValueError(f"{self} has an error that is negative, infinite or NaN; errors are in units of u")


def stated(backend: Any, dtype: str, kind: str | None = None) -> Numerics:
    """Return the errors that a backend states for a dtype and a kind of device.

    The kind, such as ``cuda``, is that of the device on which the backend creates arrays unless it is given. A kind for
    which the adapter states nothing has the errors of its CPU. If it states nothing for the dtype, the errors are the
    default of `Numerics`.

    Parameters
    ----------
    backend : Backend
        The backend.
    dtype : str
        The name of a floating dtype. bfloat16 and float16 have the errors of float32, in which they are computed.
    kind : str, optional
        The kind of device.

    Returns
    -------
    Numerics

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> stated(pg.get_backend("numpy"), "bfloat16")
    Numerics(exp=(3.6, 0.0), tanh=2.0, log=8.0)
    """
    computed = "float64" if dtype == "float64" else "float32"
    if kind is None:
        kind = backend.device(backend.from_numpy(np.zeros(1, np.float32))).partition(":")[0]
    of_kind = {**backend.numerics.get("cpu", {}), **backend.numerics.get(kind, {})}
    found: Numerics = of_kind.get(computed, Numerics())
    return found
