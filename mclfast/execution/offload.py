"""Peers that wait in host memory for their turn on the device: parameters, gradients, momentum.

A turn brings the parameters of one peer to the device. In pass 2 of a step its gradients are used
there and then: the peer takes its optimiser step, and parameters and momentum go back. So the
number of peers is bounded by host memory; buffers (the statistics of batch norm) stay on the device
for all of them. At home, and in its turn, what a peer has of a dtype lies in one block for the
parameters and one for the momentum: a turn is a few large copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mclfast.bilevel.param_vector import ParamVector
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import PeerOutputs
from mclfast.execution.sequential import SequentialPeers
from mclfast.methods import Method


class PeerOffload:
    """Host memory for the peers of a cohort, which it changes to use it.

    Copies and computations follow each other in one stream of a GPU: :meth:`wait` before the host
    reads parameters or momentum.

    Args:
        cohort: independent peers, in host memory.
        device: the device that a peer runs on in its turn; on a CPU a turn works on copies too.
        host: the device whose memory the peers wait in.

    Raises:
        ValueError: peers that share a module.
    """

    def __init__(
        self, cohort: Cohort, device: torch.device, host: torch.device | str = "cpu"
    ) -> None:
        self.device = device
        self._host = host
        self._parameters = [
            [p for module in cohort.peer_modules(j) for p in module.parameters()]
            for j in range(len(cohort.peers))
        ]
        every = [p for own in self._parameters for p in own]
        if len({id(p) for p in every}) < len(every):
            raise ValueError("offload: expected none for peers that share modules, got peers")
        self._present: int | None = None
        #: Parameters at home and optimiser state of each peer.
        self._homes: list[ParamVector] = []
        self._states = [ParamVector([]) for _ in self._parameters]
        #: The parameters of the peer that has its turn, on the device.
        self._here = ParamVector([])
        for own in self._parameters:
            self._homes.append(self._gathered(p.data for p in own))
            _give(own, self._homes[-1])
        for module in cohort.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        cohort.offload = self
        self.wait()

    def wait(self) -> None:
        """Returns when the device has written what it writes to host memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def present(self, peer: int) -> Iterator[None]:
        """The peer's parameters on the device; one peer at a time, itself again within its turn."""
        if self._present == peer:
            yield
            return
        assert self._present is None, f"peer {self._present} has its turn"
        own, home = self._parameters[peer], self._homes[peer]
        if not _lie_in(home, own):
            # A change of a module's layout or dtype gives it other memory.
            home = self._homes[peer] = self._gathered(p.data for p in own)
        self._present = peer
        try:
            self._here = home.moved(self.fetch)
            _give(own, self._here)
            yield
        finally:
            _give(own, home)
            self._here, self._present = ParamVector([]), None

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
            peer: number of the peer that has its turn.
            optimizer: the optimiser of all peers; only this peer's parameters have a gradient now.
        """
        own = self._parameters[peer]
        home, state = self._states[peer], _state(optimizer, own)
        if not _lie_in(home, state.values()):
            # The optimiser has taken over that of a checkpoint.
            home = self._states[peer] = self._gathered(state.values())
        away = home.moved(self.fetch)
        try:
            _set_state(optimizer, state, away)
            optimizer.step()
        except BaseException:
            # Not taken: the parameters at home are those of before, and so is their state.
            _set_state(optimizer, state, home)
            raise
        self._bring(self._here.buffers, self._homes[peer].buffers)
        state = _state(optimizer, own)
        if _lie_in(away, state.values()):
            self._bring(away.buffers, home.buffers)
        else:
            # The optimiser has made it just now.
            home = self._states[peer] = self._gathered(state.values())
        _set_state(optimizer, state, home)
        for p in own:
            p.grad = None

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        return tensor.to(self.device, non_blocking=True, copy=True)

    def _home(self, tensor: Tensor, home: Tensor) -> None:
        """A copy in ``home``, which lies in host memory."""
        home.copy_(tensor, non_blocking=True)

    def _bring(self, tensors: Iterable[Tensor], homes: Iterable[Tensor]) -> None:
        for tensor, home in zip(tensors, homes, strict=True):
            self._home(tensor, home)

    def _gathered(self, tensors: Iterable[Tensor]) -> ParamVector:
        """Copies in new host memory, which a GPU reads directly."""
        values = list(tensors)
        # Some may lie in host memory that the device still writes.
        self.wait()
        layout = ParamVector([torch.empty_like(value, device="meta") for value in values])
        home = layout.moved(
            lambda own: torch.empty_like(own, device=self._host, pin_memory=self._pins())
        )
        self._bring(values, home.tensors)
        return home

    def _pins(self) -> bool:
        """Whether peers wait in memory that a GPU reads directly."""
        return self.device.type == "cuda"


def _give(parameters: Sequence[nn.Parameter], vector: ParamVector) -> None:
    for p, value in zip(parameters, vector.tensors, strict=True):
        p.data = value


def _lie_in(vector: ParamVector, tensors: Iterable[Tensor]) -> bool:
    """Whether these are the tensors of a vector, or others that lie in their place."""
    own, found = (
        [(t.untyped_storage()._cdata, t.storage_offset(), t.stride()) for t in some]
        for some in (vector.tensors, tensors)
    )
    return own == found


#: State of an optimiser by parameter and name.
_State = dict[tuple[nn.Parameter, str], Tensor]


def _state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> _State:
    return {
        (p, name): value
        for p in parameters
        for name, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _set_state(optimizer: torch.optim.Optimizer, state: _State, vector: ParamVector) -> None:
    for (p, name), value in zip(state, vector.tensors, strict=True):
        optimizer.state[p][name] = value


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
        cohort: peers that wait in a :class:`PeerOffload`.
        method: sets the number of parts that a batch is run in.
        autocast: gives the context of a forward run.
        optimizer: the optimiser of all parameters.
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
        assert isinstance(cohort.offload, PeerOffload)
        self._offload = cohort.offload
        self._optimizer = optimizer

    def backward(self, outputs: PeerOutputs) -> None:
        # The loss itself has given gradients to the method's own parameters.
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        super().backward(outputs)

    def run_again(self, peer: int, outputs: PeerOutputs) -> None:
        with self._offload.present(peer):
            super().run_again(peer, outputs)
            self._offload.step(peer, self._optimizer)
