"""CL-ILR: collaborative learning of the heads of a tree, each from the mean of all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import kd_loss
from mclfast.methods._options import DistillOptions
from mclfast.methods.base import Method, check_peers
from mclfast.methods.baseline import sum_cross_entropy


class CLILR(Method):
    """``sum_a [(1 - w) CE(logits_a) + w KD(logits_a <- mean of all others)]``, M >= 2, w = 0.5.

    The mean is a constant. The cohort's option ``topology`` sets the parts that the networks share,
    a tree in the paper. Wherever a path splits, its gradient is divided by the number of branches
    there (the published code divides by 2 whatever that number is).

    Source: NeurIPS 2018, arXiv 1805.11761, sections 3.1 and 3.2; temperature 2 and w as in the
    comparisons of MCL-OKD (arXiv 2006.04093).
    """

    rescale_gradients = True
    uses_maps = False

    @dataclass
    class Options(DistillOptions):
        distill_temperature: float = setting(2.0, "softens the logits in logit distillation")
        distill_weight: float = setting(
            0.5, "weight of distillation, in [0, 1]; that of the labels is the rest"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.distill_weight <= 1:
                raise ValueError(
                    f"distill_weight: expected a value in [0, 1], got {self.distill_weight}"
                )

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "cl-ilr", 2)

    @property
    def repeatable(self) -> bool:
        return True

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o = self.options
        logits = torch.stack([wide(z) for z in outputs.final_logits])  # [M, B, C]
        others = (logits.sum(0) - logits) / (len(logits) - 1)
        ce = sum_cross_entropy(outputs, batch.labels)
        distill = torch.stack(
            [
                kd_loss(z, mean, o.distill_temperature)
                for z, mean in zip(logits, others, strict=True)
            ]
        ).sum()
        total = (1 - o.distill_weight) * ce + o.distill_weight * distill
        return {"loss": total, "ce": ce, "distill": distill}
