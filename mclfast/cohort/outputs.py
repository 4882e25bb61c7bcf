"""What a cohort puts out, and what a method is told: the words that networks and methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mclfast._base.tensors import wide
from mclfast.models.auxiliary import PeerNetwork, StageOutputs

#: Runs several peers in training, each on its own view of the images [B, C, H, W].
RunPeers = Callable[[Sequence[PeerNetwork], Sequence[Tensor]], list[StageOutputs]]


class HostMemory(Protocol):
    """What a cohort asks of the place where its peers wait in host memory for their turn.

    Attributes:
        device: where a peer runs in its turn.
    """

    device: torch.device

    def present(self, peer: int) -> AbstractContextManager[None]:
        """The turn of a peer, whose parameters are on the device within it."""

    def replaced(self, peer: int) -> AbstractContextManager[None]:
        """The turn of a peer that runs with other tensors in the place of its parameters."""

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the device."""

    def wait(self) -> None:
        """Returns when the device has written what it writes to host memory."""


class PeerOutputs(NamedTuple):
    """What a cohort puts out for a batch, and all that a method sees of the peers.

    Attributes:
        features: networks of stages of [B, D_a], pooled; the last stage is the backbone's own.
        logits: networks of stages of [B, C].
        embeddings: networks of stages of [B, projection_dim] unit-norm; empty without heads.
        maps: of each network, the last feature map [B, D_a, h, w] before pooling.
        shared: the last map [B, c, h, w] that all networks have in common, None without one.
        teacher: outputs of the moving average of the whole cohort, without gradient, for methods
            that ask for it; on the same images unless the method wants a view of its own for it.
    """

    features: tuple[tuple[Tensor, ...], ...]
    logits: tuple[tuple[Tensor, ...], ...]
    embeddings: tuple[tuple[Tensor, ...], ...]
    maps: tuple[Tensor, ...] = ()
    shared: Tensor | None = None
    teacher: PeerOutputs | None = None

    @property
    def final_features(self) -> tuple[Tensor, ...]:
        """Pooled feature [B, D_a] of each backbone."""
        return tuple(stages[-1] for stages in self.features)

    @property
    def final_logits(self) -> tuple[Tensor, ...]:
        """Logits [B, C] of each network's own classifier."""
        return tuple(stages[-1] for stages in self.logits)


def mean_logits(outputs: PeerOutputs) -> Tensor:
    """The mean of the peers' own logits, [B, C], float32 or wider."""
    return torch.stack([wide(z) for z in outputs.final_logits]).mean(0)


def joined(peers: Sequence[PeerOutputs], views: Sequence[Tensor]) -> PeerOutputs:
    """The outputs of a cohort from those of each peer alone; ``shared`` needs a common view."""
    same = all(view is views[0] for view in views)
    return PeerOutputs(
        tuple(p.features[0] for p in peers),
        tuple(p.logits[0] for p in peers),
        tuple(stages for p in peers for stages in p.embeddings),
        tuple(m for p in peers for m in p.maps),
        peers[0].shared if same else None,
    )


def merged(values: Sequence[Any], merge: Callable[[list[Tensor]], Tensor]) -> Any:
    """One value of several of the same structure, their tensors merged.

    Args:
        values: outputs, nested tuples of tensors, tensors or None.
        merge: from the tensors at one place of all values to the one of the result.
    """
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return merge(list(values))
    fields = [merged(parts, merge) for parts in zip(*values, strict=True)]
    return PeerOutputs(*fields) if isinstance(first, PeerOutputs) else tuple(fields)


def detached(outputs: PeerOutputs) -> PeerOutputs:
    """The same values, without gradient."""
    constant: PeerOutputs = merged([outputs], lambda one: one[0].detach())
    return constant


# No NamedTuple: those have a method called index.
@dataclass(frozen=True, eq=False)
class Batch:
    """What a method knows of a batch beside the outputs of the peers.

    Attributes:
        labels: [B] int64.
        index: [B] int64, numbers of the samples in the training set.
        step: number of the training step, over the whole run.
        epoch: number of the epoch, from 0.
    """

    labels: Tensor
    index: Tensor
    step: int
    epoch: int


@dataclass(frozen=True, eq=False)
class Setup:
    """What a method is told of cohort and data before a run starts.

    Attributes:
        labels: [n] int64 of the training set, on the device of the run.
        num_classes: C.
        projection_dim: width of the embeddings, None where the cohort has none.
        example: outputs of the cohort for two blank images, without gradient: the widths of all
            features, logits and maps.
        seed: of the run.
        batch_size: B, images per step.
    """

    labels: Tensor
    num_classes: int
    projection_dim: int | None
    example: PeerOutputs
    seed: int
    batch_size: int = 1
