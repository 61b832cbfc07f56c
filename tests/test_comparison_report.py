"""A comparison as text, as JSON and as a page: the findings are all there, fit into their place, and are escaped."""

import json
import math
import re

import pytest
from markup import Page, colours, contrast

import portable_gpt2 as pg
from portable_gpt2 import strict_json
from portable_gpt2.comparison import curves
from portable_gpt2.comparison.findings import Comparison, Growth, LogitsFinding, OpFinding, WeightFinding
from portable_gpt2.comparison.page import page
from portable_gpt2.comparison.report import ratio_number, ratio_text, report
from portable_gpt2.model import observed_names

ESCAPE = re.compile(r"\x1b\[[\d;]*m")


def comparison(n_layer=2, beyond=("h1/ln_1",), missing=(), **changes):
    """A comparison of two models of some layers, with a ratio of its own for each result."""
    names = [name for name in observed_names(pg.GPT2Config(n_layer=n_layer)) if name not in missing]
    ops = []
    for i, name in enumerate(names):
        ratio = 1000.5 + i if name in beyond else i / (2 * len(names))
        op = "layer_norm" if "ln_" in name else "conv1d"
        guess = "eps is 1e-3" if name in beyond else ""
        ops.append(OpFinding(name, op, ratio, (0, i, 3), 1 + ratio * 2**-24, 1.0, 2**-24, guess))
    growth = [Growth(name, 1e-7 * 1.25**i, 2e-6 * 1.25**i) for i, name in enumerate(names)]
    return Comparison(
        **{
            "a": "gpt2 on numpy, cpu, float32",
            "b": "port on torch, cpu, bfloat16",
            "tokens": list(range(11)),
            "verdict": "The models part at h1/ln_1.",
            "equal": not beyond,
            "weights": [WeightFinding("h0/attn/c_attn/w", "transposed", 0.125)],
            "ops": ops,
            "growth": growth,
            "logits": LogitsFinding(0.03125, 2.5e-5, 7, (284, 262)),
            "missing": list(missing),
            **changes,
        }
    )


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


# Text


def test_the_verdict_stands_in_the_first_line():
    """Catches a table in front of the answer."""
    text = report(comparison())
    assert text.splitlines()[0] == "The models part at h1/ln_1."
    assert str(comparison()) == text


def test_the_first_result_beyond_its_bound_is_shown_with_its_worst_element():
    """Catches a culprit that is not the first, and a fact of its element that is left out."""
    found = comparison(beyond=("h0/mlp/gelu", "h1/ln_1"))
    lines = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", report(found), re.MULTILINE))
    op = found.culprit
    assert op.name == "h0/mlp/gelu"
    assert "First result beyond its bound: h0/mlp/gelu" in report(found).splitlines()
    assert lines["element"] == f"[0, {op.element[1]}, 3]"
    assert float(lines["computed"]) == pytest.approx(op.computed, abs=1e-8)
    assert (lines["exact"], lines["permitted"]) == ("1", "5.96e-08")
    assert float(lines["error / bound"]) == pytest.approx(op.ratio, rel=0.01)
    assert float(lines["error"]) == pytest.approx(op.computed - 1, rel=0.01)
    assert lines["guess"] == "eps is 1e-3"
    text = report(found)
    assert "Results beyond their bounds: 2" in text.splitlines()
    assert re.search(
        r"^  h0/mlp/gelu +1\.01e\+03  eps is 1e-3\n  h1/ln_1 +1\.02e\+03  eps is 1e-3$", text, re.MULTILINE
    )


def test_numbers_that_differ_late_are_shown_with_enough_digits():
    """Catches a computed number that looks like the exact one."""
    op = OpFinding("ln_f", "layer_norm", 2.0, (0,), 1 + 1e-14, 1.0, 5e-15)
    assert re.search(r"^  computed +1\.00000000000001$", report(comparison(ops=[op])), re.MULTILINE)


