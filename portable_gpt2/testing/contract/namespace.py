"""The calls of namespace functions, the operators and the indices that portable code uses, as a table.

A key is an expression. Its value has the arrays that the expression names. The tests evaluate the expression with the
namespace of the backend and with NumPy, and compare the results. `tests/test_rules.py` checks that the table has every
function that portable code calls, with its keywords, and no others; and so does the docstring of `Backend.xp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Group(NamedTuple):
    """Expressions that are evaluated in the same floating dtypes."""

    dtypes: tuple[str, ...]
    calls: Mapping[str, Mapping[str, np.ndarray]]


# All elements are multiples of 1/4 below 8, so the results of most expressions are exact in every floating dtype.
_X = np.asarray([[1.0, -2.0, 0.5], [0.25, 3.0, -1.5]])
_Y = np.asarray([[2.0, 1.0, 0.5], [4.0, -1.0, 0.25]])
_POSITIVE = np.asarray([[1.0, 4.0, 0.25], [2.25, 1.0, 6.25]])
_HEADS = (np.arange(48.0).reshape(2, 3, 2, 4) % 13 - 6) / 4
_KEYS = (np.arange(48.0).reshape(2, 3, 4, 2) % 7 - 3) / 4
_SCALAR = np.asarray(2.0)
_NO_ROWS = np.zeros((0, 3))
_M = np.asarray([[True, False, True], [False, False, True]])
_N = np.asarray([[True, True, False], [False, True, False]])
_ROWS = np.asarray([True, False])
_I = np.asarray([[3, 0, -2], [5, 1, 4]], np.int32)
_J = np.asarray([[0, 3, -2], [5, -1, 2**31 - 2]], np.int32)
_AT = np.asarray([1, 0, 1], np.int32)
_COLUMNS = np.asarray([[2, 0], [1, 1]], np.int32)
_ID = np.asarray(1, np.int32)

_EVERY_DTYPE = Group(
    ("float32", "float64", "bfloat16", "float16"),
    {
        "x + y": {"x": _X, "y": _Y},
        "x + b": {"x": _X, "b": _Y[0]},
        "xp.reshape(x, (3, 2))": {"x": _X},
        "xp.reshape(x, (2, 1, 3))": {"x": _X},
        "xp.reshape(x, (0, 3, 1))": {"x": _NO_ROWS},
        "xp.reshape(s, (1,))": {"s": _SCALAR},
        "xp.reshape(x, ())": {"x": _X[:1, 0]},
        "xp.permute_dims(h, (0, 2, 1, 3))": {"h": _HEADS},
        "xp.matrix_transpose(x)": {"x": _X},
        "xp.matrix_transpose(h)": {"h": _HEADS},
        "xp.concat([x, y], axis=0)": {"x": _X, "y": _Y},
        "xp.concat([x, y], axis=1)": {"x": _X, "y": _Y[:, :1]},
        "xp.concat([x, y], axis=-2)": {"x": _X, "y": _NO_ROWS},
        "xp.concat((x, y), axis=-1)": {"x": _X, "y": _Y},
        "xp.take(x, xp.astype(i, xp.int64), axis=0)": {"x": _X, "i": _AT},
        "xp.take(h, i, axis=1)": {"h": _HEADS, "i": _AT[:1]},
        "xp.where(m, x, y)": {"m": _M, "x": _X, "y": _Y},
        "xp.astype(x, xp.float32)": {"x": _X},
        "xp.astype(x, x.dtype, copy=False)": {"x": _X},
        "xp.astype(m, x.dtype)": {"m": _M, "x": _X},
        "xp.astype(s, x.dtype)": {"s": _ID, "x": _X},
        "x[..., None]": {"x": _X},
        "x[None, :, :]": {"x": _X},
        "x[..., 0]": {"x": _X},
        "x[0, ...]": {"x": _X},
        "b[1]": {"b": _Y[0]},
        "x[..., 1:3]": {"x": _X},
        "x[..., :1, :]": {"x": _HEADS},
        "x[..., 1:, :]": {"x": _HEADS},
        "x[:, 0, :]": {"x": _HEADS[0]},
        "x[:, -1:]": {"x": _X},
        "x[:1, :]": {"x": _X},
        "x[:, 1:2]": {"x": _X},
        "x[0, :][:, None]": {"x": _X},
    },
)
_WIDE = Group(  # 16-bit arrays are converted before they are computed with
    ("float32", "float64"),
    {
        "xp.exp(x)": {"x": _X},
        "xp.log(x)": {"x": _POSITIVE},
        "xp.tanh(x)": {"x": _X},
        "xp.sqrt(x)": {"x": _POSITIVE},
        "xp.max(x, axis=-1, keepdims=True)": {"x": _X},
        "xp.max(x, axis=-2, keepdims=True)": {"x": _HEADS},
        "xp.sum(x, axis=-1, keepdims=True)": {"x": _X},
        "xp.sum(x, axis=-1)": {"x": _HEADS},
        "xp.sum(x, axis=0)": {"x": _X},
        "xp.sum(x, axis=(0, 1))": {"x": _HEADS},
        "xp.sum(x)": {"x": _X},
        "xp.mean(x, axis=-1, keepdims=True)": {"x": _HEADS},
        "xp.mean(x)": {"x": _HEADS[0, 0]},
        "xp.cumulative_sum(x, axis=-1)": {"x": _X},
        "xp.matmul(x, y)": {"x": _X, "y": _HEADS[0, :, 0]},
        "xp.matmul(x, y)  # of several matrices": {"x": _HEADS, "y": _KEYS},
        "xp.matmul(x, xp.matrix_transpose(y))": {"x": _X, "y": _Y},
        "xp.matmul(x, y)  # without rows": {"x": _NO_ROWS, "y": _HEADS[0, :, 0]},
        "xp.take_along_axis(x, xp.astype(i, xp.int64), axis=-1)": {"x": _X, "i": _COLUMNS},
        "xp.where(r[..., None], x, math.nan)": {"r": _ROWS, "x": _X},
        "xp.where(m, x, -math.inf)": {"m": _M, "x": _X},
        "xp.where(m, x, 0.0)": {"m": _M, "x": _X},
        "xp.where(m, x, 0)": {"m": _M, "x": _X},
        "xp.where(m, 1.0, x)": {"m": _M, "x": _X},
        "xp.where(s > 1.5, 1.5 / (s + 1), 1.0)": {"s": _SCALAR},
        "x - y": {"x": _X, "y": _Y},
        "x * y": {"x": _X, "y": _Y},
        "x / y": {"x": _X, "y": _Y},
        "x / s": {"x": _X, "s": _SCALAR},
        "s * x": {"x": _X, "s": _SCALAR},
        "0.5 * x": {"x": _X},
        "x * 0.5": {"x": _X},
        "1 + x": {"x": _X},
        "x + 1.0": {"x": _X},
        "1 - x": {"x": _X},
        "x - 1": {"x": _X},
        "x / 2": {"x": _X},
        "1.5 / x": {"x": _POSITIVE},
        "s ** -0.5": {"s": np.asarray(4.0)},
        "-x": {"x": _X},
        "abs(x)": {"x": _X},
        "x == y": {"x": _X, "y": _Y},
        "x < y": {"x": _X, "y": _Y},
        "x <= y": {"x": _X, "y": _Y},
        "x > y": {"x": _X, "y": _Y},
        "x >= y": {"x": _X, "y": _Y},
        "x == 0": {"x": _X},
        "x < math.inf": {"x": _X},
        "x <= 0.5": {"x": _X},
        "x > -math.inf": {"x": _X},
        "x >= 0.5": {"x": _X},
    },
)
_NO_DTYPE = Group(
    ("float32",),
    {
        "i + 1": {"i": _I},
        "2 + i": {"i": _I},
        "i - 1": {"i": _I},
        "i - j": {"i": _I, "j": _I[0]},
        "-1 - i": {"i": _I},
        "-i": {"i": _I},
        "i == j": {"i": _I, "j": _J},
        "i[..., None] == j": {"i": _I, "j": _I[0]},
        "i >= 0": {"i": _I},
        "i < 4": {"i": _I},
        "i <= 0": {"i": _I},
        "i >= j": {"i": _I, "j": _J},
        "i < j": {"i": _I, "j": _J},
        "(i >= 0) & (i < 4)": {"i": _I},
        "m & n": {"m": _M, "n": _N},
        "m | n": {"m": _M, "n": _N},
        "m[:, None, :]": {"m": _M},
        "i[:, None] >= j[None, :]": {"i": _I[0], "j": _I[1]},
        "i[:, 1:]": {"i": _I},
        "i[:, :-1]": {"i": _I},
        "xp.where(m, i, 0)": {"m": _M, "i": _I},
        "xp.where(m, i, -1)": {"m": _M, "i": _I},
        "xp.where(m, 0, i)": {"m": _M, "i": _I},
        "xp.where(m, i, -1 - i)": {"m": _M, "i": _I},
        "xp.where(m, -i, -(2**31 - 1))": {"m": _M, "i": _I},
        "xp.max(i, axis=-1, keepdims=True)": {"i": _J},
        "xp.sum(xp.astype(i < 2, xp.int32)) > 0": {"i": _I},
        "xp.sum(xp.astype(m, xp.int32), axis=-1, keepdims=True) == 1": {"m": _M},
        "xp.concat([i, j], axis=0)": {"i": _I, "j": _J},
        "xp.concat([i, j], axis=1)": {"i": _I, "j": _J},
        "xp.reshape(i, (6,))": {"i": _I},
        "xp.reshape(m, (3, 2))": {"m": _M},
        "xp.astype(i, xp.int32)": {"i": _I},
        "xp.astype(i, xp.int64)": {"i": _I},
        "xp.astype(i, xp.int64, copy=False)": {"i": _I},
    },
)
GROUPS = (_EVERY_DTYPE, _WIDE, _NO_DTYPE)

# Evaluated while the framework permits 64 bits. i and j are int64: products and sums wrap around, and a shift to the
# right keeps the sign.
_UPPER = np.asarray([[0, -1, 2**31 - 1], [-(2**31), 7, -5]], np.int32)
_LOWER = np.asarray([[3, -1, -2], [0, 2**31 - 1, -(2**31)]], np.int32)
HALVES = {"i": (_UPPER, _LOWER), "j": (_LOWER, _UPPER)}
"""The upper and the lower 32 bits of i and of j."""
LONG = "xp.astype(upper, xp.int64) * 2**32 + (xp.astype(lower, xp.int64) & 0xFFFFFFFF)"
IN_64_BITS = (
    "i + j",
    "i * j",
    "i ^ j",
    "i & 3",
    "i & 0xFFFFFFFF",
    "i * -0x2D18B8F11B73936D",
    "i + -0x61C8864680B583EB",
    "xp.bitwise_right_shift(i, 12) & (2**52 - 1)",
    "xp.bitwise_right_shift(i, 32)",
    "(i & 3) == 3",
    "xp.where(i == j, i, j)",
    "xp.astype(i, xp.float64)",
    "(xp.astype(i & 0xFFF, xp.float64) + 0.5) * 2.0**-52",
    "-xp.log(-xp.log((xp.astype(i & 0xFFF, xp.float64) + 0.5) * 2.0**-12))",
    "xp.sum(xp.astype(i & 0xFFF, xp.float64), axis=0)",
    "xp.cumulative_sum(xp.astype(i & 0xFFF, xp.float64), axis=-1)",
    "xp.where(i == j, xp.astype(i, xp.float64), -math.inf)",
    "xp.take(xp.astype(i, xp.float64), xp.astype(i[0, :1] & 1, xp.int32), axis=1)",
)

ISDTYPE = "xp.isdtype(dtype, kind)"
KINDS = {"integral": "iu", "bool": "b"}
"""The kinds that `ISDTYPE` must know, and the characters of NumPy's kinds."""

OF_DEFAULTS = {
    "put": "xp.asarray(a, device=device)",
    "arange": "xp.arange(n, device=device)",
    "zeros": "xp.zeros(shape, dtype=dtype, device=device)",
    "top_k": "xp.argsort(-x, axis=-1)",
}
"""The calls that only the defaults of `Backend` make, by the method that an adapter may define instead."""

EXPRESSIONS = (*(text for group in GROUPS for text in group.calls), *IN_64_BITS, LONG, ISDTYPE, *OF_DEFAULTS.values())
"""All expressions."""


def evaluate(text: str, xp: Any, arrays: Mapping[str, Any]) -> Any:
    """Return the value of an expression of the table, with a namespace and its arrays."""
    return eval(text, {"xp": xp, "math": math, **arrays})
