"""Trace a GPT-2 of KerasHub, on any backend of Keras.

Keras has no hooks. So the model's own sublayers are called one after the other, in the order in which the model calls
them, on the inputs that they have there. The sublayers of a layer must reproduce the output of the layer to the bit;
otherwise their results are left out. Nothing is imported and nothing of the model is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..checkpoint.tensors import transposed
from ..config import GPT2Config
from ..host import StoredTensor
from ..numerics import stated
from ..registry import backend_of, to_numpy
from .probes import check_tokens, concatenated, described, without_gradients
from .progress import Progress, silent
from .trace import Trace

_PARTS = ("token_embedding", "position_embedding", "embeddings_add", "transformer_layers", "layer_norm")


def is_keras(model: Any) -> bool:
    """Return whether an object has the layers of KerasHub's GPT-2: a backbone, or a task that has one."""
    backbone = getattr(model, "backbone", model)
    return not isinstance(model, type) and all(hasattr(backbone, part) for part in _PARTS)


def trace_sublayers(model: Any, tokens: np.ndarray, progress: Progress = silent) -> Trace:
    """Return the trace of a ``GPT2CausalLM`` or a ``GPT2Backbone`` of KerasHub; see `portable_gpt2.probe`."""
    backbone = getattr(model, "backbone", model)
    config = _config(backbone)
    check_tokens(tokens, config)
    with without_gradients(backbone.token_embedding.embeddings.value):
        arrays, x = _results(model, backbone, tokens, progress)
    backend = backend_of(x)
    dtype, device = str(backbone.transformer_layers[0].compute_dtype), backend.device(x)
    return Trace(
        described(model, backend, device, dtype),
        tokens,
        arrays,
        dtype,
        config,
        dict(_weights(backbone)),
        stated(backend, dtype, device.partition(":")[0]),
    )


def _results(model: Any, backbone: Any, tokens: np.ndarray, progress: Progress) -> tuple[dict[str, np.ndarray], Any]:
    """Return the results by our names, and the output of the last layer as an array of the framework."""
    ids, mask = tokens.astype(np.int32), np.ones(tokens.shape, np.int32)
    embedded = backbone.token_embedding(ids)
    x = backbone.embeddings_add((embedded, backbone.position_embedding(embedded)))
    arrays = {"embedding": _host(x)}
    layers = progress(backbone.transformer_layers, f"tracing {type(model).__name__}", "layers")
    for i, layer in enumerate(layers):
        output = layer(x, decoder_padding_mask=mask, training=False)
        inner = {name: _host(y) for name, y in _inside(layer, x, mask)}
        arrays[f"h{i}/residual"] = _host(output)
        if np.array_equal(inner["residual"], arrays[f"h{i}/residual"], equal_nan=True):
            arrays |= {f"h{i}/{name}": _placed(name, y) for name, y in inner.items()}
        x = output
    arrays["ln_f"] = _host(backbone.layer_norm(x))
    if model is not backbone:
        arrays["logits"] = _host(model({"token_ids": ids, "padding_mask": mask}, training=False))
    for i in range(len(backbone.transformer_layers)):
        parts = [arrays.get(f"h{i}/attn/{part}") for part in "qkv"]
        if all(part is not None for part in parts):
            merged = [np.moveaxis(part, 1, 2).reshape(*tokens.shape, -1) for part in parts if part is not None]
            arrays[f"h{i}/attn/c_attn"] = np.concatenate(merged, axis=-1)
    return arrays, x


