"""What generation compiles, and the memory of a compiled step. `portable_gpt2.testing.model` tests the texts."""

import re

import pytest

import portable_gpt2 as pg
from portable_gpt2.generation import decoder
from portable_gpt2.testing.plain_gpt2 import on_backend, random_weights

pytestmark = pytest.mark.every_device


def test_few_compilations_serve_every_length(backend, monkeypatch):
    """Catches a compilation for each length of a prompt: on a context of 1024, a generation of its whole length takes
    at most 7, and prompts from 1 to 1000 tokens at most 6 more (every 13th length, and those next to a power of 2).
    """
    if not backend.compiles_per_shape:
        assert backend.compile(pg.gpt2, 1).func is pg.gpt2  # nothing is compiled: there is nothing to count
        return
    traces = []

    def traced(params, tokens, *args):
        traces.append(backend.shape(tokens))
        return transformer(params, tokens, *args)

    transformer = decoder.transformer
    monkeypatch.setattr(decoder, "transformer", traced)
    config = pg.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_vocab=7, n_ctx=1024, eos_token_id=None)
    model = pg.GPT2(config, on_backend(backend, random_weights(config)))

    list(model.stream_ids([1, 2, 3], max_new_tokens=1021))
    assert 1 < len(traces) <= 7
    full = len(traces)
    for n in sorted({*range(1, 1001, 13), *(2**k + i for k in range(6, 10) for i in (-1, 0, 1)), 1000}):
        list(model.stream_ids([1] * n, max_new_tokens=1))
    assert len(traces) - full <= 6


def test_a_compiled_step_needs_no_room_for_a_second_cache(jax):
    """Catches a cache that is copied to be written: XLA does so where the copy is fused with what reads it."""
    backend = pg.get_backend("jax")
    config = pg.GPT2Config(n_layer=3, n_head=2, n_embd=32, n_vocab=61, n_ctx=1024, eos_token_id=None)
    model = pg.GPT2(config, on_backend(backend, random_weights(config)))
    cache = pg.new_cache(model.params, config)
    step = model._decoder._step
    ids = jax.numpy.asarray([[1]]), jax.numpy.asarray([0])
    memory = step.func.lower(*step.args, *ids, cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k[0].nbytes


def test_compiled_attention_over_a_written_cache_copies_no_buffer(tf):
    """Catches a buffer that is copied to be written, as XLA does where it fuses that with what reads."""
    backend = pg.get_backend("tensorflow")
    buffers = [tf.Variable(tf.zeros((1, 2, 64, 16))) for _ in range(2)]
    given = tf.ones((1, 2, 1, 16)), tf.constant(3)

    def step(x, start):
        return pg.attention(x, *(backend.write(buffer, 2 * x, start)[...] for buffer in buffers))

    compiled = tf.function(step, jit_compile=True, autograph=False)
    _, entry = compiled.experimental_get_compiler_ir(*given)(stage="optimized_hlo").split("\nENTRY")
    makers = set(re.findall(r"= f32\[(?:1,)?2,64,16\]\S* ([\w-]+)\(", entry))
    assert makers
    assert makers <= {"parameter", "get-tuple-element", "bitcast"}
