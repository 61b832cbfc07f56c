"""JSON that any parser reads. JSON has no NaN and no infinity, which Python's `json` writes all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def line(value: Any) -> str:
    r"""Return a value as one line of JSON, with null for each float that is not finite.

    Examples
    --------
    >>> from portable_gpt2 import strict_json
    >>> strict_json.line({"loss": 2.5, "norm": float("inf")})
    '{"loss": 2.5, "norm": null}\n'
    """
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
