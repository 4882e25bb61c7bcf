"""Checks of values that were read from a file: each error is one line that names file and field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mclfast._base.checks import shortened


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        words: the kind in words, for the error message.
        fits: whether a value is of the kind.
    """

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("text", lambda value: isinstance(value, str))
MAPPING = Kind(
    "names with values",
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
)


def integer(least: int, most: int = 2**63 - 1) -> Kind:
    """Whole numbers from ``least`` to ``most``."""
    return Kind(
        f"an integer >= {least}", lambda value: type(value) is int and least <= value <= most
    )


def number(least: float, most: float = math.inf, *, or_nan: bool = False) -> Kind:
    """Finite numbers from ``least`` to ``most``, and NaN where it stands for none."""
    upper = "" if most == math.inf else f" and <= {most:g}"

    def fits(value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        # An integer of any size can be compared; only a float can be infinite.
        return (or_nan and value != value) or (least <= value <= most and abs(value) < math.inf)

    return Kind(f"a number >= {least:g}{upper}", fits)


def list_of(kind: Kind, least: int = 0) -> Kind:
    """Lists of one kind with at least so many items."""
    return Kind(
        f"a list of {least} or more, each {kind.words}",
        lambda value: (
            isinstance(value, (list, tuple)) and len(value) >= least and all(map(kind.fits, value))
        ),
    )


def or_none(kind: Kind) -> Kind:
    """A kind, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.fits(value))


def check_fields(
    subject: str, place: object, values: Mapping[str, Any], fields: Mapping[str, Kind]
) -> None:
    """Accepts values that have all fields, each of its kind; other fields may be there too.

    Args:
        subject: begins the error message.
        place: where the values were read, such as the path of a file.
        values: values by name.
        fields: kind of each field.

    Raises:
        ValueError: a field is absent, or of another kind.
    """
    for name, kind in fields.items():
        if name not in values:
            raise ValueError(f"{subject}: expected {name} ({kind.words}) in {place}, got none")
        if not kind.fits(values[name]):
            got = shortened(" ".join(repr(values[name]).split()), 80)
            raise ValueError(f"{subject}: expected {kind.words} as {name} in {place}, got {got}")
