"""The rounding errors of the ops: the errors that an adapter states, and the bounds that are derived from them.

`portable_gpt2.numerics.bounds` has a function for each op. It returns the exact result and, for each element, the
largest error that a correct implementation can have. docs/numerics.md explains the derivations.
"""

from .errors import Numerics, stated

__all__ = ["Numerics", "stated"]
