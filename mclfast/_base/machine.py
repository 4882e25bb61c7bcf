"""The machine of a run: its device, the memory still free there, the memory in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def select_device(name: str) -> torch.device:
    """The device that a name stands for; "auto" takes a GPU where there is one.

    Raises:
        ValueError: another name, or a GPU that is not there.
    """
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


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device.

    On a GPU they are the free memory of the GPU and the memory that PyTorch has reserved without
    using it. On a CPU they are the memory that the system reports as available, or less where a
    control group limits the process.

    Raises:
        OSError: the system does not report its memory.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return min(_available(), *group_rooms(Path("/proc/self/cgroup").read_text()))


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def group_rooms(membership: str, root: Path = _CGROUPS) -> list[int]:
    """Bytes below the limit of each control group that the process is in; version 1 or 2.

    Args:
        membership: text of ``/proc/self/cgroup``, lines of "number:controllers:path".
        root: folder that the control groups are mounted at.
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
        # A container does not see the groups above its own, which is then the top.
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
        # There is no such group, or its limit reads "max", which is none.
        return None


def process_memory(field: str) -> int:
    """Bytes that the process status gives for VmRSS (resident now) or VmHWM (its maximum).

    Raises:
        OSError: the system has no ``/proc``.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_resident() -> int | None:
    """Bytes of the largest resident memory so far, libraries included; None where unknown.

    ``ru_maxrss`` would not do: a process inherits the value of its parent.
    """
    try:
        return process_memory("VmHWM")
    except (OSError, StopIteration):
        return None
