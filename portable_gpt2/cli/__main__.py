"""``python -m portable_gpt2.cli`` is the command ``portable-gpt2``."""

import sys

from . import main

sys.exit(main())
