"""Memory sizes as text: "8GiB" to bytes, and bytes to "1.46 GiB"."""

from __future__ import annotations

import re

_BINARY = ("", "KiB", "MiB", "GiB", "TiB")
#: Bytes of each unit that a size can be written in.
UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str, argument: str = "size") -> int:
    """Bytes of a size such as "8GiB", "500 MB" or "123456".

    Args:
        text: a number >= 0 and a unit of :data:`UNITS`; without a unit, a number of bytes. Upper
            and lower case are told apart, because "Gb" can mean bits.
        argument: name that the error message begins with.

    Raises:
        ValueError: the text is not such a size, or is less than one byte.
    """
    match = _NUMBER.fullmatch(text)
    unit = "" if match is None else match[2] or "B"
    if match is None or unit not in UNITS:
        close = [u for u in UNITS if u.lower() == unit.lower()]
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{argument}: expected a number and a unit, as 8GiB or 500MB, got {text!r}{hint}"
        )
    size = int(float(match[1]) * UNITS[unit])
    if size < 1:
        raise ValueError(f"{argument}: expected at least one byte, got {text!r}")
    return size


def format_bytes(size: float) -> str:
    """A size with three digits or so in a binary unit, such as "1.46 GiB"."""
    power = 0
    while abs(size) >= 999.5 and power < len(_BINARY) - 1:
        size, power = size / 1024, power + 1
    if power == 0:
        return f"{size:.0f} B"
    digits = 0 if abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {_BINARY[power]}"
