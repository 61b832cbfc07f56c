"""What a mesh of devices costs on paper: ``python -m bench.mesh_model`` prints the tables as Markdown.

A mesh has two axes. The batch is divided over the axis ``data``, and the weights are divided over the axis ``model``:
the columns of c_attn and c_fc, the rows of both c_proj, and the rows of wte. The functions compute, for one device, the
memory that it holds and the bytes that it sends, and the time on the hardware of `Hardware`. Nothing is measured.

docs/explanation/meshes-on-paper.md has the tables, the formulas, and the list of costs that are left out.
`mesh_compiled` compares the collectives with those of a compiled program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import portable_gpt2 as pg
from portable_gpt2 import params

SIZES = ("124M", "355M", "774M", "1558M")
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BYTES = {"float32": 4, "bfloat16": 2}
WIDE = 4
"""The bytes of a float32 or an int32 number: master parameters, gradients, moments, statistics, and ids."""

COLUMNS = ("*/c_attn/[wb]", "*/c_fc/[wb]")
ROWS = ("*/c_proj/w",)
VOCABULARY = ("wte", "lm_head")


# What the tables are about

CONTEXT = 1024
STEP = 512
"""The windows of a training step, of 1,024 tokens each: half a million tokens."""
MICRO_BATCH = 8
SETTINGS = (("bfloat16", 1), ("float32", 1), ("bfloat16", 64))
"""The dtypes and batches of the tables of decoding, after KEYS tokens of each text."""
KEYS, TOP_K = 512, 40


class Mesh(NamedTuple):
    """The number of devices along each axis."""

    data: int = 1
    model: int = 1

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.model


class Hardware(NamedTuple):
    """The hardware, in bytes, seconds, and floating-point operations. The page names the sources of the defaults."""

    memory: float = 80e9
    memory_bandwidth: float = 3.35e12
    flops_16: float = 989e12
    flops_32: float = 67e12
    link: float = 450e9
    """The bytes per second that a device sends to other devices of its host."""
    network: float = 50e9
    """The bytes per second that a device sends to other hosts."""
    per_host: int = 8
    latency: float = 5e-6
    """The seconds of a collective of a few bytes within a host."""
    latency_of_hosts: float = 10e-6
    """The seconds that each doubling of the number of hosts adds."""

    def flops(self, dtype: str) -> float:
        """Return the floating-point operations per second of matrix products."""
        return self.flops_16 if BYTES[dtype] == 2 else self.flops_32


H100 = Hardware()


class Collective(NamedTuple):
    """An operation in which all devices along an axis take part.

    `size` counts the bytes of the whole message: the array that is summed, that is gathered or that is scattered.
    """

    name: str
    kind: str
    axis: str
    size: int
    count: int = 1


class Group(NamedTuple):
    """The devices that take part in a collective: how many there are, and on how many hosts."""

    devices: int
    hosts: int

    @property
    def per_host(self) -> int:
        """The smallest number of devices of the group on one host."""
        return self.devices // self.hosts


# The shapes of a mesh


def models(config: pg.GPT2Config) -> list[int]:
    """Return the permitted sizes of the axis ``model``: the divisors of the number of heads.

    Examples
    --------
    >>> models(pg.GPT2Config.published("1558M"))
    [1, 5, 25]
    """
    return [n for n in range(1, config.n_head + 1) if config.n_head % n == 0]


def group(mesh: Mesh, axis: str, hardware: Hardware = H100) -> Group:
    """Return the devices of one group along an axis.

    The devices of a group along ``model`` share a host if they fit in one, and a host then has as many whole groups as
    fit. If they do not fit, a group has hosts of its own, and its devices are divided evenly among them.
    """
    if axis == "model":
        return Group(mesh.model, math.ceil(mesh.model / hardware.per_host))
    groups_per_host = max(1, hardware.per_host // mesh.model)
    return Group(mesh.data, math.ceil(mesh.data / groups_per_host))


def texts_of(batch: int, mesh: Mesh) -> int:
    """Return how many texts of a batch a device computes: all of them if the axis ``data`` does not divide the batch.

    Examples
    --------
    >>> texts_of(64, Mesh(data=16)), texts_of(1, Mesh(data=16))
    (4, 1)
    """
    return batch if batch % mesh.data else batch // mesh.data


# The parameters


@functools.cache
def shapes(config: pg.GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path."""
    return params.shapes(config)


