"""The correctly rounded result of an element of each op, a second time: with fractions, and with FLINT's balls.

Each function computes one element, from lists of float32 numbers without NaN, infinities and subnormal numbers. They
share no code with portable_gpt2.correct_rounding.
"""

import math
from fractions import Fraction

import flint
import numpy as np
from flint import arb

FEWEST, MOST = 100, 2**15
"""The number of bits with which `decided` begins, and the largest number that it tries."""
LARGEST = Fraction(2) ** 128 - Fraction(2) ** 104


def rounded(x):
    """Return the float32 number that is nearest to a fraction, with ties to even; subnormal numbers count as 0."""
    if x < 0:
        return -rounded(-x) + np.float32(0)
    if x < Fraction(2) ** -126 - Fraction(2) ** -150:
        return np.float32(0)
    exponent = max(-126, x.numerator.bit_length() - x.denominator.bit_length() - 1)  # at most 1 too small
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    multiple = round(x / unit) * unit  # Python rounds a fraction to the nearest integer, with ties to even
    return np.float32(math.inf if multiple > LARGEST else float(multiple))


def fractions(numbers):
    return [Fraction(float(x)) for x in numbers]


def dot(x, w, b=0.0):
    """conv1d and unembed."""
    return rounded(sum((a * c for a, c in zip(fractions(x), fractions(w), strict=True)), Fraction(float(b))))


def score(q, k, scale):
    return rounded(sum(a * c for a, c in zip(fractions(q), fractions(k), strict=True)) * Fraction(scale))


def layer_norm(x, g, b, i, eps):
    """Bisect the float32 numbers with exact comparisons, of A / sqrt(D) + b with a fraction m."""
    x, g, b, n = fractions(x), Fraction(float(g)), Fraction(float(b)), len(x)
    mean = sum(x) / n
    variance = sum((each - mean) ** 2 for each in x) / n + Fraction(eps)
    a = (x[i] - mean) * g

    def sign(m):
        c = m - b  # compare a / sqrt(variance) with c
        if (a > 0) - (a < 0) != (c > 0) - (c < 0):
            return (a > 0) - (a < 0) - ((c > 0) - (c < 0))
        difference = a * a - c * c * variance
        return ((difference > 0) - (difference < 0)) * (1 if a > 0 else -1)

    # Float32 numbers in order are integers: the bits of positive numbers, and minus the bits of negative ones.
    def number(bits):
        value = Fraction(float(np.int32(abs(bits)).view(np.float32))) if abs(bits) < 0x7F800000 else Fraction(2) ** 128
        return value if bits >= 0 else -value

    low, high = -0x7F800000, 0x7F800000  # the exact result is between them
    if sign(number(high)) > 0 or sign(number(low)) < 0:
        return np.float32(math.inf if sign(number(high)) > 0 else -math.inf)
    while high - low > 1:
        middle = (low + high) // 2
        if sign(number(middle)) >= 0:
            low = middle
        else:
            high = middle
    if sign(number(low)) == 0:
        return rounded(number(low))
    middle = (number(low) + number(high)) / 2
    side = sign(middle)
    return rounded(middle if side == 0 else (middle + (number(high) if side > 0 else number(low))) / 2)


def decided(evaluate):
    """Return the rounded value of a ball, with as many bits as it needs. None if `MOST` bits are not enough."""
    bits, before = FEWEST, flint.ctx.prec
    while bits <= MOST:
        flint.ctx.prec = bits
        try:
            ball = evaluate()
            if ball.is_finite():
                ends = []
                for end in (ball.lower(), ball.upper()):
                    mantissa, exponent = map(int, end.man_exp())
                    tiny = exponent + mantissa.bit_length() < -10_000  # too many digits for a fraction
                    ends.append(Fraction(mantissa > 0) / 2**300 if tiny else mantissa * Fraction(2) ** exponent)
                if rounded(ends[0]) == rounded(ends[1]):
                    return rounded(ends[0])
        finally:
            flint.ctx.prec = before
        bits *= 2
    return None


def exact_arb(x):
    """Return a fraction as a ball: exactly if its denominator is a power of two."""
    return arb(x.numerator) / arb(x.denominator)


def gelu(x):
    def evaluate():
        y = arb(math.sqrt(2 / math.pi)) * (arb(x) + arb(0.044715) * arb(x) ** 3)
        return arb(x) * (1 + y.tanh()) / 2 if x > -5 else arb(x) / (1 + (-2 * y).exp())

    return decided(evaluate)


def softmax(scores, j, scale=1.0):
    """The scores are fractions or floats, and are multiplied by a float."""

    def evaluate():
        s = [exact_arb(Fraction(each) * Fraction(scale)) for each in scores]
        return 1 / sum((each - s[j]).exp() for each in s)

    return decided(evaluate)


def attention(q, k, v, scale):
    """k has the keys that the query sees, and v one value for each. A tie is recognised by equal means of groups."""
    products = [sum(a * c for a, c in zip(fractions(q), fractions(row), strict=True)) for row in k]

    def evaluate():
        s = [exact_arb(each * Fraction(scale)) for each in products]
        best = max(s, key=lambda each: float(each.mid()))
        e = [(each - best).exp() for each in s]
        return sum((w * arb(float(x)) for w, x in zip(e, v, strict=True)), arb(0)) / sum(e)

    found = decided(evaluate)
    if found is None:
        groups = {}
        for product, x in zip(products, fractions(v), strict=True):
            groups.setdefault(product * Fraction(scale), []).append(x)
        means = {sum(group) / len(group) for group in groups.values()}
        found = rounded(means.pop()) if len(means) == 1 else None
    return found


def cross_entropy(logits, targets):
    """logits: a list of rows."""

    def evaluate():
        total = arb(0)
        for row, t in zip(logits, targets, strict=True):
            best = max(row)
            total += (
                sum((arb(float(x)) - arb(float(best))).exp() for x in row).log() + arb(float(best)) - arb(float(row[t]))
            )
        return total / len(targets)

    return decided(evaluate)
