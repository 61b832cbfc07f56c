"""The adapters of portable_gpt2, one file per framework. They contain no part of the model."""