def held(path: str, shape: tuple[int, ...], n: int) -> int:
    """Return the number of elements of a parameter that a device holds if the weights are divided over n devices."""
    if any(fnmatch(path, pattern) for pattern in (*COLUMNS, *ROWS)):
        return math.prod(shape) // n
    if path in VOCABULARY:
        return math.ceil(shape[0] / n) * math.prod(shape[1:])
    return math.prod(shape)


def parameters(config: pg.GPT2Config, mesh: Mesh) -> int:
    """Return the number of elements of all parameters that a device holds.

    Examples
    --------
    >>> parameters(pg.GPT2Config(), Mesh(data=4))
    124439808
    """
    return sum(held(path, shape, mesh.model) for path, shape in shapes(config).items())


def factors(config: pg.GPT2Config, mesh: Mesh) -> int:
    """Return the number of elements of the matrices that a device multiplies each token by, wte for the logits."""
    paths = {path: shape for path, shape in shapes(config).items() if path.endswith("/w")}
    head = "wte" if config.tie_word_embeddings else "lm_head"
    paths[head] = shapes(config)[head]
    return sum(held(path, shape, mesh.model) for path, shape in paths.items())


def read(config: pg.GPT2Config, mesh: Mesh) -> int:
    """Return the number of elements that a forward pass reads: all but those of tables in which rows are looked up."""
    looked_up = ("wpe",) if config.tie_word_embeddings else ("wpe", "wte")
    tables = {path: shape for path, shape in shapes(config).items() if path in looked_up}
    return parameters(config, mesh) - sum(held(path, shape, mesh.model) for path, shape in tables.items())


def is_divided(config: pg.GPT2Config, path: str, mesh: Mesh) -> bool:
    """Return whether the moments of a parameter can be divided over ``data``.

    That needs an axis that is not divided over ``model`` and whose length is a multiple of the number of devices.
    """
    shape = shapes(config)[path]
    free = {"c_attn/w": shape[:1], "c_attn/b": (), "c_fc/w": shape[:1], "c_fc/b": (), "c_proj/w": shape[1:]}
    lengths = shape[1:] if path in VOCABULARY else free.get("/".join(path.split("/")[-2:]), shape)
    return any(n % mesh.data == 0 for n in lengths)


# Memory


