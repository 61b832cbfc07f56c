"""List phrases that readers stumble over: ``python tools/prose.py [PATH ...]``. It exits with 1 if it finds any.

It reads the comments, docstrings and other strings of Python files, and the text of Markdown files outside code blocks.
If a phrase is right where it stands, add it to ALLOWED.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("portable_gpt2", "backends", "docs", "examples", "tools", "bench")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "noxfile.py", *FOLDERS)

# Each pattern has the advice that is printed with it.
PATTERNS = {
    r"\b(ms|µs|us|nats|tokens|launch|framework|shape|object|blocks|examples)\s+an? "
    r"(token|file|property|thread|product|step|op|call|layer)\b": "write 'per'",
    r"(?:^What|[.;:] [Ww]hat) (is|was|are|has|else|computes|makes|runs|changes|describes|it)\b": "name the thing",
    r"(?:^Of|[;.] [oO]f) (several|two|an?|those|equal|anything|what|one|each)\b": "begin with the subject",
    r"\bReturn (of|into|where to|what)\b": "name what is returned",
    r"\bnone included\b": "write 'zero or more'",
    r"(?<![Tt]here )\b(is|are) no (?!longer|more|such)[a-z]+\b": "write 'is not a'",
    r"\b(is|are|be|was|were) of (?!which|the same|the kind|the hub|type|dtype|shape|any)[a-z]+\b": "use a verb",
    r"\b([Bb]ehind|[Bb]eside)\b": "write 'after', 'next to', 'in addition to'",
    r"\b(go|goes|going|went) on\b": "write 'continue'",
    r"\b([Aa]new|[Ll]est|[Ww]hoever|in silence)\b": "write 'again', 'so that ... not', 'anyone who', 'silently'",
    r"\bas (it|they) lies?\b|says otherwise": "say what the state is",
    r"\bof that of\b|\bthe (latter|former)\b": "repeat the noun",
    r"(?<!the )\b(like|start|buffer|fn|bound)'s\b": "put a parameter's name in backticks",
    r"\b(the way back|no number any more|to the same bits|come to that)\b": "use the word of the field",
    r"\bfew (rows|sizes|numbers|characters)\b|\b(rows|arrays) are few\b": "write 'small' or give the number",
    r"\b\d+\.\d+ of (its|the) (time|memory|read)\b": "write 'times', and name both quantities",
}

# Phrases that a pattern finds and that are right as they are: texts that are quoted, and terms.
ALLOWED = [
    "*the latter*",
    "*beside*, *behind*, *go on*",
    "*anew*",
    "is no obstacle",
]


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line of a comment, a docstring or another string of several words."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            for i, line in enumerate(re.sub(r"(?m)^\s*>>>.*$", "", node.value).split("\n")):
                yield node.lineno + i, line.strip()


def markdown_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not in a code block."""
    is_code = False
    for number, line in enumerate(source.split("\n"), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield number, line.strip()


def found(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the phrase with its surroundings and the advice, of each phrase that a pattern finds."""
    read = python_prose if file.suffix == ".py" else markdown_prose
    for number, text in read(file.read_text("utf-8")):
        for phrase in ALLOWED:
            text = text.replace(phrase, "")
        for pattern, advice in PATTERNS.items():
            if match := re.search(pattern, text):
                yield number, text[max(0, match.start() - 30) : match.end() + 30], advice


def main(arguments: list[str]) -> int:
    """Print what is found in some files and directories; return the exit status."""
    paths = [Path(each) for each in arguments] or [ROOT / each for each in FILES]
    files = sorted(
        file for path in paths for file in ([path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.md")])
    )
    hits = [
        f"{file}:{number}: {text!r}: {advice}"
        for file in files
        if file != Path(__file__)  # its patterns would match themselves
        for number, text, advice in found(file)
    ]
    print("\n".join([*hits, f"{len(hits)} phrases to rewrite, or to allow in tools/prose.py"]) if hits else "plain")
    return bool(hits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
