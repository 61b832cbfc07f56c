"""An adapter, with which portable_gpt2 computes on the arrays of the library `counting`.

portable_gpt2 finds it through the entry point in ``counting_backend-1.0.dist-info``, as for an installed package. A
package of your own declares the same entry point in its pyproject.toml.
"""

import counting
import numpy as np

from portable_gpt2 import Backend


class CountingBackend(Backend):
    """Arrays that count multiplications, on the CPU, in float32 and float64."""

    name = "counting"
    array_types = (counting.Array,)
    xp = counting
    dtypes = {"float32": np.dtype("float32"), "float64": np.dtype("float64")}

    def devices(self):
        """Return the devices by name."""
        return {"cpu": "cpu"}

    def to_numpy(self, x):
        """Return the NumPy array in an Array."""
        return x.a
