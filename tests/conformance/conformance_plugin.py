"""Restrict the official array API tests to what portable code asks of a namespace.

That is the functions which it calls: of real numbers, without reliance on type promotion, over at least one axis.
"""

import re

import portable_gpt2 as pg
from portable_gpt2.testing.contract import namespace

CALLED = {name for text in namespace.EXPRESSIONS for name in re.findall(r"\bxp\.(\w+)", text)}
PARAMETRISED = "func_signature|has_names|unary|binary|nan_propagation|empty_arrays"
BY_PARAMETER = re.compile(rf"test_(?:{PARAMETRISED})\[(?:\w+-)?(\w+)")


def is_tested(item, functions, known):
    """Return whether a test tests one of the functions with real numbers."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if re.search(r"complex|real\(|imag\(|linalg", f"{item.name} {parameters}"):
        return False
    by_parameter = BY_PARAMETER.match(item.name)
    name = by_parameter[1] if by_parameter else item.name.partition("[")[0].removeprefix("test_")
    return name in functions or (name not in known and any(name.startswith(f"{f}_") for f in functions))


def pytest_configure(config):
    from array_api_tests import hypothesis_helpers

    pairs = hypothesis_helpers.promotable_dtypes
    pairs[:] = [(one, other) for one, other in pairs if one == other]
    axes = hypothesis_helpers.axes
    hypothesis_helpers.axes = lambda ndim: axes(ndim).filter(lambda axis: axis != ())


def pytest_collection_modifyitems(config, items):
    from array_api_tests.stubs import name_to_func

    functions = {name for name in CALLED & name_to_func.keys() if hasattr(pg.get_backend().xp, name)}
    kept = [item for item in items if is_tested(item, functions, name_to_func)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
