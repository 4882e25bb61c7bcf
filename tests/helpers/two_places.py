"""Host and device told apart where both are the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mclfast.train.trainer import Trainer

HOST, DEVICE = "host", "device"


class Mixed(RuntimeError):
    """An operation took tensors of both places."""


class TwoPlaces(TorchDispatchMode):
    """Within it, what is computed lies where its inputs lie; only :meth:`moving` changes places.

    Tensors of no known place go wherever they are used, as do 0-dim ones.

    Attributes:
        now: bytes at each place.
        most: those on the device at their peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, str] = {}
        self._to: str | None = None
        self.now = {HOST: 0, DEVICE: 0}
        self.most = 0

    def put(self, place: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            address = _address(tensor)
            if address and address not in self._places:
                size = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._forget, address, size)
                self._places[address] = place
                self.now[place] += size
                self.most = max(self.most, self.now[DEVICE])

    def _forget(self, address: int, size: int) -> None:
        self.now[self._places.pop(address)] -= size

    def place(self, tensor: Tensor) -> str | None:
        return self._places.get(_address(tensor))

    @contextmanager
    def moving(self, place: str) -> Iterator[None]:
        """Within it, new tensors lie at a place, wherever those lie that they are copies of."""
        self._to = place
        try:
            yield
        finally:
            self._to = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = {self.place(t) for t in given if t.dim()} - {None}
        if self._to is not None:
            found = {self._to}
        if len(found) > 1:
            raise Mixed(str(func))
        result = func(*args, **(kwargs or {}))
        for place in found:
            self.put(place, (t for t in tree_leaves(result) if isinstance(t, Tensor)))
        return result


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 for the zeros that autograd gives none."""
    return 0 if tensor._is_zerotensor() else tensor.untyped_storage().data_ptr()


def offloaded_in_two_places(trainer: Trainer) -> TwoPlaces:
    """The places of an offloaded trainer: its peers' parameters on the host, all else that it has
    on the device, and copies between them."""
    places, cohort = TwoPlaces(), trainer.cohort
    offload = cohort.offload
    assert offload is not None

    class Fetch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            with places.moving(DEVICE):
                return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with places.moving(HOST):
                return grad.clone()

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            with places.moving(DEVICE):
                return tangent.clone()

    bring_home = offload._home

    def home(tensor: Tensor, home: Tensor) -> None:
        with places.moving(HOST):
            bring_home(tensor, home)

    offload.fetch = Fetch.apply  # type: ignore[method-assign]
    offload._home = home  # type: ignore[method-assign]
    places.put(HOST, cohort.parameters())
    method = trainer.method
    places.put(DEVICE, (*cohort.buffers(), *method.parameters(), *method.buffers()))
    return places
