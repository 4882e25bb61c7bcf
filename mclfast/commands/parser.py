"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn, TypeVar

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