def test_what_was_not_judged_is_said():
    """Catches a note or a number of judged elements that is left out of the text, the JSON or the page."""
    note = "The results above have 30 elements, and 20 were judged."
    op = OpFinding("ln_f", "layer_norm", 2.0, (0,), 2.0, 1.0, 0.5, judged=20, elements=30)
    found = comparison(ops=[op, op._replace(name="logits", judged=30)], notes=[note])
    assert note in report(found).splitlines()
    assert "  judged         20 of 30 elements" in report(found).splitlines()
    assert found.as_json()["notes"] == [note]
    assert [(each["judged"], each["elements"]) for each in found.as_json()["ops"]] == [(20, 30), (30, 30)]
    read = Page(page(found))
    assert note in {each["text"] for each in read.all("p")}
    assert {"20 of 30 elements", "all elements"} <= {each["text"] for each in read.all("td")}
    assert "elements" not in report(comparison())
    assert "all elements" not in page(comparison())


def test_a_part_of_the_logits_is_called_so():
    """Catches logits of padding that win the choice of the next token, and of which the report says nothing."""
    found = comparison(logits=LogitsFinding(0.5, 0.25, 7, (284, 50260), common=50257, outside=3))
    read = Page(page(found))
    pairs = zip(read.all("dt"), read.all("dd"), strict=True)
    lines = [*report(found).splitlines(), *(f"  {a['text']}  {b['text']}" for a, b in pairs)]
    for label, text in {
        "compared": "the 50,257 token ids that both sides have",
        "id of one side only": "is the most likely next token at 3 of 11 positions",
        "token of the judged": "50260",
    }.items():
        assert len([line for line in lines if re.fullmatch(f"  {label}  +{text}", line)]) == 2
    assert "of one side only" not in report(comparison())


def test_each_weight_that_differs_is_listed():
    """Catches a path, a kind or a number that is left out, and a list of 148 lines."""
    text = report(comparison())
    assert re.search(r"^  h0/attn/c_attn/w  +0\.125  transposed$", text, re.MULTILINE)
    many = [WeightFinding(f"h{i}/ln_1/g", f"multiplied by {i % 12 + 2}", 1.0) for i in range(148)]
    text = report(comparison(weights=many))
    assert "Weights: 148 tensors differ (the first 10 are listed)" in text
    assert text.count("multiplied by") == 10
    assert re.search(r"^  h0/ln_1/g and 12 more +1  multiplied by 2$", text, re.MULTILINE)
    names = {e["text"] for e in Page(page(comparison(weights=many))).all("th", scope="row")}
    assert names >= {"h0/ln_1/g and 12 more", *(each.path for each in many)}
    assert "Weights: no difference." in report(comparison(weights=[]))
    assert "Weights: not compared" in report(comparison(weights=None))


@pytest.mark.parametrize("n_layer", [1, 12, 48])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_each_line_fits_and_a_long_model_is_summarised(n_layer, width):
    """Catches a table that wraps in a terminal, and 700 lines of it."""
    names = observed_names(pg.GPT2Config(n_layer=n_layer))
    long = " and ".join(["a verdict, a source or a guess of many words"] * 9)
    found = comparison(n_layer, beyond=names[::3], missing=names[1::3], verdict=long, a="/a/path" * 30, b=long)
    lines = report(found, width=width, decode=decode).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 120


def test_a_long_model_shows_the_layers_that_matter():
    """Catches a summary by the first layers, in which the culprit and the largest ratio are missing."""
    text = report(comparison(48, beyond=("h29/mlp/gelu", "h47/ln_2")))
    [line] = [line for line in text.splitlines() if line.startswith("  layer ")]
    assert {"29", "47"} <= set(line.split())
    assert "of 48 layers with the largest ratios" in text
    found = comparison(48, beyond=("h2/ln_1",))
    found.ops[100] = found.ops[100]._replace(ratio=math.nan)  # of layer 6
    [line] = [line for line in report(found).splitlines() if line.startswith("  layer ")]
    assert line.split()[1:3] == ["2", "6"]


def test_a_short_model_shows_each_ratio():
    """Catches a row or a column that is left out or displaced."""
    found = comparison(12, beyond=("h3/attn/scores",))
    lines = report(found).splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("  layer ")]
    assert lines[start].split() == ["layer", *map(str, range(12))]
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 16]}
    ratios = {op.name: ratio_text(op.ratio) for op in found.ops}
    assert len(table) == 15
    for name, cells in table.items():
        assert cells == [ratios[f"h{i}/{name}"] for i in range(12)]
    assert (
        lines[start + 16].split()
        == f"embedding {ratios['embedding']}, ln_f {ratios['ln_f']}, logits {ratios['logits']}".split()
    )


