"""The commands and their options."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import math
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

from .. import strict_json
from ..checkpoint import SHIPPED, convert
from ..generation.completion import Completion
from ..language_model import GPT2
from ..registry import BackendNotInstalled, available_backends, get_backend, how_to_install, known_backends, to_numpy
from ..sampling import Sampling
from . import signals, streams
from .options import FAILED, Command, Parser, at_least, index_or_all, number_or_off, stop_text
from .texts import Texts
from .train import add_options as add_training_options
from .train import run as run_training

_SIGPIPE = 13  # by which a shell reports that nobody reads stdout; Windows has no such signal
_JSON = "; a number that is not finite is null"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="portable-gpt2", description="GPT-2, written once, on the array framework of your choice.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)

    generate = commands.add_parser(
        "generate",
        help="continue a text, or several",
        description="Write a prompt and its continuation to stdout, as it is drawn; of several, one after the other. "
        "Without a prompt the text starts from <|endoftext|>.",
    )
    add = generate.add_argument
    add("prompt", nargs="*", type=str, help="a text to continue")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a file to continue, whole; - is stdin")
    _add_model(generate)
    add(
        "-n",
        "--max-new-tokens",
        type=at_least(0),
        default=100,
        metavar="N",
        help="sample at most N (default: 100)",
    )
    add("--temperature", type=float, default=1.0, metavar="T", help="divide the logits by T; 0 is greedy (default: 1)")
    add(
        "--top-k",
        type=int,
        default=40,
        metavar="K",
        help="sample from the K most likely tokens; 0 is off (default: 40)",
    )
    add(
        "--top-p",
        type=number_or_off,
        metavar="P",
        help="sample from the smallest set of tokens whose total probability reaches P (default: off)",
    )
    add(
        "--min-p",
        type=number_or_off,
        metavar="P",
        help="drop tokens whose probability is below P times that of the most likely token (default: off)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens that the text holds already less likely, above 1 (default: 1)",
    )
    add(
        "--seed",
        type=int,
        help="the same seed gives the same text on every backend (default: random, one for each prompt)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        type=stop_text,
        metavar="TEXT",
        help="end before TEXT; may be given several times",
    )
    add("--stop-token", action="append", default=[], type=at_least(0), metavar="ID", help="end before this token id")
    add("--num-samples", type=at_least(1), default=1, metavar="N", help="continue each prompt N times (default: 1)")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="compute N texts at a time (default: 8)")
    add("--sliding", action="store_true", help="when the context is full, continue from its last half")
    _add_special(generate, "a prompt")
    add("--json", action="store_true", help=f"write a JSON object for each text, one on each line{_JSON}")
    generate.set_defaults(run=_generate)

    score = commands.add_parser(
        "score",
        help="say how likely a model finds a text",
        description="Write the log-probability and the perplexity of texts.",
    )
    add = score.add_argument
    add("file", nargs="+", help="a text, in UTF-8; - is stdin")
    _add_model(score)
    add("--stride", type=at_least(1), metavar="N", help="move the window by N tokens (default: half of the context)")
    add("--bos", action="store_true", help="put <|endoftext|> before each text, and score its first token too")
    _add_special(score, "a text")
    add(
        "--json",
        action="store_true",
        help=f"write a JSON object for each text, with each token's log-probability{_JSON}",
    )
    score.set_defaults(run=_score)

    attend = commands.add_parser(
        "attend",
        help="draw what attention looks at",
        description="Draw the attention weights of a text: rows look at columns.",
    )
    add = attend.add_argument
    add("text", type=str, help="a text")
    _add_model(attend)
    _add_special(attend, "the text")
    add("--layer", type=index_or_all, default="all", metavar="N", help="a layer, from 0, or all (default)")
    add("--head", type=index_or_all, default="all", metavar="N", help="a head, from 0, or all (default)")
    add("-o", "--output", required=True, metavar="FILE", help="what to write: attention.png, .svg, .pdf ...")
    attend.set_defaults(run=_attend)

    train = commands.add_parser(
        "train",
        help="train a model on texts, or train one further",
        description="Train a model from nothing, or from a checkpoint. DIR is a checkpoint itself: give it to --model. "
        "Ctrl-C saves; --resume continues, and ends in the same bits.",
    )
    add_training_options(train)
    train.set_defaults(run=lambda arguments: run_training(arguments, Texts().read))

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint in the form that Hugging Face's transformers reads",
        description="Write any checkpoint as config.json and model.safetensors. The directory appears complete or not "
        "at all.",
    )
    add = convert.add_argument
    add("source", metavar="SRC", help="a checkpoint's directory, or a model of the hub such as gpt2")
    add("directory", metavar="DST", help="where to")
    add("--dtype", help="float32, float64, bfloat16, float16 (default: as they are)")
    add("--force", action="store_true", help="replace DST, with all that it holds; it may be SRC")
    convert.set_defaults(run=_convert)

    backends = commands.add_parser("backends", help="list the array frameworks and their devices")
    backends.set_defaults(run=_backends)
    return parser


def run(argv: list[str] | None) -> int:
    """Run a command; return its exit status.

    An error that a function of this package raises for what it was given takes one line. Every other error is a bug,
    and its traceback shows where.
    """
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return signals.status(signal.SIGINT)
    except streams.LostOutput as error:
        if error.errno == errno.EPIPE:
            return signals.status(_SIGPIPE)
        return _failed(str(error.strerror))
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        return _failed(str(error))
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(f"out of memory: {error}")


def _failed(message: str) -> int:
    streams.say(f"portable-gpt2: {' '.join(message.split())}")
    return FAILED


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the host or of a device is full, by Python's error or by a framework's words."""
    words = ("RESOURCE_EXHAUSTED", "OOM when", "can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--model",
        default=SHIPPED / "shakespeare",
        metavar="DIR",
        help="a checkpoint's directory, or a model of the hub such as gpt2 (default: shakespeare, which is inside)",
    )
    add("--backend", metavar="NAME", help="what computes (default: $PORTABLE_GPT2_BACKEND, else numpy)")
    add("--device", help="where: cpu, cuda, cuda:1 ... (default: the framework's)")
    add("--dtype", help="float32 (default), float64, bfloat16, float16")


