"""What `GPT2.trace` refuses. `portable_gpt2.testing.model` tests what it returns."""

import pytest
import tiny


def test_what_cannot_be_traced_is_refused(backend):
    """Catches a text that is longer than the model reads, and one without a tokenizer."""
    model = tiny.model(backend)
    with pytest.raises(ValueError, match="65 tokens were given; the model has n_ctx = 64 positions"):
        model.trace([1] * 65)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.trace("To be")
    with pytest.raises(ValueError, match="no dimension may be 0"):
        model.trace([])
