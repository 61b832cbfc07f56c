"""`testing.check` finds what is wrong with a backend, at the right level, and says where to look.

Each entry of DEFECTS is a backend with one mistake, next to the level whose tests must find it and a pattern of the
diagnosis. The right backend is in `own_arrays`.
"""

import inspect
import math
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import own_arrays
import pytest
from own_arrays import Array, Namespace, OwnBackend, mapped
from portable_gpt2_backends.numpy import NumpyBackend

from portable_gpt2 import testing

CPU_SOFTMAX, CPU_LAYER_NORM, CPU_CONV1D = (NumpyBackend.kernels[name] for name in ("softmax", "layer_norm", "conv1d"))


class Defect(NamedTuple):
    level: str
    diagnosis: str
    """A pattern of a diagnosis in the report."""
    members: dict[str, Any]
    """The members of the backend that are wrong."""
    only: str = ""
    """The tests of the level that run, because all of them would take longer."""


def kernel(name, function):
    """Return the members of a backend with a wrong kernel of NumPy arrays."""
    return {"kernels": own_arrays.kernels(**{name: function})}


def function(name, wrong):
    """Return the members of a backend whose namespace has a wrong function of NumPy arrays, and that has no kernels."""
    return {"xp": Namespace(**{name: wrong}), "kernels": {}}


def softmax_without_max(x, *, axis=-1):
    e = np.exp(x)
    return e / e.sum(axis, keepdims=True)


def softmax_without_nan(x, *, axis=-1):
    e = np.exp(x - np.nanmax(x, axis, keepdims=True))
    return np.nan_to_num(e / np.nansum(e, axis, keepdims=True))


def gelu_by_erf(x):
    return (x / 2 * (1 + np.vectorize(math.erf, otypes=["f8"])(x / math.sqrt(2)))).astype(x.dtype)


def gelu_in_place(x):
    if not x.flags.writeable or x.dtype.itemsize < 4:
        return NotImplemented
    y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    x += 1
    return y


def gelu_in_16_bits(x):
    c = x.dtype.type(math.sqrt(2 / math.pi))
    return x.dtype.type(0.5) * x * (1 + np.tanh(c * (x + x.dtype.type(0.044715) * x * x * x)))


def attention_with(shift=0, is_causal=lambda queries, keys: True):
    """Return attention whose causal mask is shifted, or that is causal only for some numbers of queries and keys."""

    def attention(q, k, v, mask=None, *, causal=False, scale=None):
        if q.dtype.itemsize < 4 or not q.size or not k.size:
            return NotImplemented
        queries, keys = q.shape[-2], k.shape[-2]
        seen = np.ones((queries, keys), bool) if mask is None else mask
        if causal and is_causal(queries, keys):
            seen = seen & np.tri(queries, keys, keys - queries + shift, dtype=bool)
        scores = np.where(seen, q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale), -np.inf)
        return CPU_SOFTMAX(scores.astype(q.dtype)) @ v

    return attention


def sum_in_16_bits(x, **options):
    return np.sum(x.astype(np.float16) if x.dtype.kind == "f" else x, **options).astype(x.dtype)


def mean_over_the_first_axis(x, *, axis=None, keepdims=False):
    return np.mean(x, axis=None if axis is None else 0, keepdims=keepdims)


