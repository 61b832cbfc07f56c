"""Training: the recipe, AdamW in PyTorch, what is refused, and runs that stop, diverge and continue.

`portable_gpt2.testing.training` tests gradients, steps and losses.
"""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import tokenizers

import portable_gpt2 as pg
from portable_gpt2 import gradients, training
from portable_gpt2.checkpoint import read_checkpoint
from portable_gpt2.params import flatten, map_tree
from portable_gpt2.testing.training import test_steps as steps
from portable_gpt2.tokenizer import Tokenizer
from portable_gpt2.training import Diverged, Recipe, Run, Trainer, learning_rate, train
from portable_gpt2.training.optimizer import Moments, rates, update

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=384, n_ctx=16, eos_token_id=0)
RECIPE = Recipe(steps=6, batch_size=3, warmup=2, learning_rate=3e-3, eval_every=4, seed=5)


def on(backend, tree, dtype):
    return map_tree(lambda a: backend.from_numpy(np.asarray(a), dtype), tree)


def host(backend, tree):
    return {path: backend.to_numpy(x) for path, x in flatten(tree)}


# The rate


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 10), (10, 10), (20, 10), (0, 1)])
def test_the_rate_rises_in_proportion_and_falls_as_a_cosine(warmup, steps):
    recipe = Recipe(steps=steps, warmup=warmup, learning_rate=2.0, min_lr_ratio=0.25)
    for step in range(steps + 1):
        if step < warmup:
            assert learning_rate(step, recipe) == pytest.approx(2.0 * (step + 1) / warmup)
        elif steps > warmup:
            cosine = math.cos(math.pi * (step - warmup) / (steps - warmup))
            assert learning_rate(step, recipe) == pytest.approx(0.5 + 1.5 * (1 + cosine) / 2)


# A step of the optimizer


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "wte": scale * rng.standard_normal((5, 4)),
        "h0": {"ln_1": {"g": 1 + scale * rng.standard_normal(4), "b": scale * rng.standard_normal(4)}},
    }


@pytest.mark.parametrize(
    "changed",
    [{}, {"eps": 0.0, "weight_decay": 0.0}, {"max_grad_norm": None, "gradient_accumulation_steps": 3}],
    ids=str,
)
def test_a_step_of_all_parameters_at_once_has_the_same_bits(torch, monkeypatch, changed):
    """Catches results that are assigned to other parameters, or to another moment, and another order of rounding.

    On a CPU, the adapter is told that the tensors are on CUDA. Each operation then still runs, for all tensors at once.
    """
    import portable_gpt2_backends.torch as adapter

    backend, recipe = pg.get_backend("torch"), dataclasses.replace(Recipe(steps=9, warmup=2), **changed)
    device = [*backend.devices()][-1]  # an accelerator, if there is one
    sizes = [(7, 5), (5,), (3, 2), (9,), (4, 4), (4,), (1, 2, 3)]

    def tree(seed):
        rng = np.random.default_rng(seed)
        leaves = {f"h{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}
        leaves["h2"][0] = 0  # a gradient that is 0
        return map_tree(lambda a: backend.from_numpy(a, device=device), leaves)

    def steps():
        params, moments = tree(0), Moments(*(map_tree(torch.zeros_like, tree(0)) for _ in "mv"))
        for i in range(3):
            now, grads = backend.from_numpy(rates(i, recipe), "float32", device), tree(i + 1)
            given = [x for each in (params, grads, *moments) for _, x in flatten(each)]
            before = [x.clone() for x in given]
            params, moments, norm = update(params, grads, moments, now, recipe)
            assert all(map(torch.equal, given, before))  # a step changes no argument
        return [*flatten(params), *flatten(moments.m), *flatten(moments.v), ("norm", norm)]

    monkeypatch.setattr(adapter, "_is_on_cuda", lambda lists: False)
    expected, calls, foreach = steps(), [], torch._foreach_sqrt
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda xs: calls.append(len(xs)) or foreach(xs))
    monkeypatch.setattr(adapter, "_is_on_cuda", lambda lists: True)
    monkeypatch.setattr(adapter, "_TOGETHER", 40)
    found = steps()
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, x), (_, y) in zip(found, expected, strict=True):
        assert torch.equal(x, y), path
    assert calls == 3 * [2, 2, 3]  # matrices in two groups of at least 40 elements, then all vectors


