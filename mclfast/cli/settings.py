"""The argument parser of the commands, and the settings of a run as its options."""

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
    """The settings of a run given on the command line; which exist depends on the method.

    Args:
        known: the arguments of the command read so far.
        rest: those that are left.
        values: settings of the recipe or of the run resumed, shown as defaults.
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
    """The settings given on the command line, as text; shows the help and leaves if asked for.

    Args:
        known: the arguments of the command read so far.
        rest: those that are left.
        groups: settings dataclasses by the titles of their groups.
        values: shown in place of the defaults.
        unknown_flag: the error for an option that there is not, from its name without dashes.
        leave_out: fields that become no options.
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
        parser: gets the options; what is given arrives as text.
        title: of the group.
        cls: the dataclass; each field has a default and a help text.
        values: shown in place of the defaults.
        leave_out: fields that become no options.
    """
    from mclfast._base.settings import coerce, field_types
    from mclfast.config import field_help

    group, defaults = parser.add_argument_group(title), cls()
    for name, kind in field_types(cls).items():
        if name in leave_out:
            continue
        default = coerce(name, kind, values.get(name, getattr(defaults, name)))
        text = f"{field_help(cls)[name]} (default: {shown(default)})"
        # argparse takes a percent sign, as in a path, for a place to fill in.
        group.add_argument(
            f"--{dashed(name)}",
            dest=name,
            metavar=value_shape(name, kind),
            help=text.replace("%", "%%"),
        )


def _value_too_many(rest: list[str], unknown: list[str], kinds: Mapping[str, Any]) -> ValueError:
    """The error for a value that follows another one.

    Args:
        rest: the arguments from which the settings were read.
        unknown: those that were none, all without dashes.
        kinds: type of each setting.
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
    """What a help text shows in the place of a setting's value, from its type."""
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
    """The names that settings take which are not listed beside them."""
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
    """A setting as an option spells it."""
    return name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as an option takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return value if isinstance(value, str) else str(value).lower()


T = TypeVar("T", int, float)


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def an_integer(text: str) -> int:
    """The type of an option that takes an integer."""
    return _number(int, "an integer", text)


def a_number(text: str) -> float:
    """The type of an option that takes a number."""
    return _number(float, "a number", text)


def _number(kind: type[T], what: str, text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None
