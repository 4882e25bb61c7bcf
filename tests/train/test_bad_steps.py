"""What a run does about numbers that are not finite: end, leave the step out, or go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bad_steps import bad_loss
from helpers.command import call, error_of
from helpers.equal_states import tensors
from helpers.small_cohort import small_trainer
from mclfast.execution import step as step_module
from mclfast.execution.non_finite import NonFiniteError, Watch
from mclfast.methods import Baseline
from mclfast.train import checkpoint, evidence
from mclfast.train.evidence import EVIDENCE
from mclfast.train.folder import CHECKPOINT, METRICS
from mclfast.train.trainer import BAD_STEPS, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "train --data digits-full --train-per-class 4 --batch-size 20 --images-per-class 2 "
    "--device cpu --no-progress --method baseline --cohort resnet8 --epochs 3 --run-dir a"
).split()


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are read one step late from now on, as on a GPU."""
    monkeypatch.setattr(step_module, "Watch", lambda at_once: Watch(at_once=False))


def differing(a: Trainer, b: Trainer) -> set[str]:
    left, right = (dict(tensors(t.state() | {"left_out": ()})) for t in (a, b))
    assert left.keys() == right.keys()
    return {
        path
        for path, value in left.items()
        if not (
            torch.equal(value, right[path])
            if isinstance(value, torch.Tensor)
            else value == right[path]
        )
        and not path.endswith("/seconds")
    }


@pytest.mark.parametrize("timing", ["at once", "late"])
def test_raise_keeps_the_step_and_the_checkpoint(timing, tmp_path, monkeypatch):
    if timing == "late":
        late(monkeypatch)
    trainer = bad_loss(small_trainer("mcl", run_dir=tmp_path), lambda step: step == 13)
    with pytest.raises(NonFiniteError) as error:
        trainer.fit(progress=False)
    assert str(error.value) == (
        "non_finite: expected finite numbers, got step 13 (epoch 2): nan in term ce; try a "
        "smaller learning rate, clip_grad_norm, or non_finite skip or rollback; mclfast replay "
        f"{tmp_path} shows the step again"
    )
    kept = evidence.read(tmp_path)
    assert kept.finding == error.value.finding and kept.finding.step == 13
    rows = trainer.sampler.epoch(1)
    (images, labels, index), *_ = trainer.feed.batches(rows[3:], first_step=13)
    assert torch.equal(kept.images, images)
    assert torch.equal(kept.batch.index, index) and torch.equal(kept.batch.labels, labels)
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 10
    if timing == "late":
        assert kept.state is None
    else:
        assert kept.state is not None and kept.state["step"] == 13


def test_skip_equals_a_run_without_the_step(tmp_path):
    skipping = bad_loss(small_trainer("mcl-bank", non_finite="skip"), lambda step: step in (4, 5))
    result = skipping.fit(progress=False)
    without = small_trainer("mcl-bank", non_finite="skip")
    without._left_out = frozenset({4, 5})
    without.fit(progress=False)
    assert not differing(skipping, without)
    assert [row["skipped_steps"] for row in result.history] == [2, 0]


def test_means_of_an_epoch_are_over_the_steps_that_count():
    trainer = bad_loss(small_trainer("baseline", non_finite="skip", epochs=1), lambda s: s < 9)
    losses, take = [], trainer.train_step.compute

    def noted(*arguments: Any) -> Any:
        outputs, parts = take(*arguments)
        losses.append(float(parts["loss"].detach()))
        return outputs, parts

    trainer.train_step.compute = noted
    (row,) = trainer.fit(progress=False).history
    assert row["train_loss"] == pytest.approx(losses[9]) and row["skipped_steps"] == 9


def test_too_many_skips_in_a_row_end_the_run(tmp_path):
    trainer = small_trainer("baseline", non_finite="skip", run_dir=tmp_path)
    bad_loss(trainer, lambda step: step >= 3)
    with pytest.raises(NonFiniteError, match=f"the {BAD_STEPS} steps before it were left out as"):
        trainer.fit(progress=False)
    # The first of them is kept.
    assert evidence.read(tmp_path).finding.step == 3


