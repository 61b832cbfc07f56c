"""The notebooks of the documentation run on every backend, and the numbers of the notebooks of 2019 are the same.

The two notebooks of 2019 that this project began as are "Softmax function" and "1D Convolution".

They ran TensorFlow 1 in float32. What they print is compared as it is printed; what follows from it, and is not
printed, is held to its bound. The notebooks' two questions about speed are rows of `bench.ops`. On a GPU they have not
been measured yet; ``python -m bench.gpu`` measures them there.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.numerics import bounds, stated
from portable_gpt2.testing import claims

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"

SMALL = {  # assignments that are replaced, so that a notebook runs in seconds
    "conv1d": {"SECONDS": "0.001"},
    "four_frameworks": {"LENGTH": "8", "SAMPLES": "1"},
    "gpt2_in_one_sitting": {"LENGTH": "4"},
    "inside": {"STEPS": "20", "LETTERS, LENGTH, BATCH": "8, 48, 8"},
    "softmax": {"SECONDS": "0.001"},
    "train": {"CONTEXT": "48", "SCRATCH_STEPS": "20", "TUNED_STEPS": "5"},
    "where_two_models_part": {},
}
COMPILE_LONG = ("gpt2_in_one_sitting", "inside", "train", "where_two_models_part")
"""The notebooks that take up to a minute where a function is compiled for each shape."""


@pytest.mark.parametrize("name", sorted(file.stem for file in NOTEBOOKS.glob("*.py")))
def test_a_notebook_runs(backend, name, capsys, monkeypatch, request):
    """Catches a notebook that fails, or whose own assertions do, on one of the backends.

    With --full-notebooks it runs as it is. Otherwise some sizes are smaller.
    """
    is_full = request.config.getoption("--full-notebooks")
    if not is_full and (backend.name == "array_api_strict" or (backend.compiles_per_shape and name in COMPILE_LONG)):
        pytest.skip("takes long on this backend; runs with --full-notebooks")
    pytest.importorskip("matplotlib")
    source = (NOTEBOOKS / f"{name}.py").read_text()
    for variable, value in {} if is_full else SMALL[name].items():
        source, n = re.subn(rf"(?m)^{re.escape(variable)} = [^#\n]*", f"{variable} = {value}  ", source)
        assert n == 1, f"{name}.py assigns {variable} {n} times"
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with pg.use_backend(backend), np.errstate():  # the notebooks change NumPy's error handling
        exec(compile(source, str(NOTEBOOKS / f"{name}.py"), "exec"), {"__name__": "notebook"})
    if name == "gpt2_in_one_sitting":
        n_lines = len(source.splitlines()) + len(capsys.readouterr().out.splitlines())
        assert n_lines <= 400


X = {
    "x": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]],
    "innermost max": [[3.0], [6.0], [9.0]],
    "x2": [[-2.0, -1.0, 0.0]] * 3,
    "ex": [[0.13533528, 0.36787945, 1.0]] * 3,
    "softmax": [[0.09003057, 0.24472848, 0.66524094]] * 3,
}
Y = {
    "x": [[1.0, 1.0], [3.0, 2.0], [5.0, 9.0]],
    "innermost max": [[1.0], [3.0], [9.0]],
    "x2": [[0.0, 0.0], [0.0, -1.0], [-4.0, 0.0]],
    "ex": [[1.0, 1.0], [1.0, 0.36787945], [0.01831564, 1.0]],
    "softmax": [[0.5, 0.5], [0.7310586, 0.26894143], [0.01798621, 0.98201376]],
}
T1 = [
    [[14.639416, 12.471731], [6.287172, -10.907554], [-29.439354, -0.95316064]],
    [[-15.58526, 6.7059565], [48.06688, -12.80599], [30.347822, 25.95503]],
    [[3.0517344, 5.536769], [6.2067804, 19.347296], [-24.396057, 19.345951]],
    [[31.135847, -21.138882], [4.2857533, -42.758995], [-52.921906, 16.973293]],
]
CONV_X = [  # the first ten rows of a [10, 5, 2, 5] array
    [0.07658765, 0.04895405, 0.124433, -0.05023674, 0.04844861],
    [0.12777634, 0.12834941, -0.01176266, 0.00315703, 0.04139599],
    [0.06210099, -0.11199301, 0.04728961, 0.0943329, -0.06406869],
    [-0.07931602, 0.00194503, 0.10381359, 0.12318434, -0.059056],
    [0.10104392, 0.05950567, 0.05337623, 0.1072495, -0.06844246],
    [-0.06089064, 0.00720017, -0.09416069, 0.04207127, 0.06000267],
    [-0.0563634, 0.06557035, 0.04362001, -0.07150251, -0.08896986],
    [-0.06255972, 0.07716727, -0.00532429, -0.01867719, 0.07079968],
    [0.10159498, -0.0923056, -0.02886729, 0.08614555, 0.06152003],
    [-0.1159213, 0.00027074, -0.12597306, 0.04455833, -0.07581854],
]
CONV_W = [
    [-0.07940796, 0.00197585, 0.00018248],
    [-0.00122991, 0.0344775, -0.01567264],
    [0.00232023, 0.0014641, 0.00430911],
    [0.01905786, 0.04127663, -0.00423453],
    [-0.00066937, 0.00336457, 0.02230392],
]


def as_printed(a):
    """Return a float32 array rounded as the notebook printed it, with NumPy's eight digits."""
    assert a.dtype == np.float32
    return np.array2string(a, precision=8)


