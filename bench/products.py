"""The bare matrix products of a model on one framework, in the fastest of several forms.

Each weight is a separate array, as in a model, so that the processor's caches hold no more of the weights than they do
for a model. A form is a combination of three choices: one of the modes that compile (or eager mode if there is none),
weights stored as in a checkpoint or transposed, and one call for all layers or one call per layer. All combinations are
tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import frameworks
from .checkpoints import config
from .clock import fastest, repeated, seconds

LAYOUTS = {"x w": False, "x w^T": True}  # for each layout, whether a weight is stored transposed

Form = tuple[str, Callable[[], Any]]
"""The name of a form, and a function that computes all its products."""


def linear_seconds(name: str, shape: str, rows: int, last: int) -> float:
    """Return the seconds of the products of all linear layers, for `rows` rows, and of the logits, for `last` rows.

    The result is the sum of the two times.
    """
    layers, logits = _layers(name, shape, rows), _logits(name, shape, last)
    return seconds(layers[1]) + seconds(logits[1])


def form(name: str, shape: str, rows: int, last: int) -> str:
    """Return the names of the fastest forms of the layers' products and of the logits' product."""
    return f"{_layers(name, shape, rows)[0]}; logits {_logits(name, shape, last)[0]}"


def attention_seconds(name: str, shape: str, seq: int) -> float:
    """Return the seconds of attention's two products in all layers of a prefill, including masked elements."""
    return seconds(_attention(name, shape, seq)[1])


@functools.cache
def _layers(name: str, shape: str, rows: int) -> Form:
    own, c, random = frameworks.get(name), config(shape), np.random.default_rng(0)
    d, hidden = c.n_embd, c.n_hidden
    x = tuple(own.array(random.standard_normal((rows, width), np.float32)) for width in (d, hidden))
    calls = {}
    for layout, turned in LAYOUTS.items():

        def layer(x: Any, weights: Any, turned: bool = turned) -> list[Any]:
            widths = [0, 0, 0, 1]  # for each weight, the index of the x that it multiplies
            return [own.matmul(x[i], own.transpose(w) if turned else w) for i, w in zip(widths, weights, strict=True)]

        def whole(x: Any, weights: Any, layer: Any = layer) -> list[Any]:
            return [layer(x, each) for each in weights]

        kinds = [(d, 3 * d), (d, d), (d, hidden), (hidden, d)]
        kinds = [kind[::-1] if turned else kind for kind in kinds]
        weights = [[own.array(random.standard_normal(k, np.float32)) for k in kinds] for _ in range(c.n_layer)]
        for mode, run in own.fast_modes.items():
            calls[f"{mode}, {layout}, in one call"] = [own.bind(run, whole, weights)]
            calls[f"{mode}, {layout}, one call per layer"] = [own.bind(run, layer, each) for each in weights]
    return _fastest({how: lambda fs=fs: [own.wait(f(x)) for f in fs] and None for how, fs in calls.items()})


@functools.cache
def _logits(name: str, shape: str, rows: int) -> Form:
    own, c, random = frameworks.get(name), config(shape), np.random.default_rng(0)
    x = own.array(random.standard_normal((rows, c.n_embd), np.float32))
    calls = {}
    for layout, turned in LAYOUTS.items():
        kind = (c.n_vocab, c.n_embd) if turned else (c.n_embd, c.n_vocab)
        w = own.array(random.standard_normal(kind, np.float32))

        def product(x: Any, w: Any, turned: bool = turned) -> Any:
            return own.matmul(x, own.transpose(w) if turned else w)

        for mode, run in own.fast_modes.items():
            calls[f"{mode}, {layout}"] = lambda f=own.bind(run, product, w): own.wait(f(x)) is None
    return _fastest(calls)


@functools.cache
def _attention(name: str, shape: str, seq: int) -> Form:
    own, c, random = frameworks.get(name), config(shape), np.random.default_rng(0)
    q, k, v = (own.array(random.standard_normal((c.n_head, seq, c.head_size), np.float32)) for _ in range(3))

    def products(q: Any, weights: Any) -> Any:
        k, v = weights
        return own.matmul(own.matmul(q, own.transpose(k)), v)

    modes = {mode: own.bind(run, products, (k, v)) for mode, run in own.fast_modes.items()}
    return _fastest({mode: lambda f=f: [own.wait(f(q)) for _ in range(c.n_layer)] for mode, f in modes.items()})


def _fastest(calls: dict[str, Callable[[], Any]]) -> Form:
    best = fastest(repeated(calls, rounds=3, at_least=0.0))
    return best, calls[best]
