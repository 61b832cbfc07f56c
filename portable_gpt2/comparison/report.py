"""A comparison as text for a terminal, and the forms of names and numbers that the text and the page share."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from ..checks import plain
from .findings import Comparison, Growth, LogitsFinding, OpFinding, WeightFinding
from .weights import merged

_LAYER = re.compile(r"h(\d+)/(.+)")
_ROWS = 10  # the largest number of rows of a list
_CELL = 5  # characters of a ratio and the space before it
_BOLD, _RED, _GREEN = "1", "31", "32"

Decode = Callable[[Sequence[int]], str]


def report(comparison: Comparison, *, width: int = 80, colour: bool = False, decode: Decode | None = None) -> str:
    """Return a comparison as text: the verdict, the reasons for it, and tables with all layers.

    Parameters
    ----------
    comparison : Comparison
        The findings.
    width : int
        The largest number of characters of a line, at least 60.
    colour : bool
        Whether to colour the verdict and the results beyond their bounds, with the escape codes of a terminal.
    decode : function, optional
        Returns the text of token ids, as `Tokenizer.decode` does. Without it, tokens are shown by their ids.

    Returns
    -------
    str
        Lines without a line break after the last one. A long model is shown by its worst layers.

    Examples
    --------
    >>> from portable_gpt2.comparison.findings import Comparison, LogitsFinding
    >>> logits = LogitsFinding(1e-6, 2e-12, None)
    >>> print(report(Comparison("a", "b", [7, 8], "Rounding explains it.", True, [], [], [], logits, [])))
    Rounding explains it.
    <BLANKLINE>
      reference  a
      judged     b
      tokens     2
    <BLANKLINE>
    Weights: no difference.
    <BLANKLINE>
    Logits
      largest difference      1e-06
      largest KL divergence   2e-12 nats
      most likely next token  the same at every position
    """
    paint = _painter(colour)
    verdict = textwrap.fill(plain(comparison.verdict), width)
    parts = [paint(verdict, _BOLD, _GREEN if comparison.equal else _RED)]
    sides = [("reference", comparison.a), ("judged", comparison.b), ("tokens", f"{len(comparison.tokens):,}")]
    parts.append("\n".join(_fields(sides, width)))
    parts += [textwrap.fill(plain(note), width) for note in comparison.notes]
    parts.append("\n".join(_weights(comparison.weights, width)))
    if comparison.culprit is not None:
        title = f"First result beyond its bound: {plain(comparison.culprit.name)}"
        parts.append("\n".join([paint(title, _BOLD), *_fields(facts(comparison.culprit), width)]))
    if len(beyond := [op for op in comparison.ops if not op.within]) > 1:
        parts.append("\n".join(_beyond(beyond, width)))
    if comparison.ops:
        parts.append("\n".join(_ratios(comparison.ops, width, paint)))
    if comparison.growth:
        parts.append("\n".join(_growth(comparison.growth, width, paint)))
    if comparison.logits is not None:
        found = logits_facts(comparison.logits, comparison.tokens, decode)
        parts.append("\n".join(["Logits", *_fields(found, width)]))
    if comparison.missing:
        title = f"Results that could not be judged: {len(comparison.missing):,}"
        lines = [line for each in grouped(comparison.missing) for line in _indented(each, width)]
        parts.append("\n".join([*textwrap.wrap(title, width), *lines]))
    return "\n\n".join(parts)


# Names


def split(name: str) -> tuple[int | None, str]:
    """Return the layer of a result, or None outside of the layers, and its name in the layer.

    Examples
    --------
    >>> split("h3/attn/q"), split("ln_f")
    ((3, 'attn/q'), (None, 'ln_f'))
    """
    found = _LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (None, name)


def stream(growth: Sequence[Growth]) -> list[Growth]:
    """Return the results that show the growth layer by layer: embedding, the output of each layer, and logits.

    If a trace has none of them, all results are returned.
    """
    shown = [each for each in growth if split(each.name)[1] in ("embedding", "residual", "logits")]
    return shown or list(growth)


def grouped(names: Iterable[str]) -> list[str]:
    """Return names as few lines: layers that lack the same results share one.

    Examples
    --------
    >>> grouped(["embedding", "h0/attn/q", "h0/ln_2", "h1/attn/q", "h1/ln_2", "h3/ln_2"])
    ['embedding', 'layers 0 to 1: attn/q, ln_2', 'layer 3: ln_2']
    """
    of_layer: dict[int | None, list[str]] = {}
    for layer, rest in map(split, names):
        of_layer.setdefault(layer, []).append(rest)
    lines = [plain(", ".join(of_layer.pop(None)))] if None in of_layer else []
    runs: list[tuple[int, int, list[str]]] = []
    for layer in sorted(each for each in of_layer if each is not None):
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == of_layer[layer]:
            runs[-1] = (runs[-1][0], layer, of_layer[layer])
        else:
            runs.append((layer, layer, of_layer[layer]))
    for first, last, rests in runs:
        which = f"layer {first}" if first == last else f"layers {first} to {last}"
        lines.append(f"{which}: {plain(', '.join(rests))}")
    return lines


# Texts and numbers


def number(x: float) -> str:
    """Return a number with three significant digits."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "infinity" if x > 0 else "-infinity"
    return f"{x:.3g}"


