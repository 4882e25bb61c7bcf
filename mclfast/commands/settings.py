"""Settings as options of a command."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Collection, Mapping
from typing import Any

from mclfast.commands.parser import OneLineParser


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


def run_settings(
    known: argparse.Namespace, rest: list[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a run given on the command line; which exist depends on the method.

    Args:
        known: the arguments of the command read so far.
        rest: those that are left.
        values: settings of the recipe or of the run resumed, shown as defaults.
    """
    from mclfast._settings import field_types
    from mclfast.config import TrainConfig
    from mclfast.methods import method_class

    first = OneLineParser(prog=f"mclfast {known.command}", add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=values.get("method", TrainConfig.method))
    method = first.parse_known_args(rest)[0].method
    options = method_class(method).Options

    parser = OneLineParser(
        prog=f"mclfast {known.command}", add_help=False, parents=[known.parser],
        conflict_handler="resolve", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=known.parser.description, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add_settings(parser, "settings", TrainConfig, values)
    add_settings(parser, f"settings of the method {method}", options, values)
    if known.help:
        parser.print_help()
        parser.exit(0)
    given, unknown = parser.parse_known_args(rest)
    types = field_types(TrainConfig) | field_types(options)
    if unknown:
        raise _not_understood(rest, unknown, types, method)
    return {k: v for k, v in vars(given).items() if k in types}


def _not_understood(
    rest: list[str], unknown: list[str], types: dict[str, Any], method: str
) -> ValueError:
    """The error for arguments that are no settings."""
    from mclfast.config import unknown_setting

    for argument in unknown:
        if argument.startswith("--"):
            flag = argument.removeprefix("--").partition("=")[0]
            return unknown_setting("setting", flag, method, spell=dashed)
    return value_too_many(rest, unknown, types)


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
