"""The documentation has every public name and every option of the command, and its links lead somewhere."""

import importlib
import re
import sys
import unicodedata
from pathlib import Path

import pytest

import portable_gpt2.cli
from portable_gpt2 import training

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "tools"))
import command_reference  # noqa: E402

MODULES = ["portable_gpt2", "portable_gpt2.training", "portable_gpt2.numerics", "portable_gpt2.numerics.bounds"]
MODULES += ["portable_gpt2.testing", "portable_gpt2.pages"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def documented():
    """Return the full names that the directives of the reference pages show, with the kind of the directive."""
    found = {}
    for page in (DOCS / "reference").glob("*.md"):
        module = None
        for line in page.read_text("utf-8").splitlines():
            if matched := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = matched[1]
            elif matched := re.match(r"\.\. auto(\w+):: (\S+)", line):
                found[f"{module}.{matched[2]}"] = matched[1]
    return found


def test_every_public_name_is_in_the_reference():
    """Catches a public name that was added or renamed, and that no page shows."""
    public = {f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__}
    assert len(public) > 60
    assert public - {*documented()} == set()


@pytest.mark.parametrize("name", documented())
def test_the_reference_shows_what_exists(name):
    """Catches a name that was removed, and a class that is shown as a function."""
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if isinstance(thing, type):
        assert documented()[name] == ("exception" if issubclass(thing, BaseException) else "class")
    else:
        assert documented()[name] == ("function" if callable(thing) else "data")


def test_every_option_is_in_the_reference(capsys):
    """Catches a subcommand or an option that the generated page leaves out."""
    assert "reference/command" in (DOCS / "conf.py").read_text("utf-8")
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", command_reference.page(), re.MULTILINE | re.DOTALL))

    def help_of(*command):
        with pytest.raises(SystemExit):
            portable_gpt2.cli.main([*command, "--help"])
        return capsys.readouterr().out

    names = re.findall(r"^    ([a-z]\S*)", help_of(), re.MULTILINE)
    assert names == [*sections]
    assert "train" in names
    for name in names:
        shown = re.findall(r"^  (-.*?)(?:   *|$)", help_of(name), re.MULTILINE)
        options = {word for line in shown for word in re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", line)}
        listed = " ".join(re.findall(r"^`(.*)`$", sections[name], re.MULTILINE)).replace(",", " ").split()
        assert {"-h", "--help"} <= options <= {*listed}


def anchor(heading):
    """Return the anchor of a heading, as MyST and GitHub make it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading.strip().lower())
    return "".join(c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN").replace(" ", "-")


def outside_code(page):
    return re.sub(r"^(`{3,}|:{3,}).*?^\1[ \t]*$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """Return the targets of the links of a page, outside of code."""
    text = re.sub(r"`[^`\n]*`", "", outside_code(page).replace("\\`", ""))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    """Catches a page that was moved, a heading that was renamed, and an address that is not one."""
    for target in links(page):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(:?/[\w./#?=&%~+-]*)?", target), target
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if fragment:
            text = outside_code(file) + (command_reference.page() if file.stem == "command" else "")
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}; {file.name} has no such heading"


def source_files():
    return [
        file
        for folder in ("portable_gpt2", "backends")
        for file in (ROOT / folder).rglob("*.py")
        if "testing" not in file.parts
    ]


def test_the_messages_of_the_page_of_errors_are_the_programs():
    """Catches a message that was reworded, so that nobody finds it on the page."""
    source = "".join(file.read_text("utf-8") for file in source_files())
    source = re.sub(r'"\n *f?"', "", source)  # a string that is written on several lines
    page = (DOCS / "reference" / "errors.md").read_text("utf-8").partition("\n## Messages")[2]
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    assert len(cells) > 30
    for message in (each for cell in cells for each in re.findall(r"`(.+?)`(?:, |$)", cell)):
        for part in map(str.strip, message.split("...")):
            assert part in source, message


def test_every_warning_is_on_the_page_of_errors():
    """Catches a new warning that the page does not explain."""
    n_warnings = sum(file.read_text("utf-8").count("warnings.warn(") for file in source_files())
    page = (DOCS / "reference" / "errors.md").read_text("utf-8").partition("\n## Warnings")[2]
    messages = re.findall(r"^\| (`.*`) \| \w+Warning", page, re.MULTILINE)
    assert sum(len(re.findall("`.+?`", each)) for each in messages) == n_warnings + 1  # one has two forms


def test_every_page_is_in_the_site():
    """Catches a search for pages and links that finds nothing."""
    assert {"start.md", "limits.md", "numerics.md"} <= {page.name for page in PAGES}
    assert len([target for page in PAGES for target in links(page)]) > 60
    assert training.__all__
