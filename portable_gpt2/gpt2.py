"""GPT2: a configuration, its parameters on a backend, and a tokenizer; what most users hold."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, overload

import numpy as np

from .backend import Backend, backend_of, get_backend
from .checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from .completion import Completion, Reader
from .config import GPT2Config
from .generate import Decoder, Text, padded_length
from .model import gpt2
from .params import Params, flatten, nest, shapes
from .sampling import check_options
from .score import Score, log_probs
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
        source : path
            A directory in Hugging Face's layout: ``config.json``, ``model.safetensors`` and, for text, the tokenizer's
            ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``. Without them the model works by ids.
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
            If the backend's framework is missing. The message says what to install.
        ValueError
            If there is no such device or dtype.
        """
        owner = get_backend(backend, device)
        dtype = "float32" if dtype is None else dtype
        owner.dtype(dtype)
        config, tensors = read_checkpoint(source)
        try:
            tokenizer = Tokenizer.load(source)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if tokenizer is not None and len(tokenizer) > config.n_vocab:
            raise CheckpointError(
                f"{os.fspath(source)}: the tokenizer has {len(tokenizer)} entries and the model {config.n_vocab}"
            )
        with owner.on(owner.default_device):  # one tensor at a time: each is let go before the next is read
            params = {p: owner.prepare(p, owner.from_numpy(tensors.pop(p), dtype)) for p in progress(list(tensors))}
        return cls(config, nest(params), tokenizer)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the model, and its tokenizer if it has one, as a checkpoint that `load` and transformers read.

        Raises
        ------
        FileExistsError
            If the directory exists and is not empty. Nothing is written.
        """
        tensors = {path: self.backend.to_numpy(x) for path, x in flatten(self.params)}
        write_checkpoint(directory, self.config, tensors, self.tokenizer and self.tokenizer.save)

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
        self._check_length(seq)
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
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: int | Iterable[int] | None = None,
        sliding: bool = False,
    ) -> Iterator[int]:
        """Return an iterator over the token ids that continue some token ids, as they are drawn.

        Parameters
        ----------
        ids : int [seq]
            The prompt: a list or an array, of at least one id.
        max_new_tokens : int
            How many to draw at most. Prompt and continuation fit into n_ctx together, unless sliding.
        temperature, top_k, top_p, min_p, repetition_penalty
            See `sampling.sample`: temperature 0 is greedy; 0 or None switch top_k off, None top_p and min_p, 1 the
            penalty.
        seed : int, optional
            The same seed draws the same tokens on every backend. One is drawn unless given.
        stop : int or ints, optional
            Token ids that end the continuation, and are not part of it.
        sliding : bool
            Where the text fills n_ctx, go on from its last n_ctx // 2 tokens, which are read anew; else refuse what
            would come to that.

        Raises
        ------
        TypeError
            If the ids are not integers.
        ValueError
            If an id is not in the vocabulary, an option makes no sense, or the whole would not fit into n_ctx.
            All is checked at the call, before anything is computed.
        """
        prompt = self._check_ids(ids, axes=1).tolist()
        ends, strings = self._check_stop(stop)
        if strings:
            raise TypeError(f"stop names {strings[0]!r}; expected token ids (stream and generate take strings)")
        self._check_room([prompt], max_new_tokens, sliding)
        options = _drawing(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        drawn = self._decoder.stream([Text(prompt)], max_new_tokens, **options)
        return _until((text.tokens[-1] for text in drawn), ends)

    def stream(
        self,
        prompt: str,
        *,
        stop: str | int | Iterable[str | int] | None = None,
        allow_special: bool = False,
        **options: Any,
    ) -> Iterator[str]:
        """Return an iterator over the text that continues a prompt, in pieces as they come.

        There is a piece for each token, empty while a character that is split over tokens is not whole, or while the
        text may be the beginning of a stop string. The text ends at ``<|endoftext|>``, or before what ``stop`` names.
        An empty prompt starts from ``<|endoftext|>``.

        Parameters
        ----------
        prompt : str
            What to continue.
        stop : str, int, or several of them, optional
            Strings, found across the borders of tokens too, and token ids that end the text and are not part of it.
        allow_special : bool
            Whether ``<|endoftext|>`` in the prompt is the special token; text otherwise.
        **options
            As for `stream_ids`.

        Raises
        ------
        TypeError, ValueError
            As for `stream_ids`; also if the model has no tokenizer, or the prompt is not valid text.
        """
        tokenizer = self._require_tokenizer()
        ids = self._prompt_ids(prompt, allow_special)
        ends, strings = self._check_stop(stop)
        drawn = self.stream_ids(ids, stop=ends | self._end_of_text(), **options)
        return _pieces(Reader(tokenizer.decoder(), strings), drawn)

    def complete(
        self,
        prompts: Iterable[str],
        *,
        num_samples: int = 1,
        batch_size: int = 8,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 40,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | int | Iterable[str | int] | None = None,
        sliding: bool = False,
        allow_special: bool = False,
    ) -> Iterator[Completion]:
        """Return an iterator over what continues several prompts, computed several at a time.

        Each text is what the prompt alone would have given with the same seed: it depends neither on the other prompts
        nor on their order.

        Parameters
        ----------
        prompts : strs
            What to continue, of any lengths.
        num_samples : int
            How many continuations of each to draw. The first is the one that `generate` draws.
        batch_size : int
            How many texts to compute at a time.
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, sliding
            As for `stream_ids`.
        stop, allow_special
            As for `stream`.

        Returns
        -------
        iterator of Completion
            In the order of the prompts, and of the samples of each.

        Raises
        ------
        TypeError, ValueError
            As for `stream`. All prompts are checked at the call, before anything is computed.
        """
        self._require_tokenizer()
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the text {prompts[:40]!r}; expected several, such as a list of one")
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an int of at least 1")
        prompts = list(prompts)
        ids = [self._prompt_ids(prompt, allow_special) for prompt in prompts]
        ends, strings = self._check_stop(stop)
        self._check_room(ids, max_new_tokens, sliding)
        options = _drawing(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rows = [(p, t, k) for p, t in zip(prompts, ids, strict=True) for k in range(num_samples)]
        # Where the window slides, the longest text would cut the others: only those of one length go together.
        groups = groupby(rows, key=lambda row: len(row[1]) if sliding else 0)
        batches = [batch for _, group in groups for batch in _batched(list(group), batch_size)]
        return chain.from_iterable(
            self._complete(batch, max_new_tokens, ends | self._end_of_text(), strings, options) for batch in batches
        )

    def _complete(
        self,
        rows: list[tuple[str, list[int], int]],
        max_new_tokens: int,
        ends: set[int],
        stops: list[str],
        options: Any,
    ) -> Iterator[Completion]:
        tokenizer = self._require_tokenizer()
        texts = [Text(list(ids), index) for _, ids, index in rows]
        written = {text: (Reader(tokenizer.decoder(), stops), []) for text in texts}
        for text in self._decoder.stream(texts, max_new_tokens, **options):
            reader, pieces = written[text]
            if text.tokens[-1] in ends:
                text.tokens.pop()
                text.ended = True
            else:
                pieces.append(reader.read(text.tokens[-1]))
                text.ended = reader.ended
        for text, (prompt, ids, index) in zip(texts, rows, strict=True):
            reader, pieces = written[text]
            rest = "" if reader.ended else reader.read(None)
            reason = "stop" if text.ended or reader.ended else "length"
            yield Completion(prompt, "".join(pieces) + rest, text.tokens[len(ids) :], index, reason)

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[str]: ...

    def generate(self, prompt: str | list[str], **options: Any) -> str | list[str]:
        """Return the text that continues a prompt, the continuation only; of a list of prompts, a list.

        The options are those of `complete`, which draws several samples of each prompt as well; `stream` gives the text
        as it comes.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, **options))
        return [completion.text for completion in self.complete(prompt, **options)]

    def score(self, texts: str | Iterable[str], *, stride: int | None = None, bos: bool = False) -> Score | list[Score]:
        """Return the log-probability of every token of a text given those before it; of several texts, a list.

        A text longer than n_ctx is read in windows, each of which scores what the one before it has not read: every
        token is conditioned on all tokens before it or, where the text is longer than n_ctx, on at least n_ctx - stride
        of them.

        Parameters
        ----------
        texts : str or strs
            What to score.
        stride : int, optional
            How far apart windows start, from 1 to n_ctx - 1; n_ctx // 2 unless given. Less is slower, and gives each
            token more to go by.
        bos : bool
            Whether to put ``<|endoftext|>`` before the text, which is how a document begins in GPT-2's training data.
            Then its first token is scored too; otherwise nothing comes before it, and its log-probability is NaN.

        Returns
        -------
        Score or list of Score

        Raises
        ------
        TypeError, ValueError
            If the model has no tokenizer, a text is not valid, or stride is not in its range.
        """
        tokenizer = self._require_tokenizer()
        if isinstance(texts, str):
            return self.score_ids(tokenizer.encode(texts), stride=stride, bos=bos)
        return [self.score_ids(tokenizer.encode(text), stride=stride, bos=bos) for text in texts]

    def score_ids(self, ids: Any, *, stride: int | None = None, bos: bool = False) -> Score:
        """Return the log-probability of each of some token ids given those before it: `score` without a tokenizer.

        Parameters
        ----------
        ids : int [seq]
            A list or an array.
        stride, bos
            As for `score`.
        """
        n_ctx = self.config.n_ctx
        stride = n_ctx // 2 if stride is None else stride
        if not _is_int(stride) or not 1 <= stride < n_ctx:
            raise ValueError(f"stride is {stride!r}; expected an int from 1 to n_ctx - 1 = {n_ctx - 1}")
        tokens = [] if isinstance(ids, list) and not ids else self._check_ids(ids, axes=1).tolist()
        start = [self._start()] if bos else []

        def logits_of(window: list[int]) -> np.ndarray:
            return self.backend.to_numpy(self.logits([window]))[0]

        found = log_probs(logits_of, start + tokens, n_ctx, stride)[len(start) :]
        scored = (token for token, p in zip(tokens, found, strict=True) if not np.isnan(p))
        n_bytes = 0 if self.tokenizer is None else sum(len(self.tokenizer.token_bytes(token)) for token in scored)
        return Score(tokens, found, n_bytes)

    def trace(self, text: str | Sequence[int]) -> dict[str, Any]:
        """Return what the model computes on the way to its logits, by scope path.

        Parameters
        ----------
        text : str or ints
            A text, or token ids [seq].

        Returns
        -------
        dict of float arrays
            Of the model's backend, on its device, in the order of computation; [1, seq, n_embd] unless said otherwise:
            ``embedding``, then for each layer ``h3/attn/weights`` [1, n_head, seq, seq], how much each position (row)
            looks at each (column), and ``h3/residual``, the stream that leaves it; ``ln_f``; ``logits`` [1, seq,
            n_vocab].

        Raises
        ------
        TypeError, ValueError
            As for `logits`.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
        >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
        >>> {name: x.shape for name, x in model.trace([1, 2, 3]).items()}["h0/attn/weights"]
        (1, 2, 3, 3)
        """
        ids = self._require_tokenizer().encode(text) if isinstance(text, str) else text
        tokens = self._check_ids(ids, axes=1)[None]
        self._check_length(tokens.shape[1])
        found: dict[str, Any] = {}
        with self.backend.on(self._device):
            tokens = self.backend.from_numpy(tokens, device=self._device)
            gpt2(self.params, tokens, self.config, observe=found.__setitem__)
        return found

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: its checkpoint had no vocab.json and merges.txt, and no tokenizer.json. "
                "Add them, or use stream_ids and logits, which work by token ids"
            )
        return self.tokenizer

    def _end_of_text(self) -> set[int]:
        """Return the id of ``<|endoftext|>``, if there is one: the tokenizer's, or else the configuration's."""
        known = None if self.tokenizer is None else self.tokenizer.end_of_text
        end = self.config.eos_token_id if known is None else known
        return set() if end is None else {end}

    def _start(self) -> int:
        """Return the id that a text starts from where nothing comes before it."""
        for end in self._end_of_text():
            return end
        raise ValueError("the vocabulary has no <|endoftext|> to start from; give a text that is not empty")

    def _prompt_ids(self, prompt: str, allow_special: bool) -> list[int]:
        return self._require_tokenizer().encode(prompt, allow_special=allow_special) or [self._start()]

    def _check_length(self, seq: int) -> None:
        if seq > self.config.n_ctx:
            raise ValueError(f"{seq} tokens were given; the model has n_ctx = {self.config.n_ctx} positions")

    def _check_room(self, prompts: list[list[int]], max_new_tokens: int, sliding: bool) -> None:
        """Refuse prompts that do not fit into the context together with what is to be drawn."""
        n_ctx = self.config.n_ctx
        if not _is_int(max_new_tokens) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected an int of at least 0")
        if sliding:
            if n_ctx < 2:
                raise ValueError("sliding needs a context of two tokens at least; the model has n_ctx = 1")
            return
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > n_ctx:
            room = n_ctx - longest
            advice = f"give at most {room}" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} do not fit into "
                f"n_ctx = {n_ctx}: {advice}, or let the window slide (sliding=True)"
            )

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

    def _check_stop(self, stop: str | int | Iterable[str | int] | None) -> tuple[set[int], list[str]]:
        """Return the token ids and the strings that end a text."""
        ends: set[int] = set()
        strings: list[str] = []
        given = [] if stop is None else [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else stop
        for each in given:
            if isinstance(each, str):
                if not each:
                    raise ValueError("stop names an empty string, which every text begins with")
                strings.append(each)
            elif not _is_int(each):
                raise TypeError(f"stop names {each!r}; expected token ids or strings")
            elif not 0 <= each < self.config.n_vocab:
                raise ValueError(f"stop names {each}, which is not in the vocabulary of {self.config.n_vocab}")
            else:
                ends.add(int(each))
        return ends, strings


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


def _pieces(reader: Reader, tokens: Iterator[int]) -> Iterator[str]:
    for token in tokens:
        yield reader.read(token)
        if reader.ended:
            return
    if rest := reader.read(None):
        yield rest


def _batched(rows: list[Any], n: int) -> Iterator[list[Any]]:
    return (rows[i : i + n] for i in range(0, len(rows), n))


def _drawing(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, repetition_penalty: Any, seed: int | None
) -> dict[str, Any]:
    """Return the options of `sampling.sample`, checked, with a seed."""
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
