"""A trace: the results of a model's ops for given tokens, with what is known about the model.

A trace is saved as an .npz or a .safetensors file, which any program can write: the token ids under ``tokens``, and
each result as a float array under its name. Everything else is optional, also the parameters, whose names have the
prefix ``params/``. A hand-written file may look like this::

    numpy.savez("port.npz", tokens=ids, **{"h0/ln_1": x, "logits": logits, "params/h0/ln_1/g": g})
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from .. import checks, strict_json
from ..checkpoint import WEIGHTS_FILE, stored
from ..checkpoint.safetensors_files import open_safetensors, write_safetensors
from ..config import GPT2Config
from ..files import already_exists, holds_file, regular, replacing
from ..host import StoredTensor, float_dtypes
from ..numerics import Numerics
from ..registry import to_numpy

PARAMS = "params/"
"""The prefix of the names of parameters in a file."""
OPENAI = "model/"
"""The variable scope of OpenAI's TensorFlow code, which may stand in front of each name."""

_WIDTH = ("seq", "n_embd")
_HEADS = ("n_head", "seq", "head_size")
_AXES: dict[str, tuple[str, ...]] = {
    "embedding": _WIDTH,
    "ln_1": _WIDTH,
    "attn/c_attn": ("seq", "3 n_embd"),
    "attn/q": _HEADS,
    "attn/k": _HEADS,
    "attn/v": _HEADS,
    "attn/scores": ("n_head", "seq", "seq"),
    "attn/weights": ("n_head", "seq", "seq"),
    "attn/attention": _HEADS,
    "attn/c_proj": _WIDTH,
    "attn/residual": _WIDTH,
    "ln_2": _WIDTH,
    "mlp/c_fc": ("seq", "n_hidden"),
    "mlp/gelu": ("seq", "n_hidden"),
    "mlp/c_proj": _WIDTH,
    "residual": _WIDTH,
    "ln_f": _WIDTH,
    "logits": ("seq", "n_vocab"),
}
"""The axes of each result after the first axis, which has length 1. The names are in the order of computation."""

_PARAMS: dict[str, tuple[str, ...]] = {
    "wte": ("n_vocab", "n_embd"),
    "wpe": ("n_ctx", "n_embd"),
    **{f"{norm}/{name}": ("n_embd",) for norm in ("ln_1", "ln_2", "ln_f") for name in "gb"},
    "attn/c_attn/w": ("n_embd", "3 n_embd"),
    "attn/c_attn/b": ("3 n_embd",),
    "attn/c_proj/w": ("n_embd", "n_embd"),
    "attn/c_proj/b": ("n_embd",),
    "mlp/c_fc/w": ("n_embd", "n_hidden"),
    "mlp/c_fc/b": ("n_hidden",),
    "mlp/c_proj/w": ("n_hidden", "n_embd"),
    "mlp/c_proj/b": ("n_embd",),
    "lm_head": ("n_vocab", "n_embd"),
}
"""The axes of each parameter. The paths of those in a layer begin with the layer, such as ``h0/``."""

_OUTSIDE = ("embedding", "ln_f", "logits")
"""The results that belong to no layer."""
_IN_A_LAYER = re.compile(r"h(0|[1-9]\d{0,5})/(.+)")
OF_ANY_FRAMEWORK = Numerics(exp=(7.0, 1.25), tanh=8.0, log=8.0)
"""The errors of exp, tanh and log if the framework is not known: the largest ones that an adapter states."""
_TEXTS = ("source", "dtype", "config", "numerics")


