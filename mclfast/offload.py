"""Peers that wait in host memory for their turn on the device: parameters, gradients, momentum.

A turn brings the parameters of one peer to the device. In pass 2 of a step its gradients are used
there and then: the peer takes its optimiser step, and parameters and momentum go back. So the
number of peers is bounded by host memory; buffers (the statistics of batch norm) stay on the device
for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mclfast.cohort import Cohort, PeerOutputs
from mclfast.methods import Method
from mclfast.sequential import SequentialPeers


class PeerOffload:
    """Host memory for the peers of a cohort, which it changes to use it.

    Copies and computations follow each other in one stream of a GPU: :meth:`wait` before the host
    reads parameters or momentum.

    Args:
        cohort: independent peers, in host memory.
        device: where they run. Where that is the CPU, a turn works on copies all the same.

    Raises:
        ValueError: peers that share a module.
    """

    def __init__(self, cohort: Cohort, device: torch.device) -> None:
        self.device = device
        self._parameters = [
            [p for module in cohort.peer_modules(j) for p in module.parameters()]
            for j in range(len(cohort.peers))
        ]
        every = [p for own in self._parameters for p in own]
        if len({id(p) for p in every}) < len(every):
            raise ValueError("offload: expected none for peers that share modules, got peers")
        self._present: int | None = None
        self._homes: dict[nn.Parameter, Tensor] = {}
        for p in every:
            p.data = self._home(p.data)
        for module in cohort.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        cohort.offload = self
        self.wait()

    def wait(self) -> None:
        """Until the device has written what it writes to host memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def present(self, peer: int) -> Iterator[None]:
        """The peer's parameters on the device; one peer at a time, itself again within its turn."""
        if self._present == peer:
            yield
            return
        assert self._present is None, f"peer {self._present} has its turn"
        self._homes = {p: p.data for p in self._parameters[peer]}
        self._present = peer
        try:
            for p, home in self._homes.items():
                p.data = self.fetch(home)
            yield
        finally:
            for p, home in self._homes.items():
                p.data = home
            self._homes, self._present = {}, None

    @contextmanager
    def replaced(self, peer: int) -> Iterator[None]:
        """A turn of a peer that runs with other tensors in the place of its parameters."""
        assert self._present is None, f"peer {self._present} has its turn"
        self._present = peer
        try:
            yield
        finally:
            self._present = None

    def step(self, peer: int, optimizer: torch.optim.Optimizer) -> None:
        """A step of an optimiser for the present peer, whose gradients it uses up.

        Args:
            peer: its number.
            optimizer: of all peers; no other parameter of it has a gradient now.
        """
        trained = [p for p in self._parameters[peer] if p.grad is not None]
        homes: dict[tuple[nn.Parameter, str], Tensor] = {}
        try:
            for p in trained:
                for name, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        homes[p, name] = value
                        optimizer.state[p][name] = self.fetch(value)
            optimizer.step()
        except BaseException:
            # Not taken: the parameters at home are those of before, and so is their state.
            for (p, name), home in homes.items():
                optimizer.state[p][name] = home
            raise
        for p in trained:
            # A new home where the old one is not pinned: what changes the layout of a module, or
            # its dtype, gives it other memory.
            self._homes[p] = self._home(p.data, self._homes[p])
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    optimizer.state[p][name] = self._home(value, homes.get((p, name)))
            p.grad = None

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        return tensor.to(self.device, non_blocking=True, copy=True)

    def _home(self, tensor: Tensor, home: Tensor | None = None) -> Tensor:
        """A copy in host memory, which a GPU reads directly; in ``home`` if that is such memory."""
        pinned = self._pins()
        if home is None or home.is_pinned() != pinned:
            home = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return home.copy_(tensor, non_blocking=True)

    def _pins(self) -> bool:
        """Whether peers wait in memory that a GPU reads directly."""
        return self.device.type == "cuda"


def check_method(method: Method) -> None:
    """Raises ValueError where a method needs all peers on the device at a time."""
    if method.teacher:
        raise ValueError(
            "offload: expected none for a method with a moving average of the cohort, got peers "
            f"with {type(method).__name__}"
        )


class OffloadedPeers(SequentialPeers):
    """Peer-sequential training of peers in host memory; it steps each peer in its second turn.

    Args:
        cohort: with a :class:`PeerOffload`.
        method: see :class:`mclfast.peer_runner.PeerRunner`.
        autocast: the same.
        optimizer: of all parameters.
    """

    keeps_last = False

    def __init__(
        self,
        cohort: Cohort,
        method: Method,
        autocast: Callable[[], AbstractContextManager[Any]],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(cohort, method, autocast)
        assert cohort.offload is not None
        self._offload = cohort.offload
        self._optimizer = optimizer

    def backward(self, outputs: PeerOutputs) -> None:
        # What the loss itself gave gradients to: the method's own parameters.
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        super().backward(outputs)

    def run_again(self, peer: int, outputs: PeerOutputs) -> None:
        with self._offload.present(peer):
            super().run_again(peer, outputs)
            self._offload.step(peer, self._optimizer)
