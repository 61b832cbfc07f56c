"""A comparison as one HTML page that needs no network and no script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from ..pages.document import Page, document
from ..pages.document import facts as _list
from ..pages.document import section as _section
from ..pages.document import text as _text
from . import curves
from .findings import Comparison, Growth, OpFinding, WeightFinding
from .report import (
    Decode,
    facts,
    grouped,
    known_number,
    logits_facts,
    number,
    ratio_number,
    ratio_text,
    split,
    stream,
)
from .weights import merged

_LIMITS = (0.01, 0.1, 0.5, 1.0, 10.0, 1000.0)
"""The limits between the colours of the heat map, which are the classes r0 to r6 in the style sheet."""

_WORST = 12  # rows of the table of the worst results


def page(comparison: Comparison, *, decode: Decode | None = None) -> Page:
    """Return a comparison as an HTML page: the verdict, curves of the difference, a heat map of the ops, and tables.

    The page is one file. It loads nothing, runs no script, follows the reader's choice of light or dark colours, and
    fits on the screen of a phone.

    Parameters
    ----------
    comparison : Comparison
        The findings.
    decode : function, optional
        Returns the text of token ids, as `Tokenizer.decode` does. Without it, tokens are shown by their ids.

    Returns
    -------
    Page
        The page, a str. A notebook shows it; its method ``save`` writes it to a file.

    Examples
    --------
    >>> html = page(Comparison("a", "b", [7, 8], "a < b & c", True, [], [], [], None, []))
    >>> "a &lt; b &amp; c" in html
    True
    """
    verdict = "good" if comparison.equal else "bad"
    sides = [("reference", comparison.a), ("judged", comparison.b), ("tokens", f"{len(comparison.tokens):,}")]
    sections = [
        _culprit(comparison.culprit),
        _growth(comparison.growth, comparison.culprit),
        _heat_map(comparison.ops, comparison.culprit),
        _worst(comparison.ops),
        _logits(comparison, decode),
        _weights(comparison),
        _missing(comparison.missing),
    ]
    introduction = [
        f'<p class="verdict {verdict}">{_text(comparison.verdict)}</p>',
        _list(sides),
        *(f"<p>{_text(note)}</p>" for note in comparison.notes),
    ]
    return document(
        "portable_gpt2.comparison",
        "page",
        title=f"{comparison.b} compared with {comparison.a}",
        heading="Comparison of two models",
        introduction="\n".join(introduction),
        sections=sections,
    )


# Elements


def _scrolling(label: str, content: str) -> str:
    """Return an element that scrolls by itself if it is wider than the screen, also with the keyboard."""
    return f'<div class="scroll" role="region" aria-label="{_text(label)}" tabindex="0">\n{content}\n</div>'


def _table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Return a table. The first column has the names of the rows, and `numbers` are the columns of numbers."""

    def cell(i: int, text: str) -> str:
        kind = ' class="number"' if i in numbers else ""
        return f'<th scope="row"><code>{_text(text)}</code></th>' if i == 0 else f"<td{kind}>{_text(text)}</td>"

    head = "".join(f'<th scope="col">{_text(each)}</th>' for each in headings)
    body = ["".join(cell(i, text) for i, text in enumerate(row)) for row in rows]
    lines = [
        '<table class="list">',
        f"<caption>{_text(caption)}</caption>",
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    return _scrolling(caption, "\n".join([*lines, *(f"<tr>{row}</tr>" for row in body), "</tbody>", "</table>"]))


def _details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{_text(summary)}</summary>\n{content}\n</details>"


# The sections


def _culprit(op: OpFinding | None) -> str:
    if op is None:
        return ""
    return _section(f"First result beyond its bound: {op.name}", f'<div class="card">{_list(facts(op))}</div>')


def _growth(growth: Sequence[Growth], culprit: OpFinding | None) -> str:
    if not growth:
        return ""
    headings = ("result", "largest difference", "what rounding can be expected to cause")
    rows = [(each.name, number(each.difference), known_number(each.rounding)) for each in growth]
    caption = f"All {len(growth):,} results, in the order of computation"
    table = _details(caption, _table(caption, headings, rows, numbers=(1, 2)))
    if not (drawing := curves.draw(stream(growth), culprit)):
        return _section(
            "How the difference grows", "<p>The two sides are equal, or their differences are not finite.</p>", table
        )
    lines = (("difference", headings[1]), ("rounding dashed", headings[2]))
    key = (
        f'<li><svg viewBox="0 0 48 12" aria-hidden="true"><path class="curve {kind}" d="M0 6H48"/></svg>{label}</li>'
        for kind, label in lines
    )
    text = (
        "The largest absolute difference of the two sides after each layer, on a logarithmic scale. Where both sides "
        "are equal, the point is hollow and at 0."
    )
    figure = ["<figure>", '<ul class="key">', *key, "</ul>", drawing, f"<figcaption>{text}</figcaption>", "</figure>"]
    return _section("How the difference grows", "\n".join(figure), table)


def _heat_map(ops: Sequence[OpFinding], culprit: OpFinding | None) -> str:
    """Return a table of error / bound with a row per layer and a column per op."""
    found = {split(op.name): op for op in ops}
    layers = sorted({layer for layer, _ in found if layer is not None})
    names = list(dict.fromkeys(name for layer, name in found if layer is not None))
    if not found:
        return ""

    def cell(op: OpFinding | None, name: str, span: str = "") -> str:
        if op is None:
            return f'<td class="none" title="{_text(name)}: not judged"><span>not judged</span></td>'
        kind = f"r{_step(op.ratio)}{' first' if op is culprit else ''}"
        title = _text(f"{op.name} ({op.op}): error / bound {ratio_number(op.ratio)}")
        return f'<td class="{kind}"{span} title="{title}"><span>{ratio_text(op.ratio)}</span></td>'

    def around(name: str) -> str:
        span = f' colspan="{max(len(names), 1)}"'
        return f'<tr><th scope="row">{_text(name)}</th>{cell(found[None, name], name, span)}</tr>'

    outside = [name for layer, name in found if layer is None]
    before = [name for name in outside if name == "embedding"]
    rows = [around(name) for name in before]
    for layer in layers:
        cells = (cell(found.get((layer, name)), f"h{layer}/{name}") for name in names)
        rows.append(f'<tr><th scope="row"><span class="word">layer </span>{layer}</th>{"".join(cells)}</tr>')
    rows += [around(name) for name in outside if name not in before]
    caption = "Largest error / bound of each op (column) in each layer (row)"
    lines = ['<table class="heat">', f"<caption>{caption}</caption>", _heads(names), "<tbody>", *rows, "</tbody>"]
    table = _scrolling(caption, "\n".join([*lines, "</table>"]))
    why = (
        "Each op of the judged model was computed again in higher precision from the inputs that it had. A ratio above "
        "1 means that rounding cannot explain its error: it is not the op that GPT-2 defines."
    )
    return _section("Error of each op, relative to its bound", f"<p>{why}</p>", _legend(), table)


def _step(ratio: float) -> int:
    """Return the number of the colour of a ratio: 0 to 3 within the bound, 4 to 6 beyond it."""
    return len(_LIMITS) if math.isnan(ratio) else sum(ratio > limit for limit in _LIMITS)


def _legend() -> str:
    limits = [f"{limit:g}" for limit in _LIMITS]
    texts = [
        f"up to {limits[0]}",
        *(f"{a} to {b}" for a, b in itertools.pairwise(limits)),
        f"above {limits[-1]}, or NaN",
    ]
    within = _LIMITS.index(1.0)
    entries = []
    for i, text in enumerate(texts):
        end = ", beyond the bound" if i > within else ""
        entries.append(f'<li><span class="swatch r{i}"></span>{text}{end}</li>')
    return "\n".join(['<ul class="key">', *entries, "</ul>"])


def _heads(names: Sequence[str]) -> str:
    """Return the headings of the heat map: a row with the parts of a layer, such as attn, and a row with the ops."""
    parts = [name.rpartition("/")[0] for name in names]
    runs = [(part, len(list(group))) for part, group in itertools.groupby(parts)]
    top = "".join(
        f'<th scope="colgroup" colspan="{n}">{_text(part)}</th>' if part else f'<td colspan="{n}"></td>'
        for part, n in runs
    )
    ops = "".join(f'<th scope="col">{_text(op)}</th>' for _, _, op in (name.rpartition("/") for name in names))
    return f"<thead>\n<tr><td></td>{top}</tr>\n<tr><td></td>{ops}</tr>\n</thead>"


def _worst(ops: Sequence[OpFinding]) -> str:
    if not ops:
        return ""
    worst = sorted(ops, key=lambda op: -math.inf if math.isnan(op.ratio) else -op.ratio)[:_WORST]
    parts = [_op_table("The largest ratios of error to bound", worst)]
    if len(ops) > len(worst):
        caption = f"All {len(ops):,} results, in the order of computation"
        parts.append(_details(caption, _op_table(caption, ops)))
    return _section("Worst results", *parts)


def _op_table(caption: str, ops: Sequence[OpFinding]) -> str:
    labels = ["error / bound", "computed", "exact", "error", "permitted", "element", "op"]
    if any(op.guess for op in ops):
        labels.insert(1, "guess")
    if any(op.judged < op.elements for op in ops):
        labels.append("judged")
    rows = []
    for op in ops:
        found = {"judged": "all elements", **dict(facts(op)), "guess": op.guess}
        rows.append([op.name, *(found[label] for label in labels)])
    numbers = [i for i, label in enumerate(labels, 1) if label != "guess"]
    return _table(caption, ["result", *labels], rows, numbers)


def _weights(comparison: Comparison) -> str:
    weights = comparison.weights
    if weights is None:
        return _section("Weights", "<p>Not compared, because the weights are known of at most one side.</p>")
    if not weights:
        return _section("Weights", "<p>No tensor differs.</p>")
    kinds = merged(weights)
    parts = [_weight_table(f"Tensors that differ: {len(weights):,}", kinds)]
    if len(kinds) < len(weights):
        caption = f"All {len(weights):,} tensors"
        parts.append(_details(caption, _weight_table(caption, weights)))
    return _section("Weights", *parts)


def _weight_table(caption: str, weights: Sequence[WeightFinding]) -> str:
    rows = [(each.path, known_number(each.largest), each.kind) for each in weights]
    return _table(caption, ("tensor", "largest difference of two elements", "difference"), rows, numbers=(1,))


def _logits(comparison: Comparison, decode: Decode | None) -> str:
    if comparison.logits is None:
        return ""
    return _section("Logits", _list(logits_facts(comparison.logits, comparison.tokens, decode)))


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    why = f"{len(names):,} results could not be judged, because they, an input, a weight or a bound are not known."
    lines = [f"<li>{_text(line)}</li>" for line in grouped(names)]
    return _section("Not judged", f"<p>{why}</p>", "\n".join(["<ul>", *lines, "</ul>"]))