def cache_bytes(config: pg.GPT2Config, mesh: Mesh, batch: int, capacity: int, dtype: str) -> int:
    """Return the bytes of the keys and values that a device holds for a batch of texts."""
    texts = texts_of(batch, mesh)
    return 2 * config.n_layer * texts * capacity * (config.n_embd // mesh.model) * BYTES[dtype]


class TrainingMemory(NamedTuple):
    """The bytes that a device holds while it trains."""

    parameters: int
    gradients: int
    moments: int
    activations: int


def training_memory(
    config: pg.GPT2Config, mesh: Mesh, batch: int, seq: int, dtype: str, *, shard_optimizer: bool = False
) -> TrainingMemory:
    """Return the bytes that a device holds for a micro-batch [batch, seq] of all devices together.

    Parameters and gradients are in float32; there is a second copy of the parameters if `dtype` has 16 bits.
    Activations are the results that the backward pass reads. In each layer these are the inputs of the two layer norms
    and their results, which every device holds whole; and q, k, v, the result of attention, the input of GELU and its
    result, which are divided. The logits and their gradient are in float32. Attention is fused, so its scores are not
    kept.
    """
    n = parameters(config, mesh)
    copies = WIDE + (BYTES[dtype] if BYTES[dtype] != WIDE else 0)
    moments = 0
    for path, shape in shapes(config).items():
        is_part = shard_optimizer and is_divided(config, path, mesh)
        moments += 2 * WIDE * held(path, shape, mesh.model) // (mesh.data if is_part else 1)
    tokens = texts_of(batch, mesh) * seq
    whole = config.n_layer * 4 * config.n_embd + 2 * config.n_embd
    divided = config.n_layer * (4 * config.n_embd + 2 * config.n_hidden) // mesh.model
    logits = 2 * math.ceil(config.n_vocab / mesh.model) * WIDE
    return TrainingMemory(copies * n, WIDE * n, moments, tokens * ((whole + divided) * BYTES[dtype] + logits))


# The collectives of one device


def forward(config: pg.GPT2Config, mesh: Mesh, batch: int, seq: int, dtype: str) -> list[Collective]:
    """Return the collectives of a forward pass up to the logits, which stay divided.

    Each is a sum over the axis ``model``. Each part of a sum has the dtype of the weights.
    """
    if mesh.model == 1:
        return []
    size = texts_of(batch, mesh) * seq * config.n_embd * BYTES[dtype]
    places = {"embedding": 1, "attn/c_proj": config.n_layer, "mlp/c_proj": config.n_layer}
    return [Collective(name, "all-reduce", "model", size, count) for name, count in places.items()]


def candidates(config: pg.GPT2Config, mesh: Mesh, top_k: int | None) -> int:
    """Return the number of its largest logits that each part sends, so that the `top_k` largest of all are known.

    It is a power of two, and larger than `top_k`: several of the largest logits may be equal. If `top_k` is None, any
    token may be sampled, so a part sends all of its logits.
    """
    rows = math.ceil(config.n_vocab / mesh.model)
    return rows if top_k is None else min(1 << top_k.bit_length(), rows)


def gathered(mesh: Mesh, axis: str, n: int, dtype: str) -> list[Collective]:
    """Return the collectives that gather n logits, which have the given dtype, and their ids along an axis."""
    sizes = {"the largest logits": n * BYTES[dtype], "their ids": n * WIDE}
    found = [Collective(name, "all-gather", axis, size) for name, size in sizes.items()]
    return found if getattr(mesh, axis) > 1 else []


def choice(config: pg.GPT2Config, mesh: Mesh, batch: int, dtype: str, top_k: int | None) -> list[Collective]:
    """Return the collectives that tell every device the largest logits of each text, from which tokens are sampled."""
    n, k = texts_of(batch, mesh), mesh.model * candidates(config, mesh, top_k)
    found = gathered(mesh, "model", n * k, dtype)
    return found if n == batch else found + gathered(mesh, "data", batch * k, dtype)


def statistics(mesh: Mesh, tokens: int, n: int) -> list[Collective]:
    """Return n collectives of one number per token over the axis ``model``."""
    found = [Collective("statistics of the logits", "all-reduce", "model", tokens * WIDE, n)]
    return found if mesh.model > 1 else []


def decode(config: pg.GPT2Config, mesh: Mesh, batch: int, dtype: str, top_k: int | None = TOP_K) -> list[Collective]:
    """Return the collectives that generate one token for each text of a batch."""
    return forward(config, mesh, batch, 1, dtype) + choice(config, mesh, batch, dtype, top_k)


def prompt(
    config: pg.GPT2Config, mesh: Mesh, batch: int, seq: int, dtype: str, top_k: int | None = TOP_K
) -> list[Collective]:
    """Return the collectives that read prompts of `seq` tokens, and choose the first token after each."""
    return forward(config, mesh, batch, seq, dtype) + choice(config, mesh, batch, dtype, top_k)


def score(config: pg.GPT2Config, mesh: Mesh, seq: int, dtype: str, alternatives: int = 1) -> list[Collective]:
    """Return the collectives that score a window on each device along ``data``, before the scores are gathered.

    For each token these are the maximum, the sum of exponentials, the logit of the token and its rank; and the largest
    logits of each part, in float32.
    """
    n = seq * mesh.model * min(alternatives, math.ceil(config.n_vocab / mesh.model))
    whole = forward(config, mesh._replace(data=1), 1, seq, dtype)
    return whole + statistics(mesh, seq, 4) + gathered(mesh, "model", n, "float32")


def gradient(config: pg.GPT2Config, mesh: Mesh, batch: int, seq: int, dtype: str) -> list[Collective]:
    """Return the collectives of the loss and its gradient on a micro-batch, before the sum over the axis ``data``.

    For each token, the loss needs the maximum, the sum of exponentials and the logit of the target; the gradient needs
    the first two again. A layer whose weight is divided by columns has an input that is whole, so the gradient of its
    input is a sum.
    """
    found = forward(config, mesh, batch, seq, dtype) + statistics(mesh, texts_of(batch, mesh) * seq, 5)
    if mesh.model > 1:
        size = texts_of(batch, mesh) * seq * config.n_embd * BYTES[dtype]
        places = {"logits, backward": 1, "mlp/c_fc, backward": config.n_layer, "attn/c_attn, backward": config.n_layer}
        found += [Collective(name, "all-reduce", "model", size, count) for name, count in places.items()]
    return found


def update(config: pg.GPT2Config, mesh: Mesh, *, shard_optimizer: bool = False) -> list[Collective]:
    """Return the collectives that end a training step: the sums of the gradients and of the loss, and the norm.

    Each tensor is summed by itself. With `shard_optimizer`, a device gets its part of the sum of each tensor whose
    moments are divided, updates this part of the tensor, and the parts are gathered. The norm then needs the sums of
    squares of the other parts.
    """
    found, squared = [], set()
    if mesh.data > 1:
        found += [Collective("the loss", "all-reduce", "data", WIDE)]
        for path, shape in shapes(config).items():
            size = held(path, shape, mesh.model) * WIDE
            if shard_optimizer and is_divided(config, path, mesh):
                found += [Collective("gradients", "reduce-scatter", "data", size)]
                found += [Collective("parameters", "all-gather", "data", size)]
                squared.add(size < math.prod(shape) * WIDE)  # whether it is divided over `model`
            else:
                found += [Collective("gradients", "all-reduce", "data", size)]
        found += [Collective("the gradient's norm", "all-reduce", "data", WIDE)] * len(squared)
    if mesh.model > 1:
        found += [Collective("the gradient's norm", "all-reduce", "model", WIDE)]
    return found


def training(
    config: pg.GPT2Config,
    mesh: Mesh,
    batch: int,
    seq: int,
    micro_batch: int,
    dtype: str,
    *,
    shard_optimizer: bool = False,
) -> list[Collective]:
    """Return the collectives of a step whose gradient is a sum over micro-batches of `micro_batch` texts per device."""
    n = micro_batches(mesh, batch, micro_batch)
    of_one = gradient(config, mesh, mesh.data * math.ceil(batch / mesh.data / n), seq, dtype)
    ended = update(config, mesh, shard_optimizer=shard_optimizer)
    return [each._replace(count=n * each.count) for each in of_one] + ended


def micro_batches(mesh: Mesh, batch: int, micro_batch: int) -> int:
    """Return the number of micro-batches of a step, if a device computes at most `micro_batch` texts at a time."""
    return math.ceil(batch / mesh.data / micro_batch)


# Bytes and seconds


def sent(collective: Collective, n: int) -> float:
    """Return the bytes that each of n devices sends in all runs of a collective, along a ring.

    A sum takes two passes around the ring: one that adds, and one that distributes.
    """
    passes = 2 if collective.kind == "all-reduce" else 1
    return collective.count * collective.size * passes * (n - 1) / n


def count(collectives: list[Collective]) -> int:
    """Return how often a device takes part in a collective."""
    return sum(each.count for each in collectives)


def bytes_sent(collectives: list[Collective], mesh: Mesh) -> float:
    """Return the bytes that each device sends in some collectives."""
    return sum(sent(each, getattr(mesh, each.axis)) for each in collectives)


def bandwidth(devices: Group, hardware: Hardware = H100) -> float:
    """Return the bytes per second that a device of a group sends along a ring.

    Between hosts, there are as many rings as the group has devices in one host. Each device's network card serves one
    ring.
    """
    between_hosts = hardware.network * devices.per_host
    return hardware.link if devices.hosts == 1 else min(hardware.link, between_hosts)


def latency(devices: Group, hardware: Hardware = H100) -> float:
    """Return the seconds that a collective takes however small its message is."""
    return hardware.latency + hardware.latency_of_hosts * math.ceil(math.log2(devices.hosts))


def seconds(collectives: list[Collective], mesh: Mesh, hardware: Hardware = H100) -> float:
    """Return the seconds of some collectives, one after another, while nothing else is computed."""
    total = 0.0
    for each in collectives:
        devices = group(mesh, each.axis, hardware)
        if devices.devices > 1:
            transfer = sent(each, devices.devices) / bandwidth(devices, hardware)
            total += transfer + each.count * latency(devices, hardware)
    return total


class Time(NamedTuple):
    """The seconds of a device: those of its own work, and those of the collectives."""

    own: float
    collectives: float

    @property
    def total(self) -> float:
        """The sum: communication and computation do not overlap."""
        return self.own + self.collectives


def decode_time(
    config: pg.GPT2Config,
    mesh: Mesh,
    batch: int,
    keys: int,
    dtype: str,
    *,
    top_k: int | None = TOP_K,
    hardware: Hardware = H100,
) -> Time:
    """Return the seconds of one token for each text of a batch, when the cache of each has `keys` tokens.

    The device reads each weight and each key and value once, or it is limited by its arithmetic.
    """
    texts = texts_of(batch, mesh)
    n_bytes = read(config, mesh) * BYTES[dtype] + cache_bytes(config, mesh, batch, keys, dtype)
    flops = texts * (2 * factors(config, mesh) + attention_flops(config, mesh, keys))
    own = max(n_bytes / hardware.memory_bandwidth, flops / hardware.flops(dtype))
    return Time(own, seconds(decode(config, mesh, batch, dtype, top_k), mesh, hardware))


def attention_flops(config: pg.GPT2Config, mesh: Mesh, keys: float) -> float:
    """Return the operations of the attention of one token with `keys` keys: two products, in all layers."""
    return 4 * config.n_layer * keys * config.n_embd / mesh.model


def prompt_time(
    config: pg.GPT2Config,
    mesh: Mesh,
    batch: int,
    seq: int,
    dtype: str,
    *,
    top_k: int | None = TOP_K,
    hardware: Hardware = H100,
) -> Time:
    """Return the seconds to read prompts of `seq` tokens; only the last token of each needs logits."""
    texts = texts_of(batch, mesh)
    logits = math.ceil(config.n_vocab / mesh.model) * config.n_embd
    in_layers = factors(config, mesh) - logits
    flops = texts * (seq * (2 * in_layers + attention_flops(config, mesh, (seq + 1) / 2)) + 2 * logits)
    n_bytes = read(config, mesh) * BYTES[dtype]
    own = max(n_bytes / hardware.memory_bandwidth, flops / hardware.flops(dtype))
    return Time(own, seconds(prompt(config, mesh, batch, seq, dtype, top_k), mesh, hardware))


def training_time(
    config: pg.GPT2Config,
    mesh: Mesh,
    batch: int,
    seq: int,
    micro_batch: int,
    dtype: str,
    *,
    shard_optimizer: bool = False,
    hardware: Hardware = H100,
) -> Time:
    """Return the seconds of a training step. The backward pass has twice the operations of the forward pass.

    The update reads the parameters, the gradients and both moments, and writes all but the gradients.
    """
    n = micro_batches(mesh, batch, micro_batch)
    tokens = n * math.ceil(batch / mesh.data / n) * seq
    flops = 3 * tokens * (2 * factors(config, mesh) + attention_flops(config, mesh, (seq + 1) / 2))
    updated = 7 * WIDE * parameters(config, mesh) / (mesh.data if shard_optimizer else 1)
    own = flops / hardware.flops(dtype) + updated / hardware.memory_bandwidth
    found = training(config, mesh, batch, seq, micro_batch, dtype, shard_optimizer=shard_optimizer)
    return Time(own, seconds(found, mesh, hardware))


def longest_latency(
    config: pg.GPT2Config, mesh: Mesh, batch: int, keys: int, dtype: str, *, hardware: Hardware = H100
) -> float:
    """Return the latency of a collective below which a mesh generates faster than one device."""
    found = decode(config, mesh, batch, dtype)
    free = hardware._replace(latency=0.0, latency_of_hosts=0.0)
    saved = decode_time(config, Mesh(), batch, keys, dtype).total
    saved -= decode_time(config, mesh, batch, keys, dtype, hardware=free).total
    return saved / count(found)


# The tables


def number(x: float) -> str:
    """Return a number with three significant digits, and commas between thousands.

    Examples
    --------
    >>> number(1234.5), number(1.5), number(0.01234)
    ('1,234', '1.50', '0.0123')
    """
    digits = max(0, 2 - math.floor(math.log10(abs(x)))) if x else 0
    return f"{x:,.{digits}f}"


def table(header: str, rows: Iterable[list[Any]]) -> str:
    """Return a table in Markdown. The names of the columns are separated by bars."""
    names = [name.strip() for name in header.split("|")]
    cells = [[number(each) if isinstance(each, float) else str(each) for each in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])


def configs() -> Iterator[tuple[str, pg.GPT2Config]]:
    """Yield the names and the configurations of the published models."""
    for name in SIZES:
        yield name, pg.GPT2Config.published(name)


def divided(config: pg.GPT2Config) -> list[Mesh]:
    """Return the meshes that divide the weights in every permitted way, and have no axis ``data``."""
    return [Mesh(model=n) for n in models(config)]


def hardware_rows(hardware: Hardware = H100) -> Iterator[list[Any]]:
    """Yield what is assumed about the hardware."""
    yield ["memory of a device, GB", hardware.memory / 1e9]
    yield ["memory bandwidth, TB/s", hardware.memory_bandwidth / 1e12]
    yield ["matrix products in bfloat16, TFLOP/s", hardware.flops_16 / 1e12]
    yield ["matrix products in float32, TFLOP/s", hardware.flops_32 / 1e12]
    yield ["to other devices of the host, GB/s in each direction", hardware.link / 1e9]
    yield ["to other hosts, GB/s in each direction", hardware.network / 1e9]
    yield ["devices of a host", hardware.per_host]
    yield ["latency of a collective within a host, µs", hardware.latency * 1e6]
    yield ["more for each doubling of the number of hosts, µs", hardware.latency_of_hosts * 1e6]


def memory_rows() -> Iterator[list[Any]]:
    """Yield the memory of a device that generates text."""
    for name, config in configs():
        for mesh in divided(config):
            n = parameters(config, mesh)
            text = cache_bytes(config, mesh, 1, CONTEXT, "bfloat16")
            fit = int((H100.memory - BYTES["bfloat16"] * n) // text)
            sizes = [BYTES[dtype] * n / 1e9 for dtype in BYTES]
            yield [name, mesh.model, group(mesh, "model").hosts, *sizes, text / 1e6, f"{fit:,}"]


def decode_rows(dtype: str, batch: int) -> Iterator[list[Any]]:
    """Yield the cost of a token of each text of a batch, by the number of devices that divide the weights."""
    for name, config in configs():
        alone = decode_time(config, Mesh(), batch, KEYS, dtype).total
        for mesh in divided(config):
            found, time = decode(config, mesh, batch, dtype), decode_time(config, mesh, batch, KEYS, dtype)
            limit = longest_latency(config, mesh, batch, KEYS, dtype) * 1e6 if found else "-"
            parts = [1e6 * x for x in (time.own, time.collectives, time.total)]
            kilobytes = bytes_sent(found, mesh) / 1e3
            yield [name, mesh.model, count(found), kilobytes, *parts, alone / time.total, limit]


def many_rows(dtype: str, texts: int) -> Iterator[list[Any]]:
    """Yield the cost of a token of each text, by the number of devices, each of which has its own texts."""
    for name, config in configs():
        alone = decode_time(config, Mesh(), texts, KEYS, dtype).total
        for n in DEVICES:
            mesh = Mesh(data=n)
            time = decode_time(config, mesh, n * texts, KEYS, dtype)
            kilobytes = bytes_sent(decode(config, mesh, n * texts, dtype), mesh) / 1e3
            parts = [1e6 * x for x in (time.collectives, time.total)]
            yield [name, n, n * texts, kilobytes, *parts, f"{alone / time.total:.0%}"]


def costly_from(config: pg.GPT2Config, batch: int, dtype: str) -> int | None:
    """Return the smallest number of devices on which a sum takes longer than the reads between two sums, or None.

    It is the smallest of those that the number of heads permits.
    """
    sums = count(forward(config, Mesh(model=2), batch, 1, dtype))
    reads = decode_time(config, Mesh(), batch, KEYS, dtype).own / sums
    found = [mesh.model for mesh in divided(config)[1:] if reads / mesh.model < latency(group(mesh, "model"))]
    return found[0] if found else None


def verdict_rows() -> Iterator[list[Any]]:
    """Yield, for each setting and model, from where a sum costs more than the reads, and the fastest division."""
    for dtype, batch in SETTINGS:
        for name, config in configs():
            times = {mesh: decode_time(config, mesh, batch, KEYS, dtype).total for mesh in divided(config)}
            best = min(times, key=times.__getitem__)
            costly = costly_from(config, batch, dtype) or "-"
            limits = [longest_latency(config, mesh, batch, KEYS, dtype) for mesh in divided(config)[1:]]
            yield [dtype, batch, name, costly, best.model, times[Mesh()] / times[best], max(limits) * 1e6]


def verdict() -> str:
    """Return a paragraph about the smallest model and one text."""
    config, dtype = pg.GPT2Config.published("124M"), "bfloat16"
    time = decode_time(config, Mesh(), 1, KEYS, dtype).own
    sums, first = count(forward(config, Mesh(model=2), 1, 1, dtype)), costly_from(config, 1, dtype)
    assert first is not None
    share = time / sums
    return (
        f"GPT-2 124M in {dtype}, one text: a token takes {number(time * 1e6)} µs on one device, the time to read the "
        f"weights and the cache. The {sums} sums of a divided model have {number(share * 1e6)} µs of these reads each. "
        f"On {first} devices a device reads its part in {number(share / first * 1e6)} µs, and the sum takes at least "
        f"{number(latency(group(Mesh(model=first), 'model')) * 1e6)} µs. So from {first} devices on, each sum costs "
        f"more than the reads that it shares."
    )


def prompt_rows(dtype: str) -> Iterator[list[Any]]:
    """Yield the cost to read one prompt that fills the context."""
    for name, config in configs():
        alone = prompt_time(config, Mesh(), 1, CONTEXT, dtype).total
        for mesh in divided(config):
            time = prompt_time(config, mesh, 1, CONTEXT, dtype)
            megabytes = bytes_sent(prompt(config, mesh, 1, CONTEXT, dtype), mesh) / 1e6
            parts = [1e3 * x for x in (time.own, time.collectives, time.total)]
            yield [name, mesh.model, megabytes, *parts, alone / time.total]


def training_meshes(config: pg.GPT2Config) -> list[Mesh]:
    """Return the meshes of the table of training: weights whole, and divided as far as one host permits.

    The size of the axis ``data`` is a power of two.
    """
    most = max(n for n in models(config) if n <= H100.per_host)
    return [Mesh(data, n) for n in (1, most) for data in DEVICES if data * n <= max(DEVICES)]


def training_rows(config: pg.GPT2Config, dtype: str) -> Iterator[list[Any]]:
    """Yield the cost of a training step."""
    alone = training_time(config, Mesh(), STEP, CONTEXT, MICRO_BATCH, dtype).total
    for mesh in training_meshes(config):
        texts = mesh.data * min(MICRO_BATCH, STEP // mesh.data)
        gigabytes = [
            sum(training_memory(config, mesh, texts, CONTEXT, dtype, shard_optimizer=each)) / 1e9
            for each in (False, True)
        ]
        time = training_time(config, mesh, STEP, CONTEXT, MICRO_BATCH, dtype)
        gigabytes.append(bytes_sent(training(config, mesh, STEP, CONTEXT, MICRO_BATCH, dtype), mesh) / 1e9)
        parts = [1e3 * x for x in (time.own, time.collectives, time.total)]
        efficiency = f"{alone / time.total / mesh.devices:.0%}"
        yield [mesh.devices, f"data={mesh.data}, model={mesh.model}", *gigabytes, *parts, efficiency]


def sections() -> Iterator[tuple[str, str, str]]:
    """Yield the heading, the introduction and the table of each section."""
    yield "The hardware that is assumed", "", table("quantity | value", hardware_rows())
    yield (
        "Generating: memory per device",
        f"Devices are those of the axis model. The weights, and the cache of one text of {CONTEXT:,} tokens in "
        f"bfloat16; the last column says how many such texts fit next to weights in bfloat16. The axis data divides "
        f"the texts, and changes nothing else in this table.",
        table("model | devices | hosts | float32, GB | bfloat16, GB | cache, MB | texts", memory_rows()),
    )
    for dtype, batch in SETTINGS:
        texts = "one text" if batch == 1 else f"{batch} texts"
        yield (
            f"Generating: one token, {dtype}, {texts}",
            f"After {KEYS} tokens of each text, with top_k = {TOP_K}. The last column is the latency of a collective "
            f"at which the devices together are as fast as one.",
            table(
                "model | devices | collectives | sent, kB | own work, µs | collectives, µs | sum, µs | "
                "speed, one device = 1 | faster if the latency, µs, is below",
                decode_rows(dtype, batch),
            ),
        )
    yield (
        "Generating: where the split stops paying",
        verdict(),
        table(
            "dtype | texts | model | devices from which a sum costs more than its reads | devices of the fastest | "
            "speed, one device = 1 | no split pays if the latency, µs, is above",
            verdict_rows(),
        ),
    )
    dtype, texts = SETTINGS[-1]
    yield (
        f"Generating on 1 to {max(DEVICES)} devices: {dtype}, {texts} texts per device",
        f"Every device has all weights, so model=1. The {candidates(pg.GPT2Config(), Mesh(), TOP_K)} largest logits of "
        f"each text are sent to all devices, because every process samples the tokens of all texts. The time that the "
        f"processes need for this is left out.",
        table(
            "model | devices | texts | sent per token, kB | collectives, µs | sum, µs | efficiency",
            many_rows(dtype, texts),
        ),
    )
    yield (
        f"Reading a prompt of {CONTEXT:,} tokens, bfloat16",
        "",
        table(
            "model | devices | sent, MB | own work, ms | collectives, ms | sum, ms | speed, one device = 1",
            prompt_rows("bfloat16"),
        ),
    )
    for name, config in configs():
        yield (
            f"Training {name}, float32",
            f"A step has {STEP} windows of {CONTEXT:,} tokens, and a device computes at most {MICRO_BATCH} at a time.",
            table(
                "devices | mesh | memory, GB | with --shard-optimizer, GB | sent, GB | own work, ms | "
                "collectives, ms | sum, ms | efficiency",
                training_rows(config, "float32"),
            ),
        )


def page() -> str:
    """Return all sections as Markdown."""
    return "\n".join(
        "\n\n".join(filter(None, [f"### {heading}", introduction, rows])) + "\n"
        for heading, introduction, rows in sections()
    )


if __name__ == "__main__":
    print(page(), end="")
