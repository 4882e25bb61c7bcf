"""Contexts that run modules, once more or for evaluation, and leave them as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# In training mode these normalise by the batch, and run without statistics to update.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode for the block, then back into its mode of before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Gives a module and each of its parts its own mode back after the block."""
    before = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives the buffers of modules their old values back after the block, in the same memory."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


class BufferSnapshot:
    """Buffers of modules as they are now, to run the modules from there again in a ``with`` block.

    In the block the modules use copies of the recorded buffers; after it they have the buffers that
    they had when it was entered. These are never written to, so that a graph which has saved them
    stays valid.

    Args:
        modules: modules that will be run again; one that occurs twice counts once.
        skip_statistics: leave out the buffers of batch norms that would only write to them, which
            saves the copies. The graph of such a run holds other tensors than that of the first.
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


def _only_writes(module: nn.Module) -> bool:
    return module.training and type(module) in _BATCH_NORMS
