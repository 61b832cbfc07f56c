"""What the package says about itself: its version, its extras and its metadata."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from processes import run

import portable_gpt2 as pg

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_has_one_source():
    """Catches a version that was changed in one place and not in the others."""
    assert pg.__version__ == importlib.metadata.version("portable-gpt2") == PROJECT["version"]
    assert f"\nversion: {pg.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1] == pg.__version__


def test_the_version_is_looked_up_when_it_is_asked_for():
    """Catches an import that takes longer for the sake of the version."""
    code = """if True:
        import sys
        import portable_gpt2
        print("importlib.metadata" in sys.modules)
        print(portable_gpt2.__version__)
        print("numpy" in sys.modules)
        print(hasattr(portable_gpt2, "__wrong__"))"""
    assert run(code).split() == ["False", pg.__version__, "False", "False"]


def test_the_cuda_extras_of_jax_name_the_version_of_cuda():
    extras = PROJECT["optional-dependencies"]
    assert extras["jax-cuda"] == ["portable-gpt2[jax-cuda12]"]
    for version in ("12", "13"):
        assert extras[f"jax-cuda{version}"][0].startswith(f"jax[cuda{version}]>=")


@pytest.mark.parametrize("minor", range(11, 14))
def test_the_classifiers_name_the_versions_of_python(minor):
    assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]
    assert PROJECT["requires-python"] == ">=3.11"
