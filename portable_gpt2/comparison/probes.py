"""Trace a model of another program that is made of PyTorch's modules: transformers, nanoGPT, or somebody's own port.

Hooks copy the inputs and the outputs of the model's own modules while it computes; they are removed afterwards, and
nothing else of the model is changed. A result that no module takes or returns is left out. No framework is imported: a
module is whatever has ``named_modules`` and ``register_forward_hook``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..backend import Backend
from ..checkpoint import stored
from ..checkpoint.names import PREFIX, prefix_of
from ..checkpoint.tensors import transposed
from ..config import GPT2Config
from ..host import StoredTensor, float_dtypes
from ..numerics import stated
from ..registry import backend_of, to_numpy
from .progress import Progress, counted, silent
from .trace import Trace, axes_of, is_result

GPT2_NAMES = {
    "wte": "wte",
    "wpe": "wpe",
    **{
        f"h.{{}}.{name.replace('/', '.')}": f"h{{}}/{name}"
        for name in ("ln_1", "attn", "attn/c_attn", "attn/c_proj", "ln_2", "mlp/c_fc", "mlp/c_proj")
    },
    "ln_f": "ln_f",
}
"""The names of the modules in transformers and in nanoGPT, after a prefix, with our names."""
HEAD = "lm_head"

_INPUTS = {"ln_2": "attn/residual", "attn/c_proj": "attn/attention", "mlp/c_proj": "mlp/gelu"}
"""The results that are the inputs of a module of the same layer, by the name of the module."""
_PARTS = ("attn/q", "attn/k", "attn/v")
_ORDER = (
    *("wte", "wpe", "embedding", "ln_1", "attn/c_attn", *_PARTS, "attn/scores", "attn/weights", "attn/attention"),
    *("attn/c_proj", "attn", "attn/residual", "ln_2", "mlp/c_fc", "mlp/gelu", "mlp/c_proj", "residual"),
)
"""The modules in the order in which a model calls them. Those of a layer come between wpe and ln_f."""


def is_module(model: Any) -> bool:
    """Return whether an object has the methods of PyTorch's modules that `trace_modules` uses."""
    return (
        not isinstance(model, type)
        and callable(model)
        and hasattr(model, "named_modules")
        and hasattr(model, "register_forward_hook")
    )


def trace_modules(
    model: Any,
    tokens: np.ndarray,
    names: Mapping[str, str] | None = None,
    config: GPT2Config | None = None,
    progress: Progress = silent,
) -> Trace:
    """Return the trace of a model that is made of PyTorch's modules; see `portable_gpt2.probe`.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(ids)`` with int64 [1, seq].
    tokens : int array [1, seq]
        The token ids.
    names : dict of str, optional
        Our name for the module of each name.
    config : GPT2Config, optional
        The configuration, if the model does not have one of transformers or nanoGPT.
    progress : function, optional
        As for `compare`; it sees the modules.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if [name for name, module in modules.items() if module.training]:
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which dropout changes the results; call eval() first"
        )
    chosen = _chosen(modules, names if names is not None else _gpt2_names(model))
    config = config or _config_of(modules.values())
    check_tokens(tokens, config)
    first = next(iter(model.parameters()), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no parameters, which say on which device it computes")
    backend = backend_of(first)
    ids = backend.from_numpy(tokens, device=backend.placement(first))
    with counted(progress, chosen, f"tracing {type(model).__name__}", "modules") as done, without_gradients(first):
        calls = _run(model, ids, tokens.shape[1], chosen, done)
    arrays = _results(calls, chosen, tokens.shape[1], config)
    weights = _weights(chosen)
    if config is not None:
        config = dataclasses.replace(config, tie_word_embeddings="lm_head" not in weights)
    dtype, device = backend.dtype_names[first.dtype], backend.device(first)
    return Trace(
        described(model, backend, device, dtype),
        tokens,
        arrays,
        dtype,
        config,
        weights,
        stated(backend, dtype, device.partition(":")[0]),
    )


def check_tokens(tokens: np.ndarray, config: GPT2Config | None) -> None:
    """Refuse tokens that a model cannot read, before a framework reads another row or raises an error of its own."""
    if config is not None:
        checks.token_ids("tokens", tokens, config.n_vocab, axes=2)
        checks.positions(tokens.shape[1], config.n_ctx)


def without_gradients(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch stores nothing for a backward pass, as in generation."""
    framework = sys.modules.get(type(parameter).__module__.partition(".")[0])
    context: contextlib.AbstractContextManager[Any] = getattr(framework, "no_grad", contextlib.nullcontext)()
    return context


