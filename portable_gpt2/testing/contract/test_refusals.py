"""What ops refuse on this backend, in spite of its kernels, and in which words.

Arrays of two frameworks, wrong dtypes, and values that are neither arrays nor numbers raise a TypeError. Wrong shapes
and axes raise a ValueError. Each error names the op, the argument, the value and the expectation; no framework's own
exception reaches the user.
"""

import functools
import inspect
import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import ops
from portable_gpt2.testing.cases import CASES, FORMS, form_of
from portable_gpt2.testing.strategies import takes

OPS = {name: op for name, op in vars(ops).items() if hasattr(op, "reference")}
each_form = pytest.mark.parametrize("form", FORMS)


def parameters(fn):
    return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]


def test_kernels_are_named_after_ops_and_take_what_they_take(backend):
    """Catches a misspelt kernel, which would never run; a default that differs; a kernel of a block or of the model."""
    assert set(backend.kernels) <= set(OPS)
    for name, kernel in backend.kernels.items():
        assert parameters(kernel) == parameters(OPS[name]), name


def f(*shape):
    return np.ones(shape, np.float32)


def i(*shape):
    return np.zeros(shape, np.int32)


def b(*shape):
    return np.ones(shape, np.bool_)


class Bad(NamedTuple):
    """A call that is refused, and what the message says."""

    op: str
    args: list[Any]
    says: list[str]
    options: dict[str, Any] = {}


