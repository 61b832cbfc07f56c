"""Replay the notebook "1D Convolution" of 2019 on every backend: ``python examples/conv1d.py [BACKEND ...]``.

The notebook copied conv1d from OpenAI's GPT-2 and asked three questions about it:

1. Why is a linear layer called a convolution?
2. Is the function equal to the framework's built-in convolution?
3. Which of the two is faster?

Timings are meaningful only on a machine that runs nothing else.
"""

import sys

import numpy as np
from common import backends, microseconds, rng, true_convolution

import portable_gpt2 as pg


def arrays(batch, seq, nx, nf):
    """Return an input, a weight and a bias as GPT-2's checkpoints have them: w is [1, nx, nf]."""
    x = rng.uniform(-0.13, 0.13, (batch, seq, nx)).astype(np.float32)
    w = rng.normal(0, 0.02, (1, nx, nf)).astype(np.float32)
    return x, w, rng.normal(0, 0.02, nf).astype(np.float32)


CASES = {"10x10x5 by 5x3": arrays(10, 10, 5, 3), "1x64x768 by 768x3072": arrays(1, 64, 768, 3072)}


def main(*names):
    """Answer the three questions."""
    print("1. Why is a linear layer called a convolution?\n")
    print("   A convolution of width 1 looks at one position at a time: it multiplies the features of every position")
    print("   with the same matrix. That is a linear layer. The weights still have the width as their first dimension:")
    x, w, b = CASES["10x10x5 by 5x3"]
    y = pg.conv1d(x, w, b)
    print(f"   w has shape {w.shape} and x {x.shape}. The result has shape {y.shape}.")
    one_by_one = np.stack([x[:, i] @ w[0] + b for i in range(x.shape[1])], axis=1)
    print(f"   Largest difference from x[:, i] @ w[0] + b, position by position: {np.abs(y - one_by_one).max():.1e}")
    print("   A linear layer needs no axis of positions, so x can have any number of leading axes:")
    print(f"   x of shape (10, 5, 2, 5), as in the notebook, gives {pg.conv1d(x.reshape(10, 5, 2, 5), w, b).shape}.")

    print("\n2. Is it equal to a true convolution? (largest difference, in float32)\n")
    for backend in backends(names):
        convolution = true_convolution(backend.name)
        worst = 0.0
        for case in CASES.values():
            x, w, b = map(backend.from_numpy, case)
            difference = backend.to_numpy(pg.conv1d.reference(x, w, b)) - backend.to_numpy(convolution(x, w, b))
            worst = max(worst, float(np.abs(difference).max()))
        print(f"   {backend.name:12} {worst:.1e}")

    print("\n3. Which is faster? (microseconds per call)\n")
    print(f"   {'backend':12} {'shapes':22} {'definition':>11} {'convolution':>11} {'pg.conv1d':>11}")
    for backend in backends(names):
        convolution = true_convolution(backend.name)
        for name, case in CASES.items():
            x, w, b = map(backend.from_numpy, case)
            times = [microseconds(f, x, w, b) for f in (pg.conv1d.reference, convolution, pg.conv1d)]
            print(f"   {backend.name:12} {name:22} {' '.join(f'{time:11.1f}' for time in times)}")
    print("\n   A comment in OpenAI's GPT-1 code gives speed as the reason for the matrix product.")


if __name__ == "__main__":
    main(*sys.argv[1:])
