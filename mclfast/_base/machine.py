"""The machine a run is on: its device, the memory still free there, the memory in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still get.

    On a GPU: what is free there, and what PyTorch holds and does not use. On a CPU: what the
    system has available, or less where a control group limits the process.

    Raises:
        OSError: a system that does not say.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return min(_available(), *_group_rooms(Path("/proc/self/cgroup").read_text()))


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _group_rooms(membership: str, root: Path = _CGROUPS) -> list[int]:
    """Room below the limit of each control group that the process is in; version 1 or 2.

    Args:
        membership: ``/proc/self/cgroup``, lines of "number:controllers:path".
        root: where the control groups are mounted.
    """
    rooms = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers == "":
            top, limit, used = root, "memory.max", "memory.current"
        else:
            continue
        # In a container the groups above its own are not there, and its own is the top.
        own = Path(os.path.normpath(f"{top}/{path}"))
        for group in (own, *own.parents):
            room = _room(group / limit, group / used)
            rooms += [] if room is None else [room]
            if group == top:
                break
    return rooms


def _room(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        # No such group, or "max": no limit.
        return None


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


def select_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} GPUs here, got {name!r}"
        )
    return device
