"""The operations that GPT-2 is made of, each written once in array-API terms.

Each function here is the definition of an op, and runs if no kernel computes the result. If the backend of the arrays
has a kernel, ``softmax(x)`` runs it, and ``softmax.reference(x)`` still runs the definition. Every op raises the errors
that `op.op` lists; the docstring of an op lists only the errors that are specific to it.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from .host import value_range
from .op import current_interpreter, op
from .registry import backend_of
from .signature import check_axis

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # importing jaxtyping takes longer than importing this package
    from jaxtyping import Bool, Float, Int

    Array = Any


__all__ = [
    "attention",
    "attention_scores",
    "attention_weights",
    "conv1d",
    "cross_entropy",
    "embed",
    "gelu",
    "layer_norm",
    "softmax",
    "unembed",
]


def _is_zero(n: Any) -> bool:
    """Return whether a dimension is known to be 0; one that is unknown while tracing is a scalar array."""
    return isinstance(n, int) and n == 0


def is_empty(x: Any) -> bool:
    """Return whether x is known to have no elements."""
    return any(map(_is_zero, backend_of(x).shape(x)))


def in_range(name: str, ids: Any, n: Any) -> tuple[Any, Any]:
    """Return ids as indices from 0 to n - 1, and a bool array that is True where an id is in range.

    An id that is out of range has index 0; the caller replaces the result for this id by NaN. If the ids can be read
    immediately, such an id raises an error. The bool array is then not needed, and None is returned instead.

    Raises
    ------
    ValueError
        If an id is out of range and the ids can be read immediately: NumPy arrays, and eager arrays on a CPU.
    """
    backend = backend_of(ids)
    if _is_zero(n) and not is_empty(ids):
        raise ValueError(f"{name} have shape {list(backend.shape(ids))}, but there are no valid ids")
    xp, values = backend.xp, backend.peek(ids)
    index = xp.astype(ids, xp.int64, copy=False)  # the array API permits only signed integers as indices
    if isinstance(n, int) and values is not None:
        low, high = value_range(values)
        if low < 0 or high >= n:
            raise ValueError(f"{name} range from {low} to {high}; expected 0 to {n - 1}")
        return index, None
    known = (index >= 0) & (index < (n if isinstance(n, int) else xp.astype(n, index.dtype)))
    return xp.where(known, index, 0), known


def add(x: Any, y: Any) -> Any:
    """Return x + y, the sum of a residual connection. It is a function of its own for the sake of an `Interpreter`."""
    interpreter = current_interpreter()
    return x + y if interpreter is None else interpreter.add(x, y)


@op
def conv1d(
    x: Float[Array, "*batch nx"],
    w: Float[Array, "nx nf"] | Float[Array, "1 nx nf"],
    b: Float[Array, "nf"],
) -> Float[Array, "*batch nf"]:
    """Apply a linear layer to the last axis, y = x w + b: a convolution of width 1.

    This is ``conv1d`` of OpenAI's GPT-2 (``src/model.py``). `init_conv1d` returns initial values of w and b.

    Parameters
    ----------
    x : float array [*batch, nx]
        Zero or more leading axes.
    w : float array [nx, nf] or [1, nx, nf]
        The weight. The leading 1 in OpenAI's checkpoints is the width of the convolution.
    b : float array [nf]
        The bias.

    Returns
    -------
    float array [*batch, nf]

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> x, w, b = np.ones((10, 5, 2, 5)), np.ones((5, 3)), np.zeros(3)
    >>> pg.conv1d(x, w, b).shape
    (10, 5, 2, 3)
    """
    backend = backend_of(x)
    xp = backend.xp
    *start, nx = backend.shape(x)
    (nf,) = backend.shape(b)
    rows = xp.reshape(x, (math.prod(start), nx))
    return xp.reshape(xp.matmul(rows, xp.reshape(w, (nx, nf))) + b, (*start, nf))


@op
def softmax(x: Float[Array, "*shape"], *, axis: int = -1) -> Float[Array, "*shape"]:
    """Return exp(x_j) / sum_k exp(x_k) along an axis.

    The maximum is subtracted first, so that exp cannot overflow and at least one term of the sum is 1. A row that
    contains NaN or +inf, or only -inf, becomes NaN; in any other row, -inf becomes 0. An empty array stays empty.

    Parameters
    ----------
    x : float array
        At least one axis.
    axis : int
        The axis that sums to 1 in the result.

    Returns
    -------
    float array
        The shape and dtype of x; values from 0 to 1.

    Raises
    ------
    TypeError
        If axis is not an int.
    ValueError
        If x has no such axis.

    Notes
    -----
    docs/numerics.md derives a bound of the error from that of Blanchard, Higham and Higham, "Accurately computing the
    log-sum-exp and softmax functions", IMA J. Numer. Anal. 41(4), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.softmax(np.asarray([[1.0, 2.0, 3.0]])).round(8)
    array([[0.09003057, 0.24472847, 0.66524096]])
    """
    backend = backend_of(x)
    xp = backend.xp
    check_axis("softmax", axis, backend.shape(x))
    if is_empty(x):  # an empty row has no maximum
        return x
    x = x - xp.max(x, axis=axis, keepdims=True)
    e = xp.exp(x)
    return e / xp.sum(e, axis=axis, keepdims=True)


@op
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the Gaussian error linear unit in its tanh form, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. GPT-2 was trained with this form; the form with erf
    differs from it by up to 5e-4.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.gelu(np.asarray([-1.0, 0.0, 1.0])).round(4)
    array([-0.1588,  0.    ,  0.8412])
    """
    xp = backend_of(x).xp
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def check_eps(eps: float) -> None:
    """Refuse a negative or non-finite eps of `layer_norm`."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm: eps is {eps}; expected a finite number of at least 0")


@op
def layer_norm(
    x: Float[Array, "*batch n"],
    g: Float[Array, "n"],
    b: Float[Array, "n"],
    *,
    eps: float = 1e-5,
) -> Float[Array, "*batch n"]:
    """Normalise the last axis to mean 0 and variance 1, then scale by g and shift by b.

    Parameters
    ----------
    x : float array [*batch, n]
        Zero or more leading axes.
    g, b : float array [n]
        Gain and bias.
    eps : float
        The number that is added to the (biased) variance. If eps is 0, a row of equal elements gives 0 / 0.

    Returns
    -------
    float array [*batch, n]

    Raises
    ------
    ValueError
        If eps is negative or not finite.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization", 2016; ``norm`` of OpenAI's GPT-2 (``src/model.py``).

    The squares are not scaled before they are summed. The elements of x must therefore be below sqrt(largest / n) / 2
    in magnitude. For n = 768 this bound is 3e17 in float32 (and for 16-bit arrays), and 2e152 in float64. Larger
    elements make the variance overflow, and the result is the bias or NaN. Deviations below 1e-19 in float32 count as
    0, because their squares underflow.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.layer_norm(np.asarray([1.0, 2.0, 3.0]), np.ones(3), np.zeros(3)).round(4)
    array([-1.2247,  0.    ,  1.2247])
    """
    check_eps(eps)
    xp = backend_of(x).xp
    if is_empty(x):  # an empty row has no mean
        return x
    x = x - xp.mean(x, axis=-1, keepdims=True)
    s = xp.mean(x * x, axis=-1, keepdims=True)
    return x / xp.sqrt(s + eps) * g + b


def causal_mask(queries: Any, keys: Any, like: Any) -> Any:
    """Return a bool array [queries, keys]: the last query sees all keys, and each earlier query one key less."""
    backend = backend_of(like)
    if isinstance(queries, int) and isinstance(keys, int) and queries > keys:
        raise ValueError(f"attention: causal is true, but there are {queries} queries and only {keys} keys")
    return backend.arange(queries, like=like)[:, None] + (keys - queries) >= backend.arange(keys, like=like)[None, :]


def visible_keys(q: Any, k: Any, mask: Any, causal: bool) -> Any:
    """Return a bool array that is True where a query sees a key, or None if every query sees all keys."""
    if not causal:
        return mask
    shape = backend_of(q).shape
    earlier = causal_mask(shape(q)[-2], shape(k)[-2], like=q)
    return earlier if mask is None else mask & earlier


def score_scale(q: Any, k: Any, scale: float | None) -> Any:
    """Return the factor of the dot products. Refuse a scale that is not finite, and queries if there are no keys."""
    backend = backend_of(q)
    *_, queries, d = backend.shape(q)
    if _is_zero(backend.shape(k)[-2]) and not _is_zero(queries):
        raise ValueError("attention: there are no keys; every query must see at least one")
    if scale is None:
        return (max(d, 1) if isinstance(d, int) else backend.xp.astype(d, q.dtype)) ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"attention: scale is {scale}; expected a finite number")
    return scale


@op
def attention_scores(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch queries keys"]:
    """Return the scaled dot products of queries and keys. The score of a key that a query does not see is -inf.

    Parameters
    ----------
    q, k, mask, causal, scale
        As for `attention`.

    Returns
    -------
    float array [*batch, queries, keys]

    Raises
    ------
    ValueError
        If there are queries and no keys, causal is true and there are fewer keys than queries, or scale is not finite.

    Notes
    -----
    OpenAI's code adds -1e10 to a hidden score instead. This would overflow in float16, and would not hide a key if a
    visible score is -inf.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> q = np.ones((2, 4))
    >>> pg.attention_scores(q, q, causal=True)
    array([[  2., -inf],
           [  2.,   2.]])
    """
    backend = backend_of(q)
    xp = backend.xp
    scores = xp.matmul(q, xp.matrix_transpose(k)) * score_scale(q, k, scale)
    mask = visible_keys(q, k, mask, causal)
    if mask is not None:
        scores = xp.where(mask, scores, -math.inf)
    return scores


@op
def attention_weights(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch queries keys"]:
    """Return the weight of each key for each query: the softmax of their scaled dot products.

    Parameters
    ----------
    q, k, mask, causal, scale
        As for `attention`.

    Returns
    -------
    float array [*batch, queries, keys]
        Each row sums to 1. A key that the query does not see has weight 0 exactly. A row is NaN if none of its visible
        keys has a score above -inf, because the products overflowed or the query sees no key.

    Raises
    ------
    ValueError
        If there are queries and no keys, causal is true and there are fewer keys than queries, or scale is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> q = np.ones((2, 4))
    >>> pg.attention_weights(q, q, np.asarray([[True, False], [True, True]]))
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    return softmax(attention_scores(q, k, mask=mask, causal=causal, scale=scale))


