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
# # GPT-2 in one sitting
#
# This notebook builds GPT-2, from softmax to a text that the model has learned. It is for readers of
# [picoGPT](https://github.com/jaymody/picoGPT): most functions have the same names as there, and read one text at a
# time. The comment at the end of a line is the shape of the line's result. After each function, `check` compares it
# with the op of this package that does the same.
#
# The functions run on every backend: `PORTABLE_GPT2_BACKEND=torch python gpt2_in_one_sitting.py`.

# %%
import math

import numpy as np
from numpy.random import Philox

import portable_gpt2 as pg
from portable_gpt2 import gradients
from portable_gpt2.params import flatten, map_tree

backend = pg.get_backend()
xp = backend.xp  # functions with NumPy's names, on the arrays of the backend
rng = np.random.default_rng(0)


def random(*shape):
    return backend.from_numpy(rng.normal(size=shape), "float32")


def check(mine, theirs):
    assert type(mine) is type(theirs)  # both are arrays of the same framework
    mine, theirs = pg.to_numpy(mine), pg.to_numpy(theirs)
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()
    print("equal up to rounding, shape", list(mine.shape))


# %% [markdown]
# ## The parts
#
# **Softmax** turns scores into positive weights whose sum is 1. The largest score is subtracted so that `exp` cannot
# overflow.


# %%
def softmax(x):
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))  # [..., n]
    return e / xp.sum(e, axis=-1, keepdims=True)  # [..., n]


x = random(5, 8)
check(softmax(x), pg.softmax(x))

# %% [markdown]
# **GELU** is the model's nonlinear function: close to 0 for negative x, and close to x for positive x.


# %%
def gelu(x):
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))  # [..., n]


check(gelu(x), pg.gelu(x))

# %% [markdown]
# **Layer norm** gives each row the mean 0 and the variance 1, and then scales and shifts it with learned numbers.


# %%
def layer_norm(x, g, b):
    x = x - xp.mean(x, axis=-1, keepdims=True)  # [..., n]
    variance = xp.mean(x * x, axis=-1, keepdims=True)  # [..., 1]
    return x / xp.sqrt(variance + 1e-5) * g + b  # [..., n]


g, b = random(8), random(8)
check(layer_norm(x, g, b), pg.layer_norm(x, g, b))

# %% [markdown]
# **A linear layer** is called conv1d in OpenAI's code. [The notebook about conv1d](conv1d.py) says why.


# %%
def linear(x, w, b):
    return xp.matmul(x, w) + b  # [seq, nx] x [nx, nf] + [nf] -> [seq, nf]


w, b = random(8, 3), random(3)
check(linear(x, w, b), pg.conv1d(x, w, b))

# %% [markdown]
# **Attention** averages values. The weight of a value is the softmax of the product of a query and a key. A query sees
# only its own position and earlier ones: a later position gets the score -inf, and so the weight 0. There may be more
# keys than queries. The queries then belong to the last positions.


# %%
def attention(q, k, v):
    *_, seq, d = backend.shape(q)
    *_, keys, _ = backend.shape(k)
    scores = xp.matmul(q, xp.matrix_transpose(k)) / d**0.5  # [..., seq, d] x [..., d, keys] -> [..., seq, keys]
    position = keys - seq + backend.arange(seq, like=q)  # [seq]
    visible = backend.arange(keys, like=q)[None, :] <= position[:, None]  # [seq, keys]
    weights = softmax(xp.where(visible, scores, -math.inf))  # [..., seq, keys]
    return xp.matmul(weights, v)  # [..., seq, keys] x [..., keys, d] -> [..., seq, d]


q, k, v = random(2, 4, 3), random(2, 6, 3), random(2, 6, 3)
check(attention(q, k, v), pg.attention(q, k, v, causal=True))

# %% [markdown]
# ## The model
#
# `shakespeare` is a small GPT-2 that comes with this package. Its parameters are a nested dict. The names are those of
# OpenAI's checkpoints, and a sub-dict holds the arguments of one function.

# %%
model = pg.GPT2.load("shakespeare", backend=backend)
tokenizer, config, params = model.tokenizer, model.config, model.params
ids = tokenizer.encode("To be, or not to be, that is the question")
trace = model.trace(ids)  # the results of all ops of the package's own model, by name
print(f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} columns, {config.n_vocab} tokens")
for path, array in flatten(params["h0"]["attn"]):
    print(f"h0/attn/{path}", list(array.shape))


