"""From logits to a token: the same draw everywhere, from the right distribution, on one pinned random stream."""

import dataclasses
import decimal
import math
import typing
from itertools import pairwise

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.correct_rounding import functions
from portable_gpt2.random import gumbel
from portable_gpt2.sampling import (
    Sampling,
    SamplingOptions,
    apply_repetition_penalty,
    filter_logits,
    sample,
    sample_with,
)

# The random stream

STREAM = [  # seed, index, position, the raw words of numpy.random.Philox, and what they become
    (
        7,
        0,
        5,
        [0x6BC2FA46727E4726, 0x30B52402DA68A012, 0xD4FBB3DBA0AB34B6, 0xCC303A41281BE70D, 0x46DB5E5863C317A9],
        [0.14473012404901697, -0.506421599008802, 1.6930146854586936, 1.4866257582057816, -0.2503811968755657],
    ),
    (
        2**64 - 1,
        3,
        1023,
        [0xA7B9DC0A03A355E4, 0x65A76B0CD6A86316, 0x20BBD644D432EC08, 0x59D7AD60DCBC9684, 0x3E37D0CA852F8C71],
        [0.8607480205366514, 0.07947319295203821, -0.7211373493568196, -0.04604299066786494, -0.3467991733482471],
    ),
]


@pytest.mark.parametrize(("seed", "index", "position", "words", "variates"), STREAM)
def test_the_random_stream_is_pinned(seed, index, position, words, variates):
    """Catches a change of NumPy's Philox, of the key, of the counter, or of the way from a word to a variate.

    Each of them would draw another text for a seed that somebody has written down.
    """
    philox = np.random.Philox(key=np.asarray([seed, index], np.uint64), counter=[0, position, 0, 0])
    assert philox.random_raw(5).tolist() == words
    by_hand = [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in words]
    drawn = gumbel(np.arange(5), 5, position, seed, index)
    np.testing.assert_allclose(drawn, variates, rtol=1e-12)
    np.testing.assert_allclose(drawn, by_hand, rtol=1e-12)


@pytest.mark.parametrize(
    ("seed", "index", "plain", "top_40"),
    [
        (0, 0, [41062, 18393, 24393, 17695, 42840], [26969, 26969, 44009, 31939, 26259]),
        (7, 0, [27962, 46428, 43664, 1272, 20302], [42589, 23419, 36909, 47559, 29809]),
        (7, 1, [25957, 25757, 47489, 34873, 18719], [40459, 38329, 40459, 43299, 21999]),
        (2**64 - 1, 0, [13680, 28942, 29739, 20680, 40817], [44009, 25549, 41169, 37619, 36199]),
    ],
)
def test_tokens_are_pinned(seed, index, plain, top_40):
    """Catches any change of the token that a seed gives, over the whole vocabulary and after a filter."""
    logits = 5 * np.sin(np.arange(50257.0))
    stream = {"seed": seed, "index": index}
    assert [sample(logits, p, temperature=0.7, top_k=None, **stream) for p in range(5)] == plain
    assert [sample(logits, p, top_k=40, **stream) for p in range(5)] == top_40


@pytest.mark.parametrize("one", [0, 2**53, 2**63 - 1, 2**63, 2**64 - 2])
def test_neighbouring_seeds_draw_from_different_streams(one):
    """Catches a key that passes through float64 or int64: it did, for seeds of 2^63 and more."""
    assert not set(gumbel(np.arange(50), 50, 0, one)) & set(gumbel(np.arange(50), 50, 0, one + 1))


def test_no_two_positions_indices_or_seeds_share_a_variate():
    """Catches a position or an index that is left out of the stream, or streams that overlap by a shift."""
    names = [(p, s, i) for p in (0, 1, 2, 63, 64, 1023) for s in (0, 1, 2) for i in (0, 1, 2)]
    drawn = np.stack([gumbel(np.arange(300), 300, p, s, i) for p, s, i in names])
    assert len(np.unique(drawn)) == drawn.size


