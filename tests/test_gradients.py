"""What the hand-written gradients refuse, and gradients of nothing. The gradients themselves are tested by
`portable_gpt2.testing.training`.
"""

import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2 import gradients


def test_a_gradient_refuses_what_its_op_refuses(backend):
    """Catches shapes that only the framework's matrix product complains about, in its own words."""
    q, v = backend.from_numpy(np.zeros((3, 4), np.float32)), backend.from_numpy(np.zeros((2, 4), np.float32))
    for attention in (pg.attention, gradients.attention):
        with pytest.raises(ValueError, match=r"^attention: v has shape \[2, 4\], expected .*keys = 3"):
            attention(q, q, v)
    scalar, target = backend.from_numpy(np.zeros((), np.float32)), backend.from_numpy(np.zeros((), np.int32))
    for cross_entropy in (pg.cross_entropy, gradients.cross_entropy):
        with pytest.raises(ValueError, match=r"^cross_entropy: logits has shape \[\]"):
            cross_entropy(scalar, target)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_the_loss_of_no_targets_is_nan_and_its_gradient_empty(backend, shape):
    """Catches a ZeroDivisionError in the backward pass of a mean over nothing."""
    logits = backend.from_numpy(np.zeros(shape, np.float32))
    value, backward = gradients.cross_entropy(logits, backend.from_numpy(np.zeros(shape[:-1], np.int32)))
    assert np.isnan(backend.to_numpy(value))
    assert backend.to_numpy(backward()["logits"]).shape == shape


@pytest.mark.parametrize("shape", [(0, 0), (2, 0)])
def test_a_vocabulary_of_nothing_is_refused(backend, shape):
    """Catches the framework's own error about the largest of no numbers, and a range from 0 to -1."""
    logits, targets = backend.from_numpy(np.zeros(shape, np.float32)), backend.from_numpy(np.zeros(shape[:1], np.int32))
    for cross_entropy in (pg.cross_entropy, gradients.cross_entropy):
        with pytest.raises(ValueError, match=r"^cross_entropy: logits have shape \[\d, 0\]; the vocabulary is empty"):
            cross_entropy(logits, targets)
