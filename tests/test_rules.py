"""The rules of the house: portable code knows no framework, an adapter computes with its own, and importing is lazy.

The files are those of the installed packages. Every rule that reads code has a test that shows what it finds.
"""

import ast
import importlib.util
import inspect
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import array_api_strict
import frameworks
import numpy as np
import processes
import pytest

import portable_gpt2 as pg
from portable_gpt2.backend import Backend
from portable_gpt2.testing.contract import namespace

ADAPTERS = "portable_gpt2_backends"
FRAMEWORKS = set(frameworks.FRAMEWORKS)
ARITHMETIC = {"flint"}  # certificates and the bounds for float64 need its balls, whichever backend the user chose
NAMED = FRAMEWORKS - ARITHMETIC | {"array_api_strict", "eagertensor", "tracer"}
FORBIDDEN = FRAMEWORKS | {
    ADAPTERS,
    "jaxlib",
    "keras",
    "flax",
    "functorch",
    "array_api_compat",
    "onnx",
    "onnxruntime",
    "spox",
}
CONVERSIONS = {"numpy", "__array__", "tolist", "item", "device_get", "eval_numpy", "make_ndarray", "as_numpy_iterator"}
NO_CONVERSIONS = {"ndarray", "int32", "dtype", "finfo"}  # of NumPy: what converts no array
ARRAY_ATTRIBUTES = (set(dir(np.ndarray)) | {"numpy", "detach", "cpu", "cuda", "to", "at", "set_shape"}) - {"dtype"}
WHO_IT_IS = re.compile(r"\b(backend|owner)\w*(\(.*\))?\.(name|__class__)\b|\btype\((\w+\.)*(backend|owner)\w*\)")
NOT_ARRAYS = re.compile(
    r"(xp|backend|math|self|recipe)(\.\w+)*|backend_of\(\w+\)|(\w+\.)*finfo\(.*\)|f?['\"].*['\"]", re.DOTALL
)


def files(package):
    """Return the source files of an installed package."""
    return sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))


def portable(name):
    return Path(importlib.util.find_spec(f"portable_gpt2.{name}").origin)


PORTABLE = files("portable_gpt2")
PORTABLE_ROOT = Path(importlib.util.find_spec("portable_gpt2").origin).parent
# Where portable code handles arrays of a backend; elsewhere it handles NumPy's, on the host.
OF_ARRAYS = [
    *map(portable, ("signature", "op", "ops", "cache", "model", "gradients", "generation.choice", "training.optimizer"))
]
# Imports run one way: a module imports modules of its own layer and of those above it in this list, and no others.
LAYERS = [
    {"numerics"},
    {"backend", "host", "options", "random", "strict_json"},
    {"registry"},
    {"checks", "config", "files"},
    {"signature"},
    {"op"},
    {"ops", "params", "tokenizer", "tokenizer_files"},
    {"cache", "divided", "mesh", "sampling", "correct_rounding"},
    {"model"},
    {"gradients", "generation", "checkpoint", "score", "export", "fingerprint"},
    {"training", "language_model", "plot", "certificate"},
    {"pages"},
    {"comparison"},
    {"api"},
    {"__init__"},
    {"testing"},
    {"cli"},
    {"__main__"},
]
OF_ADAPTERS = {"backend", "host", "numerics"}  # the modules that an adapter may import
OF_NUMPY = ("numpy", "flint")  # the adapters whose arrays are arrays of NumPy: flint has none of its own
OTHER_ADAPTERS = [path for path in files(ADAPTERS) if path.stem not in ("__init__", "formats", *OF_NUMPY)]
by_name = {"ids": lambda path: path.stem}


def docstrings(tree):
    """Return the ids of the nodes that are docstrings."""
    bodies = [getattr(node, "body", None) for node in ast.walk(tree)]
    first = [body[0] for body in bodies if isinstance(body, list) and body]
    return {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}


# The rules: each takes a tree and yields what breaks it.


