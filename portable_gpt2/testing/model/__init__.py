"""The whole model on a backend: its logits, its cache, batches of texts, and the texts that it generates."""