@pytest.mark.parametrize("timing", ["at once", "late"])
@pytest.mark.parametrize("bad", [2, 14])
def test_rollback_leaves_the_step_out(bad, timing, tmp_path, monkeypatch):
    if timing == "late":
        late(monkeypatch)
    # A rare fault of the numbers would not come again; one of the batch would.
    trainer = bad_loss(
        small_trainer("mcl", non_finite="rollback", run_dir=tmp_path / "a", checkpoint_every=4),
        lambda step: step == bad,
    )
    result = trainer.fit(progress=False)
    assert [row["skipped_steps"] for row in result.history] == [int(bad == 2), int(bad == 14)]
    straight = small_trainer("mcl", non_finite="rollback", run_dir=tmp_path / "b")
    straight._left_out = frozenset({bad})
    monkeypatch.setattr(straight, "resume", lambda: False)
    straight.fit(progress=False)
    assert not {d for d in differing(trainer, straight) if "checkpoint_every" not in d}
    # A run that goes on later leaves it out, too.
    again = small_trainer("mcl", non_finite="rollback", run_dir=tmp_path / "a")
    assert again.resume() and again.state()["left_out"] == [bad]


def test_rollback_ends_where_it_does_not_help(tmp_path):
    trainer = small_trainer("baseline", non_finite="rollback", run_dir=tmp_path, train_per_class=16)
    assert len(trainer.sampler) == 20
    bad_loss(trainer, lambda step: step >= 21)
    with pytest.raises(NonFiniteError, match=f"{BAD_STEPS} rollbacks to step 20 did not help"):
        trainer.fit(progress=False)


def test_rollback_needs_a_folder():
    with pytest.raises(ValueError, match="^non_finite: expected raise or skip for a run without"):
        small_trainer("baseline", non_finite="rollback")


def test_an_epoch_without_a_good_step_ends_the_run(tmp_path):
    trainer = small_trainer("baseline", non_finite="skip")
    bad_loss(trainer, lambda step: step < 10)
    with pytest.raises(FloatingPointError, match="^non_finite: expected a step of epoch 1"):
        trainer.fit(progress=False)


def test_a_run_that_raised_may_go_on_and_skip(tmp_path):
    trainer = bad_loss(small_trainer("baseline", run_dir=tmp_path), lambda step: step == 13)
    with pytest.raises(NonFiniteError):
        trainer.fit(progress=False)
    other = small_trainer("baseline", run_dir=tmp_path, non_finite="skip")
    history = bad_loss(other, lambda step: step == 13).fit(progress=False).history
    assert "skipped_steps" not in history[0] and history[1]["skipped_steps"] == 1


# ---------------------------------------------------------------- mclfast replay


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("timing", ["at once", "late"])
def test_replay_reproduces_a_run_that_diverges(timing, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        if timing == "late":
            late(patch)
        message = error_of(capsys, *TINY, "--lr", "1e30", "--eval-every", "3")
    assert message.endswith("; mclfast replay a shows the step again")
    found = message.removeprefix("non_finite: expected finite numbers, got ").split("; try")[0]
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    assert call("replay", "a", "--no-progress") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["found"] == found
    assert lines["batch"].startswith("20 images, numbers ")
    assert lines["replay"] == "reproduced"
    assert lines["module"].startswith("cohort networks.0.backbone.")
    assert lines["module"].endswith("whose input is finite")
    assert ("again" in lines) == (timing == "late")
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


@pytest.mark.usefixtures("elsewhere")
def test_replay_names_the_operation_of_a_bad_gradient(monkeypatch, capsys):
    loss = Baseline.loss

    def bad(self: Any, outputs: Any, batch: Any) -> Any:
        parts = loss(self, outputs, batch)
        if batch.step == 3:
            # The derivative of a root at zero is infinite, and times zero NaN.
            zero = (outputs.final_logits[0] * 0).square().sum().sqrt()
            parts["loss"] = parts["loss"] + zero
        return parts

    monkeypatch.setattr(Baseline, "loss", bad)
    assert "got step 3 (epoch 2): nan in gradient of cohort" in error_of(capsys, *TINY)
    assert call("replay", "a", "--no-progress") == 0
    out = capsys.readouterr().out
    assert "replay   reproduced" in out and "module" not in out
    assert "backward Function 'PowBackward0' returned nan values in its 0th output" in out
    assert f'called in File "{__file__}", line ' in out
    # Without the fault nothing is found.
    monkeypatch.setattr(Baseline, "loss", loss)
    assert call("replay", "a", "--no-progress") == 1
    assert "replay   all numbers are finite: not reproduced" in capsys.readouterr().out


@pytest.mark.usefixtures("elsewhere")
def test_replay_of_a_run_that_kept_no_step(capsys):
    assert call(*TINY) == 0
    assert error_of(capsys, "replay", "a").startswith(
        f"path: expected the folder of a run with {EVIDENCE}, "
    )
    assert Path("a", METRICS).exists()
