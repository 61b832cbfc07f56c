"""Generation that does not wait for the host: the device chooses the tokens, and the text is the one of the host.

On an accelerator this way is the normal one (`Backend.runs_ahead`). Here it is taken on every device that computes in
float64, also on a CPU.
"""

import contextlib
import math
import warnings

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.generation import choice, decoder
from portable_gpt2.generation.decoder import Generation
from portable_gpt2.random import gumbel
from portable_gpt2.sampling import Sampling, sample_with
from portable_gpt2.testing.plain_gpt2 import on_backend, plain_text, random_weights

pytestmark = pytest.mark.every_device

# More positions than 64, where a backend that compiles grows its cache.
CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=61, n_ctx=80, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
SAMPLED = {"top_k": 5, "top_p": 0.9}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """With few candidates, a small vocabulary has logits that are not among them."""
    monkeypatch.setattr(choice, "_CANDIDATES", 16)


@pytest.fixture(scope="module")
def device_chooses(backend):
    """Skip the tests of a backend that cannot choose tokens, because it does not compute in float64."""
    x = backend.from_numpy(np.zeros(1, np.float32))
    if not backend.runs_ahead(x):
        if "float64" not in backend.dtypes:
            pytest.skip(f"{backend.name} has no float64, so the host chooses the tokens")
        with backend.permit_64_bits(), contextlib.suppress(TypeError):
            backend.from_numpy(np.zeros(1), "float64")
            return
        pytest.skip(f"{backend.name} does not compute in float64 here, so the host chooses the tokens")


def ahead(backend):
    """Return a model that chooses tokens on the device."""
    model = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))
    model._decoder.runs_ahead = True
    return model


@pytest.fixture(scope="module")
def model(backend, device_chooses):
    """A model on every backend, once: what one test has compiled serves the next."""
    return ahead(backend)


# The choice


def on_device(backend, logits, samplings, places, indices):
    """Return the tokens that the device chooses for a batch: ids, or -1 - id for an undecided one."""
    rule = choice.common_rule(samplings, logits.shape[-1])
    arrays = (backend.from_numpy(a) for a in choice.new_draw(samplings, indices, rule))
    given = backend.from_numpy(logits), backend.from_numpy(np.asarray(places, np.int32)[:, None])
    variates = choice.gumbel_on(backend, None)
    chosen = backend.compile(lambda x, places, draw: choice.choose(backend, x, places, draw, rule, variates))
    return backend.to_numpy(chosen(*given, choice.Draw(*arrays)))[:, 0]


def test_greedy_takes_the_smallest_of_equal_ids(backend, device_chooses):
    logits = np.asarray([[0, 2, 1, 2, 2], [3, 3, 0, 0, 3]], np.float32)
    assert on_device(backend, logits, [Sampling(temperature=0)] * 2, [3, 3], [0, 0]).tolist() == [1, 0]


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": None}], ids=str)
def test_logits_without_a_finite_maximum_are_left_to_the_host(backend, device_chooses, options):
    """Catches NaN that a comparison hides: the host raises an error, which names the model's weights."""
    logits = np.zeros((3, 61), np.float32)
    logits[:, 7] = 5, math.nan, math.inf
    with np.errstate(invalid="ignore"):
        found = on_device(backend, logits, [Sampling(seed=1, **options)] * 3, [3] * 3, [0] * 3)
    assert found[0] >= 0
    assert (found[1:] < 0).all()


@pytest.mark.parametrize("options", [{"top_k": None}, {"top_k": 8}, {"top_k": 8, "top_p": 0.5, "min_p": 0.01}], ids=str)
def test_of_equal_logits_the_choice_is_the_hosts_or_is_undecided(backend, device_chooses, options):
    """Catches top-k without the logits that tie with the last one, and a total of top-p without them: half of the
    logits are equal to another one.
    """
    logits = np.random.default_rng(0).choice(np.linspace(-2, 2, 24), (64, 61)).astype(np.float32)
    samplings = [Sampling(seed=i, **options) for i in range(64)]
    found = on_device(backend, logits, samplings, range(64), [2] * 64)
    expected = [sample_with(s, row, i, [], 2) for i, (s, row) in enumerate(zip(samplings, logits, strict=True))]
    assert [token for token in zip(found, expected, strict=True) if token[0] >= 0 and token[0] != token[1]] == []
    assert (found >= 0).sum() > 16


@pytest.mark.about("gumbel")
def test_variates_are_the_hosts(backend, device_chooses):
    """Catches a product or a shift that treats 64 bits as signed, swapped halves of a seed or of a stream, and noise of
    another position; and a kernel that is wrong, of which generation warns, and which it does not use.
    """
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    indices, places = seeds[3:] + seeds[:3], [0, 1, 2, 5, 70, 2**30, 2**31 - 1]
    _, keys = choice.new_draw([Sampling(seed=seed) for seed in seeds], indices, choice.Rule(61, False))
    entries = np.arange(61, dtype=np.int32)[None]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the kernel of Gumbel variates is wrong")
        variates = choice.gumbel_on(backend, None)

    def variates_of(entries, places, keys):
        with backend.permit_64_bits():
            return variates(entries, places, keys)

    given = entries, np.asarray(places, np.int32)[:, None], keys
    found = backend.to_numpy(backend.compile(variates_of)(*map(backend.from_numpy, given)))
    for row, seed, index, place in zip(found, seeds, indices, places, strict=True):
        np.testing.assert_allclose(row, gumbel(np.arange(61), 61, place, seed, index), rtol=0, atol=1e-13)


# The text


