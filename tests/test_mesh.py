"""A model on several devices computes what it computes on one, and the devices tell each other no more than needed."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import on_meshes
import pytest

import portable_gpt2 as pg
from portable_gpt2.generation.mesh_decoder import MeshDecoder
from portable_gpt2.host import TIMEOUT_VARIABLE, mesh_timeout
from portable_gpt2.mesh import Mesh, parse
from portable_gpt2.params import shapes
from portable_gpt2.sampling import Sampling
from portable_gpt2.testing.plain_gpt2 import random_weights, truth_and_error

# 61 rows of wte are not divisible by 2 or 4, so there is padding.
CONFIG = pg.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_vocab=61, n_ctx=32, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
# To start the processes and to compile takes half a minute for each mesh, so few meshes are tested unless the variable
# asks for all, as `nox -s mesh` does.
ALL = os.environ.get("PORTABLE_GPT2_MESHES") == "all"
ON_JAX = ["data=2,model=2"]
if ALL:
    ON_JAX += ["data=1,model=1", "model=2", "data=2", "data=4", "model=4", "data=2,model=4"]
OF_ONE = ["data=1,model=1"] if ALL else []
OF_TWO = ["model=2", "data=2"] if ALL else ["model=2"]
OF_FOUR = ["data=2,model=2", "data=4", "model=4"] if ALL else []
SUPPORT = Path(on_meshes.__file__)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "model"
    pg.GPT2(CONFIG, pg.params.nest(WEIGHTS)).save(path)
    return path


@pytest.fixture(scope="module")
def expected(directory):
    """What one device computes, by NumPy."""
    return on_meshes.computed(pg.GPT2.load(directory, backend="numpy"))


def run(command, **environment):
    """Return the lines of JSON that a command prints, by mesh."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=given)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["mesh"]: line for line in lines}


def torchrun(n, *arguments):
    """Return the command that starts n processes."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={n}",
        *map(str, arguments),
    ]


@pytest.fixture(scope="module")
def on_jax(directory, jax):
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"  # the last number counts
    return run([sys.executable, str(SUPPORT), "jax", str(directory), *ON_JAX], XLA_FLAGS=devices)


@pytest.fixture(scope="module")
def on_torch(directory, torch):
    found = {}
    for n, meshes in ((1, OF_ONE), (2, OF_TWO), (4, OF_FOUR)):
        found |= run(torchrun(n, SUPPORT, "torch", directory, *meshes)) if meshes else {}
    return found


@pytest.fixture(
    scope="module",
    params=[*(("jax", mesh) for mesh in ON_JAX), *(("torch", mesh) for mesh in OF_ONE + OF_TWO + OF_FOUR)],
    ids="-".join,
)
def found(request):
    """What an engine computes on a mesh."""
    engine, mesh = request.param
    return request.getfixturevalue(f"on_{engine}")[mesh]


def test_logits_are_as_near_to_the_truth_as_a_plain_implementation_is(found, record_property):
    """Catches a bias that is added once for each device, a sum that is forgotten, and heads that are cut in two."""
    truth, error = truth_and_error(WEIGHTS, on_meshes.IDS, CONFIG)
    logits = np.asarray(found["logits"])
    assert logits.shape == truth.shape
    ratio = float(abs(logits - truth).max() / (4 * error))  # pytest-xdist cannot send a number of NumPy
    record_property("error / bound", ratio)
    assert ratio <= 1
    assert abs(np.asarray(found["one row"]) - truth[:1]).max() <= 4 * error


def test_texts_are_those_of_one_device(found, expected):
    """Catches an id of another device's part, padding that is chosen, and a text that depends on its batch."""
    assert json.loads(json.dumps(found["texts"])) == json.loads(json.dumps(expected["texts"]))


