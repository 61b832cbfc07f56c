"""Decoding through CUDA graphs. Without a GPU a stand-in takes the graph's place: it records what is computed and the
memory that it is computed in, and computes the same again there. It shows that what is replayed is right, not that a
driver can record it; the tests marked ``gpu`` show that.
"""

import itertools
import shutil
import subprocess
import warnings
import weakref

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.generation.choice import common_rule
from portable_gpt2.generation.decoder import Decoder, Generation
from portable_gpt2.random import gumbel
from portable_gpt2.sampling import Sampling
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

pg.get_backend("torch")
import portable_gpt2_backends.torch as adapter  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")
CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=24, n_vocab=61, n_ctx=150, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
PADDED = [0, 5, 2]


def memory(x):
    return x.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Keep every operation, its arguments and its results; as while recording a CUDA graph, nothing may wait for a
    value, no tensor is written that was there before, and results hold no numbers.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # The memory is kept and not the tensors.
        kept = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if function._schema.is_mutable:
            self.calls.append((function, *kept, None))
            assert function in (torch.ops.aten.index_copy_.default, torch.ops.aten.copy_.default), function
            return args[0]
        result = function(*args, **kwargs)
        assert isinstance(result, torch.Tensor | tuple | list), function
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        made = [x for x in made if memory(x) not in map(memory, given)]  # not a view
        for x in made:
            x.fill_(float("nan") if x.is_floating_point() else 0)
        self.calls.append((function, *kept, result if made else None))
        return result


class StandIn:
    """What takes the place of `_record` on a CPU, how many recordings there were, and how often they were run."""

    def __init__(self):
        self.made, self.launched, self.fails = 0, 0, False

    def record(self, fn, device):
        with Recording() as recording:
            results = fn()
        if self.fails:
            raise RuntimeError("no graph today")
        self.made += 1

        def launch():
            self.launched += 1
            for function, args, kwargs, result in recording.calls:
                found = function(*args, **kwargs)
                if result is not None:
                    for x, y in zip(tree_leaves(result), tree_leaves(found), strict=True):
                        if isinstance(x, torch.Tensor):
                            x.copy_(y)

        return launch, results


@pytest.fixture
def graphs(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(adapter, "_record", stand_in.record)
    monkeypatch.setattr(adapter, "_is_on_cuda", lambda tree: True)
    # On CUDA no value is read by the host: neither ids, to be checked, nor the result of attention.
    monkeypatch.setattr(adapter, "_is_checked", lambda ids: False)
    monkeypatch.setattr(adapter, "_has_weights", lambda y: True)
    monkeypatch.setattr(adapter, "_is_launched", lambda x: True)
    return stand_in


def new_model():
    return pg.GPT2(CONFIG, on_backend(pg.get_backend("torch"), WEIGHTS))


EAGER = new_model()
OPTIONS = pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}], ids=["greedy", "sampled"])


def texts(model, prompts, n, **options):
    """Return the tokens that a batch is continued by, padded before."""
    sampling = Sampling(**{"seed": 3, **options})
    batch = [Generation(list(prompt), sampling, index) for index, prompt in enumerate(prompts)]
    for _ in model._decoder.stream(batch, n):
        pass
    return [text.tokens for text in batch]


@OPTIONS
def test_a_text_is_the_eager_one_and_takes_one_graph(graphs, options):
    """Catches a position, or any other value, that is fixed in the graph; a graph for every token."""
    model = new_model()
    for made, prompt in enumerate(([3], [5, 6, 7], [1] * 70), 1):
        n = CONFIG.n_ctx - len(prompt)
        found = list(model.stream_ids(prompt, max_new_tokens=n, **options))
        assert found == list(EAGER.stream_ids(prompt, max_new_tokens=n, **options))
        assert 1 <= graphs.made <= made


@OPTIONS
def test_interleaved_texts_do_not_meet(graphs, options):
    """Catches a graph that writes into another text's buffers: more texts at a time than graphs are kept."""
    model, prompts = new_model(), [[i, i + 1] for i in range(adapter._CUDAGraphCache.MAX_GRAPHS + 2)]
    streams = [model.stream_ids(prompt, max_new_tokens=20, **options) for prompt in prompts]
    found = list(zip(*streams, strict=True))
    expected = [list(EAGER.stream_ids(prompt, max_new_tokens=20, **options)) for prompt in prompts]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == expected
    assert len(model._decoder._step.__wrapped__.__self__._calls) == adapter._CUDAGraphCache.MAX_GRAPHS
    assert list(model.stream_ids([0, 1], max_new_tokens=20, **options)) == expected[0]


