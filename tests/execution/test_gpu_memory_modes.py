"""Memory modes and peers in host memory on a GPU; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.equal_states import assert_same, steps_of
from helpers.small_cohort import batches, in_float64, small_trainer
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OFFLOAD = {"memory": "sequential", "offload": "peers"}
SETTINGS = [{"memory": "checkpoint"}, {"memory": "sequential"}, OFFLOAD]


def on_gpu(case: str, **values: Any) -> Trainer:
    return small_trainer(case, device="cuda", **values)


@pytest.mark.parametrize("settings", SETTINGS, ids=["checkpoint", "sequential", "offload"])
@pytest.mark.parametrize("case", ["lmcl", "mcl-bank", "afd"])
def test_steps_equal_the_ordinary_ones(case: str, settings: dict[str, Any]):
    want = steps_of(in_float64(on_gpu(case)), 3)
    got = steps_of(in_float64(on_gpu(case, **settings)), 3)
    for part in ("losses", "state"):
        assert_same(got[part], want[part], 1e-8)


def test_bilevel_steps_with_peers_in_host_memory():
    found = []
    for settings in ({}, OFFLOAD):
        trainer = in_float64(on_gpu("lmcl", bilevel_every=1, **settings))
        torch.manual_seed(5)
        for images, batch in batches(trainer, 2):
            trainer.train_step(images, batch)
            trainer.train_step.bilevel(images, batch, 0.05)
        found.append([p.detach().cpu() for p in trainer.method.meta_parameters()])
    assert_same(found[1], found[0], 1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_peers_wait_in_pinned_memory(amp: str, channels_last: bool):
    trainer = on_gpu("mcl", amp=amp, channels_last=channels_last, **OFFLOAD)
    steps_of(trainer, 2)
    for p in trainer.cohort.parameters():
        assert p.is_pinned()
        assert trainer.train_step.optimizer.state[p]["momentum_buffer"].is_pinned()
    assert all(b.is_cuda for b in trainer.cohort.buffers())
    assert min(trainer.evaluate().peers) >= 0


def test_memory_does_not_grow_with_the_peers():
    def peak(networks: int, **values: Any) -> int:
        trainer = on_gpu(
            "dml", networks=networks, batch_size=40, images_per_class=4, blocks=8, **values
        )
        first, second = batches(trainer, 2)
        trainer.train_step(*first)
        trainer.train_step.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train_step(*second)
        return torch.cuda.max_memory_allocated() - before

    grown = peak(6) - peak(2)
    for settings in SETTINGS[1:]:
        assert peak(6, **settings) - peak(2, **settings) < 0.1 * grown
