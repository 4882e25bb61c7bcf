"""The newest keys of every network, first in, first out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_embeddings, check_integer
from mclfast._base.tensors import unit_norm


class KeyQueue(nn.Module):
    """Embeddings of the last batches, which the losses of momentum contrast take for negatives.

    Args:
        num_networks: M.
        size: K, keys kept of each network; a multiple of the batch.
        dim: D, width of the embeddings.
        seed: of the first keys, directions drawn at random.

    Attributes:
        keys: [M, K, D] float32 buffer, unit-norm.
        position: 0-dim int64 buffer, where the next keys go.

    Raises:
        ValueError: a size below 1.

    Source: momentum contrast, arXiv 1911.05722, section 3.2.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, num_networks: int, size: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("num_networks", num_networks), ("size", size), ("dim", dim)):
            check_integer(name, value, 1)
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(num_networks, size, dim, generator=generator)
        self.register_buffer("keys", unit_norm(first))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Replaces the oldest keys.

        Args:
            keys: [M, B, D] unit-norm; K is a multiple of B.

        Raises:
            TypeError, ValueError: keys of another kind or shape, or a B that does not divide K.
        """
        networks, size, dim = self.keys.shape
        check_embeddings("keys", keys, [networks, "B", dim])
        check_queue_size(size, keys.shape[1])
        # On the device: the position as a number would make the host wait for it.
        index = self.position + torch.arange(keys.shape[1], device=self.keys.device)
        self.keys.index_copy_(1, index, keys.detach().to(self.keys.dtype))
        self.position.add_(keys.shape[1]).remainder_(size)


def check_queue_size(size: int, batch_size: int) -> None:
    """Raises ValueError where batches do not fill a queue evenly."""
    if size % batch_size:
        raise ValueError(
            f"queue_size: expected a multiple of the batch of {batch_size}, got {size}"
        )
