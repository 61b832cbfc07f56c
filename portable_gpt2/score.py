"""How likely a text is under a model: log-probabilities of its tokens, computed in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import checks
from .correct_rounding.mode import reproducible as reproducible_ops
from .ops import cross_entropy
from .sampling import check_finite

_ROWS = 64  # how many rows of logits are converted to float64 at a time


@dataclass(frozen=True, eq=False)
class Score:
    """The log-probability of each token of a text, given the tokens before it.

    Parameters
    ----------
    tokens : list of int
        The text's token ids.
    log_probs : float64 array [len(tokens)]
        Natural logarithms. The first is NaN, because no token comes before it, unless the text was scored as the
        beginning of a document.
    n_bytes : int
        The length in UTF-8 of the tokens that have a log-probability.
    ranks : int array [len(tokens)], optional
        The rank of each token among all tokens of the vocabulary, from 1, the most likely one; 0 for a token without a
        log-probability. None if the text was scored without ``alternatives``.
    likeliest : int array [len(tokens), alternatives], optional
        For each token, the ids of the most likely tokens in its place, in descending order.
    likeliest_log_probs : float64 array [len(tokens), alternatives], optional
        Their log-probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2 import Score
    >>> score = Score([7, 8, 9], np.log([np.nan, 0.5, 0.125]), n_bytes=4)
    >>> score.n_tokens, round(score.perplexity, 12), round(score.byte_perplexity, 12)
    (2, 4.0, 2.0)
    """

    tokens: list[int]
    log_probs: np.ndarray
    n_bytes: int
    ranks: np.ndarray | None = None
    likeliest: np.ndarray | None = None
    likeliest_log_probs: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        """The number of tokens that have a log-probability."""
        return int(np.count_nonzero(~np.isnan(self.log_probs)))

    @property
    def total(self) -> float:
        """The sum of the log-probabilities."""
        return math.fsum(self.log_probs[~np.isnan(self.log_probs)])

    @property
    def perplexity(self) -> float:
        """exp(-total / n_tokens); NaN if no token has a log-probability."""
        return _perplexity(self.total, self.n_tokens)

    @property
    def byte_perplexity(self) -> float:
        """exp(-total / n_bytes), which is comparable between models with different tokenizers."""
        return _perplexity(self.total, self.n_bytes)


def _perplexity(total: float, n: int) -> float:
    try:
        return math.exp(-total / n) if n else math.nan
    except OverflowError:
        return math.inf


def windows(n: int, n_ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Return an iterator over windows (start, first, end) in which a model of n_ctx positions scores n tokens.

    In each window the model reads the tokens from start to end - 1, and scores those from first to end - 1. A window
    starts `stride` tokens after the previous one, and scores the tokens that the previous one did not read. So each
    token is conditioned on all tokens before it or, from the second window on, on at least n_ctx - stride of them.

    Examples
    --------
    >>> from portable_gpt2.score import windows
    >>> list(windows(10, n_ctx=6, stride=3))
    [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    n, n_ctx = checks.integer("n", n), checks.integer("n_ctx", n_ctx, 2)
    return _windows(n, n_ctx, checks.integer("stride", stride, 1, n_ctx - 1, note="the largest is n_ctx - 1"))


def _windows(n: int, n_ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    start, first = 0, 1
    while first < n:
        end = min(start + n_ctx, n)
        yield start, first, end
        start, first = start + stride, end


class Scored(NamedTuple):
    """The arrays of a `Score`, with an entry for each token of a text."""

    log_probs: np.ndarray
    ranks: np.ndarray | None
    likeliest: np.ndarray | None
    likeliest_log_probs: np.ndarray | None


class Scorer(Protocol):
    """Scores the tokens of windows."""

    def __call__(self, windows: Sequence[tuple[list[int], int]], alternatives: int) -> list[Scored]:
        """Return the scores of each window's tokens from an index on, which is given next to it and is at least 1."""