@pytest.mark.parametrize("ratio", [1 + 2**-52, 1.0001, 1.004999, 1.005, 9.9949, 9.995, 99.95, 9999.5, 1e5, 1e99, 1e300])
def test_a_ratio_beyond_its_bound_never_looks_like_one_within(ratio):
    """Catches 1.0001 shown as 1.00, and a ratio that is wider than its cell."""
    text = ratio_text(ratio)
    assert len(text) <= 4
    assert text == ">e99" or float(text) > 1
    assert float(ratio_number(ratio)) > 1


def test_ratios_without_a_number_are_shown_as_such():
    """Catches nan that is taken for a ratio within the bound, and a failing format."""
    ops = [OpFinding("h0/ln_1", "layer_norm", math.nan, (0, 0, 0), math.nan, 0.5, 1e-7)]
    ops += [OpFinding("h0/attn/scores", "attention_scores", math.inf, (0, 0, 0, 1), 0.0, -math.inf, 0.0)]
    text = report(comparison(ops=ops, growth=[Growth("h0/residual", math.nan, math.inf)]))
    assert "First result beyond its bound: h0/ln_1" in text
    assert re.search(r"^  ln_1 +NaN$", text, re.MULTILINE)
    assert re.search(r"^  attn/scores +inf$", text, re.MULTILINE)
    assert re.search(r"^  h0/residual +NaN +infinity +NaN$", text, re.MULTILINE)


def test_the_tokens_are_shown_as_text_where_the_tokenizer_is_known():
    """Catches a position that is counted from 1, and the tokens of the two sides exchanged."""
    text = report(comparison(), decode=decode)
    assert "differs first at position 7 of 11, counted from 0" in text
    assert re.search(r"^  token of the reference +'<284>' \(284\)$", text, re.MULTILINE)
    assert re.search(r"^  token of the judged +'<262>' \(262\)$", text, re.MULTILINE)
    assert "'<0><1><2><3><4><5><6><7>'" in text
    assert re.search(r"^  token of the reference +284$", report(comparison()), re.MULTILINE)


def test_results_that_could_not_be_judged_are_named():
    """Catches a model that passes because nothing was judged."""
    text = report(comparison(3, missing=("ln_f", "h0/attn/q", "h1/attn/q", "h2/mlp/gelu")))
    assert "Results that could not be judged: 4" in text
    assert "  layers 0 to 1: attn/q" in text.splitlines()
    assert "  layer 2: mlp/gelu" in text.splitlines()
    assert "  ln_f" in text.splitlines()


def test_colour_changes_nothing_but_colour():
    """Catches a colour that was not asked for, and padding that counts the codes."""
    found = comparison()
    plain, coloured = report(found), report(found, colour=True)
    assert "\x1b" not in plain
    assert ESCAPE.sub("", coloured) == plain
    assert coloured.startswith("\x1b[1;31mThe models part")
    assert report(comparison(beyond=()), colour=True).startswith("\x1b[1;32m")
    [cell] = re.findall(r"\x1b\[1;31m( *[\d.e]+)\x1b", coloured)
    assert cell.strip() == ratio_text(found.culprit.ratio)


def test_characters_that_control_a_terminal_are_escaped():
    """Catches a file name or a token that clears the screen."""
    evil = "\x1b[2Jevil\x07\n\udc80"
    found = comparison(a=evil, b=evil, verdict=evil, weights=[WeightFinding(evil, evil, 1.0)], missing=(evil,))
    ops = [OpFinding(evil, evil, 2.0, (0,), 2.0, 1.0, 0.5, evil)]
    for text in (report(found, decode=lambda ids: evil), report(comparison(ops=ops, growth=[Growth(evil, 1.0, 1.0)]))):
        assert not set(text) & {"\x1b", "\x07", "\udc80"}
        assert "evil" in text


# JSON


