"""The choice of a token on the device, compared with `sample_with` for any logits, and what is left to the host.

`portable_gpt2.testing.model` tests, on every backend, that the texts are those of the host.
"""

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

import portable_gpt2 as pg
from portable_gpt2.generation import choice, decoder
from portable_gpt2.generation.decoder import Generation
from portable_gpt2.random import gumbel
from portable_gpt2.sampling import Sampling, sample_with
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights

CONFIG = pg.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_vocab=61, n_ctx=150, eos_token_id=None)
WEIGHTS = random_weights(CONFIG)
NUMPY = pg.get_backend("numpy")
HOST = pg.GPT2(CONFIG, on_backend(NUMPY, WEIGHTS))


def ahead(backend, dtype="float32"):
    """Return a model that chooses tokens on the device."""
    model = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS, dtype))
    model._decoder.runs_ahead = True
    return model


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """With few candidates, a small vocabulary has logits that are not among them."""
    monkeypatch.setattr(choice, "_CANDIDATES", 16)


def texts(model, prompts, n, *, ends=(), **options):
    """Return the tokens of a batch, whose texts end at the tokens in `ends`."""
    batch = [Generation(list(p), Sampling(**{"seed": 3 + i, **options}), i) for i, p in enumerate(prompts)]
    for generation in model._decoder.stream(batch, n, ends):
        generation.finished = generation.tokens[-1] in ends
    return [generation.tokens for generation in batch]


# The choice


def on_host(logits, sampling, place, index=0):
    return sample_with(sampling, logits, place, [], index)


def on_device(backend, logits, samplings, places, indices):
    """Return what the device chooses for a batch: ids, or -1 - id for an undecided one."""
    rule = choice.common_rule(samplings, logits.shape[-1])
    arrays = (backend.from_numpy(a) for a in choice.new_draw(samplings, indices, rule))
    given = backend.from_numpy(logits), backend.from_numpy(np.asarray(places, np.int32)[:, None])
    gumbel = choice.gumbel_on(backend, None)
    chosen = backend.compile(lambda x, places, draw: choice.choose(backend, x, places, draw, rule, gumbel))
    return backend.to_numpy(chosen(*given, choice.Draw(*arrays)))[:, 0]


sampling_options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.3, 1.0, 1.9]),
        "top_k": st.sampled_from([None, 1, 3, 8, 11, 100]),
        "top_p": st.sampled_from([None, 1e-9, 0.5, 0.9, 1]),
        "min_p": st.sampled_from([None, 1e-3, 0.2, 1]),
        "seed": st.integers(0, 2**64 - 1),
    }
)
levels = st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 0.75, 1.0]), min_size=24, max_size=24)


class LastFirst(type(NUMPY)):
    """NumPy that sorts equal logits in the order opposite to the host's."""

    def top_k(self, x, k):
        indices = x.shape[-1] - 1 - np.argsort(-x[:, ::-1], axis=-1, kind="stable")[:, :k]
        return np.take_along_axis(x, indices, axis=-1), indices


@given(levels, sampling_options, st.integers(0, 2**31 - 1))
def test_a_choice_among_equal_logits_is_the_hosts_or_is_undecided(values, options, place):
    """Catches top-k without the logits that tie, and equal logits of which top-p certainly keeps the wrong ones."""
    logits = np.asarray([values], np.float32)
    assume(logits.max() > -math.inf)
    sampling = Sampling(**options)
    (found,) = on_device(LastFirst(), logits, [sampling], [place], [2])
    expected = on_host(logits[0], sampling, place, 2)
    if found >= 0:
        assert found == expected
    else:  # only equal logits at a threshold, among the candidates or beyond them, leave a choice open
        assert sampling.top_k or sampling.top_p


