"""Training in a worker: portable_gpt2 on one backend, or transformers with PyTorch's AdamW.

All learners train on the same windows of text.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

import portable_gpt2 as pg
from portable_gpt2.training import Recipe, Trainer, batch, learning_rate, windows
from portable_gpt2.training.data import open_tokens

CONFIG = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_ctx": 256}
LENGTH = CONFIG["n_ctx"] + 1


class _Ours:
    def __init__(self, backend: str, n_vocab: int, recipe: Recipe) -> None:
        config = pg.GPT2Config(n_vocab=n_vocab, eos_token_id=0, **CONFIG)
        self.trainer = Trainer(config, recipe, pg.get_backend(backend))
        options = {"backend": backend, "scale_residual": True}  # the initial distributions of transformers
        self.state = self.trainer.start(pg.init_params(config, seed=recipe.seed, **options))

    def step(self, tokens: np.ndarray) -> float:
        self.state, loss, _ = self.trainer.step(self.state, [tokens])
        return loss

    def evaluate(self, held_out: np.ndarray) -> float:
        return self.trainer.evaluate(self.state.params, held_out)


class _Transformers:
    def __init__(self, n_vocab: int, recipe: Recipe) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(recipe.seed)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        shape = {**CONFIG, "n_positions": CONFIG["n_ctx"]}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=n_vocab, use_cache=False, **shape, **dropout, **ends)
        self.torch, self.recipe, self.steps = torch, recipe, 0
        self.model = transformers.GPT2LMHeadModel(config).train()
        self.leaves = list(self.model.parameters())
        groups = [
            {"params": [x for x in self.leaves if x.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [x for x in self.leaves if x.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)

    def _loss(self, tokens: np.ndarray) -> Any:
        ids = self.torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids[:, :-1]).logits
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def step(self, tokens: np.ndarray) -> float:
        loss = self._loss(tokens)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.leaves, self.recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, self.recipe)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.item()

    def evaluate(self, held_out: np.ndarray) -> float:
        size = self.recipe.batch_size
        with self.torch.inference_mode():
            parts = [held_out[i : i + size] for i in range(0, len(held_out), size)]
            return sum(len(part) * self._loss(part).item() for part in parts) / len(held_out)


@functools.cache
def _learner(side: str, n_vocab: int, seed: int, steps: int) -> _Ours | _Transformers:
    recipe = Recipe(steps=steps, seed=seed)
    return _Transformers(n_vocab, recipe) if side == "transformers" else _Ours(side, n_vocab, recipe)


def train(
    side: str, file: str, n_training: int, n_vocab: int, seed: int, steps: int, first: int, last: int
) -> list[list[float]]:
    """Take the steps `first` to `last` - 1 of a training of `steps` steps.

    Return the loss of each step and the seconds that it took.
    """
    learner, tokens = _learner(side, n_vocab, seed, steps), open_tokens(file, n_vocab)[:n_training]
    found = []
    for i in range(first, last):
        start = time.perf_counter()
        text = batch(tokens, i, batch_size=Recipe().batch_size, length=LENGTH, seed=seed)
        found.append([learner.step(text), time.perf_counter() - start])
    return found


def evaluate(side: str, file: str, n_training: int, n_vocab: int, seed: int, steps: int) -> float:
    """Return the mean loss over the complete windows of the held-out tokens."""
    tokens = open_tokens(file, n_vocab)[n_training:]
    return _learner(side, n_vocab, seed, steps).evaluate(windows(tokens, LENGTH))
