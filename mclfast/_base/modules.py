"""Modules that are run again, or for evaluation, and left as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# In training mode these normalise by the batch, and do without statistics to update.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BufferSnapshot:
    """The buffers of modules as they are now, as a context to run the modules from there again.

    Within it, the modules have copies of what they had; afterwards, what they have now. Their own
    tensors are not written to: what a graph has saved of them stays valid.

    Args:
        modules: what is run again; a module found twice counts once.
        skip_statistics: let batch norms that would only write to their buffers have none, which
            saves the copies. Their graph then holds other tensors than that of the first run.
    """

    def __init__(self, modules: Iterable[nn.Module], *, skip_statistics: bool = False) -> None:
        self._values = {
            (module, name): None
            if skip_statistics and _only_writes(module)
            else buffer.detach().clone()
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._own: dict[tuple[nn.Module, str], Tensor | None] = {}

    def __enter__(self) -> None:
        for (module, name), value in self._values.items():
            self._own[module, name] = module._buffers[name]
            module._buffers[name] = None if value is None else value.clone()

    def __exit__(self, *_: object) -> None:
        for (module, name), buffer in self._own.items():
            module._buffers[name] = buffer


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards the buffers of modules have the values of before, in the same memory."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _only_writes(module: nn.Module) -> bool:
    return module.training and type(module) in _BATCH_NORMS


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode, and afterwards as it was before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
