"""KDCL: collaborative learning from one teacher, built from all networks on their own views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mclfast._base.checks import check_not_negative, check_positive
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import kd_loss
from mclfast.methods._options import DistillOptions
from mclfast.methods._simplex import best_mixture, relative_to_label
from mclfast.methods.base import Method, check_peers
from mclfast.methods.baseline import sum_cross_entropy


class KDCL(Method):
    """``sum_a CE(logits_a) + w sum_a KD(logits_a <- teacher)``, M >= 2 networks, equal or not.

    Each network draws its own augmentation of the same images. The teacher is a constant:

    * ``naive``: per image, the logits of the network with the least cross entropy.
    * ``linear``: the convex combination of the logits with the least cross entropy over the batch,
      to 1e-4 nats (:func:`mclfast.methods._simplex.best_mixture`).
    * ``minlogit``: per class, the least logit relative to that of the true class.
    * ``general``: a combination by the correlation of the networks' errors on training images kept
      back, C_ij = E[(softmax_i - label) . (softmax_j - label)], renewed before every epoch: weights
      C^-1 1, scaled to sum one; some may be negative. C gets a ridge on its diagonal.

    No code was published. Three choices are made here: ``general`` combines logits as the other
    teachers do, the share of images kept back, and the ridge. Temperature and weight are those
    reported for the paper, which could not be checked.

    Source: CVPR 2020, "Online Knowledge Distillation via Collaborative Learning", section 3.
    """

    views = "per_peer"
    uses_maps = False
    weights: Tensor

    @dataclass
    class Options(DistillOptions):
        teacher: Literal["naive", "linear", "minlogit", "general"] = setting(
            "linear", "how the networks' logits make the teacher's"
        )
        distill_temperature: float = setting(2.0, "softens the logits in logit distillation")
        distill_weight: float = setting(1.0, "weight of distillation")
        holdout_share: float = setting(
            0.1, "general: share of the training images kept back for the weights"
        )
        ridge: float = setting(1e-3, "general: added to the correlation's diagonal, times its mean")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_not_negative("distill_weight", self.distill_weight)
            check_positive("ridge", self.ridge)
            if not 0 < self.holdout_share < 1:
                raise ValueError(
                    f"holdout_share: expected a value in (0, 1), got {self.holdout_share}"
                )

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        count = len(feature_dims)
        self.register_buffer("weights", torch.full((count,), 1 / count, dtype=torch.float64))

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "kdcl", 2)

    def holdout(self) -> float:
        return self.options.holdout_share if self.options.teacher == "general" else 0.0

    def before_epoch(self, logits: Tensor | None, labels: Tensor | None) -> None:
        if logits is not None and labels is not None:
            self.weights.copy_(general_weights(logits, labels, self.options.ridge))

    @property
    def repeatable(self) -> bool:
        # The solver behind the best mixture may not be recordable.
        return bool(self.options.teacher != "linear")

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o = self.options
        teacher = self._teacher(outputs, batch.labels)
        ce = sum_cross_entropy(outputs, batch.labels)
        distill = torch.stack(
            [kd_loss(z, teacher, o.distill_temperature) for z in outputs.final_logits]
        ).sum()
        return {"loss": ce + o.distill_weight * distill, "ce": ce, "distill": distill}

    @torch.no_grad()
    def _teacher(self, outputs: PeerOutputs, labels: Tensor) -> Tensor:
        """Logits [B, C] of the teacher."""
        logits = torch.stack([wide(z) for z in outputs.final_logits])  # [M, B, C]
        match self.options.teacher:
            case "naive":
                losses = torch.stack([cross_entropy(z, labels, reduction="none") for z in logits])
                rows = torch.arange(len(labels), device=labels.device)
                return logits[losses.argmin(0), rows]
            case "minlogit":
                return relative_to_label(logits, labels).amin(0)
            case "linear":
                weights = best_mixture(logits, labels)
            case _:
                weights = self.weights
        return (weights.to(logits.dtype)[:, None, None] * logits).sum(0)


def general_weights(logits: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """Weights [M] of the teacher ``general``, in float64 and with sum one.

    Args:
        logits: logits [M, H, C] of the networks for the images kept back.
        labels: classes [H] of these images.
        ridge: factor on the mean of the correlation's diagonal, added to the diagonal; without it,
            networks that err alike would make the correlation singular.
    """
    labels = labels.to(logits.device)
    errors = torch.softmax(logits.double(), dim=-1) - one_hot(labels, logits.shape[-1])
    flat = errors.flatten(1)
    correlation = flat @ flat.T / len(labels)
    # Networks without any error have a correlation of zero.
    correlation /= correlation.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    correlation.diagonal().add_(ridge)
    weights = torch.linalg.solve(correlation, torch.ones_like(correlation[0]))
    return weights / weights.sum()
