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
# # Look inside
#
# What does a GPT-2 compute between the tokens and the logits? This notebook shows where attention looks, and what each
# layer would predict. Then it trains a small model until it has an *induction head*: a head that finds what followed
# the last time.

# %%
import matplotlib.pyplot as plt
import numpy as np

import portable_gpt2 as pg
from portable_gpt2.params import flatten, nest
from portable_gpt2.training import Recipe, Trainer

backend = pg.get_backend()  # the one that PORTABLE_GPT2_BACKEND names, or NumPy

# %% [markdown]
# ## The results of all operations
#
# `trace` returns the result of each operation by its name.

# %%
model = pg.GPT2.load("shakespeare", backend=backend)
text = "To be, or not to be, that is the"
tokens = [model.tokenizer.decode([i]) for i in model.tokenizer.encode(text)]
trace = {name: pg.to_numpy(array) for name, array in model.trace(text).items()}
for name, array in trace.items():
    if "/" not in name or name.startswith("h0/"):
        print(f"{name:18} {list(array.shape)}")

# %% [markdown]
# ## Where attention looks
#
# Each of the 16 squares is a head. A row is the token that looks, and a column is the token that is looked at. The
# darker a cell, the larger is its weight. The upper right half is empty, because no token sees a later one.

# %%
n_layer, n_head = model.config.n_layer, model.config.n_head
figure, grid = plt.subplots(n_layer, n_head, figsize=(7, 7.4), layout="constrained", squeeze=False)
for layer in range(n_layer):
    for head in range(n_head):
        axes = grid[layer, head]
        axes.imshow(trace[f"h{layer}/attn/weights"][0, head], cmap="Greys", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks(range(len(tokens)), tokens if head == 0 else [""] * len(tokens), fontsize=6)
plt.show()

# %% [markdown]
# ## The logit lens
#
# Each layer adds something to the *residual stream*, a row of numbers for each token, and the logits are computed from
# the stream after the last layer. The logit lens (nostalgebraist, 2020) computes them after each layer: what would the
# model predict if it ended there?

# %%
lens = []
for layer in range(n_layer):
    stream = backend.from_numpy(trace[f"h{layer}/residual"])
    lens.append(pg.softmax(pg.unembed(pg.layer_norm(stream, **model.params["ln_f"]), model.params["wte"])))
lens = np.stack([pg.to_numpy(p)[0] for p in lens])  # [layer, position, token]
assert np.array_equal(lens[-1].argmax(-1), trace["logits"][0].argmax(-1))  # the last layer's are the model's

figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
image = axes.imshow(lens.max(-1), cmap="Greys", vmin=0, vmax=1, aspect="auto", origin="lower")
for layer in range(n_layer):
    for position in range(len(tokens)):
        p = lens[layer, position].max()
        word = model.tokenizer.decode([int(lens[layer, position].argmax())]).replace("\n", "↵").strip(" ")
        axes.text(position, layer, word, ha="center", va="center", fontsize=7, color="white" if p > 0.5 else "black")
axes.set_xticks(range(len(tokens)), tokens, fontsize=7)
axes.set_yticks(range(n_layer))
axes.set(xlabel="token that was read", ylabel="layer")
figure.colorbar(image, label="probability")
plt.show()

# %% [markdown]
# Each cell has the most likely next token after a layer. The top row is the prediction of the model.
#
# ## A task that needs induction
#
# An induction head looks for earlier copies of the current token, and at the tokens *after* them: it finds "A B ... A"
# and predicts "B" (Olsson and others, "In-context Learning and Induction Heads", 2022). This small task cannot be
# solved without one. Each text has a secret rule: to each of 8 letters belongs one letter that follows it. One letter
# in seven breaks the rule. The rule is different in each text, so the model cannot learn it by heart. It must find it
# in the text.

# %%
LETTERS, LENGTH, BATCH = 8, 48, 32
rng = np.random.default_rng(0)


def secret_text():
    rule = rng.integers(0, LETTERS, LETTERS)  # rule[a] follows a
    text = [int(rng.integers(LETTERS))]
    while len(text) < LENGTH:
        text.append(int(rule[text[-1]] if rng.random() > 0.15 else rng.integers(LETTERS)))
    return text


def batch():
    return np.asarray([secret_text() for _ in range(BATCH)], np.int32)


for text in batch()[:3]:
    print("".join("abcdefgh"[token] for token in text))

# %% [markdown]
# ## The model
#
# Two layers are the least: one has to note for each token which token precedes it, and another has to look for the
# current token in these notes. The usual initial numbers suit a model with 768 columns, and this one has 64. So all
# matrices are multiplied by 6.25, which gives the standard deviation 1/sqrt(64). The positions start as sines and
# cosines, as in Vaswani and others, 2017: a head then learns sooner to look one position back.

# %%
config = pg.GPT2Config(n_layer=2, n_head=4, n_embd=64, n_vocab=LETTERS, n_ctx=LENGTH, eos_token_id=None)
initial = {
    path: 6.25 * x if path.endswith("/w") or path == "wte" else x
    for path, x in flatten(pg.init_params(config, backend=backend))
}
angles = np.arange(LENGTH)[:, None] * 100.0 ** (-np.arange(0, 64, 2) / 64)  # [position, 32]
initial["wpe"] = backend.from_numpy(0.2 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1), "float32")


