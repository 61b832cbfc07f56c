"""The parameter tree: nested dicts whose paths are OpenAI's variable names, such as ``h3/attn/c_attn/w``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from . import checks, random
from .backend import Backend
from .config import GPT2Config
from .host import StoredTensor, float_dtypes
from .registry import backend_of, get_backend

Params = dict[str, Any]
"""A tree of arrays. A sub-tree holds the keyword arguments of one function: ``conv1d(x, **params["c_attn"])``."""


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path, in the order of OpenAI's code.

    Raises
    ------
    ValueError
        If the machine has too little memory for the paths of all layers.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.shapes(pg.GPT2Config())["h3/attn/c_attn/w"]
    (768, 2304)
    """
    layer = _layer_shapes(config)
    checks.memory(config.n_layer * len(layer) * _ENTRY, f"the names of {config.n_layer:,} layers")
    before, after = _shapes_around(config)
    return {
        **before,
        **{f"h{i}/{path}": shape for i in range(config.n_layer) for path, shape in layer.items()},
        **after,
    }


_ENTRY = 400  # lower bound in bytes for a path, its entry in a dict, and an array without elements


def _layer_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's parameters."""
    d, hidden = config.n_embd, config.n_hidden
    found: dict[str, tuple[int, ...]] = {}
    for scope, (nx, nf) in {
        "attn/c_attn": (d, 3 * d),
        "attn/c_proj": (d, d),
        "mlp/c_fc": (d, hidden),
        "mlp/c_proj": (hidden, d),
    }.items():
        found[f"{scope}/w"], found[f"{scope}/b"] = (nx, nf), (nf,)
    for scope in ("ln_1", "ln_2"):
        found[f"{scope}/g"] = found[f"{scope}/b"] = (d,)
    return found