def imports_of_frameworks(tree):
    """Yield imports of a framework or an adapter, at any depth, by statement or by function."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            begun = [a.values[0] if isinstance(a, ast.JoinedStr) else a for a in node.args]  # f".{name}" is our own
            names = [a.value for a in begun if isinstance(a, ast.Constant)] or ["?"]
        for name in names:
            if name.partition(".")[0] in FORBIDDEN or name == "?":
                yield f"line {node.lineno}: imports {name}"


def names_of_frameworks(tree):
    """Yield strings that are a framework's name, and comparisons with a backend's name or type.

    ``numpy`` and ``flint`` may be named where a default is chosen; they may not be compared with.
    """
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        compared = []
        match node:
            case ast.Constant(value=str(text)) if text.lower() in NAMED and id(node) not in skipped:
                yield f"line {node.lineno}: names {text}"
            case ast.Call(func=ast.Name("isinstance"), args=[_, kind]) if re.search(r"\wBackend\b", ast.unparse(kind)):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Compare():
                compared = [node.left, *node.comparators]
            case ast.Match(subject=subject):
                compared = [subject]
            case ast.Subscript(slice=index):
                compared = [index]
            case ast.Call(func=ast.Attribute(value, "startswith" | "endswith" | "get")):
                compared = [value, *node.args]
        for side in compared:
            if WHO_IT_IS.search(ast.unparse(side)) or (
                isinstance(side, ast.Constant) and side.value in {"numpy", *ARITHMETIC}
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def functions_outside_the_standard(tree):
    """Yield what is taken from an array namespace and is not in the standard."""
    for node in ast.walk(tree):
        of_namespace = isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] == "xp"
        if of_namespace and (node.attr.startswith("_") or not hasattr(array_api_strict, node.attr)):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def uses_of_the_namespace(tree):
    """Yield the name of each function and dtype that is taken from a namespace, and the keywords if it is called.

    The defaults of `Backend` pass ``device`` in a dict, which counts as that keyword.
    """
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] == "xp":
            call = calls.get(id(node))
            keywords = call and tuple(sorted(keyword.arg or "device" for keyword in call.keywords))
            yield node.attr, keywords


def attributes_of_arrays(tree):
    """Yield what arrays have, `dtype` excepted, wherever it is asked of anything but a module, a backend or a text."""
    for node in ast.walk(tree):
        asked = isinstance(node, ast.Attribute) and node.attr in ARRAY_ATTRIBUTES
        if asked and not NOT_ARRAYS.fullmatch(ast.unparse(node.value)):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def modules_of_ours(tree, package):
    """Yield the line and the name of each module of ours that is imported, at any depth, for types only too.

    A name is that of the module or sub-package directly below `portable_gpt2`; `package` is that of the code, as in
    ``portable_gpt2.training``.
    """
    ours = {path.stem if path.parent.name == "portable_gpt2" else path.parent.name for path in PORTABLE}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *rest = name.split(".")
            if root == "portable_gpt2":
                yield node.lineno, rest[0] if rest and rest[0] in ours else "__init__"


def imports_of_higher_layers(tree, name, package):
    """Yield imports of modules that stand in a higher layer than the module that has this name."""
    layer = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    for line, imported in modules_of_ours(tree, package):
        if layer.get(imported, -1) > layer.get(name, len(LAYERS)):  # one without a layer is another test's finding
            yield f"line {line}: {name} imports {imported}"


def place(path):
    """Return the name that a file has in LAYERS, and its package: those of a sub-package share one name."""
    parts = path.relative_to(PORTABLE_ROOT).with_suffix("").parts
    return parts[0], ".".join(["portable_gpt2", *parts[:-1]])


def conversions_to_numpy(tree):
    """Yield what takes an array through NumPy, outside `put`, `to_numpy` and `read_checkpoint`."""
    if isinstance(tree, ast.FunctionDef) and tree.name in ("put", "to_numpy", "read_checkpoint"):
        return
    match tree:
        case ast.Call(func=ast.Attribute(attr=method)) if method in CONVERSIONS:
            yield f"line {tree.lineno}: {ast.unparse(tree)}"
        case ast.Call(func=ast.Name("memoryview")):
            yield f"line {tree.lineno}: {ast.unparse(tree)}"
        case ast.Attribute(value=ast.Name("np" | "numpy"), attr=name) if name not in NO_CONVERSIONS:
            yield f"line {tree.lineno}: {ast.unparse(tree)}"
    for child in ast.iter_child_nodes(tree):
        yield from conversions_to_numpy(child)


def broken(rule, path):
    return list(rule(ast.parse(path.read_text("utf-8"))))


def found(rule, code):
    return list(rule(ast.parse(code)))


@pytest.mark.parametrize("path", PORTABLE, **by_name)
def test_portable_code_imports_no_framework(path):
    """Catches the first `import torch` in portable code, however deep it stands."""
    found = broken(imports_of_frameworks, path)
    assert [each for each in found if path.stem != "bounds" or not each.endswith("imports flint")] == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch",
        "import numpy, jax.numpy as jnp",
        "def f():\n    if x:\n        from tensorflow import function",
        "if TYPE_CHECKING:\n    import torch",
        "from portable_gpt2_backends.jax import JaxBackend",
        "importlib.import_module('torch.nn')",
        "__import__('jax')",
        "importlib.import_module(name)",
    ],
)
def test_an_import_of_a_framework_is_found(code):
    """Catches a rule that has gone blind."""
    assert found(imports_of_frameworks, code)


@pytest.mark.parametrize("path", PORTABLE, **by_name)
def test_imports_run_one_way(path):
    """Catches the model that imports generation, an op that imports the model: a cycle, or the beginning of one."""
    name, package = place(path)
    assert list(imports_of_higher_layers(ast.parse(path.read_text("utf-8")), name, package)) == []


@pytest.mark.parametrize("path", files(ADAPTERS), **by_name)
def test_adapters_import_the_interface_alone(path):
    """Catches an adapter that imports an op or the model, of which it would have to know too much."""
    imported = {name for _, name in modules_of_ours(ast.parse(path.read_text("utf-8")), ADAPTERS)}
    assert imported <= OF_ADAPTERS


@pytest.mark.parametrize(
    ("code", "package"),
    [
        ("from .generation import decoder", "portable_gpt2"),
        ("from . import language_model", "portable_gpt2"),
        ("def f():\n    from ..training.run import Run", "portable_gpt2.checkpoint"),
        ("from .. import cli", "portable_gpt2.checkpoint"),
        ("import portable_gpt2.cli.options", "portable_gpt2"),
        ("from portable_gpt2 import softmax", "portable_gpt2"),
        ("if TYPE_CHECKING:\n    from .training import Run", "portable_gpt2"),
    ],
)
def test_an_import_of_a_higher_layer_is_found(code, package):
    """Catches a rule that has gone blind."""
    assert list(imports_of_higher_layers(ast.parse(code), "model", package))
    assert not list(imports_of_higher_layers(ast.parse("from .ops import gelu"), "model", "portable_gpt2"))
    assert not list(imports_of_higher_layers(ast.parse("from ..ops import gelu"), "model", "portable_gpt2.training"))


def test_every_module_has_its_layer():
    """Catches a new module that the rule about imports does not know, and a name in LAYERS that is no longer used."""
    modules, known = {place(path)[0] for path in PORTABLE}, {name for layer in LAYERS for name in layer}
    assert modules == known, f"correct LAYERS in this file by {', '.join(modules ^ known)}"


@pytest.mark.parametrize("path", PORTABLE, **by_name)
def test_portable_code_asks_no_backend_who_it_is(path):
    """Catches `if backend.name == "jax"`: a difference between frameworks belongs in an adapter."""
    assert broken(names_of_frameworks, path) == []


@pytest.mark.parametrize(
    "code",
    [
        "if backend.name == 'jax': pass",
        "if backend.name == default: pass",
        "fast = backend.name in names",
        "if 'numpy' != backend.name: pass",
        "match backend.name:\n    case 'torch': pass",
        "step = {'tensorflow': 1}.get(kind)",
        "step = steps[backend.name]",
        "if self.backend.name.startswith('t'): pass",
        "if type(backend) is type(other): pass",
        "if backend.__class__ is NumpyBackend: pass",
        "isinstance(backend, JaxBackend)",
        "isinstance(x, JaxBackend)",
        "if kind == 'numpy': pass",
    ],
)
def test_a_question_who_a_backend_is_is_found(code):
    """Catches a rule that has gone blind."""
    assert found(names_of_frameworks, code)


@pytest.mark.parametrize("path", PORTABLE, **by_name)
def test_portable_code_stays_within_the_array_api_standard(path):
    """Catches `xp.einsum`: a function that the frameworks at hand have, and the standard has not."""
    assert broken(functions_outside_the_standard, path) == []


@pytest.mark.parametrize("code", ["xp.einsum('ij', x)", "backend.xp.split(x, 3)", "self.backend.xp.float16", "xp._x"])
def test_a_function_outside_the_standard_is_found(code):
    """Catches a rule that has gone blind."""
    assert found(functions_outside_the_standard, code)


def checked_uses():
    return {use for text in namespace.EXPRESSIONS for use in found(uses_of_the_namespace, text)}


def test_the_kit_checks_every_function_that_portable_code_uses():
    """Catches a call, or a keyword, that a backend's author can learn of only by an error; and one that is not used."""
    paths = [path for path in PORTABLE if "testing" not in path.parts]
    uses, checked = {use for path in paths for use in broken(uses_of_the_namespace, path)}, checked_uses()
    assert {name for name, _ in uses} == {name for name, _ in checked}
    assert {use for use in uses - checked if use[1] is not None} == set()
    assert checked - uses == set()


