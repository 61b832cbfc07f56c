"""GPT2: a language model, which is a configuration, parameters on a backend, and a tokenizer."""

from __future__ import annotations

import fnmatch
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, takewhile
from typing import Any, Literal, TypeAlias, Unpack, overload

import numpy as np

from . import checks
from .backend import Backend
from .cache import check_cache_size
from .checkpoint import cast, read_checkpoint, stored, write_checkpoint
from .config import GPT2Config
from .correct_rounding import mode
from .export import export
from .fingerprint import N_TOKENS, TEXT, Fingerprint, hash_of_logits, hash_of_weights
from .generation.completion import Completion, Piece, Request, batched, complete
from .generation.decoder import Decoder, Generation, padded_length
from .generation.detokenizer import StreamingDetokenizer
from .generation.mesh_decoder import MeshDecoder
from .generation.stop_strings import StopStrings
from .host import StoredTensor
from .mesh import DATA, Mesh
from .model import gpt2, observed_names
from .params import Params, check_device, check_memory, check_params, flatten, nest, shapes
from .registry import backend_of, get_backend
from .sampling import Sampling, SamplingOptions
from .score import Score, Scored, from_logits, score_tokens
from .tokenizer import Tokenizer

Stop: TypeAlias = str | int | Iterable[str | int] | None
AllowSpecial: TypeAlias = bool | Collection[str]


class GenerationOptions(SamplingOptions, total=False):
    """The options of `GPT2.generate`, of `GPT2.stream` and of `GPT2.complete`: those of `Sampling`, and these.

    =================  =========  ======================================================================================
    option             default    meaning
    =================  =========  ======================================================================================
    max_new_tokens     100        Sample at most this many tokens. Unless sliding is true, prompt and new tokens must
                                  fit into n_ctx.
    stop               None       A string or a token id, or several of them, that end the text and are not part of it.
                                  A string may be spread over several tokens.
    sliding            False      Whether to continue a text that fills n_ctx from its last n_ctx // 2 tokens.
    allow_special      False      Which special tokens, such as ``<|endoftext|>``, are recognized in a prompt: none
                                  (False), all (True), or those in a collection. The others are read as plain text.
    =================  =========  ======================================================================================
    """

    max_new_tokens: int
    stop: Stop
    sliding: bool
    allow_special: AllowSpecial


