"""The collectives of compiled programs, next to those of `mesh_model`: ``python -m bench.mesh_compiled``.

JAX translates the functions that run on a mesh to StableHLO, the language that its compiler reads. This needs no
devices: the mesh is abstract. The collectives are counted there, for the published models and up to 256 devices. For
meshes of up to 8 devices, XLA compiles the program for 8 virtual devices of the CPU, and they are counted again in its
HLO.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import portable_gpt2 as pg

from . import mesh_model as paper

KINDS = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
OTHERS = {"all_to_all", "collective_permute", "collective_broadcast", "send", "recv"}

Found = Counter[tuple[str, str, int]]
"""How often each collective occurs: its kind, its axis, and the bytes of its whole message."""


def on_paper(collectives: list[paper.Collective], mesh: paper.Mesh) -> Found:
    """Return collectives of `mesh_model` in the form in which they are found in programs."""
    found: Found = Counter()
    for each in collectives:
        if getattr(mesh, each.axis) > 1:
            found[each.kind, each.axis, each.size] += each.count
    return found


def axis_of(groups: list[list[int]], mesh: paper.Mesh) -> str:
    """Return the axis of a mesh along which groups of devices are taken; their numbers count ``model`` fastest."""
    ids = np.arange(mesh.devices).reshape(mesh.data, mesh.model)
    found = {frozenset(group) for group in groups}
    for axis, rows in (("model", ids), ("data", ids.T)):
        if found == {frozenset(map(int, row)) for row in rows}:
            return axis
    return f"groups {groups}"


# In StableHLO


def in_stablehlo(module: Any, mesh: paper.Mesh) -> Found:
    """Return the collectives of a module. A function counts as often as it is called.

    Raises
    ------
    ValueError
        If there is a collective in a loop or in a branch, or one of another kind.
    """
    functions = {str(each.name).strip('"'): each for each in module.body.operations if hasattr(each, "body")}

    def of(operations: Any, is_inside: bool) -> Found:
        found: Found = Counter()
        for each in operations:
            name = each.operation.name.removeprefix("stablehlo.")
            if each.operation.name == "func.call":
                called = str(each.attributes["callee"]).lstrip("@").strip('"')
                found += of(functions[called].entry_block.operations, is_inside)
            elif name in OTHERS:
                raise ValueError(f"the program has {name}")
            elif name in KINDS:
                if is_inside:
                    raise ValueError(f"the program has {name} in a loop or a branch")
                types = [each.operands[0].type, each.results[0].type]
                size = max(math.prod(t.shape) * _n_bytes(str(t.element_type)) for t in types)
                groups = np.array(each.attributes["replica_groups"]).tolist()
                if len(groups[0]) > 1:  # a device alone sends nothing
                    found[KINDS[name], axis_of(groups, mesh), size] += 1
            else:
                is_loop = is_inside or name in ("while", "case", "if")
                for region in each.operation.regions:
                    for block in region.blocks:
                        found += of(block.operations, is_loop)
        return found

    return of(functions["main"].entry_block.operations, False)


def _n_bytes(element: str) -> int:
    bits = re.search(r"\d+$", element)
    return max(1, int(bits[0]) // 8) if bits else 1


# In HLO


def in_hlo(text: str, mesh: paper.Mesh) -> Found:
    """Return the collectives of a compiled program. Those of several arrays count once for each array."""
    found: Found = Counter()
    operation = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")
    for line in text.splitlines():
        if match := operation.search(line):
            if match[2] not in KINDS.values():
                raise ValueError(f"the program has {match[2]}")
            groups = _groups(line)
            for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1]):
                shape = [int(n) for n in dims.split(",") if n]
                size = math.prod(shape) * _n_bytes(dtype)
                size *= len(groups[0]) if match[2] == "reduce-scatter" else 1
                found[match[2], axis_of(groups, mesh), size] += 1
    return found


def _groups(line: str) -> list[list[int]]:
    """Return the groups of devices of a collective in HLO: a list, or the shape and the axes of a range of numbers."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, whole, order = ([int(n) for n in each.split(",")] if each else None for each in match.groups())
        ids = np.arange(math.prod(whole or [])).reshape(whole)
        return ids.transpose(order).reshape(shape).tolist()  # type: ignore[no-any-return]
    match = re.search(r"replica_groups=\{(.*?)\}\}", line)
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)", match[1])] if match else []


