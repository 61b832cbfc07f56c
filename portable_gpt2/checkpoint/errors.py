"""The errors under which files are refused that cannot be read as a GPT-2."""

from ..backend import CheckpointError

__all__ = ["CheckpointError", "TokenizerError"]


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be used with a model, whose weights can be used by token ids; the message says why."""
