"""Ways to damage a file: functions of hypothesis' `draw` and the old content that return the new content."""

import json

import numpy as np
from hypothesis import strategies as st

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
NUMBERS = st.sampled_from([0, 1, -1, 7, 9, 2**31, 2**63, 2**64, 10**30, 0.5, 1e300]) | st.integers(0, 2000)
JUNK = NUMBERS | st.sampled_from([None, True, "", "F64", "I8", "../x", "/dev/zero", "none", [], {}, [1, [2]], {"a": 1}])


def cut(draw, content):
    return content[: draw(st.integers(0, max(len(content) - 1, 0)))]


def flip(draw, content):
    spoilt = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        spoilt[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(spoilt)


def overwrite(draw, content):
    start, new = draw(st.integers(0, len(content) - 1)), draw(st.binary(min_size=1, max_size=12))
    return (content[:start] + new + content[start + len(new) :])[: len(content)]


def insert(draw, content):
    start = draw(st.integers(0, len(content)))
    return content[:start] + draw(st.binary(min_size=1, max_size=12)) + content[start:]


def remove(draw, content):
    start = draw(st.integers(0, len(content) - 1))
    return content[:start] + content[start + draw(st.integers(1, 12)) :]


def replace(draw, content):
    return draw(
        st.sampled_from([POINTER, b"", b"<!doctype html>", b"GGUF" + content, b"\x1f\x8b" + content, b"{}", b"[]"])
    )


def edit_json(draw, content):
    """Change, remove, rename or copy one entry of a JSON document, at any depth."""
    entries = json.loads(content)
    if not isinstance(entries, dict | list) or not entries:
        return content
    node = entries
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
            break
        node = node[key]
    match draw(st.sampled_from(["change", "remove", "rename", "copy"])):
        case "change":
            node[key] = draw(JUNK)
        case "remove":
            del node[key]
        case "rename" if isinstance(node, dict):
            node[draw(st.sampled_from([f"{key}x", "h.0.ln_1.weight", "lm_head.weight"]))] = node.pop(key)
        case "copy":
            node[key] = node[draw(st.sampled_from(keys))]
    return json.dumps(entries).encode()


def edit_header(draw, content):
    """Change the header of a safetensors file. The length that the file gives for it may be wrong."""
    size = int.from_bytes(content[:8], "little")
    header = edit_json(draw, content[8 : 8 + size])
    length = draw(st.just(len(header)) | NUMBERS.filter(lambda n: isinstance(n, int) and 0 <= n < 2**64))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def spoil_tensors(draw, arrays):
    """Drop, add, reshape or convert a tensor, or replace one of its elements, perhaps by NaN or infinity."""
    arrays, path = dict(arrays), draw(st.sampled_from(list(arrays)))
    a = arrays[path]
    match draw(st.sampled_from(["drop", "add", "reshape", "widen", "retype", "no number", "number"])):
        case "drop":
            del arrays[path]
        case "add":
            arrays[draw(st.sampled_from(["h1/ln_1/g", "h0/attn/c_attn/lora", "step"]))] = a
        case "reshape":
            arrays[path] = np.ascontiguousarray(a.T).reshape(-1, *a.shape[:0:-1]) if a.ndim > 1 else a[:-1]
        case "widen":
            arrays[path] = a[..., None]
        case "retype":
            arrays[path] = a.astype(draw(st.sampled_from(["int32", "uint8", "bool", "int64"])))
        case kind:
            arrays[path] = a.copy()
            value = {"no number": [np.nan, -np.nan, np.inf, -np.inf], "number": [0.0, -3e38, 1e-45]}[kind]
            arrays[path].reshape(-1)[draw(st.integers(0, a.size - 1))] = draw(st.sampled_from(value))
    return arrays
