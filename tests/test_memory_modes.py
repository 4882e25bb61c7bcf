"""Memory modes of a step: all equal the ordinary one, in gradients, buffers and random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equal_states import assert_same, steps_of, tensors
from mclfast import checkpoint, methods
from mclfast.train import CHECKPOINT, Trainer
from mclfast.types import Batch
from small_cohort import CASES, in_float64, small_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["checkpoint", "sequential"]


def test_every_method_has_a_case():
    named = {values.get("method", name) for name, values in CASES.items()}
    assert named == set(methods.available())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_ordinary_one(case: str, mode: str):
    ordinary = in_float64(small_trainer(case))
    other = in_float64(small_trainer(case, memory=mode))
    want, got = steps_of(ordinary, 1), steps_of(other, 1)
    assert_same(got, want, 1e-12)
    # Statistics are updated once, from the same values in the same order.
    for (name, a), (_, b) in zip(
        ordinary.cohort.named_buffers(), other.cohort.named_buffers(), strict=True
    ):
        assert torch.equal(a, b), name
        if name.endswith("num_batches_tracked"):
            assert int(a) > 0
    assert any(g is not None and g.any() for g in want["grads"].values())
    assert torch.equal(want["state"]["rng"]["cpu"], got["state"]["rng"]["cpu"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_ordinary_ones(case: str, mode: str):
    want = steps_of(in_float64(small_trainer(case, clip_grad_norm=0.5)), 4)
    got = steps_of(in_float64(small_trainer(case, clip_grad_norm=0.5, memory=mode)), 4)
    assert_same(got, want, 1e-9)


# ---------------------------------------------------------------- resuming within an epoch


def interrupted(trainer: Trainer, step: int) -> None:
    """Trains until a step is about to begin, and leaves as Ctrl-C does."""
    run = trainer.train_step

    def train_step(images: Any, batch: Batch) -> dict[str, Tensor]:
        if batch.step == step:
            raise KeyboardInterrupt
        return run(images, batch)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)


@pytest.mark.parametrize("case", ["lmcl", "kdcl-general", "moco-mcl", "pcl"])
def test_resuming_within_an_epoch_equals_the_uninterrupted_run(case: str, tmp_path: Path):
    settings: dict[str, Any] = {"memory": "sequential", "epochs": 2, "checkpoint_every": 3}
    whole = small_trainer(case, **settings)
    per_epoch = len(whole.sampler)
    assert per_epoch % 3 and per_epoch > 7
    whole.fit(progress=False)

    # Once in each epoch, at a step after the last checkpoint in it.
    for stop in (4, per_epoch + 5):
        interrupted(small_trainer(case, run_dir=tmp_path, **settings), stop)
        torch.rand(5)  # Another process would not stand at the same random number either.
        saved = checkpoint.load(tmp_path / CHECKPOINT)
        assert saved["step"] == stop - stop % 3
        assert saved["epoch_so_far"]["totals"] and saved["epoch_so_far"]["seconds"] > 0
    last = small_trainer(case, run_dir=tmp_path, **settings)
    last.fit(progress=False)
    want, got = (dict(tensors(t.state())) for t in (whole, last))
    assert want.keys() == got.keys()
    for path, value in want.items():
        same = torch.equal(got[path], value) if isinstance(value, Tensor) else got[path] == value
        assert same or path.endswith("/seconds"), path
    assert got["/history/1/seconds"] > 0 and not last.state()["epoch_so_far"]["totals"]


def test_checkpoints_within_an_epoch_are_those_asked_for(tmp_path: Path, monkeypatch):
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append(state["step"]))
    trainer = small_trainer("baseline", run_dir=tmp_path, epochs=2, checkpoint_every=5)
    assert len(trainer.sampler) == 10
    trainer.fit(progress=False)
    # At steps 10 and 20 the checkpoints of the epochs.
    assert saved == [5, 10, 15, 20]


def test_no_checkpoint_within_an_epoch_holds_weights_that_are_not_finite(tmp_path: Path):
    trainer = small_trainer("baseline", run_dir=tmp_path, checkpoint_every=4)
    run = trainer.train_step

    def train_step(images: Any, batch: Batch) -> dict[str, Tensor]:
        parts = run(images, batch)
        if batch.step == 7:
            next(trainer.cohort.parameters()).data.fill_(float("nan"))
        return parts

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="^lr: expected a finite loss and weights"):
        trainer.fit(progress=False)
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 4


@pytest.mark.parametrize("mode", ["ordinary", *MODES])
def test_a_run_may_go_on_in_another_mode(mode: str, tmp_path: Path):
    first = small_trainer("mcl", run_dir=tmp_path, checkpoint_every=3, memory="sequential")
    interrupted(first, 5)
    trainer = small_trainer("mcl", run_dir=tmp_path, memory=mode)
    assert trainer.fit(progress=False).history[-1]["step"] == 2 * len(trainer.sampler)
