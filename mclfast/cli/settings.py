"""Settings of a run as options of the command line, and the argument parser of the commands."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar


def run_settings(
    known: argparse.Namespace, rest: list[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads the settings of a run from the command line; the options depend on the method.

    Args:
        known: arguments of the command that are parsed already.
        rest: arguments that are not parsed yet.
        values: settings of the recipe, or of the run to resume, shown as defaults in the help.

    Returns:
        The settings that were given, as text.
    """
    from mclfast.config import TrainConfig, unknown_setting
    from mclfast.methods import method_class

    first = OneLineParser(prog=f"mclfast {known.command}", add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=values.get("method", TrainConfig.method))
    method = first.parse_known_args(rest)[0].method
    groups = {
        "settings": TrainConfig,
        f"settings of the method {method}": method_class(method).Options,
    }
    return given_settings(
        known,
        rest,
        groups,
        values,
        unknown_flag=lambda flag: unknown_setting("setting", flag, method, spell=dashed),
    )


def given_settings(
    known: argparse.Namespace,
    rest: list[str],
    groups: Mapping[str, type],
    values: Mapping[str, Any],
    *,
    unknown_flag: Callable[[str], ValueError],
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Reads the settings given on the command line, or shows the help and exits if it is asked for.

    Args:
        known: arguments of the command that are parsed already.
        rest: arguments that are not parsed yet.
        groups: settings dataclasses, by the titles of their groups in the help.
        values: settings shown as defaults in the help, instead of the dataclasses' own.
        unknown_flag: makes the error for an unknown option from its name without dashes.
        leave_out: names of fields that become no options.

    Returns:
        The settings that were given, as text.
    """
    from mclfast._base.settings import field_types

    parser = OneLineParser(
        prog=f"mclfast {known.command}",
        add_help=False,
        parents=[known.parser],
        conflict_handler="resolve",
        allow_abbrev=False,
        description=known.parser.description,
        argument_default=argparse.SUPPRESS,
        # All settings would fill a screen before the first word of explanation.
        usage=f"mclfast {known.command} [option ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: dict[str, Any] = {}
    for title, cls in groups.items():
        _add_settings(parser, title, cls, values, leave_out)
        kinds |= field_types(cls)
    if known.help:
        parser.epilog = _names()
        parser.print_help()
        parser.exit(0)
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [a.removeprefix("--").partition("=")[0] for a in unknown if a.startswith("--")]
        raise unknown_flag(flags[0]) if flags else _value_too_many(rest, unknown, kinds)
    return {name: value for name, value in vars(given).items() if name in kinds}


def _add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    cls: type,
    values: Mapping[str, Any],
    leave_out: Collection[str],
) -> None:
    """Adds the fields of a settings dataclass as options, in a group of their own.

    Args:
        parser: parser that the options are added to; it leaves their values as text.
        title: title of the group in the help.
        cls: dataclass whose fields all have a default and a help text.
        values: settings shown as defaults in the help, instead of the dataclass's own.
        leave_out: names of fields that become no options.
    """
    from mclfast._base.settings import coerce, field_types
    from mclfast.config import field_help

    group, defaults = parser.add_argument_group(title), cls()
    for name, kind in field_types(cls).items():
        if name in leave_out:
            continue
        default = coerce(name, kind, values.get(name, getattr(defaults, name)))
        text = f"{field_help(cls)[name]} (default: {shown(default)})"
        # argparse would replace a percent sign, as in a path.
        group.add_argument(
            f"--{dashed(name)}",
            dest=name,
            metavar=value_shape(name, kind),
            help=text.replace("%", "%%"),
        )


def _value_too_many(rest: list[str], unknown: list[str], kinds: Mapping[str, Any]) -> ValueError:
    """The error for a second value after an option that takes one.

    Args:
        rest: arguments from which the settings were read.
        unknown: arguments that belong to no option, all without dashes.
        kinds: type of each setting, by name.
    """
    from mclfast._base.checks import unknown_name

    name, values = "", 0
    for argument in rest:
        if argument.startswith("--"):
            flag, equals, _ = argument.removeprefix("--").partition("=")
            name, values = flag.replace("-", "_"), len(equals)
        elif name and values:
            many = typing.get_origin(kinds[name]) is tuple
            what = "one list separated by commas" if many else "one value"
            return ValueError(f"{name}: expected {what}, got {argument!r} after it")
        else:
            values += 1
    return unknown_name("setting", unknown[0], map(dashed, kinds))


def value_shape(name: str, kind: Any) -> str:
    """The placeholder for a setting's value in a help text.

    Args:
        name: name of the setting.
        kind: type of the setting.
    """
    if name == "data_root":
        return "DIR"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "{" + ",".join(args) + "}"
    if origin is tuple:
        return f"{value_shape(name, args[0])},..."
    if origin in (typing.Union, types.UnionType):
        return value_shape(name, next(a for a in args if a is not type(None)))
    return {bool: "{true,false}", int: "N", str: "NAME"}.get(kind, "X")


def _names() -> str:
    """Lists of the methods, data sets, networks and recipes, for the end of the help."""
    from mclfast import data, methods, models, recipe

    lists = {
        "methods": methods.available(),
        "data sets": data.available(),
        "networks": [*models.available(), "or one of another package, such as timm:resnet18"],
        "recipes": recipe.available(),
    }
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(
        textwrap.fill(
            f"{title}: {', '.join(names)}", width, subsequent_indent="  ", break_on_hyphens=False
        )
        for title, names in lists.items()
    )


def dashed(name: str) -> str:
    """The name of a setting, spelt as an option without its leading dashes."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """The value of a setting, spelt as an option takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return value if isinstance(value, str) else str(value).lower()


T = TypeVar("T", int, float)


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def an_integer(text: str) -> int:
    """Parses the value of an option that takes an integer."""
    return _number(int, "an integer", text)


def a_number(text: str) -> float:
    """Parses the value of an option that takes a number."""
    return _number(float, "a number", text)


def _number(kind: type[T], what: str, text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None
