"""`testing.check` finds what is wrong with a backend, at the right level, and says where to look.

Each entry of DEFECTS is a backend with one mistake, next to the level whose tests must find it and a pattern of the
diagnosis. The right backend is in `own_arrays`.
"""

import functools
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import frameworks
import hypothesis
import ml_dtypes
import numpy as np
import own_arrays
import processes
import pytest
from own_arrays import Array, Namespace, OwnBackend, mapped
from portable_gpt2_backends.numpy import NumpyBackend

import portable_gpt2 as pg
from portable_gpt2 import registry, testing
from portable_gpt2.cli import main
from portable_gpt2.random import gumbel
from portable_gpt2.testing import scripts
from portable_gpt2.testing.facts import Call

CPU_SOFTMAX, CPU_LAYER_NORM, CPU_CONV1D = (NumpyBackend.kernels[name] for name in ("softmax", "layer_norm", "conv1d"))


class Defect(NamedTuple):
    level: str
    diagnosis: str
    """A pattern of a diagnosis in the report."""
    members: dict[str, Any]
    """The members of the backend that are wrong."""
    only: str = ""
    """The tests of the level that run, because all of them would take longer."""


def kernel(name, wrong, *, is_narrow=False):
    """Return the members of a backend with a wrong kernel of NumPy arrays, which takes what the right one takes.

    With `is_narrow`, it computes in 16 bits as well.
    """
    right = NumpyBackend.kernels[name]

    def widened(a):
        return a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype.itemsize == 2 and is_narrow else a

    @functools.wraps(right)
    def checked(*args, **options):
        is_taken = right(*map(widened, args), **options) is not NotImplemented
        return wrong(*args, **options) if is_taken else NotImplemented

    return {"kernels": own_arrays.kernels(**{name: checked})}


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
    if not x.flags.writeable:
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


def index_add_in_16_bits(self, x, indices, rows):
    total = np.zeros(x.shape, np.float16)
    np.add.at(total, indices.a, rows.a.astype(np.float16))
    return Array(x.a + total.astype(x.dtype))


def gumbel_of_the_next_place(self, entries, places, seeds, streams):
    def one(entry, place, seed, stream):
        return gumbel(np.asarray([entry]), 50257, place + 1, seed % 2**64, stream % 2**64)[0]

    given = (map(int, each) for each in np.broadcast(entries.a, places.a, seeds.a, streams.a))
    shape = np.broadcast_shapes(entries.shape, places.shape, seeds.shape, streams.shape)
    return Array(np.reshape([one(*each) for each in given], shape))


def for_each_of_several_reversed(self, fn, *lists):
    found = OwnBackend.for_each(self, fn, *lists)
    return found[::-1] if len(found) > 3 else found


def transposed_if_square(self, path, x):
    return Array(x.a.T) if path.endswith("attn/c_proj/w") and x.shape[0] == x.shape[1] else x


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


def floats_only(self, a, device):
    return Array(a) if a.dtype.kind in "biu" else Array(a, device or "cpu")


class OneDevice(Namespace):
    """A namespace whose functions refuse arrays on two devices, as those of most frameworks do."""

    def __getattr__(self, name):
        function = super().__getattr__(name)
        if isinstance(function, type) or not callable(function):
            return function

        def call(*args, **options):
            if len({x.device for x in args if isinstance(x, Array)}) > 1:
                raise RuntimeError("the arrays are on two devices")
            return function(*args, **options)

        return call


WITHOUT_TAKE = {name: getattr(Namespace(), name) for name in dir(np) if name.islower() and name != "take"}
TWO_DEVICES = {"devices": lambda self: {"cpu": "cpu", "cpu:1": "cpu:1"}}
A_GPU = {"devices": lambda self: {"cpu": "cpu", "gpu:0": "gpu:0"}, "xp": OneDevice(), "kernels": {}}

