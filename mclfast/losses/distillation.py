"""Knowledge distillation between logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from mclfast._base.checks import check_temperature
from mclfast._base.tensors import wide
from mclfast.losses.reference import distribution_kl_rows


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    # A teacher of another shape would be repeated without a word.
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected the shape of student {list(student.shape)}, "
            f"got {list(teacher.shape)}"
        )


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """``T**2 * kl_div(log_softmax(student / T), softmax(teacher / T), reduction="batchmean")``.

    Args:
        student: logits [B, C] of the network that learns.
        teacher: logits [B, C] to learn from; they get no gradient.
        temperature: divisor T > 0 of the logits; the factor T**2 keeps the gradient's scale when T
            changes.

    Returns:
        The loss, 0-dim, float32 or wider.

    The published code of ONE, FFL and OKDDip adds 1e-7 to every probability of the teacher; here
    both sides are log-softmax, which needs no such guard.

    Raises:
        ValueError: student and teacher differ in shape, or the temperature is not in [1e-6, 1e6].

    Source: arXiv 1503.02531, section 2.
    """
    _check_same_shape(student, teacher)
    check_temperature("temperature", temperature)
    return distribution_kl_rows(wide(student), wide(teacher), temperature).mean()


def kd_loss_through_teacher(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """The value of :func:`kd_loss`, with gradient to the teacher as well.

    Args:
        student: logits [B, C] of the network that learns.
        teacher: logits [B, C] to learn from.
        temperature: divisor T > 0 of the logits.

    Returns:
        The loss, 0-dim, float32 or wider.
    """
    _check_same_shape(student, teacher)
    check_temperature("temperature", temperature)
    log_p = torch.log_softmax(wide(teacher) / temperature, dim=-1)
    log_q = torch.log_softmax(wide(student) / temperature, dim=-1)
    # The teacher's entropy is part of the loss: it gets a gradient too.
    return temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def mutual_kd_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 3.0
) -> Tensor:
    """``sum_a mean_{b != a} kd_loss(students[a], teachers[b])``: each learns from all others.

    Args:
        students: logits [B, C] of M >= 2 networks.
        teachers: logits [B, C] of M networks; they get no gradient. For deep mutual learning
            (arXiv 1706.00384) they are the students' own.
        temperature: divisor T > 0 of the logits, as in :func:`kd_loss`.

    Returns:
        The loss, 0-dim, float32 or wider.
    """
    terms = [
        kd_loss(student, teacher, temperature)
        for a, student in enumerate(students)
        for b, teacher in enumerate(teachers)
        if a != b
    ]
    return torch.stack(terms).sum() / (len(students) - 1)
