"""The pages of attention weights and of surprise: their numbers are the model's, texts stay texts, and they work."""

import base64
import hashlib
import itertools
import json
import math
import os
import re

import browser
import numpy as np
import pytest
import tiny
from markup import Page, colours, contrast

import portable_gpt2 as pg
from portable_gpt2.cli import main
from portable_gpt2.pages import attention_page, surprise_page
from portable_gpt2.pages.document import document, name_of, token_text

EVIL = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&amp;<!--"
TEXT = f"To be,\tor not\nto be\x1b[2J: 存 {EVIL}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    config = pg.GPT2Config(**{**vars(tiny.CONFIG), "n_ctx": 256})
    return tiny.model(pg.get_backend("numpy"), config, tokenizer=pg.Tokenizer.load(path))


def surprise_of(model, text=TEXT, **options):
    return pg.pages.surprise(model, {EVIL: model.score(text, alternatives=3, **options)})


@pytest.fixture(scope="module", params=["attention", "surprise"])
def page(model, request):
    return pg.pages.attention(model, TEXT) if request.param == "attention" else surprise_of(model)


def data_of(page):
    """Return the numbers on a page."""
    [element] = Page(page).all("script", id="data")
    return json.loads(element["text"], parse_constant=pytest.fail)


# The document


def test_a_page_loads_nothing_and_runs_one_script_of_ours(page):
    """Catches a reference to the network, and a policy that would let a script of the text run."""
    read = Page(page)
    assert not {e["tag"] for e in read.elements} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {key for e in read.elements for key in e} & {"src", "href", "srcset", "style", "onclick", "onerror"}
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttp", page)
    [policy] = [e["content"] for e in read.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    data, script = read.all("script")
    assert data["type"] == "application/json"
    assert policy.startswith("default-src 'none'; ")
    [digest] = re.findall(r"script-src 'sha256-([^']+)'$", policy)
    assert digest == base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert read.all("html", lang="en")
    assert read.all("meta", name="viewport")


def test_texts_on_a_page_are_texts(page, model):
    """Catches a token or a name of a file that becomes an element, and characters that control a terminal."""
    read = Page(page)
    assert len(read.all("script")) == 2
    assert "\x1b" not in page
    [text] = read.of_class("text")
    shown = "".join(token_text(model.tokenizer, token) for token in model.tokenizer.encode(TEXT))
    assert text["text"] == shown.replace("\x1b", "\\x1b").replace("\n", "↵\n")
    assert EVIL in text["text"]


def test_no_text_ends_the_data():
    """Catches a text among the data that the browser reads as the end of their element."""
    page = document(
        "portable_gpt2.pages",
        "surprise",
        title="",
        heading="",
        introduction="",
        sections=[],
        data={EVIL: [EVIL, math.nan]},
    )
    assert len(Page(page).all("script")) == 2
    assert data_of(page) == {EVIL: [EVIL, None]}


def test_each_token_is_an_element_with_a_label_of_the_whole(page, model):
    """Catches tokens that are joined, and a text that a screen reader does not announce."""
    read = Page(page)
    n = len(model.tokenizer.encode(TEXT))
    assert len(read.of_class("t")) == n
    assert [e.get("tabindex") for e in read.of_class("t")] == ["0"] + [None] * (n - 1)
    assert all(e["aria-label"] for e in read.all("div", role="group"))
    assert all(e["text"] for e in read.all("label"))
    assert any("aria-live" in e for e in read.elements)
    used = {name for e in read.elements for name in e.get("class", "").split()}
    style = page[page.index("<style>") : page.index("</style>")]
    assert used <= set(re.findall(r"\.([a-z][\w-]*)", style))


def test_colours_have_contrast_and_an_order_of_their_own(model):
    """Catches a text that is hard to read, and colours that only differ in their hue."""
    for scheme in colours(surprise_of(model)):
        for text in ("text", "muted", "accent"):
            assert contrast(scheme[text], scheme["page"]) >= 4.5, text
        levels = range(len(surprise_page.LIMITS) + 1)
        for i in levels:
            assert contrast(scheme[f"s{i}"], scheme[f"t{i}"]) >= 4.5, i
        steps = [contrast(scheme[f"s{i}"], scheme["page"]) for i in levels]
        assert all(b > 1.14 * a for a, b in itertools.pairwise(steps)), steps
    for scheme in colours(pg.pages.attention(model, "To be")):
        assert contrast(scheme["heat"], scheme["text"]) >= 4.5
        assert contrast(scheme["heat"], scheme["page"]) >= 2.5


def test_a_token_that_is_a_part_of_a_character_is_shown_by_its_bytes(model):
    """Catches a replacement character, which does not say which byte it is, and an id that the tokenizer lacks."""
    [first, *_] = model.tokenizer.encode("存")
    assert token_text(model.tokenizer, first) == "<0xE5>"
    assert token_text(model.tokenizer, 400) == "<400>"
    assert name_of(" a\n\x00") == "␣a↵\\x00"


def test_a_page_is_a_text_that_a_notebook_shows_and_that_is_written_whole_or_not_at_all(page, tmp_path):
    """Catches a page that replaces a file without being told to, and a frame that its content can leave."""
    file = tmp_path / "page.html"
    page.save(file)
    assert file.read_text("utf-8") == page
    with pytest.raises(FileExistsError, match=r"page\.html: exists already; give a new name, or replace this file by"):
        pg.pages.Page("other").save(file)
    pg.pages.Page("other").save(file, force=True)
    assert (file.read_text("utf-8"), os.listdir(tmp_path)) == ("other", ["page.html"])
    [frame] = Page(page._repr_html_()).all("iframe")
    assert (frame["srcdoc"], frame["sandbox"]) == (page, "allow-scripts")


# The numbers


@pytest.mark.parametrize(("layers", "heads"), [(None, None), ([1], None), (None, [1]), ([1, 0], [1])], ids=str)
def test_the_weights_of_attention_are_the_model_s(model, layers, heads):
    """Catches a map of another layer or head, one that is transposed, and a weight that is rounded too far."""
    page = data_of(pg.pages.attention(model, TEXT, layers=layers, heads=heads))
    ids = model.tokenizer.encode(TEXT)
    traced = model.trace(TEXT, names=["*/attn/weights"])
    layers, heads = layers or [0, 1], heads or [0, 1]
    assert (page["layers"], page["heads"], page["tokens"]) == (layers, heads, ids)
    found = np.frombuffer(base64.b64decode(page["weights"]), np.uint8).astype(float)
    maps = [traced[f"h{i}/attn/weights"][0, j] for i in layers for j in heads]
    exact = np.concatenate([row[: k + 1] for one in maps for k, row in enumerate(one)])
    assert len(found) == len(exact)
    np.testing.assert_allclose(found / 255, np.sqrt(exact), rtol=0, atol=0.5 / 255 + 1e-9)
    assert (abs((found / 255) ** 2 - exact) <= 0.004 * np.sqrt(exact) + 1e-5).all()


def test_the_numbers_of_a_text_are_the_model_s(model):
    """Catches a probability, a rank or an alternative of another token, and a NaN, which is not JSON."""
    whole = data_of(surprise_of(model))
    [found] = whole["texts"]
    score = model.score(TEXT)
    assert found["tokens"] == score.tokens
    assert (found["log_probs"][0], found["ranks"][0]) == (None, 0)
    np.testing.assert_allclose(found["log_probs"][1:], score.log_probs[1:], rtol=0, atol=5.1e-5)
    logits = model.logits([score.tokens])[0].astype(float)
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, token in enumerate(score.tokens[1:], 1):
        order = np.argsort(-exact[i - 1], kind="stable").tolist()
        assert found["ranks"][i] == order.index(token) + 1
        assert found["likeliest"][i] == order[:3]
        np.testing.assert_allclose(found["likeliest_log_probs"][i], 1000 * exact[i - 1, order[:3]], atol=0.51)
        assert all(whole["names"][str(id_)] == name_of(token_text(model.tokenizer, id_)) for id_ in order[:3])


def test_the_colour_of_a_token_is_that_of_its_surprise(model):
    """Catches nats that are taken for bits, and a token without a probability that has a colour."""
    score = model.score(TEXT)
    kinds = [e["class"].split() for e in Page(surprise_of(model)).of_class("t")]
    assert kinds[0] == ["t"]
    for kind, log_prob in zip(kinds[1:], score.log_probs[1:], strict=True):
        bits = -log_prob / math.log(2)
        assert kind == ["t", f"s{sum(bits > limit for limit in (1, 2, 4, 8, 12))}"]
    text = Page(surprise_of(model)).all("dd")[1]["text"]
    assert text == f"{-score.total / math.log(2) / score.n_tokens:.3f} bits per token, " + (
        f"{-score.total / math.log(2) / score.n_bytes:.3f} bits per byte"
    )


def test_ranks_and_alternatives_do_not_depend_on_windows_and_bos(model):
    """Catches a window whose rows are entered at the places of another one."""
    text = TEXT * 3
    plain, whole = (model.score(text, bos=bos, stride=50, alternatives=2) for bos in (False, True))
    assert len(plain.tokens) > model.config.n_ctx
    for score in (plain, whole):
        known = score.ranks > 0
        assert np.array_equal(known, ~np.isnan(score.log_probs))
        first = known & (score.ranks == 1)
        np.testing.assert_array_equal(score.likeliest[first, 0], np.asarray(score.tokens)[first])
        np.testing.assert_array_equal(score.likeliest_log_probs[first, 0], score.log_probs[first])
        assert (np.diff(score.likeliest_log_probs[known]) <= 0).all()
    assert whole.ranks[0] > 0
    assert model.score(text).ranks is model.score(text).likeliest is None
    np.testing.assert_array_equal(model.score(text, stride=50).log_probs, plain.log_probs)


def test_what_does_not_fit_on_a_page_is_refused_with_what_would(model, monkeypatch):
    """Catches a page that no browser opens, and a limit that is off by one."""
    monkeypatch.setattr(attention_page, "LARGEST", 10 * 11 // 2 * 4)
    ids = model.tokenizer.encode("To be, or not to be, that is")
    assert len(ids) > 10
    pg.pages.attention(model, model.tokenizer.decode(ids[:10]))
    message = r"a page holds up to 220: choose a layer or a head, or shorten the text to 10 tokens"
    with pytest.raises(ValueError, match=message):
        pg.pages.attention(model, model.tokenizer.decode(ids[:11]))
    pg.pages.attention(model, model.tokenizer.decode(ids[:11]), layers=[0])
    monkeypatch.setattr(surprise_page, "LARGEST", 10)
    with pytest.raises(ValueError, match="the texts have 11 tokens; a page holds up to 10: split them"):
        pg.pages.surprise(model, model.score_ids(ids[:11]))
    for layers in ([2], [-1], [], [True]):
        with pytest.raises(ValueError, match="layers is"):
            pg.pages.attention(model, "To", layers=layers)
    nameless = tiny.model(pg.get_backend("numpy"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        pg.pages.attention(nameless, "To")
    with pytest.raises(ValueError, match="has no tokenizer"):
        pg.pages.surprise(nameless, nameless.score_ids([1, 2]))
    with pytest.raises(ValueError, match="there are no scores"):
        pg.pages.surprise(model, {})


# The command


@pytest.fixture
def command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save("it")
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")

    def run(*args):
        capsys.readouterr()
        try:
            status = main([*args, "--model", "it"])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "args", [("attend", TEXT, "-o", "page.html"), ("score", "text.txt", "--html", "page.html")], ids=lambda x: x[0]
)
def test_the_command_writes_a_page_and_replaces_one_only_by_force(command, model, args, tmp_path):
    """Catches another page than Python writes, and a page that is lost."""
    status, out, err = command(*args)
    assert (status, err.splitlines()[-1]) == (0, "wrote page.html")
    loaded = pg.GPT2.load("it", backend="numpy")
    expected = (
        pg.pages.attention(loaded, TEXT)
        if args[0] == "attend"
        else pg.pages.surprise(loaded, {"text.txt": loaded.score(TEXT, alternatives=5)})
    )
    assert (tmp_path / "page.html").read_text("utf-8") == expected
    assert out.startswith("text.txt: perplexity" if args[0] == "score" else "")
    (tmp_path / "page.html").write_text("mine")
    status, out, err = command(*args)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "page.html: exists already" in err
    assert (tmp_path / "page.html").read_text() == "mine"
    assert command(*args, "--force")[0] == 0
    assert (tmp_path / "page.html").read_text("utf-8") == expected
    assert command(*args[:-1], "nowhere/page.html")[0] == 2


def test_a_layer_and_a_head_may_be_chosen_for_a_page(command, tmp_path):
    """Catches an option that only the plot obeys."""
    assert command("attend", "To be", "-o", "page.HTML", "--layer", "1", "--head", "0")[0] == 0
    found = data_of((tmp_path / "page.HTML").read_text("utf-8"))
    assert (found["layers"], found["heads"]) == ([1], [0])


# In a browser


@pytest.fixture(scope="module")
def tab():
    if browser.PROGRAM is None:
        pytest.skip("no browser is installed: Chromium or Chrome")
    with browser.tab() as tab:
        yield tab


def opened(tab, page, tmp_path, **window):
    page.save(tmp_path / "page.html", force=True)
    tab.open(tmp_path / "page.html", **window)
    return tab


def attended(tab):
    """Return the texts that the page shows for the chosen token: its number, layer, head, and largest weights."""
    query = re.search(
        r"token (\d+), layer (\d+), head (\d+)", tab.value("document.getElementById('query').textContent")
    )
    lines = tab.value("[...document.querySelectorAll('#strongest li')].map((e) => e.textContent)")
    keys = [re.search(r" token (\d+) (below )?([\d.]+) %$", line).groups() for line in lines]
    return tuple(map(int, query.groups())), {int(key): (bool(below), float(weight)) for key, below, weight in keys}


def check_attended(tab, model, token, layer, head):
    found, weights = attended(tab)
    assert found == (token, layer, head)
    exact = pg.to_numpy(model.trace(TEXT, names=[f"h{layer}/attn/weights"])[f"h{layer}/attn/weights"])[0, head, token]
    assert len(weights) == min(8, token + 1)
    for key, (below, weight) in weights.items():
        assert below or abs(weight - 100 * exact[key]) <= 0.8, key
    assert min(exact[list(weights)]) >= np.sort(exact[: token + 1])[-len(weights)] - 0.004


def test_attention_is_chosen_with_keys_and_mouse(tab, model, tmp_path):
    """Catches a page whose script fails, whose keys do nothing, and that shows another head than it says."""
    opened(tab, pg.pages.attention(model, TEXT), tmp_path)
    last = len(model.tokenizer.encode(TEXT)) - 1
    check_attended(tab, model, last, 0, 0)
    tab.press("Tab", "Tab", "Tab")  # the layer, the head, the text
    tab.press("ArrowLeft", "PageDown", "ArrowDown", "ArrowDown")
    check_attended(tab, model, last - 1, 1, 1)
    tab.press("Home", "ArrowRight", "ArrowUp")
    check_attended(tab, model, 1, 1, 0)
    x, y = tab.value("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                     "(document.querySelectorAll('.t')[5].getBoundingClientRect())")  # fmt: skip
    tab.point(x, y)
    check_attended(tab, model, 5, 1, 0)
    opacities = tab.value("[...document.querySelectorAll('.t')].map((e) => e.style.getPropertyValue('--root'))")
    exact = model.trace(TEXT, names=["h1/attn/weights"])["h1/attn/weights"][0, 0, 5, :6]
    np.testing.assert_allclose([float(x) for x in opacities[:6]], np.sqrt(exact), atol=0.003)
    assert set(opacities[6:]) == {""}
    tab.press("ArrowRight")  # the token that had the focus before keeps it until a key is pressed
    check_attended(tab, model, 6, 1, 0)
    assert tab.value("document.querySelectorAll('[aria-current]').length") == 1
    assert tab.value("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    assert (tab.errors, "run" in tab.value("document.title")[:3]) == ([], False)


def test_surprise_is_shown_for_the_chosen_token(tab, model, tmp_path):
    """Catches a page whose script fails, and the numbers of another token."""
    score = model.score(TEXT, alternatives=3)
    opened(tab, pg.pages.surprise(model, {"a": model.score("To be, or", alternatives=3), EVIL: score}), tmp_path)
    tab.press("Tab", "ArrowLeft")  # the first token is chosen by its focus, and keeps it
    assert tab.value("document.activeElement === document.querySelector('.t')")
    tab.press("ArrowRight")
    assert tab.value("document.activeElement === document.querySelectorAll('.t')[1]")
    x, y = tab.value("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                     "(document.querySelectorAll('.text')[1].children[3].getBoundingClientRect())")  # fmt: skip
    tab.point(x, y)  # another text: the keyboard stays in the first one
    tab.press("ArrowLeft")
    assert tab.value("document.activeElement === document.querySelector('.t')")
    tab.point(x, y, click=True)
    tab.press("ArrowRight")
    shown = tab.value("document.getElementById('chosen').textContent")
    bits = -score.log_probs[4] / math.log(2)
    assert shown.endswith(f"{bits:.2f} bits, rank {score.ranks[4]}")
    names = tab.value("[...document.querySelectorAll('#alternatives code')].map((e) => e.textContent)")
    assert names == [name_of(token_text(model.tokenizer, token)) for token in score.likeliest[4].tolist()]
    tab.press("Home")
    assert "has no probability" in tab.value("document.getElementById('chosen').textContent")
    assert (tab.errors, tab.value("document.title")[:8]) == ([], "Surprise")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_on_the_screen_in_light_and_in_dark(tab, page, tmp_path, width, dark):
    """Catches a page that must be scrolled sideways, and dark mode with the colours of light mode."""
    opened(tab, page, tmp_path, width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert tab.errors == []