def test_the_documentation_of_xp_lists_what_the_kit_checks():
    """Catches a docstring that leaves out a function or a keyword, or has one more."""
    doc = re.search(r'    xp: ClassVar\[Any\]\n    """(.*?)"""', inspect.getsource(Backend), re.DOTALL)[1]
    listed = {name: set() for name in re.findall(r"``((?:float|int)\d+)``", doc)}
    for text in re.findall(r"``(\w+\(.*?\))``", doc, re.DOTALL):
        call = ast.parse(text, mode="eval").body
        listed[call.func.id] = {keyword.arg for keyword in call.keywords}
    checked = {}
    for name, keywords in checked_uses():
        checked.setdefault(name, set()).update(keywords or ())
    assert listed == checked


def test_a_use_of_the_namespace_is_found():
    """Catches a rule that has gone blind."""
    code = "xp.max(backend.xp.exp(x), keepdims=True, axis=1); self.backend.xp.float32; xp.zeros(n, **where)"
    expected = {("max", ("axis", "keepdims")), ("exp", ()), ("float32", None), ("zeros", ("device",))}
    assert set(found(uses_of_the_namespace, code)) == expected


@pytest.mark.parametrize("path", OF_ARRAYS, **by_name)
def test_portable_code_asks_arrays_for_nothing_but_their_dtype(path):
    """Catches `x.shape`, which holds None in TensorFlow; `x.T`, `x.sum()` and the rest that some arrays lack."""
    assert broken(attributes_of_arrays, path) == []


