"""Checkpoints with random weights, which the benchmark creates itself: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "124M": {},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    # the shape of `shakespeare`, the model that ships with the package
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_ctx": 256, "n_vocab": 2048, "eos_token_id": None},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_vocab": 64, "eos_token_id": None},
}


def config(name: str) -> Any:
    """Return the configuration of one of SHAPES."""
    import portable_gpt2 as pg

    return pg.GPT2Config(**SHAPES[name])


def tensors(name: str) -> dict[str, np.ndarray]:
    """Return the random float32 weights of one of SHAPES, by path."""
    from portable_gpt2.params import shapes

    random = np.random.default_rng(0)
    found = {}
    for path, shape in shapes(config(name)).items():
        if path.endswith(("/b", "/g")):
            found[path] = np.full(shape, float(path.endswith("g")), np.float32)
        else:
            found[path] = random.standard_normal(shape, np.float32)
            found[path] *= 0.02
    return found


def make(name: str, directory: str) -> None:
    """Write a checkpoint of one of SHAPES into a directory.

    The shape ``small`` gets a tokenizer, which is trained on the code of portable_gpt2.
    """
    import portable_gpt2 as pg
    from portable_gpt2.params import nest

    pg.GPT2(config(name), nest(tensors(name))).save(directory)
    if name == "small":
        _train_tokenizer(config(name).n_vocab).model.save(directory)


def _train_tokenizer(n_vocab: int) -> Any:
    import tokenizers

    import portable_gpt2 as pg

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=n_vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file) for file in sorted(Path(pg.__file__).parent.glob("*.py"))], trainer)
    return tokenizer
