"""Arrays stay on the device that they were put on, and no array is created on another device.

Without an accelerator every framework has a second device all the same: JAX and TensorFlow a second CPU (conftest
splits it), array_api_strict one that refuses arithmetic with the first, and torch's ``meta``, which has shapes and no
numbers. Where the frameworks report accelerators, the same tests run on each, marked ``gpu``.
"""

import contextlib
import gc
import pathlib
import types

import frameworks
import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import checks
from portable_gpt2.cli import main
from portable_gpt2.numerics import Numerics, stated
from portable_gpt2.testing import claims, own_process, plugin
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights, truth_and_error

SECOND = {"tensorflow": "cpu:1", "jax": "cpu:1", "torch": "meta", "array_api_strict": "device1"}

# More positions than 64, where a backend that compiles grows its cache.
CONFIG = pg.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_vocab=53, n_ctx=80, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.n_vocab, (2, 11)).astype(np.int32)

ACCELERATORS = plugin.devices(frameworks.OURS, "")
PLACES = [pytest.param(*place, id="-".join(place)) for place in SECOND.items()]
PLACES += [pytest.param(*place, id="-".join(place), marks=pytest.mark.gpu) for place in ACCELERATORS]
at_every_place = pytest.mark.parametrize(("backend", "device"), PLACES, indirect=["backend"])
WITH_NUMBERS = [place for place in PLACES if place.id != "torch-meta"]


@pytest.fixture
def with_shapes_alone(monkeypatch):
    """Let torch's ``meta`` pass for a device, which a model is refused on."""
    if "torch" in pg.available_backends():
        import torch

        monkeypatch.setattr(type(pg.get_backend("torch")), "resolve_device", lambda self, device: torch.device(device))


