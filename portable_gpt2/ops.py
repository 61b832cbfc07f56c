"""The operations that GPT-2 is made of, each written once in array-API terms.

A function here is an op's meaning, its documentation and its fallback. `op` lets the arrays' backend run a kernel of
its own in its place: ``softmax(x)`` runs the kernel, ``softmax.reference(x)`` always the definition.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from .host import value_range
from .op import check_axis, op
from .registry import backend_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # importing it costs more than all of this package
    from jaxtyping import Bool, Float, Int

    Array = Any


def _is_zero(n: Any) -> bool:
    """Return whether a dimension is known to be 0; one that is unknown while tracing is a scalar array."""
    return isinstance(n, int) and n == 0


def is_empty(x: Any) -> bool:
    """Return whether x is known to have no elements."""
    return any(map(_is_zero, backend_of(x).shape(x)))


def in_range(name: str, ids: Any, n: Any) -> tuple[Any, Any]:
    """Return ids as indices from 0 to n - 1 and, where it is not known yet whether they are, a bool array of which are.

    Where an id is out of range, the index is 0, and the caller makes a NaN.

    Raises
    ------
    ValueError
        If an id is out of range, and the values can be read at once: NumPy's, and eager arrays on a CPU.
    """
    backend = backend_of(ids)
    if _is_zero(n) and not is_empty(ids):
        raise ValueError(f"{name} have shape {list(backend.shape(ids))}, but there is nothing to choose from")
    xp, values = backend.xp, backend.peek(ids)
    index = xp.astype(ids, xp.int64, copy=False)  # the array API looks up by signed integers alone
    if isinstance(n, int) and values is not None:
        low, high = value_range(values)
        if low < 0 or high >= n:
            raise ValueError(f"{name} range from {low} to {high}; expected 0 to {n - 1}")
        return index, None
    known = (index >= 0) & (index < (n if isinstance(n, int) else xp.astype(n, index.dtype)))
    return xp.where(known, index, 0), known


@op
def conv1d(
    x: Float[Array, "*batch nx"],
    w: Float[Array, "nx nf"] | Float[Array, "1 nx nf"],
    b: Float[Array, "nf"],
) -> Float[Array, "*batch nf"]:
    """Apply a linear layer over the last axis, y = x w + b: a convolution of width 1.

    Parameters
    ----------
    x : float array [*batch, nx]
        Any number of leading axes, none included.
    w : float array [nx, nf] or [1, nx, nf]
        The weight. The leading 1 of OpenAI's checkpoints is the width of the convolution.
    b : float array [nf]
        The bias.

    Returns
    -------
    float array [*batch, nf]

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, or are not floats of one dtype.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    ``conv1d`` of OpenAI's GPT-2 (``src/model.py``), without the variables, which `init_conv1d` makes.

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
    """Exponentiate along an axis and divide by the sum: exp(x_j) / sum_k exp(x_k).

    The maximum is subtracted first. That changes nothing but the rounding: exp(x - m) cannot overflow, and at least
    one term of the sum is 1. A row with a NaN, with +inf, or of nothing but -inf becomes NaN as a whole; -inf beside
    a finite number becomes 0; an empty array stays empty.

    Parameters
    ----------
    x : float array
        Of any shape with at least one axis.
    axis : int
        The axis that sums to 1 afterwards.

    Returns
    -------
    float array
        Of x's shape and dtype, between 0 and 1.

    Raises
    ------
    TypeError
        If x is not a float array, or axis not an int.
    ValueError
        If x has no such axis.

    Notes
    -----
    ``softmax`` of OpenAI's GPT-2 (``src/model.py``). Its error is bounded by Blanchard, Higham and Higham,
    "Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal. 41(4), 2021.

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

    Parameters
    ----------
    x : float array
        Of any shape.

    Returns
    -------
    float array
        Of x's shape and dtype.

    Raises
    ------
    TypeError
        If x is not a float array.

    Notes
    -----
    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. The form by erf differs from it by up to 5e-4: it is
    another function, and GPT-2 was not trained with it.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.gelu(np.asarray([-1.0, 0.0, 1.0])).round(4)
    array([-0.1588,  0.    ,  0.8412])
    """
    xp = backend_of(x).xp
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


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
        Any number of leading axes, none included.
    g, b : float array [n]
        Gain and bias.
    eps : float
        Added to the (biased) variance; at least 0. With 0, a row of equal numbers has the undefined result 0 / 0.

    Returns
    -------
    float array [*batch, n]

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, or are not floats of one dtype.
    ValueError
        If the shapes do not fit, or eps is not a finite number of at least 0.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization", 2016; ``norm`` of OpenAI's GPT-2 (``src/model.py``).

    The squares are summed as they are: the numbers in x must be below sqrt(largest / n) / 2 in magnitude, which for n =
    768 is 3e17 in float32 (in which 16-bit arrays are computed) and 2e152 in float64. Beyond that the variance
    overflows, and the result is the bias or NaN. Deviations whose squares underflow, below 1e-19 in float32, count as a
    variance of 0.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.layer_norm(np.asarray([1.0, 2.0, 3.0]), np.ones(3), np.zeros(3)).round(4)
    array([-1.2247,  0.    ,  1.2247])
    """
    backend = backend_of(x)
    xp = backend.xp
    if not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm: eps is {eps}; expected a finite number of at least 0")
    if is_empty(x):  # an empty row has no mean
        return x
    x = x - xp.mean(x, axis=-1, keepdims=True)
    s = xp.mean(x * x, axis=-1, keepdims=True)
    return x / xp.sqrt(s + eps) * g + b


@op
def attention_weights(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "*batch queries keys"]:
    """Return how much each query weighs each key: the softmax of their products.

    Parameters
    ----------
    q : float array [*batch, queries, d]
        The queries. Heads, like examples, are leading axes.
    k : float array [*batch, keys, d]
        The keys.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key; its leading axes broadcast to q's. Every query must see at least one key.
    scale : float, optional
        What the products are multiplied by; 1/sqrt(d) unless given. With d = 0 every score is 0.

    Returns
    -------
    float array [*batch, queries, keys]
        Each row sums to 1. The weight of a key that the query does not see is 0 exactly. A row is NaN if none of its
        visible keys has a score above -inf: the products overflowed, or the query sees no key.

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, or q and k are not floats of one dtype, or mask not a bool.
    ValueError
        If the shapes do not fit, there are queries and no keys, or scale is not finite.

    Notes
    -----
    Where the mask is False the score is replaced by -inf. To add a number, such as OpenAI's -1e10, would overflow
    float16; and the smallest finite number is not below a visible score that overflowed.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> q = np.ones((2, 4))
    >>> pg.attention_weights(q, q, np.asarray([[True, False], [True, True]]))
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    backend = backend_of(q)
    xp = backend.xp
    *_, queries, d = backend.shape(q)
    if _is_zero(backend.shape(k)[-2]) and not _is_zero(queries):
        raise ValueError("attention: there are no keys; every query must see at least one")
    if scale is None:
        scale = (max(d, 1) if isinstance(d, int) else xp.astype(d, q.dtype)) ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"attention: scale is {scale}; expected a finite number")
    scores = xp.matmul(q, xp.matrix_transpose(k)) * scale
    if mask is not None:
        scores = xp.where(mask, scores, -math.inf)
    return softmax(scores)


