"""L2 normalisation that is safe at zero, to second order."""

from __future__ import annotations

from torch import Tensor

from mclfast.reference import wide


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / max(||x||, eps)`` along the last axis, in float32 or wider.

    The published heads divide by the bare norm (NaN for a zero vector). The clamp acts on the
    squared norm, so that both derivatives are finite at zero; eps bounds the gradient there by
    1 / eps.

    Args:
        x: [..., D].
        eps: smallest norm divided by.
    """
    x = wide(x)
    return x * x.square().sum(-1, keepdim=True).clamp_min(eps**2).rsqrt()