# The programs


class Done(Exception):
    """A program's result was asked for, and there are no devices that could compute it."""


def without_devices(mesh: paper.Mesh, compiles: bool = False) -> tuple[Any, list[Found]]:
    """Return a mesh of JAX whose arrays are shapes only, and a list of the collectives of the programs that it runs.

    A function on the mesh is translated to StableHLO when it is called, and returns shapes. With `compiles`, the mesh
    has the devices of this machine, and XLA compiles the function for them.
    """
    import jax
    from jax.sharding import AbstractMesh

    from portable_gpt2.mesh import Mesh

    found: list[Found] = []

    class WithoutDevices(type(pg.get_backend("jax"))):  # type: ignore[misc]
        def mesh(self, sizes: Any) -> Any:
            return super().mesh(sizes) if compiles else AbstractMesh(tuple(sizes.values()), tuple(sizes))

        def from_parts(self, mesh: Any, spec: Any, shape: Any, read: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, read(tuple(slice(0, 0) for _ in shape)).dtype)

        def on_mesh(self, *args: Any, **options: Any) -> Any:
            function = super().on_mesh(*args, **options)

            def call(*args: Any) -> Any:
                traced = function.trace(*args)
                if compiles:
                    found.append(in_hlo(traced.lower().compile().as_text(), mesh))
                else:
                    lowered = traced.lower(lowering_platforms=("cuda",))
                    found.append(in_stablehlo(lowered.compiler_ir("stablehlo"), mesh))
                return traced.out_info

            return call

        def to_numpy(self, x: Any) -> np.ndarray:
            raise Done

    return Mesh(WithoutDevices(), mesh._asdict()), found


def parameters(config: pg.GPT2Config, mesh: Any, dtype: str) -> Any:
    """Return the shapes of the parameters on a mesh."""
    import jax

    from portable_gpt2.params import nest, shapes

    return nest({path: jax.ShapeDtypeStruct(mesh.shape(path, each), dtype) for path, each in shapes(config).items()})


def decoder(config: pg.GPT2Config, mesh: Any, dtype: str) -> Any:
    """Return the decoder of a model on a mesh whose parameters are shapes."""
    from portable_gpt2.generation.mesh_decoder import MeshDecoder

    return MeshDecoder(mesh, parameters(config, mesh, dtype), config)


def reads(
    config: pg.GPT2Config, mesh: paper.Mesh, batch: int, seq: int, dtype: str, top_k: int | None, compiles: bool = False
) -> Found:
    """Return the collectives that read `seq` tokens of each text of a batch, and choose the next."""
    own, programs = without_devices(mesh, compiles)
    model = decoder(config, own, dtype)
    cache = model.new_cache(batch, config.n_ctx, None)
    with contextlib.suppress(Done):
        model._read([[0] * seq] * batch, seq - 1, cache, top_k)
    return programs[-1]


def scores(
    config: pg.GPT2Config, mesh: paper.Mesh, seq: int, dtype: str, alternatives: int = 1, compiles: bool = False
) -> Found:
    """Return the collectives that score a text of `seq` + 1 tokens."""
    own, programs = without_devices(mesh, compiles)
    with contextlib.suppress(Done):
        decoder(config, own, dtype).score([([0] * (seq + 1), 1)], alternatives)
    return programs[-1]


def gradients(
    config: pg.GPT2Config, mesh: paper.Mesh, batch: int, seq: int, dtype: str, compiles: bool = False
) -> Found:
    """Return the collectives of the loss and its hand-written gradient, before gradients are summed over ``data``."""
    import jax

    from portable_gpt2.gradients import loss

    own, found = without_devices(mesh, compiles)

    def on_device(params: Any, tokens: Any) -> Any:
        value, backward = loss(own.local(params), tokens, config, own.split(config.n_vocab))
        return value, backward()

    given = parameters(config, own, dtype), jax.ShapeDtypeStruct((batch, seq + 1), "int32")
    specs = own.params_spec(config), own.on("data", None)
    own.compile(on_device, specs, ((), jax.tree.map(lambda _: (), given[0])))(*given)
    return found[-1]