def test_scores_are_those_of_one_device(found, expected):
    """Catches a sum over one device's part of the vocabulary, and padding that has a probability."""
    assert found["ranks"] == expected["ranks"]
    assert found["likeliest"] == expected["likeliest"]
    for name in ("log_probs", "likeliest_log_probs"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_the_devices_tell_each_other_no_more_than_needed(found):
    """Two sums in each block, and one after the embedding. No weight, and not all logits, are gathered in a step."""
    n, data = (parse(found["mesh"]).get(name, 1) for name in ("model", "data"))
    sums = 2 * CONFIG.n_layer + 1 if n > 1 else 0
    step, score = (found["collectives"][name] for name in ("step", "score"))
    d, batch = CONFIG.n_embd, 4 // data
    hidden = [size for name, size in step if name in ("all-reduce", "allreduce")]
    assert hidden == [batch * d] * sums
    gathered = [size for name, size in step if name not in ("all-reduce", "allreduce")]
    assert len(gathered) == 2 * (n > 1) + 2 * (data > 1)
    assert max(gathered, default=0) <= 4 * 8 * n  # up to 8 logits of each device for 4 texts
    # A score: the sums of the blocks, then one number per token, at most four times.
    sizes = [size for name, size in score if name in ("all-reduce", "allreduce")]
    rows = max(sizes, default=0) // d
    assert sizes[:sums] == [rows * d] * sums
    assert set(sizes[sums:]) <= {rows}
    assert 0 < len(sizes[sums:]) <= 4 or n == 1


def test_each_device_has_its_part_of_the_weights(found):
    """Catches a matrix that is whole on each device."""
    n = parse(found["mesh"]).get("model", 1)
    whole = sum(np.prod(shape) for path, shape in shapes(CONFIG).items() if Mesh.rule(path) is None)
    divided_ = sum(np.prod(shape) for path, shape in shapes(CONFIG).items() if Mesh.rule(path) is not None)
    padding = (-CONFIG.n_vocab % n) * CONFIG.n_embd
    assert found["elements"] == whole + (divided_ + padding) // n


# The rules and the refusals


def test_every_matrix_is_divided_and_no_vector_that_all_devices_need():
    """Catches a pattern that matches no path, or one too many."""
    ruled = {path.split("/", 1)[-1] for path in shapes(CONFIG) if Mesh.rule(path)}
    assert ruled == {
        "attn/c_attn/w",
        "attn/c_attn/b",
        "attn/c_proj/w",
        "mlp/c_fc/w",
        "mlp/c_fc/b",
        "mlp/c_proj/w",
        "wte",
    }


@pytest.mark.parametrize(
    "text", ["", "data", "data=", "data=x", "data=-1", "rows=2", "data=2,data=2", "data=2;model=2"]
)
def test_a_text_that_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match="expected sizes such as data=2,model=2"):
        parse(text)


def test_a_mesh_over_which_heads_cannot_be_divided_is_refused_with_those_that_can(directory, jax):
    """Catches heads that are cut in two."""
    config = pg.GPT2Config(n_layer=1, n_head=9, n_embd=36, n_vocab=61, n_ctx=32, eos_token_id=None)
    mesh = Mesh(pg.get_backend("jax"), {"model": 2})
    with pytest.raises(ValueError, match="model=2, which does not divide n_head = 9; use 1 or 3 or 9"):
        mesh.check(config)
    odd = pg.GPT2Config(n_layer=1, n_head=4, n_embd=8, n_inner=6, n_vocab=61, n_ctx=32, eos_token_id=None)
    mesh.check(odd)
    four = types.SimpleNamespace(sizes={"data": 1, "model": 4})
    with pytest.raises(ValueError, match=r"model=4, which does not divide n_inner = 6; use 1 or 2$"):
        Mesh.check(four, odd)


def test_a_mesh_that_does_not_fit_is_refused_when_a_model_is_loaded_or_trained(tmp_path, jax):
    """Catches a check that neither of them makes."""
    config = pg.GPT2Config(n_layer=1, n_head=3, n_embd=6, n_vocab=61, n_ctx=32, eos_token_id=None)
    pg.GPT2(config, pg.init_params(config, backend="numpy")).save(tmp_path / "model")
    for call in (
        lambda: pg.GPT2.load(tmp_path / "model", backend="jax", mesh={"model": 2}),
        lambda: pg.training.Trainer(config, pg.training.Recipe(batch_size=2), "jax", {"model": 2}),
    ):
        with pytest.raises(ValueError, match=r"model=2, which does not divide n_head = 3; use 1 or 3$"):
            call()


def test_any_number_of_devices_divides_a_vocabulary(jax):
    """Catches a vocabulary that must be a multiple of the devices: rows of padding are added."""
    mesh = Mesh(pg.get_backend("jax"), {"model": 2})
    assert [mesh.rows(n) for n in (60, 61)] == [60, 62]