def known_number(x: float) -> str:
    """Return a number with three significant digits, and a dash for NaN, which stands for a number that is not known.

    Examples
    --------
    >>> known_number(0.12345), known_number(float("nan"))
    ('0.123', '-')
    """
    return "-" if math.isnan(x) else number(x)


def ratio_number(ratio: float) -> str:
    """Return a ratio with three significant digits. A ratio above 1 is never rounded to 1."""
    return number(max(ratio, 1.01) if ratio > 1 else ratio)


def ratio_text(ratio: float) -> str:
    """Return a ratio in at most four characters. A ratio above 1 is never rounded to 1.

    Examples
    --------
    >>> [ratio_text(ratio) for ratio in (0.0, 0.126, 1.0, 1.0001, 12.34, 123456.0, float("nan"))]
    ['0.00', '0.13', '1.00', '1.01', '12.3', '1e5', 'NaN']
    """
    if not math.isfinite(ratio):
        return "NaN" if math.isnan(ratio) else "inf"
    if ratio > 1:
        ratio = max(ratio, 1.01)
    for limit, digits in ((9.995, 2), (99.95, 1), (9999.5, 0)):
        if ratio < limit:
            return f"{ratio:.{digits}f}"
    mantissa, _, exponent = f"{ratio:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent) < 100 else ">e99"


def facts(op: OpFinding) -> list[tuple[str, str]]:
    """Return the judgement on a result as pairs of a label and a text."""
    computed, exact = _told_apart(op.computed, op.exact)
    found = [
        ("op", plain(op.op)),
        ("element", f"[{', '.join(map(str, op.element))}]"),
        ("computed", computed),
        ("exact", exact),
        ("error", number(abs(op.computed - op.exact))),
        ("permitted", number(op.permitted)),
        ("error / bound", ratio_number(op.ratio)),
    ]
    if op.judged < op.elements:
        found.append(("judged", f"{op.judged:,} of {op.elements:,} elements"))
    guess = plain(op.guess) if op.guess else "no definition of the list explains this result"
    return [*found, ("guess", guess)]


def logits_facts(logits: LogitsFinding, tokens: Sequence[int], decode: Decode | None) -> list[tuple[str, str]]:
    """Return how the logits differ as pairs of a label and a text."""
    found = [
        ("largest difference", number(logits.largest)),
        ("largest KL divergence", f"{number(logits.divergence)} nats"),
    ]
    if logits.common is not None:
        found.insert(0, ("compared", f"the {logits.common:,} token ids that both sides have"))
        where = f"is the most likely next token at {logits.outside} of {len(tokens)} positions"
        found.append(("id of one side only", where))
    if logits.first is None:
        return [*found, ("most likely next token", "the same at every position")]
    where = f"differs first at position {logits.first} of {len(tokens)}, counted from 0"
    found.append(("most likely next token", where))
    if decode is not None:
        before = decode(list(tokens[: logits.first + 1]))
        found.append(("after the text", repr(before if len(before) <= 40 else f"...{before[-40:]}")))
    if logits.greedy is not None:
        a, b = (f"{each}" if decode is None else f"{decode([each])!r} ({each})" for each in logits.greedy)
        found += [("token of the reference", plain(a)), ("token of the judged", plain(b))]
    return found


def _told_apart(computed: float, exact: float) -> tuple[str, str]:
    """Return two numbers with as many digits as tell them apart: from 9, as for float32, to 17."""
    for digits in (9, 12, 17):
        texts = tuple(f"{x:.{digits}g}" if math.isfinite(x) else number(x) for x in (computed, exact))
        if texts[0] != texts[1] or computed == exact:
            break
    return texts[0], texts[1]


# Parts of the report


