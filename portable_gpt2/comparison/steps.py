"""How each result of the model is computed from others, as a table, and the judgement on one result.

A result is judged in isolation: it is compared with the exact result of its op on the inputs that are in the same
trace. An error in an earlier op changes these inputs, and not the judgement. The bounds are those of
`portable_gpt2.numerics.bounds`, with `gamma_probable` for long sums. They permit every order of summation, the scale at
q, at k or at the scores, and fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..config import GPT2Config
from ..host import StoredTensor, float_dtypes
from ..numerics import Numerics, bounds
from ..numerics.bounds import Bounded
from ..params import shapes

Results = Callable[[str], np.ndarray | None]
"""A result by its name; None if it is not known."""
Alternative = Callable[[Any, Any], Bounded]
"""A function of positions and columns, which are indices or slices. It returns these elements of a result."""


class Step(NamedTuple):
    """How a result is computed.

    Parameters
    ----------
    name : str
        The result.
    op : str
        A key of `OPS`.
    inputs : tuple of str
        The results that the op reads.
    scope : str
        The scope of the parameters that the op reads.
    layer : int
        The layer, counted from 0.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    scope: str = ""
    layer: int = 0


# {h} is the layer, and {x} is the residual stream before it.
_LAYER = (
    Step("{h}/ln_1", "layer_norm", ("{x}",), "{h}/ln_1"),
    Step("{h}/attn/c_attn", "conv1d", ("{h}/ln_1",), "{h}/attn/c_attn"),
    Step("{h}/attn/q", "split", ("{h}/attn/c_attn",)),
    Step("{h}/attn/k", "split", ("{h}/attn/c_attn",)),
    Step("{h}/attn/v", "split", ("{h}/attn/c_attn",)),
    Step("{h}/attn/scores", "attention_scores", ("{h}/attn/q", "{h}/attn/k")),
    Step("{h}/attn/weights", "attention_weights", ("{h}/attn/q", "{h}/attn/k")),
    Step("{h}/attn/attention", "attention", ("{h}/attn/q", "{h}/attn/k", "{h}/attn/v")),
    Step("{h}/attn/c_proj", "conv1d", ("{h}/attn/attention",), "{h}/attn/c_proj"),
    Step("{h}/attn/residual", "add", ("{x}", "{h}/attn/c_proj")),
    Step("{h}/ln_2", "layer_norm", ("{h}/attn/residual",), "{h}/ln_2"),
    Step("{h}/mlp/c_fc", "conv1d", ("{h}/ln_2",), "{h}/mlp/c_fc"),
    Step("{h}/mlp/gelu", "gelu", ("{h}/mlp/c_fc",)),
    Step("{h}/mlp/c_proj", "conv1d", ("{h}/mlp/gelu",), "{h}/mlp/c_proj"),
    Step("{h}/residual", "add", ("{h}/attn/residual", "{h}/mlp/c_proj")),
)


def steps(config: GPT2Config) -> list[Step]:
    """Return the steps of the model, in the order of computation.

    Examples
    --------
    >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> steps(config)[1]
    Step(name='h0/ln_1', op='layer_norm', inputs=('embedding',), scope='h0/ln_1', layer=0)
    >>> from portable_gpt2.model import observed_names
    >>> [step.name for step in steps(config)] == observed_names(config)
    True
    """
    found, x = [Step("embedding", "embedding")], "embedding"
    for i in range(config.n_layer):
        h = f"h{i}"
        for step in _LAYER:
            name, scope = step.name.format(h=h), step.scope.format(h=h)
            found.append(Step(name, step.op, tuple(each.format(h=h, x=x) for each in step.inputs), scope, i))
        x = f"{h}/residual"
    return [*found, Step("ln_f", "layer_norm", (x,), "ln_f"), Step("logits", "unembed", ("ln_f",))]


