"""A training step by itself: a loop of one's own around it, its state, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.equal_states import assert_same
from helpers.small_cohort import batches, small_trainer
from mclfast import Batch, Cohort, TrainStep, data, models
from mclfast.config import TrainConfig
from mclfast.execution.parts import make_sampler
from mclfast.methods import Baseline, LayerwiseMCL
from mclfast.train.trainer import Trainer

README = Path(__file__).resolve().parents[2] / "README.md"


def loop_of_the_readme() -> str:
    """The block of the README that trains by a loop around a step."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    (block,) = (b for b in blocks if "TrainStep(" in b)
    return block


def test_the_loop_of_the_readme_trains_as_the_trainer_does():
    """Same networks, same batches: the same weights, statistics and momentum, bit for bit."""
    settings = {
        "epochs": 2,
        "batch_size": 20,
        "images_per_class": 2,
        "train_per_class": 4,
        "bilevel_every": 2,
        "device": "cpu",
    }
    settings = {**settings, "augment": False, "lr": 0.05}
    config = TrainConfig.from_values(settings)
    digits = data.load("digits", train_per_class=4)

    def cohort() -> Cohort:
        torch.manual_seed(0)
        return Cohort([models.resnet8(num_classes=10, in_channels=1) for _ in range(2)])

    peers = cohort()
    trainer = Trainer(peers, LayerwiseMCL(peers.feature_dims), digits, config)
    trainer.fit(progress=False)

    class Loader:
        """Batches of an epoch, as a DataLoader gives them: images, labels, sample numbers."""

        def __init__(self) -> None:
            self.feed, self.epoch = trainer.feed, 0
            self.sampler = make_sampler(config, digits.train, 10)

        def __len__(self) -> int:
            return len(self.sampler)

        def __iter__(self) -> Any:
            first, rows = self.epoch * len(self), self.sampler.epoch(self.epoch)
            self.epoch += 1
            return iter(self.feed.batches(rows, first_step=first))

    names = {
        "cohort": cohort(),
        "config": config,
        "train_labels": digits.train.labels,
        "image_shape": digits.train.image_shape,
        "loader": Loader(),
    }
    exec(loop_of_the_readme(), names)
    assert_same(names["step"].state_dict(), trainer.train_step.state_dict(), 0.0)
    assert names["loader"].epoch == 2 and trainer.step == 4


@pytest.mark.parametrize("case", ["lmcl-bank", "afd", "moco-mcl", "pcl"])
def test_a_state_dict_goes_on_where_it_was_taken(case: str):
    whole, cut = small_trainer(case), small_trainer(case)
    first, second = batches(whole, 2)
    for trainer in (whole, cut):
        torch.manual_seed(3)
        trainer.train_step(*first)
    other = small_trainer(case)
    for parameter in other.train_step.parameters:
        parameter.data.add_(1.0)
    other.train_step.load_state_dict(cut.train_step.state_dict())
    for trainer in (whole, other):
        torch.manual_seed(4)
        trainer.train_step(*second)
    assert_same(other.train_step.state_dict(), whole.train_step.state_dict(), 0.0)


def make_step(**settings: Any) -> TrainStep:
    torch.manual_seed(0)
    cohort = Cohort([models.resnet8(num_classes=10) for _ in range(2)])
    config = TrainConfig.from_values(
        {"device": "cpu", "batch_size": 20, "images_per_class": 2} | settings
    )
    return TrainStep(
        cohort,
        LayerwiseMCL(cohort.feature_dims),
        config,
        labels=torch.arange(40) % 10,
        image_shape=(3, 32, 32),
    )


def test_memory_auto_needs_a_choice():
    with pytest.raises(ValueError, match="^memory: expected ordinary, .*got auto"):
        make_step(memory="auto")
    step = make_step()
    with pytest.raises(ValueError, match="^memory: expected one of checkpoint, .*got 'half'"):
        step.set_memory("half")
    step.set_memory("sequential")
    assert step.memory == "sequential"


def test_a_bilevel_step_of_a_method_without_one():
    trainer = small_trainer("dml")
    with pytest.raises(ValueError, match="^method: expected .* bilevel step trains, got "):
        trainer.train_step.bilevel(*batches(trainer, 1)[0])
    assert not trainer.train_step.has_bilevel


def test_the_bilevel_step_takes_the_rate_of_the_epoch():
    images = torch.randn(20, 3, 32, 32)
    batch = Batch(torch.arange(20) % 10, torch.arange(20), 0, 0)
    found = []
    for lr in (None, 0.05):
        step = make_step(lr=0.05)
        assert step.begin_epoch(0) == 0.05
        step.bilevel(images, batch, lr)
        found.append([p.detach().clone() for p in step.method.meta_parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cohort": [1]}, TypeError, "^cohort: expected a Cohort, got list"),
        ({"method": "lmcl"}, TypeError, "^method: expected a Method, got 'lmcl'"),
        ({"config": {}}, TypeError, "^config: expected a TrainConfig, got dict"),
        ({"labels": [0, 1]}, TypeError, "^labels: expected an integer tensor .* got list"),
        ({"labels": torch.ones(4)}, TypeError, "^labels: expected an integer tensor"),
        ({"labels": torch.ones(4, 1).long()}, TypeError, r"^labels: .*of shape \[4, 1\]"),
        ({"labels": torch.tensor([0, 1]).bool()}, TypeError, "^labels: .*got bool tensor"),
        (
            {"labels": torch.tensor([0, 10])},
            ValueError,
            r"^labels: .*\[0, 10\), got 10 at position 1",
        ),
        ({"image_shape": 32}, ValueError, "^image_shape: expected three sizes .* got 32"),
        ({"image_shape": (32, 32)}, ValueError, "^image_shape: expected three sizes"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str):
    cohort = Cohort([models.resnet8(num_classes=10)])
    arguments = {
        "cohort": cohort,
        "method": LayerwiseMCL(cohort.feature_dims),
        "config": TrainConfig(device="cpu"),
        "labels": torch.arange(20) % 10,
        "image_shape": (3, 32, 32),
    }
    with pytest.raises(error, match=message):
        TrainStep(**arguments | change)


@pytest.mark.parametrize(
    ("labels", "index", "error", "message"),
    [
        (torch.zeros(4, 1).long(), torch.arange(4), ValueError, r"^labels: .*\[B\], got \[4, 1\]"),
        (torch.zeros(4).int(), torch.arange(4), TypeError, "^labels: expected an int64 .*int32"),
        ([0, 1], torch.arange(2), TypeError, "^labels: expected an int64 .*got list"),
        (torch.zeros(4).long(), torch.arange(3), ValueError, r"^index: .*\[4\], got \[3\]"),
        (torch.zeros(4).long(), torch.zeros(4), TypeError, "^index: expected an int64 tensor"),
    ],
)
def test_wrong_batches(labels: Any, index: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Batch(labels, index, 0, 0)


@pytest.mark.parametrize("label", [-100, -1, 10, 10**9])
def test_labels_that_cross_entropy_would_leave_out(label: int):
    step = make_step()
    step.begin_epoch(0)
    labels = torch.arange(20) % 10
    labels[3] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        step(torch.zeros(20, 3, 32, 32), Batch(labels, torch.arange(20), 0, 0))


def test_labels_of_any_integer_kind():
    losses = []
    for kind in (torch.int64, torch.uint8, torch.uint16, torch.uint64):
        torch.manual_seed(0)
        cohort = Cohort([models.resnet8(num_classes=10)])
        config = TrainConfig(device="cpu", batch_size=4, images_per_class=2, method="baseline")
        labels = torch.arange(8) % 4
        step = TrainStep(
            cohort,
            Baseline(cohort.feature_dims),
            config,
            labels=labels.to(kind),
            image_shape=(3, 32, 32),
        )
        step.begin_epoch(0)
        batch = Batch(labels[:4], torch.arange(4), 0, 0)
        losses.append(step(torch.ones(4, 3, 32, 32), batch)["loss"].item())
    assert len(set(losses)) == 1


def test_an_epoch_outside_the_schedule():
    step = make_step(epochs=3)
    for epoch in (-1, 3):
        with pytest.raises(ValueError, match=r"^epoch: expected an integer in \[0, 3\), got "):
            step.begin_epoch(epoch)


def test_a_state_of_another_method_changes_nothing():
    trainer, other = small_trainer("lmcl"), small_trainer("baseline")
    before = {k: v.clone() for k, v in trainer.cohort.state_dict().items()}
    with pytest.raises(RuntimeError):
        trainer.train_step.load_state_dict(other.train_step.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in trainer.cohort.state_dict().items())


def test_offloaded_peers_run_in_sequence_alone():
    trainer = small_trainer("dml", memory="sequential", offload="peers")
    with pytest.raises(ValueError, match="^memory: expected sequential with offload peers, got o"):
        trainer.train_step.set_memory("ordinary")
    assert trainer.train_step.memory == "sequential"
    with pytest.raises(ValueError, match="^cohort: expected peers on a device"):
        Trainer(trainer.cohort, trainer.method, trainer.data, TrainConfig(device="cpu"))
