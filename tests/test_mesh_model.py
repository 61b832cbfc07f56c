"""What a mesh costs on paper: the formulas of bench/mesh_model.py, and the page that shows their tables."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.params import shapes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "meshes-on-paper.md"
# Each size of a shape is a different number, so that a formula with another size gives another result.
TINY = pg.GPT2Config(n_layer=3, n_head=4, n_embd=8, n_inner=20, n_vocab=21, n_ctx=16, eos_token_id=None)
PUBLISHED = {name: pg.GPT2Config.published(name) for name in ("124M", "355M", "774M", "1558M")}


@pytest.fixture(scope="module")
def paper():
    """Import the module from the checkout, which must not be on sys.path: the tests use an installed copy."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("bench.mesh_model")


def test_the_page_has_the_tables_of_the_command(paper):
    """Catches a formula that was changed without the page. ``python -m bench.mesh_model`` prints the new tables."""
    assert PAGE.read_text("utf-8").partition("\n## Tables\n\n")[2] == paper.page()


def test_the_claims_of_the_page_follow_from_its_formulas(paper):
    """Catches a sentence of the page that a new formula contradicts."""
    xl, decode = PUBLISHED["1558M"], functools.partial(paper.decode_time, batch=1, keys=paper.KEYS, dtype="bfloat16")
    assert paper.parameters(xl, paper.Mesh()) * 2 == pytest.approx(3.1e9, rel=0.01)
    memory = paper.training_memory(xl, paper.Mesh(), paper.MICRO_BATCH, paper.CONTEXT, "float32")
    assert sum(memory) == pytest.approx(69e9, rel=0.01)
    assert sum(memory) < paper.H100.memory
    assert [paper.models(config) for config in PUBLISHED.values()] == [
        [1, 2, 3, 4, 6, 12],
        [1, 2, 4, 8, 16],
        [1, 2, 4, 5, 10, 20],
        [1, 5, 25],
    ]

    four, small = paper.Mesh(model=4), PUBLISHED["124M"]
    messages = [sum(each.size for each in paper.choice(small, four, 64, "bfloat16", k)) for k in (None, 40)]
    assert messages == [pytest.approx(19e6, rel=0.02), pytest.approx(0.1e6, rel=0.02)]

    def fastest(time, config):
        return min(paper.divided(config), key=lambda mesh: time(config, mesh).total).model

    assert [fastest(decode, config) for config in PUBLISHED.values()] == [1, 1, 5, 5]
    prompt = functools.partial(paper.prompt_time, batch=1, seq=paper.CONTEXT, dtype="bfloat16")
    assert [fastest(prompt, config) for config in PUBLISHED.values()] == [1, 1, 5, 5]
    for config in PUBLISHED.values():
        for dtype, batch in paper.SETTINGS:
            times = {
                m: paper.decode_time(config, paper.Mesh(1, m), batch, paper.KEYS, dtype).total
                for m in paper.models(config)
            }
            in_one_host = min(time for m, time in times.items() if m <= 8)
            assert all(time > in_one_host for m, time in times.items() if m > 8)
            assert batch > 1 or all(time > times[1] for m, time in times.items() if m > 8)
        alone = paper.decode_time(config, paper.Mesh(), 64, paper.KEYS, "bfloat16").total
        many = paper.decode_time(config, paper.Mesh(data=256), 256 * 64, paper.KEYS, "bfloat16").total
        assert alone / many >= 0.775
        efficiencies = {row[0]: row[-1] for row in paper.training_rows(config, "float32") if "model=1" in row[1]}
        assert float(efficiencies[16].strip("%")) >= 99
        assert float(efficiencies[256].strip("%")) >= 68
    saved = [
        sum(paper.training_memory(xl, paper.Mesh(data=128), 128, 1024, "float32", shard_optimizer=each))
        for each in (False, True)
    ]
    assert 0.99 < saved[1] / saved[0] < 1


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_device_holds_the_elements_of_its_slices(paper, n):
    """Catches a parameter that is not divided, or is divided along with those that every device holds."""
    weights = {path: np.zeros(shape) for path, shape in shapes(TINY).items()}
    held = 0
    for path, w in weights.items():
        name = path.split("/", 1)[-1]
        if name in ("attn/c_attn/w", "attn/c_attn/b", "mlp/c_fc/w", "mlp/c_fc/b"):
            w = np.array_split(w, n, axis=-1)[0]
        elif name in ("attn/c_proj/w", "mlp/c_proj/w"):
            w = np.array_split(w, n, axis=0)[0]
        elif name == "wte":
            w = np.array_split(w, n, axis=0)[0]  # the first part has the row that is left over
        held += w.size
    assert paper.parameters(TINY, paper.Mesh(model=n)) == held
    assert paper.parameters(TINY, paper.Mesh(data=7, model=n)) == held


