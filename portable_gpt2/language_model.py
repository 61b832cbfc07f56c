"""GPT2: a configuration, its parameters on a backend, and a tokenizer; what most users hold."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, takewhile
from typing import Any, Literal, overload

import numpy as np

from . import checks
from .backend import Backend
from .cache import check_cache_size
from .checkpoint import cast, read_checkpoint, stored, write_checkpoint
from .checks import check_ids, check_length, check_room, check_stop, flag, integer, memory, several, shown
from .config import GPT2Config
from .generation.completion import Completion, Request, batched, complete
from .generation.decoder import Decoder, Generation, padded_length
from .generation.detokenizer import StreamingDetokenizer
from .generation.stop_strings import StopStrings
from .model import gpt2
from .params import Params, check_device, check_memory, check_params, flatten, nest, shapes
from .registry import backend_of, get_backend
from .sampling import Sampling
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
    source : str or None
        What it was loaded from, in a few words.
    companions : dict
        Files of the checkpoint that it was loaded from which other programs read, by name; `save` writes them again.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> len(list(model.stream_ids([1, 2, 3], max_new_tokens=4, seed=7)))
    4
    """

    def __init__(self, config: GPT2Config, params: Params, tokenizer: Tokenizer | None = None) -> None:
        check_params(params, config)
        check_device(params)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is {shown(tokenizer)}; expected a Tokenizer, such as Tokenizer.load gives")
        if tokenizer is not None and tokenizer.n_base > config.n_vocab:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_base} entries and the model {config.n_vocab}; without a tokenizer it "
                f"works by token ids"
            )
        backend = backend_of(params["wte"])
        with backend.on(backend.placement(params["wte"])):
            params = nest({path: backend.relayout(path, x) for path, x in flatten(params)})
        self._assemble(config, params, tokenizer)

    def _assemble(self, config: GPT2Config, params: Params, tokenizer: Tokenizer | None) -> None:
        """Set all attributes. The parameters have been checked, and have the backend's memory layout."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.source: str | None = None
        self.companions: Mapping[str, bytes] = {}
        self.backend: Backend = backend_of(params["wte"])
        self.device = self.backend.device(params["wte"])
        self._device = self.backend.resolve_device(self.backend.placement(params["wte"]))
        self._decoder = Decoder(self.backend, self.params, config, self._device)
        self._logits = self.backend.compile(lambda params, tokens: gpt2(params, tokens, config)[0], self.params)

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
        tokenizer: Tokenizer | Literal["auto"] | None = "auto",
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> GPT2:
        """Load a checkpoint.

        Parameters
        ----------
        source : path or str
            A directory in Hugging Face's layout (``config.json``; ``model.safetensors``, or several and their index, or
            ``pytorch_model.bin``), OpenAI's (``hparams.json``, ``model.ckpt``) or nanoGPT's (``ckpt.pt``), with the
            tokenizer's files for text; without them the model works by ids. Where there is none of this name, the small
            model ``shakespeare`` that is a part of this package, or a model of the hub: ``gpt2``, ``user/model`` or
            ``user/model@revision``.
        backend : str or Backend, optional
            What computes; the default backend (see `get_backend`) unless given.
        device : str or the framework's own device object, optional
            Where: ``cpu``, ``cuda``, ``cuda:1`` ...; the framework's default unless given.
        dtype : str, optional
            ``float32`` unless given; ``float64``, ``bfloat16`` or ``float16`` where the backend computes in them
            (NumPy stores 16 bits and computes in float32).
        tokenizer : Tokenizer, "auto" or None
            The tokenizer: the checkpoint's own unless given (``"auto"``), another one, or none (None): the model then
            works by token ids, whatever the checkpoint's own is. A tokenizer may have more tokens than the model if
            those were added to its vocabulary, such as ``[PAD]``; a text that has one of them is refused.
        progress : callable, optional
            Wraps the iterable of tensors that are loaded one by one, as tqdm does.

        Raises
        ------
        CheckpointError
            If the files are not those of a whole GPT-2. The message names the file and the tensor. If it is the
            tokenizer that cannot be used, the model can be loaded without it (``tokenizer=None``).
        BackendNotInstalled
            If the backend's framework is missing, or one that it takes to read the files. The message says what to
            install.
        ValueError
            If there is no such device or dtype, or a weight is beyond the dtype's range.
        TypeError
            If the backend would narrow the dtype in silence. The message names the switch that permits it.
        """
        owner = get_backend(backend, device)
        dtype = "float32" if dtype is None else dtype
        owner.dtype(dtype)
        found = read_checkpoint(source, tokenizer=tokenizer)
        tensors, params = found.tensors, dict[str, Any]()
        # One tensor at a time, and each is let go before the next is read. The largest first: what is in memory twice
        # for a moment is so while there is little else, and leaves room that the next ones fit into.
        order = sorted(tensors, key=lambda path: -math.prod(tensors[path].shape))
        with owner.on(owner.default_device):
            for path in progress(order):
                tensor = cast(path, tensors.pop(path), dtype)
                params[path] = owner.relayout(path, owner.from_numpy(tensor.read(), dtype))
        model = cls.__new__(cls)  # the constructor would convert the layout of all parameters at once
        model._assemble(found.config, nest({path: params[path] for path in shapes(found.config)}), found.tokenizer)
        model.source, model.companions = found.source, found.companions
        return model

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the model, and its tokenizer if it has one, as a checkpoint that `load` and transformers read.

        Files of transformers that stood next to a model which was loaded (``generation_config.json``, chat templates
        ...) are written again.

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
        directory = checks.path("directory", directory)
        tensors = {path: stored(x) for path, x in flatten(self.params)}
        write_checkpoint(directory, self.config, tensors, self.tokenizer, companions=self.companions, force=force)

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
        tokens = check_ids(token_ids, self.config, axes=2)
        _, seq = tokens.shape
        check_length(seq, self.config)
        padding = padded_length(seq, self.config.n_ctx) - seq if self.backend.compiles_per_shape else 0
        n_logits = len(tokens) * (seq + padding) * self.config.n_vocab
        check_memory(n_logits, self.params["wte"], f"logits of {len(tokens):,} x {seq} tokens")
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
            The same seed gives the same tokens on every backend; a random one unless given.
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
        prompt = check_ids(ids, self.config, axes=1).tolist()
        ends, strings = check_stop(stop, self.config)
        if strings:
            raise TypeError(f"stop names {strings[0]!r}; expected token ids (stream and generate take strings)")
        max_new_tokens = check_room([prompt], max_new_tokens, self.config, sliding)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        generated = self._decoder.stream([Generation(prompt, sampling)], max_new_tokens)
        return takewhile(lambda token: token not in ends, (generation.tokens[-1] for generation in generated))

    def stream(
        self,
        prompt: str,
        *,
        stop: str | int | Iterable[str | int] | None = None,
        allow_special: bool | Collection[str] = False,
        **options: Any,
    ) -> Iterator[str]:
        """Return an iterator over the text that continues a prompt, in pieces as they come.

        There is a piece for each token, empty while a character that is split over tokens is not whole, or while the
        text may be the beginning of a stop string. The text ends at ``<|endoftext|>`` or another of the
        configuration's ends (`GPT2Config.eos_token_id`), or before what ``stop`` names. An empty prompt starts from the
        configuration's bos_token_id, which is ``<|endoftext|>`` in GPT-2.

        Parameters
        ----------
        prompt : str
            What to continue.
        stop : str, int, or several of them, optional
            Strings, found across the borders of tokens too, and token ids that end the text and are not part of it.
        allow_special : bool or collection of str
            Which special tokens that the prompt spells are that one token and not text: none (False), all (True), or
            those of these names; see `Tokenizer.encode`.
        **options
            As for `stream_ids`.

        Raises
        ------
        TypeError, ValueError
            As for `stream_ids`; also if the model has no tokenizer, or the prompt is not valid text.
        """
        tokenizer = self._require_tokenizer()
        ids = self._prompt_ids(prompt, allow_special)
        ends, strings = check_stop(stop, self.config)
        generated = self.stream_ids(ids, stop=ends.union(self._end_of_text()), **options)
        return StreamingDetokenizer(tokenizer.decoder(), strings).pieces(generated)

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
        allow_special: bool | Collection[str] = False,
    ) -> Iterator[Completion]:
        """Return an iterator over what continues several prompts, computed several at a time.

        Each text is what the prompt alone would have given with the same seed: it depends neither on the other prompts
        nor on their order. Equal prompts therefore get equal texts if a seed is given; without one, each prompt gets a
        random seed of its own, which `Completion` has.

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
        tokenizer = self._require_tokenizer()
        num_samples, batch_size = integer("num_samples", num_samples, 1), integer("batch_size", batch_size, 1)
        prompts = several("prompts", prompts, "texts")
        ids = [self._prompt_ids(prompt, allow_special) for prompt in prompts]
        ends, strings = check_stop(stop, self.config)
        max_new_tokens = check_room(ids, max_new_tokens, self.config, sliding)
        options = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
        samplings = [Sampling(*options) for _ in prompts] or [Sampling(*options)]  # without a prompt, they are checked
        n_rows = min(batch_size, num_samples * len(prompts))
        check_cache_size(self.params, self.config, n_rows, max(map(len, ids), default=1))
        given = zip(prompts, ids, samplings, strict=False)
        requests = (Request(p, tokens, sampling, k) for p, tokens, sampling in given for k in range(num_samples))
        # Where the window slides, the longest text would cut the others: only those of one length go together.
        groups = groupby(requests, key=lambda request: len(request.ids) if sliding else 0)
        batches = (batch for _, group in groups for batch in batched(group, batch_size))
        ends.update(self._end_of_text())
        stops = StopStrings(strings)
        return chain.from_iterable(
            complete(self._decoder, tokenizer, batch, max_new_tokens, ends, stops) for batch in batches
        )

    @overload
    def generate(self, prompt: str, *, num_samples: None = None, **options: Any) -> str: ...

    @overload
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, num_samples: int | None = None, **options: Any
    ) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, num_samples: int | None = None, **options: Any
    ) -> str | list[str]:
        """Return the text that continues a prompt, the continuation only; of several prompts, a list.

        Parameters
        ----------
        prompt : str, or list or tuple of str
            What to continue.
        num_samples : int, optional
            How many continuations of each to draw. They come in a list, those of one prompt beside each other.
        **options
            As for `stream`; where there are several, as for `complete`.
        """
        if num_samples is None and isinstance(prompt, str):
            return "".join(self.stream(prompt, **options))
        if not isinstance(prompt, str | list | tuple):
            raise TypeError(f"prompt is {shown(prompt)}; expected a str, or a list of them")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        n = 1 if num_samples is None else integer("num_samples", num_samples, 1)
        memory(n * len(prompts) * sys.getsizeof(""), f"{n:,} continuations of {len(prompts):,} prompts")
        return [completion.text for completion in self.complete(prompts, num_samples=n, **options)]

    @overload
    def score(
        self, texts: str, *, stride: int | None = None, bos: bool = False, allow_special: bool | Collection[str] = False
    ) -> Score: ...

    @overload
    def score(
        self,
        texts: list[str],
        *,
        stride: int | None = None,
        bos: bool = False,
        allow_special: bool | Collection[str] = False,
    ) -> list[Score]: ...

    def score(
        self,
        texts: str | list[str],
        *,
        stride: int | None = None,
        bos: bool = False,
        allow_special: bool | Collection[str] = False,
    ) -> Score | list[Score]:
        """Return the log-probability of every token of a text given those before it; of several texts, a list.

        A text longer than n_ctx is read in windows, each of which scores what the one before it has not read: every
        token is conditioned on all tokens before it or, where the text is longer than n_ctx, on at least n_ctx - stride
        of them.

        Parameters
        ----------
        texts : str or list of str
            What to score.
        stride : int, optional
            How far apart windows start, from 1 to n_ctx - 1; n_ctx // 2 unless given. Less is slower, and gives each
            token more to go by.
        bos : bool
            Whether to put the configuration's bos_token_id before the text. In GPT-2 it is ``<|endoftext|>``, with
            which a document begins in its training data. Then the first token of the text is scored too; otherwise
            nothing comes before that token, and its log-probability is NaN.
        allow_special : bool or collection of str
            Which special tokens that the text spells, such as ``<|endoftext|>`` between documents, are that one token
            and not text: none (False), all (True), or those of these names; see `Tokenizer.encode`.

        Returns
        -------
        Score or list of Score

        Raises
        ------
        TypeError, ValueError
            If the model has no tokenizer, a text is not valid, or stride is not in its range.
        """
        given = [texts] if isinstance(texts, str) else several("texts", texts, "a text, or several")
        encoded = [self._encode(text, allow_special) for text in given]
        scores = [self.score_ids(ids, stride=stride, bos=bos) for ids in encoded]
        return scores[0] if isinstance(texts, str) else scores

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
        stride = integer("stride", stride, 1, n_ctx - 1, note="the largest is n_ctx - 1")
        tokens = check_ids(ids, self.config, axes=1, may_be_empty=True).tolist()
        start = [self._start("bos was asked for")] if flag("bos", bos) else []

        def logits_of(window: list[int]) -> np.ndarray:
            rows: np.ndarray = self.backend.to_numpy(self.logits([window]))[0]
            return rows

        lengths = [0 if self.tokenizer is None else len(self.tokenizer.token_bytes(token)) for token in tokens]
        found = log_probs(logits_of, start + tokens, n_ctx, stride)[len(start) :]
        return Score(tokens, found, sum(n for n, p in zip(lengths, found, strict=True) if not np.isnan(p)))

    def trace(self, text: str | Sequence[int], *, allow_special: bool | Collection[str] = False) -> dict[str, Any]:
        """Return what the model computes on the way to its logits, by scope path.

        Parameters
        ----------
        text : str or ints
            A text, or token ids [seq].
        allow_special : bool or collection of str
            Which special tokens that the text spells are that one token; as for `score`.

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
        ids = self._encode(text, allow_special) if isinstance(text, str) else text
        tokens = check_ids(ids, self.config, axes=1)[None]
        check_length(tokens.shape[1], self.config)
        found: dict[str, Any] = {}
        with self.backend.on(self._device):
            tokens = self.backend.from_numpy(tokens, device=self._device)
            gpt2(self.params, tokens, self.config, observe=found.__setitem__)
        return found

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: its checkpoint had no vocab.json and merges.txt, and no tokenizer.json, "
                "or it was loaded without. Add them, or use stream_ids and logits, which work by token ids"
            )
        return self.tokenizer

    def _encode(self, text: str, allow_special: bool | Collection[str]) -> list[int]:
        """Return the ids of a text; refuse tokens that were added to the tokenizer and not to the model."""
        tokenizer = self._require_tokenizer()
        ids = tokenizer.encode(text, allow_special=allow_special)
        if (largest := max(ids, default=0)) >= self.config.n_vocab:
            raise ValueError(
                f"the text holds {tokenizer.decode([largest])!r}, whose id is {largest}: it was added to the tokenizer "
                f"and not to the model, which has a vocabulary of {self.config.n_vocab}"
            )
        return ids

    def _end_of_text(self) -> list[int]:
        """Return the ids that end a text: the tokenizer's ``<|endoftext|>``, and the configuration's."""
        known = None if self.tokenizer is None else self.tokenizer.end_of_text
        ends = (known, *self.config.ends)
        return list(dict.fromkeys(end for end in ends if end is not None and end < self.config.n_vocab))

    def _start(self, why: str) -> int:
        """Return the id that a text starts from where nothing comes before it."""
        for start in (self.config.start, *self._end_of_text()):
            if start is not None:
                return start
        raise ValueError(f"{why}, and the vocabulary has no <|endoftext|> to start from")

    def _prompt_ids(self, prompt: str, allow_special: bool | Collection[str]) -> list[int]:
        ids = self._encode(prompt, allow_special) or [self._start("the prompt is empty")]
        return check_ids(ids, self.config, axes=1).tolist()  # type: ignore[no-any-return]
