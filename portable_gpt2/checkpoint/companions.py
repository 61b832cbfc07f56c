"""Companions: files of a checkpoint that other programs read. They are kept when a checkpoint is converted or saved.

transformers reads more of a checkpoint than this package does: options of generation, the tokenizer's settings, chat
templates, and entries of ``config.json`` about other tasks. These files are copied byte for byte unless an entry must
change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import ALIASES, GPT2Config
from ..host import CheckpointError
from ..tokenizer_files import ADDED_FILE, MERGES_FILE, SETTINGS_FILE, SPECIAL_FILE, TOKENIZER_FILE, VOCAB_FILE
from .contents import LARGEST_TEXT, exists, parse_json, read_text

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER_SETTINGS = (SETTINGS_FILE, SPECIAL_FILE, ADDED_FILE)
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    VOCAB_FILE,
    MERGES_FILE,
    "encoder.json",
    "vocab.bpe",
)  # encoder.json and vocab.bpe are OpenAI's names
OTHER_TOKENIZERS = ("vocab.txt", "spiece.model", "tokenizer.model")  # files of BERT and of SentencePiece
UNREAD = (*TOKENIZER_FILES, *TOKENIZER_SETTINGS, *OTHER_TOKENIZERS)
"""The files of a tokenizer that are kept although the tokenizer is not used."""
_DTYPE_ENTRIES = ("dtype", "torch_dtype")


def read_companions(directory: Path) -> dict[str, bytes]:
    """Return the companions in a directory by name, ``config.json`` included and a tokenizer's files excluded."""
    templates = (f"{file.parent.name}/{file.name}" for file in directory.glob(TEMPLATES))
    return _read(directory, (CONFIG_FILE, GENERATION_FILE, *CHAT_TEMPLATES, *templates))


def read_tokenizer_settings(directory: Path) -> dict[str, bytes]:
    """Return the files with a tokenizer's settings by name. `Tokenizer.save` does not write them."""
    return _read(directory, TOKENIZER_SETTINGS)


def _read(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: read_text(directory / name) for name in names if exists(directory / name)}


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer that is not used, so that they can be copied. They are not checked."""
    files = (directory / name for name in UNREAD)
    found = (file for file in files if os.path.isfile(file) and file.stat().st_size <= LARGEST_TEXT)
    return {file.name: file.read_bytes() for file in found}


def configuration(directory: Path, companions: Mapping[str, bytes]) -> GPT2Config:
    """Return the configuration that ``config.json`` and ``generation_config.json`` describe together."""
    config = _called(directory / CONFIG_FILE, GPT2Config.from_dict, companions)
    return generating(directory, config, companions)


def generating(directory: Path, config: GPT2Config, companions: Mapping[str, bytes]) -> GPT2Config:
    """Return a configuration with the special ids of ``generation_config.json``, if that file exists."""
    if GENERATION_FILE not in companions:
        return config
    return _called(directory / GENERATION_FILE, config.with_generation, companions)


def _called(file: Path, read: Any, companions: Mapping[str, bytes]) -> GPT2Config:
    entries = parse_json(file, companions[file.name])
    try:
        config: GPT2Config = read(entries)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config


def written_companions(config: GPT2Config, dtypes: Iterable[str], companions: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the companions to write with a model, including ``config.json``.

    Parameters
    ----------
    config : GPT2Config
        The configuration that the files must describe.
    dtypes : strs
        The dtypes of the weights that are written.
    companions : dict
        The files that were read with the model. A file that describes this configuration is returned unchanged.
    """
    files, here = dict(companions), Path()
    given = parse_json(here / CONFIG_FILE, files[CONFIG_FILE]) if CONFIG_FILE in files else {}
    if given and configuration(here, files) == config:
        said = config.to_dict()
        entries = {name: said[name] for name in ("architectures", "model_type")} | given
    else:
        entries = {name: value for name, value in given.items() if name not in ALIASES} | config.to_dict()
        if generating(here, config, files) != config:
            generation = parse_json(here / GENERATION_FILE, files[GENERATION_FILE])
            generation |= {name: entries[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            files[GENERATION_FILE] = _json(generation)
    if len(names := {*dtypes}) == 1:
        entries |= dict.fromkeys((name for name in _DTYPE_ENTRIES if entries.get(name) is not None), *names)
    if entries != given:
        files[CONFIG_FILE] = _json(entries)
    return files


def _json(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps(entries, indent=2) + "\n").encode()
