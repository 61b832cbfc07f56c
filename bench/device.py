"""Measurements on one device, in a worker: decoding, training, checks and errors. `gpu` makes a table of them.

Each function takes the name of a backend, the name of a device and that of a shape of `checkpoints.SHAPES`, and returns
numbers. Models and trainers are kept between calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import portable_gpt2 as pg

from . import checkpoints
from .clock import in_turn

SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 7}
GREEDY = {"temperature": 0}


def describe(backend: str, device: str) -> dict[str, str]:
    """Return the framework's version and the name of the device as the framework reports it."""
    owner = pg.get_backend(backend, device)
    name = str(getattr(owner.default_device, "device_kind", device))
    if device.startswith("cuda") and backend == "torch":
        import torch

        name = torch.cuda.get_device_name(device)
    return {backend: f"{sys.modules[backend].__version__} on {name}"}


def waits(backend: str, device: str) -> Callable[[], None]:
    """Return a function that waits until the device has computed everything."""
    if backend == "torch" and device.startswith("cuda"):
        import torch

        return functools.partial(torch.cuda.synchronize, device)
    owner = pg.get_backend(backend, device)
    one = np.ones(1, np.float32)
    return lambda: owner.to_numpy(owner.from_numpy(one) + owner.from_numpy(one)) and None


def bandwidth(backend: str, device: str, megabytes: int) -> list[float]:
    """Return the GB/s at which the device sums an array, and at which it copies one (which reads and writes it)."""
    owner, wait = pg.get_backend(backend, device), waits(backend, device)
    x = owner.from_numpy(np.ones(megabytes * 250_000, np.float32))
    rates = []
    for fn, passes in ((owner.xp.sum, 1), (lambda x: x + 1, 2)):
        compiled, best = owner.compile(fn), math.inf
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(8):
                compiled(x)
            wait()
            best = min(best, (time.perf_counter() - start) / 8)
        rates.append(passes * 4 * megabytes * 250_000 / best / 1e9)
    return rates


def differing_bytes(backend: str, device: str) -> int:
    """Return the number of bytes in which the shipped model's texts differ from those of NumPy for the same seed."""
    texts = []
    for name, place in (("numpy", None), (backend, device)):
        model = pg.GPT2.load("shakespeare", backend=name, device=place)
        options = {"max_new_tokens": 64}
        pieces = [model.generate("ROMEO.", **chosen, **options) for chosen in (GREEDY, {"temperature": 0.8, "seed": 7})]
        texts.append("\n".join(pieces).encode())
    return differences(*texts)


def differences(one: bytes, other: bytes) -> int:
    """Return the number of places in which two texts differ. A place that only one of them has differs."""
    return abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))


# Decoding


@functools.cache
def _model(backend: str, device: str, shape: str, dtype: str) -> pg.GPT2:
    owner = pg.get_backend(backend, device)
    leaves = {path: owner.relayout(path, owner.from_numpy(a, dtype)) for path, a in checkpoints.tensors(shape).items()}
    return pg.GPT2(checkpoints.config(shape), pg.params.nest(leaves))


def _prompt(model: pg.GPT2, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(n).integers(0, model.config.n_vocab, n)]


def weight_bytes(backend: str, device: str, shape: str, dtype: str) -> int:
    """Load the model and return the bytes of its weights."""
    sizes = [math.prod(x.shape) for _, x in pg.params.flatten(_model(backend, device, shape, dtype).params)]
    return sum(sizes) * (4 if dtype == "float32" else 2)


def text_seconds(
    backend: str, device: str, shape: str, dtype: str, prompt: int, new: int, sampled: bool = False
) -> float:
    """Return the seconds to generate `new` tokens after a prompt, through `stream_ids`."""
    model = _model(backend, device, shape, dtype)
    ids = _prompt(model, prompt)
    start = time.perf_counter()
    for _ in model.stream_ids(ids, max_new_tokens=new, **(SAMPLED if sampled else GREEDY)):
        pass
    return time.perf_counter() - start