def test_a_model_with_an_output_matrix_of_its_own_multiplies_by_that_one(paper):
    """Catches logits that count twice, and rows of lm_head that are not divided."""
    config = pg.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, n_vocab=20, n_ctx=4, tie_word_embeddings=False, eos_token_id=None
    )
    tied = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=20, n_ctx=4, eos_token_id=None)
    for n in (1, 2):
        mesh = paper.Mesh(model=n)
        assert paper.factors(config, mesh) == paper.factors(tied, mesh) == (12 * 8 * 8 + 20 * 8) // n
        assert paper.parameters(config, mesh) - paper.parameters(tied, mesh) == 20 * 8 // n
        assert paper.read(config, mesh) == paper.read(tied, mesh)


def test_the_cache_has_the_bytes_of_the_cache_of_the_model(paper):
    """Catches a cache that is not divided by the heads, or not by the texts."""
    cache = pg.new_cache(pg.init_params(TINY, backend="numpy"), TINY, batch=6, capacity=5)
    whole = sum(x.nbytes for x in (*cache.k, *cache.v))
    assert paper.cache_bytes(TINY, paper.Mesh(), 6, 5, "float32") == whole
    assert paper.cache_bytes(TINY, paper.Mesh(data=3, model=4), 6, 5, "bfloat16") == whole / 24


def test_activations_are_those_that_the_model_computes(paper):
    """Catches an activation that the formula forgets: the results of the ops whose backward pass reads them."""
    sizes = {"whole": 0, "divided": 0, "logits": 0}
    whole = ("embedding", "residual", "attn/residual", "ln_1", "ln_2", "ln_f")
    part = ("attn/q", "attn/k", "attn/v", "attn/attention", "mlp/c_fc", "mlp/gelu")

    def observe(name, x):
        name = name.split("/", 1)[1] if name.startswith("h") else name
        for kind, names in (("whole", whole), ("divided", part), ("logits", ("logits",))):
            sizes[kind] += x.size if name in names else 0
        return x

    pg.gpt2(pg.init_params(TINY, backend="numpy"), np.zeros((2, 5), np.int32), TINY, observe=observe)
    for mesh, dtype in ((paper.Mesh(), "float32"), (paper.Mesh(data=2), "bfloat16"), (paper.Mesh(2, 4), "float32")):
        logits = 2 * 10 / mesh.data * math.ceil(21 / mesh.model) * 4
        kept = (sizes["whole"] + sizes["divided"] / mesh.model) / mesh.data * paper.BYTES[dtype]
        assert paper.training_memory(TINY, mesh, 2, 5, dtype).activations == kept + logits
    assert sizes["logits"] == 10 * 21


def test_a_parameter_takes_16_or_18_bytes_while_it_is_trained(paper):
    """Catches moments that --shard-optimizer does not divide, and a copy in 16 bits that float32 does not need."""
    n, mesh = paper.parameters(TINY, paper.Mesh(model=2)), paper.Mesh(data=4, model=2)
    biases = 3 * (3 * 8 + 20) // 2  # of c_attn and c_fc, whose only axis is divided over `model`

    divided = [
        paper.is_divided(TINY, path, paper.Mesh(data=data))
        for path, data in (("wte", 7), ("h0/mlp/c_proj/w", 5), ("h0/mlp/c_fc/w", 5), ("wpe", 16), ("wte", 8))
    ]
    assert divided == [False, False, False, True, True]  # 7 and 5 divide only axes that `model` divides

    def of_parameters(dtype, **options):
        return sum(paper.training_memory(TINY, mesh, 4, 5, dtype, **options)[:3])

    assert of_parameters("float32") == 16 * n
    assert of_parameters("bfloat16") == 18 * n
    assert of_parameters("bfloat16", shard_optimizer=True) == 10 * n + 8 * (n - biases) / 4 + 8 * biases


