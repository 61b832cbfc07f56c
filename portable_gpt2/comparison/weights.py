"""Differences of the weights of two models: which tensors differ, and which change explains each difference."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..host import StoredTensor
from .findings import WeightFinding
from .progress import Progress, silent
from .rounding import (
    BLOCK,
    ROWS,
    Precision,
    blocks,
    conversion,
    converts_to,
    everywhere,
    is_near,
    precision_of,
    rounding,
)


def differences(
    a: Mapping[str, StoredTensor],
    b: Mapping[str, StoredTensor],
    config_a: GPT2Config | None = None,
    config_b: GPT2Config | None = None,
    progress: Progress = silent,
) -> list[WeightFinding]:
    """Return the tensors in which two models differ, each with the kind of its difference.

    Values are compared, not dtypes: weights in float32 are equal to the same values in float16. One tensor of each
    model is in memory at a time. A kind is stated only if it explains every element:

    - ``absent in b``, ``other shape``, ``reshaped``, ``transposed``;
    - ``q, k, v are k, q, v of a`` (any order), ``columns are [head, 3, head_size]`` (any order of these axes);
    - ``multiplied by 0.125 = 1/8 or 1/sqrt(head_size)``, ``of the opposite sign``, ``1 less than in a``;
    - ``each row multiplied by a number of its own``, ``a number added to each column``;
    - ``47 rows added at the end``, ``rows shifted by 2``, ``rows in another order``, ``columns in another order``;
    - ``layer shifted: h2 of a``, and the name of any other tensor of a;
    - ``rounded through bfloat16``, float16, float8, TF32 and other formats, a number of decimals, int8 and int4 with a
      scale, and possibly an offset, for each row or group of elements, Q8_0 of GGUF; ``rounded through float16, a
      through bfloat16`` if two such tensors may be roundings of one tensor;
    - ``all 0 in b``, as where a bias was dropped, ``0 in some elements``, ``clipped``;
    - ``read in the other memory order``, ``bytes in the opposite order``.

    A tensor may be rounded in addition to another change. If no change explains the tensor, the kind begins with
    ``differs`` and describes the largest difference. NaN and infinity are a kind of their own.

    The output matrix is that of lm_head, or wte if the model ties the two. The findings of the path ``lm_head`` compare
    these matrices. Therefore an lm_head that is a copy of wte differs in nothing from a tied one. A bias that is absent
    does not differ from zeros.

    There is one finding for each tensor. `merged` combines the findings that are of the same kind.

    Parameters
    ----------
    a, b : dict of StoredTensor
        The parameters by path, as `read_checkpoint` returns them.
    config_a, config_b : GPT2Config, optional
        The shapes of the two models. Without config_a, the arrangements of heads are not looked for.
    progress : function, optional
        As for `compare`.

    Returns
    -------
    list of WeightFinding
        In the order of the paths of a, then of b. The largest difference is NaN if the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.checkpoint import stored
    >>> from portable_gpt2.comparison.weights import differences
    >>> w = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> [finding.kind for finding in differences({"w": stored(w)}, {"w": stored(w.T)})]
    ['transposed']
    """
    found: dict[str, WeightFinding] = {}
    samples: dict[str, np.ndarray] = {}
    unexplained: dict[str, np.ndarray] = {}
    for path in progress(dict.fromkeys([*a, *b]), "comparing weights", "tensors"):
        own = path in a, path in b
        first, second = (tensors.get(path, tensors.get("wte") if path == "lm_head" else None) for tensors in (a, b))
        if first is None or second is None:
            there = first or second
            if there is not None and not (path.endswith("/b") and not there.read().any()):
                found[path] = WeightFinding(path, "absent in b" if second is None else "absent in a", math.nan)
                (samples if second is None else unexplained)[path] = _sample(there.read())
            continue
        x, y = _values(first, second)
        samples[path] = _sample(x)
        if (kind := conversion(x, y, first.dtype, second.dtype)) == "":
            continue
        kind = _nonfinite(x, y) or kind
        if kind is None:
            kind = _kind(path, x, y, config_a, precision_of(first.dtype, second.dtype))
        if kind is None:
            kind = _difference(path, x, y)
            if all(own):
                unexplained[path] = _sample(y)
        if not all(own):
            kind = f"own in {'ab'[own[1]]}, wte in {'ab'[own[0]]}: {kind}"
        found[path] = WeightFinding(path, kind, _largest(x, y))
    for path, sample in unexplained.items():
        if (kind := _elsewhere(path, sample, a, b, samples)) is not None:
            found[path] = found[path]._replace(kind=kind if path in a else f"absent in a: {kind}")
    return list(found.values())


def merged(findings: Iterable[WeightFinding]) -> list[WeightFinding]:
    """Return one finding for each kind, with the largest of its differences.

    The path of several tensors is the first path, and the number of the others. Two kinds are the same if their texts
    are equal up to the first colon. The text is that of the first path.

    Examples
    --------
    >>> from portable_gpt2.comparison.findings import WeightFinding
    >>> from portable_gpt2.comparison.weights import merged
    >>> merged([WeightFinding(f"h{i}/ln_1/g", "rounded through bfloat16", i / 8) for i in range(3)])
    [WeightFinding(path='h0/ln_1/g and 2 more', kind='rounded through bfloat16', largest=0.25)]
    """
    groups: dict[str, list[WeightFinding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind.partition(":")[0], []).append(finding)
    return [
        WeightFinding(
            group[0].path + (f" and {len(group) - 1} more" if len(group) > 1 else ""),
            group[0].kind,
            max(finding.largest for finding in sorted(group, key=lambda finding: not math.isnan(finding.largest))),
        )
        for group in groups.values()
    ]


# Values


def _values(*tensors: StoredTensor) -> list[np.ndarray]:
    """Read tensors in the narrowest dtype, float32 or float64, that holds the values of all."""
    dtype = np.float64 if any(tensor.dtype == "float64" for tensor in tensors) else np.float32
    return [tensor.read().astype(dtype, copy=False) for tensor in tensors]


def _sample(x: np.ndarray) -> np.ndarray:
    """Return 64 elements that are spread over an array, or all elements of a smaller one."""
    return x.take(np.linspace(0, x.size - 1, min(x.size, 64)).astype(int)) if x.size else x.reshape(-1)


def _largest(x: np.ndarray, y: np.ndarray) -> float:
    if x.shape != y.shape:
        return math.nan
    with np.errstate(all="ignore"):
        return float(max(np.abs(p - q).max(initial=0.0) for p, q in blocks(*np.atleast_1d(x, y))))


def _nonfinite(x: np.ndarray, y: np.ndarray) -> str | None:
    if x.dtype == y.dtype and everywhere(_has_swapped_bytes, x, y):
        return "bytes in the opposite order"
    spoilt = {name: z for name, z in (("a", x), ("b", y)) if not everywhere(lambda p, _: np.isfinite(p).all(), z, z)}
    if not spoilt:
        return None
    name, z = list(spoilt.items())[-1]
    where = np.argwhere(~np.isfinite(z))
    said = f"{len(where):,} element{'s' * (len(where) > 1)} of {name}, the first at {_at(where[0])}"
    if everywhere(converts_to, x, y, "float16"):
        return f"rounded through float16 with overflow to infinity: {said}"
    return f"NaN or infinity in {' and '.join(spoilt)}: {said}"


def _has_swapped_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    return np.ascontiguousarray(x).byteswap().tobytes() == y.tobytes() != x.tobytes()


def _difference(path: str, x: np.ndarray, y: np.ndarray) -> str:
    """Describe a difference that nothing explains."""
    if x.shape != y.shape:
        return f"other shape: {list(x.shape)} in a, {list(y.shape)} in b"
    n, largest, place, start, squares, whole = 0, 0.0, 0, 0, 0.0, 0.0
    for p, q in blocks(*np.atleast_1d(x, y)):
        delta = np.abs(p - q)
        n += int(np.count_nonzero(delta))
        if delta.size and delta.max() > largest:
            largest, place = float(delta.max()), start + int(delta.argmax())
        squares, whole = squares + float(np.vdot(delta, delta)), whole + float(np.vdot(p, p))
        start += p.size
    at = np.unravel_index(place, x.shape)
    parts = _parts(path, x, y)
    same = [name for name, (p, q) in parts.items() if np.array_equal(p, q)]
    alone = f" in {' and '.join(name for name in parts if name not in same)} alone" if same else ""
    relative = math.sqrt(squares / max(whole, 1e-300))
    return (
        f"differs{alone}: in {n:,} of {x.size:,} elements, most at {_at(at)} with {x[at]:.6g} in a and "
        f"{y[at]:.6g} in b; the norm of the difference is {relative:.2g} times that of a"
    )


def _at(index: Iterable[Any]) -> str:
    return str([int(i) for i in index])


# What explains a difference. Each function returns the kind in words, "" for equal arrays, or None.


def _kind(path: str, x: np.ndarray, y: np.ndarray, config: GPT2Config | None, precision: Precision) -> str | None:
    by_columns = path.endswith("/w")
    for turned in (False, True):
        target = y.T if turned else y
        if turned and (y.ndim != 2 or x.shape != target.shape):
            continue
        kind = _change(path, x, target, config, precision, by_columns)
        if kind is None:
            kind = _arrangement(path, x, target, config, by_columns) or _parts_change(
                path, x, target, config, precision
            )
        if kind is not None:
            return " and ".join(filter(None, ["transposed" if turned else "", kind]))
    if x.shape == y.shape:
        return _other_memory_order(x, y) or _partial(x, y, precision) or _rows(path, x, y) or _order(x, y)
    if x.size == y.size:
        if (kind := rounding(x.reshape(-1), y.reshape(-1), by_columns)) is None:
            return None
        return " and ".join(filter(None, [f"reshaped from {list(x.shape)} to {list(y.shape)}", kind]))
    return _rows(path, x, y)


def _change(
    path: str, x: np.ndarray, y: np.ndarray, config: GPT2Config | None, precision: Precision, by_columns: bool
) -> str | None:
    """Explain a difference by an operation on each element."""
    if x.shape != y.shape or not x.size:
        return None
    if everywhere(np.array_equal, x, y):
        return ""
    for name, z in (("b", y), ("a", x)):
        if z.size > 1 and everywhere(_is_constant, z, z, z.flat[0]):
            return f"all {z.flat[0] + 0.0:.6g} in {name}"  # not -0
    if (kind := rounding(x, y, by_columns)) is not None:
        return kind
    for offset, words in ((-1, "1 less than in a, as where the op adds 1 to it"), (1, "1 more than in a")):
        if everywhere(_is_offset, x, y, offset, precision.unit):
            return words
    return _multiple(path, x, y, config, precision)


def _is_constant(x: np.ndarray, _: np.ndarray, value: float) -> Any:
    return (x == value).all()


def _is_offset(x: np.ndarray, y: np.ndarray, offset: int, unit: float) -> Any:
    return (np.abs(y - (x + offset)) <= 4 * unit * (np.abs(x) + 1)).all()


def _multiple(path: str, x: np.ndarray, y: np.ndarray, config: GPT2Config | None, precision: Precision) -> str | None:
    """Explain a difference by a constant factor."""
    if np.count_nonzero(x) < 2:
        return None
    p, q = (z.reshape(-1)[:BLOCK].astype(np.float64) for z in (x, y))
    if not (squares := p @ p):
        return None

    def is_factor(c: float) -> bool:
        return everywhere(lambda p, q: _is_scaled(p.astype(np.float64), q, precision, c), x, y)

    c = float(p @ q / squares)
    if c == 0 or not is_factor(c):
        return None
    names = {
        name: value
        for name, value in _factors(path, config).items()
        if abs(abs(c) / value - 1) < 4 * precision.unit and is_factor(math.copysign(value, c))
    }
    if "1" in names:
        return "of the opposite sign" if c < 0 else None
    value = math.copysign(next(iter(names.values()), abs(c)), c)
    minus = "-" if c < 0 else ""
    said = " or ".join(f"{minus}{name}" for name in names)
    return f"multiplied by {value:.6g}" + (f" = {said}" if said else "")


def _factors(path: str, config: GPT2Config | None) -> dict[str, float]:
    """Return the factors that have a name, in order of the names to prefer."""
    sizes: dict[str, float] = {}
    if config is not None:
        sizes = {"head_size": config.head_size, "n_embd": config.n_embd, "n_layer": config.n_layer}
        sizes |= {"2 n_layer": 2 * config.n_layer, "n_head": config.n_head}
    if match := re.match(r"h(\d+)/", path):
        sizes["layer + 1"] = int(match[1]) + 1
    named = {str(n): float(n) for n in (1, 2, 3, 4, 8, 10, 16, 32, 64, 100, 127, 128, 255, 256, 1000, 1024)}
    named |= {"sqrt(2)": math.sqrt(2)}
    named |= {f"sqrt({name})": math.sqrt(n) for name, n in sizes.items()}
    named |= {f"({name})" if " " in name else name: n for name, n in sizes.items()}
    return named | {f"1/{name}": 1 / n for name, n in named.items() if n != 1}


# Arrangements of columns, heads and rows


def _arrangement(path: str, x: np.ndarray, y: np.ndarray, config: GPT2Config | None, by_columns: bool) -> str | None:
    """Explain a difference by another arrangement of q, k, v and the heads."""
    if x.shape != y.shape or config is None:
        return None
    is_input = path.endswith("attn/c_proj/w")  # its rows are the heads, one after the other
    if is_input:
        x, y = x.T, y.T
    for words, arranged in _arrangements(path, x.shape[-1], config):
        if x.ndim > 1 and not is_near(arranged(x[:ROWS]), y[:ROWS]):
            continue
        if (kind := rounding(arranged(x), y, by_columns != is_input)) is not None:
            return " and ".join(filter(None, [words, kind]))
    return None


def _arrangements(path: str, n: int, config: GPT2Config) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yield, in words and as a function of an array [..., n], other arrangements of the last axis."""
    heads, size = config.n_head, config.head_size
    if "attn/c_attn/" in path and n == 3 * heads * size:
        orders = list(itertools.permutations(range(3)))
        for axes, order in itertools.product(itertools.permutations(range(3)), orders):
            if axes == order == (0, 1, 2):
                continue
            parts = "" if order == (0, 1, 2) else f"q, k, v are {', '.join('qkv'[i] for i in order)} of a"
            names = ("3", "head", "head_size")
            columns = "" if axes == (0, 1, 2) else f"columns are [{', '.join(names[i] for i in axes)}]"
            yield " and ".join(filter(None, [columns, parts])), _rearranged((3, heads, size), order, axes)
    elif path.endswith("attn/c_proj/w") and n == heads * size:
        yield "rows are [head_size, head]", _rearranged((1, heads, size), (0,), (0, 2, 1))