SHAPES = {
    "causal_without_keys": Bad("attention", [f(3, 5), f(2, 5), f(2, 5)], ["3 queries and only 2"], {"causal": True}),
    "w_is_too_short": Bad("conv1d", [f(2, 5), f(4, 3), f(3)], ["w has shape [4, 3]", "nx = 5 from x of shape [2, 5]"]),
    "w_is_transposed": Bad("conv1d", [f(2, 5), f(3, 5), f(3)], ["w has shape [3, 5]", "x of shape [2, 5]"]),
    "w_is_two_wide": Bad("conv1d", [f(2, 5), f(2, 5, 3), f(3)], ["w has shape [2, 5, 3]", "[1, nx, nf]", "[2, 5]"]),
    "w_is_a_vector": Bad("conv1d", [f(2, 5), f(5), f(3)], ["w has shape [5]", "[nx, nf]"]),
    "x_is_a_scalar": Bad("conv1d", [f(), f(5, 3), f(3)], ["x has shape []", "[*batch, nx]"]),
    "bias_would_broadcast": Bad(
        "conv1d", [f(2, 5), f(5, 3), f(1)], ["b has shape [1]", "nf = 3 from w of shape [5, 3]"]
    ),
    "bias_is_a_scalar": Bad("conv1d", [f(2, 5), f(5, 3), f()], ["b has shape []", "w of shape [5, 3]"]),
    "bias_has_a_leading_1": Bad("conv1d", [f(2, 5), f(5, 3), f(1, 3)], ["b has shape [1, 3]", "[nf]"]),
    "bias_per_row": Bad("conv1d", [f(2, 5), f(5, 3), f(2, 3)], ["b has shape [2, 3]", "[nf]"]),
    "gain_would_broadcast": Bad(
        "layer_norm", [f(2, 5), f(1), f(5)], ["g has shape [1]", "n = 5 from x of shape [2, 5]"]
    ),
    "gain_is_a_scalar": Bad("layer_norm", [f(2, 5), f(), f(5)], ["g has shape []", "x of shape [2, 5]"]),
    "shift_would_broadcast": Bad("layer_norm", [f(2, 5), f(5), f(1)], ["b has shape [1]", "n = 5"]),
    "gain_and_shift_per_row": Bad("layer_norm", [f(2, 5), f(2, 5), f(2, 5)], ["g has shape [2, 5]", "[n]"]),
    "norm_of_a_scalar": Bad("layer_norm", [f(), f(), f()], ["x has shape []", "[*batch, n]"]),
    "k_of_another_size": Bad(
        "attention", [f(2, 3, 5), f(2, 3, 4), f(2, 3, 4)], ["k has shape [2, 3, 4]", "d = 5 from q"]
    ),
    "v_of_another_length": Bad(
        "attention",
        [f(2, 3, 5), f(2, 3, 5), f(2, 4, 5)],
        ["v has shape [2, 4, 5]", "keys = 3 from k of shape [2, 3, 5]"],
    ),
    "k_would_broadcast": Bad(
        "attention", [f(2, 3, 5), f(1, 3, 5), f(1, 3, 5)], ["k has shape [1, 3, 5]", "*batch = [2] from q"]
    ),
    "v_would_broadcast": Bad(
        "attention", [f(2, 3, 5), f(2, 3, 5), f(1, 3, 5)], ["v has shape [1, 3, 5]", "*batch = [2]"]
    ),
    "k_has_fewer_axes": Bad("attention", [f(2, 3, 5), f(3, 5), f(3, 5)], ["k has shape [3, 5]", "*batch = [2]"]),
    "q_is_a_vector": Bad("attention", [f(5), f(5), f(5)], ["q has shape [5]", "[*batch, queries, d]"]),
    "k_is_a_vector": Bad("attention", [f(3, 5), f(5), f(5)], ["k has shape [5]", "[*batch, keys, d]"]),
    "v_is_a_vector": Bad("attention", [f(3, 5), f(4, 5), f(5)], ["v has shape [5]", "[*batch, keys, dv]"]),
    "q_is_a_scalar": Bad("attention", [f(), f(), f()], ["q has shape []", "[*batch, queries, d]"]),
    "scores_of_another_size": Bad(
        "attention_scores", [f(2, 3, 5), f(2, 3, 4)], ["k has shape [2, 3, 4]", "d = 5 from q"]
    ),
    "weights_of_another_size": Bad(
        "attention_weights", [f(2, 3, 5), f(2, 3, 4)], ["k has shape [2, 3, 4]", "d = 5 from q"]
    ),
    "weights_of_a_larger_mask": Bad(
        "attention_weights", [f(1, 3, 5), f(1, 3, 5), b(4, 3, 3)], ["mask has shape [4, 3, 3]", "[1]"]
    ),
    "mask_of_another_length": Bad(
        "attention", [*[f(2, 3, 5)] * 3, b(3, 4)], ["mask has shape [3, 4]", "keys = 3 from k of shape [2, 3, 5]"]
    ),
    "mask_of_one_row": Bad("attention", [*[f(2, 3, 5)] * 3, b(1, 3)], ["mask has shape [1, 3]", "queries = 3 from q"]),
    "mask_of_keys_alone": Bad("attention", [*[f(2, 3, 5)] * 3, b(3)], ["mask has shape [3]", "queries, keys"]),
    "mask_is_a_scalar": Bad("attention", [*[f(2, 3, 5)] * 3, b()], ["mask has shape []", "queries, keys"]),
    "mask_of_another_batch": Bad("attention", [*[f(2, 3, 5)] * 3, b(4, 3, 3)], ["mask has shape [4, 3, 3]", "[2]"]),
    "mask_with_more_axes": Bad("attention", [*[f(2, 3, 5)] * 3, b(1, 2, 3, 3)], ["mask has shape [1, 2, 3, 3]", "[2]"]),
    "mask_of_a_larger_batch": Bad("attention", [*[f(1, 3, 5)] * 3, b(4, 3, 3)], ["mask has shape [4, 3, 3]", "[1]"]),
    "table_is_a_vector": Bad("embed", [i(2), f(4)], ["w has shape [4]", "[vocab, d]"]),
    "table_has_three_axes": Bad("embed", [i(2), f(4, 2, 2)], ["w has shape [4, 2, 2]", "[vocab, d]"]),
    "table_of_another_width": Bad(
        "unembed", [f(2, 5), f(4, 3)], ["w has shape [4, 3]", "d = 5 from x of shape [2, 5]"]
    ),
    "targets_of_another_length": Bad(
        "cross_entropy", [f(2, 5), i(3)], ["targets has shape [3]", "*batch = [2] from logits of shape [2, 5]"]
    ),
    "logits_are_a_scalar": Bad("cross_entropy", [f(), i()], ["logits has shape []", "[*batch, vocab]"]),
    "targets_of_fewer_rows": Bad("cross_entropy", [f(3, 5), i(2)], ["targets has shape [2]", "*batch = [3]"]),
    "logits_of_a_scalar": Bad("unembed", [f(), f(4, 5)], ["x has shape []", "[*batch, d]"]),
    "axis_beyond_the_last": Bad("softmax", [f(2, 5)], ["axis is 2", "shape [2, 5]", "-2 to 1"], {"axis": 2}),
    "axis_before_the_first": Bad("softmax", [f(2, 5)], ["axis is -3", "shape [2, 5]", "-2 to 1"], {"axis": -3}),
    "axis_of_something_empty": Bad("softmax", [f(0, 5)], ["axis is 2", "shape [0, 5]"], {"axis": 2}),
    "axis_of_a_scalar": Bad("softmax", [f()], ["axis is -1", "scalar"]),
    "axis_0_of_a_scalar": Bad("softmax", [f()], ["axis is 0", "scalar"], {"axis": 0}),
}

