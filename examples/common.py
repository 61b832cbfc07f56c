"""Functions that both notebook scripts use: the installed backends, the frameworks' built-in functions, and a clock."""

import importlib
import timeit

import numpy as np

import portable_gpt2 as pg

rng = np.random.default_rng(2019)


def backends(names):
    """Return the backends of these names; without names, the installed ones of the four frameworks."""
    four = ("numpy", "tensorflow", "jax", "torch")
    return [pg.get_backend(name) for name in names or four if name in pg.available_backends()]


def builtin_softmax(name):
    """Return the framework's own softmax over the last axis. For NumPy it is SciPy's, or None without SciPy."""
    if name == "tensorflow":
        return importlib.import_module("tensorflow").nn.softmax
    if name == "jax":
        return importlib.import_module("jax").nn.softmax
    if name == "torch":
        torch = importlib.import_module("torch")
        return lambda x: torch.softmax(x, -1)
    try:
        scipy = importlib.import_module("scipy.special")
    except ImportError:
        return None
    return lambda x: scipy.softmax(x, axis=-1)


def true_convolution(name):
    """Return the framework's own convolution of width 1 over x [batch, seq, nx] with w [1, nx, nf]."""
    if name == "tensorflow":
        tf = importlib.import_module("tensorflow")
        return lambda x, w, b: tf.nn.conv1d(x, w, 1, "VALID") + b
    if name == "jax":
        lax = importlib.import_module("jax").lax
        layout = ("NWC", "WIO", "NWC")
        return lambda x, w, b: lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layout) + b
    if name == "torch":
        torch = importlib.import_module("torch")
        return lambda x, w, b: torch.nn.functional.conv1d(x.mT, w.permute(2, 1, 0), b).mT  # channels before positions
    # NumPy has no convolution with channels, so this is its definition: multiply each window by the kernel.
    windows = np.lib.stride_tricks.sliding_window_view
    return lambda x, w, b: np.einsum("bscw,wcf->bsf", windows(x, 1, axis=-2), w, optimize=True) + b


def microseconds(f, *args):
    """Return the time of one call in microseconds: the best of five rounds, each of at least 20 ms."""

    def call():
        result = f(*args)
        getattr(result, "block_until_ready", lambda: None)()  # JAX returns before it has computed

    call()
    timer = timeit.Timer(call)
    calls = 1
    while timer.timeit(calls) < 0.02:
        calls *= 2
    return min(timer.repeat(5, calls)) / calls * 1e6
