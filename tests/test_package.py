"""What the package says about itself: its version, its extras and its metadata."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from processes import run

import portable_gpt2 as pg

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import promises  # noqa: E402

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


def test_the_classifiers_name_the_versions_of_python():
    """Catches a version of Python that nox tests and that the metadata leaves out: nox reads the classifiers."""
    named = [line for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.", line)]
    assert named == [f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == ">=3.11"


def sessions():
    """Return the names of the sessions of nox."""
    for node in ast.parse((ROOT / "noxfile.py").read_text("utf-8")).body:
        for decorator in getattr(node, "decorator_list", []):
            if "nox.session" in ast.unparse(decorator):
                named = [each.value.value for each in getattr(decorator, "keywords", []) if each.arg == "name"]
                yield named[0] if named else node.name


def test_the_table_for_contributors_has_every_session():
    """Catches a session that was added or renamed, and that nobody finds."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    listed = {re.sub(r"\(.*", "", name) for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert listed == {*sessions()}
    assert {"tests", "lowest", "train-shakespeare"} <= listed


def test_every_dependency_has_a_lower_bound():
    """Catches a promise that the session `lowest` cannot test."""
    for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items():
        for name, requirement in promises.promises({**PROJECT, "dependencies": lines}, []).items():
            assert [each.operator for each in requirement.specifier] == [">="], (extra, name)
    assert {"numpy", "ml-dtypes"} <= {*promises.promises(PROJECT, [])}
    assert {"jax", "torch", "python-flint"} <= {*promises.promises(PROJECT, ["all", "testing"])}


@pytest.mark.parametrize(
    ("line", "version", "is_broken"),
    [
        ("numpy>=2.3", "2.3.0", False),
        ("safetensors>=0.6", "0.6.1", False),
        ("tensorflow>=2.18", "2.20.0", True),
        ("jax>=0.1", "0.10.2", True),
        ("pytest>=8", "8.0.0", False),
    ],
)
def test_a_promise_that_nothing_can_keep_is_found(line, version, is_broken):
    """Catches a lower bound below the lowest version that could be installed."""
    assert promises.broken(promises.Requirement(line), version) == is_broken


def test_the_package_that_excludes_a_version_is_named():
    """Catches a report that does not say why the newest version is not installed."""
    assert "portable-gpt2 needs numpy>=2.3" in promises.excluded_by("numpy", "2.2.0")
    assert promises.excluded_by("numpy", importlib.metadata.version("numpy")) == []
