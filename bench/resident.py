"""Memory of training steps on a CPU: predicted, given out by PyTorch's allocator, and resident.

    python -m mclfast.bench.resident

reads settings and a kind of figure as JSON from stdin and prints the bytes. The figures are what
two steps add to networks that have not been trained yet. Resident memory is more than the allocator
gives out: freed blocks leave gaps in the heap of the C library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mclfast.bench import peak
from mclfast.bench.train_step import step_of
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.execution.step import TrainStep
from mclfast.plan.estimate import HEAP, Choice, estimate
from mclfast.plan.rehearsal import rehearse_bilevel
from mclfast.plan.sizes_of_data import DataFacts

ALLOCATED, RESIDENT = "allocated", "resident"
KINDS = (ALLOCATED, RESIDENT)


def make_step(values: Mapping[str, Any], side: int) -> TrainStep:
    """The training step of a config's values on the CPU, for 100 classes.

    Args:
        values: fields of the config and options of its method.
        side: height and width of the images, in pixels.
    """
    fixed = {"data": "cifar100", "sampler": "shuffle", "device": "cpu", "bilevel_every": 0}
    return step_of(TrainConfig.from_values(fixed | dict(values)), classes=100, side=side)


def steps_of(step: TrainStep) -> Callable[[], None]:
    """A step on images drawn at random and, where the run has them, a bilevel step."""
    c, views = step.config, step.method.view_count(len(step.cohort.peers))
    index = torch.arange(c.batch_size) % step.num_samples
    images = [torch.randn(c.batch_size, *step.image_shape) for _ in range(views)]
    batch = Batch(index % step.cohort.num_classes, index, 0, 0)
    step.cohort.train()
    step.method.train()

    def steps() -> None:
        step(images if views > 1 else images[0], batch)
        if step.has_bilevel:
            step.bilevel(images[0], batch)

    return steps


def predicted(step: TrainStep) -> tuple[int, int]:
    """Bytes that the plan names for the steps of :func:`steps_of`: tensors, and the process."""
    c, n = step.config, step.num_samples
    known = DataFacts("noise", n, n, step.cohort.num_classes, step.image_shape, in_memory=True)
    choice = Choice(c.memory, c.offload, c.amp)
    bilevel = rehearse_bilevel(
        step, one_at_a_time=c.memory != "ordinary", amp=c.amp, batch_size=c.batch_size
    )
    plan = estimate(step, known, choice, c.batch_size, device="cpu", bilevel=False)
    added = plan.step - plan.kept
    tensors = max(bilevel, added - plan.parts[HEAP])
    return tensors, max(added, plan.with_bilevel(bilevel).bilevel - plan.kept)


def allocated(call: Callable[[], Any]) -> int:
    """Most bytes that the allocator had given out at a time, beyond those from before the call.

    Memory from before that the call frees is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    sizes: list[tuple[int, int]] = []

    def collect(events: Any) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    collect(found.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    live = most = 0
    for _, size in sorted(sizes, key=lambda one: one[0]):
        live += size
        most = max(most, live)
    return most


def in_child(
    kind: str, values: Mapping[str, Any], side: int, environment: Mapping[str, str]
) -> int:
    """Bytes of a kind in :data:`KINDS`, from a process of its own.

    Args:
        kind: the figure to measure.
        values, side: the arguments of :func:`make_step`.
        environment: variables of the process, all of them.

    Raises:
        RuntimeError: the process failed; with what it printed.
    """
    task = {"kind": kind, "values": values, "side": side, "threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "mclfast.bench.resident"],
        input=json.dumps(task),
        text=True,
        capture_output=True,
        env=dict(environment),
    )
    if done.returncode:
        raise RuntimeError(f"{kind}: the process that measures memory failed\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Reads the task, measures, prints."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    values = task["values"]
    # Libraries are loaded by a small run.
    steps_of(make_step(values | {"batch_size": 2}, task["side"]))()
    step = make_step(values, task["side"])
    steps = steps_of(step)
    if task["kind"] == RESIDENT:
        print(peak.measure(steps))
        return
    steps()
    state = [t for s in step.optimizer.state.values() for t in s.values()]
    print(allocated(steps) + sum(t.nbytes for t in state if isinstance(t, torch.Tensor)))


if __name__ == "__main__":
    main()