@pytest.mark.parametrize("code", ["x.shape", "x.T", "f(x).sum()", "w[0].reshape(2)", "x.at[0]", "x.device", "-x.real"])
def test_an_attribute_of_an_array_is_found(code):
    """Catches a rule that has gone blind."""
    assert found(attributes_of_arrays, code)
    assert not found(attributes_of_arrays, "x.dtype, backend.shape(x), xp.sum(x), ', '.join(y), x[..., 1:]")


@pytest.mark.parametrize("path", OTHER_ADAPTERS, **by_name)
def test_adapters_compute_with_their_own_framework(path):
    """Catches an adapter that takes the way through NumPy: off the device, out of the graph, without a gradient."""
    assert broken(conversions_to_numpy, path) == []


@pytest.mark.parametrize(
    "code",
    [
        "def write(buffer, value):\n    return np.asarray(buffer)",
        "def _embed(ids, w):\n    return w[ids.numpy()]",
        "np.take(x, i)",
        "x = jax.device_get(x)",
        "y = f(np.exp)",
        "n = x.item()",
        "memoryview(x)",
        "class A:\n    def arange(self, n):\n        return tf.constant(np.arange(n))",
    ],
)
def test_a_conversion_to_numpy_is_found(code):
    """Catches a rule that finds nothing; conversions in `to_numpy` and `put` are permitted."""
    assert found(conversions_to_numpy, code)
    assert not found(conversions_to_numpy, "def to_numpy(self, x):\n" + textwrap.indent(code, "    "))


