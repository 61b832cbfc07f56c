"""Replay the notebook "Softmax function" of 2019 on every backend: ``python examples/softmax.py [BACKEND ...]``.

The notebook copied softmax from OpenAI's GPT-2 and asked three questions about it:

1. Why is the maximum subtracted?
2. Is the function equal to the framework's built-in one?
3. Which of the two is faster?

Timings are meaningful only on a machine that runs nothing else.
"""

import sys

import numpy as np
from common import backends, builtin_softmax, microseconds, rng

import portable_gpt2 as pg

X = np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
LARGER = [rng.normal(0, 20, shape).astype(np.float32) for shape in [(4, 3, 2), (36, 10, 4, 3, 2)]]


def unshifted(x):
    """Softmax as textbooks define it, without subtracting the maximum."""
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def main(*names):
    """Answer the three questions."""
    print("1. Why is the maximum subtracted?\n")
    print("   exp overflows in float32 where x is above 88.7. With the maximum subtracted, no exponent is positive.")
    for x in ([1.0, 2.0, 3.0], [101.0, 102.0, 103.0]):
        x = np.asarray(x, np.float32)
        with np.errstate(all="ignore"):
            print(f"   x = {x}: unshifted {unshifted(x)}, pg.softmax {pg.softmax(x)}")

    print("\n2. Is it equal to the built-in function? (largest difference, in float32)\n")
    for backend in backends(names):
        if builtin := builtin_softmax(backend.name):
            worst = 0.0
            for a in (X, *LARGER):
                x = backend.from_numpy(a)
                difference = backend.to_numpy(pg.softmax.reference(x)) - backend.to_numpy(builtin(x))
                worst = max(worst, float(np.abs(difference).max()))
            print(f"   {backend.name:12} {worst:.1e}")
        else:
            print(f"   {backend.name:12} has no softmax (install SciPy to compare with SciPy's)")

    print("\n3. Which is faster? (microseconds per call)\n")
    print(f"   {'backend':12} {'shape':18} {'definition':>10} {'built-in':>10} {'pg.softmax':>10}")
    for backend in backends(names):
        for a in (X, *LARGER):
            x, shape = backend.from_numpy(a), "x".join(map(str, a.shape))
            builtin = builtin_softmax(backend.name)
            times = [
                f"{microseconds(f, x):10.1f}" if f else " " * 10 for f in (pg.softmax.reference, builtin, pg.softmax)
            ]
            print(f"   {backend.name:12} {shape:18} {' '.join(times)}")
    print("\n   pg.softmax is the kernel that the backend chose: the built-in function where that is the fastest.")


if __name__ == "__main__":
    main(*sys.argv[1:])