def _add_special(command: argparse.ArgumentParser, where: str) -> None:
    add = command.add_argument
    add(
        "--allow-special", action="store_true", help=f"read special tokens in {where}, such as <|endoftext|>, as tokens"
    )
    add(
        "--allow-special-token",
        action="append",
        default=[],
        metavar="NAME",
        help="read this special token as a token and others as text; may be given several times",
    )


def _allow_special(arguments: argparse.Namespace) -> bool | list[str]:
    """Return the value of the options, as `Tokenizer.encode` takes it."""
    names: list[str] = arguments.allow_special_token
    return arguments.allow_special or names or False


def _load(arguments: argparse.Namespace) -> GPT2:
    return GPT2.load(
        arguments.model,
        backend=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        progress=_progress,
    )


def _generate(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(Sampling)]
    options: dict[str, Any] = {name: None if (x := getattr(arguments, name)) == "off" else x for name in names}
    sampling = Sampling(**options)  # checked before a text is read or a model loaded
    streams.write("")
    texts = Texts()
    prompts = [*arguments.prompt, *map(texts.read, arguments.prompt_file)] or [""]
    model = _load(arguments)
    options |= {name: getattr(arguments, name) for name in ("max_new_tokens", "sliding")}
    options["allow_special"] = _allow_special(arguments)
    options["stop"] = [*arguments.stop, *arguments.stop_token]
    alone = len(prompts) == arguments.num_samples == 1 and not arguments.json
    if alone:
        options["seed"] = sampling.seed
        pieces = model.stream(prompts[0], **options)
    else:
        many = {"num_samples": arguments.num_samples, "batch_size": arguments.batch_size}
        completions = model.complete(prompts, **many, **options)
    seed = "" if options["seed"] is None else f", seed {options['seed']}"
    streams.say(f"{model!r}{seed}, from {model.source}")
    start = time.perf_counter()
    if alone:
        streams.write(prompts[0])
        drawn = 0
        for drawn, piece in enumerate(pieces, 1):  # noqa: B007 - counted for the last line
            streams.write(piece)
        drawn = min(drawn, arguments.max_new_tokens)  # a text that ends within a character has a piece more
        streams.write("\n")
    else:
        drawn = _write_all(completions, arguments)
    seconds = time.perf_counter() - start
    streams.say(f"{drawn} tokens in {seconds:.2f} s, {drawn / seconds:.1f} tokens/s")
    return 0


