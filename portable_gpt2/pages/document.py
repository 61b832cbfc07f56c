"""What all pages share: the document, its style, its policy, the escaping of texts, and tokens as elements."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from .. import checks, strict_json
from ..checks import plain
from ..files import write_text
from ..tokenizer import Tokenizer

_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


class Page(str):
    """An HTML page: a text that a notebook shows as a page, and that `save` writes to a file."""

    __slots__ = ()

    def save(self, file: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the page to a file, which appears complete or not at all.

        Parameters
        ----------
        file : path
            The file, such as ``attention.html``.
        force : bool
            Whether to replace a file that exists.

        Raises
        ------
        FileExistsError
            If the file exists and force is false. Nothing is written.
        OSError
            If the file cannot be written.
        """
        write_text(checks.path("file", file), self, checks.flag("force", force))

    def _repr_html_(self) -> str:
        """Return the page in a frame, which a notebook shows."""
        return f'<iframe srcdoc="{escape(self)}" sandbox="allow-scripts" width="100%" height="640"></iframe>'


def text(text: str) -> str:
    """Return a text as HTML. Characters that do not print are escaped visibly."""
    return escape(plain(text))


def section(title: str, *parts: str) -> str:
    """Return a section with a heading."""
    return "\n".join([f"<section>\n<h2>{text(title)}</h2>", *parts, "</section>"])


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of labels and texts."""
    entries = (f"<dt>{text(label)}</dt><dd>{text(value)}</dd>" for label, value in pairs)
    return "\n".join(["<dl>", *entries, "</dl>"])


def document(
    package: str, name: str, *, title: str, heading: str, introduction: str, sections: Iterable[str], data: Any = None
) -> Page:
    """Return a page.

    Parameters
    ----------
    package : str
        The package that has the style of this kind of page, ``name.css``, and its script, ``name.js``.
    name : str
        The name of the kind of page.
    title : str
        The text in the title bar of a window. It is escaped here.
    heading : str
        The text of the heading. It is escaped here.
    introduction, sections : str and strs
        The HTML below the heading.
    data : JSON value, optional
        The numbers that the script reads from the page. Without data, the page has no script.
    """
    script = ""
    if data is not None:
        script = _resource(__package__, "tokens.js") + _resource(package, f"{name}.js")
    return Page(
        Template(_resource(__package__, "page.html")).substitute(
            policy=_policy(script),
            title=text(title),
            style=_resource(__package__, "page.css") + _resource(package, f"{name}.css"),
            heading=text(heading),
            introduction=introduction,
            sections="\n".join(each for each in sections if each),
            scripts="" if data is None else f"{_embedded(data)}<script>{script}</script>\n",
        )
    )


def _policy(script: str) -> str:
    """Return a policy by which a browser loads nothing and runs no script but this one, whatever the page contains."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if not script:
        return policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{policy}; script-src 'sha256-{digest}'"


def _embedded(data: Any) -> str:
    """Return data as a JSON element. No text in it can end the element, because ``<`` is written as an escape."""
    line = json.dumps(strict_json.finite(data), allow_nan=False, separators=(",", ":"))
    return f'<script type="application/json" id="data">{line.replace("<", chr(92) + "u003c")}</script>\n'


def _resource(package: str | None, name: str) -> str:
    return resources.files(package or "").joinpath(name).read_text("utf-8")


# Tokens


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token. Bytes that are a part of a character are written as in ``<0xE5>``.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> token_text(pg.GPT2.load("shakespeare", backend="numpy").tokenizer, 11)
    '+'
    """
    try:
        spelled = tokenizer.token_bytes(token)
    except ValueError:  # the vocabulary of a model may be larger than that of its tokenizer
        return f"<{token}>"
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in spelled)


def name_of(token: str) -> str:
    """Return the text of a token with visible signs for spaces and line ends."""
    return plain(token.translate(_VISIBLE))


def tokens_as_text(texts: Sequence[str], label: str, classes: Iterable[str]) -> str:
    """Return tokens as one running text, in which the mouse and the arrow keys go from token to token.

    Each token is an element of the class ``t``, and of its own class.
    """

    def element(i: int, token: str, kind: str) -> str:
        lines = "".join(c if c == "\n" else "\t" if c == "\t" else text(c) for c in token)
        shown = lines.replace("\n", '<span class="end">↵</span>\n')
        index = ' tabindex="0"' if i == 0 else ""
        return f'<span class="{kind}"{index}>{shown}</span>'

    elements = "".join(map(element, range(len(texts)), texts, classes))
    return f'<div class="text" role="group" aria-label="{text(label)}">{elements}</div>'
