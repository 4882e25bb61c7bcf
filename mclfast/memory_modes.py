"""The memory modes of a training step by name: what a step keeps for its backward.

``ordinary`` keeps the activations of all peers; ``checkpoint`` the input of every block of all
peers, and runs each block twice; ``sequential`` the activations of one peer, and runs all peers but
one twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mclfast.activation_checkpoint import CheckpointedPeers
from mclfast.config import TrainConfig
from mclfast.offload import OffloadedPeers
from mclfast.peer_runner import PeerRunner
from mclfast.sequential import SequentialPeers

if TYPE_CHECKING:
    from mclfast.train import Trainer

#: How each mode runs the peers.
RUNNERS: dict[str, type[PeerRunner]] = {
    "ordinary": PeerRunner,
    "checkpoint": CheckpointedPeers,
    "sequential": SequentialPeers,
}


def resolve(config: TrainConfig, trainer: Trainer) -> str:
    """The mode that a run takes: a name of :data:`RUNNERS`.

    Args:
        config: says the mode, or ``auto``.
        trainer: what ``auto`` is to choose for; built but for the runner of its peers.

    Raises:
        ValueError: ``auto``, which nothing can choose for yet.
    """
    if config.memory == "auto":
        raise ValueError(f"memory: expected one of {', '.join(RUNNERS)}; got auto")
    return config.memory


def runner(trainer: Trainer, autocast: Callable[[], AbstractContextManager[Any]]) -> PeerRunner:
    """What runs the peers of a trainer in its mode; ``autocast`` gives the context of a run."""
    settings = trainer.cohort, trainer.method, autocast
    if trainer.config.offload == "peers":
        return OffloadedPeers(*settings, trainer.optimizer)
    return RUNNERS[trainer.memory](*settings)