def steps(
    config: pg.GPT2Config, mesh: paper.Mesh, batch: int, seq: int, shard_optimizer: bool = False, compiles: bool = False
) -> Found:
    """Return the collectives of a training step in float32, of one micro-batch [batch, seq]."""
    from portable_gpt2.training import Recipe, Trainer
    from portable_gpt2.training.optimizer import Moments

    own, found = without_devices(mesh, compiles)
    trainer = Trainer(config, Recipe(batch_size=batch), own.backend, own, shard_optimizer=shard_optimizer)
    params = parameters(config, own, "float32")
    tokens, rates = np.zeros((1, batch, seq + 1), np.int32), np.zeros(3, np.float32)
    with contextlib.suppress(Done):
        trainer._on_mesh.step(params, Moments(params, params), tokens, batch // mesh.data, rates)
    return found[-1]


# The table


VIRTUAL = 8
COMPILED = ("124M",)
"""The models whose programs XLA compiles as well, which takes ten seconds for each program."""


class Program(NamedTuple):
    """A program that runs on a mesh: its collectives on paper, and a function that finds those of the program."""

    model: str
    mesh: paper.Mesh
    name: str
    on_paper: Callable[..., list[paper.Collective]]
    found: Callable[..., Found]


def meshes(config: pg.GPT2Config) -> list[paper.Mesh]:
    """Return all ways to divide the weights, and for the most devices one mesh with and one without that."""
    within = max(n for n in paper.models(config) if n <= paper.H100.per_host)
    largest = max(n for n in paper.DEVICES if n * within <= max(paper.DEVICES))
    return [*paper.divided(config)[1:], paper.Mesh(largest, within), paper.Mesh(data=max(paper.DEVICES))]


def programs(name: str, config: pg.GPT2Config, mesh: paper.Mesh) -> Iterator[Program]:
    """Yield the programs of a model on a mesh. Both functions of each take the dtype."""

    def program(what: str, on_paper: Callable[..., Any], found: Callable[..., Any], **options: Any) -> Program:
        given = [functools.partial(fn, config, mesh, **options) for fn in (on_paper, found)]
        return Program(name, mesh, what, *given)

    batch, top_k = max(64, mesh.data), paper.TOP_K
    yield program(f"a token of {batch} texts", paper.prompt, reads, batch=batch, seq=1, top_k=top_k)
    if mesh.data == 1:
        yield program(f"a prompt of {paper.CONTEXT:,} tokens", paper.prompt, reads, batch=1, seq=1024, top_k=top_k)
        yield program(f"a score of {paper.CONTEXT:,} tokens", paper.score, scores, seq=paper.CONTEXT)
    windows = paper.MICRO_BATCH * mesh.data
    what = f"the gradient of {windows:,} windows of {paper.CONTEXT:,} tokens"
    yield program(what, paper.gradient, gradients, batch=windows, seq=paper.CONTEXT)


def cells(program: Program) -> list[Any]:
    """Return the cells of a row that follow from the formulas."""
    mesh, listed = program.mesh, program.on_paper(dtype="bfloat16")
    shape = f"data={mesh.data}, model={mesh.model}"
    return [program.model, shape, program.name, paper.count(listed), paper.bytes_sent(listed, mesh) / 1e6]


def compared(program: Program, dtype: str, compiles: bool = False) -> str:
    """Return whether a program has the collectives that it has on paper: ``equal``, or how many fewer or more."""
    expected, found = (
        on_paper(program.on_paper(dtype=dtype), program.mesh),
        program.found(dtype=dtype, compiles=compiles),
    )
    fewer, more = (expected - found).total(), (found - expected).total()
    return ", ".join([f"{fewer} fewer"] * (fewer > 0) + [f"{more} more"] * (more > 0)) or "equal"


def rows() -> Iterator[list[Any]]:
    """Yield the rows of the table."""
    for name, config in paper.configs():
        for mesh in meshes(config):
            for each in programs(name, config, mesh):
                stablehlo, hlo = compared(each, "bfloat16"), "-"
                if name in COMPILED and mesh.devices <= VIRTUAL:
                    hlo = compared(each, "float32", compiles=True)
                yield [*cells(each), stablehlo, hlo]


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={VIRTUAL}"  # read when JAX is imported
    print(paper.table("model | mesh | program | collectives | sent, MB | StableHLO | HLO", rows()))
