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
# # Four frameworks side by side
#
# The model is written once. This notebook runs it with NumPy, PyTorch, JAX and TensorFlow, as far as they are
# installed, and compares three things: the text, the numbers, and the time.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated

FOUR = ("numpy", "torch", "jax", "tensorflow")
NAMES = [name for name in FOUR if name in pg.available_backends()]
for name in FOUR:
    print(f"{name:11} {'installed' if name in NAMES else 'not installed'}")

# %%
models = {name: pg.GPT2.load("shakespeare", backend=name) for name in NAMES}

# %% [markdown]
# ## The text
#
# The same seed gives the same text on each framework. The random numbers are made on the host from the seed and the
# position of the token. A token is the one with the largest sum of a logit and a random number. So two frameworks could
# choose different tokens only if two such sums were closer than the rounding errors of the logits.

# %%
LENGTH = 60
texts = {}
for name, model in models.items():
    texts[name] = model.generate("ROMEO.", max_new_tokens=LENGTH, temperature=0.8, seed=7)
    print(f"{name:11}", "the same text" if texts[name] == texts[NAMES[0]] else texts[name])
assert len(set(texts.values())) == 1
print(f"\nROMEO.{texts[NAMES[0]]}")

# %% [markdown]
# ## The numbers
#
# The logits of two frameworks differ in their last digits, because they add in different orders. Here is the largest
# difference to the first framework above, in units of the last place of the largest logit.

# %%
ids = models[NAMES[0]].tokenizer.encode("To be, or not to be, that is the question")
logits = {name: pg.to_numpy(model.logits([ids])).astype(np.float64) for name, model in models.items()}
unit = np.spacing(np.float32(np.abs(logits[NAMES[0]]).max()))
for name in NAMES:
    print(f"{name:11} {np.abs(logits[name] - logits[NAMES[0]]).max() / unit:6.1f}")

# %% [markdown]
# A difference says nothing about who is right. The [error bounds](../numerics.md) do, for each operation: they are the
# largest errors that a correct implementation can have. `error / bound` below is the largest ratio over all elements of
# one call, with an input of the shape that the operation has in GPT-2.

# %%
rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return rng.normal(0, scale, shape).astype(np.float32)


CALLS = {
    "softmax": (bounds.softmax, [normal(4, 64, 64)]),
    "gelu": (bounds.gelu, [normal(64, 1024)]),
    "layer_norm": (bounds.layer_norm, [normal(64, 256), normal(256), normal(256)]),
    "conv1d": (bounds.linear, [normal(64, 256), normal(256, 768, scale=0.06), normal(768, scale=0.06)]),
    "attention": (bounds.attention, [normal(4, 64, 64), normal(4, 64, 64), normal(4, 64, 64)]),
}
ratios = {}
print(f"error / bound {''.join(f'{name:>12}' for name in NAMES)}")
for op, (bound_of, arguments) in CALLS.items():
    ratios[op] = []
    for name in NAMES:
        backend = pg.get_backend(name)
        options = {} if op in ("conv1d", "layer_norm") else {"numerics": stated(backend, "float32")}
        computed = getattr(pg, op)(*map(backend.from_numpy, arguments))
        ratios[op].append(bound_of(*arguments, **options).ratio(pg.to_numpy(computed)))
    print(f"{op:13} {''.join(f'{ratio:12.3f}' for ratio in ratios[op])}")
assert max(map(max, ratios.values())) <= 1

# %% [markdown]
# All ratios are below 1. Those of `conv1d` and `attention` are small, because the bound of a long sum assumes that all
# of its roundings go in the same direction.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
STYLES = {"numpy": ("o", "black"), "torch": ("s", "0.4"), "jax": ("^", "0.6"), "tensorflow": ("x", "black")}
for i, name in enumerate(NAMES):
    marker, color = STYLES[name]
    places = np.arange(len(CALLS)) + 0.12 * (i - 1.5)
    axes.semilogy(places, [each[i] for each in ratios.values()], marker, color=color, label=name)
axes.axhline(1, color="black", linewidth=1, label="the bound")
axes.set_xticks(range(len(CALLS)), CALLS)
axes.set(ylabel="largest error / bound", ylim=(None, 2))
axes.grid(alpha=0.3, axis="y")
axes.legend()
plt.show()

# %% [markdown]
# ## The time
#
# The time of a token, divided by that of the first framework. The model is tiny: most of the time is spent on calls,
# and not on arithmetic. The ratios vary from run to run and from machine to machine. JAX and TensorFlow have compiled
# their functions before the measurement. For a model of real size, the [benchmarks](../benchmarks/README.md) have times
# and the limits of the machine.

# %%
SAMPLES = 5
seconds = {name: [] for name in NAMES}
for _ in range(SAMPLES):  # in turn, so that all see the same load of the machine
    for name, model in models.items():
        start = time.perf_counter()
        model.generate("ROMEO.", max_new_tokens=LENGTH, temperature=0.8, seed=7)
        seconds[name].append(time.perf_counter() - start)
for name in NAMES:
    print(f"{name:11} {min(seconds[name]) / min(seconds[NAMES[0]]):5.2f}")
