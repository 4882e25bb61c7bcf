"""Time in turn, memory in a process of its own, and bytes saved for the backward pass."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mclfast import env
from mclfast.bench.problem import Case, Unavailable

MIB = 2**20
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Times of one provider, in milliseconds.

    Attributes:
        samples: every timed call.
        rounds: one number per round, the median of the round's calls.
    """

    samples: list[float]
    rounds: list[float]

    def quantile(self, q: float) -> float:
        """Linearly interpolated quantile of the samples."""
        ordered = sorted(self.samples)
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    def ratio(self, other: Timing) -> float:
        """How many times as long ``other`` takes: the median of the ratios within each round."""
        pairs = zip(other.rounds, self.rounds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def timed(call: Call, device: str) -> float:
    """Milliseconds of one call, until its work on the device is done."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    calls: Mapping[str, Call],
    *,
    device: str,
    budget: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
) -> dict[str, Timing]:
    """Times several calls in turn, so that a disturbance of the machine meets all of them.

    A round gives each call its turn, beginning with another one each time. In its turn a fast call
    runs several times, up to a tenth of the slowest call's time; a slow one runs once.

    Args:
        calls: the calls by name; each has run before (compilers, caches, thread pools) and runs
            once or twice more here before the rounds.
        device: "cpu" or "cuda".
        budget: seconds after which no further round begins.
        min_rounds, max_rounds: bounds of the number of rounds; the first holds past the budget.
    """
    names = list(calls)
    estimate = {}
    for name in names:
        estimate[name] = timed(calls[name], device)
        if estimate[name] < 1000:
            # The first call may pay for memory that the one before it released.
            estimate[name] = min(estimate[name], timed(calls[name], device))
    share = max(estimate.values()) / 10
    repeats = {n: max(1, min(20, int(share / max(estimate[n], 1e-6)))) for n in names}
    timings = {name: Timing([], []) for name in names}
    begin = time.perf_counter()
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() - begin > budget:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found = [timed(calls[name], device) for _ in range(repeats[name])]
            timings[name].samples.extend(found)
            timings[name].rounds.append(statistics.median(found))
    return timings


def saved_bytes(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that the graph of ``forward`` keeps for its backward pass, beyond the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # The graph must live until the sum is taken: freed memory would be counted twice.
        value = forward()
        total = sum(sizes.values())
    del value
    return total


def available_bytes(device: str) -> float:
    """Memory that a call may take; infinite where it cannot be found out."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    values = dict(line.split(":", 1) for line in lines)
    return float(values["MemAvailable"].split()[0]) * 1024


def cuda_peak(call: Call) -> int:
    """Bytes of device memory that a call needs above the level before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release() -> None:
    """Returns freed memory of this process to the system, where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, TypeError):
        # A C library without malloc_trim, or a system without CDLL(None).
        pass


def process_peak(case: Case, provider: str, timeout: float = 900) -> int:
    """Bytes of resident memory that calls of a provider need, measured in a fresh process.

    Raises:
        Unavailable: the process failed, or this system does not tell.
    """
    return child_peak({"case": asdict(case), "provider": provider}, timeout)


def probe_peak(size: int) -> int:
    """The figure of the same probe for a call that fills ``size`` bytes: a test of the probe."""
    return child_peak({"fill": size}, 120)


def child_peak(task: Mapping[str, object], timeout: float) -> int:
    """Bytes that a task of :mod:`mclfast.bench.peak` needs, measured in a fresh process.

    Raises:
        Unavailable: the process failed, or this system does not tell.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("peak memory of a process is measured on Linux only")
    # The child must measure this mclfast, also when it is a checkout.
    paths = [str(env.root()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    task = {**task, "threads": torch.get_num_threads()}
    try:
        result = subprocess.run(
            [sys.executable, "-m", "mclfast.bench.peak"],
            input=json.dumps(task),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"the memory probe took more than {timeout:.0f} s") from None
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"the memory probe failed with status {result.returncode}: {last}")
    return int(json.loads(result.stdout.splitlines()[-1])["peak_bytes"])
