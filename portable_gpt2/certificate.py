"""Logits that are proved: enclosures of the exact logits, and what follows from them.

A backend that computes with balls (`Backend.enclosure`) runs the model. Its logits contain those that exact arithmetic
would give, with the weights as they are stored. docs/numerics.md says what exactly is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks
from .backend import Backend
from .host import Enclosure, float_dtypes
from .language_model import GPT2, AllowSpecial
from .model import gpt2, observed_names
from .numerics.bounds import FORMATS
from .params import Params, flatten, map_tree, nest
from .registry import backend_of, get_backend, to_numpy

_LARGEST = 2**14
"""The largest working precision, in bits, that `certify` tries."""
_BYTES = 600
"""The memory that a logit takes, from its ball to the bounds of its error, as measured with 256 bits."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """Proved facts about the logits of a model for one text.

    Parameters
    ----------
    tokens : list of int
        The ids of the tokens that were read, [seq].
    new_tokens : list of int
        The greedy continuation that the model itself computed. The model read all of these tokens but the last one:
        they are the last tokens of `tokens`.
    logits : array [seq, n_vocab]
        The enclosures of the exact logits, an array of the backend that computed them. `Backend.enclosure` returns
        their bounds.
    bits : int
        The working precision with which they were computed.
    radius : float
        The largest distance of an exact logit to the midpoint of its enclosure.
    argmax : list of int or None, [seq]
        The token with the largest exact logit at each position. None if it is not decided, because enclosures overlap:
        the logits of two tokens may be equal.
    margins : float64 array [seq]
        A lower bound on the difference between the largest exact logit and the next one; 0 where `argmax` is None.
    computed_argmax : list of int, [seq]
        The token with the largest logit that the model itself computed.
    errors : float64 array [seq]
        An upper bound on the largest error of the logits that the model itself computed, at each position.
    ideal : float64 array [seq]
        The largest error of an ideal implementation at each position. Each of its ops returns the exact result, rounded
        once to the dtype of the model. It reads the same weights as the model. Not proved: its ops are evaluated in
        float64. For a model in float64, it is the error in float32 times 2^-29.
    largest : float
        The largest magnitude of an exact logit, rounded up.
    backend, dtype : str
        The backend and the dtype with which the model itself computed.
    texts : list of str, optional
        The text of each token of `tokens` and of `new_tokens`.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> certificate = pg.certify(model, [1, 2, 3], max_new_tokens=2)
    >>> certificate.radius < 1e-30, certificate.errors.max() < 1e-6, certificate.proved
    (True, np.True_, [True, True])
    """

    tokens: list[int]
    new_tokens: list[int]
    logits: Any
    bits: int
    radius: float
    argmax: list[int | None]
    margins: np.ndarray
    computed_argmax: list[int]
    errors: np.ndarray
    ideal: np.ndarray
    largest: float
    backend: str
    dtype: str
    texts: list[str] | None = None

    @property
    def proved(self) -> list[bool]:
        """Whether each of `new_tokens` is proved to have the largest exact logit, given the tokens before it."""
        best = self.argmax[len(self.argmax) - len(self.new_tokens) :]
        return [token == largest for token, largest in zip(self.new_tokens, best, strict=True)]

    @property
    def units(self) -> float:
        """The largest error of the model's own logits, in units of the unit round-off times the largest logit."""
        unit = FORMATS[self.dtype].unit * self.largest
        return float(self.errors.max()) / unit if unit else math.inf

    @property
    def of_ideal(self) -> float:
        """The largest error of the model's own logits, divided by that of an ideal implementation (`ideal`)."""
        return _quotient(float(self.errors.max()), float(self.ideal.max()))

    def __str__(self) -> str:
        n, decided = len(self.tokens), sum(best is not None for best in self.argmax)
        agreed = sum(best == own for best, own in zip(self.argmax, self.computed_argmax, strict=True))
        overflows = int(np.isinf(self.errors).sum())
        lines = [
            f"The exact logits of {n} tokens are enclosed, with radii of at most {self.radius:.2g} ({self.bits} bits).",
            f"The token with the largest exact logit is certified at {decided} of {n} positions. At {agreed} of them, "
            f"it is the one that {self.backend} computed in {self.dtype}.",
        ]
        if overflows:
            lines += [
                f"The logits that {self.backend} computed in {self.dtype} are NaN or infinite at {overflows} of {n} "
                f"positions."
            ]
        else:
            lines += [
                f"The error of the logits that {self.backend} computed in {self.dtype} is at most "
                f"{self.errors.max():.3g}, which is {self.units:.3g} u times the largest logit.",
                f"This is {self.of_ideal:.3g} times {self.ideal.max():.3g}, the error of an ideal implementation, in "
                f"which each op returns its exact result, rounded once to {self.dtype}.",
            ]
        if self.new_tokens:
            lines += [
                f"{sum(self.proved)} of the {len(self.new_tokens)} greedy tokens are proved: each of them has the "
                f"largest exact logit, given the tokens before it."
            ]
        rows: list[tuple[str, ...]] = [("position", "token", "certified next", "margin", "error", "error / ideal")]
        for i in range(n):
            best = self.argmax[i]
            shown = "not decided" if best is None else f"{best}{'' if best == self.computed_argmax[i] else ' (!)'}"
            token = str(self.tokens[i]) if self.texts is None else f"{self.tokens[i]} {self.texts[i]!r}"
            ratio = _quotient(float(self.errors[i]), float(self.ideal[i]))
            numbers = (f"{number:.3g}" for number in (self.margins[i], self.errors[i], ratio))
            rows.append((str(i), token, shown, *numbers))
        widths = [max(len(row[j]) for row in rows) for j in range(6)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *table])

    def summary(self) -> dict[str, Any]:
        """Return everything but the logits as a dict of lists, numbers and strings, for a file of JSON."""
        return {
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "proved": self.proved,
            "bits": self.bits,
            "radius": self.radius,
            "argmax": self.argmax,
            "margins": self.margins.tolist(),
            "computed_argmax": self.computed_argmax,
            "errors": self.errors.tolist(),
            "ideal": self.ideal.tolist(),
            "largest": self.largest,
            "backend": self.backend,
            "dtype": self.dtype,
        }