def split_heads(x: np.ndarray, n_head: int) -> np.ndarray:
    """Return [1, heads, seq, d] for [1, seq, heads d]."""
    return x.reshape(*x.shape[:2], n_head, -1).transpose(0, 2, 1, 3)


def merge_heads(x: np.ndarray) -> np.ndarray:
    """Undo `split_heads`."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


@dataclass(frozen=True)
class Call:
    """A call of an op on arrays of the host.

    Parameters
    ----------
    op : str
        A key of `OPS`.
    inputs : tuple of arrays
        The results that the op reads, in one dtype. The embedding reads token ids and positions, int [1, seq, 1].
    params : dict of arrays
        The parameters by their last name, such as ``w``.
    options : dict
        ``eps`` of layer_norm; ``part`` (0, 1 or 2) and ``n_head`` of split; ``scale`` and ``mask`` [queries, keys] of
        attention.
    numerics : Numerics
        The errors of exp, tanh and log.
    """

    op: str
    inputs: tuple[np.ndarray, ...]
    params: Mapping[str, np.ndarray] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    numerics: Numerics = field(default_factory=Numerics)

    @property
    def dtype(self) -> str:
        """The dtype that the op computes in."""
        return str((self.params.get("wte") if self.op == "embedding" else self.inputs[0]).dtype.name)  # type: ignore[union-attr]

    def but(self, **changes: Any) -> Call:
        """Return the call with other inputs or another op, and with some parameters and options changed.

        A parameter or an option that is None is removed.
        """
        for name in ("params", "options"):
            if name in changes:
                merged = {**getattr(self, name), **changes[name]}
                changes[name] = {key: value for key, value in merged.items() if value is not None}
        return replace(self, **changes)

    def at(self, rows: Any, columns: Any = slice(None)) -> Call:
        """Return the call that computes some positions of the result, and some columns of a product."""
        rows = selection(rows)
        inputs = [x[..., rows, :] for x in self.inputs]
        params, options = dict(self.params), dict(self.options)
        columns = selection(columns)
        if "mask" in options:
            inputs[1:] = self.inputs[1:]
            options["mask"] = options["mask"][rows]
        if self.op == "conv1d":
            params = {name: a[..., columns] for name, a in params.items()}
        elif self.op == "unembed":
            params = {name: a[columns] for name, a in params.items()}
        return replace(self, inputs=tuple(inputs), params=params, options=options)


def _embedding(call: Call) -> Bounded:
    ids, positions = (x[..., 0] for x in call.inputs)
    return bounds.add(call.params["wte"][ids], call.params["wpe"][positions])


def _layer_norm(call: Call) -> Bounded:
    p = call.params
    return bounds.layer_norm(call.inputs[0], p["g"], p["b"], eps=call.options["eps"], gamma=bounds.gamma_probable)


def _conv1d(call: Call) -> Bounded:
    (x,) = call.inputs
    x = merge_heads(x) if x.ndim == 4 else x
    return bounds.linear(x, call.params["w"], call.params.get("b"), gamma=bounds.gamma_probable)


def _split(call: Call) -> Bounded:
    (c,) = call.inputs
    return copied(split_heads(np.split(c, 3, axis=-1)[call.options["part"]], call.options["n_head"]))


def copied(x: np.ndarray) -> Bounded:
    """Return an array as an exact result. A NaN is not judged."""
    return Bounded(bounds.exact(x), np.where(np.isnan(x), np.inf, 0.0))


def _visible(f: Callable[[Call], Bounded]) -> Callable[[Call], Bounded]:
    """Judge no query that sees no key."""

    def judged(call: Call) -> Bounded:
        sees = call.options["mask"].any(axis=-1, keepdims=True)
        found = f(call.but(options={"mask": call.options["mask"] | ~sees}))
        return Bounded(found.value, np.where(sees, found.error, np.inf))

    return judged


def _attention_scores(call: Call) -> Bounded:
    return bounds.attention_scores(call.inputs[0], call.inputs[1], call.options["mask"], scale=call.options["scale"])


def _attention_weights(call: Call) -> Bounded:
    q, k, options = *call.inputs, call.options
    return bounds.attention_weights(q, k, options["mask"], scale=options["scale"], numerics=call.numerics)


def _attention(call: Call) -> Bounded:
    q, k, v, options = *call.inputs, call.options
    return bounds.attention(q, k, v, options["mask"], scale=options["scale"], numerics=call.numerics)


def _add(call: Call) -> Bounded:
    return bounds.add(*call.inputs)


def _gelu(call: Call) -> Bounded:
    return bounds.gelu(*call.inputs, numerics=call.numerics)


def _unembed(call: Call) -> Bounded:
    return bounds.linear(call.inputs[0], call.params["w"].T, gamma=bounds.gamma_probable)


OPS: dict[str, Callable[[Call], Bounded]] = {
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "conv1d": _conv1d,
    "split": _split,
    "attention_scores": _visible(_attention_scores),
    "attention_weights": _visible(_attention_weights),
    "attention": _visible(_attention),
    "add": _add,
    "gelu": _gelu,
    "unembed": _unembed,
}
"""For each op, the exact result of a call and the bound of its error."""


def evaluate(call: Call) -> Bounded:
    """Return the exact result of a call and the bound of its error."""
    with np.errstate(all="ignore"):  # a trace may contain NaN and infinity
        return OPS[call.op](call)


def results(arrays: Mapping[str, np.ndarray], config: GPT2Config) -> Results:
    """Return a function that looks up a result, or derives it exactly: c_attn from q, k and v, or these from c_attn."""

    def found(name: str) -> np.ndarray | None:
        if name in arrays:
            return arrays[name]
        scope, _, last = name.rpartition("/")
        parts = [f"{scope}/{each}" for each in "qkv"]
        if last == "c_attn" and all(part in arrays for part in parts):
            return np.concatenate([merge_heads(arrays[part]) for part in parts], axis=-1)
        if last in ("q", "k", "v") and f"{scope}/c_attn" in arrays:
            c = np.split(arrays[f"{scope}/c_attn"], 3, axis=-1)["qkv".index(last)]
            return split_heads(c, config.n_head)
        return None

    return found


def with_infinite_scores(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return scores in which a hidden score is -inf if its weight is certainly 0.

    OpenAI's code has -1e10 there, and other programs the smallest number of a dtype. They are as good: exp(-800) is 0
    in every dtype, so a score that is less than the largest one by 800 has the weight 0.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        top = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True)
        found: np.ndarray = np.where(~mask & (scores <= top - 800), -np.inf, scores)
    return found


def weights_of(
    reference: Mapping[str, StoredTensor], judged: Mapping[str, StoredTensor], config: GPT2Config
) -> dict[str, StoredTensor]:
    """Return the weights of the judged model; those of the reference stand for the ones that are not known.

    A tensor of another shape than the configuration says is not known either. But the vocabularies and the contexts of
    two models may differ in size. So wte and lm_head have the rows that both models have, and wpe may have any number.
    """
    expected = {**shapes(config), "lm_head": (config.n_vocab, config.n_embd)}
    found = dict[str, StoredTensor]()
    for weights in (reference, judged):
        for path, tensor in weights.items():
            if path in ("wte", "lm_head", "wpe") and tensor.shape[1:] == (config.n_embd,):
                found[path] = tensor if path == "wpe" else first_rows(tensor, config.n_vocab)
            elif tensor.shape == expected.get(path):
                found[path] = tensor
    if "wte" in judged and "lm_head" not in judged:
        found.pop("lm_head", None)  # the judged model computes its logits with wte
    return found


def first_rows(tensor: StoredTensor, n: int) -> StoredTensor:
    """Return the first n rows of a matrix, or all rows if there are fewer."""
    if tensor.shape[0] <= n:
        return tensor
    return StoredTensor((n, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:n])


def has_rows(weights: Mapping[str, StoredTensor], tokens: np.ndarray) -> bool:
    """Return whether wte and wpe have the rows of all tokens and positions."""
    return bool(tokens.max() < weights["wte"].shape[0] and tokens.shape[1] <= weights["wpe"].shape[0])


def narrowest(arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """Return arrays in a dtype, or else in the first wider one that represents them exactly."""
    wider = {"float16": ("float32",), "bfloat16": ("float32",), "float32": ()}.get(dtype, ())
    for name in (dtype, *wider):
        with np.errstate(over="ignore"):
            cast = [a.astype(float_dtypes[name], copy=False) for a in arrays]
        if all(
            a is b or np.array_equal(a.astype(b.dtype), b, equal_nan=True) for a, b in zip(cast, arrays, strict=True)
        ):
            return cast
    return [a.astype(np.float64, copy=False) for a in arrays]


def call(
    step: Step,
    tokens: np.ndarray,
    result: Results,
    weights: Mapping[str, StoredTensor],
    config: GPT2Config,
    dtype: str,
    numerics: Numerics,
) -> Call | None:
    """Return the call that computes a result according to the definition; None if an input or a parameter is missing.

    If only the first rows of the output matrix are known, the call computes only the first logits.

    Parameters that are stored in a wider dtype are rounded to the dtype of the trace, as a model does that is loaded in
    this dtype.
    """
    inputs = [result(name) for name in step.inputs]
    paths = {name: f"{step.scope}/{name}" for name in {"layer_norm": "gb", "conv1d": "wb"}.get(step.op, "")}
    if step.op == "embedding":
        paths = {name: name for name in ("wte", "wpe")}
    elif step.op == "unembed":
        paths = {"w": "lm_head" if "lm_head" in weights else "wte"}
    if any(x is None for x in inputs) or not weights.keys() >= set(paths.values()):
        return None
    if step.op == "embedding" and not has_rows(weights, tokens):
        return None
    params = {name: weights[path].read() for name, path in paths.items()}
    options: dict[str, Any] = {}
    if step.op == "layer_norm":
        options = {"eps": config.layer_norm_epsilon}
    elif step.op == "split":
        options = {"part": "qkv".index(step.name[-1]), "n_head": config.n_head}
    elif step.op.startswith("attention"):
        seq = tokens.shape[1]
        options = {"scale": config.attention_scale(step.layer), "mask": np.tri(seq, dtype=np.bool_)}
    if step.op == "embedding":
        given = [tokens[..., None], np.arange(tokens.shape[1])[None, :, None]]
        computed = narrowest([x for x in (result(step.name),) if x is not None], dtype)[0].dtype.name
    else:
        given = narrowest(inputs, dtype)  # type: ignore[arg-type]
        computed = given[0].dtype.name
    cast = {name: a.astype(float_dtypes[computed], copy=False) for name, a in params.items()}
    return Call(step.op, tuple(given), cast, options, numerics)


class Judgement(NamedTuple):
    """The element with the largest ratio of error and bound, and how many were judged; see `OpFinding`."""

    ratio: float
    element: tuple[int, ...]
    computed: float
    exact: float
    permitted: float
    judged: int


def errors(computed: np.ndarray, expected: Bounded) -> np.ndarray:
    """Return |computed - exact| in float64; infinity where the result is NaN."""
    if expected.value.dtype == object:
        return bounds.distance(computed.astype(np.float64), expected.value)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = computed.astype(np.float64)
        difference = np.nan_to_num(abs(wide - expected.value), nan=np.inf, posinf=np.inf)
        found: np.ndarray = np.where(wide == expected.value, 0.0, difference)
    return found


def compared(computed: np.ndarray, expected: Bounded) -> Judgement:
    """Return the element with the largest ratio of error and bound. An element with an infinite bound is not judged."""
    with np.errstate(over="ignore"):
        ratios = bounds.quotient(errors(computed, expected), expected.error)
    index = np.unravel_index(int(ratios.argmax()), ratios.shape)
    at = tuple(int(i) for i in index)
    worst = float(computed[at]), float(expected.value[at]), float(expected.error[at])
    return Judgement(float(ratios[at]), at, *worst, judged=int((expected.error < np.inf).sum()))


_COLUMNS_AT_ONCE = 8192  # of the vocabulary: 50 MB of float64 for a width of 768
_QUERIES_AT_ONCE = 256
_EXACT_PRODUCTS = 50_000  # scalar products per result of a float64 trace, in a higher precision: about 0.1 s


def pieces(call: Call, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions and columns of a result, which together are judged.

    These are all elements in blocks, so that the exact result needs little memory. In float64, where a higher precision
    is slow, they are an evenly spaced selection of the positions, and of the columns of a product. A mistake in an op
    is hardly ever restricted to other elements.
    """
    rows, columns = np.arange(shape[-2]), np.arange(shape[-1])
    is_product = call.op in ("conv1d", "unembed")
    if call.dtype == "float64":
        depth = call.inputs[0].shape[-1] if call.inputs[0].ndim == 3 else call.inputs[0].shape[-1] * shape[-3]
        if call.op == "conv1d":
            depth = call.params["w"].shape[0]
        cost = {"attention_scores": 2 * depth, "attention_weights": 2 * depth, "attention": 4 * depth}.get(call.op, 20)
        if is_product:
            columns = _spaced(columns, max(2, _EXACT_PRODUCTS // (4 * depth)))
            rows = _spaced(rows, 4)
        else:
            rows = _spaced(rows, max(1, _EXACT_PRODUCTS // (cost * shape[-1])))
    by_row = _QUERIES_AT_ONCE if call.op.startswith("attention") else len(rows)
    by_column = _COLUMNS_AT_ONCE if is_product else len(columns)
    for i in range(0, len(rows), by_row):
        for j in range(0, len(columns), by_column):
            yield rows[i : i + by_row], columns[j : j + by_column]


def _spaced(indices: np.ndarray, n: int) -> np.ndarray:
    """Return at most n evenly spaced indices, the last one among them."""
    if n >= len(indices):
        return indices
    return np.unique(np.linspace(len(indices) - 1, 0, n).round().astype(np.int64))


def selection(indices: Any) -> Any:
    """Return consecutive indices as a slice, which copies nothing."""
    if isinstance(indices, slice) or len(indices) == 0 or indices[-1] - indices[0] + 1 != len(indices):
        return indices
    return slice(int(indices[0]), int(indices[-1]) + 1)


def within(computed: np.ndarray, rows: Any, columns: Any) -> np.ndarray:
    """Return some positions and columns of a result."""
    return computed[..., selection(rows), :][..., selection(columns)]


def judge(call: Call, computed: np.ndarray, alternative: Alternative | None = None) -> Judgement:
    """Compare a result with the exact result of a call, in units of the bound.

    Parameters
    ----------
    call : Call
        The call that should have computed the result.
    computed : float array
        The result.
    alternative : function, optional
        Another definition of the op (`portable_gpt2.comparison.guesses`), which replaces the definition of the call.

    Returns
    -------
    Judgement
        The element with the largest ratio of error and bound. In float64, not all elements are judged: see `pieces`.
    """
    worst, judged = Judgement(-1.0, (), 0.0, 0.0, 0.0, 0), 0
    for rows, columns in pieces(call, computed.shape):
        part = within(computed, rows, columns)
        found = compared(part, evaluate(call.at(rows, columns)) if alternative is None else alternative(rows, columns))
        judged += found.judged
        if found.ratio > worst.ratio:
            *start, i, j = found.element
            worst = found._replace(element=(*start, int(rows[i]), int(columns[j])))
    return worst._replace(ratio=max(worst.ratio, 0.0), judged=judged)
