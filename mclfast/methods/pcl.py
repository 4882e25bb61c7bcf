"""PCL: peer collaborative learning, with an ensemble of features and averaged peers as teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast._base.checks import check_not_negative
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.average import warmed_decay
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import kd_loss, mutual_kd_loss
from mclfast.methods._options import RampedDistillOptions
from mclfast.methods.base import Method, check_peers, prepared
from mclfast.methods.baseline import sum_cross_entropy


class PCL(Method):
    """The loss of arXiv 2006.04147 (section 3) for two networks or more.

    ``CE_e + sum_j CE_j + w(epoch) sum_j (KD(z_j <- z_e) + mean_{l != j} KD(z_j <- t_l))``: z_e are
    the logits of one linear classifier on the pooled features of all peers side by side, whose
    cross entropy reaches every peer; t_l those of peer l in the moving average of the cohort. Each
    peer, and its average, sees its own view of the images. w rises to ``distill_weight``.

    There is no code by the authors. The paper leaves some points open, which are chosen here: the
    average holds the BatchNorm statistics too and runs in evaluation mode; its decay is that of the
    mean teacher, ``min(1 - 1 / (step + 1), average_decay)``; temperature, weight and ramp-up are
    those of a public reproduction. The paper has three peers that share all but their last stage
    (``topology="shared_stem"``), with initial weights of their own there, and deploys the first.
    """

    views = "per_peer"
    uses_maps = False
    teacher = True

    @dataclass
    class Options(RampedDistillOptions):
        distill_weight: float = setting(1.0, "full weight of the distillation from both teachers")
        average_decay: float = setting(0.999, "largest share of the old values in the average")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_not_negative("distill_weight", self.distill_weight)
            if not 0 <= self.average_decay <= 1:
                raise ValueError(
                    f"average_decay: expected a value in [0, 1], got {self.average_decay}"
                )

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.classifier: nn.Linear | None = None
        self.ensemble_width = sum(stages[-1] for stages in feature_dims)

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "pcl", 2)
        self.classifier = nn.Linear(self.ensemble_width, setup.num_classes)

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Logits [B, C] of the classifier on the features of all peers."""
        return prepared(self.classifier)(torch.cat(outputs.final_features, dim=1))

    def teacher_decay(self, step: int) -> float:
        return warmed_decay(step, self.options.average_decay)

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o, logits = self.options, outputs.final_logits
        if outputs.teacher is None:
            raise ValueError("outputs: expected outputs of the moving average as teacher, got None")
        together = wide(self.ensemble(outputs))
        ce = sum_cross_entropy(outputs, batch.labels)
        ensemble_ce = cross_entropy(together, batch.labels)
        from_ensemble = torch.stack(
            [kd_loss(z, together, o.distill_temperature) for z in logits]
        ).sum()
        from_average = mutual_kd_loss(logits, outputs.teacher.final_logits, o.distill_temperature)
        weight = o.distill_weight * o.weight(batch.epoch)
        return {
            "loss": ce + ensemble_ce + weight * (from_ensemble + from_average),
            "ce": ce,
            "ensemble_ce": ensemble_ce,
            "ensemble_distill": from_ensemble,
            "average_distill": from_average,
        }
