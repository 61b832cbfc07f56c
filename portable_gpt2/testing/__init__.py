"""Check a backend: every promise that the portable code relies on, from single functions up to text and training.

    portable-gpt2 check mlx                                     # or testing.check("mlx"), or testing.check(MyBackend())
    pytest --pyargs portable_gpt2.testing --backend mlx

The tests need the extra ``testing``. They are imported when a backend is checked, and not before.
"""

from ..registry import registered
from .conformance import LEVELS, Interrupted, check
from .report import Report

__all__ = ["LEVELS", "Interrupted", "Report", "check", "registered"]
