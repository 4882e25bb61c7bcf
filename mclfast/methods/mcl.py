"""MCL: mutual contrastive learning between whole networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mclfast._base.checks import check_temperature
from mclfast._base.settings import setting
from mclfast.cohort.outputs import Batch, PeerOutputs, mean_logits
from mclfast.losses.distillation import kd_loss
from mclfast.methods._contrastive import ContrastiveMethod
from mclfast.methods.baseline import sum_cross_entropy


class MCL(ContrastiveMethod):
    """The loss of arXiv 2104.12565 for any number of networks, with one embedding each.

    ``sum_a CE_a + MCL``, with MCL the four terms between the networks. The option ``logit_distill``
    adds ``KD(logits_a <- mean of all logits)``, with a constant mean, for all networks or for the
    last one only. The published code adds it for the last one if there are more than two, and its
    mean has a gradient with banks. The paper has results for two independent networks, and for four
    that share stem and first stages (``topology="shared_stem"``).
    """

    @dataclass
    class Options(ContrastiveMethod.Options):
        logit_distill: Literal["none", "all", "last"] = setting(
            "none", "networks that also learn from the mean logits: none, all or last"
        )
        distill_temperature: float = setting(3.0, "softens the logits in logit distillation")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature("distill_temperature", self.distill_temperature)

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        contrastive = self.contrastive_objective(outputs, batch)
        parts = {"ce": sum_cross_entropy(outputs, batch.labels)}
        if self.options.logit_distill != "none":
            logits = outputs.final_logits
            teacher = mean_logits(outputs)
            students = logits if self.options.logit_distill == "all" else logits[-1:]
            parts["distill"] = torch.stack(
                [kd_loss(z, teacher, self.options.distill_temperature) for z in students]
            ).sum()
        total = torch.stack(list(parts.values())).sum() + contrastive.loss
        return {"loss": total, **parts, **contrastive.terms._asdict()}
