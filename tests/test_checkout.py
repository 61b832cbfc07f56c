"""A bare pytest tests the code of the checkout, and not a copy that was installed before the last change."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkout
import processes
import pytest


@pytest.fixture
def copy(tmp_path):
    """A directory that holds a copy of both packages, as site-packages does."""
    for name, directory in checkout.PACKAGES.items():
        shutil.copytree(directory, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def spoil(copy, how):
    file = copy / "portable_gpt2_backends" / "numpy.py"
    match how:
        case "changed":
            file.write_text(file.read_text() + "\n")
        case "removed":
            file.unlink()
        case "added":
            file.with_name("other.py").touch()
    return "other.py" if how == "added" else "numpy.py"


def test_an_equal_copy_is_accepted(copy):
    """Catches a check that would refuse what nox installs."""
    code = "import checkout; checkout.refuse_a_stale_copy(); import portable_gpt2; print(portable_gpt2.__file__)"
    printed = processes.run(code, path=[copy, Path(checkout.__file__).parent])
    assert printed.strip() == str(copy / "portable_gpt2" / "__init__.py")


@pytest.mark.parametrize("how", ["changed", "removed", "added"])
def test_a_stale_copy_is_refused(copy, how):
    """Catches a run that is green because it tests the code of last week; the message says what to do."""
    name = spoil(copy, how)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "tests/test_files.py"],
        cwd=checkout.ROOT,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode not in (0, 5)
    assert f"portable_gpt2_backends is a copy of {checkout.ROOT / 'backends'}" in done.stderr
    assert f"differs from it in {name}. " in done.stderr
    for command in ("nox -s dev", "pip install --no-deps --editable ."):
        assert command in done.stderr
    assert "Traceback" not in done.stderr
    assert "passed" not in done.stdout


def test_a_package_that_is_not_installed_is_named():
    """Catches an ImportError in the middle of conftest.py; the message says what to do."""
    code = """if True:
        import importlib.util
        importlib.util.find_spec = lambda name: None
        import checkout
        try:
            checkout.refuse_a_stale_copy()
        except SystemExit as error:
            print(error)"""
    message = processes.run(code, path=[Path(checkout.__file__).parent])
    assert message.startswith("portable_gpt2 is not installed. Install the checkout")
