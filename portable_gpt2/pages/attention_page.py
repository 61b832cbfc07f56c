"""A page that shows where each token of a text attends, in each layer and head."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np

from .. import checks
from ..language_model import GPT2, AllowSpecial
from ..registry import to_numpy
from .document import Page, document, facts, section, token_text, tokens_as_text

LARGEST = 16_000_000
"""The largest number of weights on a page: 12 layers of 12 heads for 470 tokens. The page then has 21 MB."""


def attention(
    model: GPT2,
    text: str,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    allow_special: AllowSpecial = False,
) -> Page:
    """Return a page that shows the attention weights of a text: point at a token to see where it attends.

    The page has one byte per weight: the square root of the weight, rounded to a multiple of 1/255. So the error of a
    weight w is at most 0.4% times the square root of w: 0.4 percentage points at 100%, 0.04 at 1%.

    Parameters
    ----------
    model : GPT2
        The model, which must have a tokenizer.
    text : str
        The text that the model reads.
    layers, heads : ints, optional
        The indices of the layers and the heads that are on the page; all of them unless given.
    allow_special : bool or collection of str
        See `GenerationOptions`.

    Returns
    -------
    Page
        The page, a str. A notebook shows it; its method ``save`` writes it to a file.

    Raises
    ------
    ValueError
        If there is no such layer or head, or the page would have more than 16 million weights. The message says how
        many tokens are possible.
    TypeError, ValueError
        As for `GPT2.trace`.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> page = pg.pages.attention(pg.GPT2.load("shakespeare", backend="numpy"), "To be, or not to be", layers=[3])
    >>> page.startswith("<!DOCTYPE html>")
    True
    """
    chosen_layers = _indices("layers", layers, model.config.n_layer)
    chosen_heads = _indices("heads", heads, model.config.n_head)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read a text")
    ids = model.tokenizer.encode(text, allow_special=allow_special)
    checks.positions(len(ids), model.config.n_ctx)
    _check_size(len(ids), len(chosen_layers) * len(chosen_heads))
    names = [f"h{i}/attn/weights" for i in chosen_layers]
    traced = model.trace(ids, names=names)
    lower = np.tril_indices(len(ids))  # row by row: a query attends only to its own key and the keys before it
    maps = (to_numpy(traced.pop(name))[0] for name in names)
    packed = [quantized(of_layer[head][lower]) for of_layer in maps for head in chosen_heads]
    tokens = [token_text(model.tokenizer, token) for token in ids]
    data = {
        "layers": chosen_layers,
        "heads": chosen_heads,
        "tokens": ids,
        "weights": base64.b64encode(b"".join(packed)).decode(),
    }
    return document(
        __package__,
        "attention",
        title=f"Attention: {text[:60]}",
        heading="Where each token attends",
        introduction=_introduction(model, len(ids)),
        sections=[_section(tokens, chosen_layers, chosen_heads)],
        data=data,
    )


def quantized(weights: np.ndarray) -> bytes:
    """Return one byte per weight: the square root of the weight in multiples of 1/255, rounded to the nearest.

    The square root gives small weights, of which there are many, more steps than large ones.

    Examples
    --------
    >>> list(quantized(np.asarray([0.0, 0.01, 0.25, 1.0])))
    [0, 26, 128, 255]
    """
    roots = np.sqrt(np.clip(weights.astype(np.float64), 0, 1))
    found: bytes = np.rint(255 * roots).astype(np.uint8).tobytes()
    return found


def _indices(name: str, given: Iterable[int] | None, n: int) -> list[int]:
    if given is None:
        return list(range(n))
    found = [checks.integer(name, i, 0, n - 1) for i in checks.several(name, given, "indices")]
    if not found:
        raise ValueError(f"{name} is empty; expected at least one index from 0 to {n - 1}")
    return found


def _check_size(n: int, n_maps: int) -> None:
    if (size := n * (n + 1) // 2 * n_maps) > LARGEST:
        possible = int((2 * LARGEST / n_maps + 0.25) ** 0.5 - 0.5)
        raise ValueError(
            f"{n} tokens have {size:,} attention weights in {n_maps} heads; a page holds up to {LARGEST:,}: choose a "
            f"layer or a head, or shorten the text to {possible} tokens"
        )


def _introduction(model: GPT2, n: int) -> str:
    how = (
        "Point at a token, or touch it, to see where it attends: the stronger the colour of another token, the larger "
        "its weight. With the keyboard, left and right choose a token, up and down a head, page up and page down a "
        "layer."
    )
    return "\n".join([f"<p>{how}</p>", facts([("model", repr(model)), ("tokens", f"{n:,}")])])


def _section(tokens: list[str], layers: list[int], heads: list[int]) -> str:
    options = {"layer": layers, "head": heads}
    selects = "\n".join(
        f'<label>{name} <select id="{name}">'
        + "".join(f'<option value="{place}">{i}</option>' for place, i in enumerate(indices))
        + "</select></label>"
        for name, indices in options.items()
    )
    key = "\n".join(f'<li><span class="swatch level-{level}"></span>{level} %</li>' for level in (1, 10, 25, 50, 100))
    parts = [
        '<noscript><p class="card">This page needs JavaScript, which is switched off.</p></noscript>',
        f'<div class="controls">\n{selects}',
        f'<ul class="key" aria-label="colours of the weights">\n{key}\n</ul>\n</div>',
        '<div class="columns">',
        tokens_as_text(tokens, "tokens of the text", ["t"] * len(tokens)),
        '<div class="card side">',
        '<p id="query" aria-live="polite"></p>',
        '<ol id="strongest" aria-label="largest weights"></ol>',
        "</div>",
        "</div>",
        '<figure class="map">',
        '<canvas id="map" role="img"></canvas>',
        "<figcaption>The whole map of this head. A row is a token, and its columns are the tokens that it attends to. "
        "Point at a row to choose its token.</figcaption>",
        "</figure>",
    ]
    return section("Text", *parts)