@dataclass(frozen=True, eq=False)
class Trace:
    """The results of the ops of a model for given tokens, on the host.

    Parameters
    ----------
    source : str
        What the results come from, such as ``gpt2 on torch, cpu, float32``.
    tokens : int array [1, seq] or [seq]
        The token ids. The attribute is int64 [1, seq].
    arrays : dict of float arrays
        Results by the names of `GPT2.trace`, of NumPy or any backend, with their shapes; the first axis, which has
        length 1, may be missing. Names may be missing, and may have the prefix ``model/``, which OpenAI's variable
        scopes have: ``model/h0/ln_1``. NaN and infinity are allowed. The attribute has NumPy's arrays in the order of
        computation, by names without the prefix.
    dtype : str
        The dtype that the ops compute in: ``float32``, ``float64``, ``bfloat16`` or ``float16``. The arrays may be
        wider than the computation. Unless given, it is that of the widest array, where float64 counts only if all
        arrays have it, or the narrowest dtype that holds the values of all arrays.
    config : GPT2Config, optional
        The model's shape and options, if they are known.
    weights : dict of float arrays
        The parameters by the paths of `params.flatten`, such as ``h0/attn/c_attn/w``, as far as they are known: arrays
        of NumPy or any backend, or tensors in files. The attribute has tensors that are read when they are needed.
    numerics : Numerics
        The errors of exp, tanh and log of the framework that computed the results; the largest errors of any framework
        that this project has an adapter for unless given.

    Raises
    ------
    TypeError
        If the tokens are not integers, or a result is not a floating array.
    ValueError
        If there are no results, a name is not known, or the shape of a result does not fit the tokens, the
        configuration or another result.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> trace = pg.Trace("my port", np.asarray([5, 3]), {"model/h0/ln_1": np.zeros((2, 8), np.float32)})
    >>> {name: x.shape for name, x in trace.arrays.items()}, trace.dtype
    ({'h0/ln_1': (1, 2, 8)}, 'float32')
    """

    source: str
    tokens: np.ndarray
    arrays: Mapping[str, np.ndarray]
    dtype: str = ""
    config: GPT2Config | None = None
    weights: Mapping[str, StoredTensor] = field(default_factory=lambda: MappingProxyType({}))
    numerics: Numerics = OF_ANY_FRAMEWORK

    def __post_init__(self) -> None:
        tokens = _tokens(self.tokens, self.config)
        arrays = _shaped(_named(self.arrays), tokens.shape[1], self.config)
        dtype = self.dtype or _computed_in(arrays)
        if dtype not in float_dtypes:
            raise ValueError(f"dtype is {checks.shown(dtype)}; expected {_either(float_dtypes)}")
        weights = {path: _tensor(f"{PARAMS}{path}", x) for path, x in self.weights.items()}
        for name, value in (("tokens", tokens), ("arrays", arrays), ("dtype", dtype), ("weights", weights)):
            object.__setattr__(self, name, value)

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of the axes that the results have: n_embd, n_head, head_size, n_hidden, n_vocab and seq."""
        return {
            axis: int(n)
            for name, x in self.arrays.items()
            for axis, n in _lengths(axes_of(name), x.shape[1:])
            if axis in ("n_embd", "n_head", "head_size", "n_hidden", "n_vocab", "seq")
        }

    def __repr__(self) -> str:
        return f"<Trace of {self.source}: {len(self.arrays)} results for {self.tokens.shape[1]} tokens>"

    def save(self, path: str | os.PathLike[str], *, force: bool = False, weights: bool = False) -> None:
        """Write the trace as a file that appears complete or not at all.

        Parameters
        ----------
        path : path
            The file. Its suffix, ``.npz`` or ``.safetensors``, says the format. An .npz file has no bfloat16, so that
            arrays of bfloat16 are stored as float32.
        force : bool
            Whether to replace a file that exists.
        weights : bool
            Whether to write the weights, too. They are as large as a checkpoint. A trace that has them can be compared
            with another trace, op by op, without the checkpoint.

        Raises
        ------
        FileExistsError
            If the file exists and force is false.
        ValueError
            If the suffix is not known, or the weights are to be written and are not known.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import portable_gpt2 as pg
        >>> file = pathlib.Path(tempfile.mkdtemp(), "port.npz")
        >>> pg.Trace("my port", np.asarray([5, 3]), {"h0/ln_1": np.zeros((2, 8))}).save(file)
        >>> pg.Trace.load(file)
        <Trace of my port: 1 results for 2 tokens>
        """
        file = check_target(path, force=True)
        texts = {"source": self.source, "dtype": self.dtype, "numerics": json.dumps(dataclasses.asdict(self.numerics))}
        if self.config is not None:
            texts["config"] = json.dumps(self.config.to_dict())
        if checks.flag("weights", weights) and not self.weights:
            raise ValueError(f"the weights of {self.source} are not known, so that they cannot be written")
        tensors = {"tokens": _of_host(self.tokens), **{name: _of_host(x) for name, x in self.arrays.items()}}
        if weights:
            tensors |= {f"{PARAMS}{path}": tensor for path, tensor in self.weights.items()}
        with replacing(file) as draft:
            check_target(file, force)
            _FORMATS[file.suffix][1](draft, tensors, texts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that `save`, or any other program, has written.

        Parameters
        ----------
        path : path
            An .npz file, which may be compressed, or a .safetensors file. It has ``tokens``, and floating arrays by the
            names of the parameter `arrays`. It may also have ``source``, ``dtype``, ``config`` (the JSON of a
            ``config.json``) and ``numerics`` (JSON with the fields of `Numerics`): in an .npz file these are arrays of
            one string, and in a .safetensors file metadata. Parameters have the prefix ``params/``, as in
            ``params/h0/attn/c_attn/w``. No code from a file is executed.

        Raises
        ------
        OSError
            If there is no such file, or it cannot be read.
        ValueError
            If the file is not a whole trace. The message is one line, which names the file and the result at fault.
        """
        file = check_target(path, force=True)
        regular(file)
        arrays, texts = _FORMATS[file.suffix][0](file)
        try:
            if "tokens" not in arrays:
                raise ValueError("holds no tokens; expected them as an int array [1, seq]")
            tokens = arrays.pop("tokens")
            weights = {name: arrays.pop(name) for name in list(arrays) if name.startswith(PARAMS)}
            trace = cls(
                texts.get("source") or file.name,
                tokens,
                arrays,
                texts.get("dtype", ""),
                _config(texts["config"]) if "config" in texts else None,
                {name.removeprefix(PARAMS): x for name, x in weights.items()},
                _numerics(texts["numerics"]) if "numerics" in texts else OF_ANY_FRAMEWORK,
            )
            _check_params(trace)
            return trace
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}: {_line(error)}") from None


