"""A cohort: peer networks with their projection heads, and what they put out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mclfast._checks import check_integer, describe
from mclfast.heads import ProjectionHead
from mclfast.models.auxiliary import PeerNetwork
from mclfast.models.staged import StagedNetwork


class PeerOutputs(NamedTuple):
    """What a cohort puts out for a batch, and all that a method sees of the peers.

    Attributes:
        features: networks of stages of [B, D_a], pooled; the last stage is the backbone's own.
        logits: networks of stages of [B, C].
        embeddings: networks of stages of [B, projection_dim] unit-norm; empty without heads.
    """

    features: tuple[tuple[Tensor, ...], ...]
    logits: tuple[tuple[Tensor, ...], ...]
    embeddings: tuple[tuple[Tensor, ...], ...]

    @property
    def final_logits(self) -> tuple[Tensor, ...]:
        """Logits [B, C] of each network's own classifier."""
        return tuple(stages[-1] for stages in self.logits)


class Cohort(nn.Module):
    """Peer networks trained together; equal or different, any number of them.

    Args:
        networks: staged backbones (``mclfast.models.<name>(...)`` or ``mclfast.staged(module,
            ...)``), or ready :class:`PeerNetwork` objects.
        auxiliary_heads: give every backbone a feature-refinement head and classifier per
            intermediate stage (layer-wise methods need them; inference does not).
        projection_dim: width of the embeddings, one head per stage; None for no heads.

    Raises:
        TypeError: ``networks`` is not a sequence.
        ValueError: no networks, one network twice, networks that differ in their number of
            classes, or a projection_dim below 1.
    """

    def __init__(
        self,
        networks: Sequence[StagedNetwork | PeerNetwork],
        *,
        auxiliary_heads: bool = True,
        projection_dim: int | None = 128,
    ) -> None:
        super().__init__()
        if not isinstance(networks, Iterable):
            raise TypeError(f"networks: expected a list of networks, got {describe(networks)}")
        if projection_dim is not None:
            check_integer("projection_dim", projection_dim, 1)
        peers = [
            n if isinstance(n, PeerNetwork) else PeerNetwork(n, auxiliary_heads=auxiliary_heads)
            for n in networks
        ]
        if not peers:
            raise ValueError("networks: expected at least one network, got none")
        # Two names of one network would be trained twice, and learn from itself.
        if len({id(peer.backbone) for peer in peers}) < len(peers):
            raise ValueError("networks: expected different networks, got one of them twice")
        classes = [peer.num_classes for peer in peers]
        if len(set(classes)) > 1:
            raise ValueError(f"networks: expected one number of classes for all, got {classes}")
        self.num_classes = classes[0]
        self.networks = nn.ModuleList(peers)
        self.projection_dim = projection_dim
        self.projections = nn.ModuleList()
        if projection_dim is not None:
            self.projections.extend(
                nn.ModuleList(ProjectionHead(dim, projection_dim) for dim in dims)
                for dims in self.feature_dims
            )

    @property
    def peers(self) -> list[PeerNetwork]:
        """The networks."""
        return [n for n in self.networks if isinstance(n, PeerNetwork)]

    @property
    def feature_dims(self) -> list[list[int]]:
        """Width of the pooled feature of every stage, networks of stages."""
        return [[peer.feature_dim] * peer.num_stages for peer in self.peers]

    def forward(self, images: Tensor) -> PeerOutputs:
        """Runs every peer on the same images [B, C, H, W]."""
        outputs = [network(images) for network in self.networks]
        features = tuple(tuple(out.features) for out in outputs)
        embeddings = tuple(
            tuple(head(f) for head, f in zip(heads.children(), stages, strict=True))
            # Without projection heads this is empty.
            for heads, stages in zip(self.projections, features, strict=False)
        )
        return PeerOutputs(features, tuple(tuple(out.logits) for out in outputs), embeddings)
