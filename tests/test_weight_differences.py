"""Level 1 of a comparison: each tensor that differs is found, with the change that explains all of its elements."""

import dataclasses
import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import assume, given
from hypothesis import strategies as st

import portable_gpt2 as pg
from portable_gpt2.checkpoint import stored
from portable_gpt2.comparison.findings import WeightFinding
from portable_gpt2.comparison.rounding import q8_0
from portable_gpt2.comparison.weights import differences, merged


@st.composite
def configs(draw, n_layer=1):
    heads = draw(st.integers(2, 4))
    return pg.GPT2Config(
        n_layer=draw(st.integers(n_layer, 3)),
        n_head=heads,
        n_embd=heads * draw(st.integers(2, 9)),
        n_vocab=draw(st.integers(20, 40)),
        n_ctx=draw(st.integers(8, 40)),
        eos_token_id=None,
    )


def kinds(a, b, config=None, config_b=None):
    """Return the kind of each tensor's difference by path."""
    tensors = ({path: stored(x) for path, x in arrays.items()} for arrays in (a, b))
    return {finding.path: finding.kind for finding in differences(*tensors, config, config_b or config)}


def changed(data, config, suffixes, change, seed=0):
    """Change one tensor whose path ends in one of the suffixes; return its path, both models, and what changed."""
    a = tiny.weights(config, seed)
    path = data.draw(st.sampled_from([path for path in a if path.endswith(suffixes)]))
    return path, a, {**a, path: change(a[path])}


@given(config=configs(), dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]), data=st.data())
def test_equal_values_in_other_dtypes_do_not_differ(config, dtype, data):
    """Catches a comparison of bytes or of dtypes."""
    a = {
        path: x.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
        for path, x in tiny.weights(config).items()
    }
    a = {path: x.astype(ml_dtypes.bfloat16).astype(np.float32) for path, x in a.items()}  # exact in all four dtypes
    b = {path: x.astype(getattr(ml_dtypes, dtype, dtype)) for path, x in a.items()}
    assert kinds(a, b, config) == kinds(b, a, config) == {}


@given(config=configs(), data=st.data())
def test_a_transposed_weight(config, data):
    """Catches a square weight whose transpose is not looked for."""
    path, a, b = changed(data, config, ("/w", "wpe", "wte"), lambda x: np.ascontiguousarray(x.T))
    assert kinds(a, b, config) == {path: "transposed"}


@given(config=configs(), data=st.data())
def test_q_k_and_v_in_any_order(config, data):
    """Catches an order that is confused with its inverse, and one of the six that is not looked for."""
    order = data.draw(st.sampled_from([*itertools.permutations("qkv")][1:]))

    def change(x):
        parts = dict(zip("qkv", np.split(x, 3, axis=-1), strict=True))
        return np.concatenate([parts[name] for name in order], axis=-1)

    path, a, b = changed(data, config, ("c_attn/w", "c_attn/b"), change)
    assert kinds(a, b, config) == {path: f"q, k, v are {', '.join(order)} of a"}


@given(config=configs(), data=st.data())
def test_columns_by_head_or_interleaved(config, data):
    """Catches [head, 3, head_size] that is taken for [3, head, head_size]: a wrong head split."""
    names = ("3", "head", "head_size")
    axes = data.draw(st.sampled_from([*itertools.permutations(range(3))][1:]))
    turned = data.draw(st.booleans())

    def change(x):
        y = x.reshape(*x.shape[:-1], 3, config.n_head, config.head_size)
        y = y.transpose(*range(x.ndim - 1), *(x.ndim - 1 + i for i in axes)).reshape(x.shape)
        return y.T if turned and y.ndim == 2 else y

    path, a, b = changed(data, config, ("c_attn/w", "c_attn/b"), change)
    expected = f"columns are [{', '.join(names[i] for i in axes)}]"
    assert kinds(a, b, config) == {path: f"transposed and {expected}" if turned and path.endswith("w") else expected}


@given(config=configs(), data=st.data())
def test_rows_of_c_proj_by_head(config, data):
    """Catches heads that are joined with the head as the last axis."""

    def change(x):
        return x.reshape(config.n_head, config.head_size, -1).transpose(1, 0, 2).reshape(x.shape)

    path, a, b = changed(data, config, ("attn/c_proj/w",), change)
    assert kinds(a, b, config) == {path: "rows are [head_size, head]"}