def assert_prints(result, printed, ulps=0):
    """Hold a float32 result to the printed digits, and to a few units in the last place of what was computed there."""
    printed = np.asarray(printed, np.float32)
    if ulps == 0:
        assert as_printed(result) == as_printed(printed)
    allowed = ulps * np.spacing(np.abs(printed))
    assert np.all(np.abs(result - printed) <= allowed)


@pytest.mark.every_device
@pytest.mark.parametrize("table", [X, Y], ids=["x", "y"])
def test_every_step_of_softmax_prints_what_the_notebook_prints(backend, table):
    """Catches a namespace whose max, difference or exp is not the notebook's, or that reduces the wrong axis.

    Exp is given one unit in the last place: the notebook's own was one of several.
    """
    xp = backend.xp
    x = backend.from_numpy(np.asarray(table["x"], np.float32))
    largest = xp.max(x, axis=-1, keepdims=True)
    shifted = x - largest
    assert_prints(backend.to_numpy(largest), table["innermost max"])
    assert_prints(backend.to_numpy(shifted), table["x2"])
    assert_prints(backend.to_numpy(xp.exp(shifted)), table["ex"], ulps=1)


@pytest.mark.every_device
@pytest.mark.parametrize("table", [X, Y], ids=["x", "y"])
def test_softmax_prints_what_the_notebook_prints(backend, table):
    """Catches any other function; the exact values and ours each lie within a unit in the last place of the printed."""
    for computed in claims.results(pg.softmax, backend, np.asarray(table["x"], np.float32)).values():
        assert_prints(computed, table["softmax"], ulps=1)


@pytest.mark.every_device
@pytest.mark.parametrize("table", [X, Y], ids=["x", "y"])
def test_all_equal(backend, table):
    """Catches a definition that is not its four lines: the notebook compares them, and prints True throughout."""
    xp = backend.xp
    x = backend.from_numpy(np.asarray(table["x"], np.float32))
    ex = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    by_hand = backend.to_numpy(ex / xp.sum(ex, axis=-1, keepdims=True))
    np.testing.assert_array_equal(backend.to_numpy(pg.softmax.reference(x)), by_hand)


@pytest.mark.every_device
@pytest.mark.parametrize("shape", [(4, 3, 2), (36, 10, 4, 3, 2)], ids=["t1", "t2"])
def test_softmax_of_the_larger_tensors(backend, shape):
    """Catches axes that are mixed up beyond two of them; a spread, of 70 in t1, that over- or underflows."""
    t2 = np.random.default_rng(2019).normal(0, 20, (36, 10, 4, 3, 2)).astype(np.float32)
    t = np.asarray(T1, np.float32) if shape == (4, 3, 2) else t2
    assert t.shape == shape
    bound = bounds.softmax(t, numerics=stated(backend, "float32"))
    claims.assert_within(bound, claims.results(pg.softmax, backend, t))


@pytest.mark.every_device
def test_conv1d_of_the_notebook(backend):
    """Catches a weight that is transposed, or axes that are flattened in another order than they are restored."""
    x = np.random.default_rng(2019).uniform(-0.13, 0.13, (10, 5, 2, 5)).astype(np.float32)
    x.reshape(100, 5)[:10] = CONV_X
    w, b = np.asarray(CONV_W, np.float32), np.zeros(3, np.float32)
    results = claims.results(pg.conv1d, backend, x, w, b)
    assert {result.shape for result in results.values()} == {(10, 5, 2, 3)}
    claims.assert_within(bounds.linear(x, w, b), results)