def test_of_equal_logits_at_the_threshold_of_top_p_the_host_chooses():
    """Catches the first of two equal logits in the order of the device: on the host, top-p keeps the smaller id."""
    logits = np.asarray([[1.0, 1.0] + [-3.0] * 22], np.float32)
    given = Sampling(top_k=2, top_p=0.3, seed=1)
    assert on_device(LastFirst(), logits, [given], [0], [0])[0] < 0 == on_host(logits[0], given, 0)


def test_options_reach_the_device_with_48_bits():
    """Catches a temperature that is rounded to float32: about one of 10^7 tokens would differ."""
    given = Sampling(temperature=1 / 3, top_k=7, top_p=0.9, min_p=0.01, seed=1)
    options, _ = choice.new_draw([given], [0], choice.Rule(61, True))
    expected = [1 / 3, 7, 0.9, math.log(0.01)]
    np.testing.assert_allclose(options.astype(np.float64).sum(axis=0), expected, rtol=2.0**-47)


def test_a_choice_is_left_to_the_host_if_more_logits_tie_than_there_are_candidates():
    """Catches a total of top-p without the logits that are missing: one logit has a quarter of the weight of the
    candidates, and less than a quarter of all weights.
    """
    logits = np.asarray([[1.0] + [0.5] * 40], np.float32)
    given = Sampling(top_k=8, top_p=0.25, temperature=0.3, seed=1)
    assert on_device(NUMPY, logits, [given], [0], [0]).tolist() < [0]


@given(st.integers(0, 2**32), sampling_options)
def test_a_choice_among_different_logits_is_decided_and_is_the_hosts(seed, options):
    """Catches a filter that differs, noise of another entry, position, seed or sample, and a choice left to the host
    for no reason.
    """
    logits = np.random.default_rng(seed).normal(0, 3, (2, 61)).astype(np.float32)
    samplings = [Sampling(**{**options, "seed": (options["seed"] + i) % 2**64}) for i in range(2)]
    assume(all(len(set(row)) == len(row) for row in logits.tolist()))
    found = on_device(NUMPY, logits, samplings, [5, 70], [0, 2**64 - 1])
    expected = [on_host(*given) for given in zip(logits, samplings, [5, 70], [0, 2**64 - 1], strict=True)]
    assert found.tolist() == expected


def test_with_the_default_options_hardly_any_choice_is_undecided():
    """Catches a tolerance so large that the host often decides: 2,000 draws from 5,000 logits, none undecided, where
    the two best sums are on average 1 apart.
    """
    logits = np.random.default_rng(0).normal(0, 3, (2000, 500)).astype(np.float32)
    samplings = [Sampling(seed=i) for i in range(2000)]
    assert on_device(NUMPY, logits, samplings, np.arange(2000), [0] * 2000).min() >= 0


@given(st.data())
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_variates_are_the_hosts(name, data):
    """Catches a product or a shift that treats 64 bits as signed, and swapped halves of a seed or of a stream."""
    if name == "torch":
        pytest.importorskip("torch")
    backend = pg.get_backend(name)
    words = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))
    seed, index, place = data.draw(words), data.draw(words), data.draw(st.integers(0, 2**31 - 1))
    _, keys = choice.new_draw([Sampling(seed=seed)], [index], choice.Rule(61, False))
    given = np.arange(61, dtype=np.int32)[None], np.asarray([[place]], np.int32), keys
    found = backend.to_numpy(choice.gumbel_of(backend, *(backend.from_numpy(a) for a in given)))
    np.testing.assert_allclose(found[0], gumbel(np.arange(61), 61, place, seed, index), rtol=0, atol=1e-13)


class Kernel(type(NUMPY)):
    """NumPy with a kernel of Gumbel variates."""

    offset = 0.0

    def gumbel(self, entries, places, seeds, streams):
        assert entries.dtype == places.dtype == seeds.dtype == streams.dtype == np.int64
        keys = zip(places[:, 0], seeds[:, 0], streams[:, 0], strict=True)
        rows = [gumbel(entries[0], 50257, int(p), int(s) % 2**64, int(i) % 2**64) for p, s, i in keys]
        return np.stack(rows) + self.offset


