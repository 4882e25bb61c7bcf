"""Vectors of the size of all parameters, for the arithmetic of SGD steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class ParamVector:
    """One number for each value of a list of parameters, those of a dtype and device in one buffer.

    Sums of whole vectors are then single operations. As separate tensors they would lie scattered
    among freed activations, and keep the allocator from using that memory for activations again.

    Args:
        like: the parameters.
        values: one tensor for each, copied; zeros without.
    """

    def __init__(self, like: Sequence[Tensor], values: Iterable[Tensor] | None = None) -> None:
        kinds = [(p.dtype, p.device) for p in like]
        sizes = dict.fromkeys(kinds, 0)
        offsets = []
        for p, kind in zip(like, kinds, strict=True):
            offsets.append(sizes[kind])
            sizes[kind] += p.numel()
        make = torch.zeros if values is None else torch.empty
        buffers = {kind: make(n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()}
        self._buffers = list(buffers.values())
        #: Views, in the shapes of the parameters, as dense as possible in the order of their axes,
        #: like channels-last weights.
        self.tensors = [
            buffers[kind].as_strided(p.shape, _dense_strides(p), offset)
            for p, kind, offset in zip(like, kinds, offsets, strict=True)
        ]
        if values is not None:
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def mul_(self, factor: float) -> ParamVector:
        """This vector times a number, in place."""
        for own in self._buffers:
            own.mul_(factor)
        return self

    def add_(self, other: ParamVector, factor: float = 1.0) -> ParamVector:
        """This vector plus a multiple of one of the same parameters, in place."""
        for own, more in zip(self._buffers, other._buffers, strict=True):
            own.add_(more, alpha=factor)
        return self

    def plus(self, other: ParamVector, factor: float) -> ParamVector:
        """A new vector, this one plus a multiple of another."""
        return ParamVector(self.tensors, self.tensors).add_(other, factor)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()
