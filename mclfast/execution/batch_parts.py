"""Running a cohort on parts of a batch, in another order if wanted, with outputs as of the whole.

Batch normalisation then takes its statistics from one part at a time, as on each GPU of a
distributed run. Shuffling has an effect only together with parts: statistics of the whole batch do
not depend on the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mclfast.cohort.outputs import PeerOutputs, merged


def shuffled_order(count: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """A permutation int64 [count], a pure function of seed and step on a device of one kind."""
    digest = hashlib.blake2b(f"shuffle {seed} {step}".encode(), digest_size=4).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(count, device=device, generator=generator)


def forward_in_parts(
    cohort: Callable[[Any], PeerOutputs],
    images: Tensor | Sequence[Tensor],
    parts: int = 1,
    order: Tensor | None = None,
) -> PeerOutputs:
    """The outputs for images [B, C, H, W], or for a list of views of them.

    Args:
        cohort: run once for each part.
        images: one tensor [B, C, H, W] for all peers, or a list with a view for each.
        parts: number of parts, consecutive and of equal size.
        order: int64 [B], the images in the order they are dealt to the parts; the outputs are in
            that of the images.

    Raises:
        ValueError: a batch that cannot be cut into equal parts.
    """
    views = [images] if isinstance(images, Tensor) else list(images)
    size = len(views[0])
    if size % parts:
        raise ValueError(f"parts: expected a divisor of the batch of {size}, got {parts}")
    if order is not None:
        views = [view[order] for view in views]
    chunks = zip(*(view.chunk(parts) for view in views), strict=True)
    outputs = [cohort(c[0] if isinstance(images, Tensor) else list(c)) for c in chunks]
    if parts > 1:
        outputs = [merged(outputs, torch.cat)]
    if order is None:
        return outputs[0]
    back = order.argsort()
    return merged(outputs, lambda one: one[0][back])
