"""GPT2: a configuration, its parameters on a backend, and a tokenizer; what most users hold."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .backend import Backend, StoredTensor, backend_of, get_backend
from .checkpoint import read_checkpoint, write_checkpoint
from .config import GPT2Config
from .generate import Decoder, padded_length
from .model import gpt2
from .params import Params, flatten, nest, shapes
from .sampling import check_options
from .tokenizer import Tokenizer


class GPT2:
    """A GPT-2 language model on one backend and one device.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    params : dict
        Its parameters, arrays of one backend on one device, as `init_params` makes them.
    tokenizer : Tokenizer, optional
        Without one, the model works by token ids.

    Raises
    ------
    ValueError
        If the parameters are not those of the configuration: one is missing, too many, or of another shape.

    Attributes
    ----------
    config, params, tokenizer
        As given; params may have been laid out anew in memory.
    backend : Backend
        What computes.
    device : str
        Where.
    source : str or None
        What it was loaded from, in a few words.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> len(list(model.stream_ids([1, 2, 3], max_new_tokens=4, seed=7)))
    4
    """

    def __init__(self, config: GPT2Config, params: Params, tokenizer: Tokenizer | None = None) -> None:
        _check_params(params, config)
        self.config, self.tokenizer = config, tokenizer
        self.source: str | None = None
        self.backend: Backend = backend_of(params["wte"])
        self.device = self.backend.device(params["wte"])
        self._device = self.backend.placement(params["wte"])
        with self.backend.on(self._device):
            self.params: Params = nest({path: self.backend.prepare(path, x) for path, x in flatten(params)})
        self._decoder = Decoder(self.backend, self.params, config, self._device)
        self._logits = self.backend.compile(lambda params, tokens: gpt2(params, tokens, config)[0], bound=self.params)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<GPT2 of {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.n_ctx}, vocabulary "
            f"{c.n_vocab}, on {self.backend.name}, {self.device}>"
        )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        backend: str | Backend | None = None,
        device: Any = None,
        dtype: str | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> GPT2:
        """Load a checkpoint.

        Parameters
        ----------
        source : path or str
            A directory in Hugging Face's layout (``config.json``; ``model.safetensors``, or several and their index, or
            ``pytorch_model.bin``) or OpenAI's (``hparams.json``, ``model.ckpt``), with the tokenizer's files for text;
            without them the model works by ids. Where there is none of this name, a model of the hub: ``gpt2``,
            ``user/model`` or ``user/model@revision``.
        backend : str or Backend, optional
            What computes; the default backend (see `get_backend`) unless given.
        device : str or the framework's own device object, optional
            Where: ``cpu``, ``cuda``, ``cuda:1`` ...; the framework's default unless given.
        dtype : str, optional
            ``float32`` unless given; ``float64``, ``bfloat16`` or ``float16`` where the backend computes in them
            (NumPy stores 16 bits and computes in float32).
        progress : callable, optional
            Wraps the iterable of tensors that are loaded one by one, as tqdm does.

        Raises
        ------
        CheckpointError
            If the files are not those of a whole GPT-2. The message names the file and the tensor.
        BackendNotInstalled
            If the backend's framework is missing, or one that it takes to read the files. The message says what to
            install.
        ValueError
            If there is no such device or dtype.
        """
        owner = get_backend(backend, device)
        dtype = "float32" if dtype is None else dtype
        owner.dtype(dtype)
        found = read_checkpoint(source)
        tensors, params = found.tensors, dict[str, Any]()
        # One tensor at a time, and each is let go before the next is read. The largest first: what is in memory twice
        # for a moment is so while there is little else, and leaves room that the next ones fit into.
        order = sorted(tensors, key=lambda path: -math.prod(tensors[path].shape))
        with owner.on(owner.default_device):
            for path in progress(order):
                params[path] = owner.prepare(path, owner.from_numpy(tensors.pop(path).read(), dtype))
        model = cls(found.config, nest({path: params[path] for path in shapes(found.config)}), found.tokenizer)
        model.source = found.source
        return model

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the model, and its tokenizer if it has one, as a checkpoint that `load` and transformers read.

        Parameters
        ----------
        directory : path
            Where to. It appears complete or not at all.
        force : bool
            Whether to replace a directory that exists, with all that it holds.

        Raises
        ------
        FileExistsError
            If the directory exists and may not be replaced. Nothing is written.
        """
        tensors = {path: self._stored(x) for path, x in flatten(self.params)}
        write_checkpoint(directory, self.config, tensors, self.tokenizer, force=force)

    def _stored(self, x: Any) -> StoredTensor:
        return StoredTensor(self.backend.shape(x), str(self.backend.dtype_name(x)), lambda: self.backend.to_numpy(x))

    def logits(self, token_ids: Any) -> Any:
        """Return the logits of the token that follows each token.

        Parameters
        ----------
        token_ids : int [batch, seq]
            Nested lists, or an array of any backend.

        Returns
        -------
        float array [batch, seq, n_vocab]
            An array of the model's backend, on its device.

        Raises
        ------
        TypeError
            If the ids are not integers.
        ValueError
            If they are not of two axes, one is not in the vocabulary, or there are more than n_ctx in a row.
        """
        tokens = self._check_ids(token_ids, axes=2)
        _, seq = tokens.shape
        if seq > self.config.n_ctx:
            raise ValueError(f"{seq} tokens were given; the model has n_ctx = {self.config.n_ctx} positions")
        padding = padded_length(seq, self.config.n_ctx) - seq if self.backend.recompiles else 0
        padded = np.pad(tokens, ((0, 0), (0, padding)))  # no token sees those behind it
        with self.backend.on(self._device):
            logits = self._logits(self.backend.from_numpy(padded, device=self._device))
            return logits[:, :seq, :] if padding else logits

    def stream_ids(
        self,
        ids: Any,
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 40,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Iterable[int] | None = None,
    ) -> Iterator[int]:
        """Return an iterator over the token ids that continue some token ids, as they are drawn.

        Parameters
        ----------
        ids : int [seq]
            The prompt: a list or an array, of at least one id.
        max_new_tokens : int
            How many to draw at most. Prompt and continuation fit into n_ctx together.
        temperature, top_k, top_p
            See `sampling.sample`: 0 is greedy; 0 or None switch top_k off, None top_p.
        seed : int, optional
            The same seed draws the same tokens on every backend. One is drawn unless given.
        stop : int or ints, optional
            Token ids that end the continuation, and are not part of it.

        Raises
        ------
        TypeError
            If the ids are not integers.
        ValueError
            If an id is not in the vocabulary, an option makes no sense, or the whole would not fit into n_ctx.
            All is checked at the call, before anything is computed.
        """
        prompt = self._check_ids(ids, axes=1).tolist()
        if not _is_int(max_new_tokens) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected an int of at least 0")
        room = self.config.n_ctx - len(prompt)
        if max_new_tokens > room:
            advice = f"give at most {room}" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} do not fit into "
                f"n_ctx = {self.config.n_ctx}: {advice}"
            )
        seed = secrets.randbits(63) if seed is None else seed
        check_options(temperature, top_k, top_p, seed)
        ends = self._check_stop(stop)
        drawn = self._decoder.stream(
            prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        return _until(drawn, ends)

    def stream(self, prompt: str, *, stop: int | Iterable[int] | None = None, **options: Any) -> Iterator[str]:
        """Return an iterator over the text that continues a prompt, in pieces as they come.

        There is a piece for each token, empty while a character that is split over tokens is not whole. The text ends
        at ``<|endoftext|>``, or at a token of ``stop``. An empty prompt starts from ``<|endoftext|>``.

        Parameters
        ----------
        prompt : str
            What to continue. Text that spells a special token is text.
        **options
            As for `stream_ids`.

        Raises
        ------
        TypeError, ValueError
            As for `stream_ids`; also if the model has no tokenizer, or the prompt is not valid text.
        """
        tokenizer = self._require_tokenizer()
        end = self.config.eos_token_id if tokenizer.end_of_text is None else tokenizer.end_of_text
        ids = tokenizer.encode(prompt)
        if not ids:
            if end is None:
                raise ValueError("the prompt is empty, and the vocabulary has no <|endoftext|> to start from")
            ids = [end]
        ends = self._check_stop(stop) | ({end} if end is not None else set())
        return _pieces(tokenizer, self.stream_ids(ids, stop=ends, **options))

    def generate(self, prompt: str, **options: Any) -> str:
        """Return the text that continues a prompt, the continuation only; see `stream` for the options."""
        return "".join(self.stream(prompt, **options))

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: its checkpoint had no vocab.json and merges.txt, and no tokenizer.json. "
                "Add them, or use stream_ids and logits, which work by token ids"
            )
        return self.tokenizer

    def _check_ids(self, given: Any, axes: int) -> np.ndarray:
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
        if ids.min() < 0 or ids.max() >= self.config.n_vocab:
            bad = ids[(ids < 0) | (ids >= self.config.n_vocab)][0]
            raise ValueError(f"token id {bad} is not in the vocabulary, which has ids 0 to {self.config.n_vocab - 1}")
        return ids.astype(np.int32)

    def _check_stop(self, stop: int | Iterable[int] | None) -> set[int]:
        if stop is None:
            return set()
        ids = list(stop) if isinstance(stop, Iterable) else [stop]
        for token in ids:
            if not _is_int(token):
                raise TypeError(f"stop names {token!r}; expected token ids")
            if not 0 <= token < self.config.n_vocab:
                raise ValueError(f"stop names {token}, which is not in the vocabulary of {self.config.n_vocab}")
        return set(ids)


def _check_params(params: Params, config: GPT2Config) -> None:
    """Refuse parameters of another model: one block too many or too few would compute something else in silence."""
    expected, found = shapes(config), dict(flatten(params))
    for verb, paths in (("lack", expected.keys() - found.keys()), ("hold", found.keys() - expected.keys())):
        if paths:
            raise ValueError(f"the parameters {verb} {', '.join(sorted(paths)[:3])}; config says {config}")
    for path, x in found.items():
        if (shape := backend_of(x).shape(x)) != expected[path]:
            raise ValueError(f"{path} has shape {list(shape)}; config makes it {list(expected[path])}")


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _until(tokens: Iterator[int], ends: set[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    decode = tokenizer.decoder()
    for token in tokens:
        yield decode(token)
    if rest := decode(None):
        yield rest
