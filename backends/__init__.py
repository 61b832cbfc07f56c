"""The adapters of portable_gpt2: one framework a file, and no model."""
