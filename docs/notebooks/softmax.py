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
# # Softmax: why is the maximum subtracted?
#
# In 2019 a notebook copied the function `softmax` from OpenAI's GPT-2, and asked three questions about it. Why is the
# maximum subtracted? Does the function equal the framework's built-in one? Which of the two is faster? This project
# began with that notebook. It is replayed here with the answers.

# %%
import importlib
import importlib.util
import timeit

import matplotlib.pyplot as plt
import numpy as np

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated

backend = pg.get_backend()  # the one that PORTABLE_GPT2_BACKEND names, or NumPy
xp = backend.xp  # functions with NumPy's names, on the arrays of the backend

# %% [markdown]
# ## The function
#
# The function in GPT-2 was written for TensorFlow 1. With the names of the array API standard it runs on all
# frameworks.


# %%
def softmax(x, axis=-1, xp=xp):
    x = x - xp.max(x, axis=axis, keepdims=True)
    ex = xp.exp(x)
    return ex / xp.sum(ex, axis=axis, keepdims=True)


# %% [markdown]
# The notebook printed each step for two small arrays. The digits below are the digits of 2019, except that the last one
# may differ.


# %%
def steps(rows):
    x = backend.from_numpy(np.asarray(rows, np.float32))
    largest = xp.max(x, axis=-1, keepdims=True)
    ex = xp.exp(x - largest)
    for name, array in [("x", x), ("innermost max", largest), ("x - max", x - largest), ("exp(x - max)", ex)]:
        print(f"{name}\n{pg.to_numpy(array)}\n----------")
    print(f"softmax\n{pg.to_numpy(softmax(x))}")


steps([[1, 2, 3], [4, 5, 6], [7, 8, 9]])

# %%
steps([[1, 1], [3, 2], [5, 9]])

# %% [markdown]
# All rows of the first array give the same result, because softmax does not change if a number is added to a row:
# numerator and denominator are multiplied by the same factor. So the maximum may be subtracted. But why is it?
#
# ## What happens without the maximum


# %%
def unshifted(x):
    ex = xp.exp(x)
    return ex / xp.sum(ex, axis=-1, keepdims=True)


np.seterr(over="ignore", invalid="ignore", under="ignore")  # NumPy would warn in the next cells
for row in ([1, 2, 3], [101, 102, 103], [-101, -102, -103], [-201, -202, -203]):
    x = backend.from_numpy(np.asarray(row, np.float32))
    print(f"{row!s:18} unshifted {pg.to_numpy(unshifted(x))}, softmax {pg.to_numpy(softmax(x))}")

# %% [markdown]
# The largest float32 number is 3.4e38, which is exp(88.7). From 89 on, `exp` returns infinity, and infinity / infinity
# is NaN. Below -103, `exp` returns 0, and 0 / 0 is NaN as well. Between -103 and -87 its results are subnormal numbers,
# which have fewer digits, and which some frameworks replace by 0. With the maximum subtracted, the largest exponent is
# 0: nothing overflows, and at least one term of the sum is 1.
#
# The plot has the largest relative error of both functions, for 64 numbers near c. Its unit is u = 6e-8, the largest
# relative error of one rounding.


# %%
def largest_relative_error(f, a):
    exact = bounds.softmax(a, numerics=stated(backend, "float32")).value  # computed in float64
    error = np.abs(pg.to_numpy(f(backend.from_numpy(a))) - exact) / exact
    return float(error.max()) / 2**-24  # NaN if the result has a NaN


rng = np.random.default_rng(2019)
offsets = np.arange(-120, 121, 4)
rows = [(rng.normal(size=64) + c).astype(np.float32) for c in offsets]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for f, label, style in [(unshifted, "without the maximum", "s--"), (softmax, "with the maximum", "o-")]:
    color = "0.55" if f is unshifted else "black"
    errors = [largest_relative_error(f, row) for row in rows]
    axes.plot(offsets, errors, style, color=color, markersize=4, label=label)
    if f is softmax:
        assert max(errors) < 100
axes.set(xlabel="c, about which the 64 numbers are spread", ylabel="largest relative error [u]", yscale="log")
axes.set_title("Where a line ends, the result is NaN")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# The line of the function without the maximum ends on both sides. In the middle, both functions are equally accurate.
#
# So subtracting the maximum extends the range of inputs that give finite results. It has nothing to do with
# normalization or speed, which the notebook guessed. GPT-2 needs it: a logit or an attention score may be above 89.
#
# ## Does it equal the built-in function?
#
# The notebook compared the bits of two arrays, and found them equal. Larger arrays are not equal to the last bit: sums
# in another order are rounded differently. So the question is whether the results differ by more than rounding can
# explain. For each element, [Error bounds](../numerics.md#softmax) derives the largest error that a correct
# implementation can have. Below 1, the error is within its bound.