@pytest.mark.parametrize(
    ("backend", "mesh", "reason"),
    [
        *(
            (name, {"model": 2}, f"backend '{name}' computes on one device; a mesh needs the backend 'jax' or 'torch'")
            for name in ("numpy", "tensorflow")
        ),
        ("jax", {"model": 64}, "needs 64 devices; JAX has 2"),
        ("jax", {"rows": 2}, "the axes rows; expected data and model"),
        ("jax", {"model": 0}, "axis model"),
        ("jax", {}, "the axes of no name"),
        ("jax", 4, "mesh is 4; expected sizes such as"),
        ("torch", {"model": 2}, "needs 2 processes; there is 1. Start them with torchrun --nproc-per-node 2"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_refused(directory, backend, mesh, reason):
    """Catches a refusal that does not say what to do."""
    pytest.importorskip(backend)
    with pytest.raises((ValueError, TypeError), match=reason):
        pg.GPT2.load(directory, backend=backend, mesh=mesh)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_device_next_to_a_mesh_is_refused(directory, monkeypatch, backend):
    """Catches a device that is silently ignored."""
    pytest.importorskip(backend)
    monkeypatch.setattr(pg.language_model, "read_checkpoint", None)  # it is refused before a file is read
    with pytest.raises(ValueError, match="device is 'cpu', and a mesh has devices of its own; leave out one of the tw"):
        pg.GPT2.load(directory, backend=backend, device="cpu", mesh={"data": 1})


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_not_a_number_of_seconds_is_refused(monkeypatch, text):
    """Catches a process that waits forever, or not at all."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"PORTABLE_GPT2_MESH_TIMEOUT is '{text}'; expected a number of seconds"):
        mesh_timeout()
    monkeypatch.setenv(TIMEOUT_VARIABLE, "2.5")
    assert mesh_timeout() == 2.5
    monkeypatch.delenv(TIMEOUT_VARIABLE)
    assert mesh_timeout() == 600


@pytest.mark.parametrize("what", ["trace", "fingerprint"])
def test_what_needs_one_device_says_so(directory, jax, what):
    model = pg.GPT2.load(directory, backend="jax", mesh={"model": 2})
    with pytest.raises(ValueError, match=f"{what} needs a model on one device"):
        getattr(model, what)([1, 2, 3])


def test_the_frameworks_own_mesh_is_taken(directory, jax, expected):
    """Catches a mesh whose axes have another order, or only one of which is there."""
    own = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    model = pg.GPT2.load(directory, backend="jax", mesh=own)
    assert model.mesh.own is own
    assert model.device == "the mesh data=1,model=2"
    assert list(model.stream_ids([3, 4, 5], max_new_tokens=20, temperature=0)) == expected["texts"][0][1]


@pytest.mark.parametrize("axis", ["data", "model"])
def test_a_cache_has_all_heads_and_texts_and_a_device_half_of_them(directory, jax, axis):
    """Catches the part of one device that the framework takes for the whole."""
    decoder = pg.GPT2.load(directory, backend="jax", mesh={axis: 2})._decoder
    for x in (decoder.new_cache(2, 16, None).k[0], decoder.grow_cache(decoder.new_cache(2, 8, None), 16).v[1]):
        assert x.shape == (2, CONFIG.n_head, 16, CONFIG.head_size)
        assert on_meshes.held(x) == x.size // 2


@pytest.mark.parametrize("path", list(shapes(CONFIG)))
def test_a_parameter_comes_back_from_the_mesh(directory, jax, path):
    """Catches queries, keys and values in the mesh's order, and rows of padding that are saved."""
    mesh = Mesh(pg.get_backend("jax"), {"model": 2})
    a = WEIGHTS[path].astype(np.float32)
    tensor = pg.checkpoint.stored(a)
    found = mesh.stored(path, mesh.place(path, tensor), a.shape)
    assert found.shape == a.shape
    np.testing.assert_array_equal(found.read(), a)


def test_logits_that_tie_with_the_last_of_top_k_are_not_lost(tmp_path, jax):
    """Catches a step that gathers the largest logits of each device, and not all that are equal to the smallest of
    them. All logits of this model are 0, on the rows of padding too.
    """
    weights = {**WEIGHTS, "wte": 0 * WEIGHTS["wte"]}
    pg.GPT2(CONFIG, pg.params.nest(weights)).save(tmp_path / "model")
    one, several = (
        pg.GPT2.load(tmp_path / "model", **where)
        for where in ({"backend": "numpy"}, {"backend": "jax", "mesh": {"model": 2}})
    )
    for options in ({"top_k": 3, "seed": 7}, {"temperature": 0}):
        expected = list(one.stream_ids([3, 4], max_new_tokens=8, **options))
        assert list(several.stream_ids([3, 4], max_new_tokens=8, **options)) == expected
    assert len(set(one.stream_ids([3, 4], max_new_tokens=20, top_k=3, seed=7))) > 3


def test_a_batch_needs_as_many_logits_as_its_most_demanding_text():
    """Catches a token that is sampled from fewer logits than its options need."""
    decoder = types.SimpleNamespace(config=types.SimpleNamespace(n_vocab=1000))
    greedy, three, nine = Sampling(temperature=0), Sampling(top_k=3), Sampling(top_k=9, top_p=0.5)
    for samplings, n in (([greedy], 1), ([greedy, three], 3), ([nine, three], 9), ([greedy, Sampling(top_k=0)], None)):
        assert MeshDecoder.n_largest(decoder, samplings) == n
    assert MeshDecoder.n_largest(decoder, [three, Sampling(top_k=3, repetition_penalty=2)]) is None


def test_scores_of_logits_that_are_far_apart(tmp_path, jax):
    """Catches a sum of exponentials that overflows, because another device's logits are larger."""
    weights = {**WEIGHTS, "ln_f/g": 100 * WEIGHTS["ln_f/g"]}
    pg.GPT2(CONFIG, pg.params.nest(weights)).save(tmp_path / "model")
    expected, found = (
        pg.GPT2.load(tmp_path / "model", **where).score_ids(on_meshes.TEXT).log_probs[1:]
        for where in ({"backend": "numpy"}, {"backend": "jax", "mesh": {"model": 2}})
    )
    assert expected.min() < -200
    np.testing.assert_allclose(found, expected, rtol=1e-4)