DEFECTS = {
    # One function of the namespace
    "transposed matmul": Defect("contract", "xp.matmul", function("matmul", lambda x, y: np.matmul(y.mT, x.mT))),
    "mean over the wrong axis": Defect("contract", "xp.mean", function("mean", mean_over_the_first_axis)),
    "take that clips": Defect(
        "contract",
        "xp.take",
        function("take", lambda x, i, *, axis: np.take(x, np.clip(i, 0, x.shape[axis] - 2), axis=axis)),
    ),
    "sum in 16 bits": Defect("contract", "xp.sum", function("sum", sum_in_16_bits)),
    "no take": Defect("contract", "the namespace has no take", {"xp": SimpleNamespace(**WITHOUT_TAKE), "kernels": {}}),
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
    "float64 is narrowed silently": Defect("contract", "Backend.put", {"put": narrowing}),
    "a device is dropped": Defect("contract", "device", {**TWO_DEVICES, "put": lambda self, a, device: Array(a)}),
    "integers are on the default device": Defect(
        "contract",
        "right on the default device and wrong on gpu:0: a device is dropped",
        {**A_GPU, "put": floats_only},
    ),
    # Transformations
    "compile bakes in the position": Defect(
        "contract", "Backend.compile", {"compile": compiled_with_the_first_ints, "compiles_per_shape": True}
    ),
    "a stale donated buffer": Defect("contract", "Backend.compile", {"compile": compiled_with_a_stale_buffer}),
    "compiled in 16 bits": Defect(
        "contract", "Backend.compile", {"compile": compiled_in_16_bits, "compiles_per_shape": True}
    ),
    "gradient scaled": Defect("contract", "Backend.value_and_grad", {"value_and_grad": doubled}),
    "gradient of one leaf dropped": Defect("contract", "Backend.value_and_grad", {"value_and_grad": without_one_leaf}),
    # Errors of elementary functions
    "exp in float32": Defect(
        "constants",
        "exp of float64 .* computed in float32",
        function("exp", lambda x: np.exp(x.astype("f4")).astype(x.dtype)),
        "test_exp",
    ),
    "exp whose error grows": Defect(
        "constants", r"growing with .* Numerics\(exp=\(", function("exp", grown), "test_exp"
    ),
    "log off": Defect(
        "constants", "log errs", function("log", lambda x: np.log(x) * x.dtype.type(1 + 1e-5)), "test_log"
    ),
    "tanh off": Defect(
        "constants", "tanh errs", function("tanh", lambda x: np.tanh(x) * x.dtype.type(1 - 1e-5)), "test_tanh"
    ),
    # Kernels, and functions whose mistakes only the bounds show
    "softmax without the max": Defect("ops", "your kernel softmax", kernel("softmax", softmax_without_max), "softmax"),
    "NaN row not NaN": Defect(
        "ops", "your kernel softmax .* NaN at different places", kernel("softmax", softmax_without_nan), "softmax"
    ),
    "gelu by erf": Defect("ops", "your kernel gelu", kernel("gelu", gelu_by_erf), "gelu"),
    "a kernel that rounds twice": Defect(
        "ops", "your kernel gelu rounds to .*16 more than once", kernel("gelu", gelu_in_16_bits, is_narrow=True), "gelu"
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
    "bfloat16 by truncation": Defect("ops", "xp.astype", function("astype", truncated), "gelu"),
    # Mistakes that only the model or training shows
    "gumbel of another place": Defect("model", "Backend.gumbel", {"gumbel": gumbel_of_the_next_place}, "variates"),
    "relayout transposes": Defect(
        "model", "Backend.relayout", {"relayout": transposed_if_square}, "test_logits_are or same_seed_gives"
    ),
    "index_add in 16 bits": Defect("training", "Backend.index_add", {"index_add": index_add_in_16_bits}, "gradients"),
    "for_each reverses": Defect(
        "training", "Backend.for_each", {"for_each": for_each_of_several_reversed}, "optimizer"
    ),
}


def broken(name):
    return type("Broken", (OwnBackend,), {**DEFECTS[name].members, "name": "broken"})()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_explained(name):
    """Catches a test of the kit that has gone blind, a level that lets a defect through, and a wrong diagnosis."""
    defect = DEFECTS[name]
    only = f"contract or {defect.only}" if defect.only else ""
    report = testing.check(broken(name), level=defect.level, only=only, examples=3, max_failures=20)
    assert {failure.level for failure in report.failures} == {defect.level}, str(report)
    assert any(re.search(defect.diagnosis, failure.diagnosis) for failure in report.failures), str(report)


# The report


def test_a_script_repeats_the_failure(capsys):
    """Catches a script that lacks an import, a digit, an option or the memory layout of the input."""
    backend = broken("gelu by erf")
    report = testing.check(backend, level="ops", only="gelu", examples=3)
    assert report.failures
    measured = [failure for failure in report.failures if failure.index is not None]
    assert measured
    for failure in measured:
        exec(failure.script, {"Broken": lambda: backend})
        assert float(capsys.readouterr().out) == failure.computed
        assert failure.ratio > 1
        assert abs(failure.computed - failure.exact) > failure.allowed
        assert (failure.backend, failure.device, failure.op, failure.form) == ("broken", "cpu", "gelu", "kernel")
    text = str(report)
    assert "Largest error / bound" in text
    assert text.count("To reproduce") < len(report.failures)  # failures with the same cause are shown once
    assert json.loads(report.to_json())["failures"][0]["test"] == report.failures[0].test


def test_a_layout_is_written_as_it_is():
    """Catches a script whose array has the same elements in another memory layout."""
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    frozen = a.copy()
    frozen.flags.writeable = False
    backend = OwnBackend()
    for x in (a, a.T, a[::-1, ::-1], a[:, ::2], frozen, a[:0], a.astype(ml_dtypes.bfloat16), np.float32([np.nan])):
        call = Call(pg.gelu, backend, (x,), {})
        scope = {"OwnBackend": lambda: backend}
        exec(scripts.script(call).replace("print(y)", "found = x.a"), scope)
        found = scope["found"]
        assert found.dtype == x.dtype
        assert np.array_equal(found.astype("f4"), x.astype("f4"), equal_nan=True)
        assert not x.size or [n > 0 for n in found.strides] == [n > 0 for n in x.strides]
        assert found.flags.writeable == x.flags.writeable
        assert found.flags.c_contiguous == x.flags.c_contiguous


def test_a_failed_assertion_says_what_was_called_and_what_came():
    """Catches a message that says no more than that something is false."""
    report = testing.check(broken("split in reverse"), level="contract", only="split_divides")
    condition, *values = report.failures[0].message.splitlines()
    assert condition == "np.array_equal(backend.to_numpy(part), expected)"
    assert any("array_equal(array([[[" in line for line in values), values
    assert condition in str(report)


def test_an_interrupted_check_reports_what_ran():
    """Catches results that Ctrl-C loses, and a report of half of the tests that says that all is well."""

    def interrupt(level, done, total):
        if done == 2:
            raise KeyboardInterrupt

    for backend, verdict in ((OwnBackend(), "fails no test"), (broken("split in reverse"), "fails 1 test")):
        with pytest.raises(testing.Interrupted) as caught:
            testing.check(backend, level="contract", only="split or top_k or relayout", progress=interrupt)
        report = caught.value.report
        assert sum(level.passed + level.failed for level in report.levels) == 2
        assert not report.ok
        assert str(report).endswith(f"{verdict} so far. The check was interrupted after 2 of 3 tests.")


SPLIT = "test_split_divides_the_last_axis"


def test_expected_failures_are_strict():
    """Catches an expectation that hides a test that passes, or a test that does not exist."""
    backend = broken("split in reverse")
    options = {"level": "contract", "only": "split"}
    report = testing.check(backend, expected_failures={SPLIT: "the parts are in reverse"}, **options)
    assert report.ok
    assert [level.expected for level in report.levels] == [1]
    report = testing.check(OwnBackend(), expected_failures={SPLIT: "the parts are in reverse"}, **options)
    assert [failure.test for failure in report.failures] == [f"contract/test_functions.py::{SPLIT}[own]"]
    with pytest.raises(ValueError, match=f"no test test_split_divides_the_lst_axis; did you mean {SPLIT}"):
        testing.check(backend, expected_failures={"test_split_divides_the_lst_axis": ""}, **options)


def test_a_level_is_the_condition_of_the_next():
    """Catches a level that runs although the one before it failed, and a report that does not say so."""
    report = testing.check(broken("split in reverse"), only="split_divides or gelu")
    assert [level.name for level in report.levels] == ["contract"]
    assert report.devices == ("cpu",)
    assert "Level contract failed, so constants, ops, model and training did not run." in str(report)
    with pytest.raises(ValueError, match="no level 'op'; the levels are contract, constants, ops"):
        testing.check("numpy", level="op")


# The process of the caller


def state():
    return {
        "warnings": list(warnings.filters),
        "profile": hypothesis.settings.get_current_profile_name(),
        "examples": hypothesis.settings().max_examples,
        "modules": {name: module for name, module in sys.modules.items() if ".test_" in name},
        "path": list(sys.path),
        "meta_path": list(sys.meta_path),
        "environment": {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
        "directory": os.getcwd(),
        "files": sorted(os.listdir()),
        "backends": (dict(registry._LOADED), dict(registry._BACKEND_OF_TYPE)),
    }


def test_checking_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    """Catches a configuration of the caller that is read, and a setting, a module or a file that stays afterwards."""
    pg.softmax(np.ones(3))  # NumPy's array types are known
    (tmp_path / "conftest.py").write_text("raise RuntimeError('this file is not for the kit')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setitem(sys.modules, "portable_gpt2.testing.ops.test_gelu", object())  # of a run around this one
    monkeypatch.chdir(tmp_path)
    before = state()
    numpy = pg.get_backend("numpy")
    for backend, is_right in ((numpy, True), (broken("split in reverse"), False), (OwnBackend(), True), (numpy, True)):
        only = "split or gelu_of_x" if backend is numpy else "split"
        assert testing.check(backend, level="ops", only=only, examples=2).ok is is_right
        assert state() == before
    with pytest.raises(TypeError, match="expected an array"):
        pg.softmax(Array([1.0]))


def test_checking_numpy_imports_no_other_framework():
    """Catches a test of the kit that imports a framework, and a report that imports matplotlib."""
    code = """if True:
        import sys
        from portable_gpt2 import testing
        assert "pytest" not in sys.modules
        assert testing.check("numpy", only="namespace or gelu or logits_follow or adamw", examples=1).ok
        print(*{name.partition(".")[0] for name in sys.modules})"""
    others = {*frameworks.FRAMEWORKS, "matplotlib", "transformers"} - {"flint"}  # which computes the exact results
    assert not set(processes.run(code).split()) & others


# The command


def test_the_command_reports_and_says_by_its_status_whether_all_is_well(tmp_path, capsys):
    """Catches a status of 0 after a failure, and a JSON file that is not the report."""
    file = tmp_path / "report.json"
    options = ["--level", "contract", "--only", "split", "--examples", "2", "--json", str(file)]
    assert main(["check", "numpy", *options]) == 0
    assert capsys.readouterr().out.endswith("numpy passes.\n")
    assert json.loads(file.read_text())["ok"] is True
    with testing.registered(broken("split in reverse")):
        assert main(["check", "broken", *options]) == 1
    assert "Diagnosis: look at Backend.split" in capsys.readouterr().out
    assert json.loads(file.read_text())["failures"][0]["backend"] == "broken"


def test_the_command_says_what_to_install(monkeypatch, capsys):
    """Catches a traceback where the extra is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "hypothesis" else find(name, *a))
    assert main(["check", "numpy"]) == 2
    assert "needs hypothesis: pip install 'portable-gpt2[testing]'" in capsys.readouterr().err


class Killing(OwnBackend):
    """A backend whose first split gets the process a signal."""

    name = "killing"
    signals = [signal.SIGTERM]

    def split(self, x, n):
        if self.signals:
            os.kill(os.getpid(), self.signals.pop())
        return super().split(x, n)


def test_the_command_prints_the_report_when_it_is_told_to_end(capsys):
    """Catches a scheduler's SIGTERM that loses everything that the tests have found so far."""
    with testing.registered(Killing()):
        status = main(["check", "killing", "--level", "contract", "--only", "split_divides or top_k_returns"])
    assert status == 128 + signal.SIGTERM
    assert "interrupted after 1 of 2 tests" in capsys.readouterr().out
