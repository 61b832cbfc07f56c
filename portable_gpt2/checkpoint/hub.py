"""Download the files that loading a model takes from Hugging Face's hub, into the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..host import CheckpointError
from ..registry import available_backends, how_to_install
from ..tokenizer_files import MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE
from .companions import (
    CHAT_TEMPLATES,
    CONFIG_FILE,
    GENERATION_FILE,
    OTHER_TOKENIZERS,
    TEMPLATES,
    TOKENIZER_SETTINGS,
)
from .formats import GGUF_FILES, INDEX, WEIGHTS_FILE, formats, read_index

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w.-][\w./-]*)?")


def is_id(source: str) -> bool:
    """Return whether a text has the form of a model's id: ``gpt2``, ``user/model``, ``user/model@revision``.

    Examples
    --------
    >>> from portable_gpt2.checkpoint import hub
    >>> [hub.is_id(source) for source in ("openai-community/gpt2-xl", "./gpt2", "a/b/c")]
    [True, False, False]
    """
    return _ID.fullmatch(source) is not None


def download(source: str) -> Path:
    """Download the files that loading a model takes, and return their directory in the hub's cache.

    The configuration, its companions, the tokenizer and safetensors are requested first. Other formats of weights are
    requested only if there are no safetensors. The first request determines the commit, and all later requests are for
    the same commit.

    Raises
    ------
    CheckpointError
        If there is no such model, or if the hub cannot be reached and the cache lacks a file.
    """
    from huggingface_hub import constants

    companions = [GENERATION_FILE, *TOKENIZER_SETTINGS, *CHAT_TEMPLATES, TEMPLATES]
    names = [CONFIG_FILE, *companions, TOKENIZER_FILE, WEIGHTS_FILE, WEIGHTS_FILE + INDEX]
    directory = _fetch(source, names)
    pinned = f"{source.partition('@')[0]}@{directory.name}"
    if not (directory / TOKENIZER_FILE).is_file():
        _fetch(pinned, [VOCAB_FILE, MERGES_FILE, *OTHER_TOKENIZERS])
    unreadable = []
    for pattern, backend in formats():
        if pattern == GGUF_FILES:  # models on the hub have many such files, one for each kind of quantization
            continue
        if backend is not None and backend not in available_backends():  # these gigabytes could not be read here
            unreadable.append(f"{pattern} ({how_to_install(backend)})")
            continue
        if backend is not None:
            _fetch(pinned, [pattern, pattern + INDEX])
        if any(directory.glob(pattern)):
            return directory
        if indices := list(directory.glob(pattern + INDEX)):
            _fetch(pinned, read_index(indices[0]))
            return directory
    also = f"; no installed framework could read {', '.join(unreadable)}" if unreadable else ""
    where = f" in the cache, {constants.HF_HUB_CACHE} (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    raise CheckpointError(f"{source}: the hub's model has no {WEIGHTS_FILE}{where}, nor weights in another form{also}")


def _fetch(source: str, names: Iterable[str]) -> Path:
    from huggingface_hub import constants, snapshot_download  # this import takes half a second
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    model, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(names)))
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the hub has no revision {revision!r} of {model}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory, and no such model on the hub, {constants.ENDPOINT} (if it is private, "
            f"set HF_TOKEN)"
        ) from error
    except Exception as error:  # the package, its HTTP client and the system raise errors of many classes
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else " ".join(f"{type(error).__name__}: {error}".split())
        )
        raise CheckpointError(
            f"{source}: no such directory; and the hub's model of this name is not complete in the cache, "
            f"{constants.HF_HUB_CACHE}, and cannot be downloaded ({why[:300]})"
        ) from error
