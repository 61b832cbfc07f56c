"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, in this order, and a random stream.

All of it is on the host, what is added and divided in float64.

The same seed draws the same token whichever framework computed the logits. A draw is the argmax of logits / T + G, with
one Gumbel variate G an entry of the vocabulary, so that it changes only where the two best sums lie closer together
than the frameworks' logits do. Filters only mask entries; they do not shift the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks
from .host import float_dtypes
from .random import gumbel, new_seed
from .registry import to_numpy


@dataclass(frozen=True)
class Sampling:
    """The options of sampling, validated once.

    Parameters
    ----------
    temperature : float
        What the logits are divided by; 0 takes the largest.
    top_k : int, optional
        Keep the k largest logits, and all that equal the smallest of these; 0 or None keeps all.
    top_p : float, optional
        Keep the smallest set of the tokens that top_k kept whose total probability reaches top_p. The token that
        crosses the threshold is kept (Hugging Face's rule; OpenAI's code leaves it out). None keeps all.
    min_p : float, optional
        Drop those of the tokens that top_p kept whose probability is below min_p times that of the most likely token.
        None drops none.
    repetition_penalty : float
        Divides the positive logits of the tokens that the text holds already, and multiplies the negative ones: above 1
        they become less likely, 1 changes nothing. It applies to greedy choice too.
    seed : int, optional
        Names the random stream, from 0 to 2^64 - 1; a random one unless given.

    Raises
    ------
    ValueError
        If temperature is not a finite number of at least 0, top_k not None or an int of at least 0, top_p or min_p not
        None or a number above 0 and at most 1, repetition_penalty not a finite number above 0, or seed not an int from
        0 to 2^64 - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.sampling import Sampling
    >>> Sampling(top_k=np.uint8(1), seed=7)
    Sampling(temperature=1.0, top_k=1, top_p=None, min_p=None, repetition_penalty=1.0, seed=7)
    """

    temperature: float = 1.0
    top_k: int | None = 40
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        made: dict[str, Any] = {
            "temperature": checks.number("temperature", self.temperature, note="0 is greedy"),
            "top_k": None if self.top_k is None else checks.integer("top_k", self.top_k, note="0 or None is off"),
            "repetition_penalty": checks.number(
                "repetition_penalty", self.repetition_penalty, above=True, note="1 is off"
            ),
            "seed": new_seed() if self.seed is None else checks.seed(self.seed),
        }
        for name in ("top_p", "min_p"):
            if (share := getattr(self, name)) is not None:
                made[name] = checks.number(name, share, 0, 1, above=True, note="None is off")
        for name, value in made.items():
            object.__setattr__(self, name, value)


def sample(
    logits: np.ndarray,
    position: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 40,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Sequence[int] = (),
    seed: int = 0,
    index: int = 0,
) -> int:
    """Sample the token at a position from the logits that the model computed for it.

    Parameters
    ----------
    logits : float array [n_vocab]
        Of one text, on the host.
    position : int
        The token's position in the whole text, the prompt included.
    temperature, top_k, top_p, min_p, repetition_penalty, seed
        See `Sampling`.
    seen : ints
        The token ids of the text so far, the prompt included: those that repetition_penalty applies to.
    index : int
        Names the random stream together with the seed: which of several samples of one text this is.

    Returns
    -------
    int
        A token id. Of equal sums, the smallest id.

    Raises
    ------
    TypeError
        If the logits are not an array or a list.
    ValueError
        If an option is not valid, or the logits hold a NaN, or the largest of them is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.sampling import sample
    >>> sample(np.asarray([0.0, 3.0, 1.0]), 5, temperature=0)
    1
    """
    options = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, checks.seed(seed))
    position, index = checks.integer("position", position), checks.integer("index", index)
    x = np.asarray(logits) if isinstance(logits, list | tuple) else to_numpy(logits)
    if x.ndim != 1 or not x.size or not (x.dtype.kind in "iuf" or x.dtype in float_dtypes.values()):
        raise ValueError(f"logits have shape {list(x.shape)} and dtype {x.dtype}; expected float [n_vocab]")
    seen = checks.token_ids("seen", seen, x.size, may_be_empty=True).tolist()
    return sample_with(options, x, position, seen, index)


def sample_with(options: Sampling, logits: np.ndarray, position: int, seen: Sequence[int], index: int) -> int:
    """Do what `sample` does, with options that are validated already."""
    x = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)
    check_finite(x.max())
    if options.repetition_penalty != 1 and len(seen):
        x = penalised(x.astype(np.float64), seen, options.repetition_penalty)
    if options.temperature == 0:
        return int(np.argmax(x))
    kept, scaled = survivors(x, options.temperature, options.top_k, options.top_p, options.min_p)
    assert options.seed is not None
    return int(kept[np.argmax(scaled + gumbel(kept, x.size, position, options.seed, index))])


def check_finite(largest: Any) -> None:
    """Refuse logits by the largest of them, which is a NaN if there is one."""
    if not np.isfinite(largest):
        raise ValueError(
            f"the logits hold a NaN or an infinity (the largest is {largest}): the model's weights do, or its dtype "
            f"overflowed (float32 may not)"
        )


def penalised(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Return the logits with those of the tokens in seen made less likely, however often they occur.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019, with the rule for
    negative logits that is in use since: to divide one would raise it.
    """
    x = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    x[ids] = np.where(x[ids] > 0, x[ids] / penalty, x[ids] * penalty)
    return x


def survivors(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that the filters keep, ascending, and their logits over the temperature, the largest of them 0."""
    if top_k and top_k < logits.size:
        kept = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    else:
        kept = np.arange(logits.size)
    with np.errstate(over="ignore"):  # by a tiny temperature: to -inf, as the largest is subtracted first
        scaled = (logits[kept].astype(np.float64) - float(logits.max())) / temperature
    if top_p is not None and top_p < 1:
        nucleus = _nucleus(scaled, top_p)
        kept, scaled = kept[nucleus], scaled[nucleus]
    if min_p is not None:
        likely = np.exp(scaled) >= min_p
        kept, scaled = kept[likely], scaled[likely]
    return kept, scaled


def _nucleus(scaled: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices, ascending, of the fewest entries whose probabilities reach top_p."""
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order])
    before = np.cumsum(weights) - weights
    return np.sort(order[before < top_p * weights.sum()])