def _rearranged(
    shape: tuple[int, ...], order: tuple[int, ...], axes: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray]:
    def arranged(x: np.ndarray) -> np.ndarray:
        lead = x.ndim - 1
        parts = x.reshape(*x.shape[:-1], *shape)[..., list(order), :, :]
        return parts.transpose(*range(lead), *(lead + i for i in axes)).reshape(x.shape)

    return arranged


def _parts(path: str, x: np.ndarray, y: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return q, k and v of a tensor of c_attn; an empty dict for another tensor."""
    if "attn/c_attn/" not in path or x.shape != y.shape or x.shape[-1] % 3:
        return {}
    return dict(zip("qkv", zip(*(np.split(z, 3, axis=-1) for z in (x, y)), strict=True), strict=True))


def _parts_change(
    path: str, x: np.ndarray, y: np.ndarray, config: GPT2Config | None, precision: Precision
) -> str | None:
    """Explain q, k and v by changes of their own."""
    kinds: dict[str, list[str]] = {}
    for name, (p, q) in _parts(path, x, y).items():
        if (kind := _change(path, p, q, config, precision, path.endswith("/w"))) is None:
            return None
        kinds.setdefault(kind, []).append(name)
    return "; ".join(f"{' and '.join(names)} {kind}" for kind, names in kinds.items() if kind) or None


def _rows(path: str, x: np.ndarray, y: np.ndarray) -> str | None:
    """Explain a difference by rows that were added, removed, shifted or put into another order."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        return None
    n, more = len(x), len(y) - len(x)
    by_columns = path.endswith("/w")
    for shift in dict.fromkeys([0, more, 1, -1, 2, -2]):  # row i of a is row i + shift of b
        start, end = max(0, -shift), min(n, len(y) - shift)
        if end - start < max(2, n // 2) or (shift == 0 and not more):
            continue
        p, q = x[start:end], y[start + shift : end + shift]
        if not everywhere(is_near, p, q) or (kind := rounding(p, q, by_columns)) is None:
            continue
        words = [f"rows shifted by {shift}: row {start} of a is row {start + shift} of b" if shift else "", kind]
        if shift == 2 and path == "wpe":
            words[0] += ", as in OPT"
        if more:
            where = "end" if shift == 0 else "front" if shift == more else "front and the end"
            added = _described(np.concatenate([y[: start + shift], y[end + shift :]]), x) if more > 0 else ""
            words.insert(0, f"{abs(more)} rows {'added' if more > 0 else 'missing'} at the {where}{added}")
        return " and ".join(filter(None, words))
    short, long = (x, y) if more > 0 else (y, x)
    start = int(np.argmin([*(short == long[: len(short)]).all(axis=1), False]))
    if more and np.array_equal(long[start + abs(more) :], short[start:]):
        rows = _described(long[start : start + more], x) if more > 0 else ""
        return f"{abs(more)} rows {'added' if more > 0 else 'missing'} at row {start}{rows}"
    return None


def _order(x: np.ndarray, y: np.ndarray) -> str | None:
    """Explain a difference by rows or columns in another order, as of heads or of hidden units."""
    for name, p, q in (("row", x, y), ("column", x.T, y.T)) if x.ndim == 2 else ():
        places = {hash(row.tobytes()): i for i, row in enumerate(p)}
        order = [places.get(hash(row.tobytes()), -1) for row in q]
        if sorted(order) == list(range(len(p))) and np.array_equal(p[order], q):
            moved = [i for i, j in enumerate(order) if i != j]
            first = f"{name} {moved[0]} of b is {name} {order[moved[0]]} of a"
            return f"{name}s in another order: {len(moved):,} were moved; {first}"
    return None


def _other_memory_order(x: np.ndarray, y: np.ndarray) -> str | None:
    """Explain a difference by the order of the elements in memory, as where Fortran's was taken for C's."""
    if x.ndim == 2 and any(np.array_equal(each, y) for each in (x.T.reshape(x.shape), x.reshape(x.shape[::-1]).T)):
        return "read in the other memory order"
    return None


def _partial(x: np.ndarray, y: np.ndarray, precision: Precision) -> str | None:
    """Explain a difference by zeros, by limits, or by a number for each row or column."""
    if everywhere(lambda p, q: ((q == p) | (q == 0)).all(), x, y):
        n = int(np.count_nonzero(x != y))
        return f"0 in some elements: {n:,} of {x.size:,}; the others are equal"
    low, high = float(y.min()), float(y.max())
    if np.count_nonzero(x != y) > 1 and everywhere(lambda p, q: np.array_equal(np.clip(p, low, high), q), x, y):
        return f"clipped: to the interval from {low:.6g} to {high:.6g}"
    if x.ndim == 2 and min(x.shape) >= 3 and not everywhere(_is_scaled, x, y, precision):
        for name, p, q in (("row", x, y), ("column", x.T, y.T)):
            if everywhere(_is_scaled_by_rows, p, q, precision):
                return f"each {name} multiplied by a number of its own, as where a gain is folded in"
            if everywhere(_is_moved_by_rows, p, q, precision.unit):
                return f"a number added to each {name}, as where means are subtracted"
    return None


def _is_scaled(x: np.ndarray, y: np.ndarray, precision: Precision, by: np.ndarray | float = 1.0) -> Any:
    product = x * by
    return (np.abs(y - product) <= 4 * precision.unit * np.abs(product) + precision.tiny).all()


def _is_scaled_by_rows(x: np.ndarray, y: np.ndarray, precision: Precision) -> Any:
    x, y = x.astype(np.float64), y.astype(np.float64)
    factors = (x * y).sum(axis=1, keepdims=True) / np.maximum((x * x).sum(axis=1, keepdims=True), 1e-300)
    return _is_scaled(x, y, precision, factors)


def _is_moved_by_rows(x: np.ndarray, y: np.ndarray, unit: float) -> Any:
    x, y = x.astype(np.float64), y.astype(np.float64)
    added = (y - x).mean(axis=1, keepdims=True)
    usual = np.abs(x).mean(axis=1, keepdims=True)
    return (np.abs(y - (x + added)) <= 4 * unit * (np.abs(x) + np.abs(added) + usual)).all()


def _described(rows: np.ndarray, others: np.ndarray) -> str:
    """Describe the rows that one of two matrices has in addition."""
    if (rows == rows.flat[0]).all():
        return f", all {rows.flat[0]:.6g}"
    if (rows == rows[0]).all() and len(rows) > 1:
        return ", all rows equal"
    return f", of standard deviation {rows.std():.2g}, that of a is {others.std():.2g}"


def _elsewhere(
    path: str,
    sample: np.ndarray,
    a: Mapping[str, StoredTensor],
    b: Mapping[str, StoredTensor],
    samples: Mapping[str, np.ndarray],
) -> str | None:
    """Explain a tensor of b by another tensor of a."""
    for other, found in samples.items():
        if other in a and other != path and a[other].shape == b[path].shape and is_near(found, sample):
            x, y = _values(a[other], b[path])
            if (kind := rounding(x, y, path.endswith("/w"))) is None:
                continue
            here, there = (re.fullmatch(r"h\d+/(.*)", name) for name in (path, other))
            is_layer = here and there and here[1] == there[1]
            words = f"layer shifted: {other.partition('/')[0]} of a" if is_layer else f"that of {other} in a"
            return " and ".join(filter(None, [words, kind]))
    return None