def _shapes_around(config: GPT2Config) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters before the layers, and the shapes of those after the layers."""
    d = config.n_embd
    before: dict[str, tuple[int, ...]] = {"wpe": (config.n_ctx, d), "wte": (config.n_vocab, d)}
    if not config.tie_word_embeddings:
        before["lm_head"] = (config.n_vocab, d)
    return before, {"ln_f/g": (d,), "ln_f/b": (d,)}


def count(config: GPT2Config) -> int:
    """Return the number of parameters, computed from the shapes.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.count(pg.GPT2Config.published("124M"))
    124439808
    """
    before, after = _shapes_around(config)
    return _total(before) + config.n_layer * _total(_layer_shapes(config)) + _total(after)


def _total(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def flatten(tree: Mapping[str, Any], scope: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf of a tree.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> list(pg.params.flatten({"ln_f": {"g": 1, "b": 0}}))
    [('ln_f/g', 1), ('ln_f/b', 0)]
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{scope}{name}/")
        else:
            yield f"{scope}{name}", value


def nest(leaves: Mapping[str, Any]) -> Params:
    """Return the tree of leaves that are given by path: the inverse of `flatten`.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.nest({"ln_f/g": 1, "ln_f/b": 0})
    {'ln_f': {'g': 1, 'b': 0}}
    """
    tree: Params = {}
    for path, value in leaves.items():
        *scopes, name = path.split("/")
        node = tree
        for scope in scopes:
            node = node.setdefault(scope, {})
        node[name] = value
    return tree


def map_tree(fn: Callable[..., Any], *trees: Mapping[str, Any]) -> Params:
    """Apply a function to each leaf of a tree, or to the leaves of several trees that have the same paths.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.map_tree(max, {"ln_f": {"g": 1, "b": 0}}, {"ln_f": {"g": 2, "b": -1}})
    {'ln_f': {'g': 2, 'b': 0}}
    """
    first, *_ = trees
    made: Params = {}
    for name, value in first.items():
        here = [tree[name] for tree in trees]
        made[name] = map_tree(fn, *here) if isinstance(value, Mapping) else fn(*here)
    return made


def init_params(
    config: GPT2Config,
    *,
    seed: int = 0,
    backend: str | Backend | None = None,
    dtype: str = "float32",
    device: Any = None,
    scale_residual: bool = False,
) -> Params:
    """Return initial parameters from the distributions of OpenAI's code, with the same bits on every backend.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    seed : int
        From 0 to 2^64 - 1. The seed and the path of a parameter choose its random stream.
    backend, device
        The backend and the device of the parameters; see `get_backend`.
    dtype : str
        ``float32``, ``float64``, ``bfloat16`` or ``float16``.
    scale_residual : bool
        Whether to divide the weights of the projections ``c_proj`` by sqrt(2 n_layer). The results of the 2 n_layer
        projections are added to the residual stream, whose variance then does not grow with the number of layers. The
        paper does this, and OpenAI's code does not.

    Returns
    -------
    dict
        The parameter tree. The standard deviation is 0.02 for w, wte and lm_head, and 0.01 for wpe; b is 0 and g is 1.

    Raises
    ------
    ValueError
        If the seed is out of range, or there is no such dtype or device.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> pg.init_params(config)["h0"]["mlp"]["c_fc"]["w"].shape
    (8, 32)
    """
    check_config(config)
    owner = get_backend(backend, device)
    owner.dtype(dtype)
    seed, scale_residual = checks.seed("seed", seed), checks.flag("scale_residual", scale_residual)
    like = owner.from_numpy(np.zeros(()), dtype)
    check_memory(count(config), like, f"a model of {count(config):,} parameters in {dtype}")
    tensors = initial_tensors(config, seed=seed, dtype=dtype, scale_residual=scale_residual)
    return nest({path: owner.from_numpy(tensor.read(), dtype) for path, tensor in tensors.items()})


def initial_tensors(
    config: GPT2Config, *, seed: int, dtype: str, scale_residual: bool = False
) -> dict[str, StoredTensor]:
    """Return the parameters of `init_params` by path. Each is computed when it is read."""

    def stdev(path: str) -> float:
        if path == "wpe":
            return 0.01
        is_residual = scale_residual and path.endswith("c_proj/w")
        return 0.02 / math.sqrt(2 * config.n_layer) if is_residual else 0.02

    def tensor(path: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(shape, dtype, lambda: _initial(path, shape, stdev(path), seed).astype(float_dtypes[dtype]))

    return {path: tensor(path, shape) for path, shape in shapes(config).items()}


def init_conv1d(
    scope: str,
    nx: int,
    nf: int,
    *,
    w_init_stdev: float = 0.02,
    seed: int = 0,
    backend: str | Backend | None = None,
    dtype: str = "float32",
    device: Any = None,
) -> Params:
    """Return initial parameters of `conv1d`: w is normally distributed and b is 0.

    Parameters
    ----------
    scope : str
        The path of the parameters, such as ``h3/attn/c_attn``. Together with the seed, the path chooses the random
        stream.
    nx, nf : int
        Lengths of the last axis of the input and of the output.
    w_init_stdev : float
        Standard deviation of w.
    seed, backend, dtype, device
        As for `init_params`.

    Returns
    -------
    dict
        ``{"w": [nx, nf], "b": [nf]}``, the keyword arguments of `conv1d`.

    Raises
    ------
    ValueError
        If the seed is out of range, or there is no such dtype or device.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.conv1d(np.ones((10, 5, 2, 5), np.float32), **pg.init_conv1d("x_conv1d", 5, 3, backend="numpy")).shape
    (10, 5, 2, 3)
    """
    if not isinstance(scope, str):
        raise TypeError(f"scope is {checks.shown(scope)}; expected a path, such as 'h3/attn/c_attn'")
    owner = get_backend(backend, device)
    owner.dtype(dtype)
    nx, nf, seed = checks.integer("nx", nx), checks.integer("nf", nf), checks.seed("seed", seed)
    w_init_stdev = checks.number("w_init_stdev", w_init_stdev)
    return {
        "w": owner.from_numpy(_initial(f"{scope}/w", (nx, nf), w_init_stdev, seed), dtype),
        "b": owner.from_numpy(_initial(f"{scope}/b", (nf,), 0.0, seed), dtype),
    }


def _initial(path: str, shape: tuple[int, ...], stdev: float, seed: int) -> np.ndarray:
    """Return the initial value of a parameter, float64."""
    leaf = path.rpartition("/")[2]
    checks.memory(8 * math.prod(shape), f"the initial values of {path}, of shape {list(shape)},")
    if leaf in ("g", "b"):
        return np.full(shape, 1.0 if leaf == "g" else 0.0)
    # Five arrays exist at the same time: the random words, two uniform variates, the radius and the result.
    checks.memory(5 * 8 * math.prod(shape), f"the random numbers of {path}, {list(shape)},")
    return random.normal(path, shape, seed, stdev)


def check_config(config: Any) -> None:
    """Refuse a configuration that is not a `GPT2Config`."""
    if not isinstance(config, GPT2Config):
        raise TypeError(f"config is {checks.shown(config)}; expected a GPT2Config")


def check_params(params: Params, config: GPT2Config) -> None:
    """Refuse parameters that do not belong to a configuration, such as those of a model with more layers.

    Raises
    ------
    TypeError
        If the parameters are not a tree of float arrays, or have arrays of two frameworks or two dtypes.
    ValueError
        If a parameter is missing, does not belong to the configuration, or has another shape than in the configuration.
    """
    check_config(config)
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {checks.shown(params)}; expected a dict of arrays, as init_params makes it")
    found = dict(flatten(params))
    if len(found) < config.n_layer:
        raise ValueError(f"the parameters are {len(found)} arrays; config has {config.n_layer:,} layers of 12 arrays")
    expected = shapes(config)
    for verb, paths in (("lack", expected.keys() - found.keys()), ("hold", found.keys() - expected.keys())):
        if paths:
            raise ValueError(f"the parameters {verb} {', '.join(sorted(paths)[:3])}; config says {config}")
    first, owner = next(iter(found)), None
    for path, x in found.items():
        try:
            backend = backend_of(x)
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from None
        owner = backend if owner is None else owner
        if backend is not owner:
            raise TypeError(
                f"{first} is an array of {owner.name} and {path} one of {backend.name}; give arrays of one framework"
            )
        if x.dtype not in backend.dtype_names:
            raise TypeError(f"{path} has dtype {x.dtype}; expected {' or '.join(backend.dtypes)}")
        if x.dtype != found[first].dtype:
            raise TypeError(f"{first} has dtype {found[first].dtype} and {path} has {x.dtype}; convert one of them")
        if (shape := backend.shape(x)) != expected[path]:
            raise ValueError(f"{path} has shape {list(shape)}; config requires {list(expected[path])}")


def place(x: Any) -> str | None:
    """Return the name of the device of an array, or None if the device is not known, as for a tracer."""
    try:
        return backend_of(x).device(x).strip(":") or None  # a tracer of TensorFlow has an empty device
    except Exception:  # a tracer may raise any error
        return None


def check_memory(n: int, like: Any, what: str) -> None:
    """Refuse to allocate n elements of an array's dtype on its device if the machine has less memory.

    Nothing is refused on an accelerator, because the size of its memory is not known here.
    """
    if (place(like) or "").startswith("cpu"):
        checks.memory(n * float_dtypes[backend_of(like).dtype_names.get(like.dtype, "float32")].itemsize, what)


def check_device(params: Params) -> None:
    """Refuse parameters on different devices, before the framework fails in the middle of the model."""
    places: dict[str, str] = {}
    for path, x in flatten(params):
        places.setdefault(backend_of(x).device(x), path)
    if len(places) > 1:
        found = " and ".join(f"{path} lives on {device}" for device, path in list(places.items())[:2])
        raise ValueError(f"{found}; put all parameters on one device")
