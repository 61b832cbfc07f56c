"""The ops, kernel and definition, under what frameworks do to functions: trace, compile, differentiate, map, shard.

Results are held against the definition in NumPy float64, gradients against its difference quotients.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.cases import CASES, FORMS, UNIT, assert_agrees, form_of

SUPPORT = Path(__file__).parent / "support"
every_op = pytest.mark.parametrize("name", CASES)
each_form = pytest.mark.parametrize("form", FORMS)
BATCHED = ("x", "q", "k", "v", "ids")  # the arguments whose leading axes are examples


def call(case, form):
    """Return the op as a function of its arrays in order, and nothing else."""
    op = form_of(case.op, form)
    return lambda *arrays: op(*arrays, **case.options)


def assert_matches(result, case, dtype="float32"):
    assert_agrees(pg.to_numpy(result), case.reference(), dtype)


# Gradients


def weights(case):
    """Return the weights of the results in the sum that is differentiated."""
    return np.random.default_rng(1).standard_normal(case.reference().shape)


@functools.cache
def derivatives(name):
    """Return {array: (d result / d array, its error)} by central differences of fourth order, in float64.

    With half the step the error is a sixteenth: the difference of the two quotients exceeds it, but for rounding.
    """
    case, found = CASES[name], {}
    for key in case.floats():
        a = case.arrays[key]

        def quotient(step, key=key, a=a):
            def at(i, k):
                moved = a.copy()
                moved.flat[i] += k * step
                return case.reference(**{key: moved}).ravel()

            columns = [8 * (at(i, 1) - at(i, -1)) - (at(i, 2) - at(i, -2)) for i in range(a.size)]
            return np.stack(columns, -1) / (12 * step)

        fine = quotient(2.0**-8)
        found[key] = fine, np.abs(fine - quotient(2.0**-7)) + 64 * UNIT["float64"] * 2.0**8
    return found


def gradients_of_tensorflow(fn, arrays, keys, c):
    import tensorflow as tf

    variables = {key: tf.Variable(a) if key in keys else a for key, a in arrays.items()}
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(fn(*variables.values()) * c)
    found = tape.gradient(loss, [variables[key] for key in keys])
    return [None if g is None else tf.convert_to_tensor(g) for g in found]  # a table's are sparse: IndexedSlices


def gradients_of_jax(fn, arrays, keys, c):
    import jax

    argnums = [list(arrays).index(key) for key in keys]
    return jax.grad(lambda *a: (fn(*a) * c).sum(), argnums)(*arrays.values())


def gradients_of_torch(fn, arrays, keys, c):
    for key in keys:
        arrays[key].requires_grad_()
    (fn(*arrays.values()) * c).sum().backward()
    return [arrays[key].grad for key in keys]


GRADIENTS = {"tensorflow": gradients_of_tensorflow, "jax": gradients_of_jax, "torch": gradients_of_torch}


@every_op
@each_form
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", GRADIENTS, indirect=True)
def test_gradients_are_those_of_the_definition(backend, dtype, name, form):
    """Catches a kernel without a gradient, or with another function's; a definition that cuts the gradient's path.

    A gradient sums products of a weight with a derivative; each passes through fewer than 64 roundings, of quantities
    of order 1 or of its own.
    """
    case = CASES[name]
    c = weights(case)
    arrays = case.on(backend, dtype)
    gradients = GRADIENTS[backend.name](call(case, form), arrays, case.floats(), backend.from_numpy(c, dtype))
    for key, gradient in zip(case.floats(), gradients, strict=True):
        jacobian, error = derivatives(name)[key]
        assert gradient is not None, f"none flows to {key}"
        found = backend.to_numpy(gradient).astype(np.float64).ravel()
        bound = 64 * UNIT[dtype] * (1 + np.abs(c.ravel()) @ np.abs(jacobian)) + np.abs(c.ravel()) @ error
        assert np.all(np.abs(found - c.ravel() @ jacobian) <= bound), key


def mapped(vmap, fn, axes):
    """Map a function over the batch of its arguments; one that averages over it, over an axis of one before it."""
    if any(axis is not None for axis in axes):
        return vmap(fn, tuple(axes))
    return lambda *arrays: vmap(fn)(*(x[None] for x in arrays))[0]


# JAX


def jax_transforms(jax, case):
    in_axes = [0 if key in BATCHED else None for key in case.arrays]
    zeros = {"float32": np.float32, "int32": jax.dtypes.float0, "bool": jax.dtypes.float0}
    return {
        "eager": lambda fn: fn,
        "jit": jax.jit,
        "vmap": lambda fn: mapped(jax.vmap, fn, in_axes),
        "jit_of_vmap": lambda fn: jax.jit(mapped(jax.vmap, fn, in_axes)),
        "jvp": lambda fn: lambda *a: jax.jvp(fn, a, tuple(np.zeros(x.shape, zeros[x.dtype.name]) for x in a))[0],
        "checkpoint": jax.checkpoint,
        "scan": lambda fn: lambda *a: jax.lax.scan(lambda carry, _: (carry, fn(*a)), 0, None, 2)[1][1],
    }


@every_op
@each_form
@pytest.mark.parametrize("transform", ["eager", "jit", "vmap", "jit_of_vmap", "jvp", "checkpoint", "scan"])
def test_ops_under_transforms_of_jax(jax, name, form, transform):
    """Catches what a tracer cannot do: become a Python number or a NumPy array, or be looked up by its exact type."""
    case = CASES[name]
    fn = jax_transforms(jax, case)[transform](call(case, form))
    assert_matches(fn(*case.on(pg.get_backend("jax"), "float32").values()), case)


@every_op
@each_form
def test_jit_traces_an_op_once(jax, name, form):
    """Catches an op that is traced again in a second call with the same shapes."""
    case, traces = CASES[name], []

    def fn(*arrays):
        traces.append(1)
        return call(case, form)(*arrays)

    jitted = jax.jit(fn)
    for _ in range(3):
        jitted(*case.on(pg.get_backend("jax"), "float32").values())
    assert len(traces) == 1


@each_form
@pytest.mark.parametrize("sharded", [{"x": "batch"}, {"w": "columns"}, {"x": "batch", "w": "columns"}], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "gelu", "layer_norm", "unembed"])
def test_ops_on_sharded_arrays_of_jax(jax, name, form, sharded):
    """Catches an op that gathers a sharded array onto one device."""
    case = CASES[name]
    spec, sharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = {"batch": spec("devices"), "columns": spec(None, "devices")}
    if name == "unembed":
        placed["columns"] = spec("devices")  # its table stands on its side
    backend = pg.get_backend("jax")
    arrays = [
        backend.from_numpy(a, "float32", device=sharding(mesh, placed.get(sharded.get(key), spec())))
        for key, a in case.arrays.items()
    ]
    for fn in (call(case, form), jax.jit(call(case, form))):
        result = fn(*arrays)
        assert_matches(result, case)
        if set(sharded) & set(case.arrays):
            assert not result.sharding.is_fully_replicated


# TensorFlow

SIGNATURES = {  # which dimensions are known while tracing
    "all": lambda shape: shape,
    "the_last": lambda shape: (None,) * (len(shape) - 1) + shape[-1:],
    "all_but_the_last": lambda shape: (*shape[:-1], None),
    "none": lambda shape: (None,) * len(shape),
}


@every_op
@each_form
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("known", SIGNATURES)
def test_ops_in_tf_function(tf, name, form, known, jit_compile):
    """Catches a dimension that is None while tracing and is computed with, or compared, as if it were a number.

    One trace serves every size.
    """
    case = CASES[name]
    arrays = case.on(pg.get_backend("tensorflow"), "float32")
    signature = [tf.TensorSpec(SIGNATURES[known](a.shape), a.dtype) for a in arrays.values()]
    traced = tf.function(call(case, form), signature, jit_compile=jit_compile)
    assert_matches(traced(*arrays.values()), case)
    if known == "none":
        fewer = {key: a[:1] if key in BATCHED else a for key, a in case.arrays.items()}
        result = traced(*case._replace(arrays=fewer).on(pg.get_backend("tensorflow"), "float32").values())
        assert_agrees(result.numpy(), case.reference(**fewer), "float32")
        assert traced.experimental_get_tracing_count() == 1


@each_form
def test_a_mismatch_that_shows_only_at_run_time_is_an_error(tf, form):
    """Catches an unknown dimension that is taken to fit, and is then broadcast or reshaped away."""
    one, two = tf.TensorSpec([None], tf.float32), tf.TensorSpec([None, None], tf.float32)
    traced = tf.function(form_of(pg.conv1d, form), [two, two, one])
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        traced(tf.ones([2, 5]), tf.ones([5, 3]), tf.ones([1]))


@every_op
@each_form
def test_ops_on_tf_variables(tf, name, form):
    """Catches an op that knows tensors and not variables, eagerly, or captured by a graph."""
    case = CASES[name]
    arrays = case.on(pg.get_backend("tensorflow"), "float32").values()
    variables = [tf.Variable(a) for a in arrays]
    assert_matches(call(case, form)(*variables), case)
    assert_matches(tf.function(lambda: call(case, form)(*variables))(), case)


# PyTorch


@pytest.fixture
def compiled(torch):
    """torch.compile without graph breaks, which counts what it compiles."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def compiled(fn, **options):
        return torch.compile(fn, fullgraph=True, backend=counter, **options)

    compiled.counter = counter
    yield compiled
    torch._dynamo.reset()