def _quotient(x: float, y: float) -> float:
    """Return the ratio of two errors. It is 1 if both are 0, or both are infinite."""
    return 1.0 if x == y else x / y if y else math.inf


def certify(
    model: GPT2,
    text: str | Sequence[int],
    *,
    max_new_tokens: int = 0,
    radius: float = 1e-30,
    weights: GPT2 | None = None,
    allow_special: AllowSpecial = False,
    backend: str | Backend = "flint",
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Certificate:
    """Enclose the exact logits of a model, and compare the logits that the model itself computes with them.

    The exact logits are those of `gpt2` in real arithmetic, with the weights as they are stored. They depend neither on
    the backend of the model nor on the order of its sums. The time grows with the number of parameters, and for more
    than about ten tokens with their number: 16 tokens of the shipped model take seconds, and those of a model of 124M
    parameters minutes.

    Parameters
    ----------
    model : GPT2
        The model, on any backend, in any dtype.
    text : str or ints
        A text, or token ids [seq].
    max_new_tokens : int
        How many tokens of the model's own greedy text are computed and certified after the text.
    radius : float
        The largest permitted radius of an enclosure. The working precision is 256 bits, more for more than five layers,
        and is doubled until the radii are small enough.
    weights : GPT2, optional
        A model whose weights define the exact logits; `model` itself unless given. If `model` has weights that were
        rounded to 16 bits, and this one those of the checkpoint, the errors include the rounding of the weights.
    allow_special : bool or collection of str
        See `GenerationOptions`.
    backend : str or Backend
        A backend that computes with balls: one that defines `Backend.enclosure`.
    progress : callable, optional
        Wraps the iterable of the names of the results (`GPT2.trace`) while they are computed, as tqdm does.

    Returns
    -------
    Certificate

    Raises
    ------
    BackendNotInstalled
        If python-flint is not installed. The message says what to install.
    TypeError, ValueError
        As for `GPT2.trace`; also if radius is not positive, the text and the new tokens do not fit into n_ctx, the
        backend does not compute with balls, or the weights have another shape than those of the model.
    MemoryError
        If the enclosures of the logits do not fit into memory. They take about 600 bytes for each token and each entry
        of the vocabulary.
    ArithmeticError
        If the radii are too large in 16,384 bits, too. This is so if logits are not finite.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> model = pg.GPT2.load("shakespeare", backend="numpy")
    >>> pg.certify(model, "ROMEO.", max_new_tokens=1).proved
    [True]
    """
    exact = get_backend(backend)
    if type(exact).enclosure is Backend.enclosure:
        raise ValueError(f"backend {exact.name!r} does not enclose exact results; the backend flint does")
    radius = checks.number("radius", radius, above=True)
    source = model if weights is None else weights
    if source.config != model.config:
        raise ValueError(f"the weights belong to {source.config}; the model has {model.config}")
    ids = model._prompt_ids(text, allow_special) if isinstance(text, str) else text
    prompt = checks.token_ids("token ids", ids, model.config.n_vocab).tolist()
    checks.positions(len(prompt), model.config.n_ctx)
    max_new_tokens = checks.new_tokens(max_new_tokens, False, [prompt], model.config.n_ctx, may_slide=False)
    _check_memory((len(prompt) + max_new_tokens) * model.config.n_vocab)
    greedy = model.stream_ids(prompt, max_new_tokens=max_new_tokens, temperature=0)
    new = list(greedy) if max_new_tokens else []
    tokens = [*prompt, *new][: len(prompt) + max(max_new_tokens - 1, 0)]
    params = nest({path: _on(exact, x) for path, x in flatten(source.params)})
    bits = 256
    while bits < 128 + 25 * model.config.n_layer:  # the radii grow by about 2^21 to 2^24 per layer
        bits *= 2
    while True:
        with exact.working_precision(bits):
            logits = _logits(exact, params, tokens, model, progress)
            bounds = exact.enclosure(logits)
            if bounds.radius.max() <= radius:
                break
        if bits >= _LARGEST:
            found = f"the largest radius is {bounds.radius.max():.3g} in {bits} bits"
            raise ArithmeticError(f"{found}; are the logits finite?")
        bits *= 2
    computed = model.backend.to_numpy(model.logits([tokens]))[0]
    with exact.working_precision(bits):
        return Certificate(
            tokens,
            new,
            logits,
            bits,
            float(bounds.radius.max()),
            *_argmax(exact, logits, bounds),
            np.argmax(computed, axis=-1).tolist(),
            _errors(exact, logits, computed),
            _ideal(model, tokens, bounds),
            float(max(-bounds.lower.min(), bounds.upper.max())),
            model.backend.name,
            model.backend.dtype_names[model.params["wte"].dtype],
            None if model.tokenizer is None else [model.tokenizer.decode([token]) for token in [*prompt, *new]],
        )


def _check_memory(n_logits: int) -> None:
    """Refuse a text whose enclosures do not fit into memory: FLINT ends the process if it cannot allocate memory."""
    try:
        np.empty(_BYTES * n_logits, np.uint8)
    except MemoryError:
        gigabytes = _BYTES * n_logits / 1e9
        raise MemoryError(
            f"the enclosures of {n_logits:,} logits take about {gigabytes:,.1f} GB of memory; give a shorter text"
        ) from None


def _on(exact: Backend, x: Any) -> Any:
    """Return a parameter on the exact backend, with the same values. 16-bit floats become float32."""
    a = backend_of(x).to_numpy(x)
    return exact.from_numpy(a if a.dtype.itemsize > 2 else a.astype(np.float32))


def _logits(exact: Backend, params: Any, tokens: list[int], model: GPT2, progress: Any) -> Any:
    """Return the enclosures of the exact logits, [seq, n_vocab]."""
    names = iter(progress(observed_names(model.config)))

    def observe(name: str, x: Any) -> Any:
        next(names, None)
        return x

    given = exact.from_numpy(np.asarray([tokens], np.int32))
    logits, _ = gpt2(params, given, model.config, observe=observe)
    next(names, None)  # a progress bar ends after its last item
    return logits[0, ...]


def _argmax(exact: Backend, logits: Any, bounds: Enclosure) -> tuple[list[int | None], np.ndarray]:
    """Return the certified argmax of each row, and a lower bound on its distance to the next logit."""
    found, margins = list[int | None](), np.zeros(len(bounds.lower))
    for i, (lower, upper) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
        # At least two logits are larger than one whose upper bound is below the second largest lower bound.
        contenders = np.flatnonzero(upper >= np.sort(lower)[-2:][0])
        values = exact.xp.take(logits[i, ...], exact.from_numpy(contenders), axis=0)
        best = 0
        while True:
            gaps = exact.enclosure(values[best : best + 1] - values)
            margin = np.where(np.arange(len(contenders)) == best, math.inf, gaps.lower)
            rival = int(np.argmin(margin))
            if gaps.upper[rival] >= 0:
                break
            best = rival  # its logit is certainly larger
        margins[i] = max(float(margin[rival]), 0.0)
        found.append(int(contenders[best]) if margins[i] > 0 else None)
    return found, margins


class _Wide(Mapping[str, Any]):
    """Parameters as NumPy arrays of float64. Each layer is converted when it is read, so that memory suffices."""

    def __init__(self, params: Params) -> None:
        self._params = params

    def __getitem__(self, name: str) -> Any:
        return map_tree(lambda x: to_numpy(x).astype(np.float64), {name: self._params[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _ideal(model: GPT2, tokens: list[int], bounds: Enclosure) -> np.ndarray:
    """Return the largest error, at each position, of an implementation that rounds each op's exact result once.

    The portable source computes in float64, and each result is rounded in place before the next op reads it. Float64
    itself has no wider dtype here. Its errors are those of float32 times the ratio of the unit round-offs, to first
    order.
    """
    dtype = model.backend.dtype_names[model.params["wte"].dtype]
    narrow = "float32" if dtype == "float64" else dtype

    def observe(name: str, x: np.ndarray) -> None:
        x[...] = x.astype(float_dtypes[narrow])

    params: Any = _Wide(model.params)
    with np.errstate(over="ignore", invalid="ignore"):
        logits, _ = gpt2(params, np.asarray([tokens]), model.config, observe=observe)
        errors = np.maximum(logits[0] - bounds.lower, bounds.upper - logits[0]).max(axis=-1)
    ideal: np.ndarray = np.nan_to_num(errors, nan=math.inf) * (FORMATS[dtype].unit / FORMATS[narrow].unit)
    return ideal


def _errors(exact: Backend, logits: Any, computed: np.ndarray) -> np.ndarray:
    """Return an upper bound on the largest error of each row of computed logits."""
    wide = exact.from_numpy(computed.astype(np.float64))
    difference = exact.enclosure(exact.xp.astype(logits, wide.dtype) - wide)
    errors: np.ndarray = np.maximum(-difference.lower, difference.upper).max(axis=-1)
    return errors
