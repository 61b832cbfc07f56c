"""What a user writes, for mypy --strict alone: the public names have types that hold in other people's code."""

from collections.abc import Iterator

import numpy as np

import portable_gpt2 as pg


def continue_texts(directory: str) -> list[str]:
    model: pg.GPT2 = pg.GPT2.load(directory, backend="torch", device="cpu", dtype="float32")
    whole: str = model.generate("To be", max_new_tokens=40, temperature=0.8, top_p=0.9, seed=7, stop=["\n", 13])
    pieces: Iterator[str] = model.stream("To be", top_k=None, min_p=0.05, repetition_penalty=1.1)
    ids: Iterator[int] = model.stream_ids(np.asarray([464, 3290]), max_new_tokens=3, sliding=True)
    several: list[str] = model.generate(["To be", "Or not"])
    completions: Iterator[pg.Completion] = model.complete(["To be"], num_samples=3)
    return [whole, *pieces, *several, *map(str, ids), *(c.text + c.finish_reason for c in completions)]


def score(model: pg.GPT2, texts: list[str]) -> float:
    one: pg.Score = model.score("To be", stride=128, bos=True)
    scores: list[pg.Score] = model.score(texts)
    return one.perplexity + sum(each.total for each in scores)


def compute(model: pg.GPT2) -> np.ndarray:
    found = model.trace("To be")
    cache = pg.new_cache(model.params, model.config, batch=2, padding=[0, 3])
    tokens = model.backend.from_numpy(np.zeros((2, 5), np.int32))
    logits, cache = pg.gpt2(model.params, tokens, model.config, cache)
    x = pg.softmax(pg.conv1d(logits, model.backend.xp.ones((3, 2)), found["h0/residual"]), axis=-1)
    return pg.to_numpy(x)


def trace(port: object, x: np.ndarray) -> pg.Trace:
    pg.probe(port, {"blocks.{}.norm1": "h{}/ln_1"}, config=pg.GPT2Config())
    found: pg.Trace = pg.Trace("mine", np.asarray([5, 3]), {"h0/ln_1": x}, "bfloat16")
    found.save("mine.npz", force=True)
    return pg.Trace.load("mine.npz")


def misspell(x: np.ndarray) -> None:
    pg.softmax(x, axs=1)  # type: ignore[call-arg]
    pg.softmax.reference(x, axs=1)  # type: ignore[call-arg]
    pg.layer_norm(x, x)  # type: ignore[call-arg]
    pg.attention(x, x, x, scale="0.5")  # type: ignore[arg-type]


def tokenize(directory: str) -> str:
    tokenizer: pg.Tokenizer | None = pg.Tokenizer.load(directory)
    return "" if tokenizer is None else tokenizer.decode(tokenizer.encode("To be", allow_special=True))


def configure() -> pg.GPT2Config:
    with pg.use_backend("jax") as backend:
        names: list[str] = [backend.name, *pg.available_backends(), *backend.devices()]
    return pg.GPT2Config(n_layer=len(names), n_head=2, n_embd=64)


def misuse(model: pg.GPT2) -> None:
    """Each line is an error: under --strict, mypy reports an ignored error that does not occur."""
    model.generate("a", temperatur=1)  # type: ignore[call-overload]
    model.generate(["a"], num_samples=2, top_k="40")  # type: ignore[call-overload]
    model.stream("a", batch_size=2)  # type: ignore[call-arg]
    model.stream_ids([1], top_p="0.9")  # type: ignore[arg-type]
    list(model.complete(["a"], sliding=2.5))  # type: ignore[arg-type]
