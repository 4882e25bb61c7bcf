"""FFL: feature fusion learning, a classifier on the fused maps of two networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast._base.checks import check_not_negative
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup, mean_logits
from mclfast.losses.distillation import kd_loss
from mclfast.methods._maps import check_maps, convolution_to_width, to_smallest
from mclfast.methods._options import RampedDistillOptions
from mclfast.methods.base import Method, check_peers, prepared
from mclfast.methods.baseline import sum_cross_entropy


class FusionModule(nn.Module):
    """Fused logits of the last feature maps of two networks.

    The maps are concatenated and pass a 3x3 depthwise convolution and a 1x1 convolution to one
    map's width, each with BatchNorm and ReLU, then a global average pool and a linear layer. Maps
    that differ are first brought to the larger width by a 1x1 convolution and to the smaller size
    by averaging.

    Args:
        channels: number of channels of each map.
        num_classes: number of classes C.

    Source: arXiv 1904.09058, section 3.2.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        width = max(channels)
        both = width * len(channels)
        self.transfers = nn.ModuleList(convolution_to_width(c, width) for c in channels)
        self.layers = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both, bias=False),
            nn.BatchNorm2d(both),
            nn.ReLU(),
            nn.Conv2d(both, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, c_a, h_a, w_a] -> logits [B, C]."""
        own = [t(m) for t, m in zip(self.transfers, to_smallest(maps), strict=True)]
        return self.layers(torch.cat(own, dim=1))


class FFL(Method):
    """The loss of arXiv 1904.09058 (section 3) for exactly two networks.

    ``CE_1 + CE_2 + CE_f + w(epoch) (KD(z_1 <- z_f) + KD(z_2 <- z_f) + KD(z_f <- mean(z_1, z_2)))``
    with z_f the logits of a :class:`FusionModule`, w rising to 1 and every teacher a constant. The
    fused losses reach the networks through their maps. The ensemble is z_f, not the mean logits.

    The paper has results for equal networks and for networks that share stages. For maps that
    differ it names a regression layer without details, which is the module's 1x1 convolution here.
    """

    @dataclass
    class Options(RampedDistillOptions):
        fusion_weight_decay: float = setting(1e-5, "weight decay of the fusion module")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_not_negative("fusion_weight_decay", self.fusion_weight_decay)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.fusion: FusionModule | None = None

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "ffl", 2, exactly=True)
        check_maps(setup.example.maps, "ffl")
        self.fusion = FusionModule([m.shape[1] for m in setup.example.maps], setup.num_classes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        decay = self.options.fusion_weight_decay
        return [{"params": list(prepared(self.fusion).parameters()), "weight_decay": decay}]

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """The fused logits [B, C]."""
        return prepared(self.fusion)(outputs.maps)

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        temperature, logits = self.options.distill_temperature, outputs.final_logits
        fused = wide(self.ensemble(outputs))
        ce = sum_cross_entropy(outputs, batch.labels)
        fusion_ce = cross_entropy(fused, batch.labels)
        from_fusion = torch.stack([kd_loss(z, fused, temperature) for z in logits]).sum()
        from_mean = kd_loss(fused, mean_logits(outputs), temperature)
        weight = self.options.weight(batch.epoch)
        return {
            "loss": ce + fusion_ce + weight * (from_fusion + from_mean),
            "ce": ce,
            "fusion_ce": fusion_ce,
            "distill": from_fusion,
            "fusion_distill": from_mean,
        }