@given(config=configs(), data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_a_constant_factor(config, data, dtype):
    """Catches a factor that is stated although some elements have another, and a name for the wrong number."""
    names = {"2": 2.0, "1/2": 0.5, "1/10": 0.1, "1/sqrt(head_size)": config.head_size**-0.5}
    names |= {"sqrt(n_embd)": config.n_embd**0.5, "1/sqrt(2 n_layer)": (2 * config.n_layer) ** -0.5}
    name = data.draw(st.sampled_from([*names]))
    sign = data.draw(st.sampled_from([1, -1]))
    path, a, b = changed(
        data, config, ("/w", "/g", "/b", "wte", "wpe"), lambda x: (x * np.float32(sign * names[name])).astype(dtype)
    )
    kind = kinds(a, b, config)[path]
    assert kind.startswith(f"multiplied by {sign * names[name]:.6g} = ")
    said = kind.partition(" = ")[2].split(" or ")
    assert (name if sign == 1 else f"-{name}") in said
    b[path].flat[0] += abs(b[path]).max()
    assert kinds(a, b, config)[path].startswith("differs")


def test_a_factor_without_a_name_of_its_own():
    """Catches a factor that is rounded to the nearest number with a name."""
    a = tiny.weights()
    assert kinds(a, {**a, "wpe": a["wpe"] * np.float32(0.73)}) == {"wpe": "multiplied by 0.73"}
    assert kinds(a, {**a, "wpe": -a["wpe"]}) == {"wpe": "of the opposite sign"}


def test_q_alone_is_scaled():
    """Catches a factor of the attention that was folded into q."""
    a = tiny.weights()
    b = a["h1/attn/c_attn/w"].copy()
    b[:, :16] /= np.sqrt(np.float32(8))
    kind = kinds(a, {**a, "h1/attn/c_attn/w": b}, tiny.CONFIG)["h1/attn/c_attn/w"]
    assert kind == "q multiplied by 0.353553 = 1/sqrt(head_size)"
    b[0, 40] += 1
    kind = kinds(a, {**a, "h1/attn/c_attn/w": b}, tiny.CONFIG)["h1/attn/c_attn/w"]
    assert kind.startswith("differs in q and v alone: in 257 of 768 elements, most at [0, 40]")


@given(config=configs(), offset=st.sampled_from([-1, 1]), data=st.data())
def test_gains_that_are_off_by_one(config, offset, data):
    """Catches weights of a port that computes (1 + g) x."""
    path, a, b = changed(data, config, ("/g",), lambda x: x + np.float32(offset))
    assert kinds(a, b, config)[path].startswith("1 less than in a" if offset < 0 else "1 more than in a")


ADDED = {
    ", all 0": lambda x, n: np.zeros((n, x.shape[1]), np.float32),
    ", all rows equal": lambda x, n: np.tile(x.mean(axis=0), (n, 1)),
    ", of standard deviation": lambda x, n: np.random.default_rng(1).standard_normal((n, x.shape[1]), np.float32),
}


@given(config=configs(), what=st.sampled_from([*ADDED]), n=st.integers(2, 8), data=st.data())
def test_rows_that_were_added_or_are_missing(config, what, n, data):
    """Catches a padded vocabulary that is only called a tensor of another shape."""
    path, a, b = changed(data, config, ("wte", "wpe"), lambda x: np.concatenate([x, ADDED[what](x, n)]))
    assert kinds(a, b, config)[path].startswith(f"{n} rows added at the end{what}")
    assert kinds(b, a, config)[path] == f"{n} rows missing at the end"
    b[path] = b[path].astype(ml_dtypes.bfloat16)
    assert kinds(a, b, config)[path].endswith(" and rounded through bfloat16")


@given(config=configs(), shift=st.sampled_from([-2, -1, 1, 2]), data=st.data())
def test_rows_that_are_shifted(config, shift, data):
    """Catches token ids, or positions, that are off by one or two."""
    path, a, b = changed(data, config, ("wte", "wpe"), lambda x: np.roll(x, shift, axis=0))
    assert kinds(a, b, config)[path].startswith(f"rows shifted by {shift}: ")
    b[path] = np.concatenate([np.full_like(a[path][:2], 0.25), a[path]])
    kind = "2 rows added at the front, all 0.25 and rows shifted by 2: row 0 of a is row 2 of b"
    assert kinds(a, b, config)[path] == kind + ", as in OPT" * (path == "wpe")


@given(config=configs(), data=st.data())
def test_rows_in_another_order(config, data):
    """Catches a vocabulary in another order."""
    order = data.draw(st.permutations(range(20)).filter(lambda order: sum(i != j for i, j in enumerate(order)) > 10))
    path, a, b = changed(data, config, ("wte",), lambda x: np.concatenate([x[list(order)], x[20:]]))
    assume("shifted" not in (kind := kinds(a, b, config)[path]))
    moved = [i for i, j in enumerate(order) if i != j]
    assert kind == (
        f"rows in another order: {len(moved)} were moved; row {moved[0]} of b is row {order[moved[0]]} of a"
    )


@given(config=configs(n_layer=2), data=st.data())
def test_layers_in_another_order(config, data):
    """Catches a layer that is read from its neighbour, and any order of the layers."""
    order = data.draw(st.lists(st.integers(0, config.n_layer - 1), min_size=config.n_layer, max_size=config.n_layer))
    a = {path: x for path, x in tiny.weights(config).items() if path.endswith(("c_attn/w", "ln_2/b"))}
    places = {path: order[int(path[1])] for path in a}
    b = {path: a[f"h{i}{path[2:]}"] for path, i in places.items()}
    expected = {path: f"layer shifted: h{i} of a" for path, i in places.items() if i != int(path[1])}
    assert kinds(a, b, config) == expected
    rounded = {path: x.astype(ml_dtypes.bfloat16) if path in expected else x for path, x in b.items()}
    assert kinds(a, rounded, config) == {
        path: f"{kind} and rounded through bfloat16" for path, kind in expected.items()
    }


def test_tensors_that_were_exchanged():
    """Catches ln_1 and ln_2 in each other's place."""
    a = tiny.weights()
    b = {**a, "h0/ln_1/g": a["h0/ln_2/g"], "h0/ln_2/g": a["h0/ln_1/g"]}
    assert kinds(a, b) == {"h0/ln_1/g": "that of h0/ln_2/g in a", "h0/ln_2/g": "that of h0/ln_1/g in a"}


def test_an_output_matrix_of_its_own():
    """Catches a copy of wte that is called a difference, and an lm_head that is not compared with the tied wte."""
    a = tiny.weights()
    assert kinds(a, {**a, "lm_head": a["wte"].copy()}) == {}
    assert kinds({**a, "lm_head": a["wte"].copy()}, a) == {}
    other = -a["wte"]
    assert kinds(a, {**a, "lm_head": other}) == {"lm_head": "own in b, wte in a: of the opposite sign"}
    assert kinds({**a, "lm_head": other}, a) == {"lm_head": "own in a, wte in b: of the opposite sign"}
    assert kinds({**a, "lm_head": other}, {**a, "lm_head": other}) == {}


ROUNDINGS = {
    "rounded through bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "rounded through float16": lambda x: x.astype(np.float16),
    "rounded through float8_e4m3fn": lambda x: x.astype(ml_dtypes.float8_e4m3fn),
    "rounded through float8_e5m2": lambda x: x.astype(ml_dtypes.float8_e5m2),
    "cut to 7 bits after the binary point, those of bfloat16": lambda x: (x.view(np.uint32) & 0xFFFF0000).view(
        np.float32
    ),
    "cut to 10 bits after the binary point, those of TF32": lambda x: (x.view(np.uint32) & 0xFFFFE000).view(np.float32),
    "rounded to 10 bits after the binary point, those of TF32": lambda x: _nearest(x, 10),
    "rounded to 5 bits after the binary point": lambda x: _nearest(x, 5),
}


def _nearest(x, bits):
    """Round to a number of bits after the binary point, ties to even, by way of float64."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1).astype(np.float32)


@given(config=configs(), kind=st.sampled_from([*ROUNDINGS]), data=st.data())
def test_weights_that_were_rounded(config, kind, data):
    """Catches a format that is confused with another one, and a rounded tensor of which one element differs."""

    def change(x):
        # TF32 and float16 differ only for small numbers; the others lie between two numbers of 10 and of 5 bits.
        x.flat[:3] = 3.3e-6, 1 + 2**-11, 1 + 2**-6
        return ROUNDINGS[kind](x).astype(np.float32)

    path, a, b = changed(data, config, ("/w", "wte", "wpe"), change)
    assert kinds(a, b, config) == {path: kind}
    assert kinds(b, a, config) == {path: f"a is {kind}"}
    assert kinds(a, {**b, path: b[path].T.copy()}, config)[path] in (kind, f"transposed and {kind}")
    b[path].flat[-1] = a[path].flat[-1] * 1.5
    assert kinds(a, b, config)[path].startswith("differs")


@given(config=configs(), dtypes=st.permutations(["float32", "float16", "bfloat16", "float64"]), data=st.data())
def test_weights_of_two_dtypes(config, dtypes, data):
    """Catches weights that a side rounded to its own dtype and that are called different, and a difference that is
    larger than two roundings.
    """
    first, second = (getattr(ml_dtypes, name, name) for name in dtypes[:2])
    exact = {path: x.astype(np.float64) / 3 for path, x in tiny.weights(config).items()}
    a, b = ({path: x.astype(dtype) for path, x in exact.items()} for dtype in (first, second))
    order = ["bfloat16", "float16", "float32", "float64"]
    expected = {f"rounded through {dtypes[1]}"}
    if order.index(dtypes[0]) < order.index(dtypes[1]):
        expected = {f"a is rounded through {dtypes[0]}"}
    if {*dtypes[:2]} == {"bfloat16", "float16"}:  # in small tensors, the one may happen to be the other, rounded
        expected |= {f"rounded through {dtypes[1]}", f"rounded through {dtypes[1]}, a through {dtypes[0]}"}
    found = kinds(a, b, config)
    assert {*found.values()} <= expected
    assert found
    path = data.draw(st.sampled_from([*found]))
    b[path].flat[-1] *= 1.25
    assert kinds(a, b, config)[path].startswith("differs")


@given(n_in=st.sampled_from([32, 64]), n_out=st.integers(2, 40), columns=st.booleans(), seed=st.integers(0, 99))
def test_blocks_of_q8_0(n_in, n_out, columns, seed):
    """Catches blocks along the wrong axis: in a GGUF file a weight is transposed, and wte is not."""
    x = np.random.default_rng(seed).standard_normal((n_out, n_in), np.float32)
    x[0] = 0
    y = q8_0(x)
    path = "h0/mlp/c_fc/w" if columns else "wte"
    a, b = (({path: z.T.copy()} if columns else {path: z}) for z in (x, y))
    assert kinds(a, b) == {path: "rounded through Q8_0 of GGUF"}
    b[path].flat[-1] *= 1.3
    assert kinds(a, b)[path].startswith("differs")


def test_q8_0_is_that_of_the_gguf_package():
    """Catches a scale that is rounded before the division, and ties that go to even."""
    gguf = pytest.importorskip("gguf")
    x = np.random.default_rng(0).standard_normal((50, 64), np.float32)
    x[1], x[2], x[3, :32] = np.arange(64) / 2, 0, [127, *np.arange(31) - 14.5]  # the last row has ties
    kind = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(q8_0(x), gguf.dequantize(gguf.quantize(x, kind), kind))


@given(
    scope=st.sampled_from(["the tensor", "each row", "each column"]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_whole_numbers_with_scales(scope, bits, seed):
    """Catches int8 and int4 that are only called a difference."""
    x = np.random.default_rng(seed).standard_normal((40, 48), np.float32)
    axis = {"the tensor": None, "each row": 1, "each column": 0}[scope]
    scale = np.abs(x).max(axis=axis, keepdims=True) / (2 ** (bits - 1) - 1)
    y = np.rint(x / scale) * scale
    assert kinds({"wte": x}, {"wte": y.astype(np.float32)}) == {
        "wte": f"rounded to int{bits} with one scale for {scope}"
    }


def grouped(x, levels, offset=False, n=32):
    """Round groups of n elements of a row to whole numbers with a scale, and an offset if asked for."""
    z = x.reshape(-1, n)
    low = z.min(axis=1, keepdims=True) if offset else 0
    high = z.max(axis=1, keepdims=True) - low if offset else abs(z).max(axis=1, keepdims=True)
    scale = high / np.float32(2 * levels + 1 if offset else levels)
    return (np.rint((z - low) / scale) * scale + low).astype(np.float32).reshape(x.shape)


CHANGES = {
    "rounded to int8 with one scale for each 32 elements of a row": lambda x: grouped(x, 127),
    "rounded to int4 with one scale for each 32 elements of a column": lambda x: grouped(x.T, 7).T,
    "rounded to int4 with one scale and one offset for each 32 elements of a row": lambda x: grouped(x, 7, True),
    "rounded to int8 with one scale and one offset for each row": lambda x: grouped(x, 127, True, 64),
    "rounded to 3 decimals": lambda x: np.round(x.astype(np.float64), 3).astype(np.float32),
    "0 in some elements: 4,096 of 8,192; the others are equal": lambda x: np.where(abs(x) < np.median(abs(x)), 0, x),
    "clipped: to the interval from -0.5 to 0.5": lambda x: np.clip(x, -0.5, 0.5),
    "each row multiplied by a number of its own, as where a gain is folded in": lambda x: (
        x * np.linspace(0.5, 2, 128, dtype=np.float32)[:, None]
    ),
    "each column multiplied by a number of its own, as where a gain is folded in": lambda x: (
        x * np.linspace(0.5, 2, 64, dtype=np.float32)
    ),
    "a number added to each row, as where means are subtracted": lambda x: x - x.mean(axis=1, keepdims=True),
    "a number added to each column, as where means are subtracted": lambda x: x - x.mean(axis=0),
    "columns in another order: 64 were moved; column 0 of b is column 63 of a": lambda x: x[:, ::-1],
    "read in the other memory order": lambda x: x.T.reshape(x.shape),
    "bytes in the opposite order": lambda x: x.byteswap(),
    "2 rows added at row 10, all 0": lambda x: np.insert(x, [10, 10], 0, axis=0),
    "3 rows missing at row 4": lambda x: np.delete(x, [4, 5, 6], axis=0),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_of_a_matrix(kind):
    """Catches a change that is only called a difference, and one that is stated although one element differs."""
    x = np.random.default_rng(3).standard_normal((128, 64), np.float32)
    a, y = {"wpe": x}, np.ascontiguousarray(CHANGES[kind](x))
    assert kinds(a, {"wpe": y}, tiny.CONFIG) == {"wpe": kind}
    y[8, 20] = 0.75 * x[8, 20] + 0.01
    assert kinds(a, {"wpe": y}, tiny.CONFIG)["wpe"].startswith(("differs", "other shape", "NaN"))


def test_infinity_of_float16_is_named():
    """Catches weights that overflow in float16 and that are called rounded, or only infinite."""
    x = np.random.default_rng(4).standard_normal((8, 16), np.float32)
    x[2, 5] = 1e5
    with np.errstate(over="ignore"):
        y = x.astype(np.float16)
    kind = "rounded through float16 with overflow to infinity: 1 element of b, the first at [2, 5]"
    for b in (y, y.astype(np.float32)):
        assert kinds({"wte": x}, {"wte": b}) == {"wte": kind}


def test_layers_that_are_missing_or_repeated():
    """Catches layers of a that are only known to be absent in b, and a text that is true for another layer."""
    a = tiny.weights(dataclasses.replace(tiny.CONFIG, n_layer=3))
    a = {path: x for path, x in a.items() if path.endswith("c_fc/w")}
    b = {f"h{i}/mlp/c_fc/w": a[f"h{j}/mlp/c_fc/w"] for i, j in enumerate([0, 2])}
    assert kinds(a, b) == {"h1/mlp/c_fc/w": "layer shifted: h2 of a", "h2/mlp/c_fc/w": "absent in b"}
    assert kinds(b, a)["h2/mlp/c_fc/w"] == "absent in a: layer shifted: h1 of a"
    c = {f"h{i}/mlp/c_fc/w": a[f"h{j}/mlp/c_fc/w"] for i, j in enumerate([2, 0, 1])}
    (found,) = merged(differences(*({path: stored(x) for path, x in side.items()} for side in (a, c))))
    assert found[:2] == ("h0/mlp/c_fc/w and 2 more", "layer shifted: h2 of a")


def test_a_bias_that_was_dropped():
    """Catches a model that was made without biases, as nanoGPT's are with bias=False."""
    a = tiny.weights()
    zero = {path: np.zeros_like(x) if path.endswith("/b") else x for path, x in a.items()}
    biases = [path for path in a if path.endswith("/b")]
    assert kinds(a, zero) == dict.fromkeys(biases, "all 0 in b")
    absent = {path: x for path, x in a.items() if not path.endswith("/b")}
    assert kinds(a, absent) == dict.fromkeys(biases, "absent in b")
    assert kinds(absent, a) == dict.fromkeys(biases, "absent in a")
    assert kinds(zero, absent) == kinds(absent, zero) == {}


def test_no_number():
    """Catches a NaN that is equal to nothing, and an infinity that makes every other finding meaningless."""
    a = tiny.weights()
    b = a["wpe"].copy()
    b[3, 4] = np.nan
    assert kinds(a, {**a, "wpe": b}) == {"wpe": "NaN or infinity in b: 1 element of b, the first at [3, 4]"}
    assert kinds({**a, "wpe": -np.inf * a["wpe"]}, {**a, "wpe": b})["wpe"].startswith("NaN or infinity in a and b: ")


@given(config=configs(), data=st.data(), seed=st.integers(1, 99))
def test_nothing_is_explained_that_is_not(config, data, seed):
    """Catches an explanation that most elements fit, or that fits any tensor of few elements."""
    path, a, b = changed(data, config, ("",), lambda x: x + np.float32(0.01))
    b[path] = tiny.weights(config, seed)[path]
    assert kinds(a, b, config)[path].startswith("differs: in ")
    i = data.draw(st.integers(0, a[path].size - 1))
    b[path] = a[path].copy()
    b[path].flat[i] += 0.5
    [finding] = differences(*({p: stored(x) for p, x in arrays.items()} for arrays in (a, b)), config)
    where = [int(j) for j in np.unravel_index(i, a[path].shape)]
    said = f" in 1 of {a[path].size:,} elements, most at {where} with "
    assert finding.kind.partition(":")[2].startswith(said)
    assert finding.largest == pytest.approx(0.5, rel=1e-5)


def test_models_of_other_shapes():
    """Catches an exception, and a largest difference of tensors that cannot be subtracted."""
    a, wide = tiny.weights(), tiny.weights(dataclasses.replace(tiny.CONFIG, n_embd=32))
    found = kinds(a, wide)
    assert found["h0/mlp/c_fc/w"] == "other shape: [16, 64] in a, [32, 128] in b"
    assert found.keys() == a.keys()
    deep = tiny.weights(dataclasses.replace(tiny.CONFIG, n_layer=3))
    assert {p: k for p, k in kinds(a, deep).items() if k != "absent in a"}.keys() <= a.keys()
    assert kinds(a, {**a, "wpe": a["wpe"][None]}) == {"wpe": "reshaped from [64, 16] to [1, 64, 16]"}


def test_findings_of_one_kind_are_merged():
    """Catches 148 lines where one says all, and a merged finding without its largest difference."""
    a = tiny.weights()
    b = {path: x.astype(ml_dtypes.bfloat16) for path, x in a.items()} | {"wpe": tiny.weights(seed=1)["wpe"]}
    b["h1/ln_1/b"] = tiny.weights(seed=1)["h1/ln_1/b"]
    found = differences(*({path: stored(x) for path, x in arrays.items()} for arrays in (a, b)))
    first, second = merged(found)
    assert [f.path for f in merged(found)] == ["wpe and 1 more", f"wte and {len(a) - 3} more"]
    assert first.kind == next(f.kind for f in found if f.path == "wpe")
    assert second.largest == max(f.largest for f in found if f.kind == second.kind)
    nan = WeightFinding("x", "absent in b", math.nan)
    assert merged([nan, nan])[0][:2] == ("x and 1 more", "absent in b")


def test_a_padded_vocabulary_is_named():
    """Catches a message that only says that two numbers differ."""
    config = dataclasses.replace(tiny.CONFIG, n_vocab=390)
    a = tiny.weights()
    b = a | {"wte": np.concatenate([a["wte"], np.zeros((6, 16), np.float32)])}
    models = (pg.GPT2(*model) for model in ((tiny.CONFIG, pg.params.nest(a)), (config, pg.params.nest(b))))
    found = pg.compare(*models, [1, 2])
    assert [(each.path, each.kind) for each in found.weights] == [("wte", "6 rows added at the end, all 0")]
    assert found.verdict.startswith(
        "The vocabularies differ (384 token ids in the reference, 390 in the judged model),"
    )
    narrower = dataclasses.replace(tiny.CONFIG, n_inner=8)
    models = (pg.GPT2(config, pg.params.nest(tiny.weights(config))) for config in (tiny.CONFIG, narrower))
    why = r"n_hidden is 64 in .* and 8 in .*must be equal, except for n_vocab \(the weights differ: h0/mlp/c_fc/w"
    with pytest.raises(ValueError, match=why):
        pg.compare(*models, [1, 2])
