"""Small trainable modules on the pooled features of a cohort.

``ProjectionHead`` makes embeddings of them, ``LogitAggregator`` one prediction of all stages of a
network, and ``LayerMatcher`` weights for pairs of stages. The last two serve layer-wise MCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mclfast._base.checks import (
    check_embeddings,
    check_integer,
    check_stages,
    describe,
    unknown_name,
)
from mclfast._base.tensors import unit_norm

PROJECTIONS = ("mlp", "linear")


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear, L2 normalisation; [B, in_dim] -> [B, dim] unit-norm, float32 or wider.

    The linear kind is one Linear and the normalisation.

    Args:
        in_dim: width of the pooled feature.
        dim: width of the embedding.
        eps: smallest norm that is divided by, see :func:`mclfast._base.tensors.unit_norm`.
        kind: "mlp" for two linear layers, "linear" for one.

    Raises:
        ValueError: the kind is unknown.

    Examples:
        >>> import torch
        >>> from mclfast import ProjectionHead
        >>> ProjectionHead(64, dim=16)(torch.randn(8, 64)).shape
        torch.Size([8, 16])

    Source: MCL, arXiv 2104.12565, section 3.1 (dim 128); linear: MCL-OKD, arXiv 2006.04093.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int = 128,
        eps: float = 1e-6,
        *,
        kind: Literal["mlp", "linear"] = "mlp",
    ) -> None:
        super().__init__()
        if kind not in PROJECTIONS:
            raise unknown_name("projection", kind, PROJECTIONS)
        if kind == "mlp":
            self.layers = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        else:
            self.layers = nn.Sequential(nn.Linear(in_dim, dim))
        self.eps = eps

    def forward(self, feature: Tensor) -> Tensor:
        projected = self.layers(feature)
        with torch.autocast(projected.device.type, enabled=False):
            return unit_norm(projected, self.eps)


class LogitAggregator(nn.Module):
    """A convex combination of a network's stage logits, with weights computed from its features.

    Per network: concatenated stage features -> Linear -> ReLU -> Linear -> softmax over stages.
    Features and logits are not detached: its cross entropy trains the backbone too
    (arXiv 2207.11518, section 3.5).

    Args:
        feature_dims: width D_a of each network's stage features.
        num_stages: number of stages, one number for all networks or one per network.

    Raises:
        ValueError: a width or a number of stages is below 1, or their counts differ.

    Examples:
        >>> import torch
        >>> from mclfast import LogitAggregator
        >>> aggregator = LogitAggregator([64, 32], num_stages=3)        # two networks
        >>> features = [[torch.randn(8, 64)] * 3, [torch.randn(8, 32)] * 3]
        >>> logits = [[torch.randn(8, 10)] * 3, [torch.randn(8, 10)] * 3]
        >>> [z.shape for z in aggregator(features, logits)]
        [torch.Size([8, 10]), torch.Size([8, 10])]
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
            features: pooled features, networks of stages of [B, D_a].
            logits: logits, networks of stages of [B, C].
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


class LayerMatcher(nn.Module):
    """Weights every pair of nodes by sigmoid(cos(P_a h_a, P_b h_b)), one linear map P per node.

    The weights lie in [0.269, 0.731] by construction: a pair is never switched off. They are
    trained by the bilevel step, not by the loss that they weight (arXiv 2207.11518, section 3.4).

    Args:
        feature_dims: width of the pooled feature of every stage, networks of stages.
        proj_dim: width of the space that the features are compared in.

    Raises:
        TypeError: ``feature_dims`` has a number where the widths of a network's stages belong.
        ValueError: a width is below 1.

    Examples:
        >>> import torch
        >>> from mclfast import LayerMatcher
        >>> matcher = LayerMatcher([[64, 64], [32, 32]], proj_dim=16)   # two networks of two stages
        >>> features = [[torch.randn(8, 64)] * 2, [torch.randn(8, 32)] * 2]
        >>> matcher(features).shape                                     # pair weights [N, N, B]
        torch.Size([4, 4, 8])
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
            Entries of two nodes of one network are computed too, but no loss uses them.
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