def around_a_ring(n, size, *, gathers):
    """Add an array of `size` elements over n devices around a ring; return the sums and the elements that one sends.

    Each device sends a part to the next device n - 1 times, and adds what it gets. Then, if `gathers`, it sends the
    sums on n - 1 times.
    """
    arrays = [np.arange(size, dtype=float) * (i + 1) for i in range(n)]
    parts, sent = [np.split(a, n) for a in arrays], 0
    for step in range((n - 1) * (1 + gathers)):
        moved = [(i, (i - step) % n, parts[i][(i - step) % n].copy()) for i in range(n)]
        for i, j, part in moved:
            to = (i + 1) % n
            parts[to][j] = parts[to][j] + part if step < n - 1 else part
        sent += moved[0][2].size
    return parts, sent


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_bytes_of_a_collective_are_those_of_a_ring(paper, n):
    """Catches a factor of a collective, by moving an array around a ring."""
    size, expected = 24, np.arange(24.0) * n * (n + 1) / 2
    parts, sent = around_a_ring(n, size, gathers=True)
    assert all((np.concatenate(each) == expected).all() for each in parts)
    assert paper.sent(paper.Collective("", "all-reduce", "model", size, 5), n) == pytest.approx(5 * sent)
    parts, sent = around_a_ring(n, size, gathers=False)
    assert all((parts[i][(i + 1) % n] == np.split(expected, n)[(i + 1) % n]).all() for i in range(n))
    for kind in ("reduce-scatter", "all-gather"):
        assert paper.sent(paper.Collective("", kind, "model", size), n) == pytest.approx(sent)
    assert paper.sent(paper.Collective("", "all-reduce", "model", size), 1) == 0


@pytest.mark.parametrize(
    ("mesh", "axis", "devices", "hosts", "per_host"),
    [
        ((1, 8), "model", 8, 1, 8),
        ((1, 12), "model", 12, 2, 6),
        ((1, 25), "model", 25, 4, 6),
        ((8, 1), "data", 8, 1, 8),
        ((16, 1), "data", 16, 2, 8),
        ((4, 2), "data", 4, 1, 4),
        ((16, 2), "data", 16, 4, 4),
        ((4, 5), "data", 4, 4, 1),  # one group of 5 per host, and 3 devices without work
        ((2, 16), "data", 2, 2, 1),
    ],
)
def test_a_group_has_the_fewest_hosts(paper, mesh, axis, devices, hosts, per_host):
    """Catches groups along ``data`` that share a host with too many devices, and groups along ``model`` cut in two."""
    found = paper.group(paper.Mesh(*mesh), axis)
    assert (found.devices, found.hosts, found.per_host) == (devices, hosts, per_host)


def test_the_seconds_of_a_collective(paper):
    """Catches a bandwidth in both directions, a latency that is counted once for all, and bits for bytes."""
    message = [paper.Collective("", "all-reduce", "data", 10**9, 2)]
    one_host, two_hosts, alone = paper.Mesh(data=8), paper.Mesh(data=16), paper.Mesh(data=8, model=8)
    assert paper.seconds(message, one_host) == pytest.approx(2 * (1.75 / 450 + 5e-6))
    assert paper.seconds(message, two_hosts) == pytest.approx(2 * (1.875 / 400 + 15e-6))
    assert paper.seconds(message, alone) == pytest.approx(2 * (1.75 / 50 + 35e-6))
    assert paper.seconds(message, paper.Mesh(model=8)) == 0


def test_at_its_longest_latency_a_mesh_is_as_fast_as_one_device(paper):
    """Catches a collective that the last column of a table does not count, and bytes that it leaves out."""
    for name, n in (("124M", 4), ("1558M", 5)):
        config, mesh = PUBLISHED[name], paper.Mesh(model=n)
        latency = paper.longest_latency(config, mesh, 64, 300, "bfloat16")
        hardware = paper.H100._replace(latency=latency)
        on_mesh = paper.decode_time(config, mesh, 64, 300, "bfloat16", hardware=hardware)
        assert on_mesh.total == pytest.approx(paper.decode_time(config, paper.Mesh(), 64, 300, "bfloat16").total)


