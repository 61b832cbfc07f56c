"""Guesses about products with a weight, about the parts q, k and v, and about sums of two terms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ...numerics import bounds
from ..steps import Alternative, Call, evaluate, merge_heads, split_heads, within
from .arithmetic import Computed, computed, exp, log
from .attention import softmax
from .case import FORMS, Case, Guesses, once, rounded
from .layer_norms import normalised

INTERLEAVED = "q, k and v are interleaved: each head has its q, its k and its v"
BY_ELEMENT = "q, k and v are interleaved element by element"

# conv1d and unembed


def weight_and_bias(case: Case) -> Guesses:
    """Yield a weight that is transposed or of the opposite sign, and a bias that is missing or added twice."""
    w, b = case.call.params["w"], case.call.params["b"]
    yield "the weight is transposed", case.but(params={"w": w.reshape(w.shape[::-1]).T})
    yield "the weight has the opposite sign", case.but(params={"w": -w})
    yield "the bias is missing", case.but(params={"b": None})
    yield "the bias is added twice", case.but(params={"b": 2 * b})
    if case.step.name.endswith("c_attn"):
        for i, part in enumerate("qkv"):
            thirds = np.split(b, 3)
            thirds[i] = np.zeros_like(thirds[i])
            yield f"the bias of {part} is missing", case.but(params={"b": np.concatenate(thirds)})


def order(case: Case) -> Guesses:
    """Yield q, k and v in another order, or interleaved by head."""
    if not case.step.name.endswith("c_attn"):
        return
    n, heads, params = case.computed.shape[-1], case.config.n_head, case.call.params
    index = np.arange(n).reshape(3, heads, -1)
    orders = {
        f"{', '.join('qkv'[i] for i in p)}, not q, k, v": index[list(p)]
        for p in itertools.permutations(range(3))
        if p != (0, 1, 2)
    }
    found = {f"the order is {cause}": (columns, "wb") for cause, columns in orders.items()}
    found |= {INTERLEAVED: (index.transpose(1, 0, 2), "wb"), BY_ELEMENT: (index.transpose(1, 2, 0), "wb")}
    found |= {f"the order of the weights is {cause}": (columns, "w") for cause, columns in orders.items()}
    found |= {f"the order of the biases is {cause}": (columns, "b") for cause, columns in orders.items()}
    for cause, (columns, names) in found.items():
        yield cause, case.but(params={name: params[name][..., columns.reshape(-1)] for name in names})


def merging(case: Case) -> Guesses:
    """Yield heads that are merged in another way."""
    (x,) = case.call.inputs
    if x.ndim == 4:
        wrong = np.ascontiguousarray(x).reshape(x.shape[0], x.shape[2], -1)
        yield "the heads are merged without a transposition", case.but(inputs=(wrong,))
        reverse = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(x.shape[0], x.shape[2], -1)
        yield "the heads are merged in the wrong order of axes", case.but(inputs=(reverse,))


def factors_rounded(case: Case) -> Guesses:
    """Yield a weight, or both factors, in fewer bits."""
    if case.call.dtype != "float32":
        return
    w = case.call.params["w"]
    for form in FORMS:
        low = {"w": rounded(w, form)}
        yield f"the weight is rounded to {form}", case.but(params=low)
        inputs = tuple(rounded(x, form) for x in case.call.inputs)
        yield f"the factors are rounded to {form}", case.but(inputs=inputs, params=low)
    if case.step.op == "conv1d":
        for axis, scope in ((None, "the tensor"), (0, "each column"), (1, "each row")):
            scale = abs(w).max(axis=axis, keepdims=True) / w.dtype.type(127)
            low = {"w": np.rint(np.divide(w, scale, out=np.zeros_like(w), where=scale > 0)) * scale}
            yield f"the weight is rounded to int8 with one scale for {scope}", case.but(params=low)


def weight_scaled(case: Case) -> Guesses:
    """Yield a weight, or a bias, that is multiplied by a number."""
    (x,) = case.call.inputs
    x, (w, b) = merge_heads(x) if x.ndim == 4 else x, (case.call.params[name] for name in "wb")
    rows, columns = case.last_rows, case.columns[:: max(1, len(case.columns) // 256)]
    product = x[:, rows].astype(np.float64) @ w[:, columns].astype(np.float64)
    bias = np.broadcast_to(b[columns].astype(np.float64), product.shape)
    for c, d in _coefficients(within(case.computed, rows, columns), product, bias):
        what = "weight" if d == 1 else "bias"
        yield (
            f"the {what} is multiplied by {c if d == 1 else d:.4g}",
            case.but(params={"w": w * w.dtype.type(c), "b": b * b.dtype.type(d)}),
        )


def head(case: Case) -> Guesses:
    """Yield another matrix for the logits, logits in another order, and probabilities."""
    w = case.call.params["w"]
    for path, name in (("wte", "the head is wte, not lm_head"), ("lm_head", "the head is lm_head, not wte")):
        tensor = case.weights.get(path)
        if tensor is not None and tensor.shape == w.shape:
            other = tensor.read().astype(w.dtype, copy=False)
            if not np.array_equal(other, w):
                yield name, case.but(params={"w": other})
    for shift in (1, -1):
        yield f"the token ids are off by {shift:+d}", case.but(params={"w": np.roll(w, shift, axis=0)})
    yield "the logits are multiplied by 1/sqrt(n_embd)", case.then(lambda y: y * case.config.n_embd**-0.5)

    last = case.computed[0, -1].astype(np.float64)
    if last.max() <= 1e-6:
        yield (
            "the results are log-probabilities, not logits",
            case.then(lambda y: y - y.max() - log(exp(y - y.max()).sum()), across=True),
        )
    if last.min() >= 0 and abs(last.sum() - 1) < 0.01:
        yield "the results are probabilities, not logits", case.then(softmax, across=True)


def in_arithmetic(call: Call, u: float) -> Computed:
    """Return the product in an arithmetic with the unit round-off u.

    Each of K roundings is relative to a partial sum, as in `bounds.linear_at_random`.
    """
    x, w = call.inputs[0], call.params["w"] if call.op == "conv1d" else call.params["w"].T
    value = evaluate(call).value.astype(np.float64)
    squares = (merge_heads(x) if x.ndim == 4 else x).astype(np.float64) ** 2 @ w.astype(np.float64) ** 2 + value**2
    return computed(value, u, bounds.gamma_at_random(w.shape[0] + 1, u) * np.sqrt(squares))


OF_CONV1D = (weight_and_bias, order, merging, factors_rounded)
OF_UNEMBED = (head, factors_rounded)


# split: q, k and v from c_attn


def parts(case: Case) -> Guesses:
    """Yield heads that are split in another way, and another part of c_attn."""
    c, part, n_head = case.call.inputs[0], case.call.options["part"], case.config.n_head
    _, seq, n = c.shape
    d = n // 3 // n_head
    for other in {0, 1, 2} - {part}:
        yield f"it holds the columns of {'qkv'[other]}", case.but(options={"part": other})
    mine = np.split(c, 3, axis=-1)[part]
    right = split_heads(mine, n_head)
    for cause, x in {
        "the heads are split element by element": mine.reshape(1, seq, d, n_head).transpose(0, 3, 1, 2),
        "the heads are split without a transposition": np.ascontiguousarray(mine).reshape(1, n_head, seq, d),
        INTERLEAVED: c.reshape(1, seq, n_head, 3, d)[:, :, :, part].transpose(0, 2, 1, 3),
        BY_ELEMENT: c.reshape(1, seq, n_head, d, 3)[..., part].transpose(0, 2, 1, 3),
    }.items():
        yield cause, case.copy(x)
    rows = case.last_rows
    small, found = within(right, rows, slice(None)), within(case.computed, rows, slice(None))
    source = [next((j for j in range(n_head) if np.array_equal(x, small[0, j])), -1) for x in found[0]]
    if min(source) >= 0 and source != [*range(n_head)]:
        cause = f"the heads are the heads {', '.join(map(str, source[:12]))}{', ...' * (n_head > 12)} of c_attn"
        if source == [*range(n_head)][::-1]:
            cause = "the heads are in reverse order"
        elif len({*source}) == 1:
            cause = f"every head has head {source[0]} of c_attn"
        yield cause, case.copy(right[:, source])


def changed_parts(case: Case) -> Guesses:
    """Yield a part that is scaled early, rotated, normalised, or rounded as in a cache."""
    part, (scale, d) = (
        "qkv"[case.call.options["part"]],
        (case.config.attention_scale(case.step.layer), case.config.head_size),
    )
    right = evaluate(case.call).value.astype(np.float64).astype(case.computed.dtype)
    if case.call.dtype == "float32":
        for form in FORMS:
            note = ", as in a cache" if part != "q" else ""
            yield f"it is rounded to {form}{note}", case.copy(rounded(right, form))
    if part == "v":
        return
    for value, name in ((scale, "scale"), (math.sqrt(scale), "square root of the scale")):
        yield f"it is multiplied by the {name} of the scores", case.then(lambda y, value=value: y * value)  # type: ignore[misc]
    for eps in (0.0, 1e-6, 1e-5, float(np.finfo(np.float32).eps)):
        yield (
            "it is divided by its root mean square",
            case.then(lambda y, eps=eps: normalised(y, eps=eps, centred=False)),  # type: ignore[misc]
        )
    if d % 2 == 0:
        angles = np.arange(right.shape[-2])[:, None] / 10000.0 ** (np.arange(d // 2) / (d // 2))
        for cause, pairs in {
            "neighbouring elements": (slice(0, None, 2), slice(1, None, 2)),
            "elements of its two halves": (slice(None, d // 2), slice(d // 2, None)),
        }.items():
            a, b = (case.given(right[..., each].astype(np.float64)) for each in pairs)
            x, y = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
            z = np.empty(right.shape), np.empty(right.shape)
            for each, half in zip(pairs, (x, y), strict=True):
                z[0][..., each], z[1][..., each] = half.value, half.error
            bounded = Computed(*z, a.u).bounded(case.call.dtype)
            yield f"it is rotated by its position, in pairs of {cause} (RoPE)", once(lambda bounded=bounded: bounded)  # type: ignore[misc]


OF_SPLIT = (parts, changed_parts)

# Sums of two terms: add and embedding


class _Sum(NamedTuple):
    """A sum of two terms, and what it is called if they have other factors."""

    first: np.ndarray
    second: np.ndarray
    names: tuple[str, str]
    factors: dict[str, tuple[float, float]]


def _sum(case: Case) -> _Sum:
    if case.step.op == "add":
        stream, branch = case.call.inputs
        return _Sum(
            stream,
            branch,
            ("residual stream", "branch"),
            {
                "the residual connection is missing": (0, 1),
                "the branch is missing": (1, 0),
                "the branch is subtracted, not added": (1, -1),
                "the branch is added twice": (1, 2),
                "the residual stream is added twice": (2, 1),
            },
        )
    ids, positions = (x[..., 0] for x in case.call.inputs)
    root = math.sqrt(case.config.n_embd)
    return _Sum(
        case.call.params["wte"][ids],
        case.call.params["wpe"][positions],
        ("token embedding", "position embedding"),
        {
            "the positions are not added": (1, 0),
            "the token embedding is not added": (0, 1),
            "the token embedding is multiplied by sqrt(n_embd)": (root, 1),
            "the token embedding is multiplied by 1/sqrt(n_embd)": (1 / root, 1),
        },
    )


def _total(case: Case, x: np.ndarray, y: np.ndarray, c: float = 1.0, d: float = 1.0) -> Alternative:
    return once(lambda: (case.given(x) * c + case.given(y) * d).bounded(case.call.dtype))


def sums(case: Case) -> Guesses:
    """Yield a term that is missing, subtracted, added twice, or multiplied by a number with a name."""
    x, y, _, factors = _sum(case)
    for cause, (c, d) in factors.items():
        yield cause, _total(case, x, y, c, d)


def sums_scaled(case: Case) -> Guesses:
    """Yield a term that is multiplied by a number, which is estimated."""
    x, y, names, _ = _sum(case)
    rows = case.last_rows
    for c, d in _coefficients(*(within(each, rows, case.columns) for each in (case.computed, x, y))):
        what = " and ".join(
            f"the {name} is multiplied by {f:.4g}" for name, f in zip(names, (c, d), strict=True) if f != 1
        )
        yield what, _total(case, x, y, c, d)


def _coefficients(total: np.ndarray, x: np.ndarray, y: np.ndarray) -> Iterable[tuple[float, float]]:
    """Return possible factors of the terms of a sum: one that differs from 1, or both."""
    total, x, y = (each.astype(np.float64).reshape(-1) for each in (total, x, y))
    if not (np.isfinite(total).all() and x.any() and y.any()):
        return []
    both = np.linalg.lstsq(np.stack([x, y], axis=1), total, rcond=None)[0]
    found = [(float((total - y) @ x / (x @ x)), 1.0), (1.0, float((total - x) @ y / (y @ y))), tuple(map(float, both))]
    return [(c, d) for c, d in found if max(abs(c - 1), abs(d - 1)) > 1e-6]


def embeddings(case: Case) -> Guesses:
    """Yield other positions and other token ids, sines and cosines, and matrices in fewer bits."""
    call = case.call
    ids, positions = call.inputs
    wte, wpe = call.params["wte"], call.params["wpe"]
    a, b = wte[ids[..., 0]], wpe[positions[..., 0]]
    seq, n = a.shape[1:]
    angles = np.arange(seq)[:, None] / 10000.0 ** (np.arange(0, n, 2) / n)
    for waves in (
        np.stack([np.sin(angles), np.cos(angles)], axis=-1),
        np.concatenate([np.sin(angles), np.cos(angles)]),
    ):
        table = waves.reshape(2, seq, -1).transpose(1, 0, 2) if waves.ndim == 2 else waves
        table = table.reshape(1, seq, -1)[..., :n].astype(a.dtype)
        yield "the positions are sines and cosines, not wpe", _total(case, a, table)
    for form in FORMS if call.dtype == "float32" else ():
        yield f"the embedding matrices are rounded to {form}", _total(case, rounded(a, form), rounded(b, form))
    given = case.computed[0].astype(np.float64)
    if not np.isfinite(given).all():
        return
    found = _nearest(given - a[0].astype(np.float64), wpe)
    if not np.array_equal(found, positions[0, :, 0]):
        yield _shift("positions", found - positions[0, :, 0], found), case.but(inputs=(ids, found[None, :, None]))
    found = _nearest(given - b[0].astype(np.float64), wte)
    if not np.array_equal(found, ids[0, :, 0]):
        yield _shift("token ids", found - ids[0, :, 0], found), case.but(inputs=(found[None, :, None], positions))


def _nearest(rows: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the index of the row of a table that is nearest to each row."""
    best, index = np.full(len(rows), np.inf), np.zeros(len(rows), np.int64)
    for start in range(0, len(table), 8192):
        block = table[start : start + 8192].astype(np.float64)
        distance = (block * block).sum(axis=1) - 2 * rows @ block.T
        nearest = distance.argmin(axis=1)
        smaller = distance[np.arange(len(rows)), nearest] < best
        index[smaller], best[smaller] = start + nearest[smaller], distance.min(axis=1)[smaller]
    return index


def _shift(what: str, difference: np.ndarray, found: np.ndarray) -> str:
    if len({*difference.tolist()}) == 1:
        return f"the {what} are off by {difference[0]:+d}"
    shown = ", ".join(str(i) for i in found[:6].tolist())
    return f"the {what} are {shown}{', ...' if len(found) > 6 else ''}"


OF_ADD = (sums,)
OF_EMBEDDING = (sums, embeddings)