def test_a_device_without_values_is_refused(torch, checkpoint, capsys):
    """Catches a model on torch's ``meta``, of which the first number that is read is an error of the framework's."""
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_vocab=5, n_ctx=4, eos_token_id=None)
    on_cpu = pg.params.flatten(on_backend(pg.get_backend("torch"), random_weights(config)))
    on_meta = pg.params.nest({path: x.to("meta") for path, x in on_cpu})
    for call in (
        lambda: pg.GPT2.load(checkpoint, backend="torch", device="meta"),
        lambda: pg.GPT2.load(checkpoint, backend="torch", device=torch.device("meta")),
        lambda: pg.get_backend("torch", "meta"),
        lambda: pg.get_backend("torch").from_numpy(np.ones(2), device="meta"),
        lambda: pg.init_params(config, backend="torch", device="meta"),
        lambda: pg.GPT2(config, on_meta),
    ):
        with pytest.raises(ValueError, match="device 'meta' holds shapes and no values; a model needs"):
            call()
    with torch.device("meta"), pytest.raises(ValueError, match="holds shapes and no values"):
        pg.GPT2.load(checkpoint, backend="torch")
    train = ["train", "--data", str(checkpoint / "config.json"), "--out", str(checkpoint / "run")]
    for command in (["generate", "--model", str(checkpoint)], train):
        assert main([*command, "--backend", "torch", "--device", "meta"]) == 2
        assert "device 'meta' holds shapes and no values" in capsys.readouterr().err
    assert not (checkpoint / "run").exists()
    logits, _ = pg.gpt2(on_meta, torch.zeros((2, 3), dtype=torch.int64, device="meta"), config)  # shapes are computed
    assert logits.shape == (2, 3, 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    pg.GPT2(CONFIG, on_backend(pg.get_backend("numpy"), WEIGHTS)).save(directory)
    return directory


@pytest.fixture(scope="module")
def greedy():
    """What NumPy continues, past the first size of a cache."""
    model = pg.GPT2(CONFIG, on_backend(pg.get_backend("numpy"), WEIGHTS))
    return list(model.stream_ids([1, 2], max_new_tokens=68, temperature=0))


@contextlib.contextmanager
def jax_strays(device):
    """Collect what is alive on another device afterwards; a copy from device to device raises."""
    import jax

    before = jax.live_arrays()  # held, so that no address is used again
    known = {id(x) for x in before}
    strays = []
    with jax.transfer_guard_device_to_device("disallow"):
        yield strays
    gc.collect()
    backend = pg.get_backend("jax")
    strays += [x.shape for x in jax.live_arrays() if id(x) not in known and backend.device(x) != device]


@contextlib.contextmanager
def tensorflow_strays(device):
    """Collect every operation whose result lies on another device."""
    from tensorflow.python.framework import op_callbacks

    backend, strays = pg.get_backend("tensorflow"), []

    def look(op_type, inputs, attributes, outputs, op_name=None, graph=None):
        if graph is None:  # in a graph, the device is that of the call
            placed = [
                x for x in outputs if device.startswith("cpu") or x.dtype.is_floating
            ]  # a GPU's int32 is on the host
            strays.extend((op_type, x.device) for x in placed if backend.device(x) != device)

    op_callbacks.add_op_callback(look)
    try:
        yield strays
    finally:
        op_callbacks.remove_op_callback(look)


def computes(function):
    """Return whether an operation of PyTorch computes: new memory, a copy or a view does not.

    A view has the memory of an argument and writes nothing. In inference mode, a copy is one of these, `aten.to`, whose
    result may be its argument; elsewhere it is `aten._to_copy`.
    """
    import torch

    memory = [result.alias_info for result in function._schema.returns]
    is_view = any(shared is not None and not shared.is_write for shared in memory)
    aten = torch.ops.aten
    return not is_view and function not in (aten._to_copy.default, aten.empty.memory_format, aten.copy_.default)


@contextlib.contextmanager
def torch_strays(device):
    """Collect every operation that computes on another device; copies from and to the host do not."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    strays = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and str(result.device) != device and computes(function):
                strays.append((str(function), str(result.device)))
            return result

    with Look():
        yield strays


@contextlib.contextmanager
def strict_strays(device):
    """Collect nothing: arithmetic between devices raises."""
    yield []


STRAYS = {
    "jax": jax_strays,
    "tensorflow": tensorflow_strays,
    "torch": torch_strays,
    "array_api_strict": strict_strays,
}


def leaves(tree):
    return [x for path, x in pg.params.flatten(tree)]


@pytest.mark.parametrize("backend", SECOND, indirect=True)
@pytest.mark.usefixtures("with_shapes_alone")
def test_strays_are_seen(backend):
    """Catches a watch that sees nothing: it must report an array that is computed on the first device."""
    device = SECOND[backend.name]
    first = backend.from_numpy(np.ones(3, np.float32), device="cpu")
    with STRAYS[backend.name](device) as strays:
        kept = first + first
    second = backend.from_numpy(np.ones(3, np.float32), device=device)
    if backend.name == "array_api_strict":
        with pytest.raises(ValueError, match="different devices"):
            kept + second
    else:
        assert len(strays) == 1


class Placed:
    """A backend's name and its device, for the constants, which need no framework."""

    def __init__(self, name, device=None):
        self.name, self.default_device = name, device

    def devices(self):
        return {device: device for device in ("cpu", "cpu:1", "cuda:0", "cuda:1")}


def test_a_stated_error_belongs_to_a_backend_and_a_kind_of_device():
    """Catches a constant of another device or backend, which would hide an error or report one that is none."""
    of_cpu = Numerics(exp=(2, 1.25), tanh=3)
    backend = types.SimpleNamespace(numerics={"cpu": {"float32": of_cpu}, "cuda": {"float32": Numerics(log=5)}})
    assert [stated(backend, "float32", kind) for kind in ("cpu", "tpu", "cuda")] == [of_cpu, of_cpu, Numerics(log=5)]
    assert stated(backend, "bfloat16", "cpu") == of_cpu
    assert stated(backend, "float64", "cuda") == Numerics()
    assert [claims.place(Placed(*place)) for place in (("torch", "cpu"), ("torch", "cuda:1"), ("jax",))] == [
        "torch-cpu",
        "torch-cuda:1",
        "jax",
    ]


def test_the_devices_of_the_tests_are_chosen_by_name():
    """Catches a device that no framework has, with which no test would run, and meta, which has no values."""
    assert plugin.devices(["numpy", "array_api_strict"], "device1") == [("array_api_strict", "device1")]
    found = plugin.devices(["numpy", "array_api_strict"], "")
    assert found == [("array_api_strict", "device1"), ("array_api_strict", "device2")]
    for devices, unknown in (("meta", "meta"), ("device1,cuda:9", "cuda:9")):
        with pytest.raises(pytest.UsageError, match=f"no framework has {unknown}; .*numpy has cpu"):
            plugin.devices(["numpy", "array_api_strict", "torch"], devices)


def test_the_properties_of_an_op_run_on_the_devices():
    """Catches a fixture that loses the device on the way: the table of the largest errors names it."""
    test = "portable_gpt2.testing.ops.test_gelu::test_the_bound_of_gelu_is_tight"
    options = "--device=device1", "--backend=array_api_strict", "--pyargs"
    failed, said = own_process.run_test(test, *options, directory=pathlib.Path(__file__).parents[1])
    assert failed == []
    assert "gelu               array_api_strict-device1" in said
    assert "2 passed" in said


@pytest.mark.parametrize("is_inference", [True, False])
def test_a_copy_to_the_host_is_no_stray_and_a_computation_there_is(torch, is_inference):
    """Catches a watch that does not know inference mode, where other operations copy; the CUDA device is a fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(is_inference), FakeTensorMode():
        x = torch.empty(3, device="cuda:0")
        with torch_strays("cuda:0") as strays:
            copied = (x + x).detach().cpu().resolve_neg().view(3, 1)
            copied[:, 0].to("cuda:0")
            torch.empty(3).copy_(x)  # as a copy to page-locked memory is made
        assert not strays
        with torch_strays("cuda:0") as strays:
            copied + copied
            copied.add_(1)
            torch.arange(3)
    assert [name for name, _ in strays] == ["aten.add.Tensor", "aten.add_.Tensor", "aten.arange.default"]


@at_every_place
@pytest.mark.usefixtures("with_shapes_alone")
def test_what_is_made_on_a_device_is_there(backend, device, checkpoint):
    """Catches a device that is dropped on the way: by name, by a backend that holds it, by a default."""
    with STRAYS[backend.name](device) as strays:
        made = [
            *leaves(pg.GPT2.load(checkpoint, backend=backend, device=device).params),
            *leaves(pg.GPT2.load(checkpoint, backend=pg.get_backend(backend, device)).params),
            *leaves(pg.init_params(CONFIG, backend=backend, device=device)),
            *leaves(pg.init_conv1d("x", 3, 4, backend=backend, device=device)),
            backend.from_numpy(TOKENS, device=device),
            pg.get_backend(backend, device).from_numpy(TOKENS),
        ]
        with pg.use_backend(backend, device):
            made += [*leaves(pg.GPT2.load(checkpoint).params), *leaves(pg.init_params(CONFIG))]
    assert not strays
    assert {backend.device(x) for x in made} == {device}


@at_every_place
@pytest.mark.usefixtures("with_shapes_alone")
def test_the_model_computes_where_its_parameters_are(backend, device):
    """Catches positions, a mask, a cache or its growth made on the framework's default device."""
    params = on_backend(backend, WEIGHTS, device=device)
    ids = backend.from_numpy(TOKENS, device=device)
    truth, error = truth_and_error(WEIGHTS, TOKENS, CONFIG)

    with STRAYS[backend.name](device) as strays:
        model = pg.GPT2(CONFIG, params)
        logits, traced = model.logits(TOKENS), model.trace(TOKENS[0])
        cache = pg.new_cache(params, CONFIG, batch=2, capacity=8)
        with frameworks.by_default(backend, device):
            first, cache = pg.gpt2(params, ids[:, :8], CONFIG, cache)
        cache = pg.grow_cache(cache, 11)
        with frameworks.by_default(backend, device):
            second, cache = pg.gpt2(params, ids[:, 8:], CONFIG, cache)

    assert not strays
    assert {backend.device(x) for x in [logits, first, second, *traced.values(), *cache.k, *cache.v]} == {device}
    if device != "meta":
        for found, expected in ((logits, truth), (first, truth[:, :8]), (second, truth[:, 8:])):
            assert abs(pg.to_numpy(found) - expected).max() <= 4 * error


@pytest.mark.parametrize(("backend", "device"), WITH_NUMBERS, indirect=["backend"])
def test_generation_runs_where_the_parameters_are(backend, device, greedy):
    """Catches a compiled step that runs elsewhere and whose results are copied back."""
    model = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS, device=device))
    with STRAYS[backend.name](device) as strays:
        found = list(model.stream_ids([1, 2], max_new_tokens=68, temperature=0))
    assert not strays
    assert found == greedy
    assert model.device == device
    assert device in repr(model)


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_on_several_devices_of_a_mesh_generates(backend, sharded, greedy, tmp_path):
    """Catches what is made on one device only: parameters whole on each of two devices, or each cut in two."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.asarray(jax.devices("cpu")[:2]), ("x",))

    def put(path, a):
        specs = {"wte": (None, "x"), "w": (None, "x")} if sharded else {}
        spec = PartitionSpec(*specs.get(path.rpartition("/")[2], ()))
        return backend.from_numpy(a, "float32", NamedSharding(mesh, spec))

    params = pg.params.nest({path: put(path, a) for path, a in WEIGHTS.items()})
    model = pg.GPT2(CONFIG, params)
    truth, error = truth_and_error(WEIGHTS, TOKENS, CONFIG)

    assert model.device == "cpu, cpu:1"
    assert list(model.stream_ids([1, 2], max_new_tokens=68, temperature=0)) == greedy
    assert abs(pg.to_numpy(model.logits(TOKENS)) - truth).max() <= 4 * error
    logits, _ = pg.gpt2(params, jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("x"))), CONFIG)
    assert abs(pg.to_numpy(logits) - truth).max() <= 4 * error
    model.save(tmp_path / "saved")
    saved = pg.GPT2.load(tmp_path / "saved", backend="numpy").params
    for path, a in pg.params.flatten(saved):
        np.testing.assert_array_equal(a, WEIGHTS[path].astype(np.float32))


DEEP = pg.GPT2Config(n_layer=8, n_head=2, n_embd=16, n_vocab=53, n_ctx=80, eos_token_id=None)
NEEDS_MEMORY = {
    "parameters": lambda b, p: pg.init_params(DEEP, backend=b),
    "cache": lambda b, p: pg.new_cache(p, DEEP, batch=4),
    "larger cache": lambda b, p: pg.grow_cache(pg.new_cache(p, DEEP, capacity=1), 80),
    "logits": lambda b, p: pg.GPT2(DEEP, p).logits(np.zeros((4, 80), np.int32)),
}


@pytest.mark.parametrize("name", NEEDS_MEMORY)
def test_the_memory_of_this_machine_limits_what_lives_here_alone(backend, name, monkeypatch):
    """Catches arrays on an accelerator that are refused because the host has less memory than the accelerator."""
    params = pg.init_params(DEEP, backend=backend)
    monkeypatch.setattr(checks, "total_memory", lambda: 60_000)  # the random numbers of one parameter fit
    with pytest.raises(ValueError, match="of memory; this machine has"):
        NEEDS_MEMORY[name](backend, params)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(type(backend), "device", lambda self, x: "gpu:0")
        NEEDS_MEMORY[name](backend, params)
