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
# # Train and fine-tune
#
# This notebook trains two models on the same text, which is the reference manual that comes with Python. The first
# model starts from random numbers. The second one starts from `shakespeare`, which comes with this package. At the end,
# text that neither of them has read shows which model is better.
#
# The command `portable-gpt2 train` does the same with checkpoints, evaluations and a plot, and can be interrupted.

# %%
import random
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np

import portable_gpt2 as pg
from portable_gpt2 import training

backend = pg.get_backend()  # the one that PORTABLE_GPT2_BACKEND names, or NumPy

# %% [markdown]
# ## The text
#
# The manual has about 80 topics. A few of them are held out: they are never trained on. A loss on them says how well a
# model predicts new text of the same kind.

# %%
texts = [topics[name] for name in sorted(topics)]
random.Random(0).shuffle(texts)
held_out_text, training_text = "\n\n".join(texts[:4]), "\n\n".join(texts[4:])
print(f"{len(training_text):,} characters for training, {len(held_out_text):,} held out")
print(held_out_text[:240])


# %% [markdown]
# ## The loop
#
# A training step reads a batch of windows of the text. It computes the loss, which is the mean of -log p of each token
# that really came next, and its gradient. Then AdamW changes the parameters. `Trainer.step` does all of this, and
# `training.batch` chooses the windows from the seed and the number of the step. So all backends read the same windows.

# %%
CONTEXT = 96  # the number of tokens in a window


def train(name, config, params, tokenizer, steps, learning_rate):
    """Train a model. Return it, and its losses: those of each step, and the held-out losses, in nats per byte."""
    recipe = training.Recipe(
        steps=steps, batch_size=8, context=CONTEXT, learning_rate=learning_rate, warmup=10, min_lr_ratio=0.1
    )
    trainer = training.Trainer(config, recipe, backend)
    tokens, held_out = (np.asarray(tokenizer.encode(text)) for text in (training_text, held_out_text))
    per_byte = len(held_out) / len(held_out_text.encode())  # tokens per byte
    windows = training.windows(held_out, CONTEXT + 1)[:16]
    state, losses, evaluations = trainer.start(params), [], []
    for step in range(steps + 1):
        if step % 20 == 0 or step == steps:
            evaluations.append((step, trainer.evaluate(state.params, windows) * per_byte))
        if step < steps:
            batch = training.batch(tokens, step, batch_size=8, length=CONTEXT + 1, seed=0)
            state, loss, _ = trainer.step(state, [batch])
            losses.append(loss * per_byte)
    print(f"{name}: held-out loss from {evaluations[0][1]:.2f} to {evaluations[-1][1]:.2f} nats per byte")
    return pg.GPT2(config, state.params, tokenizer), losses, evaluations


# %% [markdown]
# A loss in nats per token depends on the tokenizer: a model with longer tokens has fewer and harder predictions. Losses
# per byte can be compared between tokenizers.
#
# ## From scratch
#
# A tokenizer learns which pairs of bytes, and of their merges, are frequent in the text.

# %%
tokenizer = training.train_tokenizer([training_text], 512)
print([tokenizer.decode([i]) for i in tokenizer.encode("A function definition is an executable statement.")])

# %% [markdown]
# The new model has two layers with two heads each, and random parameters.

# %%
config = pg.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_vocab=512, n_ctx=CONTEXT, eos_token_id=tokenizer.end_of_text)
params = pg.init_params(config, seed=0, backend=backend)
print(f"{pg.params.count(config):,} parameters")
SCRATCH_STEPS = 200
scratch, scratch_losses, scratch_evaluations = train(
    "from scratch", config, params, tokenizer, SCRATCH_STEPS, learning_rate=5e-3
)

# %% [markdown]
# ## Fine-tuning
#
# `shakespeare` has learned English from plays of around 1600. It has its own tokenizer.

# %%
shakespeare = pg.GPT2.load("shakespeare", backend=backend)
print(f"{pg.params.count(shakespeare.config):,} parameters")
TUNED_STEPS = 60
tuned, tuned_losses, tuned_evaluations = train(
    "fine-tuned", shakespeare.config, shakespeare.params, shakespeare.tokenizer, TUNED_STEPS, learning_rate=1e-3
)
assert tuned_evaluations[-1][1] < tuned_evaluations[0][1]
assert scratch_evaluations[-1][1] < scratch_evaluations[0][1]

# %% [markdown]
# ## The curves
#
# The lines are the losses of the training batches, and the markers are the losses of the held-out text.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, losses, evaluations, color, marker in [
    ("from scratch", scratch_losses, scratch_evaluations, "0.6", "s"),
    ("fine-tuned", tuned_losses, tuned_evaluations, "black", "o"),
]:
    axes.plot(range(len(losses)), losses, color=color, linewidth=0.8, label=f"{name}, training")
    axes.plot(*zip(*evaluations, strict=True), marker, color=color, label=f"{name}, held out")
axes.set(xlabel="step", ylabel="loss [nats per byte]", ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# The training loss has noise, because each step reads other windows. Where a held-out loss rises while the training
# loss falls, a model learns its text by heart; so short a training is far from that.
#
# ## Before and after

# %%
PROMPT = "The value of the"
options = {"max_new_tokens": 40, "temperature": 0.7, "seed": 1}
for name, model in [("shakespeare", shakespeare), ("fine-tuned", tuned), ("from scratch", scratch)]:
    print(f"--- {name}\n{PROMPT}{model.generate(PROMPT, **options)}")

# %% [markdown]
# After so few steps none of the texts makes sense, but their form has changed from verse to a manual. `model.save`
# writes the model as a checkpoint, which transformers reads as well.
