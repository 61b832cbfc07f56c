"""Completions of a batch of prompts. Each text ends independently of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .decoder import Decoder, Generation
from .detokenizer import StreamingDetokenizer
from .stop_strings import StopStrings

_T = TypeVar("_T")


@dataclass(frozen=True)
class Completion:
    """A generated continuation of a prompt.

    Parameters
    ----------
    prompt : str
        The prompt.
    text : str
        The continuation only.
    tokens : list of int
        The ids that were generated, including those that spell a stop string, but not a final token of ``stop``.
    index : int
        The number of the sample among those of the same prompt, from 0.
    finish_reason : str
        ``stop`` if the text ended by itself, ``length`` if it reached max_new_tokens.
    seed : int
        The seed of the sampling. The same prompt, options, index and seed give the same text again.

    Examples
    --------
    >>> from portable_gpt2 import Completion
    >>> Completion("To be", ", or not", [11, 393, 407], 0, "length", seed=7).text
    ', or not'
    """

    prompt: str
    text: str
    tokens: list[int]
    index: int
    finish_reason: str
    seed: int


@dataclass(frozen=True)
class Piece:
    """A token that was added to a text, and the text that became certain with it."""

    prompt_index: int
    """The number of the prompt, from 0."""
    index: int
    """The number of the sample among those of the same prompt, from 0."""
    token: int | None
    """The id of the token; None for text that was held back until the end."""
    piece: str
    """The text. It is empty while a character is incomplete, and while the text may be the beginning of a stop string.
    All pieces of a text together are `Completion.text`."""


class Request(NamedTuple):
    """A request for one completion."""

    prompt_index: int
    prompt: str
    ids: list[int]  # of the prompt
    sampling: Sampling
    sample: int  # the number of the sample among those of the same prompt


def complete(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    max_new_tokens: int,
    ends: set[int],
    stops: StopStrings,
    on_piece: Callable[[Piece], None] | None = None,
) -> Iterator[Completion]:
    """Complete a batch of requests. Each text ends at a token in `ends` or before a stop string."""
    generations = [Generation(list(r.ids), r.sampling, r.sample) for r in requests]
    detokenizers = {generation: StreamingDetokenizer(tokenizer.decoder(), stops) for generation in generations}
    pieces: dict[Generation, list[str]] = {generation: [] for generation in generations}
    request_of = dict(zip(generations, requests, strict=True))

    def add(generation: Generation, token: int | None) -> None:
        piece = detokenizers[generation].read(token)
        pieces[generation].append(piece)
        if on_piece is not None and (piece or token is not None):
            request = request_of[generation]
            on_piece(Piece(request.prompt_index, request.sample, token, piece))

    for generation in decoder.stream(generations, max_new_tokens, ends):
        if generation.tokens[-1] in ends:
            generation.tokens.pop()
            generation.finished = True
        else:
            add(generation, generation.tokens[-1])
            generation.finished = detokenizers[generation].ended
    for generation, request in request_of.items():
        if not detokenizers[generation].ended:
            add(generation, None)
        reason = "stop" if generation.finished or detokenizers[generation].ended else "length"
        assert request.sampling.seed is not None
        tokens = generation.tokens[len(request.ids) :]
        text = "".join(pieces[generation])
        yield Completion(request.prompt, text, tokens, request.sample, reason, request.sampling.seed)


def batched(items: Iterable[_T], n: int) -> Iterator[list[_T]]:
    """Yield lists of n items; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, n)):
        yield batch
