"""The bare functions of each framework, without portable_gpt2, in their fastest form.

There is one small class per framework, all with the same members. Nothing here imports portable_gpt2, and no other
module of this package calls a framework's functions.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Function = Callable[..., Any]


class Framework:
    """The members that the measurements use."""

    name: str
    modes: Mapping[str, Callable[[Function], Function]]
    """The ways to run a function, such as eagerly or compiled, by name."""
    matmul: Function

    @property
    def fast_modes(self) -> dict[str, Callable[[Function], Function]]:
        """The modes to try for many products at once: the modes that compile, or eager mode if none compiles."""
        return {mode: run for mode, run in self.modes.items() if mode != "eager"} or dict(self.modes)

    def array(self, a: np.ndarray) -> Any:
        """Return a NumPy array as an array of the framework."""
        raise NotImplementedError

    def wait(self, y: Any) -> Any:
        """Wait until y, an array or a tuple of arrays, is computed; return it."""
        return y

    def softmax(self, x: Any) -> Any:
        """Return the framework's own softmax over the last axis."""
        raise NotImplementedError

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        """Return x w + b by a matrix product, [..., nx] to [..., nf]."""
        raise NotImplementedError

    @property
    def linears(self) -> dict[str, Function]:
        """The ways that users write `linear`, by name."""
        return {"x w + b": self.linear}

    def convolution(self, x: Any, w: Any, b: Any) -> Any:
        """Return the result of `linear` for x [batch, seq, nx], computed by the framework's convolution of width 1."""
        raise NotImplementedError

    def transpose(self, x: Any) -> Any:
        """Return a view with the last two axes exchanged."""
        raise NotImplementedError

    def bind(self, run: Callable[[Function], Function], f: Function, weights: Any) -> Function:
        """Return the function x -> f(x, weights), run in the mode `run`. The weights are passed in the fastest way."""
        g = run(f)
        return lambda x: g(x, weights)

    def compiled(self) -> Callable[[Function], Function] | None:
        """Return the compiler for the rows "the definition under jit", or None if the framework has no compiler."""
        return None


class Numpy(Framework):
    """NumPy. It has no softmax, so SciPy's is used."""

    name = "numpy"

    def __init__(self, device: str | None = None) -> None:
        self.modes = {"eager": lambda f: f}
        self.matmul = np.matmul

    def array(self, a: np.ndarray) -> Any:
        return a

    def softmax(self, x: Any) -> Any:
        from scipy.special import softmax  # imported in the first call, which is a warm-up

        return softmax(x, axis=-1)

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        return x @ w + b

    def convolution(self, x: Any, w: Any, b: Any) -> Any:
        # NumPy has no convolution with channels. This is the textbook method: contract windows of width 1 with the
        # kernel.
        windows = np.lib.stride_tricks.sliding_window_view(x, 1, axis=-2)
        return np.einsum("...cw,wcf->...f", windows, w[None], optimize=True) + b

    def transpose(self, x: Any) -> Any:
        return np.swapaxes(x, -1, -2)


class Torch(Framework):
    """PyTorch, run eagerly. torch.compile takes half a minute per function, so it is used for single ops only."""

    name = "torch"

    def __init__(self, device: str | None = None) -> None:
        import torch

        torch.backends.cudnn.allow_tf32 = False  # as in products, which are computed in float32
        self.torch, self.device = torch, torch.device(device or "cpu")
        self.modes = {"eager": lambda f: f}
        self.matmul = torch.matmul

    def array(self, a: np.ndarray) -> Any:
        return self.torch.from_numpy(a).to(self.device)

    def wait(self, y: Any) -> Any:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)
        return y

    def softmax(self, x: Any) -> Any:
        return self.torch.softmax(x, -1)

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        return self.torch.addmm(b, x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)

    @property
    def linears(self) -> dict[str, Function]:
        return {"addmm": self.linear, "F.linear": lambda x, w, b: self.torch.nn.functional.linear(x, w.mT, b)}

    def convolution(self, x: Any, w: Any, b: Any) -> Any:
        return self.torch.nn.functional.conv1d(x.mT, w.mT[..., None], b).mT  # PyTorch expects channels before positions

    def transpose(self, x: Any) -> Any:
        return x.mT

    def compiled(self) -> Callable[[Function], Function]:
        # Without this reset, a function that is called with a second shape would be compiled for unknown sizes.
        self.torch.compiler.reset()
        return functools.partial(self.torch.compile, fullgraph=True)


class Jax(Framework):
    """JAX, run eagerly or compiled, on its default device. On a GPU, products are not computed in TF32."""

    name = "jax"

    def __init__(self, device: str | None = None) -> None:
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        self.jax, self.numpy = jax, jax.numpy
        self.modes = {"eager": lambda f: f, "jit": jax.jit}
        self.matmul = jax.numpy.matmul

    def array(self, a: np.ndarray) -> Any:
        return self.numpy.asarray(a)

    def wait(self, y: Any) -> Any:
        return self.jax.block_until_ready(y)

    def softmax(self, x: Any) -> Any:
        return self.jax.nn.softmax(x)

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        return x @ w + b

    def convolution(self, x: Any, w: Any, b: Any) -> Any:
        layout = ("NWC", "WIO", "NWC")
        return self.jax.lax.conv_general_dilated(x, w[None], (1,), "VALID", dimension_numbers=layout) + b

    def transpose(self, x: Any) -> Any:
        return self.numpy.swapaxes(x, -1, -2)

    def compiled(self) -> Callable[[Function], Function]:
        return self.jax.jit


class Tensorflow(Framework):
    """TensorFlow, run eagerly, as a graph or compiled by XLA."""

    name = "tensorflow"

    def __init__(self, device: str | None = None) -> None:
        import tensorflow as tf

        self.tf = tf
        graph = functools.partial(tf.function, autograph=False)
        self.modes = {"eager": lambda f: f, "tf.function": graph, "XLA": functools.partial(graph, jit_compile=True)}
        self.matmul = tf.linalg.matmul

    def array(self, a: np.ndarray) -> Any:
        return self.tf.constant(a)

    def softmax(self, x: Any) -> Any:
        return self.tf.nn.softmax(x)

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        rows = self.tf.reshape(x, [-1, x.shape[-1]])
        return self.tf.reshape(self.tf.nn.bias_add(self.tf.matmul(rows, w), b), [*x.shape[:-1], w.shape[-1]])

    @property
    def linears(self) -> dict[str, Function]:
        return {"matmul of rows": self.linear, "matmul": lambda x, w, b: self.tf.matmul(x, w) + b}

    def convolution(self, x: Any, w: Any, b: Any) -> Any:
        return self.tf.nn.bias_add(self.tf.nn.conv1d(x, w[None], 1, "VALID"), b)

    def transpose(self, x: Any) -> Any:
        return self.tf.linalg.matrix_transpose(x)

    def bind(self, run: Callable[[Function], Function], f: Function, weights: Any) -> Function:
        # The function captures the weights. To pass many tensors as arguments would take milliseconds per call.
        return run(lambda x: f(x, weights))

    def compiled(self) -> Callable[[Function], Function]:
        return self.modes["XLA"]


@functools.cache
def get(name: str, device: str | None = None) -> Framework:
    """Return the framework of that name. PyTorch's arrays are on the device; the others use their default device."""
    return {each.name: each for each in (Numpy, Torch, Jax, Tensorflow)}[name](device)


def installed(name: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None
