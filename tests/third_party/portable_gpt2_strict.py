"""A backend from another package: array_api_strict, which refuses whatever the array API standard does not promise.

It is on the import path together with its metadata, like an installed package, so that it is found through the
entry-point group. Arithmetic between two of its devices raises an error.
"""

import array_api_strict as xp
import numpy as np

from portable_gpt2.backend import Backend
from portable_gpt2.numerics import Numerics

_DEVICES = {"cpu": xp.Device("CPU_DEVICE"), "device1": xp.Device("device1"), "device2": xp.Device("device2")}


class StrictBackend(Backend):
    """array_api_strict, which knows float32 and float64."""

    name = "array_api_strict"
    array_types = (type(xp.asarray(0)),)
    xp = xp
    numerics = {"cpu": {"float32": Numerics(exp=(3.6, 0.0), log=8.0)}}  # as for NumPy, which computes its functions
    dtypes = {"float32": xp.float32, "float64": xp.float64}

    def devices(self):
        return _DEVICES

    def to_numpy(self, x):
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE")))