def token_ms(
    backend: str, device: str, shape: str, dtype: str, prompt: int, new: int, rounds: int, sampled: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of a long and of a short text, in turn; `per_token` computes the milliseconds per token."""
    return _long_and_short(
        functools.partial(text_seconds, backend, device, shape, dtype, prompt, sampled=sampled), new, rounds
    )


def _long_and_short(call: Callable[[int], float], new: int, rounds: int) -> dict[str, list[float]]:
    call(1 + new)
    return in_turn(rounds, {"long": lambda: call(1 + new), "short": lambda: call(1)})


def per_token(samples: dict[str, list[float]], new: int) -> float:
    """Return the milliseconds per token. The best long and the best short text count, whichever their rounds."""
    return (min(samples["long"]) - min(samples["short"])) / new * 1e3


def first_token_ms(backend: str, device: str, shape: str, dtype: str, prompt: int, rounds: int) -> list[float]:
    """Return the milliseconds from a prompt to its first new token, for each round after a warm-up."""
    text_seconds(backend, device, shape, dtype, prompt, 1)
    return [text_seconds(backend, device, shape, dtype, prompt, 1) * 1e3 for _ in range(rounds)]


def batch_ms(
    backend: str, device: str, shape: str, dtype: str, batch: int, prompt: int, new: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of long and short texts of a batch, which are generated as `complete` does."""
    from portable_gpt2.generation.decoder import Generation
    from portable_gpt2.sampling import Sampling

    model = _model(backend, device, shape, dtype)

    def seconds(new: int) -> float:
        texts = [Generation(_prompt(model, prompt), Sampling(**GREEDY)) for _ in range(batch)]
        start = time.perf_counter()
        for _ in model._decoder.stream(texts, new):
            pass
        return time.perf_counter() - start

    return _long_and_short(seconds, new, rounds)


def profile(backend: str, device: str, shape: str, dtype: str, prompt: int, new: int) -> dict[str, float]:
    """Return the kernels per token, the time of the kernels and the time of the host between them, in milliseconds.

    On a CPU, the kernels of PyTorch are its operations, and those of JAX are the operations of the compiled program.
    Their times overlap there, so only their number is returned. A text with one new token is subtracted, so that the
    prompt does not count.
    """
    text = functools.partial(text_seconds, backend, device, shape, dtype, prompt)
    text(1 + new)
    count = {"torch": _torch_kernels, "jax": _jax_kernels}[backend]
    (short, short_ms), (long, long_ms) = (count(functools.partial(text, n), device) for n in (1, 1 + new))
    if backend == "jax" and not long:  # JAX's profiler recorded nothing; PyTorch's sees every kernel of the process
        (short, short_ms), (long, long_ms) = (_torch_kernels(functools.partial(text, n), device) for n in (1, 1 + new))
    if long <= short:
        raise RuntimeError("the profiler recorded no kernel")
    found = {"kernels": (long - short) / new}
    if device != "cpu":
        wall = per_token(token_ms(backend, device, shape, dtype, prompt, new, 3), new)
        found |= {"device ms": (long_ms - short_ms) / new, "host ms": wall - (long_ms - short_ms) / new}
    return found


def _torch_kernels(call: Callable[[], Any], device: str) -> tuple[int, float]:
    import torch
    from torch.profiler import ProfilerActivity

    is_cuda = device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as found:
        call()
        waits("torch", device)()
    if not is_cuda:
        return sum(not event.cpu_children and event.name.startswith("aten::") for event in found.events()), 0.0
    kernels = [e for e in found.key_averages() if e.self_device_time_total > 0 and not e.key.startswith("aten::")]
    return sum(e.count for e in kernels), sum(e.self_device_time_total for e in kernels) / 1e3


def _jax_kernels(call: Callable[[], Any], device: str) -> tuple[int, float]:
    """Count the events that JAX's profiler records on the streams of a GPU, or the executed operations on a CPU."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
            waits("jax", device)()
        (file,) = Path(directory).glob("**/*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        if device == "cpu":
            events = [e for plane in planes for line in plane.lines for e in line.events]
            return sum(any(name == "hlo_op" for name, _ in e.stats) for e in events), 0.0
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name]
        events = [e for line in lines for e in line.events]
        return len(events), sum(e.duration_ns for e in events) / 1e6


def compiled_step_ms(device: str, shape: str, dtype: str, prompt: int, new: int) -> list[float]:
    """Return the milliseconds of a decode step that torch.compile compiles, replayed as a CUDA graph.

    Also return the seconds of the compilation. The prompt's keys and values are zeros, and the greedy token stays on
    the device.
    """
    import torch

    model = _model("torch", device, shape, dtype)
    c = model.config
    cache = pg.new_cache(model.params, c, batch=1, capacity=prompt + 64)
    token = torch.zeros((1, 1), dtype=torch.int32, device=device)
    position = torch.tensor(prompt, device=device)

    def step(token: Any, position: Any, k: Any, v: Any) -> Any:
        logits, _ = pg.gpt2(model.params, token, c, cache._replace(k=k, v=v, position=position))
        return torch.argmax(logits[:, -1], -1, keepdim=True).to(torch.int32)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(3):
            compiled(token, position, cache.k, cache.v)
        torch.cuda.synchronize()
        compiling = time.perf_counter() - start
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token.copy_(compiled(token, position, cache.k, cache.v))
        graph.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(new):
            graph.replay()
        torch.cuda.synchronize()
    return [(time.perf_counter() - start) / new * 1e3, compiling]


# Training


@functools.cache
def _training(backend: str, device: str, shape: str, dtype: str) -> list[Any]:
    from portable_gpt2.training import Recipe, Trainer

    owner, c = pg.get_backend(backend, device), checkpoints.config(shape)
    trainer = Trainer(c, Recipe(dtype=dtype, steps=1000), owner)
    return [trainer, trainer.start(pg.init_params(c, seed=0, backend=owner, scale_residual=True))]


def train(
    backend: str, device: str, shape: str, dtype: str, batch: int, length: int, steps: int
) -> dict[str, list[float]]:
    """Take some steps; return the loss and the seconds of each."""
    trainer, state = learner = _training(backend, device, shape, dtype)
    random, found = np.random.default_rng(0), {"losses": [], "seconds": []}
    for _ in range(steps):
        windows = random.integers(0, trainer.config.n_vocab, (batch, length + 1))
        start = time.perf_counter()
        state, loss, _ = trainer.step(state, [windows])
        found["losses"].append(float(loss))
        found["seconds"].append(time.perf_counter() - start)
        learner[1] = state
    return found


def _learnable(step: int, n_vocab: int, batch: int, length: int) -> np.ndarray:
    """Return windows of a text in which each token determines the next, so that the loss falls in a few steps."""
    n = min(n_vocab, 97)
    first = np.random.default_rng(step).integers(0, n, (batch, 1))
    return (first + 7 * np.arange(length + 1)) % n


def loss_difference(side: str, device: str, shape: str, batch: int, length: int, steps: int) -> float:
    """Return the largest difference of the losses in bfloat16 and in float32 over the first steps, in nats.

    The side is a backend, or transformers with autocast. Both dtypes begin with the same weights.
    """
    from portable_gpt2.training import Recipe, Trainer, learning_rate

    recipe = Recipe(steps=steps, warmup=5, learning_rate=3e-3)

    def ours(dtype: str) -> Iterator[float]:
        owner, c = pg.get_backend(side, device), checkpoints.config(shape)
        trainer = Trainer(c, dataclasses.replace(recipe, dtype=dtype), owner)
        state = trainer.start(pg.init_params(c, seed=0, backend=owner, scale_residual=True))
        for step in range(steps):
            state, loss, _ = trainer.step(state, [_learnable(step, c.n_vocab, batch, length)])
            yield loss

    def theirs(dtype: str) -> Iterator[float]:
        import torch

        torch.manual_seed(0)
        model, optimizer = _transformers.__wrapped__(device, shape, dtype, True)
        for step in range(steps):
            tokens = torch.from_numpy(_learnable(step, model.config.vocab_size, batch, length)).to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            yield _step_of_transformers(model, optimizer, tokens, dtype)

    losses = [list((theirs if side == "transformers" else ours)(dtype)) for dtype in ("float32", "bfloat16")]
    return max(abs(low - high) for high, low in zip(*losses, strict=True))


def peak_gigabytes(backend: str, device: str) -> float | None:
    """Return the largest amount of memory that the worker's arrays took on the device; None if it is not known."""
    if backend in ("torch", "transformers"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None
    found = pg.get_backend(backend, device).default_device.memory_stats()
    return found["peak_bytes_in_use"] / 1e9 if found else None


# Transformers


@functools.cache
def _transformers(device: str, shape: str, dtype: str, training: bool) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    c = checkpoints.config(shape)
    size = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.n_ctx}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**size, **dropout, vocab_size=c.n_vocab, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).to(device)
    if not training:
        return model.eval().to(getattr(torch, dtype))
    model.config.use_cache = False
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.startswith("cuda"))


