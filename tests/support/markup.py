"""Reads the HTML pages that the package writes: their elements, and the colours of their style."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG = {"path", "circle"}


class Page(HTMLParser):
    """Reads a page: its elements in order, each with its attributes and text. Every element must be closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        assert len(element) == len(attrs) + 2, "an attribute is there twice"
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in attributes.items())]

    def of_class(self, name):
        return [e for e in self.elements if name in e.get("class", "").split()]


def colours(html):
    """Return the colours that a page's style names, in light and in dark. Both schemes must have the same names."""
    style = html[html.index("<style>") : html.index("</style>")]
    schemes = {"light": {}, "dark": {}}
    for scheme, names in re.findall(r"(dark\)\s*\{\s*)?:root\s*\{([^}]*)\}", style):
        schemes["dark" if scheme else "light"].update(re.findall(r"--([\w-]+): (#[\da-f]{6}|\d+ \d+ \d+);", names))
    light, dark = schemes.values()
    assert set(light) == set(dark)
    return light, dark


def luminance(colour):
    """Return the relative luminance of a colour, ``#rrggbb`` or ``r g b`` (WCAG 2.2)."""
    whole = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] if colour[0] == "#" else map(int, colour.split())
    channels = [c / 255 for c in whole]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    """Return the ratio of the luminances of two colours, from 1 to 21."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
