"""A page that colours the tokens of texts by how much they surprise a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ..language_model import GPT2
from ..score import Score
from .document import Page, document, facts, name_of, section, token_text, tokens_as_text

LIMITS = (1, 2, 4, 8, 12)
"""The limits in bits between the colours, which are the classes s0 to s5 in the style sheet."""

LARGEST = 100_000
"""The largest number of tokens on a page."""

ALTERNATIVES = 5
"""The number of the most likely tokens that the page shows for each token."""


def surprise(model: GPT2, scores: Score | Mapping[str, Score]) -> Page:
    """Return a page that colours the tokens of texts by their surprise, -log2(p) bits, where p is the probability.

    Point at a token to see its probability. If the texts were scored with ``alternatives``, the page also shows its
    rank and the tokens that the model found most likely in its place.

    Parameters
    ----------
    model : GPT2
        The model that computed the scores. Its tokenizer gives the texts of tokens.
    scores : Score or dict of Score
        The score of a text, as `GPT2.score` returns it; or those of several texts, by their names.

    Returns
    -------
    Page
        The page, a str. A notebook shows it; its method ``save`` writes it to a file. Log-probabilities are rounded to
        four decimals.

    Raises
    ------
    ValueError
        If the model has no tokenizer, or the texts have more than 100,000 tokens.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> model = pg.GPT2.load("shakespeare", backend="numpy")
    >>> page = pg.pages.surprise(model, model.score("To be, or not to be", alternatives=5))
    >>> page.startswith("<!DOCTYPE html>")
    True
    """
    named = {"text": scores} if isinstance(scores, Score) else dict(scores)
    if not named:
        raise ValueError("there are no scores; give at least one, as GPT2.score returns it")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so the texts of its tokens are not known")
    if (n := sum(len(score.tokens) for score in named.values())) > LARGEST:
        raise ValueError(f"the texts have {n:,} tokens; a page holds up to {LARGEST:,}: split them into several pages")
    names: dict[int, str] = {}
    data = {"texts": [_data(score, model, names) for score in named.values()], "names": names}
    return document(
        __package__,
        "surprise",
        title=f"Surprise: {', '.join(named)[:60]}",
        heading="How much each token surprises the model",
        introduction=_introduction(model, ranked=any(score.ranks is not None for score in named.values())),
        sections=[*(_section(name, score, model) for name, score in named.items()), _PANEL],
        data=data,
    )


_PANEL = """<aside id="panel" class="card" aria-live="polite" aria-label="chosen token">
<noscript>This page needs JavaScript, which is switched off, to show more than the colours.</noscript>
<p id="chosen">No token is chosen.</p>
<ol id="alternatives" aria-label="most likely tokens"></ol>
</aside>"""


def _data(score: Score, model: GPT2, names: dict[int, str]) -> dict[str, Any]:
    """Return the numbers of a text for the script. Enter the texts of likely tokens into `names`."""
    found: dict[str, Any] = {"tokens": score.tokens, "log_probs": [round(x, 4) for x in score.log_probs.tolist()]}
    if score.ranks is not None and score.likeliest is not None and score.likeliest_log_probs is not None:
        assert model.tokenizer is not None
        for token in np.unique(score.likeliest[score.ranks > 0]).tolist():
            names[token] = names.get(token) or name_of(token_text(model.tokenizer, token))
        found["ranks"] = score.ranks.tolist()
        found["likeliest"] = score.likeliest.tolist()
        # Thousandths as integers take fewer characters. A token without a probability has none of these numbers.
        thousandths = np.nan_to_num(1000 * score.likeliest_log_probs, nan=0, neginf=-1e9)
        found["likeliest_log_probs"] = np.rint(thousandths).astype(np.int64).tolist()
    return found


def _class(log_prob: float) -> str:
    """Return the classes of a token: those of the colour of its surprise, if it has one."""
    return "t" if math.isnan(log_prob) else f"t s{level(-log_prob / math.log(2))}"


def level(bits: float) -> int:
    """Return the number of the colour of a surprise, from 0 (expected) to 5.

    Examples
    --------
    >>> [level(bits) for bits in (0.0, 1.0, 1.5, 12.0, 12.5)]
    [0, 0, 1, 4, 5]
    """
    return sum(bits > limit for limit in LIMITS)


def _introduction(model: GPT2, ranked: bool) -> str:
    also = ", its rank among all tokens and the most likely tokens" if ranked else ""
    how = (
        "The surprise of a token is -log2 of the probability that the model gave it, in bits: 0 bits for a token that "
        f"the model was certain of, 1 bit for a probability of 1/2, 10 bits for 1/1024. Point at a token, touch it, or "
        f"choose it with the arrow keys, to see its probability{also}."
    )
    ends = [f"up to {LIMITS[0]}", *(f"{a} to {b}" for a, b in pairwise(LIMITS)), f"above {LIMITS[-1]}"]
    key = "\n".join(f'<li><span class="swatch s{i}"></span>{end}</li>' for i, end in enumerate(ends))
    legend = f'<ul class="key" aria-label="colours of the surprise in bits">\n<li>bits:</li>\n{key}\n</ul>'
    return "\n".join([f"<p>{how}</p>", facts([("model", repr(model))]), legend])


def _section(name: str, score: Score, model: GPT2) -> str:
    assert model.tokenizer is not None
    texts = [token_text(model.tokenizer, token) for token in score.tokens]
    bits = -score.total / math.log(2)
    mean = bits / score.n_tokens if score.n_tokens else math.nan
    per_byte = bits / score.n_bytes if score.n_bytes else math.nan
    summary = [
        ("surprise", f"{mean:.3f} bits per token, {per_byte:.3f} bits per byte"),
        ("perplexity", f"{score.perplexity:.2f} per token, {score.byte_perplexity:.3f} per byte"),
        ("scored", f"{score.n_tokens:,} of {len(score.tokens):,} tokens"),
    ]
    words = tokens_as_text(texts, f"tokens of {name}", map(_class, score.log_probs.tolist()))
    return section(name, facts(summary), words)