TYPES = {
    "axis_is_a_bool": Bad("softmax", [f(2, 5)], ["axis is True", "an int"], {"axis": True}),
    "axis_is_a_numpy_bool": Bad("softmax", [f(2, 5)], ["axis is", "True", "an int"], {"axis": np.True_}),
    "axis_is_a_float": Bad("softmax", [f(2, 5)], ["axis is 1.0", "an int"], {"axis": 1.0}),
    "axis_is_none": Bad("softmax", [f(2, 5)], ["axis is None", "an int"], {"axis": None}),
    "axis_is_a_tuple": Bad("softmax", [f(2, 5)], ["axis is (0, 1)", "an int"], {"axis": (0, 1)}),
    "axis_is_an_array": Bad("softmax", [f(2, 5)], ["axis is", "an int"], {"axis": i()}),
    "axis_is_positional": Bad("softmax", [f(2, 5), 0], ["too many positional", "softmax(x, *, axis=-1)"]),
    "dim_for_axis": Bad("softmax", [f(2, 5)], ["'dim'", "softmax(x, *, axis=-1)"], {"dim": 0}),
    "approximate": Bad("gelu", [f(2)], ["'approximate'", "gelu(x)"], {"approximate": "none"}),
    "epsilon_for_eps": Bad("layer_norm", [f(2, 5), f(5), f(5)], ["'epsilon'", "eps=1e-05"], {"epsilon": 1e-3}),
    "eps_is_positional": Bad("layer_norm", [f(2, 5), f(5), f(5), 1e-3], ["too many positional", "*, eps="]),
    "eps_is_a_text": Bad("layer_norm", [f(2, 5), f(5), f(5)], ["eps is '1'", "a number"], {"eps": "1"}),
    "eps_is_none": Bad("layer_norm", [f(2, 5), f(5), f(5)], ["eps is None", "a number"], {"eps": None}),
    "scale_is_a_text": Bad("attention", [f(3, 5)] * 3, ["scale is 'a'", "a number"], {"scale": "a"}),
    "scale_is_a_bool": Bad("attention", [f(3, 5)] * 3, ["scale is True", "a number"], {"scale": True}),
    "scale_is_an_array": Bad("attention", [f(3, 5)] * 3, ["scale is", "a number"], {"scale": f()}),
    "causal_is_a_number": Bad("attention", [f(3, 5)] * 3, ["causal is 1", "true or false"], {"causal": 1}),
    "is_causal": Bad("attention", [f(3, 5)] * 3, ["'is_causal'", "mask=None"], {"is_causal": True}),
    "no_bias": Bad("conv1d", [f(2, 5), f(5, 3)], ["missing", "'b'", "conv1d(x, w, b)"]),
    "no_arguments": Bad("conv1d", [], ["missing", "'x'", "conv1d(x, w, b)"]),
    "no_values": Bad("attention", [f(3, 5)] * 2, ["missing", "'v'"]),
    "x_twice": Bad("gelu", [f(2)], ["'x'", "gelu(x)"], {"x": f(2)}),
    "bias_is_none": Bad("conv1d", [f(2, 5), f(5, 3), None], ["b: ", "NoneType"]),
    "bias_is_a_number": Bad("conv1d", [f(2, 5), f(5, 3), 0.0], ["b: ", "float", "numpy.asarray"]),
    "x_is_a_list": Bad("softmax", [[1.0, 2.0]], ["x: ", "list", "numpy.asarray"]),
    "id_is_an_int": Bad("embed", [2, f(4, 3)], ["ids: ", "int"]),
    "x_is_an_int_array": Bad("softmax", [i(3)], ["x has dtype", "int32", "float32"]),
    "x_is_a_bool_array": Bad("gelu", [b(3)], ["x has dtype", "bool", "float32"]),
    "all_are_ints": Bad("conv1d", [i(2, 5), i(5, 3), i(3)], ["x has dtype", "int32", "float32"]),
    "bias_is_a_bool_array": Bad("conv1d", [f(2, 5), f(5, 3), b(3)], ["x has dtype", "float32", "b has", "bool"]),
    "gain_is_an_int_array": Bad("layer_norm", [f(2, 5), i(5), f(5)], ["x has dtype", "float32", "g has", "int32"]),
    "table_is_an_int_array": Bad("embed", [i(2), i(4, 3)], ["w has dtype", "int32", "float32"]),
    "ids_are_floats": Bad("embed", [f(2), f(4, 3)], ["ids has dtype", "float32", "expected int"]),
    "ids_are_bools": Bad("embed", [b(2), f(4, 3)], ["ids has dtype", "bool", "expected int"]),
    "ids_and_table_swapped": Bad("embed", [f(4, 3), i(2)], ["w has dtype", "int32"]),
    "targets_are_bools": Bad("cross_entropy", [f(2, 5), b(2)], ["targets has dtype", "bool", "expected int"]),
    "targets_are_floats": Bad("cross_entropy", [f(2, 5), f(2)], ["targets has dtype", "float32", "expected int"]),
    "logits_are_ints": Bad("cross_entropy", [i(2, 5), i(2)], ["logits has dtype", "int32", "float32"]),
    "mask_is_a_float_array": Bad(
        "attention", [*[f(2, 3, 5)] * 3, f(3, 3)], ["mask has dtype", "float32", "expected bool"]
    ),
    "mask_is_an_int_array": Bad(
        "attention", [*[f(2, 3, 5)] * 3, i(3, 3)], ["mask has dtype", "int32", "expected bool"]
    ),
}


