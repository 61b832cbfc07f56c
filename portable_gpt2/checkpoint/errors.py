"""CheckpointError: what every file that cannot be read as a GPT-2 gives."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as a GPT-2; the message names the file, and the tensor if it is one."""


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be used with a model, whose weights can be used by token ids; the message says why."""
