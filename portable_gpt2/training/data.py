"""Data for training: train a tokenizer, write texts as a file of token ids, and read windows of tokens from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import models, pre_tokenizers, trainers

from .. import checks, random
from ..tokenizer import Tokenizer
from ..tokenizer_files import END_OF_TEXT

_LARGEST_READ = 1 << 30  # bytes; a larger file of token ids is memory-mapped
_CHUNK = 1 << 20  # characters that are encoded at a time


def train_tokenizer(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer like GPT-2's.

    Parameters
    ----------
    texts : strs
        The texts to train on.
    n_vocab : int
        Number of entries of the vocabulary: ``<|endoftext|>``, which is id 0, the 256 bytes, and merges.

    Raises
    ------
    ValueError
        If n_vocab is below 257, or the texts have too few merges. The message says how many entries are possible.

    Examples
    --------
    >>> from portable_gpt2.training import train_tokenizer
    >>> tokenizer = train_tokenizer(["to be, or not to be"], 260)
    >>> len(tokenizer), tokenizer.decode(tokenizer.encode("to be"))
    (260, 'to be')
    """
    n_vocab, texts = checks.integer("n_vocab", n_vocab), list(texts)
    least = 1 + len(pre_tokenizers.ByteLevel.alphabet())
    if n_vocab < least:
        raise ValueError(f"a vocabulary of {n_vocab} is too small: the bytes and {END_OF_TEXT} are {least} entries")
    # The library allocates memory for n_vocab entries, and aborts the process if there is too little. A text cannot
    # have more merges than bytes, so a larger n_vocab is reduced.
    most = min(n_vocab, least + 4 * sum(map(len, texts)))
    checks.memory(64 * most, f"a vocabulary of {n_vocab}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=most,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < n_vocab:
        raise ValueError(
            f"a vocabulary of {n_vocab} is too large; the text has merges for only {bpe.get_vocab_size()} entries: ask "
            f"for no more, or give more text"
        )
    return Tokenizer.from_bpe(bpe.model)


def documents(text: str) -> Iterator[str]:
    r"""Return an iterator over the documents of a text. ``<|endoftext|>`` separates them, and is not part of them.

    A document that is empty or has only white space, such as the line ending after the last separator, is left out.

    Examples
    --------
    >>> from portable_gpt2.training import documents
    >>> list(documents("To be<|endoftext|>or not<|endoftext|>\n"))
    ['To be', 'or not']
    """
    start = 0
    while start < len(text):
        end = text.find(END_OF_TEXT, start)
        end = len(text) if end < 0 else end
        document = text[start:end]
        if document and not document.isspace():
            yield document
        start = end + len(END_OF_TEXT)


def write_tokens(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    n_vocab: int,
    file: str | os.PathLike[str],
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
    *,
    allow_special: bool | Collection[str] = False,
) -> int:
    """Append the token ids of texts to a file, with ``<|endoftext|>`` after each document if the vocabulary has it.

    Parameters
    ----------
    texts : strs
        The texts. They are encoded in chunks, with the same ids as if each were encoded as a whole.
    tokenizer : Tokenizer
        The tokenizer.
    n_vocab : int
        Size of the model's vocabulary. An id takes two bytes in the file if the size is at most 65,536, and four bytes
        if it is larger.
    file : path
        The file.
    progress : callable, optional
        A function that wraps the iterable of the chunks' ids, as tqdm does.
    allow_special : bool or collection of str
        The special tokens that become one id where a text spells them, as for `Tokenizer.encode`. If ``<|endoftext|>``
        is one of them, it separates documents, as in `documents`.

    Returns
    -------
    int
        The number of ids that were written.

    Raises
    ------
    ValueError
        If an id is not in the vocabulary of the model, a text cannot be encoded, or a special token that is allowed is
        not in the tokenizer.
    """
    n, file = 0, checks.path("file", file)
    with open(file, "ab") as stream:
        for ids in progress(_encoded(texts, tokenizer, tokenizer.allowed(allow_special))):
            if (largest := max(ids, default=0)) >= n_vocab:
                token = tokenizer.decode([largest])
                raise ValueError(
                    f"{token!r} has the id {largest} in the tokenizer; the model's vocabulary has {n_vocab} entries"
                )
            stream.write(np.asarray(ids, _token_dtype(n_vocab)).tobytes())
            n += len(ids)
    return n


def _token_dtype(n_vocab: int) -> np.dtype:
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, allowed: frozenset[str]) -> Iterator[list[int]]:
    """Yield the token ids of texts, chunk by chunk."""
    whole = tokenizer.found_whole(allowed)
    for text in texts:
        for document in documents(text) if END_OF_TEXT in allowed else [text]:
            for piece in pieces(document, tokens=whole):
                yield tokenizer.encode(piece, allow_special=allowed)
            if tokenizer.end_of_text is not None:
                yield [tokenizer.end_of_text]


