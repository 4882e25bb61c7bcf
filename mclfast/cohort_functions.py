"""A cohort as functions of its parameters, for differentiation through training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mclfast.cohort import Cohort, PeerOutputs, joined

Outputs = Callable[[dict[str, Tensor]], PeerOutputs]


def cohort_function(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> Outputs:
    """The outputs of all peers for images; buffers of the cohort stay as they are."""
    return _function(cohort, "", images)


def peer_functions(cohort: Cohort, images: Tensor | Sequence[Tensor]) -> list[Outputs]:
    """The outputs of each peer alone (see :meth:`mclfast.Cohort.peer_forward`).

    Each takes the parameters of the whole cohort; :func:`mclfast.cohort.joined` makes the outputs
    of the cohort from theirs.
    """
    alone = _PeerAlone(cohort)
    return [
        _function(alone, "cohort.", peer, view) for peer, view in enumerate(cohort.views(images))
    ]


def networks_for(
    cohort: Cohort, images: Tensor | Sequence[Tensor], *, one_at_a_time: bool
) -> tuple[Outputs | list[Outputs], Callable[[Any], PeerOutputs]]:
    """What :func:`mclfast.bilevel_gradient` takes as ``network``, and the map from what that gives
    to the outputs of the cohort.

    Args:
        cohort: the peers.
        images: for all of them, or a view for each.
        one_at_a_time: a function for each peer, in place of one for all.
    """
    if not one_at_a_time:
        return cohort_function(cohort, images), lambda outputs: outputs
    views = cohort.views(images)
    return peer_functions(cohort, images), lambda peers: joined(peers, views)


class _PeerAlone(nn.Module):
    """:meth:`mclfast.Cohort.peer_forward` as the forward pass of a module."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__()
        self.cohort = cohort

    def forward(self, peer: int, view: Tensor) -> PeerOutputs:
        return self.cohort.peer_forward(peer, view)


def _function(module: nn.Module, prefix: str, *args: Any) -> Outputs:
    buffers = dict(module.named_buffers())
    names = {id(t): name for name, t in (*module.named_parameters(), *buffers.items())}
    # Each place of a tensor once: functional_call would not give back what it took from a module
    # that networks share, which has several names.
    places = {
        f"{path}.{attribute}" if path else attribute: names[id(tensor)]
        for path, part in module.named_modules()
        for attribute, tensor in (
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        )
    }

    def outputs(params: dict[str, Tensor]) -> PeerOutputs:
        # Batch normalisation updates its statistics in place: on copies here.
        values = {name: buffer.clone() for name, buffer in buffers.items()}
        values |= {f"{prefix}{name}": value for name, value in params.items()}
        found: PeerOutputs = functional_call(
            module, {place: values[name] for place, name in places.items()}, args,
            tie_weights=False,
        )  # fmt: skip
        return found

    return outputs
