"""The memory modes of a training step by name: what a step keeps for its backward.

``ordinary`` keeps the activations of all peers; ``checkpoint`` the input of every block of all
peers, and runs each block twice; ``sequential`` the activations of one peer, and runs all peers but
one twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mclfast.config import TrainConfig
from mclfast.execution.checkpointing import CheckpointedPeers
from mclfast.execution.offload import OffloadedPeers
from mclfast.execution.runner import PeerRunner
from mclfast.execution.sequential import SequentialPeers

if TYPE_CHECKING:
    from mclfast.train.trainer import Trainer

#: How each mode runs the peers.
RUNNERS: dict[str, type[PeerRunner]] = {
    "ordinary": PeerRunner,
    "checkpoint": CheckpointedPeers,
    "sequential": SequentialPeers,
}


def resolve(config: TrainConfig, trainer: Trainer) -> tuple[str, str]:
    """The mode that a run takes, a name of :data:`RUNNERS`, and why in one line.

    Args:
        config: says the mode, or ``auto``.
        trainer: what ``auto`` is to choose for; built but for the runner of its peers.

    Raises:
        ValueError: ``auto`` for networks or a method that cannot be rehearsed.
    """
    if config.memory != "auto":
        return config.memory, f"{config.memory}: as set"
    # It rehearses with the modes of this module, and takes long to import.
    from mclfast.plan.choose import choose

    return choose(trainer)


def runner(trainer: Trainer) -> PeerRunner:
    """What runs the peers of a trainer in its mode."""
    settings = trainer.cohort, trainer.method, trainer.autocast
    if trainer.config.offload == "peers":
        return OffloadedPeers(*settings, trainer.optimizer)
    return RUNNERS[trainer.memory](*settings)
