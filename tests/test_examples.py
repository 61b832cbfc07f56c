"""The examples that files run."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_texts_are_split_at_a_paragraph(tmp_path):
    """Catches works in another order, a held-out part that overlaps, and one that begins within a paragraph."""
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    works = {name: "".join(f"{name} {i}\r\n\r\n" for i in range(n)) for name, n in (("b", 40), ("a", 50), ("c", 30))}
    for name, text in works.items():
        (texts / f"{name}_gut.txt").write_bytes(text.encode("latin-1"))
    (texts / "a_gut_f.txt").write_text("of the Folio")
    (texts / "é.txt").write_bytes("é".encode("latin-1"))
    code = [sys.executable, str(EXAMPLES / "shakespeare_texts.py"), "out"]
    subprocess.run(code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
    out = tmp_path / "out"
    assert sorted(file.name for file in (out / "train").iterdir()) == ["a.txt", "b.txt", "c.txt"]
    train = [(out / "train" / f"{name}.txt").read_bytes().decode() for name in "abc"]
    held_out = (out / "held-out.txt").read_bytes().decode()
    assert "".join(train) + held_out == "".join(works[name].replace("\r\n", "\n") for name in "abc")
    assert 0.04 < len(held_out) / len("".join(train) + held_out) < 0.06
    assert held_out.startswith("c ")
