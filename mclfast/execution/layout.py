"""The settings that make a step faster and leave what it computes as it is, up to rounding.

``channels_last``, ``compile_peers`` and ``peers_parallel`` say how the networks run; for
``cuda_graphs`` see :mod:`mclfast.execution.cuda_graphs`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.execution.parallel import way_to_run
from mclfast.models.auxiliary import PeerNetwork, StageOutputs


def arrange(cohort: Cohort, config: TrainConfig, device: torch.device) -> None:
    """Makes the networks of a cohort run in training as a config says.

    Args:
        cohort: on the device; parameters and names stay what they are.
        config: read are ``channels_last``, ``compile_peers`` and ``peers_parallel``.
        device: the device that the networks run on.

    Raises:
        ValueError: a setting that does not go with this cohort or device.
        RuntimeError: torch.compile does not work here; the text says why.
    """
    shares = cohort.topology is not None and cohort.topology.shares
    for name, on in (
        ("compile_peers", config.compile_peers),
        ("peers_parallel", config.peers_parallel != "off"),
    ):
        if on and shares:
            raise ValueError(
                f"{name}: expected independent networks, got ones that share modules; "
                "use topology independent"
            )
    if wants_channels_last(config, device):
        # The layout of the weights decides that of all maps.
        cohort.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cohort.run_alone = compiled_call(device) if config.compile_peers else None
    cohort.run_together = way_to_run(config.peers_parallel, cohort.peers, device, report=_tell)


def wants_channels_last(config: TrainConfig, device: torch.device) -> bool:
    """Whether the networks run with channels last in memory."""
    if config.channels_last != "auto":
        return config.channels_last == "on"
    # Without mixed precision, cuDNN's convolutions take either layout.
    return device.type == "cpu" or config.amp != "off"


def check_memory(config: TrainConfig, memory: str) -> None:
    """Raises ValueError where a memory mode does not run the networks as a config says."""
    if config.peers_parallel != "off" and memory != "ordinary":
        raise ValueError(f"memory: expected ordinary with peers_parallel, got {memory}")
    if config.compile_peers and memory == "checkpoint":
        raise ValueError(
            "memory: expected ordinary or sequential with compile_peers, got checkpoint"
        )


@contextmanager
def plain_calls(cohort: Cohort) -> Iterator[None]:
    """Within it, networks run by plain calls: what is differentiated twice cannot be compiled."""
    before = cohort.run_alone, cohort.run_together
    cohort.run_alone = cohort.run_together = None
    try:
        yield
    finally:
        cohort.run_alone, cohort.run_together = before


def compiled_call(device: torch.device) -> Callable[[PeerNetwork, Tensor], StageOutputs]:
    """The call of a network, compiled; equal networks share what is compiled.

    Raises:
        RuntimeError: torch.compile does not work here.
    """
    try:
        # A Python without support, no C++ compiler, no Triton: known before the first step.
        torch.compile(_trial)(torch.ones(8, device=device))
    # Compilers raise errors of no common type.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RuntimeError(
            f"compile_peers: expected torch.compile to work on {device.type} here, got {reason}"
        ) from error
    compiled: Callable[[PeerNetwork, Tensor], StageOutputs] = torch.compile(_call, dynamic=False)
    return compiled


def _trial(x: Tensor) -> Tensor:
    return x.sin() + 1


def _call(network: PeerNetwork, view: Tensor) -> StageOutputs:
    result: StageOutputs = network(view)
    return result


def _tell(text: str) -> None:
    tqdm = optional_import("tqdm", extra="train").tqdm
    # Beside a progress bar, and not into it.
    tqdm.write(text, file=sys.stderr)
