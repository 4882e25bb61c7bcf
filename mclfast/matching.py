"""Layer matching: learned weights of the stage pairs in layer-wise MCL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mclfast._checks import check_embeddings
from mclfast.normalize import unit_norm


class LayerMatcher(nn.Module):
    """Weights every pair of nodes by sigmoid(cos(P_a h_a, P_b h_b)), one linear map P per node.

    The weights lie in [0.269, 0.731] by construction: a pair is never switched off. They are
    trained by the bilevel step, not by the loss that they weight (arXiv 2207.11518, section 3.4).

    Args:
        feature_dims: width of the pooled feature of every stage, networks of stages.
        proj_dim: width of the space the features are compared in.
    """

    def __init__(self, feature_dims: Sequence[Sequence[int]], proj_dim: int = 128) -> None:
        super().__init__()
        self.feature_dims = [list(stages) for stages in feature_dims]
        self.proj = nn.ModuleList(
            nn.ModuleList(nn.Linear(dim, proj_dim) for dim in stages) for stages in feature_dims
        )

    def forward(self, features: Sequence[Sequence[Tensor]]) -> Tensor:
        """Pair weights of a batch.

        Args:
            features: pooled features, networks of stages of [B, feature_dims[m][k]].

        Returns:
            [N, N, B] in float32 or wider, symmetric in its first two axes; N nodes, network-major.
            Entries of two nodes of one network are computed too, and used by no loss.
        """
        got = [len(stages) for stages in features]
        want = [len(stages) for stages in self.feature_dims]
        if got != want:
            raise ValueError(f"features: expected {want} stages per network, got {got}")
        projected = []
        layers = (layer for stages in self.proj for layer in stages.children())
        for m, stages in enumerate(features):
            for k, feature in enumerate(stages):
                check_embeddings(f"features[{m}][{k}]", feature, ["B", self.feature_dims[m][k]])
                projected.append(next(layers)(feature))
        with torch.autocast(projected[0].device.type, enabled=False):
            nodes = torch.stack([unit_norm(p) for p in projected])
            return torch.sigmoid(torch.einsum("arp,brp->abr", nodes, nodes))
