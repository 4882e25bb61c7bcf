"""Settings as options of a command."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Collection, Mapping
from typing import Any


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    cls: type,
    values: Mapping[str, Any],
    leave_out: Collection[str] = (),
) -> None:
    """Adds the fields of a settings dataclass as options, in a group of their own.

    Args:
        parser: gets the options; what is given arrives as text.
        title: of the group.
        cls: the dataclass; each field has a default and a help text.
        values: shown in place of the defaults.
        leave_out: fields that become no options.
    """
    from mclfast._settings import coerce, field_types
    from mclfast.config import field_help

    group, defaults = parser.add_argument_group(title), cls()
    for name, kind in field_types(cls).items():
        if name in leave_out:
            continue
        default = coerce(name, kind, values.get(name, getattr(defaults, name)))
        text = f"{field_help(cls)[name]} (default: {_shown(default)})"
        # argparse takes a percent sign, as in a path, for a place to fill in.
        group.add_argument(
            f"--{dashed(name)}", dest=name, metavar="X", help=text.replace("%", "%%")
        )


def value_too_many(
    rest: list[str], unknown: list[str], types: Mapping[str, Any]
) -> ValueError:
    """The error for a value that follows another one.

    Args:
        rest: the arguments from which the settings were read.
        unknown: those that were none, all without dashes.
        types: type of each setting.
    """
    from mclfast._checks import unknown_name

    name, values = "", 0
    for argument in rest:
        if argument.startswith("--"):
            flag, equals, _ = argument.removeprefix("--").partition("=")
            name, values = flag.replace("-", "_"), len(equals)
        elif name and values:
            many = typing.get_origin(types[name]) is tuple
            what = "one list separated by commas" if many else "one value"
            return ValueError(f"{name}: expected {what}, got {argument!r} after it")
        else:
            values += 1
    return unknown_name("setting", unknown[0], map(dashed, types))


def dashed(name: str) -> str:
    """A setting as an option spells it."""
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return value if isinstance(value, str) else str(value).lower()