@given(st.data())
def test_a_variate_depends_on_nothing_but_its_own_entry(data):
    """Catches variates that are drawn for the survivors in turn, so that a filter shifts all that follow."""
    n_vocab = data.draw(st.integers(1, 600))
    kept = np.asarray(sorted(data.draw(st.sets(st.integers(0, n_vocab - 1), min_size=1))))
    position, seed, index = (data.draw(st.integers(0, 2**n - 1)) for n in (20, 64, 32))
    everything = gumbel(np.arange(600), 600, position, seed, index)
    np.testing.assert_array_equal(gumbel(kept, n_vocab, position, seed, index), everything[kept])


# Filters


def filtered(x, temperature, top_k, top_p, min_p=None):
    return filter_logits(x, Sampling(temperature, top_k, top_p, min_p, seed=0))


finite = st.floats(-50, 50)
few_values = st.sampled_from([-3.0, 0.0, 0.5, 2.0])  # so that there are ties


@st.composite
def rows_of_logits(draw):
    """Draw logits [n_vocab], with ties and -inf among them, the largest finite."""
    elements = draw(st.sampled_from([finite, few_values, finite | st.just(-math.inf)]))
    x = draw(hnp.arrays(np.float64, st.integers(1, 40), elements=elements))
    x[draw(st.integers(0, x.size - 1))] = draw(finite)
    return x


temperatures = st.floats(0.01, 100)
top_ks = st.none() | st.integers(0, 45)
top_ps = st.none() | st.floats(0, 1, exclude_min=True)