def test_batches_with_padding_are_the_eager_ones(graphs):
    """Catches padding of one batch that stays in the graph for the next."""
    model = new_model()
    for lengths in ([9, 4, 7], [3, 9, 9], [9, 9, 1]):
        prompts = [list(range(1, 1 + n)) for n in lengths]
        assert texts(model, prompts, 80) == texts(EAGER, prompts, 80)
    assert graphs.made


@pytest.mark.parametrize(
    ("options", "other"),
    [({"temperature": 0}, {"temperature": 0}), ({"top_k": 5}, {"top_k": 9, "temperature": 0.5})],
    ids=["greedy", "sampled"],
)
def test_a_step_is_one_launch_that_reads_everything_from_its_buffers(graphs, options, other):
    """Catches a token, a position, a seed or an option that is fixed in the graph, and a result that is not the buffer:
    it would be copied by another launch.
    """
    decoder = new_model()._decoder

    def state_of(tokens, seed, options):
        generation = Generation(tokens, Sampling(seed=seed, **options))
        rule = common_rule([generation.sampling], CONFIG.n_vocab)
        cache = pg.new_cache(decoder.params, CONFIG, capacity=64)
        _, cache = decoder.read([tokens[:-1]], cache)
        return decoder._state([generation], cache, rule, (), None), rule

    state, rule = state_of([1, 2, 3], 7, options)
    run, launched = decoder._run(rule), []
    graph_cache = run.__wrapped__.__self__
    eager = torch.inference_mode()(graph_cache._fn)
    for tokens, seed, given in [([1, 2, 3], 7, options), ([5, 6, 7, 8, 9, 9], 2**64 - 9, other), ([4, 4], 7, other)]:
        expected, _ = state_of(tokens, seed, given)
        for own, x in zip(tree_leaves(state), tree_leaves(expected), strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(x)
        for _ in range(3):
            before = graphs.launched
            result, after = run(state)
            launched.append(graphs.launched - before)
            assert result is after.progress is state.progress
            found, expected = eager(expected)
            np.testing.assert_array_equal(result, found)
    assert launched == [0, *[1] * 8]
    assert len(graph_cache._calls) == 1


def test_the_kernel_of_variates_is_the_hosts_function(tmp_path):
    """Catches C code that differs from `random.gumbel`. A GPU compiles the same text with its own compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    source, program = tmp_path / "gumbel.cpp", tmp_path / "gumbel"
    main = """
        int main() {
          long long x[4], bits;
          while (std::scanf("%lld %lld %lld %lld", x, x + 1, x + 2, x + 3) == 4) {
            bits = gumbel<long long>(x[0], x[1], x[2], x[3]);
            std::printf("%lld\\n", bits);
          }
        }"""
    source.write_text("#include <cmath>\n#include <cstdio>\nusing std::log;\n" + adapter.GUMBEL + main)
    subprocess.run([compiler, source, "-o", program], check=True)
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**63, 2**64 - 1, *rng.integers(0, 2**64 - 1, 20, np.uint64).tolist()]
    draws = [(int(rng.integers(0, 2**31)), seed, seeds[-1 - i]) for i, seed in enumerate(seeds)]
    given = [(entry, *draw) for draw in draws for entry in range(9)]
    lines = "\n".join(" ".join(str(x - 2**64 if x >= 2**63 else x) for x in row) for row in given)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    found = np.asarray(done.stdout.split(), np.int64).view(np.float64).reshape(-1, 9)
    expected = [gumbel(np.arange(9), 9, *draw) for draw in draws]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def compiled_step():
    """Return a function that writes x into a cache at its position, and returns x + 1 and the cache."""
    backend = pg.get_backend("torch")
    return backend.compile(
        lambda w, x, cache: (x + w, {"k": backend.write(cache["k"], x[None, :], cache["position"])}),
        torch.ones(2),
        donate=("cache",),
    )


def test_a_result_is_not_overwritten_by_the_next(graphs):
    """Catches logits that are the graph's own memory, and buffers that are copied."""
    buffer, step, results = torch.zeros(8, 2), compiled_step(), []
    for i in range(6):
        result, cache = step(torch.full((2,), float(i)), {"k": buffer, "position": i})
        assert cache["k"] is buffer
        results.append(result)
    assert graphs.made == 1
    np.testing.assert_array_equal(torch.stack(results)[:, 0], np.arange(1, 7))
    np.testing.assert_array_equal(buffer[:, 0], [0, 1, 2, 3, 4, 5, 0, 0])


def test_buffers_at_the_same_address_share_a_graph_and_none_is_held(graphs):
    """Catches a graph that returns the tensors of a text before, or keeps them from being freed."""
    memory, step = torch.zeros(8, 2), compiled_step()
    for first in (0, 3):
        buffer = memory[:]
        for i in range(first, first + 3):
            _, cache = step(torch.full((2,), float(i)), {"k": buffer, "position": i})
            assert cache["k"] is buffer
        alive = weakref.ref(buffer)
        del buffer, cache
        assert alive() is None
    assert graphs.made == 1
    np.testing.assert_array_equal(memory[:, 0], [0, 1, 2, 3, 4, 5, 0, 0])


def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(graphs):
    graphs.fails = True
    model = new_model()
    with pytest.warns(RuntimeWarning, match="no CUDA graph was recorded: RuntimeError: no graph today") as warned:
        found = list(model.stream_ids([3], max_new_tokens=149, temperature=0))
    assert len(warned) == 1
    assert found == list(EAGER.stream_ids([3], max_new_tokens=149, temperature=0))


def test_a_value_that_is_waited_for_cannot_be_recorded():
    """Catches a stand-in that permits what a driver refuses."""
    with pytest.raises(RuntimeError, match="not permitted"), Recording():
        torch.ones(()).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", [None, PADDED])
def test_a_step_takes_no_number_from_the_host(dtype, padding, monkeypatch):
    """Catches a constant that is made on the host and copied, or a value that is read: a driver refuses to record
    either. On the device `meta`, which has no numbers, a copy from the host can be seen and a value cannot be read.
    """
    backend = pg.get_backend("torch")
    monkeypatch.setattr(type(backend), "resolve_device", lambda self, device: torch.device(device))  # allows `meta`
    params = on_backend(backend, WEIGHTS, dtype, device="meta")
    cache = pg.new_cache(params, CONFIG, batch=3, capacity=64, padding=padding)
    decoder = Decoder(backend, params, CONFIG, torch.device("meta"))
    strays = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            strays.extend(function for x in found if x.device.type != "meta")
            return result

    for options in ({"temperature": 0}, {"top_k": 5, "top_p": 0.9}):
        batch = [Generation([1, 2], Sampling(seed=1, **options)) for _ in range(3)]
        rule = common_rule([generation.sampling for generation in batch], CONFIG.n_vocab)
        run, state = decoder._run(rule), decoder._state(batch, cache._replace(position=1), rule, (), None)
        with Look():
            run(state)
        assert not strays


def test_on_a_cpu_nothing_is_recorded():
    assert EAGER._decoder._step.__wrapped__.func.__name__ == "step"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_a_text_is_the_eager_one(monkeypatch):
    """Catches what the stand-in cannot: a step that the driver refuses to record, which would warn."""
    made = []
    record = adapter._record
    monkeypatch.setattr(adapter, "_record", lambda *args: made.append(1) or record(*args))
    model = pg.GPT2(CONFIG, on_backend(pg.get_backend("torch"), WEIGHTS, device="cuda:0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streams = [model.stream_ids([i], max_new_tokens=149, temperature=0) for i in (3, 4)]
        found = list(itertools.chain.from_iterable(zip(*streams, strict=True)))
        assert texts(model, [[1, 2], [3], [4, 5, 6]], 80) == texts(EAGER, [[1, 2], [3], [4, 5, 6]], 80)
    expected = [list(EAGER.stream_ids([i], max_new_tokens=149, temperature=0)) for i in (3, 4)]
    assert [found[::2], found[1::2]] == expected
    assert made