def test_a_step_waits_for_the_device_at_its_end_alone(backend, monkeypatch):
    """Catches a copy to or from the device between two launches: the device is then idle until the next launch."""
    events = []
    recipe = dataclasses.replace(RECIPE, gradient_accumulation_steps=2)
    trainer = Trainer(CONFIG, recipe, backend)
    state = trainer.start(pg.init_params(CONFIG, backend=backend))
    trainer.step(state, [texts(0), texts(1)])  # the functions are traced, which may read constants

    def watched(name, function):
        return lambda *args, **kwargs: events.append(name) or function(*args, **kwargs)

    gradients_of = {way: watched("gradient", function) for way, function in trainer._gradient.items()}
    monkeypatch.setattr(trainer, "_gradient", gradients_of)
    for name in ("_add", "_update"):
        monkeypatch.setattr(trainer, name, watched(name, getattr(trainer, name)))
    for name in ("from_numpy", "to_numpy"):
        monkeypatch.setattr(backend, name, watched(name, getattr(backend, name)))
    peek = backend.peek

    def unwatched_peek(x):  # it reads ids, and only those that are on the host
        n, found = len(events), peek(x)
        del events[n:]
        return found

    monkeypatch.setattr(backend, "peek", unwatched_peek)
    trainer.step(state, [texts(0), texts(1)])
    events = events[events.index("from_numpy") :]  # before, NumPy's own backend checks the windows
    assert events == [*["from_numpy"] * 3, "gradient", "gradient", "_add", "_update", *["to_numpy"] * 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_reads_no_value_of_the_device(torch, monkeypatch, dtype):
    """Catches a branch on a loss, a norm or an id, which waits for an accelerator. Tensors on ``meta`` have none."""
    import portable_gpt2_backends.torch as adapter

    monkeypatch.setattr(adapter, "_is_on_cuda", lambda lists: True)
    trainer = Trainer(CONFIG, dataclasses.replace(RECIPE, dtype=dtype), "torch")
    state = trainer.start(pg.init_params(CONFIG, backend="torch"))
    params, m, v = (map_tree(lambda x: x.to("meta"), tree) for tree in (state.params, *state.moments))
    tokens = torch.empty((1, 3, CONFIG.n_ctx + 1), dtype=torch.int64, device="meta")
    assert not trainer._is_handwritten(params["wte"])
    value, grads = trainer._gradient[False](params, tokens)
    after, _, norm = trainer._update(params, grads, Moments(m, v), torch.empty(3, device="meta"))
    assert value.shape == norm.shape == ()
    assert {path: x.shape for path, x in flatten(after)} == {path: x.shape for path, x in flatten(params)}


def test_a_step_is_pytorchs(torch):
    """Holds the whole to torch.optim.AdamW and torch's own clipping."""
    backend, recipe = pg.get_backend("torch"), Recipe(steps=9, warmup=2, learning_rate=0.01)
    tree = on(backend, random_tree(0), "float64")
    leaves = [x.clone().requires_grad_() for _, x in flatten(tree)]
    matrices, others = [x for x in leaves if x.ndim == 2], [x for x in leaves if x.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
    zeros = map_tree(lambda x: x * 0, tree)
    moments = Moments(zeros, zeros)
    for i in range(5):
        grads = on(backend, random_tree(i + 1, 10.0), "float64")
        for leaf, (_, g) in zip(leaves, flatten(grads), strict=True):
            leaf.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(leaves, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, recipe)
        optimizer.step()
        tree, moments, _ = update(tree, grads, moments, backend.from_numpy(rates(i, recipe), "float64"), recipe)
    for leaf, (_, x) in zip(leaves, flatten(tree), strict=True):
        torch.testing.assert_close(leaf.detach(), x, rtol=1e-13, atol=1e-13)


# A step of training


def texts(index, batch_size=3, seq=CONFIG.n_ctx + 1):
    return np.random.default_rng([9, index]).integers(0, CONFIG.n_vocab, (batch_size, seq)).astype(np.int32)


def trajectory(backend, recipe, steps, params=None, text=texts):
    trainer = Trainer(CONFIG, recipe, backend)
    if params is None:
        params = pg.init_params(CONFIG, backend=backend, dtype=recipe.master_dtype, scale_residual=True)
    state, losses = trainer.start(params), []
    for i in range(steps):
        state, loss, _ = trainer.step(
            state, [text(recipe.gradient_accumulation_steps * i + j) for j in range(recipe.gradient_accumulation_steps)]
        )
        losses.append(loss)
    return state, losses


def test_the_losses_that_the_kit_expects_are_those_of_float64():
    """Catches losses in `testing` that are out of date: they are those of the hand-written gradients in NumPy."""
    recipe = dataclasses.replace(steps.FIFTY, dtype="float64")
    _, losses = steps.trajectory(pg.get_backend("numpy"), recipe, 50, text=steps.learnable, config=steps.CONFIG)
    np.testing.assert_allclose(losses, steps.TRUE_LOSSES, rtol=0, atol=1e-6)


def test_accumulated_batches_are_one_in_float64():
    """Catches a mean in float32: the kit tests the same in float32 on every backend."""
    steps.assert_accumulated_batches_are_one(pg.get_backend("numpy"), "float64", 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_is_compiled_as_a_whole_trains_by_hand(backend, dtype, device, monkeypatch):
    """Catches the slower gradient, and the hand-written one, which computes in float32, for a 16-bit dtype."""
    used, on_cpu = [], device == "cpu"
    monkeypatch.setattr(training.trainer, "_is_on_cpu", lambda backend, x: on_cpu)
    monkeypatch.setattr(gradients, "loss", lambda *args, loss=gradients.loss: used.append(1) or loss(*args))
    trajectory(backend, dataclasses.replace(RECIPE, dtype=dtype), 1)
    has_its_own = backend.value_and_grad(abs) is not NotImplemented
    assert bool(used) == (not has_its_own or (backend.handwritten_gradient_is_faster and dtype == "float32" and on_cpu))


@pytest.mark.parametrize(
    ("batch", "seq", "parts"),
    [(12, 256, 3), (12, 64, 1), (7, 256, 1), (11, 512, 11), (67, 16, 1), (2, 1024, 2), (2, 2000, 2), (4, 512, 2)],
)
def test_a_part_is_of_a_thousand_tokens_where_that_divides_the_batch(batch, seq, parts):
    """Catches parts that are too large, and a window at a time where the batch's size is prime."""
    tokens = np.arange(batch * (seq + 1)).reshape(batch, seq + 1)
    cut = training.trainer._split(tokens, 1024)
    assert cut.shape == (parts, batch // parts, seq + 1)
    assert np.array_equal(cut.reshape(tokens.shape), tokens)
    assert training.trainer._split(tokens, None).shape == (1, *tokens.shape)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (np.zeros((0, 17), np.int32), ValueError, r"shape \[0, 17\]; expected int \[batch, seq\]"),
        (np.zeros(17, np.int32), ValueError, r"shape \[17\]; expected int \[batch, seq\]"),
        (
            np.zeros((2, 1), np.int32),
            ValueError,
            r"nothing to predict; expected int \[batch, seq \+ 1\]",
        ),
        (np.full((2, 17), CONFIG.n_vocab), ValueError, f"token id {CONFIG.n_vocab} is not in the vocabulary"),
        (np.full((2, 17), -1), ValueError, "token id -1 is not in the vocabulary"),
        (np.zeros((2, 17)), TypeError, "dtype float64; expected integers"),
        (
            np.zeros((2, CONFIG.n_ctx + 2), np.int32),
            ValueError,
            f"{CONFIG.n_ctx + 1} tokens .* n_ctx",
        ),
    ],
    ids=["no window", "one axis", "nothing to predict", "beyond the vocabulary", "negative", "floats", "too long"],
)
def test_what_is_no_batch_of_windows_is_refused(backend, text, kind, message):
    """Catches a step along the gradient of nothing, or of ids that a framework takes for others."""
    learner = Trainer(CONFIG, RECIPE, backend)
    state = learner.start(pg.init_params(CONFIG, backend=backend))
    for call in (lambda: learner.step(state, [text]), lambda: learner.evaluate(state.params, text)):
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_windows_may_be_of_any_integer_dtype(dtype):
    """Catches windows that reach the device in another dtype than int32, which a framework may lack."""
    backend = pg.get_backend("numpy")
    learner = Trainer(CONFIG, RECIPE, backend)
    assert learner._windows(texts(0, 2).astype(dtype)).dtype == np.int32
    state, text = learner.start(pg.init_params(CONFIG, backend=backend)), texts(0, 2)
    assert learner.step(state, [text.astype(dtype)])[1] == learner.step(state, [text.astype(np.int32)])[1]
    assert learner.evaluate(state.params, text.astype(dtype)) == learner.evaluate(state.params, text.astype(np.int32))


def test_a_gradient_is_computed_in_micro_batches_on_a_cpu_alone(backend):
    """Catches small micro-batches on an accelerator, where they are slow."""
    x = backend.from_numpy(np.zeros(3, np.float32), device="cpu")
    assert training.trainer.micro_batch_tokens(backend, x) in (1024, 2048)
    elsewhere = type("", (type(backend),), {"device": lambda self, x: "cuda:0"})()
    assert training.trainer.micro_batch_tokens(elsewhere, x) is None


@pytest.mark.parametrize(
    ("compiled", "differentiates", "expected"), [(True, True, 1024), (False, False, 1024), (False, True, 2048)]
)
def test_micro_batches_are_larger_where_each_op_is_recorded(compiled, differentiates, expected):
    """Catches the size that is measured to be slower: 1.06 times as long on PyTorch, 1.13 times on JAX."""
    gradient = (lambda self, fn: fn) if differentiates else (lambda self, fn: NotImplemented)
    backend = type("", (type(pg.get_backend("numpy")),), {"compiles_per_shape": compiled, "value_and_grad": gradient})()
    assert training.trainer.micro_batch_tokens(backend, np.zeros(3)) == expected


def test_parts_share_their_memory(jax):
    """Catches micro-batches that are computed at the same time, as XLA does with a loop in Python."""
    backend, config = pg.get_backend("jax"), dataclasses.replace(CONFIG, n_ctx=64)
    params = pg.init_params(config, backend=backend)
    learner = Trainer(config, RECIPE, backend)
    tokens = texts(0, 12, 65)

    def room(parts):
        lowered = jax.jit(learner._gradient_of, static_argnums=0).lower(True, params, parts)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert room(tokens.reshape(6, 2, 65)) < 0.4 * room(tokens[None])


def test_bfloat16_has_masters_of_float32(backend):
    """Catches parameters that are trained in 16 bits: what a step adds would be rounded away."""
    if "bfloat16" not in backend.dtypes:
        pytest.xfail("the backend has no bfloat16")
    state, _ = trajectory(backend, Recipe(dtype="bfloat16", warmup=0, learning_rate=1e-5), 2)
    start = pg.init_params(CONFIG, backend=backend, scale_residual=True)
    assert {backend.dtype_names[x.dtype] for _, x in flatten(state.params)} == {"float32"}
    moved = host(backend, state.params)["wte"] - host(backend, start)["wte"]
    assert 1e-6 < np.abs(moved).max() < 1e-4


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"steps": 0}, "steps is 0; expected an int of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True"),
        ({"context": 0}, "context is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5; expected a number from 0 to 1"),
        ({"beta1": 1.0}, "beta1 is 1.0; expected a number of at least 0 and below 1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; expected a number above 0 .or None."),
        ({"seed": -1}, "seed is -1"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, float64, bfloat16 .in float16"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(changed, why):
    with pytest.raises(ValueError, match=why):
        Recipe(**changed)


def test_the_names_in_the_files_of_a_run_are_pinned():
    """Catches a field that is renamed in the files too: a run that somebody has begun could not be resumed."""
    recipe = Recipe(gradient_accumulation_steps=2, max_grad_norm=0.5, min_lr_ratio=0.25, context=7)
    entries = {"steps": 1000, "batch_size": 12, "accumulate": 2, "context": 7, "learning_rate": 1e-3, "warmup": 100}
    entries |= {"final_rate": 0.25, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip": 0.5}
    entries |= {"seed": 0, "dtype": "float32", "eval_every": 100}
    assert recipe.to_dict() == entries
    assert Recipe.from_dict(entries) == recipe


def test_residual_products_begin_smaller(backend):
    """Catches other parameters scaled, or these by another factor."""
    config = dataclasses.replace(CONFIG, n_layer=2)
    plain = host(backend, pg.init_params(config, seed=1, backend=backend))
    scaled = host(backend, pg.init_params(config, seed=1, backend=backend, scale_residual=True))
    for path, x in plain.items():
        factor = 0.5 if path.endswith("c_proj/w") else 1.0  # 1 / sqrt(2 x 2 layers)
        np.testing.assert_allclose(scaled[path], factor * x, rtol=1e-7)


# Runs


def write_ids(file):
    ids = np.random.default_rng(2).integers(0, CONFIG.n_vocab, 900).astype("<u2")
    file.write_bytes(ids.tobytes())
    return 700


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizers.Tokenizer.from_str(tiny.byte_level_bpe()))


def begin(directory, backend, tokenizer, recipe=RECIPE, write=write_ids):
    run = Run.create(directory, recipe, CONFIG, tokenizer, write)
    trainer = Trainer(CONFIG, recipe, backend)
    return run, trainer, trainer.start(pg.init_params(CONFIG, seed=recipe.seed, backend=backend))


def files(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != "metrics.jsonl"
    }


def metrics(run):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in run.metrics()]


