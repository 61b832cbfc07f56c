"""Sample a token from logits, after repetition penalty, temperature, top-k, top-p and min-p, applied in this order.

Sampling runs on the host, in float64. The token is the argmax of logits / T + G, where G has one Gumbel variate for
each entry of the vocabulary. The same seed therefore gives the same token on every framework, unless the two largest
sums are closer to each other than the logits of two frameworks are. A filter does not change the Gumbel variates of the
entries that it keeps.

To add an option, add a field to `Sampling`, its type to `SamplingOptions`, and the code that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from . import checks
from .host import float_dtypes
from .options import documented, option, validate
from .random import gumbel, new_seed
from .registry import to_numpy

Function = Callable[[np.ndarray], np.ndarray]


@documented
@dataclass(frozen=True)
class Sampling:
    """The options of sampling. They are validated and converted to Python's own types when the object is made.

    Parameters
    ----------
    {options}

    Raises
    ------
    ValueError
        If an option is not valid. The message names the option, the value and the values that are expected.

    Notes
    -----
    The token with which the total probability reaches top_p is kept, as in Hugging Face's transformers; OpenAI's code
    drops it. The repetition penalty also changes the choice at temperature 0.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.sampling import Sampling
    >>> options = Sampling(top_k=np.uint8(1), seed=7)
    >>> options.temperature, options.top_k, options.seed
    (1.0, 1, 7)
    """

    temperature: float = option(
        1.0,
        "number that divides the logits: a smaller one makes likely tokens likelier, and 0 always chooses the most "
        "likely token",
        checks.number,
        note="0 is greedy",
    )
    top_k: int | None = option(
        40,
        "keep only this many of the most likely tokens, and those that tie with the last of them; 0 keeps all tokens",
        checks.integer,
        note="0 or None is off",
    )
    top_p: float | None = option(
        None,
        "among the tokens that top-k keeps, keep the smallest set whose total probability reaches this value",
        checks.number,
        high=1,
        above=True,
        note="None is off",
    )
    min_p: float | None = option(
        None,
        "drop tokens whose probability is below this value times that of the most likely token",
        checks.number,
        high=1,
        above=True,
        note="None is off",
    )
    repetition_penalty: float = option(
        1.0,
        "penalty above 1 for tokens that the text already contains, which become less likely: their positive logits "
        "are divided by it and their negative logits multiplied by it; 1 changes nothing",
        checks.number,
        above=True,
        note="1 is off",
    )
    seed: int | None = option(
        None,
        "number of the random stream, from 0 to 2^64 - 1: the same seed gives the same text on every backend",
        checks.seed,
        default_text="a random seed for each prompt",
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.seed is None:
            object.__setattr__(self, "seed", new_seed())


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments of a function, for ``**options: Unpack[SamplingOptions]``."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None


def sample(
    logits: Any, position: int, *, seen: Sequence[int] = (), index: int = 0, **options: Unpack[SamplingOptions]
) -> int:
    """Sample the token at a position from the logits that the model computed for it.

    Parameters
    ----------
    logits : float array [n_vocab]
        The logits, of any backend, or a list.
    position : int
        The token's position in the text. The first token of the prompt is at position 0.
    seen : ints
        The token ids of the prompt and of the text so far, to which repetition_penalty applies.
    index : int
        The index of this sample among several samples of one text. Together with the seed, it chooses the random
        stream.
    **options
        See `Sampling`. Here the seed is 0 unless given.

    Returns
    -------
    int
        A token id. If several ids have the largest sum of logit and Gumbel variate, the smallest of them is returned.

    Raises
    ------
    TypeError
        If the logits are not an array or a list.
    ValueError
        If an option is not valid, the logits hold a NaN, or the largest of them is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.sampling import sample
    >>> sample(np.asarray([0.0, 3.0, 1.0]), 5, temperature=0)
    1
    """
    options.setdefault("seed", 0)
    sampling = Sampling(**options)
    position, index = checks.integer("position", position), checks.integer("index", index)
    x = np.asarray(logits) if isinstance(logits, list | tuple) else to_numpy(logits)
    if x.ndim != 1 or not x.size or not (x.dtype.kind in "iuf" or x.dtype in float_dtypes.values()):
        raise ValueError(f"logits have shape {list(x.shape)} and dtype {x.dtype}; expected float [n_vocab]")
    seen = checks.token_ids("seen", seen, x.size, may_be_empty=True).tolist()
    return sample_with(sampling, x, position, seen, index)


def sample_with(
    sampling: Sampling,
    logits: np.ndarray,
    position: int,
    seen: Sequence[int],
    index: int,
    exp: Function = np.exp,
    log: Function = np.log,
) -> int:
    """Sample a token as `sample` does, from arguments that have been validated.

    The reproducible mode passes its own exp and log, because the last bit of NumPy's depends on the processor.
    """
    x = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)
    check_finite(x.max())
    if sampling.repetition_penalty != 1 and len(seen):
        x = apply_repetition_penalty(x.astype(np.float64), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(x))
    kept, scaled = filter_logits(x, sampling, exp)
    assert sampling.seed is not None
    return int(kept[np.argmax(scaled + gumbel(kept, x.size, position, sampling.seed, index, log))])


def check_finite(largest: Any) -> None:
    """Raise an error if the largest logit is not finite. It is NaN if any logit is NaN."""
    if not np.isfinite(largest):
        raise ValueError(
            f"the logits hold a NaN or an infinity (the largest is {largest}): the model's weights hold one, too, or "
            f"the computation overflowed (in float32 it may not)"
        )


def apply_repetition_penalty(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Return the logits in float64, with a penalty for each token in `seen`. A repeated token is penalised once.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019. A negative logit
    is multiplied, as in later implementations: a division would make the token more likely.
    """
    x = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    x[ids] = np.where(x[ids] > 0, x[ids] / penalty, x[ids] * penalty)
    return x


def filter_logits(logits: np.ndarray, sampling: Sampling, exp: Function = np.exp) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that the filters keep, ascending, and their logits divided by the temperature, float64.

    The largest logit is subtracted before the division, so that the largest result is 0.
    """
    if sampling.top_k and sampling.top_k < logits.size:
        kept = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    else:
        kept = np.arange(logits.size)
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf
        scaled = (logits[kept].astype(np.float64) - float(logits.max())) / sampling.temperature
    if sampling.top_p is not None and sampling.top_p < 1:
        nucleus = _nucleus(scaled, sampling.top_p, exp)
        kept, scaled = kept[nucleus], scaled[nucleus]
    if sampling.min_p is not None:
        likely = exp(scaled) >= sampling.min_p
        kept, scaled = kept[likely], scaled[likely]
    return kept, scaled


def _nucleus(scaled: np.ndarray, top_p: float, exp: Function) -> np.ndarray:
    """Return the indices, ascending, of the smallest set of entries whose total probability reaches top_p."""
    order = np.argsort(-scaled, kind="stable")
    weights = exp(scaled[order])
    sums = np.cumsum(weights)  # its last element is the total; the order of np.sum is not specified
    return np.sort(order[sums - weights < top_p * sums[-1]])
