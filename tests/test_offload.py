"""Peers in host memory: the same training, one peer on the device at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from equal_states import assert_same, steps_of, tensors
from mclfast import methods
from mclfast.config import TrainConfig
from mclfast.export import WEIGHTS
from mclfast.offload import PeerOffload
from mclfast.train import Trainer
from small_cohort import CASES, batches, in_float64, small_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

OFFLOAD = {"memory": "sequential", "offload": "peers"}


def fits(case: str) -> bool:
    method = methods.method_class(CASES[case].get("method", case))
    return not method.teacher and "topology" not in CASES[case]


FITTING = [case for case in CASES if fits(case)]


@pytest.mark.parametrize("case", FITTING)
def test_steps_equal_the_ordinary_ones(case: str):
    want = steps_of(in_float64(small_trainer(case)), 4)
    got = steps_of(in_float64(small_trainer(case, **OFFLOAD)), 4)
    for part in ("losses", "state"):
        assert_same(got[part], want[part], 1e-9)
    assert want["state"]["optimizer"]["state"]


class CountingOffload:
    """Counts the values of copies on the device that are alive."""

    def __init__(self, offload: PeerOffload) -> None:
        self.now = self.most = self.copies = 0
        fetch = offload.fetch

        def counted(tensor: Tensor) -> Tensor:
            copy = fetch(tensor)
            self.copies += 1
            self.now += copy.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(copy.untyped_storage(), self.forget, copy.numel())
            return copy

        offload.fetch = counted  # type: ignore[method-assign]

    def forget(self, values: int) -> None:
        self.now -= values


def counted(trainer: Trainer) -> tuple[CountingOffload, int]:
    """A count for the trainer, and the values of the largest peer's parameters."""
    cohort = trainer.cohort
    assert cohort.offload is not None
    sizes = [
        sum(p.numel() for m in cohort.peer_modules(j) for p in m.parameters())
        for j in range(len(cohort.peers))
    ]
    return CountingOffload(cohort.offload), max(sizes)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_one_peer_at_a_time_is_on_the_device(amp: str):
    trainer = small_trainer("mcl", networks=4, amp=amp, **OFFLOAD)
    count, size = counted(trainer)
    homes = [p.data_ptr() for p in trainer.cohort.parameters()]
    before = [p.detach().clone() for p in trainer.cohort.parameters()]
    for images, batch in batches(trainer, 3):
        trainer.train_step(images, batch)
        assert count.now == 0
    # Parameters and momentum of one peer.
    assert size < count.most <= 2 * size
    assert [p.data_ptr() for p in trainer.cohort.parameters()] == homes
    assert not any(map(torch.equal, trainer.cohort.parameters(), before))
    assert all(p.grad is None for p in trainer.cohort.parameters())
    count.most = 0
    trainer._evaluate()
    assert count.now == 0 and count.most == size


def test_a_run_equals_one_that_keeps_its_peers_on_the_device(tmp_path: Path):
    settings: dict[str, Any] = {"weight_decay": 1e-2, "lr": 0.02}
    trainers = []
    for name, where in (("peers", OFFLOAD), ("none", {"memory": "sequential"})):
        # An epoch each way in turn: the checkpoints are the same.
        small_trainer("mcl", run_dir=tmp_path / name, **settings, **where).fit(
            progress=False, stop_after=1
        )
        last = small_trainer("mcl", run_dir=tmp_path / name, **settings, **OFFLOAD)
        last.fit(progress=False)
        trainers.append(last)
    one, other = (dict(tensors(t.state())) for t in trainers)
    for path, value in one.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(other[path], value, rtol=1e-4, atol=1e-4, msg=path)
    assert trainers[0].history[-1]["step"] == 2 * len(trainers[0].sampler)
    for j, peer in enumerate(trainers[0].cohort.peers):
        weights = load_file(tmp_path / "peers" / f"peer{j}" / WEIGHTS)
        assert all(torch.equal(weights[k], v) for k, v in peer.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "ordinary"}, "^memory: expected sequential with offload peers, got ordinary"),
        ({"topology": "tree"}, "^topology: expected independent with offload peers, got tree"),
        ({"clip_grad_norm": 1.0}, "^clip_grad_norm: expected none, .* got 1.0"),
        ({"amp": "fp16"}, "^amp: expected off or bf16, .* got fp16"),
    ],
)
def test_what_excludes_peers_in_host_memory(values: dict[str, Any], message: str):
    base: dict[str, Any] = {"method": "baseline", **OFFLOAD}
    TrainConfig.from_values(base)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_values(base | values)


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("pcl", {"topology": "independent"}, "^offload: expected none .* average .* with PCL"),
        ("moco-mcl", {}, "^offload: expected none .* got peers with MomentumMCL"),
        ("lmcl", {"bilevel_every": 5}, "^bilevel_every: expected 0 .* got 5 for LayerwiseMCL"),
    ],
)
def test_methods_that_need_all_peers_at_a_time(case: str, values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small_trainer(case, **values, **OFFLOAD)


def test_peers_that_share_modules_stay_on_the_device():
    cohort = small_trainer("one").cohort
    with pytest.raises(ValueError, match="^offload: expected none for peers that share modules"):
        PeerOffload(cohort, torch.device("cpu"))


def test_a_turn_ends_when_a_run_fails():
    trainer = small_trainer("baseline", **OFFLOAD)
    offload = trainer.cohort.offload
    assert offload is not None
    homes = [p.data_ptr() for p in trainer.cohort.parameters()]
    with pytest.raises(RuntimeError, match="size|channels"):
        trainer.cohort(torch.zeros(2, 7, 8, 8))
    assert [p.data_ptr() for p in trainer.cohort.parameters()] == homes
    with offload.present(1), pytest.raises(AssertionError, match="peer 1"), offload.present(0):
        pass
