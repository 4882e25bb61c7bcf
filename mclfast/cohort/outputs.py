"""Types that networks and methods share: outputs of a cohort, a batch, the setup of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mclfast._base.checks import check_indices
from mclfast._base.tensors import wide
from mclfast.models.auxiliary import PeerNetwork, StageOutputs

#: Runs several peers in training, each on its own view of the images [B, C, H, W].
RunPeers = Callable[[Sequence[PeerNetwork], Sequence[Tensor]], list[StageOutputs]]


class HostMemory(Protocol):
    """Host memory in which the peers of a cohort wait for their turn on the device.

    Attributes:
        device: device that a peer runs on in its turn.
    """

    device: torch.device

    def present(self, peer: int) -> AbstractContextManager[None]:
        """The turn of a peer: in the block its parameters are on the device."""

    def replaced(self, peer: int) -> AbstractContextManager[None]:
        """The turn of a peer that runs with other tensors in place of its parameters."""

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the device."""

    def wait(self) -> None:
        """Returns when the device has finished its writes to host memory."""


class PeerOutputs(NamedTuple):
    """Outputs of a cohort for a batch: everything that a method sees of the peers.

    Attributes:
        features: pooled features, networks of stages of [B, D_a]; the last stage is the backbone's.
        logits: logits, networks of stages of [B, C].
        embeddings: unit-norm embeddings, networks of stages of [B, projection_dim]; empty without
            projection heads.
        maps: one feature map [B, D_a, h, w] per network, the last one before pooling.
        shared: last map [B, c, h, w] that all networks have in common; None if they share no stage.
        teacher: outputs of the moving average of the whole cohort, without gradient, for methods
            that ask for it. They belong to the same images, or to a view of its own if the method
            has one for the teacher.
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
    """Mean over the peers of their final logits, [B, C], float32 or wider."""
    return torch.stack([wide(z) for z in outputs.final_logits]).mean(0)


def joined(peers: Sequence[PeerOutputs], views: Sequence[Tensor]) -> PeerOutputs:
    """The outputs of a cohort from the outputs of each peer alone.

    Args:
        peers: outputs of a cohort of one peer, for each peer.
        views: images that each peer has seen; ``shared`` is kept only if all saw the same tensor.
    """
    same = all(view is views[0] for view in views)
    return PeerOutputs(
        tuple(p.features[0] for p in peers),
        tuple(p.logits[0] for p in peers),
        tuple(stages for p in peers for stages in p.embeddings),
        tuple(m for p in peers for m in p.maps),
        peers[0].shared if same else None,
    )


def merged(values: Sequence[Any], merge: Callable[[list[Tensor]], Tensor]) -> Any:
    """Merges several values of the same structure into one, tensor by tensor.

    Args:
        values: outputs, nested tuples of tensors, tensors or None.
        merge: function that gets the tensors at one place of all values and gives the result's.
    """
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return merge(list(values))
    fields = [merged(parts, merge) for parts in zip(*values, strict=True)]
    return PeerOutputs(*fields) if isinstance(first, PeerOutputs) else tuple(fields)


def detached(outputs: PeerOutputs) -> PeerOutputs:
    """The same outputs without gradient."""
    constant: PeerOutputs = merged([outputs], lambda one: one[0].detach())
    return constant


# A NamedTuple would not do: it has a method called index.
@dataclass(frozen=True, eq=False)
class Batch:
    """A batch as a method sees it beside the outputs of the peers.

    Attributes:
        labels: class of each sample, [B] int64.
        index: numbers of the samples in the training set, [B] int64.
        step: number of the training step, counted over the whole run.
        epoch: number of the epoch, from 0.

    Raises:
        TypeError: labels or index are no int64 tensor.
        ValueError: they are not of shape [B] with the same B.
    """

    labels: Tensor
    index: Tensor
    step: int
    epoch: int

    def __post_init__(self) -> None:
        # Labels [B, 1] or of another dtype would be broadcast by one term and refused by another.
        batch: int | str = "B"
        for name, value in (("labels", self.labels), ("index", self.index)):
            device = value.device if isinstance(value, Tensor) else torch.device("cpu")
            batch = len(check_indices(name, value, [batch], device))


@dataclass(frozen=True, eq=False)
class Setup:
    """Facts about cohort and data that a method gets before a run starts.

    Attributes:
        labels: class of each training sample, [n] int64, on the device of the run.
        num_classes: number of classes C.
        projection_dim: width of the embeddings; None if the cohort has none.
        example: outputs of the cohort for two blank images, without gradient, which show the widths
            of all features, logits and maps.
        seed: seed of the run.
        batch_size: images per step, B.
    """

    labels: Tensor
    num_classes: int
    projection_dim: int | None
    example: PeerOutputs
    seed: int
    batch_size: int = 1
