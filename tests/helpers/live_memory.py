"""Bytes of tensors that are alive while code runs, counted tensor by tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within it, counts the storage of all tensors that operations give, until it is freed.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _real(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _real(tensor):
                storage = tensor.untyped_storage()
                # Views, and what is written in place, are not new.
                if storage.data_ptr() not in known | self._known.keys():
                    self._known[storage.data_ptr()] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage.data_ptr())
        return result

    def _freed(self, address: int) -> None:
        self.now -= self._known.pop(address)


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage().data_ptr() != 0


def peak_of(run: Callable[[], Any]) -> int:
    """Most bytes alive at a time, beyond those from before."""
    with LiveMemory() as memory:
        run()
    return memory.peak
