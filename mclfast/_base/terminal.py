"""Text for a terminal: names of files and folders hold no escape sequences when they are shown.

A name may hold any byte, and a terminal acts on some of them: it changes colours, moves the cursor
over what was written, or sets its title.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with every character that is not shown spelt out, such as ``\x1b`` for escape.

    Marks that turn the direction of writing are among them, and so are the bytes of a file's name
    that are no text.

    Args:
        text: any text.
        keep: control characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class _Printable:
    """A text stream that is written to by :func:`printable`."""

    def __init__(self, stream: TextIO, keep: str) -> None:
        self._stream = stream
        self._keep = keep

    def write(self, text: str) -> int:
        self._stream.write(printable(text, self._keep))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """A block in which what is written to stdout and stderr is made printable.

    It is the one place for this: whoever prints a name in a command need not think of it.
    """
    streams = sys.stdout, sys.stderr
    # Progress bars go back to the start of their line.
    kept = ("\n\t", "\n\t\r")
    sys.stdout, sys.stderr = (
        cast(TextIO, _Printable(stream, keep)) for stream, keep in zip(streams, kept, strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
