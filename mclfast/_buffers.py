"""Buffers of modules that are run again: the second run must not change them once more."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class BufferSnapshot:
    """The buffers of modules as they are now, as a context to run the modules from there again.

    Within it, the modules have copies of what they had; afterwards, what they have now. Their own
    tensors are not written to: what a graph has saved of them stays valid.

    Args:
        modules: what is run again; a module found twice counts once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._values = {
            (module, name): buffer.detach().clone()
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._own: dict[tuple[nn.Module, str], Tensor | None] = {}

    def __enter__(self) -> None:
        for (module, name), value in self._values.items():
            self._own[module, name] = module._buffers[name]
            module._buffers[name] = value.clone()

    def __exit__(self, *_: object) -> None:
        for (module, name), buffer in self._own.items():
            module._buffers[name] = buffer
