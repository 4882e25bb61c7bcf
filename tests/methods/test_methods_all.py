"""What every method stands: a batch of one image, half precision, classes that a batch lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.every_method import METHODS, first_batch, trainer_of
from mclfast import LayerMatcher
from mclfast.cohort.outputs import PeerOutputs, mean_logits
from mclfast.methods.baseline import sum_cross_entropy
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def check_weights(trainer: Trainer) -> None:
    modules = (trainer.cohort, trainer.method)
    assert all(bool(p.isfinite().all()) for m in modules for p in m.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_image(name):
    values: dict[str, Any] = {"batch_size": 1, "images_per_class": 1, "sampler": "shuffle"}
    if name == "moco-mcl":
        values["norm_parts"] = 1
    trainer = trainer_of(name, **values)
    if name == "one":
        with pytest.raises(ValueError, match="^batch_size: expected at least 2 for method one, "):
            trainer.train_step(*first_batch(trainer))
        return
    parts = trainer.train_step(*first_batch(trainer))
    assert all(bool(value.isfinite()) for value in parts.values())
    check_weights(trainer)
    # An image alone in its batch has nothing to be contrasted with there.
    if name in ("mcl", "lmcl"):
        assert parts["vcl"] == parts["icl"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_fp16_is_that_in_full_precision(name):
    trainer = trainer_of(name, amp="fp16")
    images, batch = first_batch(trainer)
    full = trainer.method.loss(trainer.train_step.outputs(images, batch), batch)
    found = trainer.train_step(images, batch)
    check_weights(trainer)
    for key, value in full.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], value, rtol=0.02, atol=2e-3, msg=key)


def test_what_follows_a_step_gets_constants(monkeypatch):
    trainer, given = trainer_of("mcl"), []
    monkeypatch.setattr(trainer.method, "after_step", lambda outputs, batch: given.append(outputs))
    trainer.train_step(*first_batch(trainer))
    (outputs,) = given
    own = (outputs.final_logits, outputs.final_features, [e for (e,) in outputs.embeddings])
    assert not any(x.requires_grad for tensors in own for x in tensors)


def test_what_a_network_puts_out_itself_is_its_last_stage():
    stages = [tuple(torch.full((1, 2), 10.0 * a + k) for k in range(3)) for a in range(2)]
    outputs = PeerOutputs(tuple(stages), tuple(stages), ())
    for last in (outputs.final_features, outputs.final_logits):
        assert [float(x[0, 0]) for x in last] == [2, 12]


def test_weights_of_the_matcher_are_computed_in_float32():
    torch.manual_seed(0)
    matcher = LayerMatcher([[6], [6]], 16)
    with torch.autocast("cpu", torch.bfloat16):
        weights = matcher([[torch.randn(5, 6)], [torch.randn(5, 6)]])
    assert weights.dtype == torch.float32
    one = torch.full((2, 5), 1.0).sigmoid()
    torch.testing.assert_close(weights.diagonal().T, one, rtol=0, atol=1e-6)


def test_mean_and_cross_entropy_of_logits_in_half_precision_are_wide():
    logits = torch.randn(3, 5, 4).mul(8).bfloat16()
    half, full = (PeerOutputs((), tuple((z,) for z in x), ()) for x in (logits, logits.float()))
    assert torch.equal(mean_logits(half), logits.float().mean(0))
    labels = torch.arange(5) % 4
    assert torch.equal(sum_cross_entropy(half, labels), sum_cross_entropy(full, labels))
