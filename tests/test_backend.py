"""The abstract interface: how a backend is found, and the promises of each adapter in addition to the array API."""

import asyncio
import collections
import contextlib
import importlib.metadata
import threading
import warnings

import frameworks
import ml_dtypes
import numpy as np
import processes
import pytest

import portable_gpt2 as pg
from portable_gpt2 import registry

# By name, by array, by default


def test_a_backend_is_found_by_name(backend):
    """Catches a name that leads to another backend, and a second instance where there should be one."""
    assert pg.get_backend(backend.name) is backend
    assert pg.get_backend(backend) is backend
    assert backend.name in pg.available_backends()


def test_a_backend_is_found_by_array(backend):
    """Catches an array whose owner is another, and subclasses and scalars that have none."""
    x = backend.from_numpy(np.ones((2, 3), np.float32))
    assert pg.backend_of(x) is backend
    assert pg.backend_of(backend.xp.exp(x)) is backend
    np.testing.assert_array_equal(pg.to_numpy(x), np.ones((2, 3)))


def test_an_array_is_looked_up_in_one_table(backend, monkeypatch):
    """Catches a look-up by isinstance, which takes a microsecond, on every call; after the first it is a dict's."""
    x = backend.from_numpy(np.ones(3, np.float32))
    pg.backend_of(x)
    monkeypatch.setattr(registry, "_find_owner", None)
    assert pg.backend_of(x) is backend


def memory_map(directory):
    return np.memmap(directory / "numbers", np.float32, "w+", shape=(2, 2))


def test_scalars_and_memory_maps_of_numpy_are_numpys(tmp_path):
    """Catches a look-up by exact type."""
    for x in (np.float32(1), ml_dtypes.bfloat16(1), memory_map(tmp_path)):
        assert pg.backend_of(x).name == "numpy"
    assert type(pg.softmax(memory_map(tmp_path))) is np.ndarray


class Length(np.ndarray):
    """As of a package of units: what `*` means is its own matter."""

    def __mul__(self, other):
        raise AssertionError("was computed with")


