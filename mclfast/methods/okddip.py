"""OKDDip: auxiliary peers learn from targets of their own, a group leader from them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import kd_loss_through_teacher
from mclfast.methods._options import RampedDistillOptions
from mclfast.methods.base import Method, check_peers
from mclfast.methods.baseline import sum_cross_entropy

_REDUCTION = 8


class PeerAttention(nn.Module):
    """Attention between the peers' features: the share that each takes from all, itself included.

    The shares are ``softmax_b((W_Q feature_a) . (W_K feature_b))`` per image, not scaled by the
    width, with projections to an eighth of the features' width and without bias.

    Args:
        feature_dim: width D of every peer's feature.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        width = max(1, feature_dim // _REDUCTION)
        self.query = nn.Linear(feature_dim, width, bias=False)
        self.key = nn.Linear(feature_dim, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, m, D] -> [B, m, m], rows sum to one."""
        queries, keys = wide(self.query(features)), wide(self.key(features))
        # Autocast would take a matrix product in half precision, where unscaled scores overflow.
        return torch.softmax((queries[:, :, None] * keys[:, None]).sum(-1), dim=-1)


class OKDDip(Method):
    """Two-level distillation between M - 1 >= 2 auxiliary peers and the last network, the leader.

    ``sum CE(all logits) + r(epoch) [sum_a KD(logits_a <- targets_a) + KD(leader <- mean of the
    auxiliary peers' logits)]``, with ``targets_a = sum_b A_ab logits_b`` and A a
    :class:`PeerAttention` on their pooled features. Teachers are not constants here: the attention
    learns through the targets only, and the peers learn from the leader's distillation too. The
    weight r is the sigmoid ramp-up of the published code.

    The networks are branches on a shared stem or independent, by the option ``topology``. The
    leader is the network to deploy. The auxiliary peers' features must be equally wide.

    Source: AAAI 2020, arXiv 1912.00350.
    """

    uses_maps = False

    @dataclass
    class Options(RampedDistillOptions):
        pass

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.attention = PeerAttention(feature_dims[0][-1])

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "okddip", 3)
        widths = [f.shape[1] for f in setup.example.final_features[:-1]]
        if len(set(widths)) > 1:
            raise ValueError(
                "cohort: expected features of one width for method okddip in all networks but "
                f"the last, got {widths}"
            )

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        temperature = self.options.distill_temperature
        auxiliary = self._auxiliary_logits(outputs)
        shares = self.attention(torch.stack(outputs.final_features[:-1], dim=1))
        targets = (shares[..., None] * auxiliary[:, None]).sum(2)  # [B, m, C]
        ce = sum_cross_entropy(outputs, batch.labels)
        peer_distill = torch.stack(
            [
                kd_loss_through_teacher(z, target, temperature)
                for z, target in zip(auxiliary.unbind(1), targets.unbind(1), strict=True)
            ]
        ).sum()
        leader_distill = kd_loss_through_teacher(
            outputs.final_logits[-1], auxiliary.mean(1), temperature
        )
        total = ce + self.options.weight(batch.epoch) * (peer_distill + leader_distill)
        return {
            "loss": total,
            "ce": ce,
            "peer_distill": peer_distill,
            "leader_distill": leader_distill,
        }

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """The mean of the auxiliary peers' logits, [B, C], as in the published code."""
        return self._auxiliary_logits(outputs).mean(1)

    @staticmethod
    def _auxiliary_logits(outputs: PeerOutputs) -> Tensor:
        """Logits [B, m, C] of the auxiliary peers, float32 or wider."""
        return torch.stack([wide(z) for z in outputs.final_logits[:-1]], dim=1)
