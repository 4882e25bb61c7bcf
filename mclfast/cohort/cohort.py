"""A cohort: peer networks with their projection heads, run together or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_integer, describe
from mclfast.cohort.heads import ProjectionHead
from mclfast.cohort.outputs import HostMemory, PeerOutputs, RunPeers, joined
from mclfast.cohort.topology import SharedRun, Topology, path_maps, share
from mclfast.models.auxiliary import PeerNetwork, StageOutputs
from mclfast.models.staged import StagedNetwork


class Cohort(nn.Module):
    """Peer networks trained together; equal or different, any number of them.

    Args:
        networks: staged backbones (``mclfast.models.<name>(...)`` or ``mclfast.staged(module,
            ...)``), or ready :class:`PeerNetwork` objects.
        auxiliary_heads: give every backbone a feature-refinement head and classifier per
            intermediate stage (layer-wise methods need them; inference does not).
        projection_dim: width of the embeddings, one projection head per stage; None for no heads.
        projection: kind of the projection heads, "mlp" or "linear", see
            :class:`mclfast.cohort.heads.ProjectionHead`.
        topology: parts that the networks share, see :func:`mclfast.cohort.topology.topology`. The
            networks are changed in place: each uses the modules of the first network of its group.
            None for independent peers.

    Attributes:
        offload: place in host memory where peers wait for their turn; None if all stay on the
            device.

    Raises:
        TypeError: ``networks`` is not a sequence.
        ValueError: there are no networks, one occurs twice, they differ in their number of classes,
            projection_dim is below 1, or the projection is unknown.

    Examples:
        >>> import torch
        >>> from mclfast import Cohort, models
        >>> cohort = Cohort([models.resnet8(num_classes=10) for _ in range(2)], projection_dim=16)
        >>> outputs = cohort(torch.randn(4, 3, 32, 32))
        >>> len(outputs.logits), outputs.final_logits[0].shape, outputs.embeddings[0][0].shape
        (2, torch.Size([4, 10]), torch.Size([4, 16]))
    """

    def __init__(
        self,
        networks: Sequence[StagedNetwork | PeerNetwork],
        *,
        auxiliary_heads: bool = True,
        projection_dim: int | None = 128,
        projection: Literal["mlp", "linear"] = "mlp",
        topology: Topology | None = None,
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
        # A network that occurs twice would be trained twice, and learn from itself.
        if len({id(peer.backbone) for peer in peers}) < len(peers):
            raise ValueError("networks: expected different networks, got one of them twice")
        classes = [peer.num_classes for peer in peers]
        if len(set(classes)) > 1:
            raise ValueError(f"networks: expected one number of classes for all, got {classes}")
        self.num_classes = classes[0]
        self.topology = topology
        self.offload: HostMemory | None = None
        if topology is not None:
            share([peer.backbone for peer in peers], topology)
        self.networks = nn.ModuleList(peers)
        #: How independent peers run in training: a peer by itself, and all of them in one call.
        #: None for plain calls; set by :mod:`mclfast.execution.layout`.
        self.run_alone: Callable[[PeerNetwork, Tensor], StageOutputs] | None = None
        self.run_together: RunPeers | None = None
        self.projection_dim = projection_dim
        self.projections = nn.ModuleList()
        if projection_dim is not None:
            self.projections.extend(
                nn.ModuleList(ProjectionHead(dim, projection_dim, kind=projection) for dim in dims)
                for dims in self.feature_dims
            )

    @property
    def peers(self) -> list[PeerNetwork]:
        """The peer networks, in the order of their numbers."""
        return [n for n in self.networks if isinstance(n, PeerNetwork)]

    @property
    def device(self) -> torch.device:
        """The device that the peers run on."""
        return next(self.parameters()).device if self.offload is None else self.offload.device

    @property
    def feature_dims(self) -> list[list[int]]:
        """Width of the pooled feature of every stage, networks of stages."""
        return [[peer.feature_dim] * peer.num_stages for peer in self.peers]

    def peer_modules(self, peer: int) -> list[nn.Module]:
        """The modules that one peer runs through: its network and its projection heads."""
        return [self.networks[peer], *self.projections[peer : peer + 1]]

    def forward(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        """Runs the peers on the same images [B, C, H, W], or each on its own view of them."""
        views = self.views(images)
        if self.training and self.run_together is not None:
            outputs = self.run_together(self.peers, views)
            return joined([self._with_heads(j, out, None) for j, out in enumerate(outputs)], views)
        done: dict[SharedRun, Tensor] = {}
        return joined(
            [self.peer_forward(j, view, done=done) for j, view in enumerate(views)], views
        )

    def views(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """One view of the images for each peer: the images themselves, or the peer's own view.

        Args:
            images: one tensor [B, C, H, W] for all peers, or one for each of them.

        Raises:
            ValueError: the number of views is not the number of peers.
        """
        views = [images] * len(self.peers) if isinstance(images, Tensor) else list(images)
        if len(views) != len(self.peers):
            raise ValueError(f"images: expected {len(self.peers)} views, got {len(views)}")
        return views

    def peer_forward(
        self,
        peer: int,
        view: Tensor,
        *,
        done: dict[SharedRun, Tensor] | None = None,
        before: Callable[[Hashable], None] | None = None,
    ) -> PeerOutputs:
        """Runs one peer alone, with its projection heads; modules that it shares run for it again.

        Args:
            peer: number of the peer in the cohort.
            view: images that the peer sees, [B, C, H, W].
            done: maps of shared modules that need not run again, see
                :func:`mclfast.cohort.topology.path_maps`; None to run every module.
            before: function called before each part of the peer that is run. It gets a key that is
                the same whenever the part runs on that view again, for whichever peer.

        Returns:
            Outputs of a cohort of this one peer: tuples of one element. ``shared`` is the last map
            on the peer's path that all networks have in common.
        """
        with nullcontext() if self.offload is None else self.offload.present(peer):
            out, shared = self._stage_outputs(peer, view, {} if done is None else done, before)
            return self._with_heads(peer, out, shared)

    def _with_heads(self, peer: int, out: StageOutputs, shared: Tensor | None) -> PeerOutputs:
        """Outputs of a cohort of one peer, from the outputs of the peer's network."""
        embeddings: tuple[tuple[Tensor, ...], ...] = ()
        if len(self.projections):
            heads = self.projections[peer].children()
            embeddings = (tuple(head(f) for head, f in zip(heads, out.features, strict=True)),)
        return PeerOutputs((out.features,), (out.logits,), embeddings, (out.final_map,), shared)

    def _stage_outputs(
        self,
        peer: int,
        view: Tensor,
        done: dict[SharedRun, Tensor],
        before: Callable[[Hashable], None] | None,
    ) -> tuple[StageOutputs, Tensor | None]:
        """Outputs of one peer's network, and the last map that all networks share, if any."""
        network = self.peers[peer]
        if self.topology is None or not self.topology.shares:
            if before is not None:
                before(peer)
            call = self.run_alone if self.training else None
            return network(view) if call is None else call(network, view), None
        backbones = [p.backbone for p in self.peers]
        maps, shared = path_maps(backbones, self.topology, peer, view, done, before)
        if before is not None:
            before(peer)
        return network.head_outputs(network.backbone.finish(maps)), shared