@given(rows_of_logits(), temperatures, top_ks, top_ps, st.integers(0, 2**64 - 1), st.integers(0, 1023))
def test_a_draw_that_survives_the_filters_is_not_changed_by_them(x, temperature, top_k, top_p, seed, position):
    """Catches a filter that renormalises, reorders or shifts the stream: it may only forbid entries."""
    unfiltered = sample(x, position, temperature=temperature, top_k=None, seed=seed)
    token = sample(x, position, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    kept, _ = filtered(x, temperature, top_k, top_p)
    assert token in kept
    assert token == unfiltered or unfiltered not in kept


@given(rows_of_logits(), temperatures, top_ks, top_ps, st.integers(0, 2**64 - 1), st.integers(0, 1023))
def test_a_draw_has_the_largest_sum_of_those_that_survive(x, temperature, top_k, top_p, seed, position):
    """Catches a temperature that divides the noise too, or an argmax over the wrong entries."""
    token = sample(x, position, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    kept, _ = filtered(x, temperature, top_k, top_p)
    sums = x / temperature + gumbel(np.arange(x.size), x.size, position, seed)
    assert sums[token] >= sums[kept].max() - 1e-9


@given(rows_of_logits(), temperatures, st.integers(1, 45))
def test_top_k_keeps_the_k_largest_and_their_ties(x, temperature, k):
    """Catches an off-by-one, and ties that are broken (OpenAI's code keeps them)."""
    kept, _ = filtered(x, temperature, k, None)
    assert kept.tolist() == [i for i, value in enumerate(x) if sum(other > value for other in x) < k]


@given(rows_of_logits(), temperatures, top_ks, st.floats(0.001, 0.999))
def test_top_p_keeps_the_fewest_that_reach_p(x, temperature, top_k, p):
    """Catches OpenAI's rule, which leaves out the entry that crosses p, and one entry too many."""
    candidates, scaled = filtered(x, temperature, top_k, None)
    kept, kept_scaled = filtered(x, temperature, top_k, p)
    weights, kept_weights = sorted(np.exp(scaled), reverse=True), np.exp(kept_scaled)
    total, rounding = math.fsum(weights), 1e-12
    assert math.fsum(kept_weights) >= p * total * (1 - rounding)
    assert math.fsum(weights[: len(kept) - 1]) < p * total * (1 + rounding)
    assert sorted(kept_weights, reverse=True) == weights[: len(kept)]
    assert set(kept) <= set(candidates)


def test_top_p_includes_the_token_that_crosses_it():
    """Catches OpenAI's rule in a case that can be worked out in the head."""
    x = np.log([0.5, 0.26, 0.24])
    assert [filtered(x, 1.0, None, p)[0].tolist() for p in (0.49, 0.51, 0.75, 0.77, 1.0)] == [
        [0],
        [0, 1],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2],
    ]


@given(rows_of_logits(), temperatures, top_ks, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(x, temperature, top_k, p):
    """Catches a share of 1 instead of the largest probability, and one that is taken before the temperature."""
    before, scaled = filtered(x, temperature, top_k, None)
    kept, _ = filtered(x, temperature, top_k, None, p)
    probable = np.exp(scaled) / np.exp(scaled).sum()
    far = abs(probable - p * probable.max()) > 1e-12 * probable.max()  # else it is a matter of rounding
    expected = before[probable >= p * probable.max()]
    assert set(before[far]) & set(kept) == set(before[far]) & set(expected)
    assert int(np.argmax(x)) in kept


@given(rows_of_logits(), st.floats(1, 20), st.data())
def test_a_repetition_penalty_never_raises_a_seen_token(x, penalty, data):
    """Catches a negative logit that is divided, a token that is punished twice, and others that are touched."""
    seen = data.draw(st.lists(st.integers(0, x.size - 1), max_size=10))
    before, y = x.copy(), apply_repetition_penalty(x, seen, penalty)
    np.testing.assert_array_equal(x, before)
    others = np.setdiff1d(np.arange(x.size), seen)
    np.testing.assert_array_equal(y[others], x[others])
    assert (y <= x).all()
    np.testing.assert_array_equal(y, apply_repetition_penalty(x, [*seen, *seen], penalty))
    if penalty > 1:
        assert all(y[i] < x[i] for i in seen if np.isfinite(x[i]) and abs(x[i]) > 1e-300)


def test_a_repetition_penalty_changes_the_greedy_choice_too():
    """Catches a penalty that is applied after the greedy choice, or to no token of the prompt."""
    x = np.asarray([1.0, 3.0, 2.5, -1.0])
    assert sample(x, 9, temperature=0, repetition_penalty=1.5, seen=[1, 1, 3]) == 2
    assert sample(x, 9, temperature=0, repetition_penalty=2, seen=[1, 1, 3]) == 2
    assert sample(x, 9, temperature=0, repetition_penalty=1.1, seen=[1, 1, 3]) == 1
    assert sample(x, 9, temperature=0, repetition_penalty=1.5, seen=[]) == 1


def test_filters_apply_in_openai_s_order():
    """Catches top-p before the temperature, and top-p over entries that top-k has left out."""
    kept = [filtered(LOGITS, temperature, top_k, top_p)[0].tolist() for temperature, top_k, top_p, _ in ORDERS]
    assert kept == [expected for *_, expected in ORDERS]


# Temperature


@given(rows_of_logits(), top_ks, top_ps, st.integers(0, 1023))
def test_temperature_0_takes_the_largest_and_of_equals_the_smallest_id(x, top_k, top_p, position):
    """Catches a division by 0, a random choice among equals, and filters that matter where they cannot."""
    token = sample(x, position, temperature=0, top_k=top_k, top_p=top_p)
    assert token == x.tolist().index(max(x))


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("largest", [1e-3, 3.0, 1e30])
def test_tiny_temperatures_choose_the_largest_without_overflow(temperature, top_p, largest):
    """Catches logits / T = inf, and inf - inf = NaN, whose argmax is whatever comes first."""
    x = largest * np.asarray([0.5, -1.0, 1.0, -np.inf, 0.9])
    with np.errstate(all="raise", under="ignore"):
        assert sample(x, 3, temperature=temperature, top_p=top_p) == 2


def test_ties_at_a_tiny_temperature_are_drawn_among_the_largest():
    """Catches a limit that differs from the rule: the two largest keep their equal chances."""
    x = np.asarray([1.0, 2.0, 2.0, -1.0])
    assert {sample(x, position, temperature=1e-300) for position in range(40)} == {1, 2}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, np.nan, 2.0], [1.0, np.inf, 2.0], [-np.inf] * 3, [np.nan] * 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_logits_without_a_finite_largest_are_refused(temperature, bad, dtype):
    """Catches weights that hold a NaN, or float16 that overflowed, giving a token all the same."""
    with pytest.raises(ValueError, match=r"the logits hold a NaN or an infinity \(the largest is .*overflowed"):
        sample(np.asarray(bad).astype(dtype), 0, temperature=temperature)


@pytest.mark.parametrize("options", [{"top_k": None}, {"top_k": 4}, {"top_k": None, "top_p": 0.99999}])
def test_minus_infinity_is_never_drawn(options):
    """Catches a masked entry that the noise, or a top_k beyond the finite ones, brings back."""
    x = np.asarray([-np.inf, 0.0, -np.inf, 0.1, -np.inf])
    assert {sample(x, position, temperature=50.0, **options) for position in range(100)} == {1, 3}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_of_the_logits_does_not_matter_once_they_are_rounded(dtype):
    """Catches a sum, a softmax or a comparison in the logits' own 16 bits."""
    x = np.random.default_rng(0).normal(size=1000).astype(dtype)
    options = {"temperature": 0.7, "top_k": 100, "top_p": 0.9, "seed": 3}
    wide = [sample(x.astype(np.float64), p, **options) for p in range(100)]
    assert [sample(x, p, **options) for p in range(100)] == wide
    assert all(type(token) is int for token in wide)


def test_logits_in_float64_keep_their_digits():
    """Catches logits that are rounded to float32 first."""
    assert sample([1.0, 1.0 + 1e-12], 0, temperature=0) == 1


def test_top_p_leaves_out_a_token_that_is_not_needed():
    """Catches a set that reaches top_p exactly, and takes one token more."""
    kept, _ = filtered(np.zeros(4), 1.0, None, 0.5)
    assert kept.tolist() == [0, 1]


def test_a_top_p_of_1_keeps_every_token():
    """Catches tokens that are dropped because their probability is rounded to 0."""
    kept, _ = filtered(np.asarray([0.0, -800.0, -np.inf]), 1.0, None, 1.0)
    assert kept.tolist() == [0, 1, 2]


# The distribution

LOGITS = np.asarray([1.5, 0.3, -0.7, 2.1, 0.9, 0.0, -1.9, 1.1])  # probabilities .21 .06 .02 .39 .12 .05 .01 .14

ORDERS = [  # temperature, top_k, top_p, and what is left
    (1.0, None, 0.7, [0, 3, 7]),
    (0.5, None, 0.7, [0, 3]),  # [0, 3, 7] if top_p came before the temperature
    (2.0, None, 0.7, [0, 3, 4, 7]),
    (1.0, 5, 0.8, [0, 3, 7]),  # [0, 3, 4, 7] if top_p counted what top_k has left out
    (1.0, 2, 0.9, [0, 3]),
]

EVERYTHING = list(range(8))
DISTRIBUTIONS = [  # options, what they leave, at which temperature
    ({"top_k": None}, EVERYTHING, 1.0),
    ({"top_k": 0, "temperature": 0.5}, EVERYTHING, 0.5),
    ({"top_k": None, "temperature": 2.0}, EVERYTHING, 2.0),
    ({"top_k": 3}, [0, 3, 7], 1.0),
    ({"top_k": None, "top_p": 0.7}, [0, 3, 7], 1.0),
    ({"top_k": 5, "top_p": 0.8, "temperature": 1.0}, [0, 3, 7], 1.0),
    ({"top_k": 6, "top_p": 0.9, "temperature": 2.0}, [0, 1, 3, 4, 7], 2.0),
]

WRONG = [  # options, and what nearly right code would draw from
    ({"top_k": None}, EVERYTHING, 1.15),
    ({"top_k": None, "temperature": 0.5}, EVERYTHING, 1.0),
    ({"top_k": None, "temperature": 0.5}, EVERYTHING, 2.0),
    ({"top_k": 3}, [0, 3], 1.0),
    ({"top_k": 3}, [0, 3, 4, 7], 1.0),
    ({"top_k": None, "top_p": 0.7}, [0, 3], 1.0),  # OpenAI's rule
    ({"top_k": None, "top_p": 0.7}, [0, 3, 4, 7], 1.0),
    ({"top_k": None, "top_p": 0.7}, EVERYTHING, 1.0),
]

NAMES = {  # what may name a draw; each of them must give independent ones
    "positions": lambda i: {"position": i, "seed": 5},
    "seeds": lambda i: {"position": 9, "seed": i},
    "indices": lambda i: {"position": 9, "seed": 5, "index": i},
}


def draw(n, over, **options):
    return np.asarray([sample(LOGITS, **over(i), **options) for i in range(n)])


def probabilities(kept, temperature):
    p = np.zeros(LOGITS.size)
    p[kept] = np.exp(LOGITS[kept] / temperature)
    return p / p.sum()


def chi_square(drawn, expected):
    """Return Pearson's statistic over its quantile at 0.999: above 1 in one case of a thousand, if all is right."""
    counts = np.bincount(drawn, minlength=expected.size)
    if counts[expected == 0].any():
        return math.inf
    n, possible = counts.sum(), expected > 0
    freedom = possible.sum() - 1
    statistic = (((counts - n * expected) ** 2)[possible] / (n * expected[possible])).sum()
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return statistic / quantile


@pytest.mark.parametrize(("options", "kept", "temperature"), DISTRIBUTIONS)
def test_draws_follow_the_distribution(options, kept, temperature):
    """Catches noise that is not Gumbel's, a filter off by one, and a temperature that is applied twice."""
    assert chi_square(draw(10_000, NAMES["positions"], **options), probabilities(kept, temperature)) < 1


@pytest.mark.parametrize("over", ["seeds", "indices"])
def test_draws_follow_the_distribution_over_seeds_and_samples_too(over):
    """Catches a seed or an index that moves the stream too little to make the draws independent."""
    assert chi_square(draw(10_000, NAMES[over], top_k=None), probabilities(EVERYTHING, 1.0)) < 1


@pytest.mark.parametrize(("options", "kept", "temperature"), WRONG)
def test_the_test_of_the_distribution_rejects_what_is_nearly_right(options, kept, temperature):
    """Catches a chi-square test that cannot fail: it must reject OpenAI's top-p, and a wrong temperature."""
    assert chi_square(draw(10_000, NAMES["positions"], **options), probabilities(kept, temperature)) > 1


@pytest.mark.parametrize("over", NAMES)
def test_successive_draws_are_independent(over):
    """Catches a stream that repeats itself, or moves by one entry, from one position, seed or sample to another."""
    drawn = draw(10_000, NAMES[over], top_k=4)
    kept = [0, 3, 4, 7]
    pairs = np.asarray([8 * a + b for a, b in pairwise(drawn)][::2])
    expected = np.outer(probabilities(kept, 1.0), probabilities(kept, 1.0)).ravel()
    assert chi_square(pairs, expected) < 1


# What differs between frameworks: the logits, a little


@pytest.fixture(scope="module")
def noisy_draws():
    """Draw 3,000 tokens of a vocabulary of 50,257 twice, from logits that differ by 1e-5 as frameworks' do."""
    rng = np.random.default_rng(0)
    x = 2.5 * rng.standard_normal(50257)
    noise = rng.uniform(-1e-5, 1e-5, x.size)

    def pair(position):
        return [sample(logits, position, top_k=None, seed=7) for logits in (x, x + np.roll(noise, 17 * position))]

    def margin(position):
        """Return how far apart the two best sums are."""
        second, first = np.partition(x + gumbel(np.arange(x.size), x.size, position, 7), -2)[-2:]
        return first - second

    return [pair(position) for position in range(3000)], margin


def test_draws_survive_noise_on_the_logits(noisy_draws):
    """Catches a way of drawing in which every entry of the vocabulary has a say in every draw.

    Another token may be drawn only where the two best sums lie closer together than twice the noise, which is so in
    about one of 50,000 draws; here in none.
    """
    draws, margin = noisy_draws
    changed = [position for position, (before, after) in enumerate(draws) if before != after]
    assert all(margin(position) <= 2e-5 for position in changed)
    assert len(changed) == 0
    assert len({before for before, _ in draws}) > 500  # the draws were not all of one token


def test_one_uniform_a_draw_would_not_survive_that_noise():
    """Catches a test of the noise that cannot fail: the inverse of a cumulative sum changes its mind."""
    rng = np.random.default_rng(0)
    x = 2.5 * rng.standard_normal(50257)
    before, after = (np.cumsum(np.exp(logits)) for logits in (x, x + rng.uniform(-1e-5, 1e-5, x.size)))
    u = rng.uniform(size=3000)
    changed = np.searchsorted(before, u * before[-1]) != np.searchsorted(after, u * after[-1])
    assert changed.sum() > 3


# On every backend

OPTIONS = [
    {"temperature": 0},
    {"seed": 7},
    {"seed": 2**64 - 1, "temperature": 1.7, "top_k": None},
    {"seed": 8, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def model(backend):
    return tiny.model(backend)


def test_the_same_seed_draws_the_same_tokens_on_every_backend(model):
    """Catches anything of a framework's that reaches the draw: its generator, its order, its dtype."""
    reference = tiny.model(pg.get_backend("numpy"))
    for options in OPTIONS:
        expected = list(reference.stream_ids([5, 300, 7], max_new_tokens=40, **options))
        assert list(model.stream_ids([5, 300, 7], max_new_tokens=40, **options)) == expected
        assert len(set(expected)) > 5


def test_a_draw_does_not_depend_on_what_was_drawn_before(model):
    """Catches a generator that keeps a state: a text cut in two and continued must come out the same."""
    whole = list(model.stream_ids([5, 300, 7], max_new_tokens=20, seed=7))
    for cut in (1, 12):
        rest = model.stream_ids([5, 300, 7, *whole[:cut]], max_new_tokens=20 - cut, seed=7)
        assert list(rest) == whole[cut:]


def test_a_draw_does_not_depend_on_the_batch_that_its_text_stands_in(model):
    """Catches a stream that counts the rows of a batch: the tokens of a text must depend on that text alone."""
    texts = [[5, 300, 7, 9], [1, 2, 3, 4], [383, 0, 383, 0]]

    def drawn(batch):
        rows = pg.to_numpy(model.logits(batch))[:, -1, :]
        return [[sample(row, 4, seed=seed, index=index) for seed in range(10) for index in (0, 1)] for row in rows]

    together = drawn(texts)
    assert together == [drawn([text])[0] for text in texts]
    assert together == drawn(texts[::-1])[::-1]
    assert together[0] != together[1]


# Options

BAD_OPTIONS = {
    "temperature": (
        [-1, -1e-9, math.nan, math.inf, "1", None, True, [1.0], 1j],
        "expected a number of at least 0 (0 is greedy)",
    ),
    "top_k": ([-1, 2.0, math.nan, "40", True, [40]], "expected an int of at least 0 (0 or None is off)"),
    "top_p": (
        [0, 0.0, -0.1, 1.0000001, 2, math.nan, "0.9", True, [0.9]],
        "expected a number above 0 and at most 1 (None is off)",
    ),
    "min_p": (
        [0, 0.0, -0.1, 1.0000001, 2, math.nan, "0.9", True, [0.9]],
        "expected a number above 0 and at most 1 (None is off)",
    ),
    "repetition_penalty": (
        [0, -1, math.nan, math.inf, "1.2", None, True],
        "expected a number above 0 (1 is off)",
    ),
    "seed": ([-1, 2**64, 1.0, math.nan, "7", True], "expected an int from 0 to 2**64 - 1"),
}
GOOD_OPTIONS = {
    "temperature": [0, 0.0, 1, 0.7, 1e-300, 1e300, np.float32(0.7), np.int64(1)],
    "top_k": [None, 0, 1, 40, 10**6, np.int32(40)],
    "top_p": [None, 1, 1.0, 1e-300, np.float32(0.9)],
    "min_p": [None, 1, 1.0, 1e-300, np.float32(0.9)],
    "repetition_penalty": [1, 1.0, 1.3, 0.5, np.float32(1.1)],
    "seed": [0, 2**64 - 1, np.uint64(2**64 - 1), np.int32(7)],
}
DEFAULTS = {"temperature": 1.0, "top_k": 40, "top_p": None, "seed": 0}


def test_the_defaults_are_pinned():
    """Catches a default that drifts: it would change the text of everybody who names a seed and nothing else."""
    defaults = {field.name: field.default for field in dataclasses.fields(Sampling)}
    expected = {"temperature": 1.0, "top_k": 40, "top_p": None, "min_p": None, "repetition_penalty": 1.0, "seed": None}
    assert defaults == expected


def test_every_option_is_tried():
    """Catches an option that is added, and whose bad values nobody has thought of."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    assert [*BAD_OPTIONS] == [*GOOD_OPTIONS] == names


def test_the_options_have_one_set_of_types():
    """Catches a field of `Sampling` that a type checker does not know, or takes for another type."""
    fields = {field.name: typing.get_type_hints(Sampling)[field.name] for field in dataclasses.fields(Sampling)}
    assert typing.get_type_hints(SamplingOptions) == fields
    assert not SamplingOptions.__required_keys__


def test_every_option_is_documented():
    """Catches a docstring from which a field is missing."""
    text = " ".join(Sampling.__doc__.split())
    for field in dataclasses.fields(Sampling):
        assert f"{field.name} : {field.type}" in text
        assert field.metadata["help"][1:] in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, value, expected) for name, (values, expected) in BAD_OPTIONS.items() for value in values],
)
def test_an_option_that_makes_no_sense_is_refused(name, value, expected):
    """Catches a NaN that passes every comparison, a bool that counts as 1, a message that leaves one guessing."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared as a whole
        Sampling(**{**DEFAULTS, name: value})
    assert str(caught.value) == f"{name} is {value!r}; {expected}"


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in GOOD_OPTIONS.items() for value in values]
)
def test_an_option_that_makes_sense_is_accepted_and_works(name, value):
    """Catches a check that refuses NumPy's numbers or the ends of a range, or lets pass what then fails."""
    options = {**DEFAULTS, name: value}
    Sampling(**options)
    assert sample(LOGITS, 3, **options) in EVERYTHING


@pytest.mark.parametrize(
    "logits",
    [np.ma.masked_array([0.0, 9.0], [0, 1]), np.rec.array([0.0, 9.0]), None, "ab", {0: 1.0}, iter([1.0])],
    ids=type,
)
def test_logits_are_a_plain_array_or_a_list(logits):
    """Catches a logit that a mask hides and that is drawn all the same."""
    with pytest.raises(TypeError, match=r"convert it with|expected an array"):
        sample(logits, 0, temperature=0)
    assert sample([0.0, 9.0], 0, temperature=0) == 1


@pytest.mark.parametrize("logits", [[], [[0.0, 9.0]], np.float32(9), [False, True], [0j, 9j]], ids=str)
def test_logits_that_are_not_one_row_of_numbers_are_refused(logits):
    """Catches a token of several rows at once, and an error of NumPy where there are no logits."""
    with pytest.raises(ValueError, match=r"logits have shape .*; expected float \[n_vocab\]"):
        sample(logits, 0, temperature=0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_logits_may_be_integers(dtype):
    """Catches a check that refuses them, and a difference of two of them that wraps around."""
    x = np.asarray([0, 5, 127, 2, 126], dtype)
    expected = [sample(x.astype(np.float64), n, temperature=30) for n in range(20)]
    assert [sample(x, n, temperature=30) for n in range(20)] == expected
    assert len({*expected}) > 1


@pytest.mark.parametrize("name", ["position", "index"])
def test_a_position_and_an_index_are_integers(name):
    """Catches an error of NumPy for 5.0, and the position of a narrow integer that wraps around."""
    given = {"position": 5, "index": 2}
    for bad in (5.0, "5", None, True):
        with pytest.raises(ValueError, match=f"{name} is {bad!r}; expected an int"):
            sample(LOGITS, **{**given, name: bad})
    assert sample(LOGITS, **{**given, name: np.uint8(255)}) == sample(LOGITS, **{**given, name: 255})


@pytest.mark.parametrize("seen", [[-1], [len(LOGITS)], [0.5], "1"], ids=repr)
def test_tokens_that_are_not_in_the_vocabulary_cannot_have_been_seen(seen):
    """Catches a negative id that counts from the end."""
    with pytest.raises((TypeError, ValueError), match="seen"):
        sample(LOGITS, 0, seen=seen, repetition_penalty=2.0)


def test_a_sample_is_the_first_of_seed_0_unless_more_is_said():
    """Catches another default: the examples in the documentation would draw other tokens."""
    x = np.zeros(1000)
    assert sample(x, 5) == sample(x, 5, seed=0, index=0)
    assert len({sample(x, 5), sample(x, 5, seed=1), sample(x, 5, index=1)}) == 3


def test_without_a_seed_one_is_chosen():
    """Catches options that all share a seed, and a seed that is not known after a text was drawn."""
    one, other = Sampling(), Sampling()
    assert type(one.seed) is type(other.seed) is int
    assert one.seed != other.seed


@given(st.lists(st.floats(-700, 0) | st.floats(2.0**-1022, 1e300), min_size=1, max_size=20))
def test_the_functions_of_the_reproducible_mode_are_rounded_correctly(numbers):
    """Catches an exp or log whose last bit is not decided."""
    x = np.asarray(numbers)
    positive, negative = x[x > 0], x[x <= 0]
    digits = decimal.Context(prec=100)
    logs = [float(decimal.Decimal(float(each)).ln(digits)) for each in positive]
    powers = [float(decimal.Decimal(float(each)).exp(digits)) if each > -600 else 0.0 for each in negative]
    np.testing.assert_array_equal(functions.log(positive), logs)
    np.testing.assert_array_equal(functions.exp(negative), powers)


def test_sampling_with_those_functions_differs_only_by_rounding():
    """Catches functions that are not passed on to the noise, to top-p or to min-p."""
    x, calls = np.random.default_rng(0).standard_normal(40), []
    for options in ({"top_p": 0.7}, {"min_p": 0.1}):
        sampling = Sampling(seed=3, **options)
        exp, log = (lambda a, f=f: calls.append(f) or f(a) for f in (functions.exp, functions.log))
        assert sample_with(sampling, x, 5, [], 0, exp, log) == sample_with(sampling, x, 5, [], 0)
        assert calls == [functions.exp, functions.log, functions.log]
        calls.clear()
