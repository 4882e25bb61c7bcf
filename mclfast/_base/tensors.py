"""Arithmetic on tensors: the dtype of statistics, unit norm, and tests for finite values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Values that finite_sum adds up at a time.
_SUM_AT_A_TIME = 2**22


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics of a tensor are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of its statistics, float32 or wider."""
    return x.to(statistics_dtype(x))


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / max(||x||, eps)`` along the last axis, in float32 or wider.

    The published heads divide by the bare norm (NaN for a zero vector). The clamp acts on the
    squared norm, so that both derivatives are finite at zero; eps bounds the gradient there by
    1 / eps.

    Args:
        x: tensor of any shape [..., D].
        eps: smallest norm that is divided by.

    Examples:
        >>> import torch
        >>> from mclfast import unit_norm
        >>> unit_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = wide(x)
    return x * x.square().sum(-1, keepdim=True).clamp_min(eps**2).rsqrt()


def finite_sum(tensor: Tensor) -> Tensor:
    """A float64 sum of all values, 0-dim; it is not finite where one of them is not.

    A sum in another dtype copies the values that it adds up, and a large bank leaves no room for
    the copy. The values are therefore added up in parts.
    """
    parts = tensor.detach().reshape(-1).split(_SUM_AT_A_TIME)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether every value of every tensor is finite.

    Args:
        tensors: at least one tensor, on any devices.
        device: device that the sums are brought to; the host waits for it once.
    """
    sums = torch.stack([finite_sum(tensor).to(device) for tensor in tensors])
    return bool(sums.isfinite().all())