def test_each_step_reads_windows_of_its_own(tokenizer, tmp_path, monkeypatch):
    """Catches the same windows in every step, and held-out text among them."""
    backend, recipe = pg.get_backend("numpy"), dataclasses.replace(RECIPE, steps=3, gradient_accumulation_steps=2)
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer, recipe)
    read, step = [], Trainer.step

    def recording(self, state, batches):
        read.extend(batches := list(batches))
        return step(self, state, batches)

    monkeypatch.setattr(Trainer, "step", recording)
    list(train(run, trainer, state))
    text, held_out = run.tokens()
    assert (len(text), len(held_out)) == (700, 200)
    options = {"batch_size": recipe.batch_size, "length": CONFIG.n_ctx + 1, "seed": recipe.seed}
    expected = [training.batch(text, i, **options) for i in range(6)]
    assert len(read) == 6
    assert all(map(np.array_equal, read, expected))
    assert len({windows.tobytes() for windows in read}) == 6


@pytest.mark.parametrize("ended_after", [0, 1, 3, 4])
def test_a_run_that_is_interrupted_ends_in_the_same_bits(tokenizer, tmp_path, ended_after):
    """Catches state that is not saved, a step that is taken twice or not at all, windows that depend on the past."""
    backend = pg.get_backend("numpy")
    whole, trainer, state = begin(tmp_path / "whole", backend, tokenizer)
    reports = list(train(whole, trainer, state))
    assert [report.step for report in reports] == list(range(RECIPE.steps + 1))

    run, trainer, state = begin(tmp_path / "run", backend, tokenizer)
    reports = train(run, trainer, state)
    for report in reports:
        if report.step == ended_after:
            break
    reports.close()
    again = Run.open(tmp_path / "run")
    assert again.last["step"] == ended_after
    assert (again.recipe, again.config) == (RECIPE, CONFIG)
    for _ in train(again, Trainer(again.config, again.recipe, backend), again.restore(backend)):
        pass
    assert metrics(again) == metrics(whole)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_step_that_fails_leaves_the_last_checkpoint(tokenizer, tmp_path, monkeypatch):
    """Catches a checkpoint that is removed too early; the lines of steps after the last one are removed."""
    backend = pg.get_backend("numpy")
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer)

    def fails(self, run_state, held_out, trainer):
        raise OSError("no space left")

    reports = train(run, trainer, state)
    assert [next(reports).step for _ in range(4)] == [0, 1, 2, 3]
    monkeypatch.setattr(Run, "save", fails)
    with pytest.raises(OSError, match="no space"):
        next(reports)
    monkeypatch.undo()
    again = Run.open(tmp_path / "run")
    assert again.last["step"] == 0
    assert pg.GPT2.load(tmp_path / "run").config == CONFIG
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # a line that was cut off
    list(train(again, Trainer(CONFIG, RECIPE, backend), again.restore(backend)))
    assert [entry["step"] for entry in again.metrics()] == list(range(7))


