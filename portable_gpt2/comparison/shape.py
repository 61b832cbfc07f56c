"""The shape of two sides of a comparison: the configuration of each, and what is assumed if neither has one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..config import GPT2Config
from ..host import StoredTensor
from .trace import Trace
from .weights import differences, merged


def configurations(a: Trace, b: Trace) -> tuple[GPT2Config, GPT2Config]:
    """Return the configurations of two sides, which have the same options and may differ in n_vocab.

    The options are those of a, which say what b should compute; those of b if a has no configuration; and those of the
    published models if neither side has one. Then the shape follows from the results and the weights.

    Parameters
    ----------
    a, b : Trace
        Two traces of the same tokens.

    Raises
    ------
    ValueError
        If two lengths other than n_vocab differ, or a result has another shape than the configuration says.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = (Trace("port", [1, 2], {"logits": np.zeros((2, n)), "h3/ln_1": np.zeros((2, 8))}) for n in (50, 64))
    >>> [(config.n_layer, config.n_embd, config.n_vocab) for config in configurations(a, b)]
    [(4, 8, 50), (4, 8, 64)]
    """
    if a.config is not None and b.config is not None:
        _check_lengths(a, b, a.config, b.config)
    config = a.config or b.config or _assumed(a, b)
    sizes = n_vocab(a), n_vocab(b)
    known = [n or max(other or 0, config.n_vocab) for n, other in zip(sizes, sizes[::-1], strict=True)]
    found = tuple(_with_vocabulary(config, n) for n in known)
    for side, own in zip((a, b), found, strict=True):
        try:
            replace(side, config=own)  # a trace checks its shapes
        except ValueError as error:
            raise ValueError(f"{side.source}: {error}") from None
    return found[0], found[1]


def n_vocab(side: Trace) -> int | None:
    """Return the number of token ids of a side; None if it is not known."""
    if side.config is not None:
        return side.config.n_vocab
    if "logits" in side.arrays:
        return int(side.arrays["logits"].shape[-1])
    return side.weights["wte"].shape[0] if "wte" in side.weights else None


def knows_heads(a: Trace, b: Trace) -> bool:
    """Return whether the number of heads is known. Only results with an axis of heads, or a configuration, have it."""
    return a.config is not None or b.config is not None or "n_head" in {**a.lengths, **b.lengths}


def _with_vocabulary(config: GPT2Config, n: int) -> GPT2Config:
    if n == config.n_vocab:
        return config
    return replace(config, n_vocab=n, eos_token_id=None, bos_token_id=None, pad_token_id=None)


def _assumed(a: Trace, b: Trace) -> GPT2Config:
    """Return GPT-2's configuration with the shape that the results and the weights have."""
    lengths = {**b.lengths, **a.lengths}
    names = [name for side in (a, b) for name in (*side.arrays, *side.weights)]
    layers = [int(found[1]) for name in names if (found := re.match(r"h(\d+)/", name))]
    n_head = lengths.get("n_head", 1)
    return GPT2Config(
        n_layer=max(layers, default=0) + 1,
        n_head=n_head,
        n_embd=lengths.get("n_embd") or _width(a.weights) or _width(b.weights) or n_head,
        n_inner=lengths.get("n_hidden"),
        n_vocab=int(max(a.tokens.max(), b.tokens.max())) + 1,
        n_ctx=a.tokens.shape[1],
        eos_token_id=None,
    )


def _width(weights: Mapping[str, StoredTensor]) -> int | None:
    return next((weights[path].shape[-1] for path in ("wte", "wpe") if path in weights), None)


def _check_lengths(a: Trace, b: Trace, own: GPT2Config, other: GPT2Config) -> None:
    for name in ("n_layer", "n_head", "n_embd", "n_hidden"):
        if (x := getattr(own, name)) != (y := getattr(other, name)):
            found = merged(differences(a.weights, b.weights, own, other)) if a.weights and b.weights else []
            said = "; ".join(f"{each.path}: {each.kind}" for each in found[:3])
            raise ValueError(
                f"{name} is {x} in {a.source} and {y} in {b.source}; the shapes must be equal, except for n_vocab"
                + (f" (the weights differ: {said})" if said else "")
            )
