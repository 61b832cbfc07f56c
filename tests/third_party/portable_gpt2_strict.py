"""A backend from a package of its own: array_api_strict, which refuses what the array API standard does not promise.

It stands on the import path beside its own metadata, as an installed third party's would, so that the tests find it
through the entry-point group like any other. Its devices do not mix: a leak from one to another raises.
"""

import array_api_strict as xp
import numpy as np

from portable_gpt2.backend import Backend

_DEVICES = {"cpu": xp.Device("CPU_DEVICE"), "device1": xp.Device("device1"), "device2": xp.Device("device2")}


class StrictBackend(Backend):
    """array_api_strict, which knows float32 and float64."""

    name = "array_api_strict"
    array_types = (type(xp.asarray(0)),)
    xp = xp
    dtypes = {"float32": xp.float32, "float64": xp.float64}

    def devices(self):
        return _DEVICES

    def to_numpy(self, x):
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE")))
