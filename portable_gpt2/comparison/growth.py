"""How the difference of two traces grows, and how large a difference rounding can be expected to cause.

Proved: if the result of every op of a model is within its bound, then the difference of its logits from the exact ones
is caused by rounding alone, however large it is. This needs no model of the errors.

Modelled: how large the difference usually is. A bound for the whole model would be far larger than any difference that
occurs, because it would assume that all roundings have the worst sign. So the roundings are simulated.
The reference model runs in float64 with several copies of the text. In each copy, every op's result is changed by a
random sign times the size of its rounding error, which is, with the notation of `portable_gpt2.numerics.bounds`:

- u |y| for one rounding: an embedding, a residual addition, and each result that is stored in 16 bits;
- u sqrt(K + 1) sqrt(Q^2 + y^2) for a product of depth K, where Q^2 is the sum of the squares of the products and of the
  bias. A partial sum is a random walk to Q, or a straight line to y, and each of K roundings is independent of the
  others (see `linear_at_random`);
- for layer_norm, u (|g| (sqrt(n) M / r + (sqrt(n) / 2 + 3) |N|) + |y|): the errors of the mean, of the deviation and of
  the root, with independent roundings;
- for attention, the errors of the scores, which are products; u (sqrt(n) + d + 2) w for softmax; and those of a product
  of depth n;
- for GELU, half of its bound.

These are sizes for sums in the order of the indices, with rounding errors of the largest possible magnitude. Sums in
blocks, which all fast libraries use, have errors that are several times smaller. The difference that rounding can be
expected to cause is twice the largest difference of two copies, over all elements and some pairs of copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..config import GPT2Config
from ..host import StoredTensor
from ..numerics.bounds import FORMATS, computed_in
from ..params import shapes
from .findings import Growth, LogitsFinding
from .progress import Progress, silent
from .steps import has_rows, merge_heads, split_heads, steps, with_infinite_scores
from .trace import Trace

_VOCABULARY_AT_ONCE = 8192


class _Rounding:
    """Random errors for copies of a text. The first half of the copies has the dtype of a, the other that of b."""

    def __init__(self, dtypes: tuple[str, str], pairs: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        each = [dtype for dtype in dtypes for _ in range(pairs)]
        self.copies = len(each)
        self.u = np.asarray([FORMATS[computed_in(dtype)].unit for dtype in each])[:, None, None]
        self.stored = np.asarray([FORMATS[d].unit if computed_in(d) != d else 0.0 for d in each])[:, None, None]

    def _signs(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.random.integers(0, 2, shape, np.int8) * 2.0 - 1

    def __call__(self, y: np.ndarray, size: np.ndarray | float, *, stores: bool = True) -> np.ndarray:
        """Return y with an error of the given size in units of u, and with that of storing it in 16 bits."""
        u, stored = (a[..., None] if y.ndim == 4 else a for a in (self.u, self.stored))
        y = y + self._signs(y.shape) * (u * size)
        if stores and stored.any():
            y = y + self._signs(y.shape) * (stored * abs(y))
        return y

    def of_weights(self, y: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return y with the error of weights that are rounded to 16 bits."""
        return y + self._signs(y.shape) * (self.stored * size) if self.stored.any() else y

    def product(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, *, stores: bool = True) -> np.ndarray:
        """Return x w + b with its error, and in 16 bits with the error of rounded weights.

        The sizes of the errors are those of the first copy.
        """
        y = (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])  # one product reads w once
        squares = (x[:1].astype(np.float32) ** 2 @ w.astype(np.float32) ** 2).astype(np.float64)
        if b is not None:
            y, squares = y + b, squares + b**2
        return self(
            self.of_weights(y, np.sqrt(squares)),
            math.sqrt(x.shape[-1] + 1) * np.sqrt(squares + y[:1] ** 2),
            stores=stores,
        )


