"""A cohort as functions of its parameters, for differentiation through training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mclfast.cohort import Cohort, PeerOutputs, joined

Outputs = Callable[[dict[str, Tensor]], PeerOutputs]


def cohort_function(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> Outputs:
    """The outputs of all peers for images; buffers of the cohort stay as they are."""
    return _function(cohort, "", [cohort], lambda value: value, images)


def peer_functions(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> list[Outputs]:
    """The outputs of each peer alone (see :meth:`mclfast.Cohort.peer_forward`).

    Each takes the parameters of the whole cohort; :func:`mclfast.cohort.joined` makes the outputs
    of the cohort from theirs. Where the peers wait in host memory, so do the parameters that are
    passed, and each function copies those of its peer to the device.
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

    def forward(self, peer: int, view: Tensor) -> PeerOutputs:
        offload = self.cohort.offload
        with nullcontext() if offload is None else offload.replaced(peer):
            return self.cohort.peer_forward(peer, view)


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
            module, {place: values[name] for place, name in places.items()}, args,
            tie_weights=False,
        )  # fmt: skip
        return found

    return outputs
