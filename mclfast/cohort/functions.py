"""A cohort as functions of its parameters, for differentiation through training steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mclfast._base.random import RngState, rng_state, set_rng_state
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import PeerOutputs, joined

Outputs = Callable[[dict[str, Tensor]], PeerOutputs]
#: For the key of a part: the peer that ran it first, and the state of the generators before it.
_Drawn = dict[Hashable, tuple[int, RngState]]


def cohort_function(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> Outputs:
    """A function from parameters to the outputs of all peers for the images.

    Args:
        cohort: peers to run; their buffers are not changed.
        images: one tensor [B, C, H, W] for all peers, or a view for each of them.
    """
    return _function(cohort, "", [cohort], lambda value: value, images)


def peer_functions(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> list[Outputs]:
    """One function for each peer, from parameters to the outputs of this peer alone.

    Each function takes the parameters of the whole cohort and runs
    :meth:`mclfast.Cohort.peer_forward`; :func:`mclfast.cohort.outputs.joined` makes the outputs of
    the cohort from the results. Run in the order of the peers, the functions draw the same random
    numbers as all peers in one call. If the peers wait in host memory, so do the parameters that
    are passed, and each function copies its peer's parameters to the device.

    Args:
        cohort: peers to run; their buffers are not changed.
        images: one tensor [B, C, H, W] for all peers, or a view for each of them.
    """
    alone = _PeerAlone(cohort)
    fetch = (lambda value: value) if cohort.offload is None else cohort.offload.fetch
    return [
        _function(alone, "cohort.", cohort.peer_modules(peer), fetch, peer, view)
        for peer, view in enumerate(cohort.views(images))
    ]


def networks_for(
    cohort: Cohort, images: Tensor | Sequence[Tensor], *, one_at_a_time: bool
) -> tuple[Outputs | list[Outputs], Callable[[Any], PeerOutputs]]:
    """The cohort as the argument ``network`` of :func:`mclfast.bilevel_gradient`.

    Args:
        cohort: peers to run. If they wait in host memory, the call returns when all are there.
        images: one tensor [B, C, H, W] for all peers, or a view for each of them.
        one_at_a_time: whether to give a function for each peer, in place of one for all of them.

    Returns:
        The network, and a function from its outputs to the outputs of the cohort.
    """
    if not one_at_a_time:
        return cohort_function(cohort, images), lambda outputs: outputs
    if cohort.offload is not None:
        cohort.offload.wait()
    views = cohort.views(images)
    return peer_functions(cohort, images), lambda peers: joined(peers, views)


class _PeerAlone(nn.Module):
    """:meth:`mclfast.Cohort.peer_forward` as the forward pass of a module."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__()
        self.cohort = cohort
        self._drawn: _Drawn = {}

    def forward(self, peer: int, view: Tensor) -> PeerOutputs:
        offload = self.cohort.offload
        draws = _PeerDraws(peer, self._drawn)
        with nullcontext() if offload is None else offload.replaced(peer):
            return self.cohort.peer_forward(peer, view, before=draws.before)


class _PeerDraws:
    """Random numbers of a peer that runs alone, the same as if all peers ran in one call.

    In a shared module the peer draws the numbers of the first peer that came through it, as if the
    module ran once for all of them.

    Args:
        peer: number of the peer in the cohort.
        drawn: states that the peers with lower numbers have left; this peer adds its own.
    """

    def __init__(self, peer: int, drawn: _Drawn) -> None:
        self._peer = peer
        self._drawn = drawn
        #: State to go on from with the peer's own numbers after another peer's are drawn again.
        self._own: RngState | None = None

    def before(self, key: Hashable) -> None:
        """Sets the generators for a part that begins to run; a peer's last part is never shared.

        Args:
            key: key of the part, see :meth:`mclfast.Cohort.peer_forward`.
        """
        first, state = self._drawn.get(key, (self._peer, None))
        if first != self._peer and state is not None:
            self._own = rng_state() if self._own is None else self._own
            set_rng_state(state)
            return
        if self._own is not None:
            set_rng_state(self._own)
            self._own = None
        self._drawn[key] = self._peer, rng_state()


def _function(
    module: nn.Module,
    prefix: str,
    parts: Sequence[nn.Module],
    fetch: Callable[[Tensor], Tensor],
    *args: Any,
) -> Outputs:
    """A function from the parameters of a cohort to the outputs of a module for ``args``.

    Args:
        module: module to run, whose parameters are named like the cohort's behind a prefix.
        prefix: start of the parameters' names in the module.
        parts: submodules that are run.
        fetch: function that brings a parameter to the device that the submodules run on.
        args: inputs of the module.
    """
    run = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    named = (*module.named_parameters(), *module.named_buffers())
    names = {id(t): name for name, t in named if id(t) in run}
    buffers = {names[id(b)]: b for b in module.buffers() if id(b) in run}
    # Each place of a tensor is listed once: a module that networks share has several names, and
    # functional_call would not give back the tensors that it took under all of them.
    places = {
        f"{path}.{attribute}" if path else attribute: names[id(tensor)]
        for path, part in module.named_modules()
        for attribute, tensor in (
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        )
        if id(tensor) in run
    }

    def outputs(params: dict[str, Tensor]) -> PeerOutputs:
        # Batch normalisation updates its statistics in place, here those of copies.
        values = {name: buffer.clone() for name, buffer in buffers.items()}
        values |= {
            name: fetch(params[name.removeprefix(prefix)])
            for name in names.values()
            if name not in buffers
        }
        found: PeerOutputs = functional_call(
            module, {place: values[name] for place, name in places.items()}, args, tie_weights=False
        )
        return found

    return outputs