def test_a_run_that_ends_while_it_says_what_is_best_is_mended(tmp_path, monkeypatch):
    """Catches a best checkpoint that is never put where it is loaded from, as the run ended between the two."""
    backend = pg.get_backend("numpy")
    run, trainer, state = begin(tmp_path / "run", backend, None, write=lambda file: write_ids(file) + 200)
    reports = train(run, trainer, state)
    assert [next(reports).step for _ in range(6)] == [0, 1, 2, 3, 4, 5]

    def fails(self, checkpoint):
        raise OSError("no space left")

    monkeypatch.setattr(Run, "_publish", fails)
    with pytest.raises(OSError, match="no space"):
        list(reports)
    monkeypatch.undo()
    again = Run.open(tmp_path / "run")
    list(train(again, Trainer(CONFIG, RECIPE, backend), again.restore(backend)))
    assert again.last["step"] == again.best["step"] == RECIPE.steps
    best = read_checkpoint(tmp_path / "run" / "training" / again.best["name"]).tensors
    loaded = read_checkpoint(tmp_path / "run").tensors
    assert all(np.array_equal(tensor.read(), best[path].read()) for path, tensor in loaded.items())


def test_the_best_checkpoint_is_what_is_loaded(tokenizer, tmp_path):
    """Catches the last in its place; and a run without held-out text, where it is the last."""
    backend = pg.get_backend("numpy")
    recipe = dataclasses.replace(RECIPE, learning_rate=0.3, eval_every=1)  # so that it gets worse
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer, recipe)
    held_out = [report.held_out for report in train(run, trainer, state)]
    best = int(np.argmin(held_out))
    assert best < recipe.steps
    assert (run.best["step"], run.best["held_out"]) == (best, held_out[best])
    model = pg.GPT2.load(tmp_path / "run", backend="numpy")
    _, held = run.tokens()
    windows = training.windows(held, CONFIG.n_ctx + 1)
    assert trainer.evaluate(model.params, windows) == pytest.approx(held_out[best], rel=1e-6)
    assert model.tokenizer.encode("To be") == tokenizer.encode("To be")
    assert sorted(path.name for path in (tmp_path / "run" / "training").glob("step-*")) == sorted(
        {f"step-{best}", f"step-{recipe.steps}"}
    )

    run, trainer, state = begin(tmp_path / "none", backend, None, write=lambda file: write_ids(file) + 200)
    assert [report.held_out for report in train(run, trainer, state)] == [None] * 7
    assert run.best["step"] == RECIPE.steps
    last = {path: tensor.read() for path, tensor in read_checkpoint(tmp_path / "none").tensors.items()}
    state = run.restore(backend)
    assert all(np.array_equal(x, last[path]) for path, x in host(backend, state.params).items())