# %% [markdown]
# **Multi-head attention** makes queries, keys and values with one linear layer, and gives each head a part of the
# columns. `past` has the keys and values of tokens that were read before. The section about the cache uses it.


# %%
def split_heads(x):
    x = xp.reshape(x, (backend.shape(x)[0], config.n_head, config.head_size))  # [seq, n_head, d]
    return xp.permute_dims(x, (1, 0, 2))  # [n_head, seq, d]


def merge_heads(x):
    x = xp.permute_dims(x, (1, 0, 2))  # [seq, n_head, d]
    return xp.reshape(x, (backend.shape(x)[0], config.n_embd))  # [seq, n_embd]


def mha(x, c_attn, c_proj, past=None):
    n = config.n_embd
    c = linear(x, **c_attn)  # [seq, 3 n_embd]
    q, k, v = split_heads(c[:, :n]), split_heads(c[:, n : 2 * n]), split_heads(c[:, 2 * n :])  # [n_head, seq, d]
    if past is not None:
        k, v = xp.concat([past[0], k], axis=-2), xp.concat([past[1], v], axis=-2)  # [n_head, keys, d]
    a = merge_heads(attention(q, k, v))  # [seq, n_embd]
    return linear(a, **c_proj), (k, v)  # [seq, n_embd]


x = trace["h0/ln_1"][0, ...]  # [seq, n_embd]
check(mha(x, **params["h0"]["attn"])[0], trace["h0/attn/c_proj"][0, ...])


# %% [markdown]
# **The feed-forward network** works on each position separately. It expands the row to four times its width, applies
# GELU, and projects it back.


# %%
def ffn(x, c_fc, c_proj):
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # [seq, n_embd] -> [seq, 4 n_embd] -> [seq, n_embd]


check(ffn(trace["h0/ln_2"][0, ...], **params["h0"]["mlp"]), trace["h0/mlp/c_proj"][0, ...])


# %% [markdown]
# **A block** adds the results of both to its input.


# %%
def block(x, ln_1, attn, ln_2, mlp, past=None):
    a, present = mha(layer_norm(x, **ln_1), **attn, past=past)  # [seq, n_embd]
    x = x + a  # [seq, n_embd]
    return x + ffn(layer_norm(x, **ln_2), **mlp), present  # [seq, n_embd]


check(block(trace["embedding"][0, ...], **params["h0"])[0], trace["h0/residual"][0, ...])


# %% [markdown]
# **GPT-2** looks up a row for each token and a row for each position, adds them, and passes the sum through all blocks.
# The products of the last rows with all rows of the embedding matrix are the logits: one number for each token that may
# come next.


# %%
def gpt2(tokens, params, past=None):
    past, present = past or [None] * config.n_layer, []
    seq, start = backend.shape(tokens)[0], 0 if past[0] is None else backend.shape(past[0][0])[1]
    x = xp.take(params["wte"], tokens, axis=0) + params["wpe"][start : start + seq, :]  # [seq, n_embd]
    for i in range(config.n_layer):
        x, keys_and_values = block(x, **params[f"h{i}"], past=past[i])  # [seq, n_embd]
        present.append(keys_and_values)
    x = layer_norm(x, **params["ln_f"])  # [seq, n_embd]
    return xp.matmul(x, xp.matrix_transpose(params["wte"])), present  # [seq, n_vocab]


def array(ids):
    return backend.from_numpy(np.asarray(ids, np.int32))  # [seq]


gpt2 = backend.compile(gpt2)  # JAX and TensorFlow compile it for each shape; NumPy and PyTorch run it as it is
logits, _ = gpt2(array(ids), params)
check(logits, model.logits([ids])[0, ...])

# %% [markdown]
# ## Text
#
# With **the cache** a token is read once. Its keys and values are kept in `past`, and later tokens read them there. The
# logits are the same as without a cache.

# %%
_, past = gpt2(array(ids[:-1]), params)
check(gpt2(array(ids[-1:]), params, past)[0], logits[-1:, :])


# %% [markdown]
# **Generation** repeats two steps: compute the logits after the last token, and choose a token.


# %%
def generate(prompt, n, choose):
    ids = tokenizer.encode(prompt)
    new, past = ids, None
    for _ in range(n):
        logits, past = gpt2(array(new), params, past)  # [len(new), n_vocab]
        new = [choose(pg.to_numpy(logits)[-1], len(ids))]
        ids = ids + new
    return tokenizer.decode(ids)


