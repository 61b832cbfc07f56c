"""Refuse to run the tests with a copy of the package that differs from this checkout."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"portable_gpt2": ROOT / "portable_gpt2", "portable_gpt2_backends": ROOT / "backends"}
ADVICE = """\
Install the checkout, then run the tests again:
    nox -s dev && .venv/bin/pytest        in an environment of its own that follows each change of the checkout
    pip install --no-deps --editable .    in the environment that you use now"""


def refuse_a_stale_copy():
    """Exit if the tests would import a copy of the package whose files are not those of the checkout."""
    for name, directory in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            sys.exit(f"{name} is not installed. {ADVICE}")
        if not directory.is_dir():  # the tests were copied without the package
            continue
        installed = Path(spec.origin).parent
        if differing := difference(installed, directory):
            more = f" and {len(differing) - 3} more files" if len(differing) > 3 else ""
            files = ", ".join(differing[:3]) + more
            sys.exit(f"{installed} is a copy of {directory}, but differs from it in {files}. {ADVICE}")


def difference(one, other):
    """Return the names of the files that only one of two packages has, or whose contents differ."""
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def contents(package):
    """Return the contents of a package's files by name: the code, and the model that ships with the package."""
    files = [*package.rglob("*.py"), *package.glob("models/*/*")]
    return {str(file.relative_to(package)): file.read_bytes() for file in files}
