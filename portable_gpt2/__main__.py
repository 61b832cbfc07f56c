"""``python -m portable_gpt2`` is the command ``portable-gpt2``."""

import sys

from .cli import main

sys.exit(main())
