"""Arrays that no op computes with: those of another framework, and the strange ones of a framework's own."""

import frameworks
import numpy as np
import pytest

import portable_gpt2 as pg
from portable_gpt2.testing.cases import CASES, FORMS, form_of

each_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.arrays) > 1])
@each_form
def test_arrays_of_two_frameworks_are_refused(backend, form, name):
    """Catches arrays of two frameworks that one of them would convert silently, or refuse with its own message."""
    case = CASES[name]
    first, *others = case.arrays
    for stranger in map(pg.get_backend, pg.available_backends()):
        if stranger is backend:
            continue
        for key in others:
            arrays = case.on(backend, "float32") | {key: case.on(stranger, "float32")[key]}
            with pytest.raises(TypeError) as caught:
                form_of(case.op, form)(**arrays, **case.options)
            assert type(caught.value) is TypeError
            assert str(caught.value) == (
                f"{case.op.__name__}: {first} is an array of {backend.name} and {key} one of {stranger.name}; "
                f"give arrays of one framework"
            )


# Arrays of a framework's own that no op computes with


def strange(name):
    """Return arrays of a backend, [3, 4] where they have a shape, that are not plain arrays of floats or integers."""
    if name == "numpy":
        return {
            "objects": np.ones((3, 4), object),
            "records": np.zeros((3, 4), [("a", "f4")]),
            "dates": np.zeros((3, 4), "M8[s]"),
            "strings": np.asarray([["a"] * 4] * 3, np.dtypes.StringDType()),
            "complex": np.ones((3, 4), np.complex128),
        }
    if name == "jax":
        import jax

        deleted = jax.numpy.ones((3, 4)) + 1
        deleted.delete()
        return {
            "float8": jax.numpy.ones((3, 4), "float8_e4m3fn"),
            "keys": jax.random.split(jax.random.key(0), (3, 4)),
            "deleted": deleted,
            "complex": jax.numpy.ones((3, 4), "complex64"),
        }
    if name == "tensorflow":
        import tensorflow as tf

        x = tf.ones((3, 4))
        return {
            "ragged": tf.ragged.constant([[1.0], [1.0, 2.0]]),
            "sparse": tf.sparse.from_dense(x),
            "slices": tf.IndexedSlices(x, tf.constant([0, 1, 2]), tf.constant([3, 4])),
            "strings": tf.constant([["a"] * 4] * 3),
            "quantised": tf.quantization.quantize(x, -1.0, 1.0, tf.qint8).output,
            "float8": tf.cast(x, tf.dtypes.experimental.float8_e4m3fn),
        }
    import torch

    x = torch.ones(3, 4)
    return {
        "sparse": x.to_sparse(),
        "csr": x.to_sparse_csr(),
        "mkldnn": x.to_mkldnn(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "complex": x + 0j,
        "float8": x.to(torch.float8_e4m3fn),
        "uninitialized": torch.nn.UninitializedParameter(),
    }


@pytest.mark.parametrize("backend", frameworks.OURS, indirect=True)
def test_arrays_that_no_op_computes_with_are_refused_in_our_words(backend):
    """Catches an exception of the framework's own, from inside a kernel, a check of the dtype or one of the range."""
    w, v = backend.from_numpy(np.ones((4, 4), np.float32)), backend.from_numpy(np.ones(4, np.float32))
    ids = backend.from_numpy(np.zeros(3, np.int32))
    for kind, x in strange(backend.name).items():
        calls = {
            "conv1d": lambda x=x: pg.conv1d(w, x, v),
            "layer_norm": lambda x=x: pg.layer_norm(x, v, v),
            "attention": lambda x=x: pg.attention(x, x, x),
            "attention_scores": lambda x=x: pg.attention_scores(x, x),
            "attention_weights": lambda x=x: pg.attention_weights(x, x),
            "unembed": lambda x=x: pg.unembed(x, w),
            "embed": lambda x=x: pg.embed(x, w),
            "cross_entropy": lambda x=x: pg.cross_entropy(x, ids),
        }
        for name, call in calls.items():
            with pytest.raises(TypeError, match=f"^{name}: ") as caught:
                call()
            assert type(caught.value) is TypeError, (kind, name)
