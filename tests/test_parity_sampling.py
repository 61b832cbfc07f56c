"""The filters of sampling against Hugging Face transformers' logits processors, on the same logits."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from portable_gpt2.sampling import (  # noqa: E402 - after the imports that may skip this file
    Sampling,
    apply_repetition_penalty,
    filter_logits,
)


def filtered(x, temperature, top_k, top_p, min_p=None):
    return filter_logits(x, Sampling(temperature, top_k, top_p, min_p, seed=0))


def kept_by_transformers(x, temperature, top_k, top_p, min_p=None):
    """Return the ids that its processors leave, in the order in which its generate applies them."""
    scores = torch.from_numpy(x)[None]
    for process in (
        transformers.TemperatureLogitsWarper(temperature),
        transformers.TopKLogitsWarper(top_k) if top_k else None,
        transformers.TopPLogitsWarper(top_p) if top_p else None,
        transformers.MinPLogitsWarper(min_p) if min_p else None,
    ):
        scores = scores if process is None else process(None, scores)
    return np.flatnonzero(scores[0].numpy() > -math.inf)


def distinct(values):
    return len(set(values)) == len(values)


logits = hnp.arrays(np.float64, st.integers(1, 60), elements=st.integers(-4000, 4000).map(lambda n: n / 400))
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.7])
top_ks = st.none() | st.integers(1, 70)


@given(logits, temperatures, st.integers(1, 70))
@example(np.asarray([1.0, 2.0, 2.0, 2.0, 0.5]), 1.0, 2)  # both keep ties, as OpenAI's code does
def test_top_k_keeps_what_transformers_keeps(x, temperature, top_k):
    """Catches an off-by-one, a k beyond the vocabulary, and ties that are broken."""
    kept, _ = filtered(x, temperature, top_k, None)
    assert kept.tolist() == kept_by_transformers(x, temperature, top_k, None).tolist()


@given(logits, temperatures, top_ks, st.floats(0.01, 0.99))
@example(np.log([0.5, 0.25, 0.125, 0.125]), 1.0, None, 0.6)
def test_top_p_keeps_what_transformers_keeps(x, temperature, top_k, top_p):
    """Catches OpenAI's rule, a sum that counts what top-k left out, and filters in another order.

    If logits at the edge of the nucleus are equal, transformers keeps those that torch.sort happens to put last and we
    those of the smallest ids: there, how many are kept and which logits they have must agree.
    """
    kept, _ = filtered(x, temperature, top_k, top_p)
    sums = np.cumsum(np.sort(np.exp(filtered(x, temperature, top_k, None)[1]))[::-1])
    assume(abs(sums / sums[-1] - top_p).min() > 1e-9)  # else it is a matter of rounding
    theirs = kept_by_transformers(x, temperature, top_k, top_p)
    assert sorted(x[kept]) == sorted(x[theirs])
    if distinct(x):
        assert kept.tolist() == theirs.tolist()


@given(logits, temperatures, top_ks, st.none() | st.floats(0.3, 0.99), st.floats(0.001, 0.99))
def test_min_p_keeps_what_transformers_keeps(x, temperature, top_k, top_p, min_p):
    """Catches another order of the filters, and a share of all instead of the largest probability."""
    assume(distinct(x))
    _, scaled = filtered(x, temperature, top_k, None)
    sums = np.cumsum(np.sort(np.exp(scaled))[::-1])
    assume(top_p is None or abs(sums / sums[-1] - top_p).min() > 1e-9)  # else it is a matter of rounding
    assume(abs(np.exp(scaled) - min_p).min() > 1e-9)
    kept, _ = filtered(x, temperature, top_k, top_p, min_p)
    assert kept.tolist() == kept_by_transformers(x, temperature, top_k, top_p, min_p).tolist()


@given(logits, st.floats(0.1, 10), st.data())
def test_the_repetition_penalty_is_transformers_(x, penalty, data):
    """Catches a rule for negative logits, or for tokens that occur twice, that is another one."""
    seen = data.draw(st.lists(st.integers(0, x.size - 1), min_size=1, max_size=12))
    process = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = process(torch.tensor([seen]), torch.from_numpy(x.copy())[None])[0].numpy()
    np.testing.assert_array_equal(apply_repetition_penalty(x, seen, penalty), theirs)


@pytest.mark.parametrize(
    "options", [(1.0, 40, None), (0.8, 40, 0.9), (1.0, None, 0.95), (1.3, 1000, 0.999), (1.0, None, None, 0.05)]
)
def test_the_whole_vocabulary_is_filtered_alike(options):
    """Catches sums that lose what matters over 50,257 entries."""
    x = 2.5 * np.random.default_rng(0).standard_normal(50257)
    kept, scaled = filtered(x, *options)
    assert kept.tolist() == kept_by_transformers(x, *options).tolist()
    assert scaled.max() == 0
    theirs = torch.log_softmax(torch.from_numpy(x)[torch.from_numpy(kept)] / options[0], 0).numpy()
    np.testing.assert_allclose(scaled - np.log(np.exp(scaled).sum()), theirs, rtol=1e-12)
