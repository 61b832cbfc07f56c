"""Every public function documents its parameters and results, and its examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import portable_gpt2 as pg
from portable_gpt2 import numerics
from portable_gpt2.numerics import bounds

MODULES = [m.name for m in pkgutil.walk_packages(pg.__path__, "portable_gpt2.") if not m.name.endswith("__main__")]
NOT_METHODS = {"Backend"}  # which an adapter implements and a user hardly calls: each member has its sentence


def public():
    """Yield every public function, class and method, with its name."""
    modules = {"": pg, "numerics.": numerics, "bounds.": bounds}
    for name, thing in [(f"{prefix}{key}", getattr(m, key)) for prefix, m in modules.items() for key in m.__all__]:
        if name == "bounds.FORMATS":
            continue
        yield name, thing
        if inspect.isclass(thing) and name not in NOT_METHODS:
            for key, member in vars(thing).items():
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod)):
                    yield f"{name}.{key}", getattr(thing, key)


PUBLIC = dict(public())


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    """Catches an example that no longer shows what is computed; they run on NumPy."""
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def section(doc, title):
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_described(name):
    """Catches a parameter that was added, renamed or removed, and not in the docstring."""
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    takes = [p for p in inspect.signature(thing).parameters if p != "self"]
    described = re.findall(r"^(\**\w+(?:, \**\w+)*)(?: : |$)", section(doc, "Parameters"), re.MULTILINE)
    names = [each.lstrip("*") for line in described for each in line.split(", ")]
    if not names and len(takes) <= 2:
        return  # what its first sentence says
    assert names == takes or sorted(names) == sorted(takes)


@pytest.mark.parametrize("name", [name for name in PUBLIC if "." not in name])
def test_everything_public_has_an_example(name):
    """Catches something that one has to guess how to use."""
    if not (inspect.isclass(PUBLIC[name]) and issubclass(PUBLIC[name], Exception)):
        assert ">>>" in inspect.getdoc(PUBLIC[name])


def test_the_tests_look_at_everything():
    """Catches a search that finds nothing."""
    finder = doctest.DocTestFinder()
    assert {"portable_gpt2.ops", "portable_gpt2.checkpoint.hub", "portable_gpt2.language_model"} <= set(MODULES)
    assert {"softmax", "GPT2.load", "GPT2.score", "Tokenizer.encode", "GPT2Config.published"} <= set(PUBLIC)
    assert sum(bool(found.examples) for name in MODULES for found in finder.find(importlib.import_module(name))) > 25