def _inside(layer: Any, x: Any, mask: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Yield the results inside a ``TransformerDecoder``, by our names."""
    attention = layer._self_attention_layer
    yield "ln_1", (h := layer._self_attention_layer_norm(x))
    q, k, v = attention.query_dense(h), attention.key_dense(h), attention.value_dense(h)
    yield from (("attn/q", q), ("attn/k", k), ("attn/v", v))
    visible = layer._compute_self_attention_mask(
        decoder_sequence=x,
        decoder_padding_mask=mask,
        decoder_attention_mask=None,
        use_causal_mask=True,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
    )
    a, weights = attention._compute_attention(query=q, key=k, value=v, attention_mask=visible, training=False)
    if weights is not None:  # a model without dropout uses a kernel that does not return them
        yield "attn/weights", weights
    yield "attn/attention", a
    yield "attn/c_proj", (p := attention.output_dense(a))
    yield "attn/residual", (x := p + x)
    yield "ln_2", (h := layer._feedforward_layer_norm(x))
    dense = layer._feedforward_intermediate_dense
    yield "mlp/gelu", (g := dense(h))
    c_fc = _without_activation(dense, h)
    if np.array_equal(_host(dense.activation(c_fc)), _host(g), equal_nan=True):
        yield "mlp/c_fc", c_fc
    yield "mlp/c_proj", (m := layer._feedforward_output_dense(g))
    yield "residual", m + x


def _without_activation(dense: Any, x: Any) -> Any:
    """Return the result of a ``Dense`` before its activation, from another ``Dense`` with the same weights."""
    plain = type(dense).from_config({**dense.get_config(), "activation": None})
    plain.build(tuple(x.shape))
    for variable, of in zip(plain.weights, dense.weights, strict=True):
        variable.assign(of)
    return plain(x)


def _placed(name: str, x: np.ndarray) -> np.ndarray:
    """Move the heads [1, seq, n_head, head_size] of Keras in front of the sequence."""
    return np.moveaxis(x, 2, 1) if name in ("attn/q", "attn/k", "attn/v", "attn/attention") else x


def _host(x: Any) -> np.ndarray:
    return np.array(to_numpy(x))


def _config(backbone: Any) -> GPT2Config:
    return GPT2Config(
        n_layer=backbone.num_layers,
        n_head=backbone.num_heads,
        n_embd=backbone.hidden_dim,
        n_vocab=backbone.vocabulary_size,
        n_ctx=backbone.position_embedding.sequence_length,
        n_inner=backbone.intermediate_dim,
        layer_norm_epsilon=backbone.layer_norm.epsilon,
        tie_word_embeddings=backbone.token_embedding.tie_weights,
        eos_token_id=None,
    )


def _weights(backbone: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the parameters by our paths, in our shapes."""
    n = backbone.hidden_dim
    yield "wpe", _stored(backbone.position_embedding.position_embeddings)
    yield "wte", _stored(backbone.token_embedding.embeddings)
    if not backbone.token_embedding.tie_weights:
        yield "lm_head", transposed(_stored(backbone.token_embedding.reverse_embeddings))
    for i, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        parts = (attention.query_dense, attention.key_dense, attention.value_dense)
        norms = {"ln_1": layer._self_attention_layer_norm, "ln_2": layer._feedforward_layer_norm}
        dense = {"c_fc": layer._feedforward_intermediate_dense, "c_proj": layer._feedforward_output_dense}
        yield f"h{i}/attn/c_attn/w", concatenated([_stored(part.kernel, (n, n)) for part in parts])
        yield f"h{i}/attn/c_attn/b", concatenated([_stored(part.bias, (n,)) for part in parts])
        yield f"h{i}/attn/c_proj/w", _stored(attention.output_dense.kernel, (n, n))
        yield f"h{i}/attn/c_proj/b", _stored(attention.output_dense.bias, (n,))
        for name, norm in norms.items():
            yield f"h{i}/{name}/g", _stored(norm.gamma)
            yield f"h{i}/{name}/b", _stored(norm.beta)
        for name, each in dense.items():
            yield f"h{i}/mlp/{name}/w", _stored(each.kernel)
            yield f"h{i}/mlp/{name}/b", _stored(each.bias)
    yield "ln_f/g", _stored(backbone.layer_norm.gamma)
    yield "ln_f/b", _stored(backbone.layer_norm.beta)


def _stored(variable: Any, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """Return a variable of Keras as a tensor, perhaps in another shape."""
    shape = tuple(variable.shape) if shape is None else shape
    read: Callable[[], np.ndarray] = functools.partial(_read, variable, shape)
    return StoredTensor(shape, str(variable.dtype), read)


def _read(variable: Any, shape: tuple[int, ...]) -> np.ndarray:
    return _host(variable.value).reshape(shape)