@every_op
@each_form
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_torch_compile_neither_breaks_nor_recompiles(compiled, name, form, dynamic):
    """Catches a graph break, and a guard that fails on the second call of the same shapes."""
    case = CASES[name]
    fn = compiled(call(case, form), dynamic=dynamic)
    arrays = case.on(pg.get_backend("torch"), "float32").values()
    for _ in range(2):
        assert_matches(fn(*arrays), case)
    assert compiled.counter.frame_count == 1


@each_form
@pytest.mark.parametrize("name", ["conv1d", "softmax", "gelu", "layer_norm", "attention", "embed", "unembed"])
def test_torch_compile_dynamic_serves_every_size(compiled, name, form):
    """Catches an op that writes a size into its graph where it was asked not to."""
    case = CASES[name]
    fn = compiled(call(case, form), dynamic=True)
    for n in (2, 3, 7):
        grown = {key: np.resize(a, (n, *a.shape[1:])) if key in BATCHED else a for key, a in case.arrays.items()}
        result = fn(*case._replace(arrays=grown).on(pg.get_backend("torch"), "float32").values())
        assert_agrees(result.numpy(), case.reference(**grown), "float32")
    assert compiled.counter.frame_count == 1


def test_torch_compile_of_a_second_op_leaves_the_first(compiled, torch):
    """Catches a look-up table that each op fills when it is first called: its guards undo what was compiled before."""
    first, second = compiled(lambda x: pg.softmax(x)), compiled(lambda x: pg.gelu(x))
    x = torch.ones(2, 3)
    for _ in range(2):
        first(x), second(x), pg.unembed(x, x)
    assert compiled.counter.frame_count == 2


