"""A backend from a package of its own: array_api_strict, which refuses what the array API standard does not promise.

It stands on the import path beside its own metadata, as an installed third party's would, so that the tests find it
through the entry-point group like any other. Its devices do not mix: a leak from one to another raises.
"""

import array_api_strict as xp
import numpy as np

from portable_gpt2.backend import Backend

_DEVICES = {"CPU_DEVICE": "cpu", "device1": "device1", "device2": "device2"}


class StrictBackend(Backend):
    """array_api_strict, which knows float32 and float64."""

    name = "array_api_strict"
    array_types = (type(xp.asarray(0)),)
    xp = xp
    _dtypes = {"float32": xp.float32, "float64": xp.float64}

    def devices(self):
        return list(_DEVICES.values())

    def _find_device(self, device):
        own = {name: xp.Device(key) for key, name in _DEVICES.items()}
        return device if isinstance(device, xp.Device) else own.get(device)

    def device(self, x):
        return {xp.Device(key): name for key, name in _DEVICES.items()}[x.device]

    def from_numpy(self, a, dtype=None, device=None):
        device = self.default_device if device is None else self.find_device(device)
        return xp.asarray(self.host_array(a, dtype), device=device)

    def to_numpy(self, x):
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE")))
