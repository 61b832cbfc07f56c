"""What is asked of a model, checked on the host before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .backend import backend_of
from .config import GPT2Config
from .params import Params, flatten, shapes
from .sampling import check_options


def is_int(x: Any) -> bool:
    """Return whether x is a whole number, Python's or NumPy's, and no bool."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_params(params: Params, config: GPT2Config) -> None:
    """Refuse parameters of another model: one block too many or too few would compute something else in silence."""
    expected, found = shapes(config), dict(flatten(params))
    for verb, paths in (("lack", expected.keys() - found.keys()), ("hold", found.keys() - expected.keys())):
        if paths:
            raise ValueError(f"the parameters {verb} {', '.join(sorted(paths)[:3])}; config says {config}")
    for path, x in found.items():
        if (shape := backend_of(x).shape(x)) != expected[path]:
            raise ValueError(f"{path} has shape {list(shape)}; config makes it {list(expected[path])}")


def check_ids(given: Any, config: GPT2Config, axes: int) -> np.ndarray:
    """Return token ids from outside as int32 [seq] or [batch, seq] on the host."""
    expected = "[seq]" if axes == 1 else "[batch, seq]"
    try:
        ids = np.asarray(given if isinstance(given, list | tuple | range) else backend_of(given).to_numpy(given))
    except ValueError as error:
        raise ValueError(f"token ids are ragged; expected int {expected}, rows of equal length") from error
    except TypeError as error:
        raise TypeError(
            f"token ids are of type {type(given).__name__}; expected int {expected}, as a list or an array"
        ) from error
    if ids.ndim != axes or 0 in ids.shape:
        raise ValueError(f"token ids have shape {list(ids.shape)}; expected int {expected}, none of them 0")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids have dtype {ids.dtype}; expected integers")
    if ids.min() < 0 or ids.max() >= config.n_vocab:
        bad = ids[(ids < 0) | (ids >= config.n_vocab)][0]
        raise ValueError(f"token id {bad} is not in the vocabulary, which has ids 0 to {config.n_vocab - 1}")
    return ids.astype(np.int32)


def check_length(seq: int, config: GPT2Config) -> None:
    """Refuse more tokens than the model has positions."""
    if seq > config.n_ctx:
        raise ValueError(f"{seq} tokens were given; the model has n_ctx = {config.n_ctx} positions")


def check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: GPT2Config, sliding: bool) -> None:
    """Refuse prompts that do not fit into the context together with what is to be drawn."""
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected an int of at least 0")
    if sliding:
        if config.n_ctx < 2:
            raise ValueError("sliding needs a context of two tokens at least; the model has n_ctx = 1")
        return
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > config.n_ctx:
        room = config.n_ctx - longest
        advice = f"give at most {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} do not fit into "
            f"n_ctx = {config.n_ctx}: {advice}, or let the window slide (sliding)"
        )


def check_stop(stop: str | int | Iterable[str | int] | None, config: GPT2Config) -> tuple[set[int], list[str]]:
    """Return the token ids and the strings that end a text."""
    ends: set[int] = set()
    strings: list[str] = []
    for each in [] if stop is None else [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else stop:
        if isinstance(each, str):
            if not each:
                raise ValueError("stop names an empty string, which stands at the beginning of every text")
            strings.append(each)
        elif not is_int(each):
            raise TypeError(f"stop names {each!r}; expected token ids or strings")
        elif not 0 <= each < config.n_vocab:
            raise ValueError(f"stop names {each}, which is not in the vocabulary of {config.n_vocab}")
        else:
            ends.add(int(each))
    return ends, strings


def check_drawing(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, repetition_penalty: Any, seed: int | None
) -> dict[str, Any]:
    """Return the options of `sampling.sample`, with a seed that is drawn if none is given."""
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": secrets.randbits(63) if seed is None else seed,
    }
    check_options(**options)
    return options