@op
def attention(
    q: Float[Array, "*batch queries d"],
    k: Float[Array, "*batch keys d"],
    v: Float[Array, "*batch keys dv"],
    mask: Bool[Array, "*#batch queries keys"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "*batch queries dv"]:
    """Average the values, each query weighing them by the softmax of its products with the keys.

    Parameters
    ----------
    q : float array [*batch, queries, d]
        The queries. Heads, like examples, are leading axes.
    k : float array [*batch, keys, d]
        The keys.
    v : float array [*batch, keys, dv]
        The values.
    mask : bool array [..., queries, keys], optional
        True where a query sees a key; its leading axes broadcast to q's. Every query must see at least one key.
    scale : float, optional
        What the products are multiplied by; 1/sqrt(d) unless given. With d = 0 every score is 0.

    Returns
    -------
    float array [*batch, queries, dv]
        Keys that a query does not see have weight 0 exactly. A row is NaN if none of its visible keys has a score above
        -inf (see `attention_weights`); a kernel that PyTorch compiles, or runs on an accelerator, makes it 0. A hidden
        key or value that is NaN or infinite, or a hidden score that overflows, may make the row NaN.

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, or q, k and v are not floats of one dtype, or mask not a bool.
    ValueError
        If the shapes do not fit, there are queries and no keys, or scale is not finite.

    Notes
    -----
    Vaswani et al., "Attention Is All You Need", 2017, equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> q, v = np.ones((2, 4)), np.asarray([[1.0], [3.0]])
    >>> pg.attention(q, q, v, np.asarray([[True, False], [True, True]]))
    array([[1.],
           [2.]])
    """
    return backend_of(q).xp.matmul(attention_weights(q, k, mask=mask, scale=scale), v)


@op
def embed(ids: Int[Array, "*batch"], w: Float[Array, "vocab d"]) -> Float[Array, "*batch d"]:
    """Look up the rows of a table.

    Parameters
    ----------
    ids : int array [*batch]
        From 0 to vocab - 1.
    w : float array [vocab, d]
        The table.

    Returns
    -------
    float array [*batch, d]
        NaN for an id that is out of range, where that raises no error.

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, ids are not integers or w is not a float.
    ValueError
        If the shapes do not fit, or an id is out of range and the ids can be read at once: arrays of NumPy, and eager
        arrays on a CPU. Ids that are being traced or that live on an accelerator are not waited for.

    Notes
    -----
    An id that is out of range adds nothing to the gradient of w.

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
    """Multiply with every row of a table: the logits, x w^T.

    Parameters
    ----------
    x : float array [*batch, d]
        Any number of leading axes, none included.
    w : float array [vocab, d]
        The table.

    Returns
    -------
    float array [*batch, vocab]

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, or are not floats of one dtype.
    ValueError
        If the shapes do not fit.

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
    """Return the mean of -log softmax(logits)[target]: how unlikely the targets are, in nats.

    Parameters
    ----------
    logits : float array [*batch, vocab]
        Not normalised.
    targets : int array [*batch]
        From 0 to vocab - 1.

    Returns
    -------
    float array []
        NaN if there are no targets, or one is out of range, where that raises no error. So is the gradient of that
        target's logits.

    Raises
    ------
    TypeError
        If the arrays belong to different frameworks, logits are not floats or targets are not integers.
    ValueError
        If the shapes do not fit, the vocabulary is empty, or a target is out of range and the targets can be read at
        once (see `embed`).

    Notes
    -----
    log softmax(x)[t] = x_t - m - log sum_k exp(x_k - m), with m the maximum: nothing overflows, and no probability is
    rounded to 0 before its logarithm is taken.

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
    if known is not None:  # a product, so that the gradient is NaN too
        losses = losses * xp.where(known, xp.astype(known, losses.dtype), math.nan)
    return xp.mean(losses)
