"""The growth of the difference over the layers, as a picture in SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..pages.document import text as as_html
from .findings import Growth, OpFinding
from .report import number, split

_WIDTH, _HEIGHT = 760, 420  # the browser scales the picture
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 16, 44, 76  # the margins around the plot
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RADIUS = 3.5


def draw(points: Sequence[Growth], culprit: OpFinding | None = None) -> str:
    """Return the curves of the difference and of what rounding can be expected to cause, as an element ``svg``.

    The vertical axis is logarithmic. A difference of 0 is a hollow point at the lower end of the axis, and a number
    that is NaN or infinite is a gap. Colours and line widths come from the classes in the style sheet of the page.

    Parameters
    ----------
    points : sequence of Growth
        The results, in the order of computation.
    culprit : OpFinding, optional
        The first result beyond its bound. A vertical line marks its layer.

    Returns
    -------
    str
        Empty if no number is positive and finite, so that there is nothing to draw.

    Examples
    --------
    >>> svg = draw([Growth("embedding", 0.0, 1e-8), Growth("h0/residual", 1e-6, 1e-6)])
    >>> svg.startswith("<svg"), "10⁻⁸" in svg
    (True, True)
    """
    values = [value for point in points for value in (point.difference, point.rounding)]
    positive = [math.log10(value) for value in values if 0 < value < math.inf]
    if not positive:
        return ""
    has_zero = 0 in values
    low = math.floor(min(positive)) - has_zero
    high = max(math.ceil(max(positive)), low + 1)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    step = (right - _LEFT - 24) / max(len(points) - 1, 1)

    def x_of(i: int) -> float:
        return _LEFT + 12 + i * step

    def y_of(value: float) -> float:
        if not 0 <= value < math.inf:
            return math.nan
        share = (math.log10(value) - low) / (high - low) if value else 0.0
        return bottom - share * (bottom - _TOP)

    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="plot-title plot-text">',
        '<title id="plot-title">Growth of the difference over the layers</title>',
        f'<desc id="plot-text">{as_html(_description(points))}</desc>',
        '<text x="4" y="24">largest difference (no unit)</text>',
    ]
    every = -(-(high - low) // 6)
    for exponent in range(low, high + 1, every):
        y = bottom - (exponent - low) / (high - low) * (bottom - _TOP)
        label = "0" if has_zero and exponent == low else f"10{str(exponent).translate(_SUPERSCRIPT)}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts += _labels(points, x_of)
    parts += _mark(points, culprit, x_of)
    for kind in ("rounding", "difference"):
        heights = [y_of(getattr(point, kind)) for point in points]
        parts += _curve(kind, points, [x_of(i) for i in range(len(points))], heights)
    return "\n".join([*parts, "</svg>"])


def _description(points: Sequence[Growth]) -> str:
    """Return the picture in words, for those who do not see it."""
    first, last = points[0], points[-1]
    return (
        f"The largest difference is {number(first.difference)} at {first.name} and {number(last.difference)} at "
        f"{last.name}. Rounding can be expected to cause {number(first.rounding)} and {number(last.rounding)}. A table "
        f"after the picture has all numbers."
    )


def _labels(points: Sequence[Growth], x_of: Callable[[int], float]) -> list[str]:
    """Return the labels of the horizontal axis: the numbers of the layers, and the other names in a second line."""
    y, parts = _HEIGHT - _BOTTOM, []
    first_of = {layer: i for i, point in reversed([*enumerate(points)]) if (layer := split(point.name)[0]) is not None}
    every = -(-len(first_of) // 14)
    for n, layer in enumerate(sorted(first_of)):
        if n % every == 0:
            # A narrow screen, on which letters are larger, shows every second number.
            minor = ' class="minor"' if len(first_of) > 7 and n // every % 2 else ""
            parts.append(
                f'<text{minor} x="{x_of(first_of[layer]):.1f}" y="{y + 26}" text-anchor="middle">{layer}</text>'
            )
    if first_of:
        parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{y + 58}" text-anchor="middle">layer</text>')
    for i, anchor in ((0, "start"), (len(points) - 1, "end")):
        if split(points[i].name)[0] is None and (i or anchor == "start"):
            x = x_of(i) + (-12 if anchor == "start" else 12)
            parts.append(f'<text x="{x:.1f}" y="{y + 58}" text-anchor="{anchor}">{as_html(points[i].name)}</text>')
    return parts


def _mark(points: Sequence[Growth], culprit: OpFinding | None, x_of: Callable[[int], float]) -> list[str]:
    """Return a vertical line at the first result that is computed from the culprit."""
    if culprit is None:
        return []
    layer, name = split(culprit.name)
    of_layer = [i for i, point in enumerate(points) if layer is not None and split(point.name)[0] == layer]
    at = of_layer or [i for i, point in enumerate(points) if point.name == name]
    if not at:
        return []
    x, bottom = x_of(at[0]), _HEIGHT - _BOTTOM
    anchor, shift = ("start", 6) if x < _WIDTH / 2 else ("end", -6)
    place = f'x="{x + shift:.1f}" y="{bottom - 10}" text-anchor="{anchor}"'
    return [
        f'<path class="culprit" d="M{x:.1f} {_TOP}V{bottom}"/>',
        f'<text class="culprit-name" {place}>{as_html(culprit.name)}</text>',
    ]


def _curve(kind: str, points: Sequence[Growth], xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """Return a curve through the residual stream, and a point with its number for each result."""
    parts, path = [], ""
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if math.isnan(y):
            continue
        # The logits are not a part of the residual stream, and have another scale.
        joins = i > 0 and not math.isnan(ys[i - 1]) and points[i].name != "logits"
        path += f"{'L' if joins else 'M'}{x:.1f} {y:.1f}"
        value = getattr(points[i], kind)
        zero = " zero" if value == 0 else ""
        title = as_html(f"{points[i].name}: {kind} {number(value)}")
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}"'
        parts.append(f'<circle class="{kind}{zero}" {place}><title>{title}</title></circle>')
    dashed = " dashed" if kind == "rounding" else ""
    return [f'<path class="curve {kind}{dashed}" d="{path}"/>', *parts] if path else []
