"""What can be compared, and how each becomes a trace: models, checkpoints, traces, and models of other programs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..backend import Backend
from ..checkpoint import stored
from ..config import GPT2Config
from ..language_model import GPT2
from ..model import gpt2, observed_names
from ..numerics import stated
from ..numerics.bounds import computed_in
from ..params import flatten
from ..registry import to_numpy
from ..tokenizer import Tokenizer
from .probes import is_module, trace_modules
from .progress import Progress, counted, silent
from .sublayers import is_keras, trace_sublayers
from .trace import Trace, is_trace


@dataclass(frozen=True, eq=False)
class Side:
    """A model or a trace that can be compared.

    Parameters
    ----------
    name : str
        A name for messages.
    run : callable
        Returns the `Trace` of token ids, int64 [1, seq]. An optional second argument shows the progress.
    tokenizer : Tokenizer, optional
        The tokenizer of the model, if it is known.
    tokens : int array [1, seq], optional
        The only token ids that it can be traced for.
    config : GPT2Config, optional
        The shape of the model, if it is known before the model is traced.
    """

    name: str
    run: Callable[..., Trace]
    tokenizer: Tokenizer | None = None
    tokens: np.ndarray | None = None
    config: GPT2Config | None = None

    def __repr__(self) -> str:
        return f"<Side: {self.name}>"


def probe(model: Any, names: Mapping[str, str] | None = None, *, config: GPT2Config | None = None) -> Side:
    """Return a side of a comparison for a model of another program.

    A model of PyTorch's modules is called once, without gradients, with hooks on its modules, which are removed
    afterwards. Layers may share their modules. The results are the outputs of these modules and, for ``embedding``,
    ``*/attn/attention``, ``*/attn/residual``, ``*/mlp/gelu`` and ``*/residual``, the inputs of the modules that follow.
    ``*/attn/q``, ``*/attn/k`` and ``*/attn/v`` are the output of
    ``c_attn``, split as GPT-2 splits it. The scores are never seen, and the weights only if the module of attention
    returns them, as transformers' does with ``attn_implementation="eager"``.

    A model of KerasHub has all results but the scores. It has the weights only if it was made with dropout.

    Parameters
    ----------
    model : object
        A ``GPT2LMHeadModel`` or a ``GPT2Model`` of transformers, in evaluation mode; any model of PyTorch's modules
        that is called with token ids, in evaluation mode; or a ``GPT2CausalLM`` or a ``GPT2Backbone`` of KerasHub.
    names : dict of str, optional
        Our name for each module of a PyTorch model, by the module's name. In both, ``{}`` stands for the number of a
        layer: ``{"blocks.{}.norm1": "h{}/ln_1", "head": "logits"}``. Our names are those of results, and ``wte``,
        ``wpe`` and ``h{}/attn`` (a module whose output is a tuple with the attention weights). The weight and the bias
        of a module are its parameters. Modules for q, k and v may be separate: ``h{}/attn/q``. The default has the
        names of transformers and of nanoGPT.
    config : GPT2Config, optional
        The shape of the model, if it has no attribute ``config`` of transformers or nanoGPT. Without it, q, k, v and
        attention are left out, because the number of heads is not known.

    Returns
    -------
    Side

    Raises
    ------
    TypeError
        If the object is no such model.
    ValueError
        If a name of `names` is not known. When the model is traced: if it is in training mode, has no such module,
        calls a module several times, or cannot read the tokens. Errors of the model itself are raised unchanged.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.probe([1, 2])
    Traceback (most recent call last):
    ...
    TypeError: [1, 2] is not a model that can be traced; expected one of PyTorch's modules, or KerasHub's GPT-2
    """
    name = f"{type(model).__module__.partition('.')[0]}'s {type(model).__name__}"
    if is_keras(model):  # before PyTorch's modules, because Keras' layers are such modules if PyTorch runs them
        if names is not None or config is not None:
            raise ValueError(f"{name} has names and a configuration of its own; leave names and config out")
        return Side(name, functools.partial(trace_sublayers, model))
    if is_module(model):

        def run(tokens: np.ndarray, progress: Progress = silent) -> Trace:
            return trace_modules(model, tokens, names, config, progress)

        return Side(name, run)
    raise TypeError(
        f"{checks.shown(model)} is not a model that can be traced; expected one of PyTorch's modules, or KerasHub's "
        f"GPT-2"
    )


def open_side(
    side: Any,
    *,
    backend: str | Backend | None = None,
    device: Any = None,
    dtype: str | None = None,
    reproducible: bool | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Side:
    """Return a side of a comparison, which can be traced.

    Parameters
    ----------
    side : GPT2, Trace, Side, path, str, or a model of another program
        A model or a trace; the file of a trace (``.npz`` or ``.safetensors``); a checkpoint, as `GPT2.load` takes it;
        or a model that `probe` takes.
    backend, device, dtype, reproducible, progress
        For a checkpoint, as in `GPT2.load`. Other sides have a backend, a device, a dtype and a mode of their own.

    Returns
    -------
    Side

    Raises
    ------
    ValueError
        If a backend, a device, a dtype or a mode is given for something other than a checkpoint.
    """
    if isinstance(side, str | os.PathLike) and not is_trace(side):
        options = {"backend": backend, "device": device, "dtype": dtype, "reproducible": bool(reproducible)}
        return _of_model(GPT2.load(side, **options, progress=progress), short_name(side))
    given = {"backend": backend, "device": device, "dtype": dtype, "reproducible": reproducible}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given for {checks.shown(side)}; only a checkpoint is loaded with one")
    if isinstance(side, str | os.PathLike):
        side = Trace.load(side)
    if isinstance(side, Trace):
        return Side(side.source, lambda tokens, progress=silent: side, tokens=side.tokens)
    if isinstance(side, GPT2):
        return _of_model(side, "GPT2")
    return side if isinstance(side, Side) else probe(side)


def short_name(source: str | os.PathLike[str]) -> str:
    """Return the name of a checkpoint, without the directories above it."""
    path = checks.path("source", source)
    return path.resolve().name if path.exists() else str(path)


def _of_model(model: GPT2, name: str) -> Side:

    def run(tokens: np.ndarray, progress: Progress = silent) -> Trace:
        return trace_model(model, tokens, name=name, progress=progress)

    return Side(name, run, model.tokenizer, config=model.config)


def trace_model(
    model: GPT2,
    tokens: np.ndarray,
    names: Iterable[str] = ("*",),
    *,
    name: str = "GPT2",
    progress: Progress = silent,
) -> Trace:
    """Return the trace of a model for token ids [1, seq].

    Parameters
    ----------
    model : GPT2
        The model.
    tokens : int array [1, seq]
        The token ids.
    names : strs
        The names of the results, as `GPT2.trace` takes them.
    name : str
        What the model is, for `Trace.source`.
    progress : function, optional
        As for `compare`. It sees the results of a model that is compiled or reproducible only after the last one.
    """
    dtype = str(model.backend.dtype_names[model.params["wte"].dtype])
    with counted(progress, observed_names(model.config), f"tracing {name}") as done:
        if model.reproducible or (model.backend.compiles_per_shape and computed_in(dtype) == dtype):
            found = model.trace(tokens[0], names=names)
        else:
            found = _op_by_op(model, tokens, names, done)
    arrays = {each: to_numpy(found.pop(each)) for each in list(found)}  # no result stays on the device after its copy
    return Trace(
        f"{name} on {model.backend.name}, {model.device}, {dtype}",
        tokens,
        arrays,
        dtype,
        model.config,
        {path: stored(x) for path, x in flatten(model.params)},
        stated(model.backend, dtype, model.device.partition(":")[0]),
    )


def _op_by_op(model: GPT2, tokens: np.ndarray, names: Iterable[str], done: Callable[[], None]) -> dict[str, Any]:
    """Return the results of a model that is not compiled, and call a function after each.

    In 16 bits, a compiler such as XLA skips the rounding between two ops of a model. Then an op does not read the
    result that is traced, and cannot be judged on it.
    """
    found: dict[str, Any] = {}
    kept = model._names(names)

    def observe(name: str, x: Any) -> None:
        done()
        if name in kept:
            found[name] = x

    ids = checks.token_ids("token ids", tokens, model.config.n_vocab, axes=2)
    checks.positions(ids.shape[1], model.config.n_ctx)
    gpt2(model.params, model.backend.from_numpy(ids, device=model._device), model.config, observe=observe)
    return found


def traces(
    a: Side,
    b: Side,
    text: str | Sequence[int] | None = None,
    *,
    allow_special: bool | Collection[str] = False,
    progress: Progress = silent,
) -> tuple[Trace, Trace]:
    """Return the traces of two sides for the same tokens.

    Parameters
    ----------
    a, b : Side
        The sides, as `open_side` returns them.
    text : str or ints, optional
        A text, which is encoded by the first tokenizer that a side has, or token ids. It may be left out if a side is a
        trace, whose tokens are then taken.
    allow_special : bool or collection of str
        See `GenerationOptions`.
    progress : function, optional
        As for `compare`.

    Raises
    ------
    ValueError
        If a side is a trace of other tokens, or neither side has a tokenizer for a text.
    """
    tokens = _tokens(a, b, text, allow_special)
    for side in (a, b):
        if side.tokens is not None and not np.array_equal(side.tokens, tokens):
            raise ValueError(
                f"{side.name} is a trace of the tokens {_some(side.tokens)}, and the text has the tokens "
                f"{_some(tokens)}; leave the text out, or trace that model again"
            )
    return a.run(tokens, progress), b.run(tokens, progress)


def _tokens(a: Side, b: Side, text: Any, allow_special: bool | Collection[str]) -> np.ndarray:
    """Return the token ids of a text, int64 [1, seq]."""
    if text is None:
        for side in (a, b):
            if side.tokens is not None:
                return side.tokens
        raise ValueError("no text is given; give a text or token ids, which both sides read")
    if isinstance(text, str):
        tokenizer = a.tokenizer or b.tokenizer
        if tokenizer is None:
            raise ValueError("the text is a str, and neither side has a tokenizer; give token ids")
        text = tokenizer.encode(text, allow_special=allow_special)
    return checks.token_ids("tokens", text, checks.LARGEST)[None].astype(np.int64)


def _some(tokens: np.ndarray) -> str:
    ids = tokens[0].tolist()
    return f"{', '.join(map(str, ids[:8]))}{' ...' if len(ids) > 8 else ''}"