class GPT2:
    """A GPT-2 language model on one backend and one device.

    Parameters
    ----------
    config : GPT2Config
        The model's shape.
    params : dict
        Its parameters, as `init_params` returns them: arrays of one backend on one device.
    tokenizer : Tokenizer, optional
        Without a tokenizer, the methods that take or return text raise an error, and those that take token ids work.
    reproducible : bool
        Whether every op is correctly rounded, so that the model computes the same bits on every backend, device and
        processor, and for every batch (see `reproducible`). The parameters must be float32.

    Raises
    ------
    ValueError
        If a parameter is missing, is not one of the configuration's, or has another shape than the configuration says;
        if reproducible is true and the parameters have another dtype than float32.
    TypeError
        If reproducible is true and the backend has no float64.

    Attributes
    ----------
    config, params, tokenizer, reproducible
        As given, except that the backend may have changed the memory layout of the parameters.
    backend : Backend
        The backend of the parameters, which runs the model.
    device : str
        The device of the parameters.
    mesh : Mesh or None
        The mesh of devices that the model was loaded on.
    source : str or None
        A short description of the files that the model was loaded from.
    companions : dict
        The contents, by file name, of other files of the checkpoint, such as chat templates. `save` writes them again.

    Examples
    --------
    >>> import portable_gpt2 as pg
    >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
    >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
    >>> len(list(model.stream_ids([1, 2, 3], max_new_tokens=4, seed=7)))
    4
    """

    def __init__(
        self,
        config: GPT2Config,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        reproducible: bool = False,
    ) -> None:
        check_params(params, config)
        check_device(params)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is {checks.shown(tokenizer)}; expected a Tokenizer (Tokenizer.load reads one)")
        if tokenizer is not None and tokenizer.n_base > config.n_vocab:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_base} entries and the model {config.n_vocab}; without a tokenizer the "
                f"model works with token ids"
            )
        backend = backend_of(params["wte"])
        prepared = {path: backend.relayout(path, x) for path, x in flatten(params)}
        self._assemble(config, nest(prepared), tokenizer, reproducible)

    def _assemble(
        self,
        config: GPT2Config,
        params: Params,
        tokenizer: Tokenizer | None,
        reproducible: bool,
        mesh: Mesh | None = None,
    ) -> None:
        """Set all attributes. The parameters have been checked, and have the backend's memory layout."""
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.source: str | None = None
        self.companions: Mapping[str, bytes] = {}
        self.backend: Backend = backend_of(params["wte"])
        self._traced: dict[tuple[str, ...], Callable[..., dict[str, Any]]] = {}  # by the names that are kept
        if mesh is not None:
            self.device, self.reproducible = f"the mesh {mesh}", False
            self._decoder: Decoder = MeshDecoder(mesh, params, config)
            return
        self.device = self.backend.device(params["wte"])
        self._device = self.backend.resolve_device(self.backend.placement(params["wte"]))
        self.reproducible = checks.flag("reproducible", reproducible)
        self._compile = mode.compiler(self.backend, self.params) if reproducible else self.backend.compile
        self._decoder = Decoder(
            self.backend, self.params, config, self._device, compile=self._compile, reproducible=reproducible
        )
        self._logits = self._compile(lambda params, tokens: gpt2(params, tokens, config)[0], self.params)

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
        reproducible: bool = False,
        mesh: Any = None,
        tokenizer: Tokenizer | Literal["auto"] | None = "auto",
        progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    ) -> GPT2:
        """Load a checkpoint.

        Parameters
        ----------
        source : path or str
            A directory, or the name of a model: ``shakespeare``, a small model that comes with this package, or a model
            of the Hugging Face hub (``gpt2``, ``user/model``, ``user/model@revision``). A directory of the same name is
            preferred. A directory has Hugging Face's layout (``config.json`` with ``model.safetensors``, with several
            such files and their index, or with ``pytorch_model.bin``), OpenAI's (``hparams.json`` with ``model.ckpt``)
            or nanoGPT's (``ckpt.pt``). The methods that take text also need the tokenizer's files. A GGUF file of
            llama.cpp (``.gguf``) contains everything.
        backend : str or Backend, optional
            The backend that runs the model; the default backend (see `get_backend`) unless given.
        device : str or the framework's own device object, optional
            ``cpu``, ``cuda``, ``cuda:1`` ...; the framework's default device unless given.
        dtype : str, optional
            ``float32`` unless given; ``float64``, ``bfloat16`` or ``float16`` if the backend supports them (NumPy
            stores 16 bits and computes in float32).
        reproducible : bool
            Whether every op is correctly rounded, so that the model computes the same bits on every backend, device and
            processor, and for every batch (see `reproducible`). The dtype is then float32.
        mesh : dict or the framework's own mesh, optional
            Several devices that compute the model together, on JAX or PyTorch: the sizes of the axes, such as
            ``{"data": 2, "model": 2}``, a ``jax.sharding.Mesh`` or a ``DeviceMesh``. On PyTorch there is a process for
            each device, as ``torchrun`` starts them, and each calls the same methods. Each process reads its own part
            of the weights.
        tokenizer : Tokenizer, "auto" or None
            The checkpoint's own tokenizer (``"auto"``), another tokenizer, or none. A tokenizer may have tokens, such
            as ``[PAD]``, that were added to it and not to the model; a text that contains one of them is refused.
        progress : callable, optional
            Wraps the iterable of the tensors' paths while they are loaded, as tqdm does.

        Raises
        ------
        CheckpointError
            If the files are not those of a complete GPT-2. The message names the file and the tensor. If only the
            tokenizer cannot be used, the model can be loaded without it (``tokenizer=None``).
        BackendNotInstalled
            If the framework of the backend, or the one that reads the files, is not installed. The message says what to
            install.
        ValueError
            If there is no such device or dtype, a weight is outside the range of the dtype, or reproducible is true and
            dtype is not float32 or a mesh is given; if there are not as many devices as the mesh needs, or the model
            cannot be divided over them.
        TypeError
            If reproducible is true and the backend has no float64, or if the framework would silently convert the dtype
            to a narrower one. The message names the setting that changes this.
        """
        owner = get_backend(backend, device)
        dtype = "float32" if dtype is None else dtype
        owner.dtype(dtype)
        if checks.flag("reproducible", reproducible):
            mode.check(owner, dtype)
            if mesh is not None:
                raise ValueError("reproducible is true, and the mode runs on one device; leave out the mesh")
        if mesh is not None and device is not None:
            raise ValueError(
                f"device is {checks.shown(device)}, and a mesh has devices of its own; leave out one of the two"
            )
        devices = mesh if mesh is None or isinstance(mesh, Mesh) else Mesh(owner, mesh)
        found = read_checkpoint(source, tokenizer=tokenizer)
        if devices is not None:
            devices.check(found.config)
        tensors, params = found.tensors, dict[str, Any]()
        # A tensor is in memory twice while it is copied to the backend. The largest tensors are loaded first, when
        # little else is in memory; the smaller ones fit into the memory that is freed afterwards.
        order = sorted(tensors, key=lambda path: -math.prod(tensors[path].shape))
        for path in progress(order):
            tensor = cast(path, tensors.pop(path), dtype)
            if devices is None:
                params[path] = owner.relayout(path, owner.from_numpy(tensor.read(), dtype))
            else:
                params[path] = devices.place(path, tensor)
        model = cls.__new__(cls)  # the constructor would convert the layout of all parameters at once
        ordered = nest({path: params[path] for path in shapes(found.config)})
        model._assemble(found.config, ordered, found.tokenizer, reproducible, devices)
        model.source, model.companions = found.source, found.companions
        return model

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the model, and its tokenizer if it has one, as a checkpoint that `load` and transformers read.

        The files in `companions` (``generation_config.json``, chat templates ...) are written, too. On a mesh, all
        processes call this method: they gather one tensor after the other, and process 0 writes it. The files are those
        of a model on one device.

        Parameters
        ----------
        directory : path
            The directory. It appears complete or not at all.
        force : bool
            Whether to replace a checkpoint, or the model of a training run, in the directory. Documents such as
            ``README.md`` and the state of training stay; a directory with any other file is not replaced.

        Raises
        ------
        FileExistsError
            If the directory exists and force is false. Nothing is written.
        MeshError
            On a mesh, in the other processes, if process 0 cannot write. The message says why.
        """
        directory = checks.path("directory", directory)

        def write(tensors: Mapping[str, StoredTensor]) -> None:
            write_checkpoint(directory, self.config, tensors, self.tokenizer, companions=self.companions, force=force)

        found = dict(flatten(self.params))
        if self.mesh is None:
            write({path: stored(x) for path, x in found.items()})
            return
        mesh = self.mesh
        tensors = {path: mesh.stored(path, found[path], shape) for path, shape in shapes(self.config).items()}
        mesh.write(tensors, write)

    def _require_one_device(self, what: str) -> None:
        if self.mesh is not None:
            raise ValueError(f"{what} needs a model on one device; load the model again, without a mesh")

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        what: Literal["logits", "step"] = "logits",
        dtype: str | None = None,
        external_data: bool = False,
        force: bool = False,
    ) -> None:
        """Write the model as a graph of ONNX, which runs without Python and without this package.

        The graph takes ``tokens``, int64 [batch, seq], of any batch and length. The parameters are in the graph under
        their paths, such as ``h0/attn/c_attn/w``. As in `gpt2`, a token id that is out of range makes logits NaN.

        Parameters
        ----------
        path : path
            The file, such as ``gpt2.onnx``. It appears complete or not at all.
        what : str
            ``logits``: the graph returns ``logits`` [batch, seq, n_vocab]. ``step``: the graph also takes the state of
            a cache, which is ``position``, int64 [], and for each layer ``h0/attn/k`` and ``h0/attn/v``, [batch,
            n_head, capacity, head_size]. It returns ``logits`` [batch, n_vocab] after the last token, and the new state
            in the same order, with ``next/`` in front of each name. The first state has zeros.
        dtype : str, optional
            ``float32``, ``float64`` or ``float16``; the dtype of the parameters unless given. A graph in float16
            computes each op in float32 and rounds its result.
        external_data : bool
            Whether the weights are in a file of their own, ``gpt2.onnx.data``, which must stay next to the graph. This
            is always so for more than 2 GB.
        force : bool
            Whether to replace files that exist.

        Raises
        ------
        BackendNotInstalled
            If ndonnx is not installed. The message says what to install.
        FileExistsError
            If the file exists and force is false. Nothing is written.
        ValueError
            If the suffix of the file, what or dtype is not known, or a weight is outside the range of the dtype.
        """
        file = checks.path("path", path)
        self._require_one_device("export")
        tensors = {path: stored(x) for path, x in flatten(self.params)}
        export(file, self.config, tensors, what=what, dtype=dtype, external_data=external_data, force=force)

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
            If the ids do not have two axes, an id is not in the vocabulary, or a row has more than n_ctx ids.
        """
        tokens = checks.token_ids("token ids", token_ids, self.config.n_vocab, axes=2)
        _, seq = tokens.shape
        checks.positions(seq, self.config.n_ctx)
        if isinstance(self._decoder, MeshDecoder):
            return self._decoder.logits(tokens)
        padding = padded_length(seq, self.config.n_ctx) - seq if self.backend.compiles_per_shape else 0
        n_logits = len(tokens) * (seq + padding) * self.config.n_vocab
        check_memory(n_logits, self.params["wte"], f"logits of {len(tokens):,} x {seq} tokens")
        padded = np.pad(tokens, ((0, 0), (0, padding)))  # attention is causal: no token sees the padding after it
        logits = self._logits(self.backend.from_numpy(padded, device=self._device))
        return self.backend.xp.take(logits, self.backend.arange(seq, like=logits), axis=1) if padding else logits

    def stream_ids(
        self,
        ids: Any,
        *,
        max_new_tokens: int = 100,
        stop: int | Iterable[int] | None = None,
        sliding: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[int]:
        """Return an iterator over token ids that continue a prompt, which yields each id as soon as it is sampled.

        Parameters
        ----------
        ids : int [seq]
            The prompt: a list or an array of at least one token id.
        max_new_tokens, stop, sliding
            See `GenerationOptions`. Here stop names token ids only.
        **options
            See `Sampling`.

        Raises
        ------
        TypeError
            If the ids are not integers, or there is no such option.
        ValueError
            If an id is not in the vocabulary, an option is not valid, or the text would not fit into n_ctx. Everything
            is checked at the call, before the model runs.
        """
        prompt = checks.token_ids("token ids", ids, self.config.n_vocab).tolist()
        ends, strings = checks.stops(stop, self.config.n_vocab)
        if strings:
            raise TypeError(f"stop names {strings[0]!r}; expected token ids (stream and generate take strings)")
        max_new_tokens = checks.new_tokens(max_new_tokens, sliding, [prompt], self.config.n_ctx)
        [sampling] = self._samplings(1, options)
        generated = self._decoder.stream([Generation(prompt, sampling)], max_new_tokens, ends)
        return takewhile(lambda token: token not in ends, (generation.tokens[-1] for generation in generated))

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 100,
        stop: Stop = None,
        sliding: bool = False,
        allow_special: AllowSpecial = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Return an iterator over the pieces of the text that continues a prompt.

        It yields a piece for each token. The piece is empty while a character that is spread over several tokens is not
        complete, and while the text may be the beginning of a stop string. The text ends at ``<|endoftext|>``, at
        another id of `GPT2Config.eos_token_id`, or before a stop string or a stop token.

        Parameters
        ----------
        prompt : str
            The text to continue. An empty prompt starts from the configuration's bos_token_id (in GPT-2,
            ``<|endoftext|>``).
        max_new_tokens, stop, sliding, allow_special
            See `GenerationOptions`.
        **options
            See `Sampling`.

        Raises
        ------
        TypeError, ValueError
            As for `stream_ids`; also if the model has no tokenizer, or the prompt is not valid text.
        """
        tokenizer = self._require_tokenizer()
        ids = self._prompt_ids(prompt, allow_special)
        ends, strings = checks.stops(stop, self.config.n_vocab)
        ends.update(self._end_of_text())
        tokens = self.stream_ids(ids, max_new_tokens=max_new_tokens, stop=ends, sliding=sliding, **options)
        return StreamingDetokenizer(tokenizer.decoder(), strings).pieces(tokens)

    def complete(
        self,
        prompts: Iterable[str],
        *,
        num_samples: int = 1,
        batch_size: int = 8,
        max_new_tokens: int = 100,
        stop: Stop = None,
        sliding: bool = False,
        allow_special: AllowSpecial = False,
        on_piece: Callable[[Piece], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Completion]:
        """Return an iterator over the continuations of several prompts, which are computed in batches.

        The continuation of a prompt does not depend on the other prompts: it is the one that the same seed gives for
        that prompt alone. Without a seed, each prompt gets a random seed, which is an attribute of its `Completion`.

        Parameters
        ----------
        prompts : strs
            The texts to continue, of any lengths.
        num_samples : int
            Number of continuations of each prompt. The first is the one that `generate` returns.
        batch_size : int
            Number of texts in a batch.
        max_new_tokens, stop, sliding, allow_special
            See `GenerationOptions`.
        on_piece : callable, optional
            Called with a `generation.completion.Piece` for each token as soon as it is sampled: the numbers of the
            prompt and of the sample, the token id and the text.
        **options
            See `Sampling`.

        Returns
        -------
        iterator of Completion
            In the order of the prompts, and for each prompt in the order of its samples.

        Raises
        ------
        TypeError, ValueError
            As for `stream`. All prompts are checked at the call, before the model runs.
        """
        tokenizer = self._require_tokenizer()
        num_samples = checks.integer("num_samples", num_samples, 1)
        batch_size = checks.integer("batch_size", batch_size, 1)
        prompts = checks.several("prompts", prompts, "texts")
        ids = [self._prompt_ids(prompt, allow_special) for prompt in prompts]
        ends, strings = checks.stops(stop, self.config.n_vocab)
        ends.update(self._end_of_text())
        max_new_tokens = checks.new_tokens(max_new_tokens, sliding, ids, self.config.n_ctx)
        samplings = self._samplings(max(len(prompts), 1), options)  # one checks the options even without a prompt
        n_rows = min(batch_size, num_samples * len(prompts))
        check_cache_size(self.params, self.config, n_rows, max(map(len, ids), default=1))
        given = zip(range(len(prompts)), prompts, ids, samplings, strict=False)
        requests = (Request(*each, sample) for each in given for sample in range(num_samples))
        # With sliding, a batch has prompts of one length: the longest text would otherwise shorten the others.
        groups = groupby(requests, key=lambda request: len(request.ids) if sliding else 0)
        batches = (batch for _, group in groups for batch in batched(group, batch_size))
        stops = StopStrings(strings)
        return chain.from_iterable(
            complete(self._decoder, tokenizer, batch, max_new_tokens, ends, stops, on_piece) for batch in batches
        )

    @overload
    def generate(self, prompt: str, *, num_samples: None = None, **options: Unpack[GenerationOptions]) -> str: ...

    @overload
    def generate(
        self, prompt: str, *, num_samples: int, batch_size: int = 8, **options: Unpack[GenerationOptions]
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        num_samples: int | None = None,
        batch_size: int = 8,
        **options: Unpack[GenerationOptions],
    ) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, num_samples: int | None = None, **options: Any
    ) -> str | list[str]:
        """Return the text that continues a prompt, without the prompt. For several prompts, return a list.

        Parameters
        ----------
        prompt : str, or list or tuple of str
            The text to continue, or several texts.
        num_samples : int, optional
            Number of continuations of each prompt. If it is given, the result is a list, in which the continuations of
            a prompt are adjacent.
        **options
            See `GenerationOptions` and `Sampling`. If the result is a list, also the batch_size of `complete`.
        """
        if num_samples is None and isinstance(prompt, str):
            return "".join(self.stream(prompt, **options))
        if not isinstance(prompt, str | list | tuple):
            raise TypeError(f"prompt is {checks.shown(prompt)}; expected a str, or a list of them")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        n = 1 if num_samples is None else checks.integer("num_samples", num_samples, 1)
        checks.memory(n * len(prompts) * sys.getsizeof(""), f"{n:,} continuations of {len(prompts):,} prompts")
        return [completion.text for completion in self.complete(prompts, num_samples=n, **options)]

    @overload
    def score(
        self,
        texts: str,
        *,
        stride: int | None = None,
        bos: bool = False,
        allow_special: AllowSpecial = False,
        alternatives: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Score: ...

    @overload
    def score(
        self,
        texts: list[str],
        *,
        stride: int | None = None,
        bos: bool = False,
        allow_special: AllowSpecial = False,
        alternatives: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> list[Score]: ...

    def score(
        self,
        texts: str | list[str],
        *,
        stride: int | None = None,
        bos: bool = False,
        allow_special: AllowSpecial = False,
        alternatives: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Score | list[Score]:
        """Return the log-probability of every token of a text given the tokens before it; for several texts, a list.

        A text longer than n_ctx is read in windows that overlap. Each token is scored once, in the first window that
        contains it: given all tokens before it, or at least n_ctx - stride of them.

        Parameters
        ----------
        texts : str or list of str
            The text, or several texts.
        stride : int, optional
            Distance between the beginnings of two windows, from 1 to n_ctx - 1; n_ctx // 2 unless given. A smaller
            stride is slower and gives each token more context.
        bos : bool
            Whether to put the configuration's bos_token_id before the text. In GPT-2 this is ``<|endoftext|>``, which
            precedes each document in the training data. If false, the log-probability of the first token is NaN,
            because no token comes before the first one.
        allow_special : bool or collection of str
            See `GenerationOptions`.
        alternatives : int
            The number of the most likely tokens that are returned for each position, with their log-probabilities and
            the rank of the text's own token; none of these if it is 0.
        progress : callable, optional
            Wraps the list of the windows of all texts while they are read, as tqdm does. On a mesh, an item has a
            window for each device along ``data``.

        Returns
        -------
        Score or list of Score

        Raises
        ------
        TypeError, ValueError
            If the model has no tokenizer, a text is not valid, or stride is out of range.
        """
        given = [texts] if isinstance(texts, str) else checks.several("texts", texts, "a text, or several")
        encoded = [self._encode(text, allow_special) for text in given]
        options: dict[str, Any] = {"stride": stride, "bos": bos, "alternatives": alternatives, "progress": progress}
        scores = self._scores(encoded, **options)
        return scores[0] if isinstance(texts, str) else scores

    def score_ids(
        self,
        ids: Any,
        *,
        stride: int | None = None,
        bos: bool = False,
        alternatives: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Score:
        """Return the log-probability of each token id of a text, as `score` does. No tokenizer is needed.

        Parameters
        ----------
        ids : int [seq]
            The text: a list or an array.
        stride, bos, alternatives, progress
            As for `score`.
        """
        return self._scores([ids], stride=stride, bos=bos, alternatives=alternatives, progress=progress)[0]

    def _scores(
        self,
        texts: Sequence[Any],
        *,
        stride: int | None,
        bos: bool,
        alternatives: int,
        progress: Callable[[Iterable[Any]], Iterable[Any]],
    ) -> list[Score]:
        """Return the scores of texts that are given as token ids."""
        n_ctx, n_vocab = self.config.n_ctx, self.config.n_vocab
        stride = n_ctx // 2 if stride is None else stride
        stride = checks.integer("stride", stride, 1, n_ctx - 1, note="the largest is n_ctx - 1")
        tokens = [checks.token_ids("token ids", ids, n_vocab, may_be_empty=True).tolist() for ids in texts]
        start = [self._start("bos is true")] if checks.flag("bos", bos) else []

        def logits_of(window: list[int]) -> np.ndarray:
            rows: np.ndarray = self.backend.to_numpy(self.logits([window]))[0]
            return rows

        alternatives = checks.integer("alternatives", alternatives, 0, n_vocab)
        decoder, scorer, at_once = self._decoder, from_logits(logits_of, self.reproducible), 1
        given = [start + ids for ids in tokens]
        if isinstance(decoder, MeshDecoder):
            decoder.mesh.check_common("texts or options", [given, stride, alternatives])
            scorer, at_once = decoder.score, decoder.mesh.sizes[DATA]
        found = score_tokens(scorer, given, n_ctx, stride, alternatives, progress, at_once)
        return [self._score_of(ids, scored, len(start)) for ids, scored in zip(tokens, found, strict=True)]

    def _score_of(self, tokens: list[int], scored: Scored, n_start: int) -> Score:
        """Return the score of a text from arrays that have entries for `n_start` tokens before it."""
        found, *ranking = (each[n_start:] for each in scored if each is not None)
        lengths = [0 if self.tokenizer is None else len(self.tokenizer.token_bytes(token)) for token in tokens]
        n_bytes = sum(n for n, p in zip(lengths, found.tolist(), strict=True) if not math.isnan(p))
        return Score(tokens, found, n_bytes, *ranking)

    def fingerprint(self, text: str | Any = None, *, allow_special: AllowSpecial = False) -> Fingerprint:
        """Return hashes of the model that are equal on every backend, device and processor.

        Two models with the same fingerprint have the same parameters and, for this text, the same logits. Quote it to
        say which model was run, and that it was loaded correctly. The logits are computed in the reproducible mode.

        Parameters
        ----------
        text : str or int [seq], optional
            A text, or its token ids. Unless given, it is a fixed sentence or, without a tokenizer, 32 fixed ids.
        allow_special : bool or collection of str
            See `GenerationOptions`.

        Returns
        -------
        Fingerprint

        Raises
        ------
        TypeError, ValueError
            As for `logits`.
        ValueError
            If the parameters are not float32.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> pg.GPT2.load("shakespeare", backend="numpy").fingerprint("To be").logits[:16]
        '163787592b1a2660'
        """
        self._require_one_device("fingerprint")
        model = self
        if not self.reproducible:
            model = GPT2.__new__(GPT2)
            model._assemble(self.config, self.params, self.tokenizer, True)
        n_ctx, n_vocab = self.config.n_ctx, self.config.n_vocab
        if text is None and self.tokenizer is None:
            text = [i % n_vocab for i in range(min(N_TOKENS, n_ctx))]
        elif text is None:
            text = self._encode(TEXT, False)[:n_ctx]
        elif isinstance(text, str):
            text = self._encode(text, allow_special)
        tokens = checks.token_ids("token ids", text, n_vocab).tolist()
        logits = self.backend.to_numpy(model.logits([tokens]))[0]
        weights = ((path, self.backend.to_numpy(x)) for path, x in flatten(self.params))
        return Fingerprint(hash_of_logits(tokens, logits), hash_of_weights(weights), tokens)

    def trace(
        self, text: str | Sequence[int], *, names: Iterable[str] = ("*",), allow_special: AllowSpecial = False
    ) -> dict[str, Any]:
        """Return the results of the ops of the model for one text, by scope path.

        Parameters
        ----------
        text : str or ints
            A text, or token ids [seq].
        names : strs
            The names of the results, which may be patterns such as ``*/attn/weights`` (see `fnmatch`). Only these
            results are kept in memory.
        allow_special : bool or collection of str
            See `GenerationOptions`.

        Returns
        -------
        dict of float arrays
            Arrays of the model's backend, on its device, in the order of computation. The shape is [1, seq, n_embd]
            unless another is given:

            - ``embedding``, the sum of the rows of wte and wpe;
            - for each layer: ``h3/ln_1``; ``h3/attn/c_attn`` [1, seq, 3 n_embd]; ``h3/attn/q``, ``h3/attn/k`` and
              ``h3/attn/v`` [1, n_head, seq, d]; ``h3/attn/scores`` and ``h3/attn/weights`` [1, n_head, seq, seq], the
              score and the weight of each key (column) for each query (row); ``h3/attn/attention`` [1, n_head, seq, d],
              the averages of the values; ``h3/attn/c_proj``; ``h3/attn/residual``, the sum of the input of the layer
              and ``h3/attn/c_proj``; ``h3/ln_2``; ``h3/mlp/c_fc`` and ``h3/mlp/gelu`` [1, seq, n_inner];
              ``h3/mlp/c_proj``; ``h3/residual``, the output of the layer;
            - ``ln_f``;
            - ``logits`` [1, seq, n_vocab].

        Raises
        ------
        TypeError, ValueError
            As for `logits`.
        ValueError
            If a pattern matches no name. The message lists the names.

        Examples
        --------
        >>> import portable_gpt2 as pg
        >>> config = pg.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_vocab=16, n_ctx=8, eos_token_id=None)
        >>> model = pg.GPT2(config, pg.init_params(config, backend="numpy"))
        >>> {name: x.shape for name, x in model.trace([1, 2, 3], names=["*/weights"]).items()}
        {'h0/attn/weights': (1, 2, 3, 3)}
        """
        self._require_one_device("trace")
        ids = self._encode(text, allow_special) if isinstance(text, str) else text
        tokens = checks.token_ids("token ids", ids, self.config.n_vocab)[None]
        checks.positions(tokens.shape[1], self.config.n_ctx)
        kept = self._names(names)
        if kept not in self._traced:

            def traced(params: Params, tokens: Any) -> dict[str, Any]:
                found: dict[str, Any] = {}
                gpt2(params, tokens, self.config, observe=found.__setitem__)
                return {name: found[name] for name in kept}

            self._traced[kept] = self._compile(traced, self.params)
        found = self._traced[kept](self.backend.from_numpy(tokens, device=self._device))
        return {name: found[name] for name in kept}  # a compiled function may sort the names

    def _names(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the results that match any of the patterns, in the order of computation."""
        patterns = checks.several("names", patterns, "names or patterns")
        known = observed_names(self.config)
        for pattern in patterns:
            if not fnmatch.filter(known, pattern):
                listed = ", ".join(name for name in known if "/" not in name or name.startswith("h0/"))
                raise ValueError(f"no result is called {checks.shown(pattern)}; the names are {listed}, and so on")
        return tuple(name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))

    def _samplings(self, n: int, options: Any) -> list[Sampling]:
        """Return the sampling options of n prompts. Without a seed, each has its own random seed.

        The processes of a mesh have the same seeds.
        """
        if self.mesh is None or self.mesh.is_alone or options.get("seed") is not None:
            return [Sampling(**options) for _ in range(n)]
        Sampling(**options)  # an error is raised before the processes wait for each other
        return [Sampling(**{**options, "seed": seed}) for seed in self.mesh.common_seeds(n)]

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: its checkpoint had no vocab.json and merges.txt, and no tokenizer.json, "
                "or it was loaded without one. Add these files, or use stream_ids and logits, which take token ids"
            )
        return self.tokenizer

    def _encode(self, text: str, allow_special: AllowSpecial) -> list[int]:
        """Return the ids of a text. Tokens that were added to the tokenizer and not to the model are refused."""
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
        """Return the id that stands before the first token of a document."""
        for start in (self.config.start, *self._end_of_text()):
            if start is not None:
                return start
        raise ValueError(f"{why}, and the vocabulary has no <|endoftext|> to start from")

    def _prompt_ids(self, prompt: str, allow_special: AllowSpecial) -> list[int]:
        ids = self._encode(prompt, allow_special) or [self._start("the prompt is empty")]
        return checks.token_ids("token ids", ids, self.config.n_vocab).tolist()  # type: ignore[no-any-return]
