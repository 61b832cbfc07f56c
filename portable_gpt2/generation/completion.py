"""Completions of a batch of prompts. Each text ends independently of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


class Request(NamedTuple):
    """A request for one completion."""

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
) -> Iterator[Completion]:
    """Complete a batch of requests. Each text ends at a token in `ends` or before a stop string."""
    generations = [Generation(list(r.ids), r.sampling, r.sample) for r in requests]
    detokenizers = {generation: StreamingDetokenizer(tokenizer.decoder(), stops) for generation in generations}
    pieces: dict[Generation, list[str]] = {generation: [] for generation in generations}
    for generation in decoder.stream(generations, max_new_tokens, ends):
        if generation.tokens[-1] in ends:
            generation.tokens.pop()
            generation.finished = True
        else:
            pieces[generation].append(detokenizers[generation].read(generation.tokens[-1]))
            generation.finished = detokenizers[generation].ended
    for generation, request in zip(generations, requests, strict=True):
        if not detokenizers[generation].ended:
            pieces[generation].append(detokenizers[generation].read(None))
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
