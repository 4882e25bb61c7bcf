"""Settings dataclasses: fields with a help text, and conversion of values to a field's type."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from mclfast._base.checks import shortened

T = TypeVar("T")


def setting(default: T, text: str) -> T:
    """A field of a settings dataclass, with its default and the text that the help shows."""
    value: T = dataclasses.field(default=default, metadata={"help": text})
    return value


def field_types(cls: type) -> dict[str, Any]:
    """Type of each field of a settings dataclass but the nested ``options``, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "options"}


def coerce_fields(settings: Any) -> None:
    """Converts every field of a settings dataclass to its type, in place, or raises ValueError."""
    for name, kind in field_types(type(settings)).items():
        setattr(settings, name, coerce(name, kind, getattr(settings, name)))


def coerce(name: str, kind: Any, value: Any) -> Any:
    """Converts a value from YAML, the command line or Python to the type of its field.

    Args:
        name: name of the field, for the error message.
        kind: type of the field: bool, int, float, str, a Literal, a tuple, or an optional of them.
        value: value to convert.

    Raises:
        ValueError: the value does not fit the type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = next(a for a in args if a is not type(None))
        return coerce(name, kind, value)
    if origin is Literal:
        # YAML reads a bare `off` as false and a bare `on` as true.
        word = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else value
        value = word if word in args else value
        if value not in args:
            raise ValueError(f"{name}: expected one of {', '.join(args)}; got {_shown(value)}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{name}: expected a list separated by commas, got {_shown(value)}")
        return tuple(
            coerce(name, args[0], i.strip() if isinstance(i, str) else i) for i in items if i != ""
        )
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise ValueError(f"{name}: expected true or false, got {_shown(value)}")
        return words[str(value).lower()]
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise ValueError(f"{name}: expected text, got {_shown(value)}")
        return str(value)
    return _number(name, kind, value)


def _shown(value: Any) -> str:
    """A value from a file, which may be of any length, for an error message."""
    try:
        return shortened(repr(value), 200)
    # Python writes no number of thousands of digits.
    except ValueError:
        return type(value).__name__


def _number(name: str, kind: type, value: Any) -> Any:
    what = "an integer" if kind is int else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and float(value) != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected {what}, got {_shown(value)}") from None
    return number
