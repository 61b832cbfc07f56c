# ---
# jupytext:
#   text_representation:
#     extension: .py
#     format_name: percent
# kernelspec:
#   display_name: Python 3
#   language: python
#   name: python3
# ---

# %% [markdown]
# # Conv1d: why is a linear layer called a convolution?
#
# In 2019 a notebook copied the function `conv1d` from OpenAI's GPT-2, and asked three questions about it. Why has the
# weight the shape `[1, nx, nf]`? Is the function a convolution? Is it faster than the framework's convolution? The
# notebook is replayed here with the answers.

# %%
import importlib
import timeit

import numpy as np

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds

backend = pg.get_backend()  # the one that PORTABLE_GPT2_BACKEND names, or NumPy
xp = backend.xp  # functions with NumPy's names, on the arrays of the backend
rng = np.random.default_rng(2019)

# %% [markdown]
# ## The function
#
# In GPT-2 the function made its own variables, in a scope of TensorFlow 1. Here they are arguments.


# %%
def conv1d(x, w, b, xp=xp):
    *start, nx = x.shape
    nf = b.shape[0]
    rows = xp.matmul(xp.reshape(x, (-1, nx)), xp.reshape(w, (-1, nf)))
    return xp.reshape(rows + b, (*start, nf))


# %% [markdown]
# The notebook gave it an array of shape [10, 5, 2, 5], and 3 for nf. All axes but the last are flattened, so that one
# product of two matrices does all the work. Then they are restored.

# %%
x = backend.from_numpy(rng.uniform(-0.13, 0.13, (10, 5, 2, 5)).astype(np.float32))
parameters = pg.init_conv1d("x_conv1d", 5, 3, backend=backend)
w, b = parameters["w"], parameters["b"]
for name, array in [("x", x), ("w", w), ("x reshaped", xp.reshape(x, (-1, 5))), ("c", conv1d(x, w, b))]:
    print(f"{name:11}{list(array.shape)}")

# %% [markdown]
# ## Why `[1, nx, nf]`?
#
# The weight above has the shape [nx, nf]: the notebook tried to leave the 1 out, and it worked. The same numbers in the
# shape [1, nx, nf] give the same bits.

# %%
with_one = pg.to_numpy(conv1d(x, xp.reshape(w, (1, 5, 3)), b))
without_one = pg.to_numpy(conv1d(x, w, b))
assert np.array_equal(with_one, without_one)
print("same bits:", np.array_equal(with_one, without_one))

# %% [markdown]
# The notebook guessed that the 1 is "a remnant of the GPT-1 architecture", and that is right. In GPT-1's code `conv1d`
# took a width `rf`, the receptive field, and the weight had the shape `[rf, nx, nf]`. For `rf = 1` it was the product
# of matrices above; for larger widths it called TensorFlow's convolution. GPT-2's code dropped the argument, but its
# checkpoints still have the 1: TensorFlow stores a variable with its shape. That is why `pg.conv1d` accepts both
# shapes.
#
# ## Is it a convolution?
#
# A convolution of width 1 multiplies the features of each position with the same matrix, and looks at no other
# position. That is what a linear layer does. Here is the framework's own convolution, for x of shape [batch, seq, nx].
# Its arguments are in a different order in each framework.


# %%
def convolution(name):
    """Return the framework's own convolution, over x [batch, seq, nx] with w [width, nx, nf]."""
    if name == "tensorflow":
        tf = importlib.import_module("tensorflow")
        return lambda x, w, b: tf.nn.conv1d(x, w, 1, "VALID") + b
    if name == "jax":
        lax = importlib.import_module("jax.lax")
        layout = ("NWC", "WIO", "NWC")
        return lambda x, w, b: lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layout) + b
    if name == "torch":
        torch = importlib.import_module("torch")
        return lambda x, w, b: torch.nn.functional.conv1d(x.mT, w.permute(2, 1, 0), b).mT  # features before positions
    # NumPy has no convolution of several features, so this is the definition: each window times the weight.
    windows = np.lib.stride_tricks.sliding_window_view
    return lambda x, w, b: np.einsum("bscw,wcf->bsf", windows(x, len(w), axis=1), w, optimize=True) + b


FRAMEWORKS = [name for name in ("numpy", "tensorflow", "jax", "torch") if name in pg.available_backends()]


