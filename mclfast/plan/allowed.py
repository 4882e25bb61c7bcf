"""Which choices of memory settings a run can have."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from mclfast import offload, throughput
from mclfast.config import TrainConfig
from mclfast.cuda_graphs import check_graphs
from mclfast.methods import Method

if TYPE_CHECKING:
    from mclfast.plan.estimate import Choice


def refusal(
    config: TrainConfig, method: Method, device: torch.device, choice: Choice
) -> str | None:
    """Why training would refuse a choice, in its words; None where it would not.

    Args:
        config: of the run; its memory, offload and amp do not matter.
        method: of the run.
        device: of the run; need not be here.
        choice: the settings.
    """
    try:
        config = dataclasses.replace(config, **choice._asdict())
        throughput.check_memory(config, config.memory)
        if config.offload == "peers":
            offload.check_method(method)
        if config.cuda_graphs:
            check_graphs(config, method, config.memory, device)
    except ValueError as error:
        return str(error)
    return None