def check_target(path: str | os.PathLike[str], force: bool) -> Path:
    """Return the path of a trace; refuse a suffix that is not known and, unless force is true, a file that exists."""
    file = checks.path("path", path)
    if file.suffix not in _FORMATS:
        raise ValueError(
            f"{file}: the format of a trace follows from the suffix of its name; expected {_either(_FORMATS)}"
        )
    if not force and holds_file(file):
        raise already_exists(file)
    return file


def is_trace(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the name of a trace. The weights of a checkpoint may have the same suffix."""
    file = checks.path("path", path)
    return file.suffix in _FORMATS and not file.is_dir() and file.name != WEIGHTS_FILE


def is_result(name: str) -> bool:
    """Return whether a name is that of a result, such as ``h0/ln_1``."""
    return _split(name) is not None


# The contents of a trace


def _tokens(given: Any, config: GPT2Config | None) -> np.ndarray:
    """Return token ids as int64 [1, seq]."""
    try:
        axes = 2 if np.ndim(given) == 2 else 1
    except ValueError:  # a ragged list
        axes = 1
    n_vocab = checks.LARGEST if config is None else config.n_vocab
    tokens = checks.token_ids("tokens", given, n_vocab, axes).astype(np.int64)
    tokens = tokens if axes == 2 else tokens[None]
    if len(tokens) != 1:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; expected those of one text, int [1, seq]")
    if config is not None:
        checks.positions(tokens.shape[1], config.n_ctx)
    return tokens


def _named(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return results as floating arrays of NumPy, by our names, in the order of computation."""
    if not isinstance(given, Mapping):
        raise TypeError(f"arrays is {checks.shown(given)}; expected a dict of arrays by name")
    places = {name: _split(name.removeprefix(OPENAI)) for name in given if isinstance(name, str)}
    known = {name: place for name, place in places.items() if place is not None}
    if unknown := [name for name in given if name not in known]:
        listed = ", ".join(f"{checks.shown(name)} (the nearest name is {_nearest(name)})" for name in unknown[:3])
        more = f", and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"no result is called {listed}{more}")
    if not given:
        raise ValueError("there are no results; expected arrays such as h0/ln_1 and logits")
    found, order = {}, list(_AXES)
    for name in sorted(known, key=lambda name: (known[name][0], order.index(known[name][1]))):
        x, plain = to_numpy(given[name]), name.removeprefix(OPENAI)
        if plain in found:
            raise ValueError(f"{plain} and {OPENAI}{plain} are two names of one result; keep one of them")
        if x.dtype.newbyteorder("=") not in float_dtypes.values():
            raise TypeError(f"{name} has dtype {x.dtype}; expected {_either(float_dtypes)}")
        found[plain] = _native(x)
    return found


def _split(name: str) -> tuple[float, str] | None:
    """Return the layer of a result and its name in the layer, or None for a name that is not known.

    The layer of the results that belong to no layer is -1 or infinity, in the order of computation.
    """
    if name in _OUTSIDE:
        return (-1 if name == "embedding" else math.inf), name
    match = _IN_A_LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match and match[2] in _AXES and match[2] not in _OUTSIDE else None


def _nearest(name: Any) -> str:
    """Return the known name that is most similar to a name."""
    text = str(name)[:200].replace(".", "/")
    layers = dict.fromkeys([*re.findall(r"\d{1,6}", text)[:1], "0"])
    known = [f"h{int(i)}/{each}" for i in layers for each in _AXES if each not in _OUTSIDE]
    return difflib.get_close_matches(text, [*known, *_OUTSIDE], n=1, cutoff=0)[0]


def axes_of(name: str) -> tuple[str, ...]:
    """Return the names of the axes of a result after the first axis, such as seq and n_embd."""
    split = _split(name)
    assert split is not None  # a trace has only names that are known
    return _AXES[split[1]]


def _lengths(axes: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """Yield the lengths that the shape of a result determines: those of its axes, and n_embd."""
    for axis, n in zip(axes, shape, strict=True):
        yield ("n_embd", n / 3) if axis == "3 n_embd" else (axis, n)
    if axes == _HEADS:
        yield "n_embd", shape[0] * shape[2]


def _shaped(arrays: dict[str, np.ndarray], seq: int, config: GPT2Config | None) -> dict[str, np.ndarray]:
    """Return results with a first axis of length 1, after checking that all lengths fit together."""
    lengths: dict[str, tuple[float, str]] = {"seq": (seq, "tokens")}
    if config is not None:
        for axis in ("n_embd", "n_head", "n_hidden", "n_vocab"):
            lengths[axis] = getattr(config, axis), "the configuration"
    shaped = {}
    for name, x in arrays.items():
        axes, layer = axes_of(name), _IN_A_LAYER.fullmatch(name)
        if config is not None and layer and int(layer[1]) >= config.n_layer:
            raise ValueError(f"{name} is a result of layer {layer[1]}; the configuration has {config.n_layer}, from 0")
        shape = x.shape if x.ndim == len(axes) + 1 else (1, *x.shape)
        said = f"{name} has shape {list(x.shape)}; expected [1, {', '.join(axes)}]"
        if len(shape) != len(axes) + 1 or shape[0] != 1 or 0 in shape:
            raise ValueError(f"{said}; no dimension may be 0")
        for axis, n in _lengths(axes, shape[1:]):
            known, where = lengths.setdefault(axis, (n, name))
            if n != known:
                raise ValueError(f"{said}: {axis} would be {n:.10g}, and is {known:.10g} in {where}")
        shaped[name] = x.reshape(shape)
    return shaped


def _check_params(trace: Trace) -> None:
    """Check the paths and the shapes of the parameters in a file."""
    lengths: dict[str, tuple[float, str]] = {axis: (n, "the results") for axis, n in trace.lengths.items()}
    if trace.config is not None:
        lengths |= {axis: (getattr(trace.config, axis), "the configuration") for axis in ("n_embd", "n_hidden")}
    for path, tensor in trace.weights.items():
        in_layer = _IN_A_LAYER.fullmatch(path)
        plain = in_layer[2] if in_layer else path
        is_known = plain in _PARAMS and bool(in_layer) == ("/" in plain and not plain.startswith("ln_f/"))
        if not is_known:
            layer = path.partition("/")[0] if in_layer else "h0"
            known = [f"{layer}/{each}" if "/" in each and "ln_f" not in each else each for each in _PARAMS]
            nearest = difflib.get_close_matches(path.replace(".", "/"), known, n=1, cutoff=0)[0]
            raise ValueError(f"no parameter is called {checks.shown(path)} (the nearest name is {nearest})")
        axes = _PARAMS[plain]
        said = f"{PARAMS}{path} has shape {list(tensor.shape)}; expected [{', '.join(axes)}]"
        if len(tensor.shape) != len(axes) or 0 in tensor.shape:
            raise ValueError(f"{said}; no dimension may be 0")
        for axis, n in _lengths(axes, tensor.shape):
            if axis in ("n_embd", "n_hidden"):  # wte may have more rows than there are logits
                is_, where = lengths.setdefault(axis, (n, f"{PARAMS}{path}"))
                if n != is_:
                    raise ValueError(f"{said}: {axis} would be {n:.10g}, and is {is_:.10g} in {where}")


def _tensor(name: str, x: Any) -> StoredTensor:
    """Return a parameter as a tensor."""
    if isinstance(x, StoredTensor):
        return x
    tensor = _of_host(_native(x)) if isinstance(x, np.ndarray) else stored(x)
    if tensor.dtype not in float_dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {_either(float_dtypes)}")
    return tensor


def _native(x: np.ndarray) -> np.ndarray:
    """Return an array in the byte order of this machine."""
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _of_host(x: np.ndarray) -> StoredTensor:
    return StoredTensor(x.shape, x.dtype.name, functools.partial(np.asarray, x))


def _computed_in(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the dtype that a model probably computes in.

    It is that of the widest array; bfloat16, whose unit round-off is larger, counts as wider than float16. But float64
    counts only if all arrays have it, because NumPy makes float64 of float32 easily. And if a narrower dtype holds the
    values of all arrays, it is that one: programs convert bfloat16, which NumPy lacks, to float32 when they write it.
    """
    dtypes = {x.dtype for x in arrays.values()}
    narrower = {dtype for dtype in dtypes if dtype != np.float64}
    widest = max(narrower or dtypes, key=lambda dtype: (dtype.itemsize, dtype == ml_dtypes.bfloat16))
    # Scores may be kept in float32, and hidden scores are numbers of any dtype.
    shown = [x for name, x in arrays.items() if not name.endswith("/scores")]
    if sum(len(np.unique(x.reshape(-1)[:4096].astype(np.float64))) for x in shown) >= _ENOUGH:
        for name in ("bfloat16", "float16", "float32"):
            if float_dtypes[name].itemsize < widest.itemsize and all(_holds(name, x) for x in shown):
                return name
    return str(widest.name)


_ENOUGH = 128  # different numbers; fewer may have few digits by chance


def _holds(dtype: str, x: np.ndarray) -> bool:
    """Return whether a dtype holds the values of an array."""
    flat, n = x.reshape(-1), 1 << 20
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(part.astype(float_dtypes[dtype]).astype(x.dtype), part, equal_nan=True)
            for part in (flat[i : i + n] for i in range(0, len(flat), n))
        )


def _config(text: str) -> GPT2Config:
    entries = _json("config", text)
    try:
        return GPT2Config.from_dict(entries)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config: {error}") from None


def _numerics(text: str) -> Numerics:
    entries = _json("numerics", text)
    names = [each.name for each in dataclasses.fields(Numerics)]
    exp = entries.get("exp")
    if entries.keys() != set(names) or not isinstance(exp, list) or len(exp) != 2:
        raise ValueError(f"numerics is {checks.shown(text)}; expected {', '.join(names)}, and two numbers for exp")
    errors = {name: checks.number(f"numerics: {name}", entries[name]) for name in names if name != "exp"}
    c0, c1 = (checks.number("numerics: exp", c) for c in exp)
    return Numerics(exp=(c0, c1), **errors)


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        entries = strict_json.parse(text.encode())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{name} is {checks.shown(text)}; expected a JSON object")
    return entries


# Files: each format has a function that reads arrays and texts by name, and one that writes them.


def _read_npz(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays: dict[str, np.ndarray] = {}
    texts, name = {}, ""
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file) as archive:  # of files of Python 2
            entries = archive.infolist()
            checks.memory(sum(entry.file_size for entry in entries), "the arrays of this file")
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in arrays or name in texts:
                    raise ValueError("is there twice")
                with archive.open(entry) as stream:
                    x = np.lib.format.read_array(stream, allow_pickle=False)
                    if stream.read(1):
                        raise ValueError("has more bytes than its shape says")
                if name in _TEXTS:
                    texts[name] = _text(x)
                else:
                    arrays[name] = x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x  # as NumPy stores bfloat16
    except Exception as error:  # zipfile, zlib and NumPy raise errors of many classes for a damaged file
        what = f"{checks.shown(name)}: {_line(error)}" if name else f"not a whole .npz file: {_line(error)}"
        raise ValueError(f"{file}: {what}") from None
    return arrays, texts


def _text(x: np.ndarray) -> str:
    if x.size != 1 or x.dtype.kind not in "US":
        raise ValueError(f"has dtype {x.dtype} and shape {list(x.shape)}; expected one string")
    value = x.reshape(-1)[0]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _write_npz(file: Path, tensors: Mapping[str, StoredTensor], texts: Mapping[str, str]) -> None:
    """Write what `numpy.savez` writes, one array at a time, so that one bfloat16 array is converted at a time."""

    def write(name: str, x: np.ndarray) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, x, allow_pickle=False)

    with zipfile.ZipFile(file, "w") as archive:
        for name, text in texts.items():
            write(name, np.asarray(text))
        for name, tensor in tensors.items():
            x = tensor.read()
            write(name, x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x)


def _read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors = open_safetensors(file)
    checks.memory(file.stat().st_size, f"{file}: its arrays")
    arrays = {}
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            for name, tensor in tensors.items():
                if name != "tokens" and tensor.dtype not in float_dtypes:
                    raise ValueError(f"{name} has dtype {tensor.dtype}; expected {_either(float_dtypes)}")
                arrays[name] = opened.get_tensor(name) if name == "tokens" else tensor.read()
    except Exception as error:  # the reader of safetensors has errors of its own
        raise ValueError(f"{file}: {_line(error)}") from None
    return arrays, {name: text for name, text in metadata.items() if name in _TEXTS}


def _write_safetensors(file: Path, tensors: Mapping[str, StoredTensor], texts: Mapping[str, str]) -> None:
    write_safetensors(file, tensors, metadata=texts)


_FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    ".npz": (_read_npz, _write_npz),
    ".safetensors": (_read_safetensors, _write_safetensors),
}


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _line(error: Exception) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
