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
# # Where two models part
#
# You have ported GPT-2, and the logits of the port differ from those of the original. Is that rounding, or a mistake?
# And where does the mistake begin? `pg.compare` answers both questions. This notebook makes two ports with mistakes
# that are common, and lets `compare` find them.

# %%
import numpy as np

import portable_gpt2 as pg
from portable_gpt2.params import flatten, nest

original = pg.GPT2.load("shakespeare")
ids = original.tokenizer.encode("To be, or not to be")


def difference(port):
    """Return the largest difference of two logits."""
    a, b = (pg.to_numpy(model.logits([ids])).astype(np.float64) for model in (original, port))
    return np.abs(a - b).max()


# %% [markdown]
# ## No mistake: sixteen bits
#
# First a model that differs although nothing is wrong: the same checkpoint in bfloat16, which has 8 significant bits.

# %%
rounded = pg.GPT2.load("shakespeare", dtype="bfloat16")
print(f"The logits differ by up to {difference(rounded):.2f}.")

# %% [markdown]
# So large a difference looks like a mistake. `compare` computes each operation of the second model once more, in a
# higher precision, from the inputs that the operation had in that model. It divides the error by the largest error that
# rounding can cause ([Error bounds](../numerics.md)). If no ratio is above 1, each operation is right.

# %%
found = pg.compare(original, rounded, ids)
print(found.verdict)
print(f"{len(found.ops)} operations, largest error / bound: {max(op.ratio for op in found.ops):.2f}")
assert found.equal

# %% [markdown]
# ## First mistake: another epsilon
#
# Layer norm adds 1e-5 to the variance before it takes the square root. Many frameworks have another default. This port
# adds 1e-3.

# %%
settings = {**vars(original.config), "layer_norm_epsilon": 1e-3}
port = pg.GPT2(pg.GPT2Config(**settings), original.params, original.tokenizer)
print(f"The logits differ by up to {difference(port):.2f}.")

# %% [markdown]
# The difference is much larger than that of bfloat16, but the port still writes something like a play. Nothing fails.

# %%
print("original:", original.generate("ROMEO.", max_new_tokens=12, temperature=0).replace("\n", " / "))
print("port:    ", port.generate("ROMEO.", max_new_tokens=12, temperature=0).replace("\n", " / "))

# %% [markdown]
# A port is usually another program, and all that `compare` needs is its trace: the results of its operations, under the
# names of `GPT2.trace`. A program can write them with `numpy.savez`. `compare` does not see here how the port was made.

# %%
trace = pg.Trace("the port", np.asarray(ids), port.trace(ids))
found = pg.compare(original, trace)
print(found.verdict)
assert (found.culprit.name, found.culprit.guess) == ("h0/ln_1", "eps is 0.001, not 1e-05")

# %% [markdown]
# The first layer norm is the first operation whose error is beyond its bound, and `compare` names the epsilon that
# explains the result. It tries about a hundred known mistakes. Here is the worst element of the result:

# %%
op = found.culprit
print(f"computed {op.computed:.6f}, exact {op.exact:.6f}, permitted error {op.permitted:.6f}")

# %% [markdown]
# ## Second mistake: a transposed weight
#
# PyTorch's `nn.Linear` stores a weight as [nf, nx], and GPT-2's checkpoints store [nx, nf]. A square weight that is
# transposed by mistake raises no error.

# %%
weights = dict(flatten(original.params))
path = "h2/attn/c_proj/w"
weights[path] = original.backend.xp.matrix_transpose(weights[path])
port = pg.GPT2(original.config, nest(weights), original.tokenizer)
print(f"The logits differ by up to {difference(port):.2f}.")

# %%
found = pg.compare(original, port, ids)
print(found.verdict)
assert [(weight.path, weight.kind) for weight in found.weights] == [(path, "transposed")]

# %% [markdown]
# Here the weights of the port are known, so they are compared as well. Without the weights, the results of the
# operation are enough:

# %%
trace = pg.Trace("the port", np.asarray(ids), port.trace(ids))
found = pg.compare(original, trace)
print(found.verdict)
assert found.culprit.name == "h2/attn/c_proj"

# %% [markdown]
# `print(found)` shows the whole report. On the command line, `portable-gpt2 diff A B --html diff.html` writes it as a
# page in which each operation of each layer is one cell of a table.

# %%
print(found)

# %% [markdown]
# ## The last word
#
# `compare` says that two models compute the same function up to rounding. Which of them is closer to the truth?
# `certify` computes with intervals that contain the exact logits, and so proves which token is the most likely one.

# %%
certificate = pg.certify(original, "To be", max_new_tokens=2)
print(str(certificate).split("\n\n")[0])
assert all(certificate.proved)

# %% [markdown]
# Two people who want to know whether they run the same model compare its fingerprint. It is equal on all frameworks and
# machines, because each operation is rounded correctly for it.

# %%
fingerprint = original.fingerprint("To be")
print("logits ", fingerprint.logits)
print("weights", fingerprint.weights)
assert fingerprint == pg.GPT2.load("shakespeare", backend="numpy").fingerprint("To be")
