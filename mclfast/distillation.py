"""Knowledge distillation between logits."""

from __future__ import annotations

from torch import Tensor

from mclfast.reference import distribution_kl_rows, wide


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """``T**2 * kl_div(log_softmax(student / T), softmax(teacher / T), reduction="batchmean")``.

    Args:
        student: [B, C] logits.
        teacher: [B, C] logits; gets no gradient.
        temperature: T > 0; the factor T**2 keeps the gradient's scale when T changes.

    Returns:
        0-dim, float32 or wider.

    Source: arXiv 1503.02531, section 2.
    """
    return distribution_kl_rows(wide(student), wide(teacher), temperature).mean()
