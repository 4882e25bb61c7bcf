"""MCL-OKD: multi-view contrastive learning between networks and each other's memory banks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mclfast._base.checks import check_not_negative
from mclfast._base.settings import setting
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup, mean_logits
from mclfast.losses.banks import bank_nce_loss
from mclfast.losses.distillation import kd_loss
from mclfast.methods._banked import BankMethod
from mclfast.methods._options import DistillOptions
from mclfast.methods.base import check_peers
from mclfast.methods.baseline import sum_cross_entropy


class MCLOKD(BankMethod):
    """The loss of arXiv 2006.04093 (section 3) for two networks or more.

    ``ce_weight sum_a CE_a + distill_weight KD(z_M <- mean_a z_a) + nce_weight NCE``: only the last
    network is distilled, from the mean logits as a constant; NCE is
    :func:`mclfast.bank_nce_loss` over all ordered pairs of networks, with normalising constants
    estimated from each batch. The positive is the anchor's own entry; the published code can take
    an entry of its class instead. Embeddings are linear projections. The paper has results for four
    networks that share stem and first stages (``topology="shared_stem"``).
    """

    projection = "linear"

    @dataclass
    class Options(BankMethod.Options, DistillOptions):
        num_negatives: int = setting(256, "bank entries of other classes per anchor")
        ce_weight: float = setting(1.0, "weight of the cross entropies")
        distill_weight: float = setting(1.0, "weight of the distillation into the last network")
        nce_weight: float = setting(0.025, "weight of the noise-contrastive loss")

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("ce_weight", "distill_weight", "nce_weight"):
                check_not_negative(name, getattr(self, name))

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "mcl-okd", 2)
        super().prepare(setup)

    def sampling(self) -> dict[str, Any]:
        return {"num_positives": 0}

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o = self.options
        banks, (own, negatives) = self.contrast(batch)
        nce = bank_nce_loss(
            [stages[-1] for stages in outputs.embeddings],
            banks,
            torch.cat([own, negatives], dim=1),
            temperature=o.temperature,
            backend=o.backend,
        )
        ce = sum_cross_entropy(outputs, batch.labels)
        distill = kd_loss(outputs.final_logits[-1], mean_logits(outputs), o.distill_temperature)
        return {
            "loss": o.ce_weight * ce + o.distill_weight * distill + o.nce_weight * nce,
            "ce": ce,
            "distill": distill,
            "nce": nce,
        }
