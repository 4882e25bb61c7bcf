"""ONE: branches on a shared stem learn from their gated ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import kd_loss
from mclfast.methods._options import RampedDistillOptions
from mclfast.methods.base import Method, check_peers
from mclfast.methods.baseline import sum_cross_entropy
from mclfast.models.staged import global_average_pool


class BranchGate(nn.Module):
    """Share of every branch in the ensemble, ``softmax(ReLU(BatchNorm(Linear(pooled map))))``.

    Branches whose normalised value is not positive get equal shares, as in the published code.

    Args:
        channels: number of channels of the map that all branches start from.
        branches: number of branches M.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, shared: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, M], rows sum to one; ValueError for B = 1 in training."""
        if self.training and len(shared) == 1:
            raise ValueError(
                "batch_size: expected at least 2 for method one, whose gate normalises over the "
                "batch, got 1"
            )
        scores = self.norm(self.linear(global_average_pool(shared)))
        return torch.softmax(wide(scores.relu()), dim=1)


class ONE(Method):
    """``sum_a CE(logits_a) + CE(ensemble) + r(epoch) sum_a KD(logits_a <- ensemble)``, M >= 2.

    The ensemble is the sum of the branches' logits, each times its gate. It is a constant in the
    distillation, so that the gate learns from the ensemble's cross entropy only. The weight r is
    the sigmoid ramp-up of the published code. The networks must share at least their stem (option
    ``topology``); the paper has three that share all stages but the last, and deploys the first.

    Source: NeurIPS 2018, arXiv 1806.04606, section 3.
    """

    @dataclass
    class Options(RampedDistillOptions):
        pass

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.gate: BranchGate | None = None

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "one", 2)
        shared = setup.example.shared
        if shared is None:
            raise ValueError(
                "topology: expected shared_stem or tree for method one, whose gate needs a map "
                "shared by all networks, got networks that share none"
            )
        self.gate = BranchGate(shared.shape[1], len(setup.example.logits))

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        ensemble = self.ensemble(outputs)
        ce = sum_cross_entropy(outputs, batch.labels)
        ensemble_ce = cross_entropy(ensemble, batch.labels)
        distill = torch.stack(
            [kd_loss(z, ensemble, self.options.distill_temperature) for z in outputs.final_logits]
        ).sum()
        total = ce + ensemble_ce + self.options.weight(batch.epoch) * distill
        return {"loss": total, "ce": ce, "ensemble_ce": ensemble_ce, "distill": distill}

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """The gated sum of the branches' logits, [B, C]."""
        if self.gate is None:
            raise RuntimeError("ensemble: expected prepare() to be called before, got no gate")
        assert outputs.shared is not None
        shares = self.gate(outputs.shared)  # [B, M]
        logits = torch.stack([wide(z) for z in outputs.final_logits], dim=1)  # [B, M, C]
        return (shares[..., None] * logits).sum(1)