def peer_token_ms(
    device: str, shape: str, dtype: str, prompt: int, new: int, rounds: int, static: bool
) -> dict[str, Any]:
    """Return transformers' milliseconds per token in eager mode, or with a static cache and its compiled step.

    Also return the seconds of the first text.
    """
    import torch

    model = _transformers(device, shape, dtype, False)
    ids = torch.arange(prompt, device=device)[None] % model.config.vocab_size
    options = {"cache_implementation": "static"} if static else {}
    wait = waits("torch", device)

    def seconds(new: int) -> float:
        wait()
        start = time.perf_counter()
        length = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)
        wait()
        return time.perf_counter() - start

    first = seconds(1 + new)
    return {"first": first, "samples": _long_and_short(seconds, new, rounds)}


def peer_train(device: str, shape: str, dtype: str, batch: int, length: int, steps: int) -> dict[str, list[float]]:
    """Take some steps with transformers, fused AdamW and autocast for bfloat16; return the seconds of each."""
    import torch

    model, optimizer = _transformers(device, shape, dtype, True)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length + 1), device=device)
    found: dict[str, list[float]] = {"seconds": []}
    for _ in range(steps):
        start = time.perf_counter()
        _step_of_transformers(model, optimizer, tokens, dtype)
        found["seconds"].append(time.perf_counter() - start)
    return found


def _step_of_transformers(model: Any, optimizer: Any, tokens: Any, dtype: str) -> float:
    import torch

    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value: float = loss.item()
    return value


# Errors


def function_errors(backend: str, device: str, points: int) -> dict[str, list[float]]:
    """Return the largest error of exp, tanh and log in float32, in units of u, and the stated one."""
    from portable_gpt2.numerics import stated
    from portable_gpt2.testing import measure

    owner = pg.get_backend(backend, device)
    numerics = stated(owner, "float32")
    largest = {"exp": numerics.exp[0], "tanh": numerics.tanh, "log": numerics.log}
    found = {name: measure.measure(owner, "float32", name, points) for name in measure.FUNCTIONS}
    return {name: [measured.largest, largest[name]] for name, measured in found.items()}