# %% [markdown]
# The *induction score* of a head is the weight that it gives to tokens that followed an earlier copy of the current
# token.


# %%
def attention_weights(params, tokens):
    found = {}
    pg.gpt2(params, tokens, config, observe=found.__setitem__)
    return [found[f"h{layer}/attn/weights"] for layer in range(config.n_layer)]  # [text, head, query, key]


attention_weights = backend.compile(attention_weights)
examples = batch()
previous = np.concatenate([np.full((BATCH, 1), -1), examples[:, :-1]], axis=1)  # the letter before each key
followed = np.tril(examples[:, :, None] == previous[:, None, :])  # [text, query, key]
has_copy = followed.any(axis=-1)  # [text, query]


def induction_scores(params):
    """Return the score of each head [layer, head]."""
    weights = attention_weights(params, backend.from_numpy(examples))
    return np.asarray(
        [
            [(pg.to_numpy(layer)[:, head] * followed).sum(-1)[has_copy].mean() for head in range(config.n_head)]
            for layer in weights
        ]
    )


keys = np.arange(1, LENGTH + 1)  # the number of keys that each query sees
chance = (followed.sum(-1) / keys)[has_copy].mean()
print(f"The score of a head that looks at all tokens equally is {chance:.2f}.")

# %% [markdown]
# ## Training

# %%
STEPS = 400
trainer = Trainer(
    config, Recipe(steps=STEPS, batch_size=BATCH, learning_rate=3e-3, warmup=20, weight_decay=0.01), backend
)
state, losses, scores = trainer.start(nest(initial)), [], []
for step in range(STEPS + 1):
    if step % 20 == 0:
        scores.append(induction_scores(state.params))
    if step < STEPS:
        state, loss, _ = trainer.step(state, [batch()])
        losses.append(loss)
scores = np.stack(scores)  # [evaluation, layer, head]

figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
above.plot(losses, color="0.5", linewidth=0.8)
above.set(ylabel="loss [nats per letter]", ylim=(0, None))
for layer, style in [(0, "--"), (1, "-")]:
    for head in range(config.n_head):
        label = f"layer {layer}, each head" if head == 0 else None
        below.plot(20 * np.arange(len(scores)), scores[:, layer, head], style, color="black", linewidth=1, label=label)
below.axhline(chance, color="0.6", linewidth=1, linestyle=":", label="all tokens equally")
below.set(xlabel="step", ylabel="induction score", ylim=(0, 1))
below.legend()
plt.show()

# %% [markdown]
# At first the model learns how frequent the letters of a text are, and for more than half of the steps it learns little
# else. Then heads of the second layer turn into induction heads, and the loss falls again. These are the final scores:

# %%
for layer in range(config.n_layer):
    print(f"layer {layer}:", "  ".join(f"head {head} {scores[-1, layer, head]:.2f}" for head in range(config.n_head)))
best = int(scores[-1, 1].argmax())
assert scores[-1, 1, best] > 0.6 or STEPS < 400  # a test takes fewer steps

# %% [markdown]
# Here is the head with the largest score in a text. The circles are where an induction head must look: at letters that
# followed an earlier copy of the letter of the row.

# %%
weights = pg.to_numpy(attention_weights(state.params, backend.from_numpy(examples))[1])[0, best, :24, :24]
letters = ["abcdefgh"[token] for token in examples[0, :24]]
figure, axes = plt.subplots(figsize=(5.6, 5), layout="constrained")
image = axes.imshow(weights, cmap="Greys", vmin=0, vmax=1)
queries, keys = np.nonzero(followed[0, :24, :24])
axes.plot(keys, queries, "o", markerfacecolor="none", markeredgecolor="0.5", markersize=9)
axes.set_xticks(range(24), letters)
axes.set_yticks(range(24), letters)
axes.set(xlabel="letter that is looked at", ylabel="letter that looks")
figure.colorbar(image, label="weight")
plt.show()


# %% [markdown]
# ## Does the model need it?
#
# A head that looks at the right place need not be used. So each head is switched off in turn: the rows of `c_proj` that
# read its result become 0. The loss of the same texts says what the model has lost.


# %%
def without(layer, head):
    d = config.head_size
    w = pg.to_numpy(state.params[f"h{layer}"]["attn"]["c_proj"]["w"]).copy()
    w[head * d : (head + 1) * d] = 0
    changed = {**dict(flatten(state.params)), f"h{layer}/attn/c_proj/w": backend.from_numpy(w)}
    return trainer.evaluate(nest(changed), examples)


print(f"all heads: loss {trainer.evaluate(state.params, examples):.2f}")
for layer in range(config.n_layer):
    found = "  ".join(f"head {head} {without(layer, head):.2f}" for head in range(config.n_head))
    print(f"without one head of layer {layer}:  {found}")

# %% [markdown]
# The heads of the first layer matter as well. What do they do? The induction heads can find "the letter after an
# earlier copy" only if each position knows the letter before it. So a head of the first layer must look one position
# back. This is the mean weight that each of them gives to the position before:

# %%
first = pg.to_numpy(attention_weights(state.params, backend.from_numpy(examples))[0])  # [text, head, query, key]
print("  ".join(f"head {head} {np.diagonal(first[:, head], -1, 1, 2).mean():.2f}" for head in range(config.n_head)))
