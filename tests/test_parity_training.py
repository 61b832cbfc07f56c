"""What training writes, read by Hugging Face transformers: the tokenizer's ids, and the logits."""

import numpy as np
import pytest
import tiny

import portable_gpt2 as pg
from portable_gpt2.training import Recipe, Run, Trainer, train, train_tokenizer, write_tokens

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run of a few steps, done."""
    backend, recipe = pg.get_backend("numpy"), Recipe(steps=3, batch_size=2, warmup=1, eval_every=2)
    tokenizer = train_tokenizer([tiny.TEXT], 300)
    config = pg.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_vocab=300, n_ctx=16, eos_token_id=0)
    path = tmp_path_factory.mktemp("training") / "run"
    write = lambda file: write_tokens([tiny.TEXT], tokenizer, 300, file) - 100  # noqa: E731
    run, trainer = Run.create(path, recipe, config, tokenizer, write), Trainer(config, recipe, backend)
    for _ in train(run, trainer, trainer.start(pg.init_params(config, backend=backend))):
        pass
    return path


def test_transformers_reads_the_tokenizer(directory):
    """Catches a vocabulary or merges that are written in another order than transformers expects."""
    theirs = transformers.GPT2Tokenizer.from_pretrained(directory)
    ours = pg.GPT2.load(directory, backend="numpy").tokenizer
    assert ours is not None
    assert theirs(tiny.TEXT)["input_ids"] == ours.encode(tiny.TEXT)
    assert theirs.eos_token_id == ours.end_of_text == 0


def test_transformers_reads_the_model(directory):
    """Catches a directory that only we can load, and weights that are not those of the best step."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    ours = pg.GPT2.load(directory, backend="numpy")
    ids = np.arange(16)[None]
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours.logits(ids), expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.05