def test_a_kernel_of_variates_is_used_if_it_is_right():
    backend = Kernel()
    assert choice.gumbel_on(backend, None).keywords == {"with_kernel": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.gumbel_on(NUMPY, None).keywords == {"with_kernel": False}


@pytest.mark.parametrize("offset", [1e-6, math.nan, "broken"])
def test_a_kernel_of_variates_that_is_wrong_is_not_used(offset):
    """Catches a kernel that changes texts: it is compared with the host once, and its failure is told."""
    backend = Kernel()
    backend.offset = offset
    with pytest.warns(RuntimeWarning, match="the kernel of Gumbel variates"):
        assert choice.gumbel_on(backend, None).keywords == {"with_kernel": False}


# The text


PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
SAMPLED = {"top_k": 5, "top_p": 0.9}


def test_the_host_may_have_to_decide_every_token(monkeypatch):
    """Catches a cache that is rewound by too few tokens, or by too many, if two tokens in a row are undecided."""

    def choose(backend, logits, places, *args):
        return backend.xp.where(places == places, -2, decide(backend, logits, places, *args))

    def sample(sampling, logits, place, seen, index):
        host.add(place - len(PROMPTS[index]))
        return sample_with(sampling, logits, place, seen, index)

    decide, host = choice.choose, set()
    monkeypatch.setattr(decoder, "choose", choose)
    expected = texts(HOST, PROMPTS, 40, **SAMPLED)
    monkeypatch.setattr(decoder, "sample_with", sample)
    assert texts(ahead(NUMPY), PROMPTS, 40, **SAMPLED) == expected
    assert host == set(range(40))


def test_a_tolerance_beyond_all_sums_leaves_every_token_to_the_host(monkeypatch):
    """Catches a comparison in which the tolerance does not count."""
    monkeypatch.setattr(choice, "TOLERANCE", 100.0)
    logits = np.random.default_rng(0).normal(0, 1, (20, 61)).astype(np.float32)
    for options in ({}, {"top_k": None}, {"top_p": 0.9}):
        assert on_device(NUMPY, logits, [Sampling(seed=1, **options)] * 20, range(20), [0] * 20).max() < 0


def test_texts_of_different_options_are_sampled_by_the_host(monkeypatch):
    """Catches options of the first text that are applied to all."""
    model, given = ahead(NUMPY), [Sampling(seed=1), Sampling(seed=1, temperature=0.2)]
    monkeypatch.setattr(decoder.Decoder, "_run", None)  # the device is not asked
    for n, prompts in ((20, [[3], [4]]),):
        batch = [Generation(list(prompt), sampling) for prompt, sampling in zip(prompts, given, strict=True)]
        list(model._decoder.stream(batch, n))
        for generation, sampling, prompt in zip(batch, given, prompts, strict=True):
            alone = Generation(list(prompt), sampling)
            list(HOST._decoder.stream([alone], n))
            assert generation.tokens == alone.tokens


def test_logits_in_16_bits_give_the_hosts_text(torch):
    """Catches equal logits at the edge of top-p, which bfloat16 often has, and which the host and the device sort
    differently.
    """
    backend = pg.get_backend("torch")
    host = pg.GPT2(CONFIG, on_backend(backend, WEIGHTS, "bfloat16"))
    for options in ({"temperature": 0}, {"top_p": 0.5, "top_k": None}):
        expected = texts(host, PROMPTS, 60, **options)
        assert texts(ahead(backend, "bfloat16"), PROMPTS, 60, **options) == expected


def test_only_an_accelerator_runs_ahead(backend):
    """Catches a CPU that computes what nobody reads."""
    assert not pg.GPT2(CONFIG, on_backend(backend, WEIGHTS))._decoder.runs_ahead
