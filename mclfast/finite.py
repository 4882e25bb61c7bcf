"""Whether tensors hold infinite values or NaN, without copies of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Values of a part of finite_sum.
_SUM_AT_A_TIME = 2**22


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether every value of every tensor is finite; waits once for the device of the answer."""
    sums = torch.stack([finite_sum(tensor).to(device) for tensor in tensors])
    return bool(sums.isfinite().all())


def finite_sum(tensor: Tensor) -> Tensor:
    """A sum of all values in float64 that is not finite where one of them is not; 0-dim.

    In parts: a sum in another dtype copies what it adds up, which a large bank leaves no room for.
    """
    parts = tensor.detach().reshape(-1).split(_SUM_AT_A_TIME)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()
