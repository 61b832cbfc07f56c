"""GPT-2 in other libraries, in a worker: greedy decoding with random float32 weights of the 124M shape."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np

# For each framework, the libraries that run GPT-2 on it: the name in the table, and the name of the module.
# No other library runs GPT-2 on NumPy at this speed, so NumPy is compared with the library that most people use.
PEERS = {
    "numpy": {"transformers": "transformers"},
    "torch": {"transformers": "transformers", "KerasHub": "keras_hub"},
    "jax": {"KerasHub": "keras_hub"},
    "tensorflow": {"KerasHub": "keras_hub"},
}


@functools.cache
def _transformers() -> Callable[[int, int], object]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()

    def run(prompt: int, new: int) -> object:
        ids = torch.arange(prompt)[None]
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 50256}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return run


@functools.cache
def _keras_hub() -> Callable[[int, int], object]:
    from keras_hub.models import GPT2Backbone, GPT2CausalLM

    backbone = GPT2Backbone(
        vocabulary_size=50257,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=1024,
    )
    model = GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")

    def run(prompt: int, new: int) -> object:
        ids = np.zeros((1, prompt + new), "int32")
        ids[:, :prompt] = np.arange(prompt)
        mask = (np.arange(prompt + new)[None] < prompt).astype("int32")
        return model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)

    return run


def generate(peer: str, prompt: int, new: int) -> float:
    """Return the seconds that a library takes to generate `new` tokens after a prompt of `prompt` tokens.

    KerasHub runs on the framework that the environment variable KERAS_BACKEND names.
    """
    run = {"transformers": _transformers, "KerasHub": _keras_hub}[peer]()
    start = time.perf_counter()
    run(prompt, new)
    return time.perf_counter() - start
