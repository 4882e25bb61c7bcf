"""Projection heads: pooled feature -> unit-norm embedding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mclfast._checks import unknown_name
from mclfast.normalize import unit_norm

PROJECTIONS = ("mlp", "linear")


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear, L2 normalisation; [B, in_dim] -> [B, dim] unit-norm, float32 or wider.

    The linear kind is one Linear and the normalisation.

    Args:
        in_dim: width of the pooled feature.
        dim: width of the embedding.
        eps: smallest norm divided by, see :func:`mclfast.normalize.unit_norm`.
        kind: "mlp" or "linear".

    Raises:
        ValueError: an unknown kind.

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