def pieces(text: str, size: int | None = None, tokens: Iterable[str] = ()) -> Iterator[str]:
    """Split a text into chunks of about `size` characters that can be encoded separately: the token ids are the same.

    A chunk ends before a space that follows a visible character, because GPT-2's splitting into words always begins a
    word there. The only tokens that may contain such a space are those that the tokenizer finds before it splits the
    text into words (``tokens``, from `Tokenizer.found_whole`). No chunk ends inside one of them.
    """
    size = _CHUNK if size is None else size
    across = [token for token in tokens if _BORDER.search(token)]
    start = 0
    while start < len(text):
        borders = (found.start() for found in _BORDER.finditer(text, start + size))
        end = next((i for i in borders if not any(_spans(token, text, i) for token in across)), len(text))
        yield text[start:end]
        start = end


def _spans(token: str, text: str, i: int) -> bool:
    """Return whether a token occurs in a text so that it begins before position i and ends after it."""
    return token in text[max(i - len(token) + 1, 0) : i + len(token) - 1]


# White space after a visible character. Unlike Python, the tokenizers package does not count U+001C to U+001F as space.
_BORDER = re.compile(r"(?<=\S)[^\S\x1c-\x1f]")


def open_tokens(file: str | os.PathLike[str], n_vocab: int) -> np.ndarray:
    """Return the token ids in a file of `write_tokens`, [n], as a read-only array.

    A file larger than 1 GiB is memory-mapped, so that it need not fit into memory. Such a file must not change while
    the array is used: if it is overwritten, the ids change; if it is truncated, the system ends the process (SIGBUS).

    Raises
    ------
    ValueError
        If the file is truncated, or an id is not in the vocabulary.
    """
    file = checks.path("file", file)
    dtype, size = _token_dtype(n_vocab), os.path.getsize(file)
    if not size or size % dtype.itemsize:
        raise ValueError(
            f"{os.fspath(file)}: has {size} bytes; expected token ids of {dtype.itemsize} bytes; start a new run"
        )
    tokens = np.fromfile(file, dtype) if size <= _LARGEST_READ else np.memmap(file, dtype, mode="r")
    tokens.flags.writeable = False
    if (largest := int(tokens.max())) >= n_vocab:
        raise ValueError(f"{os.fspath(file)}: token id {largest} is not in the vocabulary of {n_vocab}")
    return tokens


def check_window(n: int, length: int, what: str) -> None:
    """Refuse a text that has fewer tokens than one window."""
    if n < length:
        raise ValueError(f"the {what} has {n} tokens and a window has {length}: give more text, or a shorter context")


def _text(tokens: Any) -> np.ndarray:
    """Return the token ids of a text, [n], as a NumPy array. If it is memory-mapped, the ids are not read here."""
    found = checks.integers("tokens", tokens, "int [n], as an array")
    if found.ndim != 1:
        raise ValueError(f"tokens have shape {list(found.shape)}; expected int [n]")
    return found


def _as_int32(windows: np.ndarray) -> np.ndarray:
    """Return windows of token ids as int32, the dtype that a model reads. Larger ids are refused."""
    if windows.dtype.itemsize >= 4 and (largest := int(windows.max())) >= 2**31:
        raise ValueError(f"tokens hold {largest}; expected ids below 2**31")
    return windows.astype(np.int32)


def batch(tokens: np.ndarray, index: int, *, batch_size: int, length: int, seed: int) -> np.ndarray:
    """Return random windows of a text, int32 [batch_size, length]. They depend only on the index and the seed.

    Raises
    ------
    TypeError
        If tokens is not an array of integers.
    ValueError
        If the text has fewer tokens than a window or more than one axis, or another argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.training import batch
    >>> batch(np.arange(100), 7, batch_size=2, length=4, seed=0)
    array([[45, 46, 47, 48],
           [92, 93, 94, 95]], dtype=int32)
    """
    index, batch_size = checks.integer("index", index), checks.integer("batch_size", batch_size, 1)
    length = checks.integer("length", length, 2)
    tokens = _text(tokens)
    check_window(len(tokens), length, "text")
    starts = random.window_starts(batch_size, len(tokens) - length + 1, index, checks.seed("seed", seed))
    return _as_int32(tokens[starts[:, None] + np.arange(length)])


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return the complete windows of a text, int32 [n, length]. Each begins with the last token of the one before it.

    Every token after the first is predicted once, except at the end, where the tokens do not fill a window.

    Raises
    ------
    TypeError, ValueError
        As for `batch`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_gpt2.training import windows
    >>> windows(np.arange(8), 4)
    array([[0, 1, 2, 3],
           [3, 4, 5, 6]], dtype=int32)
    """
    length = checks.integer("length", length, 2)
    tokens = _text(tokens)
    check_window(len(tokens), length, "held-out text")
    return _as_int32(sliding_window_view(tokens, length)[:: length - 1])
