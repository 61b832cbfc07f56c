"""Write a call of a backend as a script that a reader can paste into a Python interpreter."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import portable_gpt2 as pg

from ..registry import ENTRY_POINTS
from .facts import Call, Facts

_MOST = 400  # elements of all arrays that a script may have


def backend_lines(backend: Any) -> tuple[list[str], str, bool]:
    """Return the imports and the expression for a backend, and whether it must be registered."""
    kind = type(backend)
    device = ""
    if backend.default_device is not None:
        name = next(n for n, device in backend.devices().items() if device == backend.default_device)
        device = repr(name)
    declared = {point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if f"{kind.__module__}:{kind.__qualname__}" in declared:
        return [], f"pg.get_backend({', '.join(filter(None, [repr(backend.name), device]))})", False
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind and kind.__module__ != "__main__":
        return [f"from {kind.__module__} import {kind.__qualname__}"], f"{kind.__qualname__}({device})", True
    return [], f"{kind.__qualname__}({device})", True


def expression(function: Callable[..., Any], backend: Any) -> str | None:
    """Return code for a function: an op, its definition, a function of the namespace, or a method of the backend."""
    for name in pg.ops.__all__:
        op = getattr(pg, name)
        if function is op:
            return f"pg.{name}"
        if function is getattr(op, "reference", None):
            return f"pg.{name}.reference"
    name = getattr(function, "__name__", "")
    if getattr(function, "__self__", None) is backend and hasattr(type(backend), name):
        return f"backend.{name}"
    if name and getattr(backend.xp, name, None) is function:
        return f"backend.xp.{name}"
    return None


def script(call: Call, facts: Facts | None = None) -> str:
    """Return code that repeats a call and prints the element that is wrong; empty if the call cannot be written."""
    function: Any = call.function
    options = dict(call.options)
    code = expression(function, call.backend)
    is_compiled = code is None and hasattr(function, "__wrapped__")
    if is_compiled:
        function = function.__wrapped__
    if isinstance(function, functools.partial):
        function, options = function.func, {**function.keywords, **options}
    code = code or expression(function, call.backend)
    plain = {key: _plain(value) for key, value in options.items()}
    arrays = [a for a in call.arrays if a is not None]
    if code is None or sum(a.size for a in arrays) > _MOST or None in plain.values():
        return ""
    imports, made, is_foreign = backend_lines(call.backend)
    names = _names(function, len(call.arrays))
    body = []
    for name, a in zip(names, call.arrays, strict=True):
        body += [f"{name} = None"] if a is None else _array_lines(name, a)
    keywords = "".join(f", {key}={value}" for key, value in plain.items())
    given = ", ".join(names)
    if is_compiled:
        body.append(f"function = backend.compile(lambda {given}: {code}({given}{keywords}))")
        code, keywords = "function", ""
    body.append(f"y = backend.to_numpy({code}({given}{keywords}))")
    if facts is not None and facts.index is not None:
        at = f"[{', '.join(map(str, facts.index))}]" if facts.index else ""
        within = f", within {facts.allowed:.3g}" if facts.allowed else ""
        body.append(f"print(float(y{at}))  # computed {facts.computed!r}; expected {facts.exact!r}{within}")
    else:
        body.append("print(y)")
    imports = [*imports, "import numpy as np"]
    if any(a.dtype.name == "bfloat16" for a in arrays):
        imports.append("import ml_dtypes")
    return _program(imports, made, is_foreign, body)


def _names(function: Any, n: int) -> list[str]:
    """Return names of n arguments: those of the parameters if the function tells them."""
    try:
        names = [name for name in inspect.signature(function).parameters if name.isidentifier()][:n]
    except (TypeError, ValueError):
        names = []
    return names if len(names) == n and not {"args", "kwargs"} & set(names) else [f"x{i}" for i in range(n)]


def _plain(value: Any) -> str | None:
    """Return the code of an option, or None if it is not a plain value."""
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, tuple) and all(_plain(each) is not None for each in value):
        return repr(value)
    return None


def _array_lines(name: str, a: np.ndarray) -> list[str]:
    """Return code for an array on the backend, with the same elements and the same memory layout."""
    dtype = "ml_dtypes.bfloat16" if a.dtype.name == "bfloat16" else f'"{a.dtype.name}"'
    flips = tuple(slice(None, None, -1) if stride < 0 and n > 1 else slice(None) for stride, n in _axes(a))
    flipped = any(each.step for each in flips)
    plain = a[flips] if flipped else a
    code = f"np.asarray({_literal(plain)}, {dtype})" if a.size else f"np.zeros({a.shape}, {dtype})"
    if not plain.flags.c_contiguous and plain.flags.f_contiguous:
        code = f"np.asfortranarray({code})"
    elif not plain.flags.c_contiguous and a.ndim:
        code = f"np.repeat({code}, 2, axis=-1)[..., ::2]"
    if flipped:
        code += f"[{', '.join('::-1' if each.step else ':' for each in flips)}]"
    if a.flags.writeable:
        return [f"{name} = backend.from_numpy({code})"]
    return [f"{name} = {code}", f"{name}.flags.writeable = False", f"{name} = backend.from_numpy({name})"]


def _axes(a: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(a.strides, a.shape, strict=True))


def _literal(a: np.ndarray) -> str:
    """Return the elements as nested lists. The decimal digits of a float determine all of its bits."""
    if a.ndim:
        return f"[{', '.join(_literal(each) for each in a)}]"
    if a.dtype.kind in "biu":
        return repr(a.item())
    value = float(a)
    if math.isfinite(value):
        return repr(value)
    return "np.nan" if math.isnan(value) else "np.inf" if value > 0 else "-np.inf"


def smaller(call: Call, facts: Facts | None) -> tuple[Call, Facts | None]:
    """Return a call with only the element that is wrong, if the function computes each element on its own."""
    if facts is None or not facts.index or call.result is None or len(call.arrays) != 1 or call.options:
        return call, facts
    (a,) = call.arrays
    if a is None or a.shape != call.result.shape:
        return call, facts
    one = a[facts.index].reshape(1)
    result = call.backend.to_numpy(call.function(call.backend.from_numpy(one)))
    if result.tobytes() != call.result[facts.index].tobytes():
        return call, facts
    return replace(call, arrays=(one,), result=result), replace(facts, index=(0,))


def of_test(item: Any, backend: Any) -> str:
    """Return code that calls a test function; empty if its arguments cannot be written."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    imports, made, is_foreign = backend_lines(backend)
    given = []
    for name in inspect.signature(item.function).parameters:
        value = "backend" if name == "backend" else _plain(params[name]) if name in params else None
        if name == "numerics" and "dtype" in params:
            value = f"stated(backend, {params['dtype']!r})"
            imports = [*imports, "from portable_gpt2.numerics import stated"]
        if value is None:
            return ""
        given.append(value)
    imports = [*imports, f"from {item.module.__name__} import {item.originalname}"]
    return _program(imports, made, is_foreign, [f"{item.originalname}({', '.join(given)})"])


def _program(imports: list[str], made: str, is_foreign: bool, body: list[str]) -> str:
    """Return a script: imports, the backend, and some lines that use it."""
    ours = ["import portable_gpt2 as pg"] if "pg." in "".join([made, *body]) else []
    ours += ["from portable_gpt2 import testing"] if is_foreign else []
    for line in imports:
        if "portable_gpt2" in line:
            ours.append(line)
    others = [line for line in imports if line not in ours]
    head = [*sorted(others), *([""] if others else []), *sorted(ours, reverse=True), ""]
    if not is_foreign:
        return "\n".join([*head, f"backend = {made}", *body]) + "\n"
    kind = made.partition("(")[0]
    note = "" if any(line.endswith(f" import {kind}") for line in imports) else f"  # {kind}: the class of your backend"
    lines = [f"with testing.registered({made}) as backend:{note}", *(f"    {line}" for line in body)]
    return "\n".join([*head, *lines]) + "\n"
