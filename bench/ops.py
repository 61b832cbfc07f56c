"""The latency of portable_gpt2's ops, compared with the framework's own functions.

The framework's function runs eagerly or compiled, whichever is faster. For the rows "the definition under jit", the
same compiler compiles the portable definition of an op and the framework's own function. The two notebooks of 2019,
with which the project began, asked two more questions, which other rows answer. Is the built-in softmax faster than its
written-out definition? Is the matrix product faster than a convolution of width 1?
`gpu` asks both questions on a GPU as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import frameworks
from .clock import fastest, repeated
from .rows import Row
from .run import LEFT_OUT, Run
from .worker import Worker, WorkerError

SOFTMAX = ((3, 3), (4, 3, 2), (36, 10, 4, 3, 2), (12, 1024, 1024))
CONV1D = (((10, 5, 2, 5), (5, 3)), ((8, 128, 768), (768, 3072)))
SLOW = ("torch",)  # the frameworks that take half a minute per op to compile it


def _title(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


SOFTMAX_TITLES = {f"softmax {_title(shape)}": shape for shape in SOFTMAX}
CONV1D_TITLES = {f"conv1d {_title(x)} by {_title(w)}": (x, w) for x, w in CONV1D}
UNDER_JIT = "the definition under jit, "
BUILT_IN = "is the built-in faster than the definition? "
PRODUCT = "is the product faster than a convolution? "


def plan(backend: str) -> list[Row]:
    """Return the planned rows for one framework."""
    ops = [*SOFTMAX_TITLES, *CONV1D_TITLES]
    names = [*ops, *(BUILT_IN + title for title in SOFTMAX_TITLES), *(PRODUCT + title for title in CONV1D_TITLES)]
    if backend != "numpy":  # NumPy has no compiler
        names += [UNDER_JIT + name for name in ops]
    return [Row("ops", backend, name, "us") for name in names]


def measure(run: Run, backend: str) -> Iterator[Row]:
    """Measure the planned rows on one framework."""
    with Worker() as worker:
        for row in plan(backend):
            if run.quick and row.name.startswith(UNDER_JIT) and backend in SLOW:
                yield row.failed(LEFT_OUT)
                continue
            try:
                yield row.measured(**worker.ask("ops:measure_one", name=backend, row=row.name, quick=run.quick))
            except WorkerError as error:
                yield row.failed(str(error))


def measure_one(name: str, row: str, quick: bool, device: str | None = None) -> dict[str, Any]:
    """Measure one row on one framework and device. Return the value and the reference, in microseconds."""
    import portable_gpt2 as pg

    own = frameworks.get(name, device)
    title = row.removeprefix(UNDER_JIT).removeprefix(BUILT_IN).removeprefix(PRODUCT)
    question = row.removesuffix(title)
    random = np.random.default_rng(0)
    if title in SOFTMAX_TITLES:
        arrays = [own.array((20 * random.standard_normal(SOFTMAX_TITLES[title])).astype(np.float32))]
        ours, definition, theirs = pg.softmax, pg.softmax.reference, own.softmax
        ways = {"own": own.softmax}
    else:
        x, w = CONV1D_TITLES[title]
        if question == PRODUCT:  # a convolution takes [batch, width, channels]
            x = (math.prod(x[:-2]), *x[-2:])
        arrays = [own.array(random.standard_normal(shape, np.float32)) for shape in (x, w, w[-1:])]
        ours, definition, theirs = pg.conv1d, pg.conv1d.reference, own.linear
        ways = own.linears

    if question == UNDER_JIT:
        run = own.compiled()
        # The functions take only arrays: to bind a default such as axis takes TensorFlow 80 us per call.
        calls = {
            "definition": run(lambda *arrays: definition(*arrays)),
            "framework's own": run(lambda *arrays: theirs(*arrays)),
        }
        value, others = "definition", ["framework's own"]
    elif question == BUILT_IN:
        calls = {"built-in": theirs, "definition": definition}
        value, others = "built-in", ["definition"]
    elif question == PRODUCT:
        calls = {"product": theirs, "convolution": own.convolution}
        value, others = "product", ["convolution"]
    else:
        forms = {f"{way}, {mode}": run(f) for way, f in ways.items() for mode, run in own.modes.items()}
        calls = {"ours": ours, **forms}
        value, others = "ours", list(calls)[1:]
    return _compare(own, calls, arrays, value, others, quick)


def _compare(
    own: frameworks.Framework,
    calls: dict[str, Callable[..., Any]],
    arrays: list[Any],
    value: str,
    others: list[str],
    quick: bool,
) -> dict[str, Any]:
    waiting = {name: (lambda f=f: own.wait(f(*arrays))) for name, f in calls.items()}
    samples = repeated(waiting, rounds=5 if quick else 15, at_least=0.004 if quick else 0.02)
    reference = fastest({name: samples[name] for name in others})
    return {
        "value": min(samples[value]) * 1e6,
        "reference": min(samples[reference]) * 1e6,
        "reference_name": reference,
        "samples": samples,
    }
