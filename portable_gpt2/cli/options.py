"""Parsers, and the options that several commands share.

If a value is wrong, the parser writes one line to stderr and ends the process. Values are checked before a model is
loaded, if that is possible.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from ..backend import Backend
from ..checkpoint import SHIPPED
from ..checks import LARGEST, shown
from ..language_model import GPT2
from ..mesh import Mesh, parse
from ..registry import get_backend
from . import streams

_T = TypeVar("_T")

FAILED = 2
"""The exit status of wrong use, and of every other failure."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, which names the option, the value, and the values that are expected.

    An option must be written in full: an abbreviation that is unique today may be ambiguous in the next release. If an
    option or a value is unknown, the error suggests the nearest one that exists.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.register("type", int, _integer)
        self.register("type", float, _number)
        self._given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments. Arguments that are left over are an error of the command to which they were given."""
        self._given = sys.argv[1:] if args is None else args
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """End the process."""
        message = f"{' '.join(message.split())}{self._suggestion(message)}"
        streams.say(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(FAILED)

    def _suggestion(self, message: str) -> str:
        """Return the end of an error: the first given option that does not exist, and the nearest that does."""
        known = list(self._option_string_actions)
        for argument in itertools.takewhile(lambda argument: argument != "--", self._given):
            name = argument.partition("=")[0]
            if name == "--mesh" and name not in known and not self._subparsers:
                return "; this command computes on one device, and generate, score and train take --mesh"
            if name.startswith("--") and name not in known:
                unknown = "" if name in message else f"; {name} is not an option of {self.prog}"
                place = "; write options after the command" if unknown and self._subparsers else ""
                return f"{unknown}{did_you_mean(name, known) or place}"
        return ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            message = f"{shown(value)} is not one of {', '.join(known)}{did_you_mean(str(value), known)}"
            raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        # The message is the help. Unlike argparse, this raises an error if stdout is closed or full.
        streams.write(message)


class Command(Parser):
    """The parser of one command. It refuses an empty path or name.

    The argument of a path or a name has no ``type``. An argument whose value may be any text has ``type=str``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, _not_empty)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a question that suggests the known name that is nearest to an unknown one, or an empty text.

    Examples
    --------
    >>> did_you_mean("--max-new-token", ["--max-new-tokens", "--seed"])
    '; did you mean --max-new-tokens?'
    >>> did_you_mean("--frobnicate", ["--max-new-tokens", "--seed"])
    ''
    """
    longer = [each for each in known if len(name) > 3 and each.startswith(name)]
    near = longer or difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def at_least(low: int, alternative: str = "") -> Callable[[str], int]:
    """Return a function that reads an integer from low to 2^63 - 1."""

    def read(text: str) -> int:
        value = _integer(text, alternative)
        if not low <= value <= LARGEST:
            raise argparse.ArgumentTypeError(f"{shown(value)} is not from {low} to 2**63 - 1")
        return value

    return read


def number_or_off(text: str) -> float | str:
    """Read a number, or the word ``off``."""
    return text if text == "off" else _number(text, " or off")


def index_or_all(text: str) -> int | str:
    """Read an index from 0, or the word ``all``."""
    return text if text == "all" else at_least(0, " or all")(text)


def sizes(text: str) -> dict[str, int]:
    """Read the sizes of a mesh, such as ``data=2,model=2``."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def stop_text(text: str) -> str:
    """Read a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("the stop string is empty, so every text would end at once")
    return text


def _integer(text: str, alternative: str = "") -> int:
    try:
        return int(text)
    except ValueError:  # also raised for more than 4,300 digits
        fewer = " of fewer digits" if text.strip().lstrip("+-").isdecimal() else ""
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number{fewer}{alternative}") from None


def _number(text: str, alternative: str = "") -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a number{alternative}") from None


def _not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; if it comes from a variable, the variable is not set")
    return text


# Options that are fields of a dataclass

_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "N"),
    "int | None": (int, "N"),
    "float": (float, "X"),
    "float | None": (number_or_off, "X|off"),
    "str": (None, "NAME"),
}
"""For each type of a field: the function that reads a value, and the name of the value in the help."""


def flag(name: str) -> str:
    """Return the name of the option for a field, such as ``--top-k`` for ``top_k``."""
    return f"--{name.replace('_', '-')}"


def add_fields(group: argparse._ActionsContainer, cls: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Add an option for each field of a dataclass, with the help text of the field.

    Each field must have been made by `portable_gpt2.options.option`. An option that is not given is None. With
    `defaults`, only the fields that it names are added; the help shows these defaults, and the caller applies them.
    """
    for field in dataclasses.fields(cls):
        if defaults is None or field.name in defaults:
            if field.type == "bool":
                group.add_argument(flag(field.name), action="store_true", default=None, help=field.metadata["help"])
                continue
            kind, metavar = _KINDS[str(field.type)]
            default = field.metadata["default"] if defaults is None else defaults[field.name]
            text = f"{field.metadata['help']} (default: {default})"
            group.add_argument(flag(field.name), type=kind, metavar=metavar, help=text)


