"""GPT-2 written once against the array API standard, and run by NumPy, TensorFlow, JAX and PyTorch."""

from .backend import (
    Backend,
    BackendNotInstalled,
    available_backends,
    backend_of,
    get_backend,
    to_numpy,
    use_backend,
)
from .ops import attention, conv1d, embed, gelu, layer_norm, softmax, unembed

__all__ = [
    "Backend",
    "BackendNotInstalled",
    "attention",
    "available_backends",
    "backend_of",
    "conv1d",
    "embed",
    "gelu",
    "get_backend",
    "layer_norm",
    "softmax",
    "to_numpy",
    "unembed",
    "use_backend",
]