def test_json_has_each_finding_under_the_name_of_its_field():
    """Catches a field that is left out or renamed."""
    found = comparison()
    said = found.as_json()
    assert json.loads(strict_json.line(said)) == said
    assert set(said) == {*vars(found), "culprit"}
    assert said["culprit"] == "h1/ln_1"
    assert said["ops"] == [
        {**op._asdict(), "element": list(op.element), "within": op.name != "h1/ln_1"} for op in found.ops
    ]
    assert said["growth"] == [each._asdict() for each in found.growth]
    assert said["weights"] == [{"path": "h0/attn/c_attn/w", "kind": "transposed", "largest": 0.125}]
    assert said["logits"] == {**found.logits._asdict(), "greedy": [284, 262]}
    nothing = comparison(beyond=(), weights=None, logits=None).as_json()
    assert (nothing["weights"], nothing["logits"], nothing["culprit"]) == (None, None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_null_where_a_number_is_not_finite(value):
    """Catches NaN and Infinity, which are not JSON, and a NaN that counts as within the bound."""
    ops = [OpFinding("ln_f", "layer_norm", abs(value), (0,), value, value, value)]
    found = comparison(
        ops=ops, growth=[Growth("ln_f", value, value)], logits=LogitsFinding(value, value, None)
    ).as_json()
    json.dumps(found, allow_nan=False)
    [op] = found["ops"]
    assert (op["ratio"], op["computed"], op["within"], found["culprit"]) == (None, None, False, "ln_f")


# The page


def test_the_page_begins_with_the_verdict():
    """Catches a verdict that is left out, and a page whose colour contradicts it."""
    read = Page(page(comparison()))
    [verdict] = read.of_class("verdict")
    assert (verdict["text"], verdict["class"]) == ("The models part at h1/ln_1.", "verdict bad")
    [verdict] = Page(page(comparison(beyond=()))).of_class("verdict")
    assert verdict["class"] == "verdict good"
    assert read.elements.index(read.of_class("verdict")[0]) < read.elements.index(read.all("section")[0])


@pytest.mark.parametrize("found", [comparison(48), comparison(beyond=(), ops=[], growth=[], logits=None, weights=None)])
def test_the_page_loads_nothing_and_runs_nothing(found):
    """Catches a reference to the network, and a script."""
    html = page(found)
    read = Page(html)
    assert not {e["tag"] for e in read.elements} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not {key for e in read.elements for key in e} & {"src", "href", "xlink:href", "srcset", "style", "onclick"}
    assert not re.search(r"https?:|//|url\(|@import|\$\{?\w", html.replace("</", "<"))
    [policy] = [e for e in read.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'")
    assert read.all("html", lang="en")
    assert read.all("meta", name="viewport")


def test_every_text_on_the_page_is_escaped():
    """Catches a file name, a guess or a token that becomes an element of the page."""
    evil = "<script>alert(1)</script>\"'&amp;$verdict"
    ops = [OpFinding(name, evil, 2.0, (0,), 2.0, 1.0, 0.5, evil) for name in (evil, f"h0/{evil}")]
    found = comparison(
        a=evil, b=evil, verdict=evil, ops=ops, missing=(evil,), weights=[WeightFinding(evil, evil, 1.0)],
        growth=[Growth(evil, 1.0, 1.0), Growth(f"h0/{evil}/residual", 1.0, 1.0), Growth(evil, 2.0, 1.0)],
    )  # fmt: skip
    read = Page(page(found, decode=lambda ids: evil))
    assert not read.all("script")
    assert read.of_class("verdict")[0]["text"] == evil
    assert evil in read.all("title")[0]["text"]
    assert read.all("body")[0]["text"].count("alert(1)") > 15
    assert "\x1b" not in page(comparison(a="\x1b[2J"))


def test_the_heat_map_has_the_number_of_each_op_in_its_row_and_column():
    """Catches a cell that is displaced, has the wrong colour, or has no number for a screen reader."""
    found = comparison(12, beyond=("h3/attn/scores",), missing=("h5/attn/q", "ln_f"))
    read = Page(page(found))
    cells = {e["title"].split(" (")[0].split(":")[0]: e for e in read.all("td") if "title" in e}
    ratios = {op.name: op.ratio for op in found.ops}
    assert list(cells) == [name for name in observed_names(pg.GPT2Config(n_layer=12)) if name != "ln_f"]
    for name, ratio in ratios.items():
        assert cells[name]["text"] == ratio_text(ratio)
        assert f"error / bound {ratio:.3g}" in cells[name]["title"]
        step = int(cells[name]["class"].split()[0][1])
        assert (step > 3) == (ratio > 1)
    assert (cells["h5/attn/q"]["text"], cells["h5/attn/q"]["class"]) == ("not judged", "none")
    assert cells["h3/attn/scores"]["class"] == "r6 first"
    assert len(read.of_class("first")) == 1
    rows = [e["text"] for e in read.all("th", scope="row") if e["text"].startswith("layer ")]
    assert rows == [f"layer {i}" for i in range(12)]
    columns = [e["text"] for e in read.all("th", scope="col")]
    names = [name.split("/")[-1] for name in observed_names(pg.GPT2Config(n_layer=1))[1:-2]]
    assert columns[columns.index("ln_1") :][:15] == names
    assert [(e["text"], e["colspan"]) for e in read.all("th", scope="colgroup")] == [("attn", "9"), ("mlp", "3")]


@pytest.mark.parametrize(
    ("ratio", "kind"), [(0.0, "r0"), (0.5, "r2"), (1.0, "r3"), (1 + 2**-52, "r4"), (math.inf, "r6"), (math.nan, "r6")]
)
def test_the_colour_of_a_cell_says_whether_the_error_is_within_its_bound(ratio, kind):
    """Catches a ratio of 1, which is within the bound, in the colour of those beyond it, and NaN in the other."""
    read = Page(page(comparison(ops=[OpFinding("h0/ln_1", "layer_norm", ratio, (0,), 1.0, 1.0, 1.0)])))
    [cell] = [e for e in read.all("td") if e.get("title", "").startswith("h0/ln_1")]
    assert cell["class"].split()[0] == kind


def test_the_worst_results_come_first():
    """Catches a table of the best results, and NaN at its end."""
    found = comparison(beyond=("h0/mlp/gelu", "h1/ln_1"))
    found.ops[2] = found.ops[2]._replace(ratio=math.nan)
    read = Page(page(found))
    assert [e["text"] for e in read.all("th", scope="col")].count("guess") == 2
    assert "guess" not in [e["text"] for e in Page(page(comparison(beyond=()))).all("th", scope="col")]
    worst = read.all("tbody")[2]["text"]
    assert re.match(rf"\s*{found.ops[2].name}.*\n\s*h1/ln_1.*\n\s*h0/mlp/gelu", worst)


def test_every_number_of_a_comparison_is_on_its_page():
    """Catches a table that ends early, and numbers that only the colour of a cell or the height of a point shows."""
    found = comparison(12)
    read = Page(page(found, decode=decode))
    numbers = {e["text"] for e in read.all("td", **{"class": "number"})} | {e["text"] for e in read.all("dd")}
    for op in found.ops:
        assert {f"{op.ratio:.3g}", f"[0, {op.element[1]}, 3]"} <= numbers
    for each in found.growth:
        assert {f"{each.difference:.3g}", f"{each.rounding:.3g}"} <= numbers
    assert {"0.125", "0.0312", "2.5e-05 nats", "'<284>' (284)", "'<262>' (262)"} <= numbers
    names = [e["text"] for e in read.all("th", scope="row")]
    assert all(names.count(op.name) >= 2 for op in found.ops)  # among the ops, and in the growth


def test_classes_of_the_page_are_in_its_style_sheet():
    """Catches a misspelt class, which has no colour."""
    html = page(comparison())
    style = html[html.index("<style>") : html.index("</style>")]
    used = {name for e in Page(html).elements for name in e.get("class", "").split()}
    assert used - {"plot"} <= set(re.findall(r"\.([a-z][\w-]*)", style))


def test_colours_have_contrast():
    """Catches a text that is hard to read, in light and in dark (WCAG 2.2: 4.5, and 3 for lines)."""
    for scheme in colours(page(comparison())):
        for text in ("text", "muted", "good", "bad", "difference", "rounding"):
            assert contrast(scheme[text], scheme["page"]) >= 4.5, text
            assert contrast(scheme[text], scheme["card"]) >= 4.5, text
        for i in range(7):
            assert contrast(scheme[f"r{i}"], scheme[f"t{i}"]) >= 4.5, i
        assert contrast(scheme["r3"], scheme["r4"]) >= 1.2 or scheme["r3"] != scheme["r4"]


# The curves


def circles(svg, kind):
    found = [e for e in Page(svg).all("circle") if kind in e["class"].split()]
    return [(float(e["cx"]), float(e["cy"]), e) for e in found]


def test_a_curve_has_a_point_for_each_result_at_its_height():
    """Catches an axis that is upside down or linear, and curves that are exchanged."""
    points = [Growth("embedding", 1e-8, 1e-7), Growth("h0/residual", 1e-6, 1e-7), Growth("h1/residual", 1e-4, 1e-2)]
    svg = curves.draw(points)
    (x0, y0, _), (x1, y1, _), (x2, y2, last) = circles(svg, "difference")
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 > y1 > y2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # two decades each
    heights = [y for _, y, _ in circles(svg, "rounding")]
    assert heights[0] == heights[1] == pytest.approx((y0 + y1) / 2, abs=0.2)
    assert heights[2] == pytest.approx(2 * y2 - y1, abs=0.2)
    assert last["text"] == "h1/residual: difference 0.0001"
    labels = [e["text"] for e in Page(svg).all("text")]
    assert {"10⁻⁸", "10⁻²", "0", "1", "embedding", "layer", "largest difference (no unit)"} <= set(labels)


def test_the_logits_are_not_joined_with_the_residual_stream():
    """Catches a line between quantities of two scales."""
    svg = curves.draw([Growth(name, 1e-6, 1e-6) for name in ("embedding", "h0/residual", "logits")])
    assert [e["d"].count("L") for e in Page(svg).all("path") if "curve" in e["class"]] == [1, 1]
    assert len(circles(svg, "difference")) == 3


def test_a_difference_of_zero_is_a_hollow_point_on_the_axis():
    """Catches the logarithm of 0."""
    svg = curves.draw([Growth("embedding", 0.0, 1e-8), Growth("h0/residual", 1e-7, 1e-8)])
    (_, low, zero), (_, high, _) = circles(svg, "difference")
    assert "zero" in zero["class"].split()
    assert low > high
    assert all(y < low for _, y, _ in circles(svg, "rounding"))
    [label] = [e for e in Page(svg).all("text") if e["text"] == "0" and e["text-anchor"] == "end"]
    assert float(label["y"]) == pytest.approx(low, abs=6)


def test_numbers_that_are_not_finite_are_gaps():
    """Catches NaN in a path, which hides the whole curve."""
    points = [Growth(f"h{i}/residual", value, 1e-6) for i, value in enumerate((1e-7, math.nan, 1e-7, math.inf, 1e-7))]
    svg = curves.draw(points)
    assert len(circles(svg, "difference")) == 3
    assert "nan" not in svg
    assert "inf" not in svg
    [path] = [e["d"] for e in Page(svg).all("path") if e["class"] == "curve difference"]
    assert path.count("M") == 3
    assert "L" not in path


def test_nothing_to_draw_is_said_in_words():
    """Catches an empty picture for two sides that are equal."""
    assert curves.draw([Growth("embedding", 0.0, 0.0)]) == ""
    html = page(comparison(growth=[Growth("embedding", 0.0, 0.0)]))
    assert "The two sides are equal, or their differences are not finite." in html


@pytest.mark.parametrize("n_layer", [1, 12, 48])
def test_everything_is_inside_the_picture(n_layer):
    """Catches a point or a label outside of the picture, which the browser cuts off."""
    found = comparison(n_layer, beyond=("h0/ln_1",))
    read = Page(page(found))
    [svg] = read.of_class("plot")
    _, _, width, height = map(float, svg["viewbox"].split())
    for x, y in [(e["cx"], e["cy"]) for e in read.all("circle")] + [(e["x"], e["y"]) for e in read.all("text")]:
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    [mark] = [e for e in read.all("text") if e.get("class") == "culprit-name"]
    assert mark["text"] == "h0/ln_1"
