"""Checkpoints: OpenAI's release and Hugging Face's layouts, from a directory or the hub, read and written.

Tensors cross this package one at a time, as NumPy arrays by path (``h3/attn/c_attn/w``); which framework they end in is
decided above, and files of a framework's own format are read by that framework's adapter.
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
