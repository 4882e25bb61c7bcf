"""Vectors of the size of all parameters, for the arithmetic of SGD steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class ParamVector:
    """One number for each value of a list of parameters, with one buffer per dtype and device.

    The sum of two vectors is then one operation per buffer. Separate tensors would lie scattered
    among freed activations, and keep the allocator from using that memory for activations again.

    Args:
        like: parameters that the vector has the shapes, dtypes and devices of.
        values: one tensor for each parameter, copied; None for zeros.
    """

    def __init__(self, like: Sequence[Tensor], values: Iterable[Tensor] | None = None) -> None:
        kinds = [(p.dtype, p.device) for p in like]
        sizes = dict.fromkeys(kinds, 0)
        offsets = [0] * len(like)
        # Sizes that larger powers of two divide come first. The same powers then divide the offsets
        # of their tensors, which are so aligned for the wide loads of kernels.
        for i in sorted(range(len(like)), key=lambda i: -(like[i].numel() & -like[i].numel())):
            offsets[i] = sizes[kinds[i]]
            sizes[kinds[i]] += like[i].numel()
        make = torch.zeros if values is None else torch.empty
        #: One buffer for each dtype and device.
        self.buffers = [make(n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()]
        #: For each tensor, the number of its buffer.
        self._owners = [list(sizes).index(kind) for kind in kinds]
        #: Views of the buffers in the shapes of the parameters. They are dense in the parameters'
        #: order of axes, channels-last for channels-last weights.
        self.tensors = [
            self.buffers[owner].as_strided(p.shape, _dense_strides(p), offset)
            for p, owner, offset in zip(like, self._owners, offsets, strict=True)
        ]
        if values is not None:
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def moved(self, move: Callable[[Tensor], Tensor]) -> ParamVector:
        """A vector whose buffers are the results of ``move`` for the buffers of this one."""
        other = copy.copy(self)
        other.buffers = [move(own) for own in self.buffers]
        other.tensors = [
            other.buffers[owner].as_strided(t.shape, t.stride(), t.storage_offset())
            for t, owner in zip(self.tensors, self._owners, strict=True)
        ]
        return other

    def mul_(self, factor: float) -> ParamVector:
        """Multiplies this vector by a number, in place."""
        for own in self.buffers:
            own.mul_(factor)
        return self

    def add_(self, other: ParamVector, factor: float = 1.0) -> ParamVector:
        """Adds ``factor`` times another vector of the same parameters, in place."""
        for own, more in zip(self.buffers, other.buffers, strict=True):
            own.add_(more, alpha=factor)
        return self

    def plus(self, other: ParamVector, factor: float) -> ParamVector:
        """A new vector: this one plus ``factor`` times another."""
        return ParamVector(self.tensors, self.tensors).add_(other, factor)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()
