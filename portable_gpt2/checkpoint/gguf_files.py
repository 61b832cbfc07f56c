"""Read and write GGUF, the format of llama.cpp's files: values by name, then tensors.

A file begins with a header: the version, the values, and for each tensor its name, shape, type and place. The tensors
follow, each at a multiple of the alignment. All numbers are little-endian. The format is described in ggml's
``docs/gguf.md``. Decision 43 says why the gguf package is not used.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..checks import named, shown
from ..host import CheckpointError, StoredTensor, float_dtypes
from .contents import LARGEST_TEXT
from .tensors import OpenFile

MAGIC = b"GGUF"
ARCHITECTURE = "gpt2"  # llama.cpp's name for GPT-2
_VERSIONS = (2, 3)  # the two differ only for big-endian machines
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BLOCK = np.dtype([("scale", "<f2"), ("multiples", "i1", 32)])  # Q8_0: an element is scale * multiple


class _Type(NamedTuple):
    """A type of tensors."""

    name: str
    dtype: str
    """The dtype of the values that are read."""
    length: int
    """The number of elements in a block."""
    n_bytes: int
    """The number of bytes of a block."""


_TYPES = {
    0: _Type("F32", "float32", 1, 4),
    1: _Type("F16", "float16", 1, 2),
    8: _Type("Q8_0", "float32", 32, _BLOCK.itemsize),
    30: _Type("BF16", "bfloat16", 1, 2),
}
_CODES = {"float32": 0, "float16": 1, "bfloat16": 30}
# The names of some types that are not read, for the message.
_OTHER_TYPES = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_OTHER_TYPES |= {20: "IQ4_NL", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 39: "MXFP4"}


class _Header:
    """A header that is read from front to back.

    No count is trusted: whatever is counted has bytes in the file, and reading past the file's end raises an error. So
    a damaged count costs neither time nor memory.
    """

    def __init__(self, stream: BinaryIO, n_bytes: int) -> None:
        self._stream, self._n_bytes = stream, n_bytes
        self.position = 0

    def take(self, n: int) -> bytes:
        """Return the next n bytes."""
        if self.position + n > min(self._n_bytes, LARGEST_TEXT):
            if self.position + n <= self._n_bytes:
                raise ValueError(f"the header has more than {LARGEST_TEXT:,} bytes")
            raise ValueError(f"the file ends within its header, which needs at least {self.position + n:,} bytes")
        self.position += n
        return self._stream.read(n)

    def number(self, code: str) -> Any:
        """Return the next number, whose type is a code of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Return the next string."""
        content = self.take(self.number("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text {shown(content)} is not UTF-8") from None

    def value(self) -> Any:
        """Return the next value: a number, a str, or a list of numbers or of strs."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        item, n = self.number("I"), self.number("Q")
        if item == _STRING:
            return [self.text() for _ in range(n)]
        if item not in _SCALARS:
            raise ValueError(f"an array has items of the type {item}; expected numbers or strings")
        dtype = np.dtype(f"<{_SCALARS[item]}")
        return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the values and the tensors of a file by name, without reading a tensor.

    Tensors of the types F32, F16, BF16 and Q8_0 are read. A tensor of Q8_0 is converted to float32, exactly.

    Raises
    ------
    CheckpointError
        If the file is damaged or incomplete, holds a model other than a GPT-2, or has a tensor of another type.
    """
    opened = OpenFile(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header = _Header(stream, size)
            n_tensors, n_values = _read_start(header)
            values = _read_values(header, n_values)
            if (found := values.get("general.architecture")) != ARCHITECTURE:
                raise ValueError(f"general.architecture is {shown(found)}; expected {ARCHITECTURE!r}")
            if values.get("split.count", 1) not in (0, 1):
                raise ValueError(
                    f"it is one of {shown(values['split.count'])} files; merge them with `llama-gguf-split --merge`"
                )
            tensors = _read_tensors(header, n_tensors, values.get("general.alignment", _ALIGNMENT), size, opened)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return values, tensors


def _read_start(header: _Header) -> tuple[int, int]:
    """Return the number of tensors and the number of values."""
    if (magic := header.take(4)) != MAGIC:
        raise ValueError(f"is not a GGUF file: it begins with {magic!r}")
    if (version := header.number("I")) not in _VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        why = "the file is for big-endian machines" if is_swapped else f"its version is {version}"
        raise ValueError(
            f"{why}; expected a little-endian file of version {' or '.join(map(str, _VERSIONS))}: "
            f"convert the model again"
        )
    return header.number("Q"), header.number("Q")


def _read_values(header: _Header, n: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(n):
        if (name := header.text()) in values:
            raise ValueError(f"two values have the name {shown(name)}")
        values[name] = header.value()
    return values


def _read_tensors(header: _Header, n: int, alignment: Any, size: int, opened: OpenFile) -> dict[str, StoredTensor]:
    if not isinstance(alignment, int) or alignment not in [1 << i for i in range(3, 17)]:
        raise ValueError(f"general.alignment is {shown(alignment)}; expected a power of two from 8 to 65536")
    places: dict[str, tuple[_Type, tuple[int, ...], int]] = {}
    end = 0
    for _ in range(n):
        name, n_axes = header.text(), header.number("I")
        if name in places:
            raise ValueError(f"two tensors have the name {shown(name)}")
        if not 1 <= n_axes <= 4:
            raise ValueError(f"{shown(name)} has {n_axes} axes; expected 1 to 4")
        shape = tuple(header.number("Q") for _ in range(n_axes))[::-1]  # the file begins with the last axis
        code, offset = header.number("I"), header.number("Q")
        if code not in _TYPES:
            raise ValueError(
                f"{named(name)} is of type {_OTHER_TYPES.get(code, code)}; tensors of "
                f"{', '.join(kind.name for kind in _TYPES.values())} can be read: give a file that was quantized less"
            )
        kind = _TYPES[code]
        if 0 in shape:
            raise ValueError(f"{named(name)} has shape {list(shape)}; no dimension may be 0")
        if shape[-1] % kind.length:
            raise ValueError(
                f"{named(name)} has shape {list(shape)}; {kind.name} requires a multiple of {kind.length} at the end"
            )
        start = -(-end // alignment) * alignment
        if offset != start:
            raise ValueError(
                f"{named(name)} is said to begin at byte {offset:,} of the data; it should follow at {start:,}"
            )
        places[name] = kind, shape, start
        end = start + math.prod(shape) // kind.length * kind.n_bytes
    data = -(-header.position // alignment) * alignment
    if data + end > size:
        raise ValueError(f"the file has {size:,} bytes, and its tensors end at {data + end:,}: it is incomplete")
    return {name: _tensor(opened, kind, data + start, shape) for name, (kind, shape, start) in places.items()}


def _tensor(opened: OpenFile, kind: _Type, start: int, shape: tuple[int, ...]) -> StoredTensor:
    if kind.length == 1:
        return opened.tensor(start, shape, kind.dtype)
    return StoredTensor(shape, kind.dtype, functools.partial(_read_q8_0, opened, start, shape))


def _read_q8_0(opened: OpenFile, start: int, shape: tuple[int, ...]) -> np.ndarray:
    blocks = opened.read(start, (*shape[:-1], shape[-1] // 32), _BLOCK)
    a = blocks["multiples"].astype(np.float32)
    a *= blocks["scale"].astype(np.float32)[..., None]
    return a.reshape(shape)


def write_gguf(
    file: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write values and tensors by name. Each tensor is read just before it is written.

    Parameters
    ----------
    file : Path
        The file. It is overwritten.
    values : dict
        Strings, booleans, whole numbers from 0 to 2^32 - 1, floats, and lists of strings or of whole numbers from -2^31
        to 2^31 - 1.
    tensors : dict of StoredTensor
        Tensors of float32, float16 and bfloat16.
    progress : callable, optional
        A function that wraps the iterable of names, as tqdm does.
    """
    header = MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(values))
    header += b"".join(_text(name) + _packed(value) for name, value in values.items())
    end = 0
    for name, (shape, dtype, *_) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", _CODES[dtype], end)
        end += _padded(math.prod(shape) * float_dtypes[dtype].itemsize)
    with file.open("wb") as stream:
        stream.write(header.ljust(_padded(len(header)), b"\0"))
        for name in progress([*tensors]):
            data = np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data
            stream.write(data)
            stream.write(bytes(_padded(len(data)) - len(data)))


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _packed(value: Any) -> bytes:
    """Return the type and the bytes of a value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
        case list():
            return struct.pack(f"<IIQ{len(value)}i", _ARRAY, 5, len(value), *value)
    raise TypeError(f"{shown(value)} cannot be written to a GGUF file")
