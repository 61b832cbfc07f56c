"""The collectives on paper (bench/mesh_model.py) are those of the programs that run on a mesh of JAX."""

import importlib.util
import sys
from pathlib import Path

import pytest

import portable_gpt2 as pg

ROOT = Path(__file__).parents[1]
# Each size of a shape is a different number, so that a formula with another size gives another result.
TINY = pg.GPT2Config(n_layer=3, n_head=4, n_embd=8, n_inner=20, n_vocab=61, n_ctx=16, eos_token_id=None)
MESHES = [(1, 4), (2, 2), (64, 4), (256, 1)]


@pytest.fixture(scope="module")
def compiled():
    """Import the module from the checkout, which must not be on sys.path: the tests use an installed copy."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("bench.mesh_compiled")


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_token_has_the_collectives_that_it_has_on_paper(jax, compiled, shape):
    """Catches a sum that the formulas leave out, and weights or logits of the whole vocabulary that are gathered."""
    paper, mesh = compiled.paper, compiled.paper.Mesh(*shape)
    for batch, seq, dtype, top_k in ((256, 1, "float32", 3), (256, 5, "bfloat16", 1), (1, 1, "bfloat16", None)):
        found = compiled.reads(TINY, mesh, batch, seq, dtype, top_k)
        assert found == compiled.on_paper(paper.prompt(TINY, mesh, batch, seq, dtype, top_k), mesh)
        assert sum(n for kind, *_, n in ((*key, n) for key, n in found.items()) if kind == "all-reduce") == (
            0 if mesh.model == 1 else 2 * 3 + 1
        )


@pytest.mark.parametrize("shape", [(1, 2), (2, 4), (4, 1)], ids=str)
def test_a_score_has_the_collectives_that_it_has_on_paper(jax, compiled, shape):
    """Catches a statistic that the formulas leave out, and logits that are gathered."""
    paper, mesh = compiled.paper, compiled.paper.Mesh(*shape)
    for dtype, alternatives in (("float32", 1), ("bfloat16", 3)):
        found = compiled.scores(TINY, mesh, 16, dtype, alternatives)
        assert found == compiled.on_paper(paper.score(TINY, mesh, 16, dtype, alternatives), mesh)


@pytest.mark.parametrize("shape", [(1, 2), (2, 4), (4, 1)], ids=str)
def test_a_gradient_has_the_collectives_that_it_has_on_paper(jax, compiled, shape):
    """Catches a backward pass that sums an input's gradient twice or not at all."""
    paper, mesh = compiled.paper, compiled.paper.Mesh(*shape)
    for dtype in ("float32", "bfloat16"):
        found = compiled.gradients(TINY, mesh, 8, 5, dtype)
        assert found == compiled.on_paper(paper.gradient(TINY, mesh, 8, 5, dtype), mesh)


@pytest.mark.parametrize("shard_optimizer", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (8, 1)], ids=str)
def test_a_training_step_has_the_collectives_that_it_has_on_paper(jax, compiled, shape, shard_optimizer):
    """Catches a gradient that is summed twice or not at all, and parts of parameters that are not gathered."""
    paper, mesh = compiled.paper, compiled.paper.Mesh(*shape)
    listed = paper.training(TINY, mesh, 16, 5, 16, "float32", shard_optimizer=shard_optimizer)
    assert compiled.steps(TINY, mesh, 16, 5, shard_optimizer) == compiled.on_paper(listed, mesh)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=str)
def test_xla_compiles_no_other_collectives(jax, compiled, shape):
    """Catches a collective that XLA adds to the program, such as one that moves an argument to another placement."""
    paper, mesh = compiled.paper, compiled.paper.Mesh(*shape)
    found = compiled.reads(TINY, mesh, 4, 3, "float32", 2, compiles=True)
    assert found == compiled.on_paper(paper.prompt(TINY, mesh, 4, 3, "float32", 2), mesh)


def test_the_reader_finds_every_kind_of_collective(jax, compiled):
    """Catches a reader that overlooks a collective, or takes it for one of another axis or size."""
    from jax.sharding import AbstractMesh, PartitionSpec

    mesh, own = compiled.paper.Mesh(2, 4), AbstractMesh((2, 4), ("data", "model"))

    def shape_of(fn, *, loops=False):
        def on_device(x):
            return jax.lax.fori_loop(0, 3, lambda i, x: fn(x), x) if loops else fn(jax.jit(fn)(x))

        mapped = jax.shard_map(
            on_device, mesh=own, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        lowered = jax.jit(mapped).trace(jax.ShapeDtypeStruct((8, 8), "bfloat16")).lower(lowering_platforms=("cuda",))
        return compiled.in_stablehlo(lowered.compiler_ir("stablehlo"), mesh)

    lax = jax.lax
    assert shape_of(lambda x: lax.psum(x, "model")) == {("all-reduce", "model", 128): 2}
    assert shape_of(lambda x: lax.pmax(x, "data")) == {("all-reduce", "data", 128): 2}
    assert shape_of(lambda x: lax.all_gather(x, "model")[0]) == {("all-gather", "model", 512): 2}
    scattered = shape_of(lambda x: lax.all_gather(lax.psum_scatter(x, "data", tiled=True), "data", tiled=True))
    assert scattered == {("reduce-scatter", "data", 128): 2, ("all-gather", "data", 128): 2}
    assert shape_of(lambda x: x + 1) == {}
    with pytest.raises(ValueError, match="all_reduce in a loop"):
        shape_of(lambda x: lax.psum(x, "model"), loops=True)
    with pytest.raises(ValueError, match="collective_permute"):
        shape_of(lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]))


def test_the_page_lists_every_program_that_was_compared(compiled):
    """Catches a program that differs from the formula in its row on the page, or that has no row."""
    page = (ROOT / "docs" / "explanation" / "meshes-on-paper.md").read_text("utf-8")
    listed = page.partition("| StableHLO | HLO |\n")[2].partition("\n\n")[0].splitlines()[1:]
    programs = [
        each
        for name, config in compiled.paper.configs()
        for mesh in compiled.meshes(config)
        for each in compiled.programs(name, config, mesh)
    ]
    rows = [compiled.paper.table("", [compiled.cells(each)]).splitlines()[-1] for each in programs]
    assert [line.startswith(row) for line, row in zip(listed, rows, strict=True)] == [True] * len(programs)
    assert all(line.split("|")[6] == " equal " for line in listed)


def test_the_reader_of_hlo_understands_both_forms_of_groups(compiled):
    """Catches a form of HLO that the compiler for 2 devices does not write."""
    mesh = compiled.paper.Mesh(2, 4)
    lines = [
        "%a = bf16[2,3]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        "%b = (f32[4]{0}, s32[5]{0}) all-reduce(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
        "%c = f32[8]{0} all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        "%d = f32[8]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        "%e = f32[8]{0} add(%all-reduce.1, %x)",
    ]
    assert compiled.in_hlo("\n".join(lines), mesh) == {
        ("all-reduce", "model", 12): 1,
        ("all-reduce", "data", 16): 1,
        ("all-reduce", "data", 20): 1,
        ("all-gather", "model", 32): 1,
        ("reduce-scatter", "model", 128): 1,
    }
    with pytest.raises(ValueError, match="all-to-all"):
        compiled.in_hlo("%f = f32[8]{0} all-to-all(%x), replica_groups=[2,4]<=[8]", mesh)
