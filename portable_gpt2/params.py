"""The parameter tree: nested dicts whose paths are OpenAI's variable names, such as ``h3/attn/c_attn/w``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.random import Philox

from . import checks
from .backend import Backend, backend_of, get_backend
from .config import GPT2Config

Params = dict[str, Any]
"""A tree of arrays. A sub-tree is splatted into the function that uses it: ``conv1d(x, **params["c_attn"])``."""


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path, in the order of OpenAI's code.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.shapes(pg.GPT2Config())["h3/attn/c_attn/w"]
    (768, 2304)
    """
    d, hidden = config.n_embd, config.n_hidden
    found: dict[str, tuple[int, ...]] = {"wpe": (config.n_ctx, d), "wte": (config.n_vocab, d)}
    if not config.tie_word_embeddings:
        found["lm_head"] = (config.n_vocab, d)
    for i in range(config.n_layer):
        for scope, (nx, nf) in {
            "attn/c_attn": (d, 3 * d),
            "attn/c_proj": (d, d),
            "mlp/c_fc": (d, hidden),
            "mlp/c_proj": (hidden, d),
        }.items():
            found[f"h{i}/{scope}/w"], found[f"h{i}/{scope}/b"] = (nx, nf), (nf,)
        for scope in ("ln_1", "ln_2"):
            found[f"h{i}/{scope}/g"] = found[f"h{i}/{scope}/b"] = (d,)
    found["ln_f/g"] = found["ln_f/b"] = (d,)
    return found


def count(config: GPT2Config) -> int:
    """Return the number of parameters.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> pg.params.count(pg.GPT2Config.published("124M"))
    124439808
    """
    return sum(math.prod(shape) for shape in shapes(config).values())


def flatten(tree: Mapping[str, Any], scope: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a tree with its path.

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
    """Return the tree that has these leaves: the inverse of `flatten`.

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
    """Return the tree of what a function gives for the leaves of one tree, or of several that have the same paths.

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
    """Return freshly initialised parameters, as OpenAI's code does: the same bits on every backend.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    seed : int
        From 0 to 2^64 - 1. Each parameter is drawn from a stream of its own, keyed by the seed and its path.
    backend, device
        Where the parameters are made; see `get_backend`.
    dtype : str
        ``float32``, ``float64``, ``bfloat16`` or ``float16``.
    scale_residual : bool
        Whether the two w of each layer whose products are added to the residual stream are divided by the square root
        of how many there are, 2 n_layer, as the paper says and OpenAI's code does not: the stream then keeps its
        variance.

    Returns
    -------
    dict
        w, wte and lm_head are drawn from N(0, 0.02), wpe from N(0, 0.01); b is 0 and g is 1.

    Raises
    ------
    ValueError
        If the seed, the dtype or the device is none that there is.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=4, eos_token_id=None)
    >>> pg.init_params(config)["h0"]["mlp"]["c_fc"]["w"].shape
    (8, 32)
    """
    owner = get_backend(backend, device)

    def stdev(path: str) -> float:
        if path == "wpe":
            return 0.01
        is_residual = scale_residual and path.endswith("c_proj/w")
        return 0.02 / math.sqrt(2 * config.n_layer) if is_residual else 0.02

    return nest(
        {
            path: owner.from_numpy(_initial(path, shape, stdev(path), seed), dtype)
            for path, shape in shapes(config).items()
        }
    )


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
    """Return the variables of a `conv1d` under a scope: w ~ N(0, w_init_stdev) of shape [nx, nf], and b = 0.

    Parameters
    ----------
    scope : str
        The path of the variables, such as ``h3/attn/c_attn``. It keys the random stream, with the seed.
    nx, nf : int
        Lengths of the last axis before and after.
    w_init_stdev : float
        Standard deviation of w.
    seed, backend, dtype, device
        As for `init_params`.

    Returns
    -------
    dict
        ``{"w": [nx, nf], "b": [nf]}``, to be splatted into `conv1d`.

    Raises
    ------
    ValueError
        If the seed, the dtype or the device is none that there is.

    Examples
    --------
    >>> import numpy as np
    >>> import portable_gpt2 as pg
    >>> pg.conv1d(np.ones((10, 5, 2, 5), np.float32), **pg.init_conv1d("x_conv1d", 5, 3, backend="numpy")).shape
    (10, 5, 2, 3)
    """
    owner = get_backend(backend, device)
    return {
        "w": owner.from_numpy(_initial(f"{scope}/w", (nx, nf), w_init_stdev, seed), dtype),
        "b": owner.from_numpy(_initial(f"{scope}/b", (nf,), 0.0, seed), dtype),
    }


def _initial(path: str, shape: tuple[int, ...], stdev: float, seed: int) -> np.ndarray:
    """Return a parameter's first value in float64."""
    leaf = path.rpartition("/")[2]
    if leaf in ("g", "b"):
        return np.full(shape, 1.0 if leaf == "g" else 0.0)
    return stdev * _normal(path, shape, seed)


def _normal(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw from N(0, 1) by Box and Muller's transform of raw Philox words, whose stream NumPy promises to keep."""
    scope = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    key = np.asarray([checks.seed(seed), scope], np.uint64)  # a plain list of the two would pass through float64
    n = math.prod(shape)
    words = Philox(key=key).random_raw(2 * ((n + 1) // 2)).reshape(2, -1)
    u, v = ((words >> np.uint64(12)) + 0.5) * 2.0**-52  # strictly between 0 and 1
    radius = np.sqrt(-2 * np.log(u))
    return np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])[:n].reshape(shape)


def check_params(params: Params, config: GPT2Config) -> None:
    """Refuse parameters of another model: one block too many or too few would compute something else in silence."""
    expected, found = shapes(config), dict(flatten(params))
    for verb, paths in (("lack", expected.keys() - found.keys()), ("hold", found.keys() - expected.keys())):
        if paths:
            raise ValueError(f"the parameters {verb} {', '.join(sorted(paths)[:3])}; config says {config}")
    for path, x in found.items():
        if (shape := backend_of(x).shape(x)) != expected[path]:
            raise ValueError(f"{path} has shape {list(shape)}; config makes it {list(expected[path])}")
