"""The adapters of portable_gpt2: one framework per file, and no model."""
