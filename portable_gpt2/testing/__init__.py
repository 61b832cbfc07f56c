"""Check a backend: every promise that the portable code relies on, from single functions up to text and training."""