def simulated(
    tokens: np.ndarray,
    weights: Mapping[str, StoredTensor],
    config: GPT2Config,
    dtypes: tuple[str, str],
    *,
    n_vocab: int | None = None,
    pairs: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[tuple[str, float]]:
    """Yield the name of each result, in the order of computation, and twice the largest difference of two copies.

    Parameters
    ----------
    tokens : int array [1, seq]
        The token ids.
    weights : dict of StoredTensor
        The parameters of the reference model by path.
    config : GPT2Config
        The model's shape and options.
    dtypes : pair of str
        The dtypes of the two sides.
    n_vocab : int, optional
        The number of logits, if not all of them are compared.
    pairs : int
        The number of pairs of copies.
    seed : int
        The seed of the signs.
    progress : function, optional
        As for `compare`.

    Examples
    --------
    >>> from portable_gpt2.checkpoint import stored
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> weights = {path: stored(a) for path, a in pg.params.flatten(pg.init_params(config, backend="numpy"))}
    >>> found = dict(simulated(np.asarray([[1, 2, 3]]), weights, config, ("float32", "float32")))
    >>> 1e-9 < found["logits"] < 1e-5
    True
    """

    def read(path: str) -> np.ndarray:
        return weights[path].read().astype(np.float64)

    rounding = _Rounding(dtypes, pairs, seed)

    def widest(y: np.ndarray) -> float:
        return 2 * float(abs(y[:pairs] - y[pairs:]).max(initial=0))

    seq = tokens.shape[1]
    parts = weights["wte"].read()[tokens[0]], weights["wpe"].read()[:seq]
    rows, places = (np.repeat(part[None].astype(np.float64), rounding.copies, axis=0) for part in parts)
    x = rounding.of_weights(rows, abs(rows)) + rounding.of_weights(places, abs(places))
    known: dict[str, np.ndarray] = {"embedding": rounding(x, abs(x))}
    scores = np.empty(0)
    for step in progress(steps(config), "simulating rounding errors", "results"):
        inputs = [known[name] for name in step.inputs]
        if step.op == "layer_norm":
            y = _layer_norm(rounding, inputs[0], read(f"{step.scope}/g"), read(f"{step.scope}/b"), config)
        elif step.op == "conv1d":
            x = merge_heads(inputs[0]) if inputs[0].ndim == 4 else inputs[0]
            y = rounding.product(x, read(f"{step.scope}/w"), read(f"{step.scope}/b"))
        elif step.op == "split":
            y = split_heads(np.split(inputs[0], 3, axis=-1)["qkv".index(step.name[-1])], config.n_head)
        elif step.op == "attention_scores":
            y = scores = config.attention_scale(step.layer) * _scores(rounding, *inputs)
            y = np.where(np.tri(seq, dtype=np.bool_), rounding(y, 0.0), 0)
        elif step.op == "attention_weights":
            y = _softmax(rounding, scores, config.head_size)
        elif step.op == "attention":
            w = known[step.name.replace("/attention", "/weights")]
            squares = w[:1] ** 2 @ inputs[2][:1] ** 2
            y = w @ inputs[2]
            y = rounding(y, math.sqrt(seq + 1) * np.sqrt(squares + y[:1] ** 2))
        elif step.op == "add":
            y = inputs[0] + inputs[1]
            y = rounding(y, abs(y))
        elif step.op == "gelu":
            y = _gelu(rounding, inputs[0])
        elif step.op == "unembed":
            yield (
                step.name,
                max(widest(rounding.product(inputs[0], block.T, None)) for block in _blocks(weights, n_vocab)),
            )
            continue
        else:
            y = known[step.name]
        if step.name.endswith("/ln_1"):  # of the layers before this one, only the residual stream is needed
            known = {step.inputs[0]: inputs[0]}
        known[step.name] = y
        yield step.name, widest(y)


def _blocks(weights: Mapping[str, StoredTensor], n_vocab: int | None) -> Iterator[np.ndarray]:
    """Yield the rows of the matrix that computes the logits, in blocks."""
    w = weights["lm_head" if "lm_head" in weights else "wte"].read()[:n_vocab]
    for start in range(0, len(w), _VOCABULARY_AT_ONCE):
        yield w[start : start + _VOCABULARY_AT_ONCE].astype(np.float64)


def _layer_norm(rounding: _Rounding, x: np.ndarray, g: np.ndarray, b: np.ndarray, config: GPT2Config) -> np.ndarray:
    n = x.shape[-1]
    d = x - x.mean(axis=-1, keepdims=True)
    r = np.sqrt((d * d).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
    N = d / r
    y = g * N + b
    of_mean = math.sqrt(n) * abs(x).mean(axis=-1, keepdims=True) / r
    return rounding(y, abs(g) * (of_mean + (math.sqrt(n) / 2 + 3) * abs(N)) + abs(y))


def _scores(rounding: _Rounding, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return unscaled scores, which attention keeps in float32."""
    k = np.swapaxes(k, -1, -2)
    y, squares = q @ k, q[:1] ** 2 @ k[:1] ** 2
    return rounding(y, math.sqrt(q.shape[-1] + 4) * np.sqrt(squares + y[:1] ** 2), stores=False)


def _softmax(rounding: _Rounding, scores: np.ndarray, d: int) -> np.ndarray:
    scores = np.where(np.tri(scores.shape[-1], dtype=np.bool_), scores, -np.inf)
    distances = scores.max(axis=-1, keepdims=True) - scores
    e = np.exp(-distances)
    w = e / e.sum(axis=-1, keepdims=True)
    return rounding(w, (math.sqrt(w.shape[-1]) + 4 + np.minimum(distances, 1e3)) * w)


def _gelu(rounding: _Rounding, x: np.ndarray) -> np.ndarray:
    root = math.sqrt(2 / math.pi)
    z1, z3 = root * x, root * 0.044715 * x**3
    t = np.tanh(z1 + z3)
    y = x / 2 * (1 + t)
    return rounding(y, abs(x) / 4 * ((3 * abs(z1) + 7 * abs(z3)) * (1 - t * t) + 2 * abs(t)) + abs(y))


def growth(
    a: Trace,
    b: Trace,
    config: GPT2Config,
    weights: Mapping[str, StoredTensor],
    names: list[str],
    progress: Progress = silent,
) -> list[Growth]:
    """Return the differences of the results that two traces have, with the differences that rounding may cause.

    Parameters
    ----------
    a, b : Trace
        Two traces of the same tokens.
    config : GPT2Config
        The model's shape and options.
    weights : dict of StoredTensor
        The parameters of a by path. If some are missing, the differences that rounding may cause are NaN.
    names : list of str
        The names of the results, in the order of computation.
    progress : function, optional
        As for `compare`.
    """
    common = [name for name in names if name in a.arrays and name in b.arrays]
    needed = shapes(config).keys() - {"lm_head"}
    expected = dict[str, float]()
    if common and needed <= weights.keys() and has_rows(weights, a.tokens):
        n = n_common(a, b) if "logits" in common else None
        with np.errstate(all="ignore"):
            dtypes = a.dtype, b.dtype
            expected.update(simulated(a.tokens, weights, config, dtypes, n_vocab=n, progress=progress))
    return [
        Growth(name, difference(*(_seen(name, each, a, b) for each in (a, b))), expected.get(name, math.nan))
        for name in common
    ]


def largest_jump(a: Trace, b: Trace, config: GPT2Config, grown: Mapping[str, Growth]) -> tuple[str, float] | None:
    """Return the result whose difference, relative to its largest element, exceeds that of its inputs by most.

    This shows where two traces part if their weights are not known. The difference of inputs counts as at least one
    rounding.

    Parameters
    ----------
    a, b : Trace
        Two traces of the same tokens.
    config : GPT2Config
        The model's shape.
    grown : dict of Growth
        The results that both have, by name.

    Returns
    -------
    name : str
        The result.
    factor : float
        The ratio of the two relative differences. Without such a result, None is returned.
    """
    unit = max(FORMATS[each.dtype].unit for each in (a, b))
    relative = dict[str, float]()
    for name, each in grown.items():
        x = abs(_seen(name, a, a, b).astype(np.float64))
        largest = float(x.max(initial=0, where=np.isfinite(x)))
        relative[name] = each.difference / largest if largest else math.inf if each.difference else 0.0
    jumps = [
        (step.name, relative[step.name] / before)
        for step in steps(config)
        if relative.keys() >= {step.name, *step.inputs}
        and (before := max([unit, *(relative[each] for each in step.inputs)])) < math.inf
    ]
    return max(jumps, key=lambda jump: jump[1], default=None)


def n_common(a: Trace, b: Trace) -> int:
    """Return the number of logits that both traces have."""
    return min(int(each.arrays["logits"].shape[-1]) for each in (a, b))


def _seen(name: str, trace: Trace, a: Trace, b: Trace) -> np.ndarray:
    """Return a result, in which hidden scores are -inf, and only the logits that both traces have."""
    x = trace.arrays[name]
    if name == "logits":
        return x[..., : n_common(a, b)]
    return with_infinite_scores(x, np.tri(x.shape[-1], dtype=np.bool_)) if name.endswith("/scores") else x


def difference(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest absolute difference of two arrays. Equal infinities do not differ."""
    largest = 0.0
    for i in range(x.shape[-2]):
        u, v = (a[..., i, :].astype(np.float64) for a in (x, y))
        with np.errstate(invalid="ignore"):
            largest = max(
                largest, float(np.where(u == v, 0, np.nan_to_num(abs(u - v), nan=np.inf, posinf=np.inf)).max(initial=0))
            )
    return largest


def of_logits(x: np.ndarray, y: np.ndarray) -> LogitsFinding:
    """Compare two arrays of logits [1, seq, n_vocab], which may differ in n_vocab; x are those of the reference.

    Examples
    --------
    >>> of_logits(np.asarray([[[0.0, 1.0]]]), np.asarray([[[1.0, 0.0]]]))._asdict()
    {'largest': 1.0, 'divergence': 0.4621171572600098, 'first': 0, 'greedy': (1, 0), 'common': None, 'outside': 0}
    >>> of_logits(np.asarray([[[0.0, 1.0]]]), np.asarray([[[0.0, 1.0, 2.0]]]))._asdict()
    {'largest': 0.0, 'divergence': 0.0, 'first': 0, 'greedy': (1, 2), 'common': 2, 'outside': 1}
    """
    n, is_one = min(x.shape[-1], y.shape[-1]), x.shape[-1] == y.shape[-1]
    divergence, first, greedy, outside = 0.0, None, None, 0
    with np.errstate(all="ignore"):
        for i in range(x.shape[1]):
            u, v = (a[0, i].astype(np.float64) for a in (x, y))
            p, q = _log_softmax(u[:n]), _log_softmax(v[:n])
            found = float(np.where(p == -np.inf, 0, np.exp(p) * (p - q)).sum())
            divergence = max(divergence, math.inf if math.isnan(found) else max(found, 0.0))
            tokens = int(u.argmax()), int(v.argmax())
            outside += max(tokens) >= n
            if first is None and tokens[0] != tokens[1]:
                first, greedy = i, tokens
    return LogitsFinding(difference(x[..., :n], y[..., :n]), divergence, first, greedy, None if is_one else n, outside)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    shifted: np.ndarray = x - np.log(np.exp(x).sum())
    return shifted