def greedy(logits, position):
    return int(np.argmax(logits))


LENGTH = 20  # each length of the cache is a new shape
text = generate("ROMEO.", LENGTH, greedy)
print(text)
assert text == "ROMEO." + model.generate("ROMEO.", max_new_tokens=LENGTH, temperature=0)


# %% [markdown]
# **Sampling** must choose token j with the probability softmax(logits / T)[j]. The Gumbel-max method does so: it adds
# one random number to each logit, and takes the largest sum. The random numbers depend only on the seed and the
# position. So a seed gives the same text on every backend.


# %%
def sample(logits, position, temperature=0.7, seed=9):
    bits = Philox(key=[seed, 0], counter=[0, position, 0, 0]).random_raw(config.n_vocab)  # 64 random bits [n_vocab]
    uniform = ((bits >> np.uint64(12)) + 0.5) / 2**52  # [n_vocab]
    gumbel = -np.log(-np.log(uniform))  # [n_vocab]
    return int(np.argmax(logits / temperature + gumbel))


text = generate("ROMEO.", LENGTH, sample)
print(text)
assert text == "ROMEO." + model.generate("ROMEO.", max_new_tokens=LENGTH, temperature=0.7, top_k=0, seed=9)

# %% [markdown]
# ## Training
#
# The model has never seen these lines, and is going to learn them by heart.

# %%
POEM = """Shall I compare thee to a tensor's shape?
Thou art more regular, and broadcast well.
Rough casts do shake the darling bits of tape,
And float's short lease hath yet its bound to tell.
"""
ids = tokenizer.encode(POEM)
batch = backend.from_numpy(np.asarray([ids], np.int32))  # [1, seq]


# %% [markdown]
# **The loss** is the mean of -log p, where p is the probability of the token that really came next. A model that knows
# nothing has the loss log(n_vocab) = 7.6.


# %%
def loss(params):
    logits, _ = gpt2(array(ids[:-1]), params)  # [seq - 1, n_vocab]
    targets = xp.astype(batch[0, 1:], xp.int64)[:, None]  # [seq - 1, 1]
    x = logits - xp.max(logits, axis=-1, keepdims=True)  # [seq - 1, n_vocab]
    log_p = x - xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))  # [seq - 1, n_vocab]
    return -xp.mean(xp.take_along_axis(log_p, targets, axis=-1))  # []


check(loss(params), pg.loss(params, batch, config))


# %% [markdown]
# **The gradient** says how the loss changes with each parameter. Here it comes from the package, which has one rule for
# each op, and passes the rules backwards through the model. `descend` takes a step against the gradient.


# %%
def gradient(params, batch):
    _, backward = gradients.loss(params, batch, config)
    return backward()  # a dict like params


def descend(params, grads, rate):
    return map_tree(lambda p, g: p - rate * g, params, grads)


gradient = backend.compile(gradient)  # JAX and TensorFlow compile it; NumPy and PyTorch run it as it is
grads = gradient(params, batch)

# %% [markdown]
# If the gradient g is right, then a small step of size h against it reduces the loss by h |g|².

# %%
h = 1e-4
squared_norm = sum(float(xp.sum(g * g)) for _, g in flatten(grads))
change = float(loss(descend(params, grads, -h))) - float(loss(descend(params, grads, h)))
print(f"change / predicted change: {change / (2 * h * squared_norm):.2f}")
assert abs(change / (2 * h * squared_norm) - 1) < 0.01

# %% [markdown]
# **Training** repeats such steps.

# %%
trained = params
for step in range(31):
    if step % 10 == 0:
        print(f"after {step:2} steps: loss {float(loss(trained)):.2f}")
    trained = descend(trained, gradient(trained, batch), rate=0.1)

# %% [markdown]
# `pg.GPT2` puts a configuration, parameters and a tokenizer together. Two words are now enough for the whole poem.

# %%
poet = pg.GPT2(config, trained, tokenizer)
text = "Shall I" + poet.generate("Shall I", max_new_tokens=len(ids) - len(tokenizer.encode("Shall I")), temperature=0)
print(text)
assert text == POEM

# %% [markdown]
# GPT-2 as OpenAI released it is this model with other numbers: 12 layers instead of 4, 768 columns instead of 256, and
# 50,257 tokens. `pg.GPT2.load("gpt2")` loads it, and every line above works with it.