def test_one_device_does_the_operations_of_the_literature(paper):
    """Catches an operation that is counted twice or not at all.

    Kaplan et al., "Scaling Laws for Neural Language Models", 2020, table 1: without embeddings, a token's forward pass
    has 2 N + 2 n_layer n_ctx n_embd operations, and training three times as many. The logits add 2 n_vocab n_embd.
    """
    for config in PUBLISHED.values():
        e, n_layer, n_vocab = config.n_embd, config.n_layer, config.n_vocab
        forward = 2 * 12 * n_layer * e**2 + 2 * n_layer * 1024 * e
        prompt = paper.prompt_time(config, paper.Mesh(), 1, 1024, "bfloat16").own * 989e12
        assert prompt == pytest.approx(1024 * forward + 2 * n_vocab * e, rel=1e-3)
        step = paper.training_time(config, paper.Mesh(), 16, 1024, 8, "float32")
        assert step.own == pytest.approx(16 * 1024 * 3 * (forward + 2 * n_vocab * e) / 67e12, rel=0.01)
        assert step.collectives == 0


def test_the_update_reads_and_writes_the_memory(paper):
    """Catches an update that --shard-optimizer does not divide, and one that does not write what it changes."""
    config, mesh = PUBLISHED["124M"], paper.Mesh(data=8, model=2)
    hardware = paper.H100._replace(flops_16=math.inf)
    n = paper.parameters(config, mesh)
    for sharded, share in ((False, 1), (True, 8)):
        time = paper.training_time(config, mesh, 8, 1024, 1, "bfloat16", shard_optimizer=sharded, hardware=hardware)
        # Parameters, gradients and two moments are read; parameters and moments are written.
        assert time.own == pytest.approx((4 + 3) * 4 * n / share / 3.35e12)


def test_devices_that_divide_the_weights_divide_the_work(paper):
    """Catches arithmetic, or reads of the memory, that each device of the axis ``model`` repeats."""
    config = pg.GPT2Config(n_layer=2, n_head=8, n_embd=512, n_vocab=1024, n_ctx=64, eos_token_id=None)
    no_memory = paper.H100._replace(memory_bandwidth=math.inf)
    for dtype, flops in (("bfloat16", 989e12), ("float32", 67e12)):
        for time in (
            lambda mesh: paper.prompt_time(config, mesh, 3, 64, dtype, hardware=no_memory).own,  # noqa: B023
            lambda mesh: paper.training_time(config, mesh, 3, 64, 3, dtype, hardware=no_memory).own,  # noqa: B023
            lambda mesh: paper.decode_time(config, mesh, 3, 50, dtype, hardware=no_memory).own,  # noqa: B023
        ):
            assert time(paper.Mesh(model=8)) == pytest.approx(time(paper.Mesh()) / 8)
        token = 2 * (2 * 12 * 512**2 + 1024 * 512) + 4 * 2 * 50 * 512
        assert paper.decode_time(config, paper.Mesh(), 3, 50, dtype, hardware=no_memory).own == pytest.approx(
            3 * token / flops
        )
        prompt = 64 * (2 * 2 * 12 * 512**2 + 4 * 2 * 32.5 * 512) + 2 * 1024 * 512
        assert paper.prompt_time(config, paper.Mesh(), 3, 64, dtype, hardware=no_memory).own == pytest.approx(
            3 * prompt / flops
        )


def test_a_token_gathers_the_largest_logits_of_each_part(paper):
    """Catches a gather of the whole vocabulary, and one whose message is only one part."""
    mesh = paper.Mesh(data=2, model=4)
    found = paper.decode(TINY, mesh, 6, "bfloat16", top_k=3)
    gathers = [each[1:] for each in found if each.kind == "all-gather"]
    assert gathers == [
        ("all-gather", "model", 3 * 4 * 4 * 2, 1),
        ("all-gather", "model", 3 * 4 * 4 * 4, 1),
        ("all-gather", "data", 2 * 3 * 4 * 4 * 2, 1),
        ("all-gather", "data", 2 * 3 * 4 * 4 * 4, 1),
    ]
    assert paper.count(found) == 2 * 3 + 1 + 4
    found = [paper.candidates(TINY, mesh, k) for k in (1, 2, 3, 4, 20, None)]
    assert found == [2, 4, 4, 6, 6, 6]  # a part has 6 logits
    assert paper.decode(TINY, paper.Mesh(), 8, "bfloat16") == []