@op
def attention(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    v: Float[Array, "*batch keys dv"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "*batch queries dv"]:
    """Return softmax(scale q k^T) v: for each query, the average of the values with the weights of its keys.

    Vaswani et al., "Attention Is All You Need", 2017, equation 1.

    Parameters
    ----------
    q : float array [*batch, queries, d]
        The queries. Batch and heads are leading axes.
    k : float array [*batch, keys, d]
        The keys.
    v : float array [*batch, keys, dv]
        The values.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key; its leading axes broadcast to those of q. Every query must see at least one key.
    causal : bool
        Whether a query sees only its own key and the keys before it. The queries belong to the last keys: the last
        query sees all keys. With a mask, a query sees the keys that both permit. A fused kernel that is told so skips
        the hidden keys, which it would read with a mask.
    scale : float, optional
        The factor of the dot products; 1/sqrt(d) unless given. With d = 0 every score is 0.

    Returns
    -------
    float array [*batch, queries, dv]
        Keys that a query does not see have weight 0 exactly. A row is NaN if none of its visible keys has a score above
        -inf (see `attention_weights`). PyTorch's kernel for several queries makes such a row 0 if it is compiled or
        runs on an accelerator. A hidden key or value that is NaN or infinite, or a hidden score that overflows, may
        make the row NaN.

    Raises
    ------
    ValueError
        If there are queries and no keys, causal is true and there are fewer keys than queries, or scale is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> q, v = np.ones((2, 4)), np.asarray([[1.0], [3.0]])
    >>> pg.attention(q, q, v, np.asarray([[True, False], [True, True]]))
    array([[1.],
           [2.]])
    """
    return backend_of(q).xp.matmul(attention_weights(q, k, mask=mask, causal=causal, scale=scale), v)


@op
def embed(ids: Int[Array, "*batch"], w: Float[Array, "vocab d"]) -> Float[Array, "*batch d"]:
    """Look up rows of an embedding matrix.

    Parameters
    ----------
    ids : int array [*batch]
        Ids from 0 to vocab - 1.
    w : float array [vocab, d]
        The embedding matrix.

    Returns
    -------
    float array [*batch, d]
        The row of an id that is out of range and raises no error is NaN. Such an id adds nothing to the gradient of w.

    Raises
    ------
    ValueError
        If an id is out of range and the ids can be read immediately: NumPy arrays, and eager arrays on a CPU. Traced
        ids and ids on an accelerator are not read.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.embed(np.asarray([2, 0]), np.asarray([[0.0], [1.0], [2.0]]))
    array([[2.],
           [0.]])
    """
    backend = backend_of(w)
    xp = backend.xp
    start, (vocab, d) = backend.shape(ids), backend.shape(w)
    index, known = in_range("embed: ids", ids, vocab)
    rows = xp.reshape(xp.take(w, xp.reshape(index, (math.prod(start),)), axis=0), (*start, d))
    return rows if known is None else xp.where(known[..., None], rows, math.nan)


@op
def unembed(x: Float[Array, "*batch d"], w: Float[Array, "vocab d"]) -> Float[Array, "*batch vocab"]:
    """Return the logits x w^T: the dot products of hidden states with every row of the embedding matrix.

    Parameters
    ----------
    x : float array [*batch, d]
        Zero or more leading axes.
    w : float array [vocab, d]
        The embedding matrix.

    Returns
    -------
    float array [*batch, vocab]

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.unembed(np.ones(2), np.asarray([[1.0, 0.0], [2.0, 3.0]]))
    array([1., 5.])
    """
    backend = backend_of(x)
    xp = backend.xp
    *start, d = backend.shape(x)
    logits = xp.matmul(xp.reshape(x, (math.prod(start), d)), xp.matrix_transpose(w))
    return xp.reshape(logits, (*start, backend.shape(w)[0]))


@op
def cross_entropy(logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]) -> Float[Array, ""]:
    """Return the mean of -log softmax(logits)[target], in nats.

    Parameters
    ----------
    logits : float array [*batch, vocab]
        The logits, which need not be normalised.
    targets : int array [*batch]
        Ids from 0 to vocab - 1.

    Returns
    -------
    float array []
        NaN if there are no targets. A target that is out of range and raises no error makes the mean and the gradient
        of its logits NaN.

    Raises
    ------
    ValueError
        If the vocabulary is empty, or a target is out of range and the targets can be read immediately (see `embed`).

    Notes
    -----
    log softmax(x)[t] = x_t - m - log sum_k exp(x_k - m), where m is the maximum: nothing overflows, and no probability
    is rounded to 0 before its logarithm is taken.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.cross_entropy(np.log([[0.25, 0.75], [0.5, 0.5]]), np.asarray([1, 0])).round(8)
    np.float64(0.49041463)
    """
    backend = backend_of(logits)
    xp = backend.xp
    vocab = backend.shape(logits)[-1]
    if _is_zero(vocab):
        raise ValueError(f"cross_entropy: logits have shape {list(backend.shape(logits))}; the vocabulary is empty")
    index, known = in_range("cross_entropy: targets", targets, vocab)
    x = logits - xp.max(logits, axis=-1, keepdims=True)
    total = xp.log(xp.sum(xp.exp(x), axis=-1))
    losses = total - xp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
    if known is not None:  # a product with NaN makes the gradient NaN too; selecting NaN would not
        losses = losses * xp.where(known, xp.astype(known, losses.dtype), math.nan)
    return xp.mean(losses)