FOREIGN = {  # an array; its class's name, and the remedy that the message names
    "a matrix": (np.ones((2, 2)).view(np.matrix), "numpy.matrix", "numpy.asarray(x)"),
    "a masked array": (np.ma.masked_array([1.0, 9.0], [False, True]), "numpy.ma.MaskedArray", "numpy.asarray(x)"),
    "a masked constant": (np.ma.masked, "numpy.ma.core.MaskedConstant", "numpy.asarray(x)"),
    "a record array": (np.rec.array([1.0, 2.0]), "numpy.rec.recarray", "numpy.asarray(x)"),
    "a user's subclass": (np.ones(2).view(Length), f"{__name__}.Length", "numpy.asarray(x)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_subclasses_that_may_compute_otherwise_are_refused_by_name(name):
    """Catches `*` that is a matrix product, a hidden value that is summed, and a subclass that was let in once."""
    x, kind, advice = FOREIGN[name]
    weight, plain = np.ones((2, 2)), np.ones(2)
    for call in (
        lambda: pg.backend_of(x),
        lambda: pg.gelu(x),
        lambda: pg.softmax.reference(x),
        lambda: pg.conv1d(np.ones((3, 2)), weight, x),
        lambda: pg.embed(np.zeros(2, np.int64), x),
        lambda: pg.attention(weight, weight, weight, x),
        lambda: pg.layer_norm(plain, plain, b=x),
        lambda: pg.to_numpy(x),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert f"{kind} is a subclass of numpy's array" in str(caught.value)
        assert advice in str(caught.value)


def test_a_model_of_matrices_is_refused():
    """Catches parameters that are looked at in one place only, and tokens that are."""
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_vocab=5, n_ctx=4, eos_token_id=None)
    params = pg.init_params(config, backend="numpy")
    tokens = np.asarray([[1, 2, 3]])
    matrices = {**params, "wpe": params["wpe"].view(np.matrix)}
    for call in (
        lambda: pg.gpt2(matrices, tokens, config),
        lambda: pg.loss(matrices, tokens, config),
        lambda: pg.GPT2(config, matrices).logits([[1, 2]]),
        lambda: pg.gpt2(params, tokens.view(np.matrix), config),
    ):
        with pytest.raises(TypeError, match=r"numpy.matrix is a subclass of numpy's array"):
            call()


def test_subclasses_of_torch_are_torchs_where_torch_defines_them(torch):
    """Catches a parameter, buffer or stand-in of torch's own that is refused, and a user's class that is not."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.masked import masked_tensor

    x = torch.ones(2, 3)
    for own in (torch.nn.Parameter(x), torch.nn.Buffer(x), FakeTensorMode().from_tensor(x)):
        assert pg.backend_of(own).name == "torch"
        assert pg.gelu(own).shape == (2, 3)

    class Tagged(torch.Tensor):
        pass

    class TaggedParameter(torch.nn.Parameter):
        pass

    with warnings.catch_warnings(action="ignore"):  # a prototype, torch says
        masked = masked_tensor(x, x > 0)
    for foreign in (x.as_subclass(Tagged), TaggedParameter(x), masked):
        with pytest.raises(
            TypeError, match=r"is a subclass of torch's array, .*; convert it with x.as_subclass\(torch.Tensor\)"
        ) as caught:
            pg.gelu(foreign)
        assert f"{type(foreign).__module__}.{type(foreign).__qualname__}" in str(caught.value)
    assert torch.equal(pg.gelu(x.as_subclass(Tagged).as_subclass(torch.Tensor)), pg.gelu(x))


def test_tracers_and_variables_are_their_frameworks(jax, tf):
    """Catches a rule about subclasses that refuses what a framework traces with."""
    seen = []
    jax.jit(lambda x: seen.append(pg.backend_of(x).name) or x)(np.ones(2))
    jax.vmap(lambda x: seen.append(pg.backend_of(x).name) or x)(np.ones(2))
    jax.grad(lambda x: seen.append(pg.backend_of(x).name) or x)(1.0)
    assert seen == ["jax"] * 3
    seen.clear()
    tf.function(lambda x: seen.append(pg.backend_of(x).name) or x)(tf.ones(2))
    seen.append(pg.backend_of(tf.Variable(1.0)).name)
    assert seen == ["tensorflow"] * 2

    class Counter(tf.Variable):
        pass

    assert "is a subclass of tensorflow's array" in pg.get_backend("tensorflow").refusal(object.__new__(Counter))


@pytest.mark.parametrize("x", [[1.0], 1.0, None, "text", object(), {}], ids=lambda x: type(x).__name__)
def test_what_is_no_array_is_refused(x):
    """Catches a message that does not say what was given, what could be, and what to do."""
    with pytest.raises(TypeError) as caught:
        pg.backend_of(x)
    assert f"{type(x).__module__}.{type(x).__qualname__}" in str(caught.value)
    assert "numpy.asarray" in str(caught.value)
    for name in registry.known_backends():
        assert name in str(caught.value)


def test_the_default_is_numpy(monkeypatch):
    """Catches a default that depends on what happens to be installed."""
    monkeypatch.delenv("PORTABLE_GPT2_BACKEND", raising=False)
    assert pg.get_backend().name == "numpy"
    monkeypatch.setenv("PORTABLE_GPT2_BACKEND", "")
    assert pg.get_backend().name == "numpy"


def test_the_environment_names_a_default(monkeypatch):
    """Catches a variable that is read once and for all, or that outranks a choice made in the code."""
    monkeypatch.setenv("PORTABLE_GPT2_BACKEND", "array_api_strict")
    assert pg.get_backend().name == "array_api_strict"
    with pg.use_backend("numpy"):
        assert pg.get_backend().name == "numpy"


@pytest.mark.parametrize(("name", "why"), [("nonsense", "unknown backend"), ("absent", "absent is not installed")])
def test_a_bad_name_in_the_environment_is_said_to_come_from_there(monkeypatch, name, why):
    """Catches a message about a backend that the reader has nowhere asked for."""
    point = importlib.metadata.EntryPoint("absent", "absent_adapter:Absent", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"numpy": None, "absent": point})
    monkeypatch.setenv("PORTABLE_GPT2_BACKEND", name)
    with pytest.raises(pg.BackendNotInstalled, match=f"^PORTABLE_GPT2_BACKEND is '{name}': .*{why}"):
        pg.get_backend()
    with pytest.raises(pg.BackendNotInstalled, match=r"^(unknown )?backend"):
        pg.get_backend(name)


def test_defaults_nest():
    """Catches a default that outlives its block, be it left by an exception."""
    with pg.use_backend("array_api_strict") as outer:
        assert pg.get_backend() is outer
        with contextlib.suppress(KeyError), pg.use_backend("numpy", device="cpu") as inner:
            assert pg.get_backend() is inner
            assert inner.default_device == "cpu"
            raise KeyError
        assert pg.get_backend() is outer
    assert pg.get_backend().name == "numpy"


def test_threads_do_not_disturb_one_another():
    """Catches a default that is global to the process."""
    seen, turn = {}, threading.Barrier(2, timeout=10)

    def work(name):
        with pg.use_backend(name):
            turn.wait()  # both have chosen
            seen[name] = pg.get_backend().name
            turn.wait()

    threads = [threading.Thread(target=work, args=[name]) for name in ("numpy", "array_api_strict")]
    with pg.use_backend("array_api_strict"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"numpy": "numpy", "array_api_strict": "array_api_strict"}


def test_asynchronous_tasks_do_not_disturb_one_another():
    """Catches a default that is a thread's: tasks share one."""

    async def work(name):
        with pg.use_backend(name):
            await asyncio.sleep(0)
            return pg.get_backend().name

    async def main():
        return await asyncio.gather(*[work(name) for name in ("numpy", "array_api_strict") * 3])

    assert asyncio.run(main()) == ["numpy", "array_api_strict"] * 3


def test_threads_that_load_a_backend_at_once_share_one_instance(monkeypatch):
    """Catches two instances of one backend, whose arrays would be refused as those of two."""
    turn, found = threading.Barrier(2, timeout=10), []
    monkeypatch.setattr(registry, "_LOADED", {})
    monkeypatch.setattr(registry, "_BACKEND_OF_TYPE", {})
    monkeypatch.setattr(registry, "_is_importable", lambda name: turn.wait() >= 0)  # neither was loaded till here
    threads = [threading.Thread(target=lambda: found.append(pg.get_backend("numpy"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] is found[1] is pg.backend_of(np.ones(1))


# What cannot be found


def test_an_unknown_name_is_refused():
    """Catches a message that does not say which names there are."""
    with pytest.raises(pg.BackendNotInstalled, match="'pytorch'") as caught:
        pg.get_backend("pytorch")
    for name in frameworks.BACKENDS:
        assert name in str(caught.value)
    assert isinstance(caught.value, ImportError)


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import portable_gpt2 as pg

assert {name!r} not in pg.available_backends()
try:
    pg.get_backend({name!r})
except pg.BackendNotInstalled as error:
    print(error)
"""


@pytest.mark.parametrize("name", frameworks.FRAMEWORKS)
def test_a_framework_that_is_not_installed_is_named_with_its_extra(name):
    """Catches an ImportError from ten frames down, which does not say what to install."""
    message = processes.run(BLOCK.format(name=name))
    assert f"pip install 'portable-gpt2[{name}]'" in message
    assert "numpy" in message.partition("installed here")[2]


def install(directory, name, adapter):
    """Write a third party's framework, adapter and metadata, as pip would install them."""
    (directory / f"{name}.py").write_text("class Array:\n    pass\n")
    (directory / f"{name}_adapter.py").write_text(adapter)
    metadata = directory / f"{name}_adapter-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-adapter\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[portable_gpt2.backends]\n{name} = {name}_adapter:Adapter\n")


BROKEN = {
    "raises_import_error": "import a_module_that_is_not_there",
    "raises_another": "raise RuntimeError('of another version')",
    "has_no_class": "",
    "has_no_constructor": "class Adapter:\n    def __init__(self):\n        raise OSError('no device')",
    "has_no_arrays": "class Adapter:\n    pass",
}


def test_a_broken_adapter_warns_and_is_skipped(tmp_path):
    """Catches a third party's mistake that takes the other backends down with it, or that is hidden."""
    for name, adapter in BROKEN.items():
        install(tmp_path, name, adapter)
    code = f"""
        import warnings
        import numpy as np
        import portable_gpt2 as pg

        for name in {list(BROKEN)}:
            assert name in pg.available_backends()
            framework = __import__(name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert pg.softmax(np.ones(2))[0] == 0.5
                try:
                    pg.softmax(framework.Array())
                except TypeError as error:
                    assert name + ".Array" in str(error)
            assert any(name in str(warning.message) for warning in caught), (name, caught)
            try:
                pg.get_backend(name)
            except pg.BackendNotInstalled as error:
                assert name in str(error) and error.__cause__ is not None
            else:
                raise AssertionError(name)
    """
    processes.run(code, path=[tmp_path])


def test_a_third_partys_framework_that_is_not_installed_is_no_extra_of_ours(tmp_path):
    """Catches advice to install an extra that does not exist."""
    install(tmp_path, "elsewhere", "")
    (tmp_path / "elsewhere.py").unlink()
    code = """
        import portable_gpt2 as pg
        assert "elsewhere" not in pg.available_backends()
        try:
            pg.get_backend("elsewhere")
        except pg.BackendNotInstalled as error:
            print(error)
    """
    assert "pip install elsewhere " in processes.run(code, path=[tmp_path])


def test_third_parties_are_found_by_entry_point():
    """Catches a list of backends that is written down in the package."""
    points = importlib.metadata.entry_points(group="portable_gpt2.backends")
    assert {"numpy", "array_api_strict"} <= {point.name for point in points}
    assert {point.name for point in points} == set(registry.known_backends())


# Devices


@pytest.mark.parametrize("backend", frameworks.OURS, indirect=True)
def test_the_first_cpu_has_two_names(backend):
    """Catches `cpu:0`, which frameworks write too, as an unknown device."""
    assert backend.device(backend.from_numpy(np.ones(3, np.float32), device="cpu:0")) == "cpu"


# To and from the host


@pytest.mark.x64
def test_jax_takes_64_bits_where_its_switch_is_on(jax):
    """Catches a refusal that does not look at the switch."""
    backend = pg.get_backend("jax")
    for kind in ("float64", "int64", "uint64"):
        assert backend.to_numpy(backend.from_numpy(np.arange(3).astype(kind))).dtype == kind


def test_the_switch_of_jax_is_left_as_it_was(jax):
    """Catches a backend that flips jax_enable_x64 for the whole program to have its way."""
    backend = pg.get_backend("jax")
    with pytest.raises(TypeError, match="jax_enable_x64"):
        backend.from_numpy(np.ones(3, np.float32), "float64")
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"], indirect=True)
def test_a_host_view_is_no_copy(backend):
    """Catches a copy each time that an array of the CPU is looked at."""
    x = backend.from_numpy(np.ones(3, np.float32))
    assert np.shares_memory(backend.to_numpy(x), backend.to_numpy(x))


# What the standard lacks


def test_shape_and_arange_of_what_is_unknown_while_tracing(tf):
    """Catches None among the dimensions, which cannot be computed with, and a range whose end must be a number."""
    backend = pg.get_backend("tensorflow")

    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.float32)])
    def rows(x):
        n, five = backend.shape(x)
        assert five == 5
        return backend.arange(n, like=x), backend.zeros((2, 2), like=x)

    found, zeros = rows(tf.ones([3, 5]))
    assert found.numpy().tolist() == [0, 1, 2]
    assert zeros.shape == (2, 2)


def test_a_tensor_of_unknown_rank_is_refused(tf):
    """Catches None where there should be a tuple."""
    with pytest.raises(ValueError, match="number of axes"):
        tf.function(pg.gelu.reference, input_signature=[tf.TensorSpec(None, tf.float32)])(tf.ones([2]))


# Compilation


def test_a_donated_argument_is_dead_and_its_memory_used(jax):
    """Catches a cache that is copied for every token because its donation went lost."""
    backend = pg.get_backend("jax")
    run = backend.compile(lambda bound, cache: backend.write(cache, bound, 0), jax.numpy.ones((1, 2)))
    kept = jax.numpy.zeros((8, 2))
    run(kept)
    assert not kept.is_deleted()
    run = backend.compile(
        lambda bound, cache: backend.write(cache, bound, 0), jax.numpy.ones((1, 2)), donate=("cache",)
    )
    donated = jax.numpy.zeros((8, 2))
    at = donated.unsafe_buffer_pointer()
    result = run(donated)
    assert donated.is_deleted()
    assert result.unsafe_buffer_pointer() == at


def test_a_donated_variable_is_written_where_it_lies(tf):
    """Catches a cache that is copied for every token: after the first, which makes it a variable, it stays one."""
    backend = pg.get_backend("tensorflow")
    rows = tf.ones((1, 2))
    run = backend.compile(lambda rows, at, cache: backend.write(cache, rows, at), rows, donate=("cache",))
    given = run(3, tf.zeros((8, 2)))

    def address(variable):
        return np.frombuffer(variable.read_value(), np.float32).ctypes.data

    at = address(given)
    result = run(5, given)
    assert result is given
    assert address(result) == at
    assert backend.to_numpy(result).sum(axis=-1).tolist() == [0, 0, 0, 2, 0, 2, 0, 0]


def test_a_backend_says_how_to_get_it(backend):
    """Catches a repr that cannot be read back."""
    assert eval(repr(backend), {"get_backend": pg.get_backend}) is backend


def test_a_compiled_function_of_a_variable_has_a_gradient(tf):
    """Catches a call beneath the public one, which records nothing, where nothing is donated."""
    backend = pg.get_backend("tensorflow")
    run = backend.compile(lambda b, w: tf.reduce_sum(w * w * b), tf.constant([1.0, 2.0]))
    w = tf.Variable([3.0, 4.0])
    with tf.GradientTape() as tape:
        y = run(w)
    assert tape.gradient(y, w).numpy().tolist() == [6.0, 16.0]


def test_compiled_functions_take_arrays_of_several_shapes_and_named_tuples(tf):
    """Catches a trace that is taken for another shape's, and a tree that cannot be put together again."""
    pair = collections.namedtuple("pair", ["x", "y"])
    run = pg.get_backend("tensorflow").compile(lambda p: pair(p.y, p.x + 1))
    for shape in ((2,), (3,)):
        x, y = run(pair(np.zeros(shape, np.float32), tf.ones(2)))
        assert (x.numpy().tolist(), y.numpy().tolist()) == ([1.0, 1.0], [1.0] * shape[0])