def test_a_token_reads_each_weight_once(paper):
    """Catches a position table that is read whole, and keys that are not divided or not counted."""
    config = PUBLISHED["124M"]
    weights = 2 * (pg.params.count(config) - 1024 * 768)
    keys = 2 * 12 * 768 * 100 * 2
    assert paper.decode_time(config, paper.Mesh(), 3, 100, "bfloat16").own == pytest.approx(
        (weights + 3 * keys) / 3.35e12
    )
    many = paper.decode_time(config, paper.Mesh(), 4000, 1, "float32").own  # here arithmetic is the limit
    assert many == pytest.approx(4000 * 2 * (12 * 12 * 768**2 + 50257 * 768) / 67e12, rel=1e-3)


def test_twice_the_devices_generate_twice_the_texts_with_the_same_work(paper):
    """Catches work, or a message over the axis ``model``, that grows with the axis ``data``."""
    config = PUBLISHED["355M"]
    for time in (paper.decode_time, paper.prompt_time):
        one, many = (time(config, paper.Mesh(n, 4), 16 * n, 100, "bfloat16") for n in (1, 32))
        assert many.own == one.own
        gathers = [each for each in paper.decode(config, paper.Mesh(32, 4), 512, "bfloat16") if each.axis == "data"]
        assert many.collectives - one.collectives == pytest.approx(paper.seconds(gathers, paper.Mesh(32, 4)))


def test_a_step_sends_its_gradients_once(paper):
    """Catches sums over ``data`` that each micro-batch makes, and sums over ``model`` that only one makes."""
    mesh, n = paper.Mesh(data=4, model=2), paper.parameters(TINY, paper.Mesh(model=2))
    found = paper.training(TINY, mesh, 64, 5, 4, "bfloat16")
    of_parameters = [each for each in found if each.name == "gradients"]
    assert sum(each.size for each in of_parameters) == 4 * n
    assert len(of_parameters) == len(shapes(TINY))  # each tensor is summed by itself
    assert {(each.kind, each.axis, each.count) for each in of_parameters} == {("all-reduce", "data", 1)}
    found = [each for each in found if each.name != "gradients"]
    sums = {(each.kind, each.axis, each.size): 0 for each in found}
    for each in found:
        sums[each.kind, each.axis, each.size] += each.count
    micro_batches = 64 // 4 // 4
    assert sums == {
        ("all-reduce", "model", 4 * 5 * 8 * 2): micro_batches * 2 * (2 * 3 + 1),  # 4 texts, 5 tokens, E = 8
        ("all-reduce", "model", 4 * 5 * 4): micro_batches * 5,
        ("all-reduce", "data", 4): 1,  # the loss
        ("all-reduce", "model", 4): 1,  # the norm
    }
    sharded = paper.training(TINY, mesh, 64, 5, 4, "bfloat16", shard_optimizer=True)
    gathers = [each for each in sharded if each.kind == "all-gather"]
    biases = 3 * (3 * 8 + 20) // 2  # of c_attn and c_fc, whose only axis is divided over `model`
    assert sum(each.size for each in gathers) == 4 * (n - biases)
    scattered = [each for each in sharded if each.kind == "reduce-scatter"]
    assert [each.size for each in scattered] == [each.size for each in gathers]
    squares = paper.Collective("the gradient's norm", "all-reduce", "data", 4)
    assert sharded.count(squares) == 2  # of tensors that are divided over `model`, and of those that are not
    summed = [each for each in sharded if each.kind == "all-reduce" and each != squares]
    expected = paper.training(TINY, mesh, 64, 5, 4, "bfloat16")
    summed += [each._replace(kind="all-reduce") for each in scattered]
    assert sorted(summed) == sorted(expected)
    alone = paper.Mesh(data=4)
    assert paper.training(TINY, alone, 64, 5, 4, "bfloat16", shard_optimizer=True).count(squares) == 1
    assert paper.training(TINY, paper.Mesh(), 64, 5, 4, "bfloat16") == []


def test_numbers_have_three_digits(paper):
    """Catches a rounded zero, and a large number without its last digits."""
    assert [paper.number(x) for x in (0.0, 0.000123456, 0.5, 12.345, 123.4, 98765.4)] == [
        "0",
        "0.000123",
        "0.500",
        "12.3",
        "123",
        "98,765",
    ]
