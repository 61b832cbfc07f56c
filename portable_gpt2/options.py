"""Options: fields of a dataclass that carry their help text and their validation.

`Sampling` and `training.Recipe` consist of options, and four sizes in `GPT2Config` are options. The dataclass validates
its options, its docstring lists them, and the command line has one flag for each.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def option(default: _T, help: str, check: Callable[..., Any], *, default_text: str = "", **limits: Any) -> _T:
    """Return a field of a dataclass.

    Parameters
    ----------
    default
        Its default value. A field whose annotation ends in ``| None`` may be None.
    help : str
        Its description, for the command and for the docstring: a sentence that needs no context, without a full stop.
    check : callable
        Called with the field's name, a value that is not None, and the limits. It returns the value in Python's own
        type, or raises an error; `checks` has several.
    default_text : str
        A text for the help that replaces the default value, if the value does not explain itself.
    **limits
        Passed on to the check.
    """
    default_text = default_text or ("off" if default is None else f"{default:g}" if isinstance(default, float) else "")
    metadata = {"help": help, "check": functools.partial(check, **limits), "default": default_text or str(default)}
    return dataclasses.field(default=default, metadata=metadata)  # type: ignore[no-any-return, call-overload]


def is_optional(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field may be None."""
    return str(field.type).endswith("| None")


def validate(instance: Any) -> None:
    """Replace each option of a frozen dataclass by its validated value; called by ``__post_init__``."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if value is not None or not is_optional(field):
            object.__setattr__(instance, field.name, field.metadata["check"](field.name, value))


def documented(cls: type[_T]) -> type[_T]:
    """Put the options of a dataclass into its docstring, where ``{options}`` stands."""
    entries = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        text = f"{field.metadata['help']} (default: {field.metadata['default']})."
        lines = textwrap.wrap(text[0].upper() + text[1:], 110)
        entries.append("\n".join([f"{field.name} : {field.type}", *(f"    {line}" for line in lines)]))
    if cls.__doc__:  # python -OO removes docstrings
        cls.__doc__ = cls.__doc__.replace("{options}", textwrap.indent("\n".join(entries), "    ").lstrip())
    return cls
