"""The public names, which are attributes of `portable_gpt2`."""

from . import ops, registry
from .backend import Backend
from .cache import KVCache, grow_cache, new_cache
from .certificate import Certificate, certify
from .checkpoint import CheckpointError
from .comparison.compare import compare
from .comparison.sides import probe
from .comparison.trace import Trace
from .config import GPT2Config
from .correct_rounding.mode import reproducible
from .generation.completion import Completion
from .language_model import GPT2
from .model import gpt2, loss
from .ops import *  # noqa: F403
from .params import init_conv1d, init_params
from .registry import BackendNotInstalled, available_backends, backend_of, get_backend, to_numpy, use_backend
from .score import Score
from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "Backend",
    "BackendNotInstalled",
    "Certificate",
    "CheckpointError",
    "Completion",
    "GPT2Config",
    "KVCache",
    "Score",
    "Tokenizer",
    "Trace",
    "available_backends",
    "backend_of",
    "certify",
    "compare",
    "get_backend",
    "gpt2",
    "grow_cache",
    "init_conv1d",
    "init_params",
    "loss",
    "new_cache",
    "probe",
    "reproducible",
    "to_numpy",
    "use_backend",
]
__all__ += ops.__all__

registry.enter_loaded()
