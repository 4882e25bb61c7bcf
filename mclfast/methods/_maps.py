"""Helpers that bring feature maps of different networks to one width and one size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d


def convolution_to_width(channels: int, wanted: int) -> nn.Module:
    """A 1x1 convolution [B, channels, h, w] -> [B, wanted, h, w]; the identity for equal widths."""
    return nn.Identity() if channels == wanted else nn.Conv2d(channels, wanted, 1)


def check_maps(maps: Sequence[Tensor], method: str) -> None:
    """Raises ValueError if some maps are rows of tokens and others have two dimensions.

    The grid that tokens come from is not known; averaged to the size of tokens, a map of another
    network would be compared with them at places that do not belong together.

    Args:
        maps: one map [B, c, h, w] per network, tokens as [B, c, N, 1].
        method: name of the method in the error message.
    """
    tokens = [m.shape[2] > 1 and m.shape[3] == 1 for m in maps]
    grids = [m.shape[3] > 1 for m in maps]
    lengths = {m.shape[2] for m, of_tokens in zip(maps, tokens, strict=True) if of_tokens}
    if (any(tokens) and any(grids)) or len(lengths) > 1:
        sizes = ", ".join(f"{m.shape[2]} x {m.shape[3]}" for m in maps)
        raise ValueError(
            f"cohort: expected maps of one kind for method {method}, got maps of tokens, N x 1, "
            f"beside others: {sizes}"
        )


def to_smallest(maps: Sequence[Tensor]) -> list[Tensor]:
    """Averages maps [B, c, h, w] down to the smallest height and the smallest width of them all."""
    size = (min(m.shape[2] for m in maps), min(m.shape[3] for m in maps))
    return [m if m.shape[2:] == size else adaptive_avg_pool2d(m, size) for m in maps]