def truncated(x, dtype, **options):
    if x.dtype == np.float32 and dtype == ml_dtypes.bfloat16:
        x = (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return np.astype(x, dtype, **options)


def narrowing(self, a, device):
    return Array(a.astype(np.float32) if a.dtype == np.float64 else a, device or "cpu")


def write_one_off(self, buffer, value, start):
    return OwnBackend.write(self, buffer, value, max(0, int(start) - 1))


def index_add_once(self, x, indices, rows):
    x.a[indices.a] += rows.a
    return x


ROOM = np.empty(10**6)


def to_shared_memory(self, x):
    y = np.frombuffer(ROOM, x.dtype, x.a.size).reshape(x.shape)
    y[...] = x.a
    return y


def compiled_with_the_first_ints(self, fn, *bound, donate=()):
    ints = []

    def call(*args):
        ints.append([x if isinstance(x, int) else None for x in args])
        return fn(*bound, *(x if first is None else first for x, first in zip(args, ints[0], strict=True)))

    return call


def compiled_with_a_stale_buffer(self, fn, *bound, donate=()):
    names = list(inspect.signature(fn).parameters)[len(bound) :] if donate else []

    def call(*args):
        result = fn(*bound, *args)
        for name, x in zip(names, args, strict=bool(names)):
            if name in donate:
                mapped(lambda y: y.a.fill(0), x)
        return result

    return call


def compiled_in_16_bits(self, fn, *bound, donate=()):
    def rounded(x):
        return Array(x.a.astype(np.float16).astype(x.dtype)) if x.dtype == np.float32 else x

    return lambda *args: mapped(rounded, fn(*bound, *args))


def doubled(self, fn):
    of = own_arrays.differences(fn)

    def value_and_grad(*args):
        value, gradient = of(*args)
        return value, mapped(lambda x: x * 2, gradient)

    return value_and_grad


def without_one_leaf(self, fn):
    of = own_arrays.differences(fn)

    def value_and_grad(*args):
        value, gradient = of(*args)
        return value, {**gradient, min(gradient): mapped(lambda x: x * 0, gradient[min(gradient)])}

    return value_and_grad


def top_k_ascending(self, x, k):
    values, indices = OwnBackend.top_k(self, x, k)
    return values[..., ::-1], indices[..., ::-1]


def one_turn_too_many(self, condition, body, state):
    return body(OwnBackend.while_loop(self, condition, body, state))


def for_each_mixed(self, fn, *lists):
    first, *others = lists
    return OwnBackend.for_each(self, fn, first, *(each[::-1] for each in others))


def grown(x):
    return (np.exp(x) * (1 + np.finfo(x.dtype).eps * x)).astype(x.dtype)


TWO_DEVICES = {"devices": lambda self: {"cpu": "cpu", "cpu:1": "cpu:1"}}

DEFECTS = {
    # One function of the namespace
    "transposed matmul": Defect("contract", "xp.matmul", function("matmul", lambda x, y: np.matmul(y.mT, x.mT))),
    "mean over the wrong axis": Defect("contract", "xp.mean", function("mean", mean_over_the_first_axis)),
    "take that clips": Defect(
        "contract",
        "xp.take",
        function("take", lambda x, i, *, axis: np.take(x, np.clip(i, 0, x.shape[axis] - 2), axis=axis)),
    ),
    "maximum of magnitudes": Defect("contract", "xp.max", function("max", lambda x, **o: np.max(abs(x), **o))),
    # One member of Backend
    "write off by one": Defect("contract", "Backend.write", {"write": write_one_off}),
    "split in reverse": Defect(
        "contract", "Backend.split", {"split": lambda self, x, n: OwnBackend.split(self, x, n)[::-1]}
    ),
    "index_add ignores duplicates": Defect("contract", "Backend.index_add", {"index_add": index_add_once}),
    "top_k ascending": Defect("contract", "Backend.top_k", {"top_k": top_k_ascending}),
    "arange from 1": Defect(
        "contract", "Backend.arange", {"arange": lambda self, n, *, like: OwnBackend.arange(self, n, like=like) + 1}
    ),
    "zeros of another dtype": Defect(
        "contract", "Backend.zeros", {"zeros": lambda self, shape, *, like: Array(np.zeros(shape, np.float32))}
    ),
    "a loop with one turn too many": Defect("contract", "Backend.while_loop", {"while_loop": one_turn_too_many}),
    "for_each mixes": Defect("contract", "Backend.for_each", {"for_each": for_each_mixed}),
    "fetch without a copy": Defect("contract", "Backend.fetch", {"fetch": lambda self, x: lambda: x.a}),
    "to_numpy returns memory that changes": Defect("contract", "Backend.to_numpy", {"to_numpy": to_shared_memory}),
    "float64 is narrowed silently": Defect("contract", "Backend.(put|from_numpy)", {"put": narrowing}),
    "a device is dropped": Defect("contract", "device", {**TWO_DEVICES, "put": lambda self, a, device: Array(a)}),
    # Transformations
    "compile bakes in the position": Defect(
        "contract", "Backend.compile", {"compile": compiled_with_the_first_ints, "compiles_per_shape": True}
    ),
    "a stale donated buffer": Defect("contract", "Backend.compile", {"compile": compiled_with_a_stale_buffer}),
    "gradient scaled": Defect("contract", "Backend.value_and_grad", {"value_and_grad": doubled}),
    "gradient of one leaf dropped": Defect("contract", "Backend.value_and_grad", {"value_and_grad": without_one_leaf}),
    # Errors of elementary functions
    "exp in float32": Defect(
        "constants", "float64 .* exp", function("exp", lambda x: np.exp(x.astype("f4")).astype(x.dtype))
    ),
    "exp whose error grows": Defect("constants", r"growing with .* Numerics\(exp=\(", function("exp", grown)),
    "log off": Defect("constants", "log errs", function("log", lambda x: np.log(x) * x.dtype.type(1 + 1e-5))),
    "tanh off": Defect("constants", "tanh errs", function("tanh", lambda x: np.tanh(x) * x.dtype.type(1 - 1e-5))),
    # Kernels, and functions whose mistakes only the bounds show
    "softmax without the max": Defect("ops", "your kernel softmax", kernel("softmax", softmax_without_max), "softmax"),
    "NaN row not NaN": Defect("ops", "your kernel softmax", kernel("softmax", softmax_without_nan), "softmax"),
    "gelu by erf": Defect("ops", "your kernel gelu", kernel("gelu", gelu_by_erf), "gelu"),
    "a kernel that rounds twice": Defect(
        "ops", "your kernel gelu rounds to float16", kernel("gelu", gelu_in_16_bits), "gelu"
    ),
    "a kernel that changes its argument": Defect("ops", "argument", kernel("gelu", gelu_in_place), "gelu"),
    "eps 1e-3": Defect(
        "ops",
        "your kernel layer_norm",
        kernel("layer_norm", lambda x, g, b, *, eps=1e-5: CPU_LAYER_NORM(x, g, b, eps=1e-3)),
        "layer_norm",
    ),
    "mask off by one": Defect("ops", "your kernel attention", kernel("attention", attention_with(1)), "attention"),
    "attention not causal with a cache": Defect(
        "ops",
        "your kernel attention",
        kernel("attention", attention_with(is_causal=lambda queries, keys: queries == keys)),
        "attention",
    ),
    "conv1d without a bias": Defect(
        "ops", "your kernel conv1d", kernel("conv1d", lambda x, w, b: CPU_CONV1D(x, w, b * 0)), "conv1d"
    ),
    "sum in 16 bits": Defect("ops", "xp.sum", function("sum", sum_in_16_bits), "softmax"),
    "bfloat16 by truncation": Defect("ops", "xp.astype", function("astype", truncated), "gelu"),
    "compiled in 16 bits": Defect(
        "ops", "compile", {"compile": compiled_in_16_bits, "compiles_per_shape": True}, "gelu"
    ),
}


def broken(defect):
    return type("Broken", (OwnBackend,), {**defect.members, "name": "broken"})()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_explained(name):
    """Catches a test of the kit that has gone blind, a level that lets a defect through, and a wrong diagnosis."""
    defect = DEFECTS[name]
    only = f"contract or constants or {defect.only}" if defect.only else ""
    report = testing.check(broken(defect), level=defect.level, only=only, examples=5, max_failures=3)
    assert not report.ok
    print(report)
    assert {failure.level for failure in report.failures} == {defect.level}
    assert any(re.search(defect.diagnosis, failure.diagnosis) for failure in report.failures), str(report)