def given_fields(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the options of `add_fields` that were given, by the name of the field. The word ``off`` becomes None."""
    found = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(cls)}
    return {name: None if value == "off" else value for name, value in found.items() if value is not None}


# Options of several commands


def add_backend(group: argparse._ActionsContainer) -> None:
    """Add the options that choose a backend and a device."""
    add = group.add_argument
    add(
        "--backend",
        metavar="NAME",
        help="array framework that runs the model; `portable-gpt2 backends` lists them (default: the environment "
        "variable PORTABLE_GPT2_BACKEND, or numpy)",
    )
    add("--device", help="device of the framework: cpu, cuda, cuda:1 ... (default: the framework's own choice)")


def add_computation(command: argparse.ArgumentParser) -> None:
    """Add the options that choose a backend, a device and a dtype."""
    add_backend(command)
    text = "dtype of the computation: float32, float64, bfloat16 or float16 (default: float32)"
    command.add_argument("--dtype", help=text)


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the options that choose a model, and how it computes."""
    add_source(command)
    add_computation(command)
    add_reproducible(command)


def add_source(command: argparse.ArgumentParser) -> None:
    """Add the option that chooses a model."""
    command.add_argument(
        "--model",
        default=SHIPPED / "shakespeare",
        metavar="DIR",
        help="directory of a checkpoint, or the name of a model of the Hugging Face hub, such as gpt2 (default: "
        "shakespeare, a small model that comes with this package)",
    )


def add_reproducible(command: argparse.ArgumentParser) -> None:
    """Add the option of the reproducible mode."""
    command.add_argument(
        "--reproducible",
        action="store_true",
        help="round every op correctly, so that the result has the same bits on every backend, device and processor; "
        "this takes several times as long",
    )


def add_mesh(command: argparse.ArgumentParser) -> None:
    """Add the option of a mesh of devices."""
    command.add_argument(
        "--mesh",
        type=sizes,
        metavar="SIZES",
        help="sizes of a mesh of devices that compute the model together, on jax or torch, such as data=2,model=2: "
        "along data, the texts of a batch are divided, and along model, the weights. With torch, there is a process "
        "for each device, as torchrun starts them",
    )


def open_mesh(arguments: argparse.Namespace) -> Mesh | None:
    """Return the mesh that the option of `add_mesh` describes, after `connect`."""
    if arguments.mesh is None:
        return None
    for name, given in (("--reproducible", arguments.reproducible), ("--device", arguments.device)):
        if given:
            raise ValueError(f"{name} is for one device: leave out {name} or --mesh")
    return connect(get_backend(arguments.backend), arguments.mesh)


def connect(backend: Backend, sizes: dict[str, int], advice: str = "") -> Mesh:
    """Return a mesh, after connecting its processes. From then on, only process 0 writes to stdout and stderr.

    If a library aborts a process, a line says so, with the advice.
    """
    mesh = Mesh(backend, sizes)
    streams.share(mesh.is_first)
    if not mesh.is_alone:
        streams.report_abort(
            f"portable-gpt2: a library has aborted this process, probably because another process of the mesh has ended"
            f"{advice}"
        )
    return mesh


def read_once(mesh: Mesh | None, read: Callable[[], _T]) -> _T:
    """Return the result of a function that reads files. On a mesh, process 0 calls it, and sends the result as JSON.

    So stdin is read once, and the other hosts need no copy of the files.
    """
    if mesh is None or mesh.is_alone:
        return read()
    found = mesh.together(lambda: read() if mesh.is_first else None)
    sent: _T = json.loads(mesh.common(json.dumps(found).encode()))
    return sent


def load(arguments: argparse.Namespace, mesh: Mesh | None = None) -> GPT2:
    """Load the model that the options of `add_model` choose."""

    def loaded() -> GPT2:
        return GPT2.load(
            arguments.model,
            backend=arguments.backend if mesh is None else mesh.backend,
            device=arguments.device,
            dtype=arguments.dtype,
            reproducible=arguments.reproducible,
            mesh=mesh,
            progress=progress,
        )

    return loaded() if mesh is None else mesh.together(loaded)


def progress(items: Iterable[_T], what: str = "loading", unit: str = "tensors") -> Iterable[_T]:
    """Show a progress bar on stderr while items are processed, if that takes longer than a second.

    Nothing is shown if stderr is not a terminal, because a bar would fill a log with its many states.
    """
    from tqdm import tqdm

    bar: Iterable[_T] = tqdm(items, desc=what, unit=f" {unit}", delay=1, leave=False, disable=None)
    return bar


def add_special(command: argparse.ArgumentParser, where: str) -> None:
    """Add the options that choose which special tokens are read as tokens."""
    add = command.add_argument
    add(
        "--allow-special",
        action="store_true",
        help=f"read every special token that is written in {where}, such as <|endoftext|>, as that token and not as "
        "text",
    )
    add(
        "--allow-special-token",
        action="append",
        default=[],
        metavar="NAME",
        help="read this special token as a token, and other special tokens as text; may be given several times",
    )


def allow_special(arguments: argparse.Namespace) -> bool | list[str]:
    """Return the value of the options of `add_special`, as `Tokenizer.encode` takes it."""
    names: list[str] = arguments.allow_special_token
    return arguments.allow_special or names or False