def arrays(batch, seq, nx, nf, width=1):
    x = rng.uniform(-0.13, 0.13, (batch, seq, nx)).astype(np.float32)
    w = rng.normal(0, 0.02, (width, nx, nf)).astype(np.float32)
    return x, w, rng.normal(0, 0.02, nf).astype(np.float32)


# %% [markdown]
# Two correct implementations need not agree in the last bit, because they add in different orders. [Error
# bounds](../numerics.md) derives, for each element, the largest error that a correct implementation can have. An error
# divided by its bound is below 1.

# %%
CASES = {"10x10x5 by 5x3": arrays(10, 10, 5, 3), "2x128x768 by 768x768": arrays(2, 128, 768, 768)}

print(f"error / bound  {'shapes':22} {'conv1d':>8} {'convolution':>12}")
for name in FRAMEWORKS:
    framework = pg.get_backend(name)
    for shapes, case in CASES.items():
        bound = bounds.linear(*case)
        x, w, b = map(framework.from_numpy, case)
        ratios = [bound.ratio(pg.to_numpy(f(x, w, b))) for f in (pg.conv1d.reference, convolution(name))]
        assert max(ratios) <= 1
        print(f"{name:14} {shapes:22} {ratios[0]:8.3f} {ratios[1]:12.3f}")

# %% [markdown]
# So it is a convolution, whose width is 1. `pg.conv1d.reference` is the function at the top of this page. A framework
# that is missing in the table is not installed where this page was made.
#
# A convolution of width 3 is another function: its result has two positions less, and each of them depends on three
# positions of x. It is the sum of three products, each of them with x shifted by one position more.

# %%
x, w, b = arrays(1, 6, 5, 3, width=3)
products = sum(x[:, i : i + 4] @ w[i] for i in range(3)) + b
print("x", list(x.shape), "w", list(w.shape), "result", list(products.shape))
for name in FRAMEWORKS:
    computed = convolution(name)(*map(pg.get_backend(name).from_numpy, (x, w, b)))
    assert np.abs(pg.to_numpy(computed) - products).max() < 1e-6

# %% [markdown]
# ## Which is faster?
#
# "The speed seems here to be the main motivator," says the notebook, and a comment in GPT-1's code says the same. Here
# are the ratios on the machine that made this page. Below 1, the product is faster. The ratios vary from run to run,
# and more so on a machine that runs other programs.


# %%
SECONDS = 0.02  # of a round


def seconds(f, *args):
    """Return the time of a call: the best of five rounds."""

    def call():
        getattr(f(*args), "block_until_ready", lambda: None)()  # JAX returns before it has computed

    call()
    timer, calls = timeit.Timer(call), 1
    while timer.timeit(calls) < SECONDS:
        calls *= 2
    return min(timer.repeat(5, calls)) / calls


print(f"conv1d / convolution {''.join(f'{shapes:>22}' for shapes in CASES)}")
for name in FRAMEWORKS:
    ratios = []
    for case in CASES.values():
        framework = pg.get_backend(name)
        x, w, b = map(framework.from_numpy, case)
        ratios.append(seconds(conv1d, x, w, b, framework.xp) / seconds(convolution(name), x, w, b))
    print(f"{name:20} {''.join(f'{ratio:22.2f}' for ratio in ratios)}")

# %% [markdown]
# [The benchmarks](../benchmarks/README.md) were measured on two cores of an Intel Xeon. There the product is the
# framework's own x w + b, without the two calls of `reshape`, which cost time for small arrays:
#
# | x w + b / convolution | NumPy | TensorFlow | JAX | PyTorch |
# | --- | --- | --- | --- | --- |
# | 10x5x2x5 by 5x3 | 0.09 | 0.43 | 0.20 | 0.10 |
# | 8x128x768 by 768x3072 | 1.10 | 0.89 | 1.03 | 0.56 |
#
# For small arrays the bare product takes 0.1 to 0.4 times as long: a convolution checks and prepares more. For the
# large arrays of a model it is never much slower, and with PyTorch it takes half of the time. So OpenAI's reason holds,
# but mostly for small arrays, and more for some frameworks than for others.
#
# On a GPU, this comparison has not been measured; `python -m bench.gpu` in a checkout measures it. One figure exists
# from an earlier version of this code, on an NVIDIA H100 with PyTorch in float32. A token of GPT-2 124M took 975 µs of
# the device's time, of which the products of `conv1d` and of the logits took 303 µs. Reading all weights once takes 179
# µs.
