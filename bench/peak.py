"""The process in which the peak memory of a call is measured: ``python -m mclfast.bench.peak``.

Reads a task as JSON from stdin, runs the call twice and prints how far the resident memory rose
above the level before. The high-water mark is reset just before the calls, after a call at a tiny
shape has loaded libraries and started threads. Memory that an implementation keeps between calls
(buffers of its threads at the real shape, say) therefore counts. A compiled baseline runs once at
the real shape first, or the compiler's own memory would count.

The mark is VmHWM and not ``ru_maxrss``: a process starts with the ``ru_maxrss`` of its parent.
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
    # Freed memory that stays resident would be used again unseen.
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
    # Two calls: the optimiser's state is there from the second on.
    if case.device != "cuda":
        return measure(call)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Reads the task, measures, prints."""
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
