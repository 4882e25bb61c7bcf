"""Numbers that are not finite are found at the step, named, and leave nothing behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.bad_steps import BadGradient, bad_loss
from helpers.equal_states import tensors
from helpers.small_cohort import batches, small_trainer
from mclfast.config import TrainConfig
from mclfast.execution.non_finite import Finding, NonFiniteError, Watch
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE = "networks.1.backbone.stage1.0.0"


def weight_of(trainer: Trainer) -> Tensor:
    return trainer.cohort.get_parameter(f"{STAGE}.weight")


def bad_image(trainer: Trainer, images: Tensor) -> None:
    images[2, 0, 3, 3] = math.nan


def bad_weight(trainer: Trainer, images: Tensor) -> None:
    with torch.no_grad():
        weight_of(trainer)[0, 0, 0, 0] = math.inf


def bad_features(trainer: Trainer, images: Tensor) -> None:
    module = trainer.cohort.get_submodule(STAGE)
    module.register_forward_hook(lambda *a: a[-1] * math.nan)


def bad_term(trainer: Trainer, images: Tensor) -> None:
    bad_loss(trainer, lambda _: True, math.inf)


def bad_gradient(trainer: Trainer, images: Tensor) -> None:
    module = trainer.cohort.get_submodule(STAGE)
    module.register_forward_hook(lambda *a: BadGradient.apply(a[-1]))


FOUND = {
    bad_image: ("nan in images, then in term ce", None),
    bad_weight: (f"inf in weight of cohort {STAGE}.weight, then in term ce", 1),
    bad_features: ("nan in features of peer 1, then in term ce", 1),
    bad_term: ("inf in term ce", None),
    # The last parameter that the backward pass comes to before the operation.
    bad_gradient: (f"nan in gradient of cohort {STAGE}.bias", 1),
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("spoil", FOUND, ids=lambda spoil: spoil.__name__)
def test_a_bad_step_is_named(spoil: Any, at_once: bool):
    trainer = small_trainer("baseline")
    step = trainer.train_step
    step.begin_epoch(0)
    step.watch = Watch(at_once=at_once)
    first, (images, batch), third = batches(trainer, 3)
    step(*first)
    spoil(trainer, images)
    with pytest.raises(NonFiniteError) as error:
        step(images, batch)
        assert not at_once
        # On a GPU the step after it tells.
        step(*third)
    text, peer = FOUND[spoil]
    if spoil is bad_weight and not at_once:
        # Once the update is made, weights show what they have become.
        text = "nan in features of peer 1, then in term ce"
    assert str(error.value.finding) == f"step 1 (epoch 1): {text}"
    assert error.value.finding.peer == peer
    assert error.value.images is (images if at_once else None)
    assert error.value.batch is batch
    assert error.value.before_update == at_once
    assert str(error.value).startswith("non_finite: expected finite numbers, got step 1 (epoch 1)")


@pytest.mark.parametrize("at_once", [True, False])
def test_the_last_step_is_read_by_check(at_once: bool):
    trainer = bad_loss(small_trainer("baseline"), lambda step: step == 0)
    trainer.train_step.watch = Watch(at_once=at_once)
    (only,) = batches(trainer, 1)
    if at_once:
        with pytest.raises(NonFiniteError, match="nan in term ce"):
            trainer.train_step(*only)
    else:
        trainer.train_step(*only)
        with pytest.raises(NonFiniteError, match="nan in term ce"):
            trainer.train_step.check()
    trainer.train_step.check()


def test_another_state_is_not_blamed_for_a_step_before_it():
    trainer = bad_loss(small_trainer("baseline"), lambda _: True)
    trainer.train_step.watch = Watch(at_once=False)
    state = copy.deepcopy(trainer.state())
    trainer.train_step(*batches(trainer, 1)[0])
    trainer.load_state(state)
    trainer.train_step.check()


def test_large_numbers_and_numbers_that_nobody_uses_are_no_fault():
    trainer = small_trainer("baseline")
    # The square of this gradient is infinite, and the maps take no part in the loss.
    trainer.cohort.get_submodule(STAGE).weight.register_hook(lambda g: torch.full_like(g, 1e30))
    compute = trainer.train_step.compute

    def with_bad_maps(*arguments: Any) -> Any:
        outputs, parts = compute(*arguments)
        return outputs._replace(maps=tuple(m * math.nan for m in outputs.maps)), parts

    trainer.train_step.compute = with_bad_maps
    trainer.train_step(*batches(trainer, 1)[0])
    assert trainer.train_step.skipped is None


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {path: copy.deepcopy(value) for path, value in tensors(trainer.state())}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("memory", ["ordinary", "sequential"])
@pytest.mark.parametrize("case", ["baseline", "mcl-bank", "ffl", "afd", "okddip"])
def test_nothing_of_a_bad_step_remains(case: str, memory: str):
    trainer = bad_loss(
        small_trainer(case, memory=memory, non_finite="skip"), lambda step: step == 2
    )
    step = trainer.train_step
    step.begin_epoch(0)
    *good, bad = batches(trainer, 3)
    for one in good:
        step(*one)
    before = state_of(trainer)
    step(*bad)
    assert step.skipped is not None and step.skipped.finding.first == "term ce"
    after = state_of(trainer)
    changed = {path for path in before if not same(before[path], after[path])}
    assert before.keys() == after.keys() and not changed
    step(*batches(trainer, 1)[0])
    assert step.skipped is None


def test_a_bad_bilevel_step_is_named_and_left_out():
    trainer = small_trainer("lmcl", bilevel_every=1, non_finite="skip")
    step, outer = trainer.train_step, trainer.method.outer_loss
    trainer.method.outer_loss = lambda *a: outer(*a) * math.nan
    step.begin_epoch(0)
    (images, batch) = batches(trainer, 1)[0]
    step(images, batch)
    before = state_of(trainer)
    step.bilevel(images, batch)
    after = state_of(trainer)
    assert not {path for path in before if not same(before[path], after[path])}
    finding = step.skipped.finding
    assert (finding.first, finding.term) == ("bilevel gradient 0 of method", "bilevel")


def test_gradients_that_overflow_in_fp16_are_the_scaler_s():
    trainer = small_trainer("baseline", amp="fp16")
    assert trainer.train_step.scaler.is_enabled()
    trainer.cohort.get_submodule(STAGE).weight.register_hook(lambda g: g * math.inf)
    before = weight_of(trainer).clone()
    trainer.train_step(*batches(trainer, 1)[0])
    assert torch.equal(weight_of(trainer), before)


def test_offloaded_peers_cannot_leave_a_step_out():
    with pytest.raises(ValueError, match="^non_finite: expected raise or rollback, as .* got skip"):
        TrainConfig(memory="sequential", offload="peers", non_finite="skip")


def test_offloaded_peers_are_watched_one_step_late():
    trainer = small_trainer("baseline", memory="sequential", offload="peers")
    bad_loss(trainer, lambda step: step == 1)
    step = trainer.train_step
    assert not step.watch.at_once
    first, second, third = batches(trainer, 3)
    step(*first)
    step(*second)
    with pytest.raises(NonFiniteError, match="got step 1 .*nan in term ce"):
        step(*third)


def test_a_finding_in_words():
    finding = Finding(3, 1, "nan", "logits of peer 0", 0, "distill")
    assert str(finding) == "step 3 (epoch 2): nan in logits of peer 0, then in term distill"
    assert str(Finding(3, 1, "inf", "the loss")) == "step 3 (epoch 2): inf in the loss"
