"""Distillation between logits of different shapes is refused."""

from __future__ import annotations

import pytest
import torch

from mclfast.losses.distillation import kd_loss, kd_loss_through_teacher


@pytest.mark.parametrize("loss", [kd_loss, kd_loss_through_teacher])
@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (5,)])
def test_a_teacher_of_another_shape_is_refused(loss, shape):
    with pytest.raises(ValueError, match="teacher: expected the shape of student"):
        loss(torch.zeros(4, 5), torch.zeros(shape))


@pytest.mark.parametrize("loss", [kd_loss, kd_loss_through_teacher])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(loss, temperature):
    with pytest.raises(ValueError, match=r"^temperature: expected a number in \[1e-6, 1e6\]"):
        loss(torch.randn(4, 5), torch.randn(4, 5), temperature)