def _painter(colour: bool) -> Callable[..., str]:
    def paint(text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if colour and codes else text

    return paint


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")


def _fields(pairs: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Return pairs of a label and a text in two columns."""
    first = max(len(label) for label, _ in pairs) + 2
    lines = []
    for label, text in pairs:
        wrapped = textwrap.wrap(plain(text), width - 2 - first, break_on_hyphens=False) or [""]
        lines += [f"  {'' if i else label:<{first}}{line}" for i, line in enumerate(wrapped)]
    return lines


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines of a table: a column of names, columns of numbers, and a last column that is wrapped."""
    columns = list(zip(headings, *rows, strict=True))
    *sizes, _ = (max(map(len, column)) for column in columns)
    room = max(width - 2 - sum(sizes) - 2 * len(sizes), 12)
    lines = []
    for row in [headings, *rows]:
        *cells, last = row
        texts = [
            f"{cell:<{size}}" if i == 0 else f"{cell:>{size}}"
            for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ]
        wrapped = textwrap.wrap(last, room, break_on_hyphens=False) or [""]
        lines += [f"  {'  '.join([*texts, wrapped[0]])}".rstrip()]
        lines += [" " * (2 + sum(sizes) + 2 * len(sizes)) + line for line in wrapped[1:]]
    return lines


def _weights(weights: list[WeightFinding] | None, width: int) -> list[str]:
    if weights is None:
        return ["Weights: not compared, because they are known of at most one side."]
    if not weights:
        return ["Weights: no difference."]
    kinds, n = merged(weights), len(weights)
    rows = [(plain(each.path), known_number(each.largest), plain(each.kind)) for each in kinds[:_ROWS]]
    title = f"Weights: {n:,} tensor{'s differ' if n > 1 else ' differs'}{_of(len(rows), len(kinds))}"
    return [title, *_table(("tensor", "largest", "difference"), rows, width)]


def _of(shown: int, n: int) -> str:
    return f" (the first {shown} are listed)" if shown < n else ""


def _beyond(ops: list[OpFinding], width: int) -> list[str]:
    shown = ops[:_ROWS]
    rows = [(plain(op.name), ratio_number(op.ratio), plain(op.guess)) for op in shown]
    title = f"Results beyond their bounds: {len(ops):,}{_of(len(shown), len(ops))}"
    return [title, *_table(("result", "error / bound", "guess"), rows, width)]


def _ratios(ops: list[OpFinding], width: int, paint: Callable[..., str]) -> list[str]:
    """Return a table with a row per op and a column per layer. If there are too many layers, the worst are shown."""
    found = {split(op.name): op for op in ops}
    layers = sorted({layer for layer, _ in found if layer is not None})
    names = list(dict.fromkeys(name for layer, name in found if layer is not None))
    first = max(map(len, names), default=0) + 2
    shown = _worst_layers(ops, (width - first) // _CELL)
    lines = ["Error / bound of each op in each layer. Above 1, the op is not the one that GPT-2 defines."]
    if len(shown) < len(layers):
        lines.append(f"These are the {len(shown)} of {len(layers)} layers with the largest ratios.")
    lines = [line for text in lines for line in textwrap.wrap(text, width)]

    def cell(layer: int | None, name: str) -> str:
        op = found.get((layer, name))
        text = f"{'-' if op is None else ratio_text(op.ratio):>{_CELL}}"
        return text if op is None or op.within else paint(text, _BOLD, _RED)

    if layers:
        lines.append(f"  {'layer':<{first - 2}}{''.join(f'{layer:>{_CELL}}' for layer in shown)}")
        lines += [f"  {plain(name):<{first - 2}}{''.join(cell(layer, name) for layer in shown)}" for name in names]
    around = [f"{plain(name)}{cell(None, name)}" for layer, name in found if layer is None]
    return [*lines, *([f"  {', '.join(around)}"] if around else [])]


def _worst_layers(ops: Sequence[OpFinding], n: int) -> list[int]:
    """Return at most n layers in order: those with the largest ratios, and the first with a result beyond its bound."""
    worst: dict[int, float] = {}
    first = None
    for op in ops:
        if (layer := split(op.name)[0]) is not None:
            worst[layer] = max(worst.get(layer, 0.0), math.inf if math.isnan(op.ratio) else op.ratio)
            first = layer if first is None and not op.within else first
    chosen = sorted(worst, key=lambda layer: (layer != first, -worst[layer], layer))[: max(n, 1)]
    return sorted(chosen)


def _growth(growth: Sequence[Growth], width: int, paint: Callable[..., str]) -> list[str]:
    points = stream(growth)
    shown = _spread(points, 16)
    rows = []
    for each in shown:
        ratio = each.difference / each.rounding if each.rounding else math.inf if each.difference else 0.0
        shown_ratio = "-" if math.isnan(each.rounding) else ratio_text(ratio)
        rows.append((plain(each.name), number(each.difference), known_number(each.rounding), shown_ratio))
    title = "Largest difference of the two sides, and the largest that rounding can be expected to cause"
    more = [f"{len(shown)} of {len(points)} results are listed."] if len(shown) < len(points) else []
    lines = [line for text in (title, *more) for line in textwrap.wrap(text, width)]
    return [*lines, *_table(("result", "difference", "rounding", "ratio"), rows, width)]


def _spread(points: Sequence[Growth], n: int) -> list[Growth]:
    """Return at most n points at equal distances, the first and the last among them."""
    if len(points) <= n:
        return list(points)
    return [points[round(i * (len(points) - 1) / (n - 1))] for i in range(n)]