def refuse(backend, bad, form, kind):
    """Run a bad call on a backend; return the message of the exception, which is of Python's own type."""
    put = lambda a: backend.from_numpy(a) if isinstance(a, np.ndarray) else a  # noqa: E731
    args, options = [put(a) for a in bad.args], {key: put(value) for key, value in bad.options.items()}
    with pytest.raises(kind) as caught:
        form_of(OPS[bad.op], form)(*args, **options)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("name", SHAPES)
@each_form
def test_shapes_that_do_not_fit_are_both_named(backend, form, name):
    """Catches what a framework would broadcast, reshape or wrap into a wrong number, or refuse in words of its own."""
    message = refuse(backend, SHAPES[name], form, ValueError)
    assert message.startswith(f"{SHAPES[name].op}: ")
    for part in SHAPES[name].says:
        assert part in message


@pytest.mark.parametrize("name", TYPES)
@each_form
def test_types_that_do_not_fit_are_named(backend, form, name):
    """Catches what a framework would convert into a wrong number, and messages about a kernel that nobody called."""
    message = refuse(backend, TYPES[name], form, TypeError)
    assert message.startswith(f"{TYPES[name].op}: ")
    for part in TYPES[name].says:
        assert part in message


SMALL = {  # the shapes of a call of each op that takes several arrays
    "conv1d": [(2, 3), (3, 2), (2,)],
    "layer_norm": [(2, 3), (3,), (3,)],
    "attention": [(2, 2, 3), (2, 3, 3), (2, 3, 2), (2, 3)],
    "attention_scores": [(2, 2, 3), (2, 3, 3), (2, 3)],
    "attention_weights": [(2, 2, 3), (2, 3, 3), (2, 3)],
    "embed": [(2,), (3, 2)],
    "unembed": [(2, 3), (2, 3)],
    "cross_entropy": [(2, 3), (2,)],
}
CHANGES = [
    lambda shape: shape[1:],
    lambda shape: shape[:-1],
    lambda shape: (1, *shape),
    lambda shape: (*shape, 1),
    lambda shape: (2, *shape),
    lambda shape: (0, *shape[1:]),
    lambda shape: (1, *shape[1:]),
    lambda shape: (*shape[:-1], 1),
    lambda shape: (*shape[:-1], 0),
    lambda shape: (*shape[:-1], shape[-1] + 1),
]


def nearly_right(name):
    """Yield the shapes of an op's arguments with each change of one of them, and with some changes of two of them."""
    shapes = SMALL[name]
    for i, change in enumerate(CHANGES):
        for changed in (*itertools.combinations(range(len(shapes)), 1), *itertools.combinations(range(len(shapes)), 2)):
            if len(changed) == 1 or i < 4:
                yield [change(shape) if at in changed else shape for at, shape in enumerate(shapes)]


def arguments(name, shapes):
    """Return arrays of these shapes, of the kinds that the op takes."""
    kinds = [
        i if "Int[" in each else b if "Bool[" in each else f for each in inspect.get_annotations(OPS[name]).values()
    ]
    return [kind(*shape) for kind, shape in zip(kinds, shapes, strict=False)]


