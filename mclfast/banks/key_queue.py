"""Queue of the newest keys of every network: the oldest keys leave it first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_embeddings, check_integer
from mclfast._base.tensors import unit_norm


class KeyQueue(nn.Module):
    """Embeddings of the last batches, the negatives of momentum contrast.

    Args:
        num_networks: number of networks M.
        size: number of keys K kept of each network, a multiple of the batch size.
        dim: width D of the embeddings.
        seed: seed that the first keys are drawn with, as random directions.

    Attributes:
        keys: stored keys [M, K, D], a unit-norm float32 buffer.
        position: place of the next keys, a 0-dim int64 buffer.

    Raises:
        ValueError: a size is below 1.

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
            keys: new keys [M, B, D], unit-norm, with a B that divides K.

        Raises:
            TypeError, ValueError: the keys have another type or shape, or B does not divide K.
        """
        networks, size, dim = self.keys.shape
        check_embeddings("keys", keys, [networks, "B", dim])
        check_queue_size(size, keys.shape[1])
        # The position stays on the device: as a number, it would make the host wait.
        index = self.position + torch.arange(keys.shape[1], device=self.keys.device)
        self.keys.index_copy_(1, index, keys.detach().to(self.keys.dtype))
        self.position.add_(keys.shape[1]).remainder_(size)


def check_queue_size(size: int, batch_size: int) -> None:
    """Raises ValueError unless the queue holds a whole number of batches."""
    if size % batch_size:
        raise ValueError(
            f"queue_size: expected a multiple of the batch of {batch_size}, got {size}"
        )