DIVERGING = {
    "a rate of 1e30": {"learning_rate": 1e30, "max_grad_norm": None},
    "a rate beyond float32": {"learning_rate": 1e39},
    "a rate beyond float32 for a moment": {"learning_rate": 1e39, "warmup": 2, "steps": 1, "eval_every": 1},
    "a decay beyond float32": {"weight_decay": 1e39},
    "evaluated after each step": {"learning_rate": 1e38, "eval_every": 1},
    "of one step": {"learning_rate": 1e38, "steps": 1, "weight_decay": 0.0},
}


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out text", "no held-out text"])
@pytest.mark.parametrize("kind", DIVERGING)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tokenizer, tmp_path, kind, held_out):
    """Catches parameters that are NaN, or so large that the logits are, published in the place of a good model."""
    assert_diverges(pg.get_backend("numpy"), tokenizer, tmp_path, kind, held_out)


def test_a_decay_beyond_float32_diverges_on_every_backend(backend, tokenizer, tmp_path):
    """Catches a framework's own error about a number that it cannot convert to float32."""
    assert_diverges(backend, tokenizer, tmp_path, "a decay beyond float32", held_out=True)


def assert_diverges(backend, tokenizer, tmp_path, kind, held_out):
    recipe = dataclasses.replace(RECIPE, **{"warmup": 0, **DIVERGING[kind]})
    write = write_ids if held_out else lambda file: write_ids(file) + 200
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer, recipe, write)
    why = "step [1-6] diverged: .* Try a lower learning rate than .*, or an eps above .* keeps its checkpoint of step 0"
    with pytest.raises(Diverged, match=why):
        list(train(run, trainer, state))
    again = Run.open(tmp_path / "run")
    assert again.last["step"] == again.best["step"] == 0
    model = pg.GPT2.load(tmp_path / "run", backend=backend)
    assert np.isfinite(model.score("To be, or not to be").total)
    assert [entry["step"] for entry in again.metrics()] == list(range(len(again.metrics())))
    with pytest.raises(Diverged, match=why):
        list(train(again, trainer, again.restore(backend)))
    assert Run.open(tmp_path / "run").last["step"] == 0


