"""Activation checkpointing inside the peers: each block keeps its input alone.

The backward runs a block again to get its activations. Block by block, that is the square root of
the depth at best; source: arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mclfast._base.modules import BufferSnapshot
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import PeerOutputs
from mclfast.execution.runner import PeerRunner
from mclfast.models.auxiliary import AuxiliaryHead


class CheckpointedPeers(PeerRunner):
    """One graph through all peers and the loss, with the blocks of the peers checkpointed."""

    def forward(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        with blocks_checkpointed(self.cohort):
            return super().forward(images)


@contextmanager
def blocks_checkpointed(cohort: Cohort) -> Iterator[None]:
    """Within it, forward runs keep the input of each block of a stage and none of what is inside.

    Buffers change in the forward alone, and random numbers are the same when a block runs again.
    """
    # An attribute of the module itself hides the method of its class; it may have one already.
    own = {block: block.__dict__.get("forward") for block in _blocks(cohort)}
    for block in own:
        block.__dict__["forward"] = _checkpointed(block)
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _blocks(cohort: Cohort) -> list[nn.Module]:
    """The blocks of all stages, those of auxiliary heads included, each once."""
    stages = [s for peer in cohort.peers for s in peer.backbone.stages]
    heads = [m for peer in cohort.peers for m in peer.auxiliary if isinstance(m, AuxiliaryHead)]
    stages += [s for head in heads for s in head.stages]
    return list(dict.fromkeys(block for stage in stages for block in _blocks_of(stage)))


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    """A sequence of blocks in its parts; one of single layers is a block itself."""
    parts = list(stage.children())
    if not isinstance(stage, nn.Sequential) or all(not list(p.children()) for p in parts):
        return [stage]
    return [block for part in parts for block in _blocks_of(part)]


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    run = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The second run may not update the statistics of batch norm once more.
        contexts = nullcontext(), BufferSnapshot([block])
        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    return forward