def _write_all(completions: Iterable[Completion], arguments: argparse.Namespace) -> int:
    """Write texts as they are complete; return how many tokens they have."""
    drawn = 0
    for i, completion in enumerate(completions):
        drawn += len(completion.tokens)
        if arguments.json:
            streams.write(strict_json.line(dataclasses.asdict(completion)))
        else:
            which = f"prompt {i // arguments.num_samples + 1}, sample {completion.index + 1}"
            which += f", seed {completion.seed}" if arguments.seed is None else ""
            streams.write(f"{'=' * 20} {which} {'=' * 20}\n{completion.prompt}{completion.text}\n")
    return drawn


def _score(arguments: argparse.Namespace) -> int:
    streams.write("")
    texts = Texts()
    contents = [(name, texts.read(name)) for name in arguments.file]
    model = _load(arguments)
    streams.say(f"{model!r}, from {model.source}")
    for name, text in contents:
        options = {"stride": arguments.stride, "bos": arguments.bos, "allow_special": _allow_special(arguments)}
        score = model.score(text, **options)
        if arguments.json:
            found = {"tokens": score.tokens, "log_probs": score.log_probs.tolist()}
            found |= {key: getattr(score, key) for key in ("total", "n_bytes", "perplexity", "byte_perplexity")}
            streams.write(strict_json.line({"file": name, **found}))
        else:
            streams.write(
                f"{name}: perplexity {score.perplexity:.4f} per token, {score.byte_perplexity:.4f} per byte; "
                f"log-probability {score.total:.4f} of {score.n_tokens} tokens, {score.n_bytes} bytes\n"
            )
    return 0


def _attend(arguments: argparse.Namespace) -> int:
    from .. import plot

    signals.clean_up_first()
    plot.check_file(arguments.output)
    model = _load(arguments)
    chosen = {}
    for name, n in (("layer", model.config.n_layer), ("head", model.config.n_head)):
        index = getattr(arguments, name)
        if index != "all" and not 0 <= index < n:
            raise ValueError(f"there is no {name} {index}; the model has {n}, from 0")
        chosen[name] = range(n) if index == "all" else [index]
    allow_special = _allow_special(arguments)
    traced = model.trace(arguments.text, allow_special=allow_special)
    assert model.tokenizer is not None  # without one, trace has refused the text
    maps = {
        f"layer {i}, head {j}": to_numpy(traced[f"h{i}/attn/weights"])[0, j]
        for i in chosen["layer"]
        for j in chosen["head"]
    }
    if len(maps) == 1:
        ((name, weights),) = maps.items()
        tokens = model.tokenizer.encode(arguments.text, allow_special=allow_special)
        names = [model.tokenizer.decode([token]) for token in tokens]
        figure = plot.draw_attention(weights, names, name)
    else:
        columns = len(chosen["head"]) if len(chosen["head"]) > 1 else math.isqrt(len(maps) - 1) + 1
        figure = plot.draw_grid(maps, columns, arguments.text)
    plot.save(figure, arguments.output)
    streams.say(f"wrote {arguments.output}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    signals.clean_up_first()
    found = convert(
        arguments.source, arguments.directory, dtype=arguments.dtype, force=arguments.force, progress=_progress
    )
    streams.say(f"{arguments.directory}: from {found}")
    return 0


def _progress(tensors: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(tensors, desc="loading", unit=" tensors", delay=1, leave=False)
    return bar


def _backends(arguments: argparse.Namespace) -> int:
    streams.write("")
    rows = [("backend", "version", "devices")]
    for name in known_backends():
        try:
            if name not in available_backends():
                rows.append((name, "-", f"not installed: {how_to_install(name)}"))
                continue
            devices = get_backend(name).devices()
            rows.append((name, str(getattr(sys.modules[name], "__version__", "?")), ", ".join(devices)))
        except BackendNotInstalled as error:
            rows.append((name, "-", " ".join(str(error).split())))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for first, second, last in rows:
        streams.write(f"{first:{widths[0]}}  {second:{widths[1]}}  {last}\n")
    return 0