def expected_texts(prompts, n, *, ends=(), **options):
    """Return the texts of plain NumPy, up to a token that ends them."""
    given = [(prompt, {"seed": 3 + i, **options, "index": i}) for i, prompt in enumerate(prompts)]
    whole = [plain_text(WEIGHTS, prompt, n, CONFIG, **each) for prompt, each in given]
    stops = [next((i for i, token in enumerate(text) if token in ends), n) for text in whole]
    return [text[: stop + 1] for text, stop in zip(whole, stops, strict=True)]


def texts(model, prompts, n, *, ends=(), **options):
    """Return the new tokens of a batch, whose texts end at the tokens in `ends`."""
    batch = [Generation(list(p), Sampling(**{"seed": 3 + i, **options}), i) for i, p in enumerate(prompts)]
    for generation in model._decoder.stream(batch, n, ends):
        generation.finished = generation.tokens[-1] in ends
    return [generation.tokens[len(prompt) :] for generation, prompt in zip(batch, prompts, strict=True)]


# Each function that is compiled is for one kind of choice (greedy, filtered, all tokens) and one size of the cache.
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (77, {"temperature": 0}),  # the cache grows
        (40, {"seed": 7, **SAMPLED}),
        (40, {"seed": 7, "top_k": 5, "top_p": 0.5, "min_p": 0.05, "temperature": 0.6}),  # the same function, other data
        (40, {"seed": 2**64 - 1, "top_k": None, "temperature": 1.7}),
    ],
    ids=str,
)
def test_a_text_is_the_hosts(model, n, options, monkeypatch):
    """Catches a stale token fed back, noise of the wrong position, a cache that loses rows where it grows, and an
    option that is fixed in the compiled loop. The host samples the first token only.
    """
    [expected] = expected_texts([[3, 4, 5]], n, **options)
    host = []
    monkeypatch.setattr(decoder, "sample_with", lambda *args: host.append(1) or sample_with(*args))
    assert list(model.stream_ids([3, 4, 5], max_new_tokens=n, **options)) == expected
    assert len(set(expected)) > 3
    assert len(host) == 1


def test_a_repetition_penalty_is_left_to_the_host(model, monkeypatch):
    """Catches a penalty that is ignored: the device does not know which tokens the text has."""
    options = {"seed": 7, "repetition_penalty": 1.3}
    [expected] = expected_texts([[3, 4, 5]], 10, **options)
    monkeypatch.setattr(model._decoder, "_run", None)  # the device is not asked
    assert list(model.stream_ids([3, 4, 5], max_new_tokens=10, **options)) == expected


def test_the_texts_of_a_batch_are_the_hosts_and_end_alone(model, backend, monkeypatch):
    """Catches padding that is counted as a position, rows that are mixed up, a row that stops the others, and steps
    that are computed after all texts have ended.
    """
    whole = expected_texts(PROMPTS, 40, **SAMPLED)
    assert texts(model, PROMPTS, 40, **SAMPLED) == whole
    ends = {whole[0][13], whole[1][4], whole[2][30]}
    expected = expected_texts(PROMPTS, 40, ends=ends, **SAMPLED)
    steps = max(map(len, expected))
    assert len(set(map(len, expected))) > 1
    assert steps < 40
    fetched = []
    fetch = type(backend).fetch
    monkeypatch.setattr(type(backend), "fetch", lambda self, x: fetched.append(fetch(self, x)) or fetched[-1])
    assert texts(model, PROMPTS, 40, ends=ends, **SAMPLED) == expected
    if backend.compiles_per_shape:
        computed = sum(int((wait() >= 0).all(axis=1).sum()) for wait in fetched)
        assert computed == steps - 1  # the first token is the host's
    else:
        assert steps - 1 <= len(fetched) <= steps


def test_a_window_slides_as_on_the_host(model):
    """Catches positions of the random stream that begin again with each window."""
    options, prompt = {**SAMPLED, "seed": 7}, [3] * 50
    [expected] = expected_texts([prompt], 60, **options)
    assert list(model.stream_ids(prompt, max_new_tokens=60, sliding=True, **options)) == expected


def test_a_text_that_is_not_read_to_its_end_leaves_nothing(model):
    """Catches a state that one text leaves for the next, and texts that share one."""
    streams = [model.stream_ids([i], max_new_tokens=40, seed=i, **SAMPLED) for i in (3, 4)]
    expected = [expected_texts([[i]], 40, seed=i, **SAMPLED)[0] for i in (3, 4)]
    for i in range(20):
        assert [next(stream) for stream in streams] == [tokens[i] for tokens in expected]
    del streams[0]
    assert list(streams[0]) == expected[1][20:]


def test_what_the_device_leaves_open_the_host_decides(backend, device_chooses, monkeypatch):
    """Catches a cache that is rewound by too few tokens, or by too many, and tokens that are lost or doubled there.

    Every eighth token of each text is declared undecided, with a wrong id.
    """

    def choose(backend, logits, places, *args):
        return backend.xp.where((places & 7) == 0, -2, decide(backend, logits, places, *args))

    def sample(sampling, logits, place, seen, index):
        host.add(place - len(PROMPTS[index]))
        return sample_with(sampling, logits, place, seen, index)

    decide, host = choice.choose, set()
    monkeypatch.setattr(decoder, "choose", choose)
    expected = expected_texts(PROMPTS, 40, **SAMPLED)
    monkeypatch.setattr(decoder, "sample_with", sample)
    assert texts(ahead(backend), PROMPTS, 40, **SAMPLED) == expected
    assert host == {n for n in range(40) if n == 0 or any((len(prompt) + n) % 8 == 0 for prompt in PROMPTS)}