@pytest.mark.parametrize("leaf", ["params", "m", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tokenizer, tmp_path, leaf, value):
    """Catches a NaN that the loss does not show: in a position that is not trained, or in a moment."""
    backend = pg.get_backend("numpy")
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer)
    reports = train(run, trainer, state)
    next(reports)
    reports.close()
    before = files(tmp_path / "run")
    state = run.restore(backend)
    trees = {"params": state.params, "m": state.moments.m, "v": state.moments.v}
    arrays = dict(flatten(trees[leaf]))
    spoilt = backend.to_numpy(arrays["wpe"]).copy()
    spoilt[-1, -1] = value
    trees[leaf] = {**trees[leaf], "wpe": backend.from_numpy(spoilt)}
    state = training.State(4, trees["params"], Moments(trees["m"], trees["v"]))
    with pytest.raises(Diverged, match=r"step 4 diverged: .*wpe holds a NaN or an infinity after this step"):
        run.save(state, 1.0)
    for loss in (float("nan"), float("inf"), np.float32("nan")):
        with pytest.raises(Diverged, match="step 0 diverged: the held-out loss is"):
            run.save(run.restore(backend), loss)
    assert files(tmp_path / "run") == before


def test_ctrl_c_does_not_save_what_cannot_be_used(tokenizer, tmp_path):
    """Catches a checkpoint that is saved as the run is ended, one step before it would have diverged."""
    backend = pg.get_backend("numpy")
    recipe = dataclasses.replace(RECIPE, learning_rate=1e38, warmup=0)
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer, recipe)
    reports = train(run, trainer, state)
    assert [next(reports).step for _ in range(2)] == [0, 1]
    with pytest.raises(Diverged, match="step 1 diverged"):
        reports.close()
    assert Run.open(tmp_path / "run").last["step"] == 0


