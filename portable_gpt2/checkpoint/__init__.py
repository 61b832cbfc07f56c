"""Read and write checkpoints: OpenAI's release, Hugging Face's layouts and nanoGPT's, from a directory or the hub.

A tensor passes through this package as a NumPy array, one at a time, under its path (``h3/attn/c_attn/w``). The caller
converts it to an array of a framework. Files in a framework's own format are read by that framework's adapter.
"""

from ..host import CheckpointError, TokenizerError
from .formats import WEIGHTS_FILE
from .names import hugging_face_name
from .reading import SHIPPED, Checkpoint, read_checkpoint
from .tensors import cast, stored
from .writing import convert, write_checkpoint, write_files

__all__ = [
    "SHIPPED",
    "WEIGHTS_FILE",
    "Checkpoint",
    "CheckpointError",
    "TokenizerError",
    "cast",
    "convert",
    "hugging_face_name",
    "read_checkpoint",
    "stored",
    "write_checkpoint",
    "write_files",
]
