"""Strict JSON: the names in an object are unique, and every number that is written is finite.

Python's `json` is more lenient. It reads an object that holds a name twice and keeps the last value, and it writes NaN
and Infinity, which are not JSON.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

_LONGEST_INT = 100  # digits


def parse(content: bytes) -> Any:
    """Return the value that a JSON document in UTF-8 describes.

    Raises
    ------
    ValueError
        If the document is not JSON, an object in it has two entries of the same name, or an integer has too many
        digits.
    RecursionError
        If the document is nested too deeply.

    Examples
    --------
    >>> from portable_gpt2 import strict_json
    >>> strict_json.parse(b'{"n_layer": 12}')
    {'n_layer': 12}
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_int=_int)


def line(value: Any) -> str:
    r"""Return a value as one line of JSON, with null for each float that is not finite.

    Examples
    --------
    >>> from portable_gpt2 import strict_json
    >>> strict_json.line({"loss": 2.5, "norm": float("inf")})
    '{"loss": 2.5, "norm": null}\n'
    """
    return json.dumps(finite(value), allow_nan=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of one object. Two entries of the same name raise an error."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"names {name[:80]!r} twice; keep the intended entry")
    return entries


def _int(digits: str) -> int:
    """Return an integer. If it is too long, the message is about the file; Python's own is about Python's settings."""
    if len(digits) > _LONGEST_INT:
        raise ValueError(f"holds an integer of {len(digits):,} digits")
    return int(digits)


def finite(value: Any) -> Any:
    """Return a value with None for each float that is not finite, and a list for each tuple."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