def described(model: Any, backend: Backend, device: str, dtype: str) -> str:
    """Return the description of another program's model for `Trace.source`."""
    package = type(model).__module__.partition(".")[0]
    return f"{package}'s {type(model).__name__} on {backend.name}, {device}, {dtype}"


# Which module is what


def _gpt2_names(model: Any) -> dict[str, str]:
    """Return the names of a model whose modules have GPT-2's names, with the prefix that the model has."""
    prefix = prefix_of(name for name, _ in model.named_parameters())
    if prefix is None:
        raise ValueError(
            f"the modules of {type(model).__name__} do not have GPT-2's names, such as h.0.ln_1; give our name for "
            f"each of them: pg.probe(model, {{'blocks.{{}}.norm1': 'h{{}}/ln_1', ...}})"
        )
    names = {prefix + theirs: ours for theirs, ours in GPT2_NAMES.items()}
    head = prefix.removesuffix(PREFIX) + HEAD
    return names | ({head: "logits"} if head in dict(model.named_modules()) else {})


def _chosen(modules: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the modules by our names. In both names, ``{}`` stands for the number of a layer."""
    chosen: dict[str, Any] = {}
    if not isinstance(names, Mapping):
        raise TypeError(f"names is {checks.shown(names)}; expected a dict of our name for the module of each name")
    for theirs, ours in names.items():
        if not isinstance(theirs, str) or not isinstance(ours, str):
            raise TypeError(f"names has {checks.shown(theirs)}: {checks.shown(ours)}; expected two strs")
        plain = ours.replace("{}", "0")
        if not (plain in ("wte", "wpe") or re.fullmatch(r"h\d+/attn", plain) or is_result(plain)):
            raise ValueError(f"{ours!r} is neither wte, wpe, h{{}}/attn nor the name of a result, such as h{{}}/ln_1")
        if theirs.count("{}") != ours.count("{}"):
            raise ValueError(f"{theirs!r} and {ours!r} do not both have {{}}, which stands for the number of a layer")
        pattern = re.compile(re.escape(theirs).replace(r"\{\}", r"(\d+)"))
        matches = [match for name in modules if (match := pattern.fullmatch(name))]
        if not matches:
            nearest = difflib.get_close_matches(theirs.replace("{}", "0"), list(modules), n=3, cutoff=0)
            raise ValueError(f"the model has no module {theirs!r}; the nearest names are {', '.join(nearest)}")
        for match in matches:
            name = ours.format(*match.groups())
            if name in chosen:
                raise ValueError(f"names gives two modules the name {name}, {match[0]!r} being the second; give one")
            chosen[name] = modules[match[0]]
    return chosen


def _config_of(modules: Iterable[Any]) -> GPT2Config | None:
    """Return the configuration of a model of transformers or nanoGPT, and None for other models.

    The first module that has one is the model, or a model that is inside a wrapper such as DataParallel. The form of
    GELU is not part of the configuration: a model with another form is compared with GPT-2.
    """
    for module in modules:
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            entries = config.to_dict()
            return GPT2Config.from_dict({name: x for name, x in entries.items() if name != "activation_function"})
        if hasattr(config, "block_size"):
            names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
            return GPT2Config.from_nanogpt({name: getattr(config, name) for name in names})
    return None


# What the modules take and return


class Call(NamedTuple):
    """The first input and the output of a module, on the host."""

    taken: np.ndarray | None
    returned: np.ndarray | None
    weights: np.ndarray | None
    """The attention weights, if the output is a tuple that has them."""


def _run(model: Any, tokens: Any, seq: int, chosen: Mapping[str, Any], done: Callable[[], None]) -> dict[str, Call]:
    """Call a model; return what each chosen module took and returned.

    Names may share a module, as the layers of some models do. Each call of it then belongs to the next name. The
    function `done` is called after each of these calls.
    """
    names: dict[Any, list[str]] = defaultdict(list)
    for name in sorted(chosen, key=_when):
        names[chosen[name]].append(name)
    calls: dict[str, Call] = {}
    counts: dict[Any, int] = defaultdict(int)
    head_input: list[Any] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        counts[module] += 1
        if counts[module] <= len(names[module]):
            name = names[module][counts[module] - 1]
            outputs = output if isinstance(output, tuple | list) else (output,)
            taken = next(iter((*args, *kwargs.values())), None)
            seen = [_host(x) for x in outputs]
            weights = next((x for x in seen[1:] if x is not None and x.ndim == 4), None)
            calls[name] = Call(_host(taken), next(iter(seen), None), weights)
            done()
            if is_result(name) and calls[name].returned is None:
                raise ValueError(
                    f"the module for {name} returned {checks.shown(output)}; expected an array of floats, or a tuple "
                    f"that begins with one"
                )
            if name == "ln_f":
                head_input.append(outputs[0])

    with contextlib.ExitStack() as stack:
        for module in names:
            try:
                handle = module.register_forward_hook(hook, with_kwargs=True)
            except RuntimeError as error:  # a module that was compiled by TorchScript
                kind = type(module).__name__
                raise ValueError(f"{kind} takes no hooks ({error}); give the model from which it was made") from None
            stack.callback(handle.remove)
        model(tokens)
    if missed := [name for name in chosen if name not in calls]:
        raise ValueError(
            f"the model computed without calling its modules for {_some(missed)}; if it is compiled, give the model "
            f"that was not compiled"
        )
    if repeated := [name for name in chosen if counts[chosen[name]] > len(names[chosen[name]])]:
        raise ValueError(
            f"the model called {len(repeated)} of its modules several times, such as that for {repeated[0]}; give a "
            f"model, perhaps a part of this one, that reads all tokens in one pass"
        )
    logits = calls["logits"].returned if "logits" in calls else None
    if logits is not None and logits.shape[-2:-1] != (seq,):
        # nanoGPT computes the logits of the last position only, unless it is given targets.
        again = _host(chosen["logits"](head_input[0])) if head_input else None
        calls["logits"] = Call(None, again, None)
    return calls


def _when(name: str) -> tuple[float, int]:
    """Return a key that sorts names in the order in which a model calls their modules."""
    match = re.fullmatch(r"h(\d+)/(.+)", name)
    if match is not None:
        return int(match[1]), _ORDER.index(match[2])
    return (-1, _ORDER.index(name)) if name in _ORDER else (math.inf, ("ln_f", "logits").index(name))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _host(x: Any) -> np.ndarray | None:
    """Return a copy of a floating array on the host, because the model may write into its memory; None for others."""
    try:
        a = to_numpy(x)
    except TypeError:
        return None
    return np.array(a) if a.dtype in float_dtypes.values() else None


def _results(
    calls: Mapping[str, Call], chosen: Mapping[str, Any], seq: int, config: GPT2Config | None
) -> dict[str, np.ndarray]:
    """Return results by our names from what the modules took and returned."""
    found = {name: call.returned for name, call in calls.items() if is_result(name)}
    layers = sorted({int(match[1]) for name in chosen if (match := re.match(r"h(\d+)/", name))})
    for i in layers:
        h = f"h{i}"
        into = {f"{h}/{taker}": f"{h}/{result}" for taker, result in _INPUTS.items()}
        into[f"{h}/ln_1"] = "embedding" if i == 0 else f"h{i - 1}/residual"
        for taker, result in into.items():
            if taker in calls:
                found.setdefault(result, calls[taker].taken)
        if f"{h}/attn" in calls:
            found.setdefault(f"{h}/attn/weights", calls[f"{h}/attn"].weights)
    if "ln_f" in calls and layers and (config is None or layers[-1] == config.n_layer - 1):
        found.setdefault(f"h{layers[-1]}/residual", calls["ln_f"].taken)
    arrays = {name: x for name, x in found.items() if x is not None}
    for i in layers:
        q, k, v = (f"h{i}/{part}" for part in _PARTS)
        c_attn = f"h{i}/attn/c_attn"
        if c_attn in arrays:
            for name, part in zip((q, k, v), np.split(arrays[c_attn], 3, axis=-1), strict=True):
                arrays.setdefault(name, part)
        elif {q, k, v} <= arrays.keys() and arrays[q].ndim == 3:
            arrays[c_attn] = np.concatenate([arrays[q], arrays[k], arrays[v]], axis=-1)
    return dict(_with_heads(arrays, seq, config))


def _with_heads(
    arrays: Mapping[str, np.ndarray], seq: int, config: GPT2Config | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Split the last axis of q, k, v and attention into heads, as GPT-2 does. Without a configuration, omit them."""
    for name, x in arrays.items():
        if axes_of(name) == ("n_head", "seq", "head_size") and x.shape[:-1] == (1, seq):
            if config is not None:
                yield name, np.moveaxis(x.reshape(1, seq, config.n_head, -1), 2, 1)
        else:
            yield name, x


# Parameters


def _weights(chosen: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the parameters of modules by our paths. A bias that a module lacks is 0."""
    found: dict[str, StoredTensor] = {}
    # PyTorch's Linear has weights [out, in]. The square ones are recognised by the others.
    wide = [each for name, each in chosen.items() if name.endswith(("attn/c_attn", "mlp/c_fc"))]
    is_linear = any(_is_linear(each) for each in wide if _has_weight(each))
    for name, module in chosen.items():
        if not _has_weight(module):
            continue
        weight = module.weight
        tensor = stored(weight)
        if name in ("wte", "wpe"):
            found[name] = tensor
        elif name == "logits":
            found["lm_head"] = tensor
        else:
            is_matrix = len(tensor.shape) == 2
            found[f"{name}/{'w' if is_matrix else 'g'}"] = transposed(tensor) if is_matrix and is_linear else tensor
            bias, n = getattr(module, "bias", None), tensor.shape[0 if is_linear or not is_matrix else -1]
            zeros = StoredTensor((n,), tensor.dtype, functools.partial(np.zeros, n, float_dtypes[tensor.dtype]))
            found[f"{name}/b"] = zeros if bias is None else stored(bias)
    for scope in {name.removesuffix("/q/w") for name in found if name.endswith("/q/w")}:
        for leaf in "wb":
            parts = [found.pop(f"{scope}/{part}/{leaf}", None) for part in "qkv"]
            if None not in parts:
                found[f"{scope}/c_attn/{leaf}"] = concatenated([each for each in parts if each is not None])
    if "wte" in found and "lm_head" in found:
        is_one = chosen["wte"].weight is chosen["logits"].weight  # usually so, and faster than a comparison of values
        if is_one or np.array_equal(found["wte"].read(), found["lm_head"].read()):
            del found["lm_head"]
    return found


def _has_weight(module: Any) -> bool:
    """Return whether a module has an array of weights. That of a quantized module, for instance, is not an array."""
    return getattr(getattr(module, "weight", None), "shape", None) is not None


def concatenated(tensors: list[StoredTensor]) -> StoredTensor:
    """Return tensors next to each other along the last axis."""
    first = tensors[0]
    shape = (*first.shape[:-1], sum(each.shape[-1] for each in tensors))
    read: Callable[[], np.ndarray] = lambda: np.concatenate([each.read() for each in tensors], axis=-1)  # noqa: E731
    return StoredTensor(shape, first.dtype, read)


def _is_linear(module: Any) -> bool:
    """Return whether a weight is [out, in], by the length of the bias; without a bias, out > in is assumed."""
    rows, columns = module.weight.shape
    bias = getattr(module, "bias", None)
    return bool(rows > columns if bias is None else bias.shape[0] == rows != columns)
