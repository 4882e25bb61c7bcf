"""Peaks of real training steps: of PyTorch's allocator, and of a process's resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mclfast.config import TrainConfig
from mclfast.train import Trainer, build
from mclfast.types import Batch

#: What makes glibc give every freed tensor back at once: its heap leaves no gaps then.
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def step_of(trainer: Trainer) -> Callable[[], Any]:
    """One step of training on images drawn at random, with a bilevel step where the run has one."""
    c, views = trainer.config, {"one": 1, "per_peer": len(trainer.cohort.peers), "query_key": 2}
    index = torch.arange(c.batch_size) % len(trainer.data.train)
    shape = c.batch_size, *trainer.data.train.image_shape
    images = [torch.randn(shape) for _ in range(views[trainer.method.views])]
    batch = Batch(trainer.data.train.labels[index], index, 0, 0)
    trainer.cohort.train()
    trainer.method.train()

    def step() -> None:
        trainer.train_step(images if len(images) > 1 else images[0], batch)
        if trainer.meta_optimizer is not None and c.bilevel_every:
            trainer.bilevel_step(images[0], batch, c.lr)

    return step


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

    collect(found.profiler.kineto_results.experimental_event_tree())
    live = most = 0
    for _, size in sorted(sizes, key=lambda one: one[0]):
        live += size
        most = max(most, live)
    return most


def resident(values: dict[str, Any], environment: dict[str, str]) -> int:
    """Bytes by which steps raise the resident memory of a process that has built the trainer."""
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(values), text=True, capture_output=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def main() -> None:
    from mclfast.benchmark.peak import measure

    torch.set_num_threads(1)
    values = json.load(sys.stdin)
    # Libraries are loaded by a small run.
    step_of(build(TrainConfig.from_values(values | {"batch_size": 2})))()
    step = step_of(build(TrainConfig.from_values(values)))
    print(measure(step))


if __name__ == "__main__":
    main()
