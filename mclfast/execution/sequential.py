"""Peer-sequential training: the activations of one peer at a time, whatever their number.

Pass 1 runs the peers without a graph; the loss is differentiated with respect to their outputs;
pass 2 runs one peer after the other again, with a graph, and carries on with those gradients.
Gradients, buffers and random numbers are those of the ordinary step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mclfast._base.modules import BufferSnapshot
from mclfast._base.random import RngState, rng_state, set_rng_state
from mclfast.cohort.outputs import PeerOutputs, joined
from mclfast.cohort.topology import SharedRun
from mclfast.execution.batch_parts import forward_in_parts, merged
from mclfast.execution.runner import PeerRunner


class _PartRun(NamedTuple):
    """Inputs and random states from which the peers run on a part of a batch once more.

    Attributes:
        views: images [b, C, H, W] of each peer.
        random: state of the generators that each part of a peer started from, by its key (see
            ``Cohort.peer_forward``).
    """

    views: list[Tensor]
    random: dict[Hashable, RngState]

    def remember(self, key: Hashable) -> None:
        """Something is run for the first time."""
        self.random[key] = rng_state()

    def restore(self, key: Hashable) -> None:
        """It is run again."""
        set_rng_state(self.random[key])


class SequentialPeers(PeerRunner):
    """Runs the peers one after the other, each twice.

    The last of independent peers keeps its graph in pass 1: it is the one peer whose activations
    are there, and need not run again.
    """

    #: Whether the last peer may keep its graph.
    keeps_last = True

    def forward(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        """Pass 1. The outputs are leaves that collect the gradient of the loss."""
        count = len(self.cohort.peers)
        topology = self.cohort.topology
        # Shared modules have run without a graph when the last peer comes to them.
        independent = topology is None or not topology.shares
        self._again = range(count - 1 if self.keeps_last and independent else count)
        self._buffers = [
            BufferSnapshot(self.cohort.peer_modules(j), skip_statistics=True) for j in self._again
        ]
        self._runs: list[_PartRun] = []
        outputs = forward_in_parts(self._run_part, images, self.parts)
        leaves: PeerOutputs = merged([outputs], _leaf)
        return leaves

    def _run_part(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        run = _PartRun(self.cohort.views(images), {})
        self._runs.append(run)
        done: dict[SharedRun, Tensor] = {}
        peers = []
        for j, view in enumerate(run.views):
            # The casts of one peer's weights at a time.
            torch.clear_autocast_cache()
            with torch.set_grad_enabled(j not in self._again):
                own = self.cohort.peer_forward(j, view, done=done, before=run.remember)
            peers.append(own if self.method.uses_maps else own._replace(maps=(), shared=None))
        return joined(peers, run.views)

    def backward(self, outputs: PeerOutputs) -> None:
        """Pass 2, for the peers that got a gradient."""
        after = rng_state()
        for j in self._again:
            self.run_again(j, outputs)
        set_rng_state(after)
        self._runs, self._buffers = [], []

    def run_again(self, peer: int, outputs: PeerOutputs) -> None:
        """Pass 2 of one peer: adds to the gradients of its parameters."""
        found = [leaf.grad for leaf in _tensors_of(outputs, peer, shared=peer == 0)]
        if all(grad is None for grad in found):
            return
        with self._buffers[peer]:
            for part, run in enumerate(self._runs):
                grads = [None if g is None else g.chunk(self.parts)[part] for g in found]
                # Not all versions of torch drop casts made without a graph, which cut this one.
                torch.clear_autocast_cache()
                with self.autocast():
                    own = self.cohort.peer_forward(peer, run.views[peer], before=run.restore)
                pairs = zip(_tensors_of(own, 0, shared=peer == 0), grads, strict=False)
                live = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
                if live:
                    torch.autograd.backward([t for t, _ in live], [g for _, g in live])


def _leaf(one: Sequence[Tensor]) -> Tensor:
    """A tensor that collects a gradient; one with a graph passes it on by itself."""
    (tensor,) = one
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _tensors_of(outputs: PeerOutputs, peer: int, *, shared: bool) -> list[Tensor]:
    """The outputs of one peer; those that may have been dropped come last."""
    tensors = [*outputs.features[peer], *outputs.logits[peer]]
    tensors += [t for stages in outputs.embeddings[peer : peer + 1] for t in stages]
    tensors += outputs.maps[peer : peer + 1]
    return [*tensors, outputs.shared] if shared and outputs.shared is not None else tensors
