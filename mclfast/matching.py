"""Layer matching: learned weights of the stage pairs in layer-wise MCL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mclfast._checks import check_integer, check_stages, describe
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
        for m, stages in enumerate(feature_dims):
            if not isinstance(stages, Sequence):
                raise TypeError(
                    f"feature_dims[{m}]: expected the widths of the stages of a network, "
                    f"got {describe(stages)}"
                )
            for k, dim in enumerate(stages):
                check_integer(f"feature_dims[{m}][{k}]", dim, 1)
        check_integer("proj_dim", proj_dim, 1)
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
        features = check_stages("features", features, self.feature_dims)
        projected = [
            layer(feature)
            for layers, stages in zip(self.proj, features, strict=True)
            for layer, feature in zip(layers.children(), stages, strict=True)
        ]
        with torch.autocast(projected[0].device.type, enabled=False):
            nodes = torch.stack([unit_norm(p) for p in projected])
            return torch.sigmoid(torch.einsum("arp,brp->abr", nodes, nodes))
