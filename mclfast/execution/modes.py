"""How a training step runs the peers: where they lie, in which memory mode, as one graph or not.

The memory modes by name say what a step keeps for its backward. ``ordinary`` keeps the activations
of all peers; ``checkpoint`` the input of every block of all peers, and runs each block twice;
``sequential`` the activations of one peer, and runs all peers but one twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mclfast._base.checks import unknown_name
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.execution import layout
from mclfast.execution.checkpointing import CheckpointedPeers
from mclfast.execution.cuda_graphs import Gradients, GraphedStep, check_graphs
from mclfast.execution.offload import OffloadedPeers, PeerOffload, check_method
from mclfast.execution.runner import PeerRunner
from mclfast.execution.sequential import SequentialPeers
from mclfast.methods.base import Method

#: How each mode runs the peers.
RUNNERS: dict[str, type[PeerRunner]] = {
    "ordinary": PeerRunner,
    "checkpoint": CheckpointedPeers,
    "sequential": SequentialPeers,
}


def place(cohort: Cohort, method: Method, config: TrainConfig, device: torch.device) -> None:
    """Brings the peers to the device, or to host memory with ``offload``, in the layout asked for.

    Raises:
        ValueError: settings that do not go with the cohort, the method or the device.
        RuntimeError: torch.compile is asked for and does not work here.
    """
    if cohort.offload is not None:
        raise ValueError("cohort: expected peers on a device, got ones that another step offloads")
    if config.offload == "peers":
        check_method(method)
        PeerOffload(cohort, device)
    else:
        cohort.to(device)
    layout.arrange(cohort, config, device)


def check(memory: str, config: TrainConfig, method: Method, device: torch.device) -> None:
    """Raises ValueError where a mode does not exist or does not go with the other settings."""
    if memory == "auto":
        raise ValueError(
            f"memory: expected {', '.join(RUNNERS)} for a training step by itself, got auto "
            "(mclfast.plan.choose finds a mode for a step)"
        )
    if memory not in RUNNERS:
        raise unknown_name("memory", memory, RUNNERS)
    layout.check_memory(config, memory)
    if config.offload == "peers":
        if memory != "sequential":
            raise ValueError(f"memory: expected sequential with offload peers, got {memory}")
        check_method(method)
    if config.cuda_graphs:
        check_graphs(config, method, memory, device)


def make_runner(
    memory: str,
    config: TrainConfig,
    cohort: Cohort,
    method: Method,
    autocast: Callable[[], AbstractContextManager[Any]],
    optimizer: torch.optim.Optimizer,
) -> PeerRunner:
    """The runner of the peers in a memory mode.

    Args:
        memory: a name of :data:`RUNNERS`.
        config: read is ``offload``.
        cohort: the peers, placed by :func:`place`.
        method: sets the number of parts that a batch is run in.
        autocast: gives the context of a forward run.
        optimizer: the optimiser of all parameters, which offloaded peers step one at a time.
    """
    if config.offload == "peers":
        return OffloadedPeers(cohort, method, autocast, optimizer)
    return RUNNERS[memory](cohort, method, autocast)


def recorded(
    gradients: Gradients,
    config: TrainConfig,
    parameters: Sequence[nn.Parameter],
    modules: Sequence[nn.Module],
    device: torch.device,
) -> Gradients:
    """Forward, loss and backward of a step as they are or, with ``cuda_graphs``, as their graph."""
    return GraphedStep(gradients, parameters, modules, device) if config.cuda_graphs else gradients