def test_the_rules_read_every_file():
    """Catches a file that the rules pass over."""
    assert {path.stem for path in PORTABLE} >= {"backend", "ops", "model", "language_model", "commands"}
    assert {path.stem for path in OTHER_ADAPTERS} == FRAMEWORKS - {*OF_NUMPY} | {"onnx_graphs", "onnx_ops"}


def test_no_module_has_the_name_of_something_else():
    """Catches `portable_gpt2.score`, say, that is a module until a function of this name is imported."""
    for name in ["portable_gpt2", *(m.name for m in pkgutil.walk_packages(pg.__path__, "portable_gpt2.") if m.ispkg)]:
        package = importlib.import_module(name)
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        public = getattr(package, "__all__", vars(package))
        taken = [each for each in modules & {*public} if not inspect.ismodule(getattr(package, each))]
        assert taken == [], name


# Laziness, in processes of its own


def modules_after(code, path=()):
    """Return the top-level modules that a fresh interpreter holds after some code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(processes.run(f"{code}\n{report}", path=path).split())


def test_importing_imports_no_framework():
    """Catches an import that each user would wait for, whatever they use."""
    after = modules_after("import portable_gpt2.api")
    assert "portable_gpt2" in after
    assert not after & (FORBIDDEN - {ADAPTERS} | {"jaxtyping", "beartype", "tqdm", "transformers", "scipy", "pandas"})


def test_choosing_a_backend_imports_what_its_framework_imports_alone(backend):
    """Catches an adapter that drags in more than its framework: TensorFlow itself imports JAX where it finds one."""
    name = backend.name
    path = [Path(sys.modules[type(backend).__module__].__file__).parent] if name == "array_api_strict" else []
    alone = modules_after(f"import {name}, {backend.array_types[0].__module__}") | modules_after(
        "import portable_gpt2.api"
    )
    after = modules_after(f"import portable_gpt2 as pg; pg.get_backend({name!r})", path)
    assert name in after
    assert after - alone <= {ADAPTERS, "portable_gpt2_strict"}


def test_an_array_is_looked_up_without_importing_a_framework():
    """Catches a search for an array's owner that imports the candidates."""
    code = """if True:
        import numpy as np
        import portable_gpt2 as pg
        pg.softmax(np.ones(3))
        pg.available_backends()
        try:
            pg.softmax([1.0])
        except TypeError as error:
            assert "got builtins.list" in str(error)"""
    assert not modules_after(code) & FRAMEWORKS


def test_known_backends_are_told_without_importing_them():
    """Catches a list of backends that is made by importing them; the entry points say it."""
    code = "from portable_gpt2.registry import known_backends; import sys; print(*known_backends(), *sys.modules)"
    told = processes.run(code).split()
    known, modules = told[: len(frameworks.OURS)], told[len(frameworks.OURS) :]
    assert set(known) == set(frameworks.OURS)
    assert not set(modules) & FRAMEWORKS


def test_a_session_runs_every_test_of_ball_arithmetic():
    """Catches a file of tests that needs the backend flint, and that no session of nox names."""
    here = Path(__file__).parent
    need = [path for path in here.glob("test_*.py") if re.search(r"^pytestmark = .*\"flint\"", path.read_text(), re.M)]
    (line,) = re.findall(r'"flint": \[(.*)\]', (here.parent / "noxfile.py").read_text())
    assert {path.name for path in need} == set(re.findall(r"tests/(test_\w+\.py)", line))
