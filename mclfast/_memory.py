"""Resident memory of this process."""

from __future__ import annotations

from pathlib import Path


def status(field: str) -> int:
    """Bytes of an entry of the process status: VmRSS, resident now, or VmHWM, its maximum.

    Raises:
        OSError: a system without ``/proc``.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_resident() -> int | None:
    """Bytes of the largest resident memory so far, libraries included; None where unknown.

    Not ``ru_maxrss``: a process starts with that of its parent.
    """
    try:
        return status("VmHWM")
    except (OSError, StopIteration):
        return None
