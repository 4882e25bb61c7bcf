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
#: By the key of a part: the peer that ran it first, and the random numbers that it started from.
_Drawn = dict[Hashable, tuple[int, RngState]]


def cohort_function(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> Outputs:
    """The outputs of all peers for images; buffers of the cohort stay as they are."""
    return _function(cohort, "", [cohort], lambda value: value, images)


def peer_functions(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> list[Outputs]:
    """The outputs of each peer alone (see :meth:`mclfast.Cohort.peer_forward`).

    Each takes the parameters of the whole cohort; :func:`mclfast.cohort.outputs.joined` makes the
    outputs of the cohort from theirs. They are run in the order of the peers, and draw the same
    random numbers as all peers in one call. Where the peers wait in host memory, so do the
    parameters that are passed, and each function copies those of its peer to the device.
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
    """What :func:`mclfast.bilevel_gradient` takes as ``network``, and the map from what that gives
    to the outputs of the cohort.

    Args:
        cohort: the peers. Where they wait in host memory, it waits until they have arrived there.
        images: for all of them, or a view for each.
        one_at_a_time: a function for each peer, in place of one for all.
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
    """Random numbers of a peer that runs alone: in a module that it shares, those of the first peer
    that came through it, as if the module ran once for all of them.

    Args:
        peer: its number.
        drawn: what the peers of lower numbers left there in the same order.
    """

    def __init__(self, peer: int, drawn: _Drawn) -> None:
        self._peer = peer
        self._drawn = drawn
        #: Where its own numbers go on, while those of another peer are drawn again.
        self._own: RngState | None = None

    def before(self, key: Hashable) -> None:
        """A part begins to run, see :meth:`mclfast.Cohort.peer_forward`; the last is its own."""
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
    """The outputs of a module for ``args``.

    Args:
        module: its parameters have the names of those of a cohort after a prefix.
        prefix: that prefix.
        parts: the submodules that are run.
        fetch: brings a parameter to where they run.
        args: what the module takes.
    """
    run = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    named = (*module.named_parameters(), *module.named_buffers())
    names = {id(t): name for name, t in named if id(t) in run}
    buffers = {names[id(b)]: b for b in module.buffers() if id(b) in run}
    # Each place of a tensor once: functional_call would not give back what it took from a module
    # that networks share, which has several names.
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
        # Batch normalisation updates its statistics in place: on copies here.
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
