"""Bytes of the tensors alive at a time, by what they are for, and the most there were."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Where tensors belong that no kind has been named for.
WORKSPACE = "workspace"
#: The kind of what lies in host memory beside the device, which is the CPU too. The index makes it
#: another device for fake tensors: an operation on tensors of both raises an error.
HOST, HOST_MEMORY = "host", torch.device("cpu", 0)


class LiveBytes(TorchDispatchMode):
    """Within it, every storage that an operation makes counts from its birth to its death.

    A storage counts once, however many tensors view it. Memory that an operation allocates and
    frees within itself is not seen.

    Attributes:
        peak: bytes of each kind when their sum was largest, since the last :meth:`reset`;
            :data:`HOST` is not in the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: Mapping[str, int] = {}
        self._kind = WORKSPACE
        self._live: Counter[str] = Counter()
        self._total = self._most = 0
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._born(leaf)
        if self._total > self._most:
            self._most, self.peak = self._total, dict(self._live)
        return out

    def reset(self) -> None:
        """Forgets the peak before now."""
        self._most, self.peak = self._total, dict(self._live)

    def total(self) -> int:
        """Bytes at the peak."""
        return self._most

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Within it, what is born is of this kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def call(self, tensor: Tensor, kind: str) -> None:
        """A tensor that is alive is of this kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            ref, before, size = self._known[key]
            self._known[key] = ref, kind, size
            self._live[before] -= size
            self._live[kind] += size

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Storages that were there before, which views and updates in place would bring in."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage), self._kind, 0

    def watch(self, module: nn.Module, kind: str) -> None:
        """Gives a kind to all that forward runs of a module and its parts make, reruns included."""
        stack: list[str] = []

        def enter(*_: Any) -> None:
            stack.append(self._kind)
            self._kind = kind

        def leave(*_: Any) -> None:
            self._kind = stack.pop()

        for part in module.modules():
            part.register_forward_pre_hook(enter)
            # A checkpoint stops its rerun by an exception once it has what it needs.
            part.register_forward_hook(leave, always_call=True)

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        kind = HOST if tensor.device == HOST_MEMORY else self._kind
        self._known[key] = weakref.ref(storage, partial(self._died, key)), kind, size
        self._live[kind] += size
        self._total += size * (kind != HOST)

    def _died(self, key: int, _: object) -> None:
        _, kind, size = self._known.pop(key)
        self._live[kind] -= size
        self._total -= size * (kind != HOST)