# %%
def builtin(name):
    """Return the framework's own softmax over the last axis. NumPy has none: SciPy's, or None without SciPy."""
    if name == "numpy":
        scipy = importlib.util.find_spec("scipy") and importlib.import_module("scipy.special")
        return scipy and (lambda x: scipy.softmax(x, axis=-1))
    if name == "torch":
        torch = importlib.import_module("torch")
        return lambda x: torch.softmax(x, -1)
    return importlib.import_module({"tensorflow": "tensorflow.nn", "jax": "jax.nn"}[name]).softmax


FRAMEWORKS = [name for name in ("numpy", "tensorflow", "jax", "torch") if name in pg.available_backends()]
ARRAYS = {  # those of the notebook, and one of the size of GPT-2's attention scores for 256 tokens
    "3x3": np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32),
    "4x3x2": rng.normal(0, 20, (4, 3, 2)).astype(np.float32),
    "36x10x4x3x2": rng.normal(0, 20, (36, 10, 4, 3, 2)).astype(np.float32),
    "12x256x256": rng.normal(0, 1, (12, 256, 256)).astype(np.float32),
}

print(f"error / bound   {'array':14} {'definition':>10} {'built-in':>10}")
for name in FRAMEWORKS:
    framework = pg.get_backend(name)
    for shape, a in ARRAYS.items():
        x, bound = framework.from_numpy(a), bounds.softmax(a, numerics=stated(framework, "float32"))
        functions = filter(None, (pg.softmax.reference, builtin(name)))
        ratios = [bound.ratio(pg.to_numpy(f(x))) for f in functions]
        assert max(ratios) <= 1
        print(f"{name:15} {shape:14} {' '.join(f'{ratio:10.2f}' for ratio in ratios)}")

# %% [markdown]
# `pg.softmax.reference` is the function at the top of this page. All errors are below 1: the functions are equal, as
# far as rounding permits. A framework that is missing in the table is not installed where this page was made.
#
# ## What a bound looks like
#
# The bound grows with the length of a row, because a sum of n numbers is rounded n - 1 times. The errors grow more
# slowly, because roundings up and down cancel, and because libraries add in blocks. A bound must hold for the worst
# signs and for every order of the sum.

# %%
lengths = [2**k for k in range(1, 15)]
worst, measured = [], []
for n in lengths:
    a = rng.normal(size=(max(8, 4096 // n), n)).astype(np.float32)
    bound = bounds.softmax(a, numerics=stated(backend, "float32"))
    worst.append(float((bound.error / bound.value).max()) / 2**-24)
    measured.append(largest_relative_error(pg.softmax, a))
    assert bound.ratio(pg.to_numpy(pg.softmax(backend.from_numpy(a)))) <= 1

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.loglog(lengths, worst, "-", color="black", label="derived bound")
axes.loglog(lengths, measured, "o", color="0.4", label="largest error of pg.softmax")
axes.set(xlabel="n, the length of a row", ylabel="relative error [u]")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## Which is faster?
#
# The notebook measured both functions with TensorFlow 1:
#
# | array | function | built-in | built-in / function |
# | --- | --- | --- | --- |
# | 3x3 | 80.7 µs | 11.2 µs | 0.14 |
# | 4x3x2 | 87.1 µs | 12.9 µs | 0.15 |
# | 36x10x4x3x2 | 521 µs | 189 µs | 0.36 |
#
# It said that the function "does look" faster. Its figures say the opposite: the built-in function took a seventh to a
# third of the time. Here are the ratios on the machine that made this page. They vary from run to run, and more so on a
# machine that runs other programs.


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


print(f"built-in / definition {''.join(f'{shape:>13}' for shape in ARRAYS)}")
for name in FRAMEWORKS:
    if builtin(name) is not None:
        framework = pg.get_backend(name)
        xs = map(framework.from_numpy, ARRAYS.values())
        ratios = [seconds(builtin(name), x) / seconds(softmax, x, -1, framework.xp) for x in xs]
        print(f"{name:21} {''.join(f'{ratio:13.2f}' for ratio in ratios)}")

# %% [markdown]
# [The benchmarks](../benchmarks/README.md) were measured on two cores of an Intel Xeon. There the definition is
# `pg.softmax.reference`, which also checks its arguments. This takes longer than the arithmetic of the smallest arrays:
#
# | built-in / definition | NumPy (SciPy) | TensorFlow | JAX | PyTorch |
# | --- | --- | --- | --- | --- |
# | 3x3 | 0.54 | 0.30 | 0.99 | 0.13 |
# | 4x3x2 | 0.59 | 0.22 | 0.99 | 0.15 |
# | 36x10x4x3x2 | 0.98 | 0.39 | 0.88 | 1.52 |
# | 12x1024x1024 | 0.99 | 0.24 | 1.07 | 0.32 |
#
# A framework that runs each operation separately pays for five calls, and reads and writes the array five times. The
# built-in function is one call. JAX's built-in function consists of the same operations, so the ratio is about 1. On a
# GPU these ratios have not been measured; `python -m bench.gpu` in a checkout measures them.
#
# `pg.softmax` therefore calls the framework's function where that is faster and its error is within the bound, and the
# definition elsewhere.
