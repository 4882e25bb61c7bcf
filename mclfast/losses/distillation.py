"""Knowledge distillation between logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from mclfast._base.tensors import wide
from mclfast.losses.reference import distribution_kl_rows


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """``T**2 * kl_div(log_softmax(student / T), softmax(teacher / T), reduction="batchmean")``.

    Args:
        student: [B, C] logits.
        teacher: [B, C] logits; gets no gradient.
        temperature: T > 0; the factor T**2 keeps the gradient's scale when T changes.

    Returns:
        0-dim, float32 or wider.

    The published code of ONE, FFL and OKDDip adds 1e-7 to every probability of the teacher; here
    both sides are log-softmax, which needs no such guard.

    Source: arXiv 1503.02531, section 2.
    """
    return distribution_kl_rows(wide(student), wide(teacher), temperature).mean()


def kd_loss_through_teacher(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """The value of :func:`kd_loss`, with gradient to the teacher as well.

    Args:
        student: [B, C] logits.
        teacher: [B, C] logits.
        temperature: T > 0.

    Returns:
        0-dim, float32 or wider.
    """
    log_p = torch.log_softmax(wide(teacher) / temperature, dim=-1)
    log_q = torch.log_softmax(wide(student) / temperature, dim=-1)
    # The entropy of the teacher is part of it: without it the gradient would be another.
    return temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def mutual_kd_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 3.0
) -> Tensor:
    """``sum_a mean_{b != a} kd_loss(students[a], teachers[b])``: each learns from all others.

    Args:
        students: logits [B, C] of M >= 2 networks.
        teachers: logits [B, C] of as many; get no gradient. The students' own for deep mutual
            learning, arXiv 1706.00384.
        temperature: of :func:`kd_loss`.

    Returns:
        0-dim, float32 or wider.
    """
    terms = [
        kd_loss(student, teacher, temperature)
        for a, student in enumerate(students)
        for b, teacher in enumerate(teachers)
        if a != b
    ]
    return torch.stack(terms).sum() / (len(students) - 1)
