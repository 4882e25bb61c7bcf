"""Philox4x32-10, a counter-based random number generator, on tensors.

Every draw is a function of a key and a counter and so depends neither on the order of draws nor on
the number of processes or the device. The C++ and CUDA samplers give the same numbers.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the product of 32-bit values, which do not fit a signed int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four random words of a counter and a key.

    Args:
        counter: four words in [0, 2**32), each an int64 tensor or an integer; they broadcast.
        key: two words in [0, 2**32).

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    device = next((x.device for x in counter if isinstance(x, Tensor)), None)
    words = torch.broadcast_tensors(
        *(
            x.to(torch.int64)
            if isinstance(x, Tensor)
            # Filled in on the device, because the host would wait for the copy of a number.
            else torch.full((), x, dtype=torch.int64, device=device)
            for x in counter
        )
    )
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _scaled(low: Tensor, high: Tensor, bound: Any) -> Tensor:
    """floor(u * bound / 2**64) for the 64-bit u of two words and bound < 2**31."""
    return (high * bound + ((low * bound) >> 32)) >> 32


def uniform_integers(
    count: int, bound: Tensor | int, anchor: Tensor | int, *, seed: int, step: int, stream: int
) -> Tensor:
    """Integers in [0, bound), from 64 random bits each.

    Draw d is half d % 2 of the counter (d // 2, anchor, step, stream).

    Args:
        count: number of draws for each anchor.
        bound: number of values to draw from, in [1, 2**31); one for all anchors, or a tensor [B].
        anchor: number of the anchor, in [0, 2**32); one, or a tensor [B].
        seed: key of the generator, 64 bits.
        step, stream: last two words of the counter, in [0, 2**32).

    Returns:
        int64 [B, count], or [count] without tensors among the arguments.
    """
    tensors = [x for x in (bound, anchor) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else None
    block = torch.arange((count + 1) // 2, device=device)
    own, limit = (x[:, None] if isinstance(x, Tensor) else x for x in (anchor, bound))
    w0, w1, w2, w3 = philox((block, own, step, stream), (seed & _LOW, seed >> 32))
    drawn = torch.stack([_scaled(w0, w1, limit), _scaled(w2, w3, limit)], dim=-1)
    return drawn.flatten(-2)[..., :count]
