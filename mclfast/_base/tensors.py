"""Tensors: the dtype statistics are computed in, unit norm, and whether all values are finite."""

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


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / max(||x||, eps)`` along the last axis, in float32 or wider.

    The published heads divide by the bare norm (NaN for a zero vector). The clamp acts on the
    squared norm, so that both derivatives are finite at zero; eps bounds the gradient there by
    1 / eps.

    Args:
        x: [..., D].
        eps: smallest norm divided by.

    Examples:
        >>> import torch
        >>> from mclfast import unit_norm
        >>> unit_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = wide(x)
    return x * x.square().sum(-1, keepdim=True).clamp_min(eps**2).rsqrt()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything narrower becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the statistics."""
    return x.to(statistics_dtype(x))