def score_tokens(
    scorer: Scorer,
    texts: Sequence[list[int]],
    n_ctx: int,
    stride: int,
    alternatives: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    at_once: int = 1,
) -> list[Scored]:
    """Return for each text the log-probability of each token given the tokens before it; the first is NaN.

    Parameters
    ----------
    scorer : Scorer
        Scores windows of at most n_ctx tokens.
    texts : list of list of int
        The token ids of each text.
    n_ctx, stride : int
        See `windows`; stride is from 1 to n_ctx - 1.
    alternatives : int
        The number of the most likely tokens to return. If it is 0, there are no ranks either.
    progress : callable
        Wraps the list of the groups of windows that are scored at once.
    at_once : int
        The number of windows that the scorer scores at once, from 1.

    Raises
    ------
    ValueError
        If a token's logits contain a NaN, or the largest of them is not finite.
    """
    found = []
    for tokens in texts:
        n = len(tokens)
        ranking = np.zeros(n, int), np.zeros((n, alternatives), int), np.full((n, alternatives), math.nan)
        found.append(Scored(np.full(n, math.nan), *(ranking if alternatives else (None, None, None))))
    todo = [(i, *window) for i, tokens in enumerate(texts) for window in windows(len(tokens), n_ctx, stride)]
    for group in progress([todo[i : i + at_once] for i in range(0, len(todo), at_once)]):
        parts = scorer([(texts[i][start:end], first - start) for i, start, first, end in group], alternatives)
        for (i, _, first, end), part in zip(group, parts, strict=True):
            for whole, values in zip(found[i], part, strict=True):
                if whole is not None:
                    whole[first:end] = values
    return found


def from_logits(logits_of: Callable[[list[int]], np.ndarray], reproducible: bool = False) -> Scorer:
    """Return a scorer that computes log-probabilities in float64 on the host.

    Parameters
    ----------
    logits_of : callable
        Takes at most n_ctx tokens, and returns their logits [seq, n_vocab] on the host.
    reproducible : bool
        Whether to round each log-probability correctly to float32, so that it is the same on every processor.
    """

    def scored(window: list[int], first: int, alternatives: int) -> Scored:
        logits, parts = logits_of(window), []
        for i in range(first, len(window), _ROWS):
            targets = window[i : i + _ROWS]
            parts.append(_scored(logits[i - 1 : i - 1 + len(targets)], targets, alternatives, reproducible))
        log_probs, ranks, ids, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Scored(log_probs, ranks, ids, values)

    return lambda windows, alternatives: [scored(window, first, alternatives) for window, first in windows]


def _scored(logits: np.ndarray, targets: list[int], alternatives: int, reproducible: bool) -> list[np.ndarray]:
    """Return the arrays of a `Scored` for rows of logits and their targets."""
    rows = logits.astype(np.float64)
    largest = rows.max(axis=-1, keepdims=True)
    for each in largest.flat:
        check_finite(each)
    rows -= largest
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    own = rows[np.arange(len(targets)), targets]
    found = np.asarray(_correctly_rounded(logits, targets)) if reproducible else own
    if not alternatives:
        return [found, own, own, own]
    ids = _largest(rows, alternatives)
    ranks = 1 + np.count_nonzero(rows > own[:, None], axis=-1)
    return [found, ranks, ids, np.take_along_axis(rows, ids, axis=-1)]


def _largest(rows: np.ndarray, n: int) -> np.ndarray:
    """Return the columns of the n largest elements of each row, in descending order."""
    ids = np.argpartition(-rows, n - 1, axis=-1)[:, :n]
    order = np.argsort(-np.take_along_axis(rows, ids, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1)


def _correctly_rounded(logits: np.ndarray, tokens: list[int]) -> list[float]:
    """Return the log-probability of one token for each row of logits, rounded correctly to float32."""
    with reproducible_ops():
        return [
            -float(cross_entropy(row[None, :], np.asarray([token]))) for row, token in zip(logits, tokens, strict=True)
        ]
