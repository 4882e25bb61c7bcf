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
