"""Per-network ensemble of the stage classifiers in layer-wise MCL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mclfast._checks import check_embeddings, check_integer, check_stages


class LogitAggregator(nn.Module):
    """A convex combination of a network's stage logits, with weights computed from its features.

    Per network: concatenated stage features -> Linear -> ReLU -> Linear -> softmax over stages.
    Features and logits are not detached: its cross entropy trains the backbone too
    (arXiv 2207.11518, section 3.5).

    Args:
        feature_dims: width D_a of each network's stage features.
        num_stages: number of stages, one number for all networks or one per network.
    """

    def __init__(self, feature_dims: Sequence[int], num_stages: int | Sequence[int]) -> None:
        super().__init__()
        for m, dim in enumerate(feature_dims):
            check_integer(f"feature_dims[{m}]", dim, 1)
        counts = [num_stages] * len(feature_dims) if isinstance(num_stages, int) else [*num_stages]
        if len(counts) != len(feature_dims):
            raise ValueError(
                f"num_stages: expected one number or {len(feature_dims)}, got {len(counts)}"
            )
        for count in counts:
            check_integer("num_stages", count, 1)
        self.feature_dims = list(feature_dims)
        self.num_stages = counts
        self.proj_heads = nn.ModuleList(
            nn.Sequential(nn.Linear(n * dim, dim), nn.ReLU(), nn.Linear(dim, n), nn.Softmax(dim=1))
            for dim, n in zip(feature_dims, counts, strict=True)
        )

    def forward(
        self, features: Sequence[Sequence[Tensor]], logits: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """Aggregated logits, one [B, C] per network.

        Args:
            features: networks of stages of [B, D_a].
            logits: networks of stages of [B, C].
        """
        widths = zip(self.feature_dims, self.num_stages, strict=True)
        features = check_stages("features", features, [[dim] * n for dim, n in widths])
        logits = check_stages("logits", logits, [["C"] * n for n in self.num_stages])
        for m, stages in enumerate(logits):
            shape = [features[m][0].shape[0], stages[0].shape[1]]
            for k, stage in enumerate(stages):
                check_embeddings(f"logits[{m}][{k}]", stage, shape)
        return [
            (head(torch.cat(f, dim=1))[:, :, None] * torch.stack(z, dim=1)).sum(1)
            for head, f, z in zip(self.proj_heads, features, logits, strict=True)
        ]