def test_weights_that_give_no_finite_loss_are_not_published(tokenizer, tmp_path):
    """Catches a run that begins with such weights, as those of --init-from may be, and has no checkpoint to name."""
    backend = pg.get_backend("numpy")
    run, trainer, state = begin(tmp_path / "run", backend, tokenizer)
    huge = state._replace(params=map_tree(lambda x: x + np.float32(1e38), state.params))
    with pytest.raises(Diverged, match=r"step 0: the loss of the held-out text is nan .*give other weights"):
        list(train(run, trainer, huge))
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("eps", [0, 1e-50, 1e-45])
def test_an_eps_that_is_0_in_float32_moves_what_has_a_gradient(eps):
    """Catches 0 / 0, as in the test of the kit, which has one of these values."""
    trainer = Trainer(CONFIG, dataclasses.replace(RECIPE, eps=eps, warmup=0, weight_decay=0.0), "numpy")
    start = trainer.start(pg.init_params(CONFIG, backend="numpy"))
    state, _, _ = trainer.step(start, [texts(0, seq=5)])
    assert np.array_equal(state.params["wpe"][4:], start.params["wpe"][4:])
    assert (state.params["wpe"][:4] != start.params["wpe"][:4]).any(axis=1).all()


def test_numbers_beyond_float32_mean_infinity(backend):
    """Catches a framework's own exception: with such an eps nothing moves, and such a clip is none."""
    state, texts_ = {}, [texts(0)]
    for name, changed in {
        "none": {"max_grad_norm": None},
        "clip": {"max_grad_norm": 1e39},
        "eps": {"eps": 1e300},
    }.items():
        trainer = Trainer(CONFIG, dataclasses.replace(RECIPE, weight_decay=0.0, **changed), backend)
        first = trainer.start(pg.init_params(CONFIG, backend=backend))
        state[name] = host(backend, trainer.step(first, texts_)[0].params)["wte"].copy()
    np.testing.assert_allclose(state["clip"], state["none"], rtol=1e-6)
    assert np.array_equal(state["eps"], host(backend, first.params)["wte"])


