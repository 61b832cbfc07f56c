"""The namespace: each function that portable code calls, with its keywords, and the operators and indices, as in NumPy.

This level asks only whether a function is the right one. The level ``constants`` measures errors.
"""

import functools
import re

import numpy as np
import pytest

from portable_gpt2.numerics.bounds import host_dtype
from portable_gpt2.testing.contract import namespace
from portable_gpt2.testing.strategies import takes

pytestmark = pytest.mark.every_device

# Functions that err, and functions of which a compiler may compute another form.
ROUNDED = re.compile(r"xp\.(exp|log|tanh|sqrt|mean)|/|\*\* -")
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def given(dtype):
    """Return the arrays of each expression that is evaluated in a dtype, on the host and in that dtype."""
    return {
        text: {name: a.astype(host_dtype(dtype)) if a.dtype == np.float64 else a for name, a in arrays.items()}
        for group in namespace.GROUPS
        if dtype in group.dtypes
        for text, arrays in group.calls.items()
    }


def difference(backend, text, result, expected):
    """Return a message if the result of an expression is wrong, or None."""
    if isinstance(result, Exception):
        return f"{text} raised {type(result).__name__}: {result}"
    if not isinstance(result, backend.array_types):
        return f"{text} is a {type(result).__name__}, not an array"
    found = backend.to_numpy(result)
    is_float = expected.dtype.kind not in "iub"  # the kind of bfloat16 is V
    if found.shape != expected.shape or (found.dtype if is_float else found.dtype.kind) != (
        expected.dtype if is_float else expected.dtype.kind
    ):
        return f"{text} has shape {found.shape} and dtype {found.dtype}, not {expected.shape} and {expected.dtype}"
    if is_float:
        found, expected = found.astype(np.float64), expected.astype(np.float64)
    near = np.isclose(found, expected, 1e-3 if ROUNDED.search(text) else 0, 0, equal_nan=True)
    return None if near.all() else f"{text} is {found.tolist()}, not {expected.tolist()}"


def one_for_each_function(calls):
    """Return some of the expressions: the first one of each function, or of each set of functions."""
    return {tuple(re.findall(r"xp\.(\w+)\(", text)): text for text in reversed(calls)}.values()


def attempt(text, xp, arrays):
    try:
        return namespace.evaluate(text, xp, arrays)
    except Exception as error:  # all expressions that fail are reported together
        return error


def expected_values(calls):
    with np.errstate(all="ignore"):
        return {text: np.asarray(namespace.evaluate(text, np, arrays)) for text, arrays in calls.items()}


def assert_no_differences(backend, results, expected):
    wrong = [difference(backend, text, results[text], expected[text]) for text in expected]
    assert not any(wrong), "\n".join(filter(None, wrong))


def eager(backend, calls):
    """Evaluate each expression by itself."""
    return {
        text: attempt(text, backend.xp, {name: backend.from_numpy(a) for name, a in arrays.items()})
        for text, arrays in calls.items()
    }


def compiled(backend, calls):
    """Evaluate all expressions in one compiled function, whose argument is a tree of the arrays."""
    numbers, failed = {text: str(i) for i, text in enumerate(calls)}, {}

    def each(trees):
        results = {text: attempt(text, backend.xp, trees[number]) for text, number in numbers.items()}
        failed.update((text, error) for text, error in results.items() if isinstance(error, Exception))
        return {numbers[text]: result for text, result in results.items() if text not in failed}

    trees = {
        number: {name: backend.from_numpy(a) for name, a in calls[text].items()} for text, number in numbers.items()
    }
    found = backend.compile(each)(trees)
    return {text: failed[text] if text in failed else found[number] for text, number in numbers.items()}


@pytest.mark.parametrize("form", [eager, compiled], ids=["eager", "compiled"])
def test_functions_operators_and_indices_compute_what_numpy_computes(backend, dtype, form):
    """Catches a function that is missing or differs, a keyword or an index dtype that is refused, a promoted dtype.

    In a compiled function, it also catches a tracer that lacks an operator or an index.
    """
    calls = given(dtype)
    if backend.compiles_per_shape and (form is eager or dtype != "float32"):  # to compile all of them takes seconds
        calls = {text: calls[text] for text in one_for_each_function(calls) if form is compiled or dtype == "float32"}
    assert_no_differences(backend, form(backend, calls), expected_values(calls))


def test_integers_of_64_bits_wrap_around(backend):
    """Catches int64 or float64 that is narrowed while `permit_64_bits` is in force, and a shift that loses the sign.

    Tokens are chosen with these integers on an accelerator (`Backend.runs_ahead`).
    """
    if "float64" not in backend.dtypes:
        pytest.skip(f"{backend.name} has no float64, so tokens are chosen on the host")
    if backend.default_device is not None and not backend.runs_ahead(backend.from_numpy(np.ones(1, np.float32))):
        pytest.skip("tokens are chosen on the host")

    def each(halves):
        xp = backend.xp
        with backend.permit_64_bits():
            integers = {
                name: namespace.evaluate(namespace.LONG, xp, dict(zip(("upper", "lower"), pair, strict=True)))
                for name, pair in halves.items()
            }
            return {str(i): namespace.evaluate(text, xp, integers) for i, text in enumerate(namespace.IN_64_BITS)}

    halves = {name: [backend.from_numpy(a) for a in pair] for name, pair in namespace.HALVES.items()}
    integers = {
        name: (upper.astype(np.int64) << 32) + (lower.astype(np.int64) & 0xFFFFFFFF)
        for name, (upper, lower) in namespace.HALVES.items()
    }
    expected = expected_values(dict.fromkeys(namespace.IN_64_BITS, integers))
    # On a backend that compiles, tokens are chosen in a compiled function.
    for run in [backend.compile(each)] if backend.compiles_per_shape else [each, backend.compile(each)]:
        results = run(halves)
        assert_no_differences(backend, {text: results[str(i)] for i, text in enumerate(namespace.IN_64_BITS)}, expected)


def test_the_kind_of_a_dtype_is_known(backend):
    """Catches `isdtype` that takes a bool or a float for an integer. Of another dtype it may raise a TypeError."""
    for name in filter(functools.partial(takes, backend), (*DTYPES, *backend.dtypes)):
        x = backend.from_numpy(np.ones(1, host_dtype(name)))
        for kind, characters in namespace.KINDS.items():
            arguments = {"dtype": x.dtype, "kind": kind}
            if name in DTYPES:
                is_it = namespace.evaluate(namespace.ISDTYPE, backend.xp, arguments)
            else:
                is_it = attempt(namespace.ISDTYPE, backend.xp, arguments)
                is_it = False if isinstance(is_it, TypeError) else is_it
            assert bool(is_it) is (name in DTYPES and np.dtype(name).kind in characters), (name, kind)


def test_dtypes_can_be_compared_and_looked_up(backend):
    """Catches a dtype that is not equal to itself, or that cannot be a key: `Backend.dtype_names` maps it to a name."""
    for name in filter(functools.partial(takes, backend), backend.dtypes):
        dtype = backend.dtypes[name]
        x, y = (backend.from_numpy(np.ones(1), name) for _ in range(2))
        assert x.dtype == y.dtype == dtype == backend.dtype(name)
        assert backend.dtype_names[x.dtype] == name
        assert [other for other in backend.dtypes.values() if other == x.dtype] == [dtype]
    integers = backend.from_numpy(np.ones(1, np.int32))
    assert integers.dtype not in backend.dtype_names
    assert backend.from_numpy(np.ones(1), "float32").dtype == backend.xp.float32
    assert integers.dtype == backend.xp.int32
