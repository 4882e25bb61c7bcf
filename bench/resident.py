"""Memory of training steps on a CPU: predicted, given out by PyTorch's allocator, and resident.

    python -m mclfast.bench.resident

reads settings and a kind of figure as JSON from stdin and prints the bytes. The figures are what
two steps add to a trainer that has not trained yet. Resident memory is more than the allocator
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
from mclfast.bench.train_step import StepCase, noise
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.plan.estimate import HEAP, Choice, estimate
from mclfast.plan.rehearsal import rehearse_bilevel
from mclfast.plan.stand_in import facts_of
from mclfast.train.builder import assemble
from mclfast.train.trainer import Trainer

ALLOCATED, RESIDENT = "allocated", "resident"
KINDS = (ALLOCATED, RESIDENT)


def make_trainer(values: Mapping[str, Any], side: int) -> Trainer:
    """The trainer of a config's values on the CPU, on noise of 100 classes.

    Args:
        values: fields of the config and options of its method.
        side: of the images, in pixels.
    """
    fixed = {"data": "cifar100", "sampler": "shuffle", "device": "cpu", "bilevel_every": 0}
    data = noise(StepCase("ours", side=side))
    return assemble(data, TrainConfig.from_values(fixed | dict(values)))


def step_of(trainer: Trainer) -> Callable[[], None]:
    """One step of training on images drawn at random, with a bilevel step where the run has one."""
    c, views = trainer.config, trainer.method.view_count(len(trainer.cohort.peers))
    index = torch.arange(c.batch_size) % len(trainer.data.train)
    shape = c.batch_size, *trainer.data.train.image_shape
    images = [torch.randn(shape) for _ in range(views)]
    batch = Batch(trainer.data.train.labels[index], index, 0, 0)
    trainer.cohort.train()
    trainer.method.train()

    def step() -> None:
        trainer.train_step(images if views > 1 else images[0], batch)
        if trainer.meta_optimizer is not None and c.bilevel_every:
            trainer.bilevel_step(images[0], batch, c.lr)

    return step


def predicted(trainer: Trainer) -> tuple[int, int]:
    """What the plan says of the steps that :func:`step_of` gives, in bytes: tensors, process."""
    c, known = trainer.config, facts_of(trainer.data)
    choice = Choice(c.memory, c.offload, c.amp)
    bilevel = rehearse_bilevel(
        trainer, one_at_a_time=c.memory != "ordinary", amp=c.amp, batch_size=c.batch_size
    )
    plan = estimate(trainer, known, choice, c.batch_size, device="cpu", bilevel=False)
    step = plan.step - plan.kept
    tensors = max(bilevel, step - plan.parts[HEAP])
    return tensors, max(step, plan.with_bilevel(bilevel).bilevel - plan.kept)


def allocated(call: Callable[[], Any]) -> int:
    """Most bytes that the allocator had given out at a time, beyond those from before the call.

    What the call frees of those from before is not seen.
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
        kind: what to measure.
        values, side: as in :func:`make_trainer`.
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
    step_of(make_trainer(values | {"batch_size": 2}, task["side"]))()
    trainer = make_trainer(values, task["side"])
    step = step_of(trainer)
    if task["kind"] == RESIDENT:
        print(peak.measure(step))
        return
    step()
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    print(allocated(step) + sum(t.nbytes for t in state if isinstance(t, torch.Tensor)))


if __name__ == "__main__":
    main()