def refusal(call):
    """Return the type and the message of the exception that a call raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@functools.cache
def refused(name):
    """Return the shapes that the definition refuses, and its exceptions on NumPy, which those of others equal."""
    with warnings.catch_warnings(action="ignore"):  # of a mean of nothing
        every = [
            (shapes, refusal(functools.partial(OPS[name].reference, *arguments(name, shapes))))
            for shapes in nearly_right(name)
        ]
    return [(shapes, error) for shapes, error in every if error is not None]


@pytest.mark.parametrize("name", SMALL)
@each_form
def test_kernel_and_definition_refuse_the_same_shapes(backend, form, name):
    """Catches a kernel that takes what the checks would have refused: it runs before them."""
    assert len(refused(name)) >= 10
    for shapes, expected in refused(name):
        arrays = [backend.from_numpy(a) for a in arguments(name, shapes)]
        found = refusal(functools.partial(form_of(OPS[name], form), *arrays))
        assert found == expected, f"{name} of the shapes {shapes}: {found}, not {expected}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.floats()) > 1])
@each_form
def test_floats_of_two_dtypes_are_refused(backend, form, name):
    """Catches promotion, which every framework does in its own way."""
    case = CASES[name]
    other = next((dtype for dtype in ("float64", "float16", "bfloat16") if takes(backend, dtype)), None)
    if other is None:
        pytest.skip(f"{backend.name} has one floating dtype")
    for key in case.floats():
        arrays = case.on(backend, "float32")
        arrays[key] = backend.from_numpy(case.arrays[key], other)
        with pytest.raises(TypeError) as caught:
            form_of(case.op, form)(*arrays.values(), **case.options)
        first = next(iter(case.floats()))
        other_key = key if key != first else case.floats()[1]
        for part in (f"{case.op.__name__}: ", f"{first} has dtype", f"{other_key} has", "float32", other, "convert"):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", CASES)
@each_form
def test_integers_in_place_of_floats_are_refused(backend, form, name):
    """Catches a kernel that computes with integers: an op with one array calls it before any check."""
    case = CASES[name]
    for key in case.floats():
        arrays = case.on(backend, "float32")
        arrays[key] = backend.from_numpy(np.zeros(case.arrays[key].shape, np.int32))
        with pytest.raises(TypeError, match=f"^{case.op.__name__}: .*dtype"):
            form_of(case.op, form)(**arrays, **case.options)


class Foreign(np.ndarray):
    """An array that no backend owns."""


@pytest.mark.parametrize("name", CASES)
@each_form
def test_an_array_of_another_framework_is_refused(backend, form, name):
    """Catches a kernel that converts an array of another framework, and so takes it off its device."""
    case = CASES[name]
    refused = f"^{case.op.__name__}: .*(of one framework|subclass of numpy's array|expected float)"
    for key, a in case.arrays.items():
        # An op with one array runs on the framework of this array.
        for stranger in [a.view(Foreign), a] if len(case.arrays) > 1 else [a.view(Foreign)]:
            if type(stranger) not in backend.array_types:
                with pytest.raises(TypeError, match=refused):
                    form_of(case.op, form)(**{**case.on(backend, "float32"), key: stranger}, **case.options)


@pytest.mark.parametrize("form", FORMS)
def test_options_may_be_numbers_of_numpy(backend, form):
    """Catches `1 / numpy.sqrt(64)` as a scale, which some frameworks refuse, and with which NumPy widens the result."""
    x, g = backend.from_numpy(f(3, 5)), backend.from_numpy(f(5))
    for half in (np.float64(0.5), np.float32(0.5)):
        scaled = form_of(pg.attention, form)(x, x, x, scale=half)
        assert scaled.dtype == x.dtype
        np.testing.assert_array_equal(
            backend.to_numpy(scaled), backend.to_numpy(form_of(pg.attention, form)(x, x, x, scale=0.5))
        )
        assert form_of(pg.layer_norm, form)(x, g, g, eps=half).dtype == x.dtype
    assert form_of(pg.attention, form)(x, x, x, scale=1).dtype == x.dtype


def test_every_op_has_bad_calls():
    """Catches an op that is added and whose bad input nobody has thought of."""
    assert {bad.op for bad in (*SHAPES.values(), *TYPES.values())} == set(OPS)
    assert set(SMALL) == {case.op.__name__ for case in CASES.values() if len(case.arrays) > 1}