@pytest.mark.parametrize("made", ["x", "torch.nn.Parameter(x)", "torch.nn.Buffer(x)"])
def test_torch_compile_of_the_first_op_of_a_program(torch, made):
    """Catches an adapter that is loaded, or a type that is looked up, in a way that cannot be traced."""
    code = f"""
        import portable_gpt2 as pg
        import torch

        x = torch.ones(2, 3)
        y = {made}
        fn = torch.compile(lambda y: pg.layer_norm(pg.gelu(y), y[0], y[0]), fullgraph=True, backend="eager")
        for _ in range(2):
            print(torch.equal(fn(y), pg.layer_norm(pg.gelu(y), y[0], y[0])))
    """
    assert processes.run(code).split() == ["True", "True"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_torch_compile_with_inductor(torch):
    """Catches an op that can be traced but not lowered to machine code: attention's definition, softmax and all."""
    case = CASES["attention_masked"]
    arrays = list(case.on(pg.get_backend("torch"), "float32").values())
    torch._dynamo.reset()
    assert_matches(torch.compile(call(case, "definition"), fullgraph=True)(*arrays), case)


def torch_transforms(torch, case):
    in_dims = tuple(0 if key in BATCHED else None for key in case.arrays)

    def as_parameters(fn):
        return lambda *a: fn(*[torch.nn.Parameter(x) if x.is_floating_point() else x for x in a])

    def jvp(fn):
        def transformed(*a):
            moved = [i for i, x in enumerate(a) if x.is_floating_point()]
            inner = lambda *m: fn(*[m[moved.index(i)] if i in moved else x for i, x in enumerate(a)])  # noqa: E731
            primals = tuple(a[i] for i in moved)
            return torch.func.jvp(inner, primals, tuple(torch.zeros_like(x) for x in primals))[0]

        return transformed

    return {
        "eager": lambda fn: fn,
        "parameters": as_parameters,
        "vmap": lambda fn: mapped(torch.func.vmap, fn, in_dims),
        "functionalize": torch.func.functionalize,
        "jvp": jvp,
        "inference_mode": torch.inference_mode(),
        "checkpoint": lambda fn: functools.partial(torch.utils.checkpoint.checkpoint, fn, use_reentrant=False),
    }


@every_op
@each_form
@pytest.mark.parametrize(
    "transform", ["eager", "parameters", "vmap", "functionalize", "jvp", "inference_mode", "checkpoint"]
)
def test_ops_under_transforms_of_torch(torch, name, form, transform):
    """Catches an op that knows plain tensors only, or writes into one."""
    case = CASES[name]
    fn = torch_transforms(torch, case)[transform](call(case, form))
    assert_matches(fn(*case.on(pg.get_backend("torch"), "float32").values()), case)


@every_op
@each_form
def test_torch_func_grad(torch, name, form):
    """Catches an op that autograd differentiates and functional transforms do not."""
    case = CASES[name]
    arrays = list(case.on(pg.get_backend("torch"), "float32").values())
    argnums = tuple(i for i, a in enumerate(arrays) if a.is_floating_point())
    found = torch.func.grad(lambda *a: (call(case, form)(*a) ** 2).sum(), argnums)(*arrays)
    for i in argnums:
        arrays[i].requires_grad_()
    (call(case, form)(*arrays) ** 2).sum().backward()
    for i, gradient in zip(argnums, found, strict=True):
        torch.testing.assert_close(gradient, arrays[i].grad, rtol=64 * UNIT["float32"], atol=64 * UNIT["float32"])


@pytest.mark.parametrize("rows", [1, 8])
def test_a_large_weight_under_transforms_of_torch(torch, rows):
    """Catches a product that is cut into blocks and then cannot be differentiated, mapped or compiled.

    Each of two sums of K products of normal numbers errs by at most 4 sqrt(K + 1) u Q (see `bounds.linear_at_random`),
    with Q below 1.5 sqrt(K); a derivative along both arguments is two such sums.
    """
    generator = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((rows, 768), (768, 384), (384,)))
    table = w.mT  # laid out as `relayout` does
    plain = x @ w
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=24 * 768 * UNIT["float32"])
    for fn, expected in ((lambda x, w: pg.conv1d(x, w, b), plain + b), (lambda x, w: pg.unembed(x, w.mT), plain)):
        close(fn(x, w), expected)
        close(torch.compile(fn, fullgraph=True, backend="eager")(x, w), expected)
        close(torch.func.vmap(fn, (0, None))(x[:, None], w)[:, 0], expected)
        close(torch.func.vmap(fn, (None, 0))(x, w[None])[0], expected)
        close(torch.func.jvp(fn, (x, w), (x, w))[1], 2 * plain)
        gradient = torch.func.grad(lambda w, fn=fn: fn(x, w).sum())(w)
        close(gradient, x.sum(0)[:, None].expand_as(w))
        parameter = torch.nn.Parameter(w.clone())
        fn(x, parameter).sum().backward()
        close(parameter.grad, gradient)
    with torch.inference_mode():
        close(pg.unembed(x, table), plain)


@every_op
@each_form
def test_ops_need_no_data(torch, name, form):
    """Catches an op that looks at values to decide what to do: on the meta device there are none."""
    case = CASES[name]
    arrays = case.on(pg.get_backend("torch"), "float32").values()
    result = call(case, form)(*[x.to("meta") for x in arrays])
    assert result.device.type == "meta"
    assert tuple(result.shape) == case.reference().shape


def test_ops_on_distributed_tensors(torch, tmp_path):
    """Catches an op that mixes a DTensor with a plain tensor, or unflattens a sharded axis.

    Two processes run `ranks.py`; each compares every result and gradient with the undistributed ones.
    """
    command = [sys.executable, str(SUPPORT / "ranks.py"), str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("compared" in output for output in outputs)
