"""The process in which the peak memory of a call is measured: ``python -m mclfast.bench.peak``.

The process reads a task as JSON from stdin, runs the call twice, and prints by how much the
resident memory rose. A call at a tiny shape first loads libraries and starts threads; then the
high-water mark is reset. Memory that an implementation keeps between calls at the real shape, such
as buffers of its threads, therefore counts. A compiled baseline first runs once at the real shape,
so that the compiler's own memory does not count.

The mark is VmHWM, as a process inherits the ``ru_maxrss`` of its parent.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mclfast._base.machine import process_memory
from mclfast.bench.cases import PROVIDERS, make_inputs
from mclfast.bench.measure import release
from mclfast.bench.problem import Case, step
from mclfast.bench.train_step import StepCase, Steps, tiny


def measure(call: Callable[[], object]) -> int:
    """Bytes by which two calls raise the resident memory above the present level."""
    # Freed memory that stays resident could be used again without a rise.
    release()
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    for _ in range(2):
        call()
    return max(0, process_memory("VmHWM") - before)


def _case_call(task: dict[str, object]) -> Callable[[], object]:
    values = task["case"]
    assert isinstance(values, dict)
    case = Case(**values)
    provider = next(p for p in PROVIDERS[case.op] if p.name == task["provider"])

    def build(at: Case) -> Callable[[], object]:
        inputs = make_inputs(at)
        return step(at, inputs, provider.build(at, inputs))

    if provider.name != "compiled":
        tiny = dataclasses.replace(
            case, m=min(case.m, 2), l=1, b=8, k=min(case.k, 16), n=min(case.n, 256)
        )
        build(tiny)()
    call = build(case)
    if provider.name == "compiled":
        call()
    return call


def _train_step_peak(values: dict[str, object]) -> int:
    case = StepCase(**values)  # type: ignore[arg-type]
    Steps(tiny(case)).whole()
    call = Steps(case).whole
    # Two calls, as the optimiser's state exists from the second on.
    if case.device != "cuda":
        return measure(call)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Reads a task from stdin, measures it and prints the bytes as JSON."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    if "train_step" in task:
        print(json.dumps({"peak_bytes": _train_step_peak(task["train_step"])}))
        return
    if "fill" in task:
        size = task["fill"]
        call: Callable[[], object] = lambda: torch.ones(size, dtype=torch.uint8)  # noqa: E731
        torch.ones(1, dtype=torch.uint8)
    else:
        call = _case_call(task)
    print(json.dumps({"peak_bytes": measure(call)}))


if __name__ == "__main__":
    main()