def test_what_is_no_step_is_refused(backend):
    """Catches a framework's exception, and a mean over fewer batches than it divides by."""
    recipe = dataclasses.replace(RECIPE, gradient_accumulation_steps=2)
    trainer = Trainer(CONFIG, recipe, backend)
    state = trainer.start(pg.init_params(CONFIG, backend=backend))
    for n in (0, 1, 3):
        with pytest.raises(ValueError, match=f"{n} batches were given; the recipe's gradient_accumulation_steps is 2"):
            trainer.step(state, [texts(0)] * n)
    with pytest.raises(TypeError, match="state is None; expected the State"):
        trainer.step(None, [texts(0)] * 2)
    with pytest.raises(TypeError, match=r"state is .*expected the State"):
        trainer.step(tuple(state), [texts(0)] * 2)
    for wrong in (None, 5):
        with pytest.raises(TypeError, match=r"batches is .*expected arrays of windows"):
            trainer.step(state, wrong)


def test_what_is_no_trainer_is_refused():
    with pytest.raises(TypeError, match=r"config is \{\}; expected a GPT2Config"):
        Trainer({}, RECIPE, "numpy")
    with pytest.raises(TypeError, match="recipe is None; expected a Recipe"):
        Trainer(CONFIG, None, "numpy")
    trainer = Trainer(CONFIG, RECIPE, "numpy")
    with pytest.raises(ValueError, match="wpe is float16; a recipe of dtype float32 trains float32"):
        trainer.start(pg.init_params(CONFIG, backend="numpy", dtype="float16"))


def test_parameters_of_another_backend_are_refused(torch):
    with pytest.raises(TypeError, match="wpe is a Tensor; expected an array of numpy"):
        Trainer(CONFIG, RECIPE, "numpy").start(pg.init_params(CONFIG, backend="torch"))


def test_a_directory_that_is_not_empty_is_refused(tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="run: exists already; give a new directory, or resume"):
        begin(tmp_path / "run", pg.get_backend("numpy"), tokenizer)
    assert files(tmp_path / "run") == {"thesis.tex": b"all of it"}
    with pytest.raises(ValueError, match="run: holds no training run to resume"):
        Run.open(tmp_path / "run")


def test_a_run_without_a_checkpoint_is_refused(tokenizer, tmp_path):
    begin(tmp_path / "run", pg.get_backend("numpy"), tokenizer)
    with pytest.raises(ValueError, match="run: the run ended before its first checkpoint; start it again"):
        Run.open(tmp_path / "run")
