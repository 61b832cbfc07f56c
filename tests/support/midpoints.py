"""Arguments of ops whose exact results lie on a midpoint between two float32 numbers, or extraordinarily near to one.

The expected results follow from the construction: a number between two neighbouring float32 numbers rounds to the one
on its side of the midpoint, and a tie to the one with the even last bit. Subnormal numbers count as 0, and every zero
is +0. The results of arguments that were found by a search are known from balls of a high precision (oracle.py).
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

F = np.float32
LARGEST = float(np.finfo(F).max)
SMALLEST = 2.0**-126


class Case(NamedTuple):
    """A call of an op: its arguments by name, of which arrays are NumPy arrays, and its result."""

    name: str
    op: str
    arguments: dict
    expected: np.ndarray


def factors(offset):
    """Return two float32 numbers whose product is an offset, which is a power of two, its negative, or 0."""
    if offset == 0:
        return 0.0, 0.0
    exponent = round(math.log2(abs(offset)))
    return math.copysign(2.0 ** (exponent // 2), offset), 2.0 ** (exponent - exponent // 2)


def sums():
    """Yield terms of sums near midpoints, an offset far below them, and the correctly rounded sums with the offset."""
    for low, half in (
        (1.0, 2.0**-24),  # the last bit of 1 is even
        (1 + 2.0**-23, 2.0**-24),  # the last bit is odd
        (2 - 2.0**-23, 2.0**-24),  # between two binades
        (1.5 * 2.0**100, 2.0**76),
        (-(2.0**-100), -(2.0**-124)),
    ):
        high = low + 2 * half
        even = low if F(low).view(np.int32) % 2 == 0 else high
        tiny = abs(half) * 2.0**-79  # 2^-80 units in the last place
        for offset, expected in ((0.0, even), (tiny, max(low, high)), (-tiny, min(low, high))):
            yield [low, half], offset, expected
            yield [2.0**120, low, half, -(2.0**120)], offset, expected
    for sign in (1, -1):
        for offset in (0.0, 2.0**-220, -(2.0**-220)):
            # the threshold of overflow, 2^128 - 2^103
            yield [sign * LARGEST, sign * 2.0**103], sign * offset, sign * (math.inf if offset >= 0 else LARGEST)
            # 0: exactly, or below all numbers
            yield [sign * 1.0, -sign * 1.0], offset, 0.0
        # a partial sum overflows in float32, and the sum does not
        yield [sign * LARGEST, sign * LARGEST, -sign * LARGEST, sign * 2.0**102], 0.0, sign * LARGEST
        yield [sign * 1e-40], 0.0, 0.0  # a subnormal number


def products():
    """Yield factors x and w of dot products near midpoints, and the correctly rounded dot products."""
    for terms, offset, expected in sums():
        x, w = factors(offset)
        yield [*terms, x], [*np.ones(len(terms)), w], expected
    # the threshold of the results that become 0 is 2^-126 - 2^-75 2^-75
    for sign, offset in itertools.product((1, -1), (0.0, 2.0**-230, -(2.0**-230))):
        x, w = factors(sign * offset)
        expected = sign * SMALLEST if offset >= 0 else 0.0
        yield [sign * SMALLEST, -sign * 2.0**-75, x], [1.0, 2.0**-75, w], expected
    # many terms, in an order that rounds differently at each step
    n = 1000
    for offset, expected in ((0.0, 1.0), (2.0**-60, 1 + 2.0**-23), (-(2.0**-60), 1.0)):
        parts = np.random.default_rng(0).integers(-(2**23), 2**23, n)
        rest = [1.0, 2.0**-24, *parts, *-parts, offset]
        order = np.random.default_rng(1).permutation(len(rest))
        yield np.asarray(rest)[order], np.where(order == len(rest) - 1, 2.0**-60, 1.0), expected


def _dots():
    """Return arrays x and w [cases, n], filled up with zeros, and the expected dot products."""
    xs, ws, expected = zip(*products(), strict=True)
    n = max(map(len, xs))
    x, w = (np.asarray([[*row, *np.zeros(n - len(row))] for row in rows], F) for rows in (xs, ws))
    return x, w, np.asarray(expected, F)


def linear():
    """conv1d and unembed: each case has one element."""
    x, w, expected = _dots()
    zero = np.zeros(1, F)
    for i in range(len(x)):
        yield Case(f"dot {i}", "conv1d", {"x": x[i : i + 1], "w": w[i][:, None], "b": zero}, expected[i : i + 1, None])
        yield Case(f"dot {i}", "unembed", {"x": x[i], "w": w[i : i + 1]}, expected[i : i + 1])
        j = int(np.flatnonzero(x[i] * w[i])[-1]) if (x[i] * w[i]).any() else 0
        if w[i, j] == 1:  # this term is the bias
            arguments = {"x": np.delete(x[i], j), "w": np.delete(w[i], j)[None, :, None], "b": x[i, j : j + 1]}
            yield Case(f"bias {i}", "conv1d", arguments, expected[i : i + 1])


def scores():
    """attention_scores: the dot products, and factors that are not powers of two."""
    x, w, expected = _dots()
    for i in range(len(x)):
        arguments = {"q": x[i : i + 1], "k": w[i : i + 1], "scale": 1.0}
        yield Case(f"dot {i}", "attention_scores", arguments, expected[i : i + 1, None])
    # 3 * 5592407 = 16777221 is a midpoint. Its neighbours are 16777220, whose last bit is even, and 16777222.
    q, k = np.asarray([[5592407.0, 2.0**-60]], F), np.asarray([[1, 0], [1, 2.0**-60], [1, -(2.0**-60)]], F)
    expected = np.asarray([[16777220, 16777222, 16777220]], F)
    yield Case("factor 3", "attention_scores", {"q": q, "k": k, "scale": 3.0}, expected)
    yield Case("factor -3", "attention_scores", {"q": q, "k": k, "scale": -3.0}, -expected)
    up = np.asarray([[16777222, 16777222, 16777220]], F)
    scale = math.nextafter(3.0, 4.0)  # the result is above the midpoint, unless the key has the negative offset
    yield Case("factor above 3", "attention_scores", {"q": q, "k": k[:2], "scale": scale}, up[:, :2])
    huge = {"q": np.asarray([[2.0**-100]], F), "k": np.asarray([[2.0**-100]], F), "scale": 2.0**200 + 2.0**176}
    yield Case("a large factor", "attention_scores", huge, np.asarray([[1]], F))


def layer_norms():
    """layer_norm: the deviations are a and -a, so the result is b + g / sqrt(1 + eps / a^2) or b - g / sqrt(...)."""
    for n, low, eps, a in itertools.product(
        (2, 6), (1.0, 1 + 2.0**-23), (0.0, 5e-324, 1e-300, 2.0**-80), (1.0, 3.0, 2.0**-60)
    ):
        high, even = low + 2.0**-23, 1.0 if low == 1 else low + 2.0**-23
        x, g, b = np.asarray([a, -a] * (n // 2), F), np.full(n, 2.0**-24, F), np.asarray([low, high] * (n // 2), F)
        # low + 2^-24 / sqrt(1 + eps / a^2) is below the midpoint, and high - 2^-24 / sqrt(1 + eps / a^2) above it
        expected = np.asarray([low if eps else even, high if eps else even] * (n // 2), F)
        yield Case(f"n={n}, {low}, eps={eps}, {a}", "layer_norm", {"x": x, "g": g, "b": b, "eps": eps}, expected)
    # the variance is 16, and 4 / sqrt(16 + 9) is 4 / 5: ties
    x, g, b = np.asarray([4, -4], F), np.full(2, 5 * 2.0**-26, F), np.asarray([1, 1 + 2.0**-22], F)
    yield Case("variance 16", "layer_norm", {"x": x, "g": g, "b": b, "eps": 9.0}, np.asarray([1, 1 + 2.0**-22], F))
    # overflow: 2^128 - 2^104 + 2^103 / sqrt(1 + eps)
    for eps, expected in ((0.0, math.inf), (1e-200, LARGEST)):
        x, g, b = np.asarray([1, -1], F), np.full(2, 2.0**103, F), np.asarray([LARGEST, -LARGEST], F)
        arguments = {"x": x, "g": g, "b": b, "eps": eps}
        yield Case(f"overflow, eps={eps}", "layer_norm", arguments, np.asarray([expected, -expected], F))
    # large numbers that are nearly equal: the variance is 2^-46 times the square of the mean, or less
    for mean in (1.0, 2.0**100):
        x = np.asarray([mean, mean * (1 + 2.0**-23)], F)
        for eps, expected in ((0.0, 1.0), (5e-324, 1.0)):
            arguments = {"x": x, "g": np.full(2, 2.0**-24, F), "b": np.ones(2, F), "eps": eps}
            # 1 - 2^-24 is a float32 number, and 1 + 2^-24 a tie
            yield Case(f"cancellation {mean}", "layer_norm", arguments, np.asarray([1 - 2.0**-24, expected], F))


# Found by a search of all float32 numbers from 2^-9 to 16 and -16 to -2^-9: the distance of the result to the nearest
# midpoint, in units of its last place, and the side on which it lies.
GELU = [
    ("0x1.829b1e0000000p-1", -26.8),
    ("-0x1.ee670a0000000p+1", -26.8),
    ("0x1.56d0680000000p-2", -26.8),
    ("0x1.26ef520000000p-8", -26.7),
    ("-0x1.26ef520000000p-8", -26.7),
    ("-0x1.dfd60c0000000p-7", -26.4),
    ("0x1.0f16700000000p+2", -26.1),
    ("0x1.2e66740000000p-8", -25.3),
    ("-0x1.0af9260000000p-5", -25.0),
]
SIGMOID = [
    ("0x1.4379020000000p-5", -30.0),
    ("-0x1.2082e00000000p-3", -28.9),
    ("0x1.250c080000000p-9", -27.9),
    ("-0x1.32c9a00000000p-1", -27.3),
    ("-0x1.46c7e80000000p-4", -25.9),
    ("0x1.1bff5e0000000p-2", -25.8),
    ("-0x1.c9bb960000000p+3", -25.8),
    ("0x1.1956d40000000p-5", -25.5),
]
SOFTPLUS = [
    ("0x1.47f1100000000p+2", -29.2),
    ("-0x1.c0c9660000000p-3", -26.8),
    ("-0x1.c4490a0000000p-2", -26.6),
    ("-0x1.605a5a0000000p-2", -25.5),
    ("-0x1.2ab37e0000000p+3", -25.5),
    ("0x1.afed680000000p+0", -25.5),
    ("0x1.51e2620000000p-9", -25.3),
    ("-0x1.545f320000000p+2", -24.9),
]


def found(pairs):
    """Return the numbers that a search found."""
    return [float.fromhex(x) for x, _ in pairs]


def gelus():
    """gelu near the threshold of 0: gelu(x) = x / 2 + c x^2 / 2 for small x, with c = sqrt(2 / pi)."""
    x = 2 * SMALLEST - 2.0**-149  # half of it is the threshold
    x = np.asarray([x, -x, np.nextafter(F(x), F(0)), 2 * SMALLEST, LARGEST, -LARGEST, 1e-40, 0, -0.0, -100], F)
    expected = np.asarray([SMALLEST, 0, 0, SMALLEST, LARGEST, 0, 0, 0, 0, 0], F)
    yield Case("threshold", "gelu", {"x": x}, expected)


def softmaxes():
    """softmax and attention_weights of rows whose results are known."""
    for n in (1, 2, 3, 1000):
        row = np.full(n, 3.7, F)
        yield Case(f"{n} equal", "softmax", {"x": row}, np.full(n, F(1) / F(n)))
        arguments = {"q": np.ones((1, 1), F), "k": row[:, None], "scale": -3.0}
        yield Case(f"{n} equal", "attention_weights", arguments, np.full((1, n), F(1) / F(n)))
    # 1 / (1 + exp(-d)) is next to 1, and exp(-d) next to 0
    for d in (17.0, 1000.0, 2.0**100):
        near = F(1 / (1 + math.exp(-d)))
        row = np.asarray([0, -d, -np.inf], F)
        yield Case(f"gap {d}", "softmax", {"x": row}, np.asarray([near, F(math.exp(-d) * float(near)), 0], F))


def attentions():
    """attention: means of values that are midpoints, exactly or but for weights of other keys."""
    one, two = np.ones((1, 1), F), np.ones((2, 1), F)
    for low, high in ((1.0, 1 + 2.0**-23), (1 + 2.0**-23, 1 + 2.0**-22), (-LARGEST, -LARGEST + 2.0**104)):
        even = low if F(low).view(np.int32) % 2 == 0 else high
        v = np.asarray([[low], [high]], F)
        for name, q, scale in (("query 0", 0 * one, None), ("scale 0", one, 0.0), ("equal keys", 5 * one, 0.3)):
            yield Case(
                f"{name} {low}", "attention", {"q": q, "k": two, "v": v, "scale": scale}, np.asarray([[even]], F)
            )
        other = {"q": one, "k": np.asarray([[1], [2]], F), "v": v, "scale": 0.0}
        yield Case(f"scale 0 of other keys {low}", "attention", other, np.asarray([[even]], F))
        # two keys with scores 0 and s: the weights are 1/2 -+ s/4, so the result is the midpoint + s (high - low) / 4
        for a, b, scale in ((2.0**-40, 2.0**-40, 1.0), (SMALLEST, SMALLEST, 1.0), (SMALLEST, SMALLEST, 1e-300)):
            for sign in (1, -1):
                k = np.asarray([[0], [sign * b]], F)
                expected = np.asarray([[high if sign > 0 else low]], F)
                arguments = {"q": a * one, "k": k, "v": v, "scale": scale}
                yield Case(f"score {sign * a * b * scale} {low}", "attention", arguments, expected)
        # a third key, with a weight of exp(-gap)
        for gap in (40.0, 200.0, 1e4, 1e30):
            for value in (high + abs(high), low - abs(low)) if abs(low) < 2 else (0.0,):
                k, v3 = np.asarray([[0], [0], [-gap]], F), np.asarray([[low], [high], [value]], F)
                expected = np.asarray([[high if value > low else low]], F)
                arguments = {"q": one, "k": k, "v": v3, "scale": 1.0}
                yield Case(f"gap {gap} {value}", "attention", arguments, expected)
        # two more keys, of which the first decides
        k4, v4 = np.asarray([[0], [0], [-1e30], [-2e30]], F), np.asarray([[low], [high], [high], [0]], F)
        for sign in (1, -1):
            arguments = {"q": one, "k": sign * k4, "v": v4, "scale": float(sign)}
            yield Case(f"two gaps {low} {sign}", "attention", arguments, np.asarray([[high]], F))
        # groups of keys with different scores: both groups have the midpoint as their mean
        v4, k4 = np.asarray([[low], [high], [high], [low]], F), np.asarray([[0], [0], [-3], [-3]], F)
        arguments = {"q": one, "k": k4, "v": v4, "scale": 1.0}
        yield Case(f"groups {low}", "attention", arguments, np.asarray([[even]], F))
        k4 = np.asarray([[0], [-3], [0], [-3]], F)  # the larger weights are those of low and high, again
        yield Case(
            f"other groups {low}", "attention", arguments | {"k": k4, "v": v4[[0, 2, 1, 3]]}, np.asarray([[even]], F)
        )
    # large values cancel but for exp(2^-252) - 1, which is less than the value -2^-126: the mean is below 1 + 2^-24
    k, v = (
        np.asarray([[SMALLEST], [0], [0], [0], [0]], F),
        np.asarray([2.0**100, -(2.0**100), 5, 5 * 2.0**-24, -SMALLEST], F),
    )
    for sign in (1, -1):
        arguments = {"q": SMALLEST * one, "k": k, "v": sign * v[:, None], "scale": 1.0}
        yield Case(f"second group {sign}", "attention", arguments, np.asarray([[sign]], F))
    # values that cancel, and leave a value that is below all numbers, or above the threshold of 0
    for gap, expected in ((1e30, 0.0), (1000.0, 0.0)):
        v, k = np.asarray([[LARGEST], [-LARGEST], [1]], F), np.asarray([[0], [0], [-gap]], F)
        arguments = {"q": one, "k": k, "v": v, "scale": 1.0}
        yield Case(f"cancellation {gap}", "attention", arguments, np.asarray([[expected]], F))
    # the thresholds of 0 and of overflow
    v = np.asarray([[2 * SMALLEST - 2.0**-149], [0]], F)
    for sign in (1, -1):
        for s, expected in ((0.0, SMALLEST), (-SMALLEST, SMALLEST), (SMALLEST, 0.0)):
            k = np.asarray([[0], [s]], F)
            arguments = {"q": SMALLEST * one, "k": k, "v": sign * v, "scale": 1.0}
            yield Case(f"threshold {s} {sign}", "attention", arguments, np.asarray([[sign * expected]], F) + F(0))
    yield Case(
        "largest", "attention", {"q": one, "k": two, "v": np.full((2, 1), LARGEST, F)}, np.asarray([[LARGEST]], F)
    )
    # hidden keys change nothing: the visible ones are a tie
    k, v = np.asarray([[1], [1], [np.nan], [np.inf]], F), np.asarray([[1], [1 + 2.0**-23], [np.nan], [np.inf]], F)
    mask = np.asarray([[True, True, False, False]])
    yield Case("hidden", "attention", {"q": one, "k": k, "v": v, "mask": mask}, np.asarray([[1]], F))


def losses():
    """cross_entropy: differences d of two logits that are midpoints; the loss d + log(1 + exp(-d)) is above them."""
    for d, half in ((64.0, 2.0**-18), (128.0, 2.0**-17), (2.0**20, 2.0**-4), (2.0**100, 2.0**76)):
        for low in (d, d + 2 * half):
            logits, high = np.asarray([[low, -half]], F), low + 2 * half
            yield Case(f"{low}", "cross_entropy", {"logits": logits, "targets": np.asarray([1])}, np.asarray(high, F))
            two = {"logits": np.repeat(logits, 3, axis=0), "targets": np.asarray([1, 1, 1])}
            yield Case(f"three rows {low}", "cross_entropy", two, np.asarray(high, F))
    # the mean of 128 and 128 + 2^-16 is a midpoint; more than exp(-128) is subtracted, or added
    for sign in (-1, 1):
        logits = np.asarray([[sign * SMALLEST, -128], [sign * SMALLEST, -128 - 2.0**-16]], F)
        expected = np.asarray(128 if sign < 0 else 128 + 2.0**-16, F)
        yield Case(f"next to 128, {sign}", "cross_entropy", {"logits": logits, "targets": np.asarray([1, 1])}, expected)
    logits = np.asarray([[5, -np.inf], [-np.inf, 2.0**100]], F)
    yield Case("certain", "cross_entropy", {"logits": logits, "targets": np.asarray([0, 1])}, np.asarray(0, F))
    logits = np.asarray([[5, -200], [LARGEST, 0]], F)
    yield Case("nearly certain", "cross_entropy", {"logits": logits, "targets": np.asarray([0, 0])}, np.asarray(0, F))
    logits = np.asarray([[LARGEST, -LARGEST]], F)
    yield Case("overflow", "cross_entropy", {"logits": logits, "targets": np.asarray([1])}, np.asarray(np.inf, F))
    logits = np.asarray([[LARGEST, -LARGEST], [0, -50]], F)
    yield Case("mean", "cross_entropy", {"logits": logits, "targets": np.asarray([1, 0])}, np.asarray(LARGEST, F))


def cases():
    """Yield all cases whose results are known."""
    yield from itertools.chain(linear(), scores(), layer_norms(), gelus(), softmaxes(), attentions(), losses())
