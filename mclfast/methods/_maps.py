"""Helpers that bring feature maps of different networks to one width and one size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d


def convolution_to_width(channels: int, wanted: int) -> nn.Module:
    """A 1x1 convolution [B, channels, h, w] -> [B, wanted, h, w]; the identity for equal widths."""
    return nn.Identity() if channels == wanted else nn.Conv2d(channels, wanted, 1)


def to_smallest(maps: Sequence[Tensor]) -> list[Tensor]:
    """Averages maps [B, c, h, w] down to the smallest height and the smallest width of them all."""
    size = (min(m.shape[2] for m in maps), min(m.shape[3] for m in maps))
    return [m if m.shape[2:] == size else adaptive_avg_pool2d(m, size) for m in maps]
