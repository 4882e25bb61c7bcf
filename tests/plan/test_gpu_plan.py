"""The plan against the peaks of PyTorch's allocator on a GPU; skipped where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.plan.chooser import choose
from mclfast.plan.estimate import Choice, estimate
from mclfast.plan.sizes_of_data import facts, facts_of
from mclfast.plan.stand_in import stand_in_step
from mclfast.train.builder import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("memory", ["ordinary", "checkpoint", "sequential"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", ["baseline", "lmcl", "mcl"])
def test_within_15_percent_of_the_peak(method, amp, memory):
    values = {
        "method": method,
        "cohort": "resnet32,resnet32,resnet32",
        "data": "glyphs100",
        "sampler": "shuffle",
        "batch_size": 128,
        "bilevel_every": 0,
        "device": "cuda",
        "amp": amp,
        "memory": memory,
    }
    if method == "mcl":
        values["loss"] = "bank"
    c = TrainConfig.from_values(values)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = build(c)
    index = torch.arange(c.batch_size, device="cuda")
    images = torch.randn(c.batch_size, *trainer.data.train.image_shape, device="cuda")
    batch = Batch(trainer.data.train.labels[index], index, 0, 0)
    trainer.cohort.train()
    for _ in range(2):
        trainer.train_step(images, batch)
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(images, batch)
    real = torch.cuda.max_memory_allocated() - before
    known = facts(c)
    plan = estimate(
        stand_in_step(c, known), known, Choice(memory, "none", amp), c.batch_size, device="cuda"
    )
    assert plan.step == pytest.approx(real, rel=0.15)


def test_auto_rehearses_on_the_gpu():
    c = TrainConfig.from_values({"method": "mcl", "device": "cuda", "cohort": "resnet8,resnet8"})
    trainer = build(dataclasses.replace(c, memory="auto"))
    assert trainer.train_step.memory == "ordinary"
    assert choose(trainer.train_step, facts_of(trainer.data), free=1000).memory in (
        "checkpoint",
        "sequential",
    )
