"""Small GPT-2 models that a test can write, load and run, with weights that give distinct logits, and a tokenizer."""

import functools

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import portable_gpt2 as pg
from portable_gpt2.params import nest, shapes

CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_vocab=384, n_ctx=64, eos_token_id=0)

TEXT = (
    """To be, or not to be: that is the question. We've 12 apples, they'll have 345; don't say I'm wrong.
Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune.
Быть или не быть, вот в чём вопрос. Être ou ne pas être, là est la question. Sein oder Nichtsein, das ist die Frage.
生きるべきか死ぬべきか、それが問題だ。 存在还是毁灭 这是一个值得考虑的问题。 죽느냐 사느냐 그것이 문제로다.
أكون أو لا أكون، تلك هي المسألة. להיות או לא להיות, זאת השאלה. 🙂🙃 👩‍👩‍👧 x² + y² = z²
"""
    * 3
)


def weights(config=CONFIG, seed=0):
    """Return float32 parameters by path. None is 0 or 1, and changing any of them changes the logits."""
    rng = np.random.default_rng(seed)

    def value(path, shape):
        noise = rng.standard_normal(shape)
        scale = {"g": 0.2, "b": 0.2, "w": shape[0] ** -0.5}.get(path.rpartition("/")[2], 0.5)
        return ((path.endswith("/g")) + scale * noise).astype(np.float32)

    return {path: value(path, shape) for path, shape in shapes(config).items()}


def model(backend, config=CONFIG, *, seed=0, dtype="float32", tokenizer=None):
    """Return a GPT2 on a backend. Its parameters are the same on every backend."""
    return pg.GPT2(
        config, nest({path: backend.from_numpy(a, dtype) for path, a in weights(config, seed).items()}), tokenizer
    )


@functools.cache
def byte_level_bpe(special="in the vocabulary"):
    """Train a byte-level BPE of 384 entries with the tokenizers package and return it as JSON.

    The special token <|endoftext|> is in the BPE's own vocabulary (id 0), as in the published files; or it is an added
    token (``added``, id 383); or there is no such token.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    inside = special == "in the vocabulary"
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.n_vocab - (special == "added"),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"] if inside else [],
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    if special == "added":
        trained.add_special_tokens(["<|endoftext|>"])
    assert trained.get_vocab_size() == CONFIG.n_vocab
    return trained.to_str()


def write_tokenizer(directory, layout="files"):
    """Write a tokenizer as vocab.json and merges.txt (``files``), or as tokenizer.json (``json``, ``json, added``)."""
    trained = tokenizers.Tokenizer.from_str(byte_level_bpe("added" if layout == "json, added" else "in the vocabulary"))
    if layout == "files":
        trained.model.save(str(directory))
    else:
        trained.save(str(directory / "tokenizer.json"))


def endless(tokenizer):
    """Return a model whose texts end only at their largest number of tokens, and which takes minutes to get there."""
    config = pg.GPT2Config(**{**vars(CONFIG), "n_ctx": 100_000, "eos_token_id": None})
    always = weights(config)  # the same logits at each position, and never <|endoftext|>
    always["ln_f/g"][:] = 0
    always["wte"][tokenizer.end_of_text] = -50 * always["ln_f/b"] / np.square(always["ln_f/b"]).sum()
    return pg.GPT2(config, nest(always), tokenizer)
